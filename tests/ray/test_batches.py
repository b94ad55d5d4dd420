"""Batches on a cluster of two nodes: files are answered whatever is in them, and parts of a measurement add up."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch

from octavo.calibrate import calibrate
from octavo.cli.answer_file import shaping_of
from octavo.cli.loading import ServeOptions
from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.jsonl import answer
from octavo.llm import LLM
from octavo.measure.accuracy.compare import compare, scores
from octavo.measure.candidate import Candidate
from octavo.measure.tasks import select
from octavo.measure.tasks.results import Results
from octavo.measure.tasks.run import run
from octavo.models.model import Model
from octavo.quant.format import KVFormat
from octavo.ray.cluster import Placement, placement
from octavo.ray.cluster import cluster as cluster_at
from octavo.ray.generate import AnswerShards, Generate
from octavo.ray.measuring import Workers, asking, comparing, observing
from octavo.ray.shards import Output, Place, read
from tests.conftest import status_of
from tests.measure.tasks.raw_files import write_raw_files
from tests.ray.conftest import SIZES

LOADING = {"device": "cpu", "dtype": "fp32"}
MODEL: dict[str, Any] = {"kv": "fp32", **LOADING, **SIZES}
PARAMS = {"max_tokens": 4, "temperature": 0.0}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two files: 23 good rows, two bad ones, a blank line, and ids of their own in one of them."""
    folder = tmp_path / "in"
    folder.mkdir()
    some = [json.dumps({"prompt": f"{i} Once upon a time"}) for i in range(12)]
    (folder / "a.jsonl").write_text("\n".join([*some[:5], "", "not JSON", *some[5:]]))
    rows = [{"id": f"own {i}", "prompt": f"Once {i}", "max_tokens": 2} for i in range(11)] + [
        {"id": "bad", "prompts": 1}
    ]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_files_are_cut_into_shards_and_every_row_is_read_once(prompts: Path, tmp_path: Path):
    """Rows keep their order, ids and lines, wherever the cuts are; a changed input is another job."""
    for rows in (1, 4, 100):
        output = Output(f"{prompts}/*.jsonl", str(tmp_path / f"out{rows}"), {}, rows)
        found = [row for shard in output.shards for row in read(output.inputs, shard)]
        assert [id for id, _, _ in found][:7] == [f"a.jsonl:{line}" for line in (1, 2, 3, 4, 5, 7, 8)]
        assert [id for id, _, _ in found][-2:] == ["own 10", "bad"]
        assert len(found) == 25
    assert [shard.number for shard in output.left()] == [0, 1]
    output.write(output.shards[0], [{"id": 1}], [])
    assert [shard.number for shard in Output(f"{prompts}/*.jsonl", str(tmp_path / "out100"), {}, 100).left()] == [1]
    with pytest.raises(OctavoError, match=r"other options \(kv None, not kv8\): name another"):
        Output(f"{prompts}/*.jsonl", str(tmp_path / "out100"), {"kv": "kv8"}, 100)
    (prompts / "c.jsonl").write_text('{"prompt": "more"}\n')
    with pytest.raises(OctavoError, match="other files"):
        Output(f"{prompts}/*.jsonl", str(tmp_path / "out100"), {}, 100)
    with pytest.raises(OctavoError, match="no file"):
        Output(f"{prompts}/*.parquet", str(tmp_path / "none"), {})


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([[7, 8, 5], [9, 1, 2]], [[7, 8, 5], [9, 1, 2]]),
        ([[7, None, 5], [9, 1, 2]], [["7", "0.parquet:2", "5"], ["9", "1", "2"]]),
        ([[7, 8, 5], ["a", "b", "c"]], [["7", "8", "5"], ["a", "b", "c"]]),
        ([[7, 8, 5], None], [["7", "8", "5"], ["1.parquet:1", "1.parquet:2", "1.parquet:3"]]),
        ([[date(2026, 11, day) for day in (1, 2, 3)]], [[date(2026, 11, day) for day in (1, 2, 3)]]),
    ],
    ids=["one type", "one is null", "two types", "a file without", "dates"],
)
def test_parquet_of_all_answers_has_one_schema_and_loses_nothing(
    ids: list[Any], kept: list[Any], tmp_path: Path, pamphlet: Model
):
    """Rows are answered as an LLM answers them, some with log-probabilities; one is refused, and written as JSON."""
    for i, own in enumerate(ids):
        rows = {"prompt": ["Once", "Upon", "Once"], "max_tokens": [2, 2, -1], "logprobs": [None, 2, None]}
        pq.write_table(pa.table(rows | ({"id": own} if own else {})), tmp_path / f"{i}.parquet")
    output = Output(f"{tmp_path}/*.parquet", str(tmp_path / "out"), {})
    answering = AnswerShards(output, params=PARAMS, model=pamphlet, kv="fp32", session_len=64)
    params = [SamplingParams(**PARAMS | {"max_tokens": 2, "logprobs": asked}) for asked in (None, 2)]
    answers = [answer(answering.llm, one) for one in answering.llm.generate(["Once", "Upon"], params)]
    assert "logprobs" in answers[1].keys() - answers[0].keys()
    written: list[dict[str, Any]] = []
    for shard, (*good, bad) in zip(output.shards, kept, strict=True):
        done = answering.shard(shard)
        assert (done["answered"], done["refused"], done["tokens"]) == (2, 1, 4)
        for line, (id, one) in enumerate(zip(good, answers, strict=True), 1):
            written.append({"id": id, "file": shard.file, "line": line, "logprobs": None, **one})
        (refused,) = lines(tmp_path / "out" / f"errors-{shard.number:06}.jsonl")
        assert "max_tokens" in refused.pop("error")
        assert refused == {"id": bad if isinstance(bad, int) else str(bad), "file": shard.file, "line": 3}
    assert pq.read_table(sorted((tmp_path / "out").glob("part-*"))).to_pylist() == written


def test_a_filesystem_of_another_kind_is_read_and_written_and_gone_on_with():
    """By its URI, with Parquet for Parquet: `*` stays in one folder, `**` does not."""
    there, root = Place.of("fsspec+memory://bucket")[0].fs, "fsspec+memory://bucket"
    rows = [{"id": i, "prompt": f"{i} Once upon a time", "seed": None if i else 7} for i in range(5)]
    for name in ("in/a", "in/b", "in/below/c"):
        there.create_dir(f"bucket/{name.rpartition('/')[0]}", recursive=True)
        pq.write_table(pa.Table.from_pylist(rows), f"bucket/{name}.parquet", filesystem=there, row_group_size=2)
    assert len(Output(f"{root}/in/**/*.parquet", f"{root}/deep", {}, rows=3).shards) == 6
    output = Output(f"{root}/in/*.parquet", f"{root}/out", {}, rows=3)
    found = [read(output.inputs, shard) for shard in output.shards]
    assert [[(id, line) for id, line, _ in part] for part in found] == [[(0, 1), (1, 2), (2, 3)], [(3, 4), (4, 5)]] * 2
    assert [row for _, _, row in found[0][:2]] == [rows[0], {"id": 1, "prompt": "1 Once upon a time"}]
    output.write(output.shards[1], [{"id": 3, "text": "…"}], [{"id": 4, "error": "…"}])
    assert [shard.number for shard in Output(f"{root}/in/*.parquet", f"{root}/out", {}, rows=3).left()] == [0, 2, 3]
    kept = {Path(info.path).name for info in there.get_file_info(pa.fs.FileSelector("bucket/out"))}
    assert kept == {"manifest.json", "part-000001.parquet", "errors-000001.jsonl"}
    part = pq.read_table("bucket/out/part-000001.parquet", filesystem=there, columns=["id", "text"])
    assert part.to_pylist() == [{"id": 3, "text": "…"}]
    for nothing, says in ((f"{root}/in/*.jsonl", "names no file"), ("nowhere://in/*.jsonl", "nowhere://in")):
        with pytest.raises(OctavoError, match=says):
            Output(nothing, f"{root}/none", {})


def test_an_address_without_a_cluster_is_one_error():
    """At once: Ray itself asks for minutes."""
    with pytest.raises(OctavoError, match=r"no Ray cluster at 127\.0\.0\.1:9 .*refused"), cluster_at("127.0.0.1:9"):
        pass


@pytest.mark.parametrize(
    ("cpus", "count", "placed"),
    [
        ([2], None, (1, 2)),
        ([4, 8], None, (2, 4)),
        ([8], 3, (3, 2)),
        ([2], 3, (3, 0.6666)),
        ([1, 1], 3, (3, 0.5)),
    ],
)
def test_models_side_by_side_share_all_cpus_and_each_has_a_place(
    cpus: list[int], count: int | None, placed: tuple[int, float], monkeypatch: pytest.MonkeyPatch
):
    """Ray has whole CPUs or a part of one, and a model is on one machine. With GPUs it is one or more of these."""
    nodes = [{"Alive": True, "Resources": {"CPU": own}} for own in cpus]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert placement(count) == Placement(*placed, 0)
    nodes.append({"Alive": True, "Resources": {"CPU": 8, "GPU": 4}})
    assert placement(None, each=2) == Placement(2, 0, 2)
    with pytest.raises(OctavoError, match="3 models of 2 GPUs each: the Ray cluster has 4; lower --replicas"):
        placement(3, each=2)


@pytest.fixture(scope="module")
def workers(cluster: str) -> Workers:
    assert cluster
    return Workers(Placement(2, 0.25, 0))


@pytest.mark.slow
def test_parts_of_a_calibration_and_of_a_comparison_come_to_one_run(
    workers: Workers, pamphlet: Model, text_ids: list[int]
):
    """Statistics of eight parts, by two workers, have the bits of one run's, and so have scores."""
    windows = [text_ids[i : i + 96] for i in range(0, 8 * 96, 96)]
    assert len(workers.parts(len(windows))) == 8
    told: list[tuple[int, int]] = []
    here = calibrate(pamphlet, windows, dataset="a test")
    there = calibrate(
        pamphlet, windows, dataset="a test", observe=observing(LOADING, workers, lambda *how: told.append(how))
    )
    assert told == [(done, 8) for done in range(1, 9)]
    assert there.header == here.header
    for own, other in zip(here.layers, there.layers, strict=True):
        for side in ("k", "v"):
            assert own[side].keys() == other[side].keys()
            for name in own[side]:
                assert np.array_equal(own[side][name].numpy(), other[side][name].numpy()), (side, name)
    candidates = [Candidate("fp32", KVFormat.parse("fp32")), Candidate("int8", KVFormat.parse("int8"), here)]
    one = compare(pamphlet, candidates, windows)
    parts = scores(comparing(LOADING, None, candidates, workers, lambda *how: told.append(how))(windows))
    assert repr(one) == repr(parts)
    assert torch.tensor(one[1].kl).item() > 0


@pytest.mark.slow
def test_a_task_asked_by_workers_comes_to_one_run(workers: Workers, pamphlet: Model, tmp_path: Path):
    """Each format is a job."""
    pytest.importorskip("lm_eval", reason="the extra octavo[tasks] is not installed")
    write_raw_files(tmp_path)
    parts, _ = select("winogrande", tmp_path)
    candidates = [Candidate(name, KVFormat.parse(name)) for name in ("fp32", "int8-token")]
    here, there = (
        run(pamphlet, candidates, parts, Results(tmp_path / name), limit=4, session_len=512, elsewhere=elsewhere)
        for name, elsewhere in (("here", None), ("there", asking(LOADING, workers)))
    )
    assert repr(here) == repr(there)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_rows_of_a_dataset_are_answered():
    """`Generate` in map_batches keeps columns, and says of a row why it has no answer."""
    rows = [{"id": i, "prompt": f"{i} Once upon a time", "max_tokens": 3} for i in range(5)]
    rows += [{"id": 5, "prompt": "Once", "max_tokens": -1}]
    dataset = ray.data.from_items(rows).map_batches(
        Generate,
        fn_constructor_kwargs={"params": PARAMS, **MODEL},
        batch_size=3,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.25,
    )
    found = sorted(dataset.take_all(), key=lambda row: row["id"])
    assert [bool(row["error"]) for row in found] == [False] * 5 + [True]
    assert all(row["completion_tokens"] == 3 and row["text"] for row in found[:5])


@pytest.mark.slow
def test_the_command_answers_files_in_order_and_goes_on(
    cluster: str, prompts: Path, tmp_path: Path, pamphlet: Model, capfd: pytest.CaptureFixture[str]
):
    """`octavo generate --ray`: each answer is the one of an LLM here, bad rows are in files of their own and end it
    with status 1, it tells what replicas did, and what is done is not done again."""
    pattern, out, sizes = f"{prompts}/*.jsonl", tmp_path / "out", ("--session-len", 512, "--max-batch-size", 4)
    (prompts / "c.jsonl").write_text('{"prompt": "answered before"}')
    options = ServeOptions(dtype="fp32", kv="fp32", session_len=512, max_batch_size=4)
    output = Output(pattern, str(out), shaping_of(options, False, None) | PARAMS)
    done = {"id": "done before", "file": output.shards[2].file, "line": 1}
    output.write(output.shards[2], [done], [])
    command = ["generate", "--ray", cluster, "--replicas", 2, "--dtype", "fp32", "--kv", "fp32", *sizes]
    command += ["--input", pattern, "--output", out, "--temperature", 0, "--max-tokens", 4]
    ray.shutdown()  # the command is a client of its own
    assert status_of(*command) == 1
    ray.init(cluster, log_to_driver=False)
    assert status_of(*command) == 0
    said = capfd.readouterr().err
    assert "replica " in said
    assert "errors-*.jsonl" in said
    assert "27 rows are answered" in said
    found = [row for part in sorted(out.glob("part-*")) for row in lines(part)]
    assert found.pop() == done
    assert [(row["file"], row["line"]) for row in found] == sorted((row["file"], row["line"]) for row in found)
    bad = [row for part in sorted(out.glob("errors-*")) for row in lines(part)]
    assert [row["id"] for row in bad] == ["a.jsonl:7", "bad"]
    assert "not JSON" in bad[0]["error"]
    asked = [f"{i} Once upon a time" for i in range(12)] + [f"Once {i}" for i in range(11)]
    params = [SamplingParams(**PARAMS)] * 12 + [SamplingParams(**PARAMS | {"max_tokens": 2})] * 11
    right = LLM(pamphlet, "fp32", **SIZES).generate(asked, params)
    assert [row["text"] for row in found] == [one.text for one in right]

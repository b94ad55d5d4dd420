"""Tuned formats: measured, chosen, checked, kept, and served everywhere by the name `tuned`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo import LLM, OctavoError, SamplingParams
from octavo.cache.size import CacheSize
from octavo.cli.loading import LoadOptions
from octavo.measure.tune.choice import token_budget
from octavo.measure.tune.sensitivity import FEW, MORE, Sensitivity, measure, readings
from octavo.measure.tune.tuning import Tuning, tune
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat, LayerFormats
from octavo.quant.tuned import FILE_NAME, Tuned
from tests.conftest import status_of

LENGTH = SamplingParams(max_tokens=6, ignore_eos=True)
MIXED = LayerFormats(
    tuple(map(KVFormat.parse, ("kv8", "k8v4", "kv4", "fp32", "fp32/int4-token+edges", "k4v8")))
)  # fmt: skip


@pytest.fixture(scope="module")
def window(text_ids: list[int]) -> list[int]:
    return text_ids[1000:1256]


@pytest.fixture(scope="module")
def found(pamphlet: Model, calibration: Calibration, window: list[int]) -> Sensitivity:
    done: list[int] = []
    measured = measure(pamphlet.bound, calibration, [window], lambda _: True, lambda: done.append(1))
    assert len(done) == readings(pamphlet.bound) == 16
    return measured


@pytest.fixture(scope="module")
def tuned(pamphlet: Model, calibration: Calibration, found: Sensitivity, window: list[int]) -> Tuning:
    size = token_budget(pamphlet.bound, 5.2)
    return tune(pamphlet.bound, calibration, found, size, [window], "a text", lambda: None)


def test_what_layers_lose_alone_nearly_adds_up(tuned: Tuning) -> None:
    for row in tuned.rows:
        assert row.kl == pytest.approx(row.expected, rel=0.5), row.name


def test_the_chosen_formats_lose_less_than_their_share_of_bits(tuned: Tuning) -> None:
    """Less than a mixture of kv4 and k8v4 of as many bits would, and no more bits than were asked for."""
    rows = {row.name: row for row in tuned.rows}
    few, more, own = rows["kv4"], rows["k8v4"], tuned.chosen
    assert few.bits < own.bits <= 5.2 < more.bits
    share = (own.bits - few.bits) / (more.bits - few.bits)
    assert own.kl < (1 - share) * few.kl + share * more.kl


def test_the_document_tells_what_each_layer_got_and_lost(tuned: Tuning) -> None:
    found = json.loads(json.dumps(tuned.document()))
    assert found["layers"] == [str(format) for format in tuned.formats]
    assert len(found["kl_of_4_bits"]) == 2 * len(found["layers"])
    assert [row["name"] for row in found["rows"]] == ["kv8", "k8v4", "tuned", "kv4"]


def test_8_bits_lose_in_proportion_to_4(found: Sensitivity) -> None:
    assert sum(one.kl[MORE] for one in found.sides) == pytest.approx(found.uniform["kv8"])
    ratios = [one.kl[FEW] / one.kl[MORE] for one in found.sides]
    assert max(ratios) == pytest.approx(min(ratios))
    assert min(ratios) > 50


def test_a_cache_of_many_formats_takes_the_sum_of_its_layers(pamphlet: Model, calibration: Calibration) -> None:
    llm = LLM(pamphlet, MIXED, calibration=calibration, session_len=256, max_batch_size=2)
    alone = [CacheSize.of([shape], format).block for shape, format in zip(pamphlet.bound.shapes, MIXED, strict=True)]
    assert llm.cache.size.block == sum(alone)
    assert llm.cache.nbytes == llm.cache.size.cache(llm.cache.num_blocks, 2)
    assert str(llm.format) == "tuned"


@pytest.mark.parametrize("attention", ["reference", "native"])
def test_prefix_hits_chunks_and_restored_sessions_answer_as_cold_ones(
    attention: str, pamphlet: Model, calibration: Calibration, text_ids: list[int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OCTAVO_ATTENTION", attention)
    prompt = text_ids[:150]

    def new(**sizes: int) -> LLM:
        return LLM(pamphlet, MIXED, calibration=calibration, session_len=256, max_batch_size=2, **sizes)

    cold = new()
    [expected] = cold.generate(prompt, LENGTH)
    [hit] = cold.generate(prompt, LENGTH)
    [chunked] = new(max_batch_tokens=48).generate(prompt, LENGTH)
    cold.save(tmp_path / "s", prompt)
    back = new()
    assert back.restore(tmp_path / "s").cached_tokens == 128
    [restored] = back.generate(prompt, LENGTH)
    assert (hit.cached_tokens, restored.cached_tokens) == (128, 128)
    assert expected.token_ids == hit.token_ids == chunked.token_ids == restored.token_ids
    with pytest.raises(OctavoError, match=r"holds kv8 and k8v4 and kv4 .* codes, and this cache kv8"):
        LLM(pamphlet, "kv8", calibration=calibration, session_len=256).restore(tmp_path / "s")


@pytest.fixture
def saved(pamphlet: Model, calibration: Calibration, tuned: Tuning, tmp_path: Path) -> Path:
    """A directory with both artefacts."""
    calibration.save(tmp_path)
    tuned.artefact(pamphlet.fingerprint).save(tmp_path)
    return tmp_path


def test_what_was_chosen_is_found_beside_the_calibration(pamphlet: Model, tuned: Tuning, saved: Path) -> None:
    assert pamphlet.format("tuned", saved) == tuned.formats
    assert LLM(pamphlet, "tuned", calibration=saved, session_len=128).format == tuned.formats
    header = Tuned.load(saved / FILE_NAME).header
    assert (header.bits, header.kl, header.windows) == (tuned.chosen.bits, tuned.chosen.kl, 1)
    assert torch.isfinite(Tuned.load(saved / FILE_NAME).kl).all()


def test_formats_of_other_weights_or_none_at_all_are_refused(
    pamphlet: Model, tuned: Tuning, tmp_path: Path, calibration: Calibration
) -> None:
    with pytest.raises(OctavoError, match=r"no formats were tuned for pamphlet.*octavo tune"):
        pamphlet.format("tuned", tmp_path)
    with pytest.raises(OctavoError, match="no formats were tuned for pamphlet"):
        LLM(pamphlet, "tuned", calibration=calibration)
    tuned.artefact("sha256:other").save(tmp_path)
    with pytest.raises(OctavoError, match=r"tuned for other weights .*run `octavo tune`"):
        pamphlet.format("tuned", tmp_path)
    (tmp_path / FILE_NAME).write_bytes((tmp_path / FILE_NAME).read_bytes()[:-9])
    with pytest.raises(OctavoError, match=r"incomplete or corrupted.*choose the formats again"):
        pamphlet.format("tuned", tmp_path)


@pytest.fixture
def octavo(pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line on the bundled model that is loaded already; returns its stdout."""
    monkeypatch.setattr(LoadOptions, "load", lambda *_, **__: pamphlet)

    def run(*argv: object) -> str:
        status = status_of(*argv)
        said = capsys.readouterr()
        assert not status, said.err
        return said.out

    return run


def test_verbs_take_tuned_for_a_format(
    octavo: Callable[..., str], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = octavo("generate", "pamphlet", "Once", "--kv", "tuned", "--work-dir", saved, "--max-tokens", 3, "--json")
    assert json.loads(out)["kv"] == "tuned"
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved))
    (saved / "octavo" / "pamphlet").mkdir(parents=True)
    for file in saved.glob("kv_*"):
        file.rename(saved / "octavo" / "pamphlet" / file.name)
    fits = json.loads(octavo("plan", "--kv", "kv8,tuned,kv4", "--memory", "2GiB", "--json"))["fits"]
    sessions = [fit["sessions"] for fit in fits[:3]]
    assert [fit["kv"] for fit in fits[:3]] == ["kv8", "tuned", "kv4"]
    assert sessions == sorted(sessions)
    assert len(set(sessions)) == 3


def test_the_verb_chooses_saves_and_says_how_to_serve(
    octavo: Callable[..., str], pamphlet: Model, calibration: Calibration, tmp_path: Path
) -> None:
    calibration.save(tmp_path)
    size = ("--memory", "32MiB", "--sessions", 16, "--context", 1024)
    out = octavo("tune", *size, "--windows", 1, "--window", 256, "--work-dir", tmp_path)
    assert f"octavo chat --kv tuned --calibration {tmp_path}" in out
    llm = LLM(pamphlet, "tuned", calibration=tmp_path, session_len=1024, max_batch_size=16)
    assert 0.95 * (32 << 20) < llm.cache.nbytes <= 32 << 20


def test_a_time_that_is_too_short_still_reads_512_tokens(
    octavo: Callable[..., str], calibration: Calibration, tmp_path: Path
) -> None:
    """The first 128 rows read no codes: shorter windows would choose by few rows."""
    calibration.save(tmp_path)
    found = json.loads(octavo("tune", "--bits", 5.2, "--budget", "0.01s", "--work-dir", tmp_path, "--json"))
    assert (found["windows"], found["window"]) == (1, 512)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "Give --bits 5, or --memory 4GiB"),
        (["--bits", "5", "--memory", "4GiB"], "Give --bits 5, or"),
        (["--memory", "4"], "'4' has no unit"),
        (["--bits", "5", "--budget", "soon"], "--budget soon"),
        (["--bits", "5", "--work-dir", "nowhere"], "there is no calibration at nowhere"),
    ],
)
def test_a_size_that_says_nothing_is_refused_before_a_model_is_loaded(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("tune", *argv) == 2
    assert reason in capsys.readouterr().err

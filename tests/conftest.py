"""What many tests share: the bundled model, a tiny random one, and calibrations of theirs that no file holds."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import octavo.calibrate.serving
from octavo.cli import main
from octavo.engine.reading import Reading
from octavo.models.bind import BoundModel, bind
from octavo.models.model import BUNDLED, Model
from octavo.models.output import output_norms
from octavo.quant.calibration import SYNTHETIC, Calibration, Header
from octavo.quant.format import KVFormat
from octavo.quant.statistics import LayerStatistics

NUMBERS = count()
# What takes longest comes first, so that no worker is left alone with it at the end.
LONGEST = (
    "tests/attention/test_cuda.py", "tests/models/test_architectures.py", "tests/parallel/", "tests/ray/",
    "tests/test_native_build.py",
)  # fmt: skip
SHARE = float(os.environ.get("SLOW_SHARE") or 1)
RAY = ("tests/ray/test_batches", "tests/ray/test_replicas")  # files that need the cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker gets whole files, and all that needs the Ray cluster: what tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(RAY) else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a test serves may calibrate itself and keep that: not where the user's own calibrations are."""
    with pytest.MonkeyPatch.context() as patch:
        caches = tmp_path_factory.mktemp("caches")
        patch.setenv("XDG_CACHE_HOME", str(caches / "shared"))
        yield caches


@pytest.fixture(autouse=True)
def _cache_of_its_own(_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where another test would find it. However busy the machine is, it is not refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(_caches / str(next(NUMBERS))))
    monkeypatch.setattr(octavo.calibrate.serving, "PATIENCE", math.inf)


@pytest.fixture(scope="session")
def slowly() -> Callable[[int], int]:
    """Repetitions of a slow test: all of them, or the share that SLOW_SHARE names, one at least."""
    return lambda repetitions: max(1, round(SHARE * repetitions))


def slow(*cases: Any) -> list[Any]:
    """Parameters that make test leaves out: all of them, or the share that SLOW_SHARE names, one at least."""
    marked = [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
    return marked[: max(1, round(SHARE * len(cases)))]


@pytest.fixture(scope="session")
def pamphlet() -> Model:
    """The bundled model in float32, where equal work gives equal tokens."""
    return Model.load(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def text_ids(pamphlet: Model) -> list[int]:
    """A few thousand tokens of prose."""
    return pamphlet.tokenizer((BUNDLED / "evaluation.txt").read_text(encoding="utf-8")[:20_000])["input_ids"]


@pytest.fixture(scope="session")
def calibration(pamphlet: Model, text_ids: list[int]) -> Calibration:
    """Of `pamphlet`, over one window of prose."""
    return observe(pamphlet.bound, text_ids[:512], pamphlet.fingerprint)


@pytest.fixture(scope="session")
def llama() -> BoundModel:
    """A tiny random Llama with grouped heads: steps of a millisecond, for tests that need thousands of them."""
    return bind(tiny_llama(max_position_embeddings=256))


def tiny_llama(**more: Any) -> LlamaForCausalLM:
    """Random weights, the same every time; not bound."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # large enough that what was said before decides what comes next
        tie_word_embeddings=False,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="session")
def llama_calibration(llama: BoundModel) -> Calibration:
    ids = torch.randint(llama.vocab_size, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    return observe(llama, ids, SYNTHETIC)


def observe(bound: BoundModel, ids: list[int], fingerprint: str) -> Calibration:
    """The statistics of K and V in one real forward over `ids`, from position 0."""
    seen = [LayerStatistics(s.kv_heads, s.k_dim, s.v_dim) for s in bound.shapes]

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        seen[layer].update(k, v)
        seen[layer].read_by(q)

    Reading(bound, KVFormat.parse("fp32")).run(ids, record)
    for statistics, norms in zip(seen, output_norms(bound), strict=True):
        statistics.projected_by(norms)
    header = Header(fingerprint, "a test", 1, len(ids), len(ids), (0, len(ids) - 1), rotary=bound.rotary)
    return Calibration(header, [statistics.summary() for statistics in seen])


def ranging(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """The statistics of one side whose channels lie between `low` and `high` [kv_heads, dim], of a deviation that gives
    token formats int8's steps where all channels are as wide."""
    middle, width = (low + high) / 2, high - low
    return {"min": low, "max": high, "mean": middle, "std": width / 255, "reader": torch.ones_like(low)}


def status_of(*argv: object) -> int:
    """The exit status of a command line, run in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    return int(end.value.code or 0)


def wait_until(condition: Callable[[], bool], seconds: float = 60, pause: float = 0.005) -> None:
    """Look again and again whether what another thread or process does has come to pass; fail if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(pause)


@contextmanager
def overflowing(model: Model, token: int) -> Iterator[None]:
    """For a while `model` overflows wherever `token` has been read, as a model in fp16 may for some tokens alone."""

    def overflow(_: object, args: tuple[Tensor], embedded: Tensor) -> Tensor:
        return embedded.masked_fill((args[0] == token)[..., None], torch.inf)

    hook = model.bound.hf.get_input_embeddings().register_forward_hook(overflow)
    try:
        yield
    finally:
        hook.remove()

"""How the engine's tests drive it: every step checked, and the pool whole at the end."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import plan_layers
from octavo.cache.size import CacheSize
from octavo.engine.engine import Engine
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat

FORMATS = ("fp32", "int8", "int8-token", "int4-token")


def engine(
    bound: BoundModel,
    kv: str = "fp32",
    calibration: Calibration | None = None,
    blocks: int = 64,
    block_size: int = 16,
    batch: int = 8,
    budget: int = 1024,
    context: int | None = None,
    hits: bool = True,
    layout: Layout | None = None,
    overlap: bool = False,
    snapshots: int = 0,
) -> Engine:
    """An engine on a cache of small blocks, read by the reference, or of the layout given. Only the format that needs
    the calibration takes it. With `overlap` it works as on a GPU: decode steps are launched before the one before them
    is taken in, and those for the reference are padded in fixed buffers, which run as they are for want of graphs."""
    format = KVFormat.parse(kv)
    plans = plan_layers(bound.whole, format, calibration if format.needs_calibration else None)
    layout = layout or Layout(block_size)
    pages = CacheSize.of(bound.shapes, format, layout.block_size).raw_pages(batch)
    cache = bound.new_cache(plans, blocks, layout, pages, batch, snapshots)
    made = Engine(bound, cache, batch, budget, context, hits, overlap)
    if overlap and cache.layout.order == "rows":
        made.runner.capture(batch, made.scheduler.max_context, how=lambda run: run)
    return made


def step(engine: Engine) -> list[Sequence]:
    gained = engine.step()
    engine.scheduler.check()
    return gained


def interrupt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one step fail once its forward has run: states have gone on."""
    forward = engine.runner.run

    def interrupted(batch: Batch) -> None:
        forward(batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()


def drain(engine: Engine) -> None:
    """Step until nothing is left to do."""
    while engine.busy:
        step(engine)
    assert not engine.pool.groups[0].used, "blocks are still held"


def run(engine: Engine, prompts: Iterable[list[int]], max_tokens: int = 24, **params: object) -> list[Sequence]:
    """All prompts at once, to their ends."""
    sequences = [Sequence(prompt, SamplingParams(max_tokens=max_tokens, **params)) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    drain(engine)
    return sequences

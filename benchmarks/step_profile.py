"""Where a step's time goes: clocks around linear layers, attention and forward; what is left is the engine's."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface

from octavo.models import hook
from octavo.models.bind import BoundModel


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


def profile(bound: BoundModel, step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Mean seconds of a step: in the model's linear layers, in attention (hook, cache and kernel), in the rest of the
    model (transformers' Python, norms, RoPE), and in the engine (schedule, batch, sample, commit)."""
    clock = Clock()
    linears = [m for m in bound.hf.modules() if isinstance(m, nn.Linear)]
    # A step with hooks is neither a tape (engine/tapes.py) nor of whole layers, which would go past the clocks.
    hooks = [module.register_forward_hook(lambda *_: None) for module in linears]
    for module in linears:
        module.forward = clock.around("linear", module.forward)  # type: ignore[method-assign]
    bound.forward = clock.around("forward", bound.forward)  # type: ignore[method-assign]
    AttentionInterface.register(hook.NAME, clock.around("attention", hook.attention))
    timed = clock.around("step", step)
    try:
        for _ in range(steps):
            timed()
    finally:
        for each in hooks:
            each.remove()
        AttentionInterface.register(hook.NAME, hook.attention)
        for clocked in (bound, *linears):
            del clocked.forward
    linear, attention, forward, whole = (clock.seconds[n] / steps for n in ("linear", "attention", "forward", "step"))
    return {
        "linear layers": linear,
        "attention": attention,
        "rest of the model": forward - linear - attention,
        "engine": whole - forward,
    }

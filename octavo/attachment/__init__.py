"""Octavo within transformers: the model stays where it is, and its cache becomes codes.

with octavo.attach(model, kv="kv8") as cache:
    model.generate(**inputs, past_key_values=cache)

`hook.py` is what the model gets, `cache.py` what transformers sees, `sequences.py` where the rows are. `decoded.py` is
a cache for models that the hook does not reach.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from octavo.attachment.cache import CodedCache
from octavo.attachment.decoded import DecodedCache
from octavo.attachment.hook import Hook
from octavo.attachment.sequences import Sequences
from octavo.attention import backend_for
from octavo.cache.plan import plan_layers
from octavo.calibrate import calibration_for, choose_scales, warn_uncalibrated
from octavo.errors import OctavoError
from octavo.models.tokenizer import load_tokenizer
from octavo.quant.calibration import Calibration
from octavo.quant.format import Format, Granularity, check_name

__all__ = ["CodedCache", "DecodedCache", "attach"]


def attach(
    model: Any,
    kv: str | Format = "kv8",
    *,
    calibration: str | Path | Calibration | None = None,
    granularity: Granularity | None = None,
    headroom: float | None = None,
) -> CodedCache:
    """A cache in the format `kv` for `model`, a loaded transformers model, which from now on reads codes in forwards
    that are given that cache; its other forwards are as before.

    As a context manager, or by `detach()`, the model is as it was before. `calibration`, `granularity` and `headroom`
    are as for `LLM`: by default the calibration beside the model's files. A model may have several caches.

    Raises `Unsupported` for models whose attention the hook does not reach; `DecodedCache` takes these.
    """
    if hasattr(model, "get_base_model"):  # an adapter of peft around the model
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise OctavoError(f"attach takes a loaded transformers model, not {type(model).__name__}")
    if isinstance(kv, str):
        check_name(kv)
    hook = Hook.of(model)
    hook.users += 1  # until the cache is made: what goes wrong now leaves nothing behind
    try:
        format = hook.model.format(kv, calibration)
        found = choose_scales(_calibration(hook, format, calibration), format, granularity, headroom)
        plans = plan_layers(hook.bound.shapes, format, found)
        with torch.inference_mode(False):  # a forward may be within it and the next one not
            return CodedCache(hook, format, Sequences(plans, backend_for(plans).layout)).attach()
    finally:
        hook.release()


def _calibration(hook: Hook, format: Format, given: str | Path | Calibration | None) -> Calibration | None:
    model = hook.model
    if format.calibrates_first and model.tokenizer is None and not model.synthetic:
        model.tokenizer = load_tokenizer(model.path)
    with hook.alone():
        found = calibration_for(model, given, format)
    if found is None and format.takes_calibration:
        warn_uncalibrated(model, format, stacklevel=5)
    return found

"""What `accuracy` and `speed` compare: formats of the cache, and with --baseline two kinds of weights in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cli.options import LoadOptions, option

if TYPE_CHECKING:
    from octavo.measure.candidate import Candidate
    from octavo.models.model import Model

BASELINE = option("The same model with 16-bit weights: MODEL with 4-bit ones is compared with it, in every format.")


def candidates(
    model: Model,
    kv: str | None,
    calibration: Path | None,
    granularity: str | None = None,
    headroom: float | None = None,
) -> list[Candidate]:
    """The formats to compare, the baseline first, each known and calibrated if it has to be."""
    from octavo.cli.progress import calibration_with_bar
    from octavo.measure.candidate import Candidate
    from octavo.quant.format import KVFormat

    if kv is not None:
        formats = [KVFormat.parse(name) for name in kv.split(",")]
    else:
        formats = [KVFormat.parse(name) for name in (str(model.bound.raw_format), "int8", "int8-token")]
        if model.calibration(calibration, formats[-1]) is None:
            del formats[1]
    return [
        Candidate(str(f), f, calibration_with_bar(model, calibration, f), granularity, headroom)  # type: ignore[arg-type]  # checked
        for f in dict.fromkeys(formats)
    ]


def load_baseline(options: LoadOptions, name: str, model: Model) -> Model:
    """The 16-bit model to compare `model` with, in its type: 4-bit checkpoints are often fp16 where it is bf16."""
    return replace(options, model=name, model_format="hf", dtype=str(model.bound.dtype).removeprefix("torch.")).load()

"""What `accuracy` and `speed` compare: formats of the cache, and with --baseline two kinds of weights in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cli.options import LoadOptions, option
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.measure.accuracy import Candidate
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
    from octavo.measure.accuracy import Candidate
    from octavo.quant.format import KVFormat

    if kv is not None:
        formats = [KVFormat.parse(name) for name in kv.split(",")]
    else:
        formats = [KVFormat.parse(name) for name in (str(model.bound.raw_format), "int8", "int8-token")]
        if model.calibration(calibration, formats[-1]) is None:
            del formats[1]
    return [
        Candidate(str(f), f, model.calibration(calibration, f), granularity, headroom)  # type: ignore[arg-type]  # checked
        for f in dict.fromkeys(formats)
    ]


def beside(sixteen: Model, four: Model, own: list[Candidate]) -> list[Candidate]:
    """Every format with the weights of both models, named weights/KV: 16-bit ones first, with their own calibration."""
    names = [f"{model.weight_kind}/{candidate.name}" for model in (sixteen, four) for candidate in own]
    others = [replace(c, model=sixteen, calibration=sixteen.calibration(None, c.format)) for c in own]
    return [replace(c, name=name) for c, name in zip([*others, *own], names, strict=True)]


def load_baseline(options: LoadOptions, name: str, model: Model) -> Model:
    """The 16-bit model of a 4-bit one. Raises OctavoError if it is another model."""
    found = replace(options, model=name, model_format="hf").load()
    if found.weight_kind == model.weight_kind:
        raise OctavoError(f"--baseline {name}: its weights are {found.weight_kind} like MODEL's; name the 16-bit model")
    if found.bound.shapes != model.bound.shapes or found.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise OctavoError(f"--baseline {name} is another model than {model.name}: their layers or vocabularies differ")
    return found

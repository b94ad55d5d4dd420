"""What measurements compare: cache formats, and each of them with 16-bit and with 4-bit weights."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.measure.memory.costs import INT4
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import Format, Granularity


@dataclass(frozen=True)
class Candidate:
    """A way to store the cache, with a name for the table."""

    name: str
    format: Format
    calibration: Calibration | None = None
    simulate: Callable[[Tensor], Tensor] | None = None  # what K and V go through first, for formats we do not have
    model: Model | None = None  # in place of the one at hand: the same model with other weights

    def choosing(self, granularity: Granularity | None, headroom: float | None) -> Self:
        """With these in place of its calibration's defaults, if it has one."""
        chosen = self.calibration and self.calibration.choosing(granularity, headroom)
        return replace(self, calibration=chosen)

    def llm(self, model: Model, **sizes: Any) -> LLM:
        """The model served from such a cache; `sizes` are LLM's own arguments."""
        return LLM(self.model or model, self.format, calibration=self.calibration, **sizes)


def check_pair(sixteen: Model, four: Model) -> None:
    """Raise OctavoError unless these are one model with 16-bit and with 4-bit weights, computing in one type."""
    if four.weight_kind != INT4:
        raise OctavoError(
            f"--baseline goes with a MODEL of 4-bit weights, and those of {four.name} are {four.weight_kind}: name the "
            "4-bit model as MODEL, the 16-bit one as --baseline"
        )
    if sixteen.weight_kind == INT4:
        raise OctavoError(f"--baseline {sixteen.name}: its weights are int4 like MODEL's; name the 16-bit model")
    if sixteen.bound.shapes != four.bound.shapes or sixteen.tokenizer.get_vocab() != four.tokenizer.get_vocab():
        raise OctavoError(
            f"--baseline {sixteen.name} is another model than {four.name}: their layers or vocabularies differ"
        )
    if sixteen.bound.dtype != four.bound.dtype:
        types = f"{sixteen.name} computes in {sixteen.bound.raw_format}, {four.name} in {four.bound.raw_format}"
        raise OctavoError(f"{types}: load both in one dtype, or their caches differ too")


def beside(
    sixteen: Model, four: Model, own: Sequence[Candidate], calibration: Calibration | None = None
) -> list[Candidate]:
    """Each format with the weights of both models: 16-bit ones first, with `calibration` or the one found of theirs.

    Names are like `W4 int8`: bits of the weights, format of the cache. Raises OctavoError for models that are no pair,
    and where a format needs a calibration that the 16-bit model has not.
    """
    check_pair(sixteen, four)
    others = [replace(c, model=sixteen, calibration=sixteen.calibration(calibration, c.format)) for c in own]
    for calibrated, bare, model in ((own, others, sixteen), (others, own, four)):
        lacking = [b.name for a, b in zip(calibrated, bare, strict=True) if a.calibration and not b.calibration]
        if lacking:
            warnings.warn(
                f"{', '.join(lacking)}: {model.name} has no calibration and the other model has; to compare like with "
                f"like run `octavo calibrate {model.argument}`",
                stacklevel=2,
            )
    return [
        replace(c, name=f"W{''.join(filter(str.isdigit, model.weight_kind))} {c.name}")
        for model, candidates in ((sixteen, others), (four, own))
        for c in candidates
    ]

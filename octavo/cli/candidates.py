"""What verbs compare: formats of the cache, kinds of weights, and with --baseline a second model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.loading import LoadOptions
from octavo.cli.options import complete, of_model
from octavo.errors import OctavoError
from octavo.quant.format import ADVISED, KVFormat, check_name, dtype_name, is_tuned

if TYPE_CHECKING:
    from octavo.measure.candidate import Candidate
    from octavo.measure.memory.process import Source
    from octavo.models.geometry import Geometry
    from octavo.models.model import Model
    from octavo.quant.format import Format

COMPARED = "[default: the model's 16 bits, kv8, k8v4, and if it is calibrated kv4 and int8]"
BASELINE = of_model("The same model with 16-bit weights: MODEL with 4-bit ones is compared with it, in every format.")


def formats_option(help: str) -> Any:
    """--kv of a verb that compares: names with commas between, which are known before torch is imported."""
    return of_model(help, callback=_known, autocompletion=complete)


def _known(names: str | None) -> str | None:
    for name in names.split(",") if names is not None else ():
        check_name(name)
    return names


def candidates(model: Model, kv: str | None, calibration: Path | None) -> list[Candidate]:
    """The formats to compare, the baseline first, each known and calibrated if it has to be."""
    from octavo.cli.progress import calibration_with_bar
    from octavo.measure.candidate import Candidate

    names = (str(model.bound.raw_format), *ADVISED) if kv is None else kv.split(",")
    calibrated = kv is not None or model.calibration(calibration, KVFormat.parse(ADVISED[0])) is not None
    formats = [model.format(name, calibration) for name in names]
    formats = [f for f in formats if calibrated or not (f.needs_calibration or f.calibrates_first)]
    return [Candidate(str(f), f, calibration_with_bar(model, calibration, f)) for f in dict.fromkeys(formats)]


def with_baseline(options: LoadOptions, name: str | None, model: Model, own: list[Candidate]) -> list[Candidate]:
    """Also, and first, those of the same model with 16-bit weights, where --baseline names it."""
    from octavo.measure.candidate import beside

    if name is None:
        return own
    return beside(load_baseline(options, name, model), model, own)


def load_baseline(options: LoadOptions, name: str, model: Model) -> Model:
    """The 16-bit model to compare `model` with."""
    return baseline_of(options, name, model).load(model.bound.computes, say=False, pairs=False)


def baseline_of(options: LoadOptions, name: str, model: Model) -> LoadOptions:
    """How it is loaded: in the types of `model`, since 4-bit checkpoints are often fp16 where it is bf16."""
    return replace(options, model=name, model_format="hf", dtype=dtype_name(model.bound.dtype))


def formats(
    geometry: Geometry, kv: str | None, place: tuple[str, Path], default: Sequence[str] = ("int8",)
) -> list[Format]:
    """Those of --kv, each once; or the model's own and those of `default`. `place` is the model's name and path."""
    if kv is None:
        return [KVFormat.raw(geometry.dtype), *(KVFormat.parse(name) for name in default)]
    return list(dict.fromkeys(_format(name, geometry, *place) for name in kv.split(",")))


def _format(kv: str, geometry: Geometry, name: str, path: Path) -> Format:
    from octavo.models.fingerprint import fingerprint
    from octavo.models.model import tuned_formats

    if not is_tuned(kv):
        return KVFormat.parse(kv)
    if path.is_file():
        raise OctavoError("--kv tuned is what was chosen for a model's weights: name MODEL in place of --config")
    found = tuned_formats(name, path)
    found.check(fingerprint(path), len(geometry.shapes))
    return found.formats


def kinds(geometry: Geometry, weights: str | None) -> list[str]:
    """Those of --weights, each once; or the model's own, of a 4-bit model also its 16-bit one's."""
    from octavo.measure.memory.costs import own_kind, weight_kinds

    known = weight_kinds(geometry)
    if weights is None:
        return list(known) if geometry.packed else [own_kind(geometry)]
    chosen = list(dict.fromkeys(weights.split(",")))
    for kind in chosen:
        if kind not in known:
            raise OctavoError(f"--weights {kind}: this model's are {' or '.join(known)}")
    return chosen


def baseline_source(model: str, geometry: Geometry, own: Source) -> dict[str, Source]:
    """Where the 16-bit weights are measured. Raises OctavoError if they are another model's."""
    from octavo.measure.memory.costs import own_kind
    from octavo.models.geometry import Geometry
    from octavo.models.locate import locate

    _, path = locate(model)
    dtype = dtype_name(geometry.dtype)  # checkpoints in 4 bits are fp16, their 16-bit models often bf16
    other = Geometry.trace(path, dtype)
    same = other.shapes == geometry.shapes and other.parameters == geometry.parameters
    if other.packed or not geometry.packed or not same:
        raise OctavoError(f"--baseline {model} is not the 16-bit model of a 4-bit MODEL: their layers differ")
    return {own_kind(other): replace(own, path=path, dtype=dtype, model_format="hf")}

"""`octavo calibrate`: run the model over texts once and keep the ranges of its K and V beside it."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from octavo.cli.calibration_texts import CalibrationTexts
from octavo.cli.loading import LoadOptions
from octavo.cli.options import CalibrationDir, Ray, Replicas, check_replicas, on_ray, option, takes
from octavo.cli.progress import telling
from octavo.errors import OctavoError, require_writable
from octavo.measure.budget import Windows
from octavo.quant.format import DEFAULT_GRANULARITY, DEFAULT_HEADROOM, validate_choice

if TYPE_CHECKING:
    from octavo.quant.calibration import Calibration

WANTED, LEAST = Windows(16, 512), Windows(4, 256)  # docs/FORMATS.md: what more would gain


@takes(LoadOptions, CalibrationTexts)
def calibrate(
    options: LoadOptions,
    shown: CalibrationTexts,
    work_dir: CalibrationDir = None,
    granularity: Annotated[
        str, option("Of int8: values that share a scale, tensor, head or channel.")
    ] = DEFAULT_GRANULARITY,
    headroom: Annotated[float, option("Of int8: range stored over range seen.")] = DEFAULT_HEADROOM,
    ray: Ray = None,
    replicas: Replicas = None,
) -> None:
    """Calibrate MODEL: see the ranges of its K and V, once. `int8` needs that, the other formats lose less with it."""
    validate_choice(granularity, headroom)
    check_replicas(ray, replicas)
    time, texts = shown.time, shown.open()
    if work_dir is not None:
        require_writable(work_dir, "--work-dir")
    model = options.load()
    if model.synthetic and work_dir is None:
        raise OctavoError("--load-format dummy makes a calibration of random weights: name a --work-dir for it")
    directory = work_dir or model.work_dir
    if work_dir is None and model.is_directory and directory != model.path:
        warnings.warn(
            f"nothing can be written in {model.path}: the calibration goes to {directory}, where Octavo finds it",
            stacklevel=2,
        )
    require_writable(directory, "--work-dir")
    source, windows, seconds = shown.draw(model, texts, WANTED, LEAST, time)
    from octavo.calibrate import calibrate as observe

    title = "observing K and V"
    with on_ray(ray, replicas, options.device) as workers, telling(title, seconds) as tell:
        elsewhere = None
        if workers is not None:
            from octavo.ray.measuring import observing

            elsewhere = observing(options.loading(), workers, partial(tell, title))
        calibration = observe(
            model,
            windows,
            dataset=source,
            granularity=granularity,  # type: ignore[arg-type]  # validated above
            headroom=headroom,
            seed=shown.seed,
            progress=partial(tell, title),
            observe=elsewhere,
        )
    path = calibration.save(directory)
    _show(options, calibration, path, work_dir)


def _show(options: LoadOptions, calibration: Calibration, path: Path, work_dir: Path | None) -> None:
    """What was seen, where it is kept, and what to do with it."""
    from rich.console import Console

    from octavo.cli.tables.calibrate import range_table

    console, header = Console(highlight=False, soft_wrap=True), calibration.header
    console.print(range_table(calibration))
    console.print(
        f"{header.samples} window{'s' * (header.samples > 1)} of {header.seqlen} tokens of {header.dataset}, "
        f"at positions {header.positions[0]} to {header.positions[1]}"
    )
    console.print(f"saved to {path}")
    console.print(options.next("kv8", work_dir), markup=False)

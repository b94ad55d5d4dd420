"""What benchmarks over several models share: their options, calibrations kept between runs, and a file of results that
grows row by row."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from octavo.calibrate import calibrate
from octavo.cli.progress import progress
from octavo.corpus import load_texts
from octavo.models.model import Model
from octavo.quant.calibration import FILE_NAME, Calibration
from octavo.text_windows import token_windows


def options(doc: str | None, data: str, models: str = "+", calibrates: bool = True) -> argparse.ArgumentParser:
    """Models, the texts (`data` says which files), what to calibrate on, and where what is made and found is kept."""
    cli = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("models", nargs=models, type=Path)
    cli.add_argument("--data", type=Path, required=models == "+", help=f"folder of {data}")
    cli.add_argument("--work-dir", type=Path, default=Path("benchmarks/work"), help="where what is made is kept")
    if calibrates:
        cli.add_argument("--samples", type=int, default=8, help="calibration windows")
        cli.add_argument("--seqlen", type=int, default=512, help="tokens in one of them")
    cli.add_argument("--out", type=Path, required=True)
    return cli


def calibrated(model: Model, args: argparse.Namespace) -> Calibration:
    """The model's calibration on PTB, kept between runs."""
    directory = args.work_dir / model.path.name
    if (directory / FILE_NAME).is_file():
        found = Calibration.load(directory)
        if (found.header.samples, found.header.seqlen) == (args.samples, args.seqlen):
            return found
    texts = load_texts("ptb", args.data)
    windows = token_windows(texts, model.tokenizer, args.samples, args.seqlen)
    with progress() as bar:
        task = bar.add_task(f"{model.path.name}: calibrating", total=len(windows))
        made = calibrate(model, windows, dataset=texts.name, progress=lambda done, _: bar.update(task, completed=done))
    made.save(directory)
    return made


def kept(path: Path | None) -> list[dict[str, Any]]:
    """The rows of the last run."""
    return json.loads(path.read_text())["rows"] if path is not None and path.is_file() else []


def keep(path: Path, document: dict[str, Any]) -> None:
    """Write the document, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)

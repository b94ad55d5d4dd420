"""`octavo scales`: other projects' scales of a KV cache, looked at, read and written."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.loading import LoadOptions
from octavo.cli.options import CalibrationDir, option, takes, tell_loading
from octavo.cli.verbs import Verbs
from octavo.errors import OctavoError

app = Verbs(
    help="Scales of other projects: vLLM (compressed-tensors, llm-compressor), ModelOpt, ONNX Runtime GenAI, SGLang, "
    "LMDeploy."
)

NAMES = "compressed-tensors (also llm-compressor, vllm), modelopt, onnxruntime-genai, sglang, lmdeploy, turbomind."
From = Annotated[Path, typer.Argument(help="The file or directory of the scales.", metavar="PATH", show_default=False)]
To = Annotated[Path, typer.Argument(help="The file or directory to write.", metavar="PATH", show_default=False)]


def _require(path: Path) -> None:
    """Before torch is imported."""
    if not path.exists():
        raise OctavoError(f"there is no {path}: name the file or directory of the scales")


As = Annotated[str, option(f"Whose format: {NAMES}", "--as", show_default=False)]


@app.command("show")
def show(
    path: From,
    format: Annotated[
        str | None, option(f"Whose format: {NAMES} [default: Octavo's]", "--as", show_default=False)
    ] = None,
) -> None:
    """Show what a file of scales says, layer by layer."""
    _require(path)
    from rich.console import Console

    from octavo.cli.tables.calibrate import found_table, range_table
    from octavo.quant.calibration import Calibration
    from octavo.scales import read_scales

    Console().print(range_table(Calibration.load(path)) if format is None else found_table(read_scales(path, format)))


@app.command("import")
@takes(LoadOptions)
def import_(
    options: LoadOptions,
    path: From,
    format: As,
    work_dir: CalibrationDir = None,
    replace: Annotated[bool, option("Replace the calibration that is there.", "--replace")] = False,
) -> None:
    """Make a calibration of MODEL from another project's scales: PATH, then MODEL."""
    _require(path)
    tell_loading(options.model)
    from octavo.quant.calibration import FILE_NAME
    from octavo.scales import format_of, import_scales

    format_of(format)
    model = options.load(say=False, told=True)
    directory = work_dir or model.work_dir
    if (directory / FILE_NAME).exists() and not replace:
        raise OctavoError(
            f"{directory} has a calibration, which knows more than scales: name another --work-dir, or --replace it"
        )
    made = import_scales(path, format, model)
    print(f"saved to {made.save(directory)}: ranges per {made.header.granularity}, for --kv int8 and fp8")


@app.command("export")
@takes(LoadOptions)
def export(
    options: LoadOptions,
    path: To,
    format: As,
    calibration: Annotated[
        Path | None, option("File or directory of the calibration. [default: beside the model]")
    ] = None,
    granularity: Annotated[str | None, option("tensor, head or channel, as far as it has them.")] = None,
    headroom: Annotated[float | None, option("Range written over range seen. [default: 1, or int8's own]")] = None,
) -> None:
    """Write the scales of MODEL's calibration for another project: PATH, then MODEL."""
    tell_loading(options.model)
    from octavo.quant.format import KVFormat
    from octavo.scales import export_scales, format_of

    format_of(format)
    model = options.load(say=False, told=True)
    found = model.calibration(calibration, KVFormat.parse("int8"))
    assert found is not None, "int8 needs one"
    for line in export_scales(path, format, model, found, granularity, headroom):  # type: ignore[arg-type]
        print(line)

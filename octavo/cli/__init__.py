"""The `octavo` command: one short file for each verb, each calls functions that Python can call too."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from octavo import __version__
from octavo.cli.accuracy import accuracy
from octavo.cli.calibrate import calibrate
from octavo.cli.chat import chat
from octavo.cli.doctor import doctor
from octavo.cli.generate import generate
from octavo.cli.memory import memory
from octavo.cli.plan import plan
from octavo.cli.quantize import quantize
from octavo.cli.report import report
from octavo.cli.scales import app as scales
from octavo.cli.serve import serve
from octavo.cli.session import app as session
from octavo.cli.speed import speed
from octavo.cli.tune import tune
from octavo.cli.verbs import Verbs
from octavo.errors import OctavoError

app = Verbs(
    help="Calibrated int8 KV caches for Hugging Face language models. MODEL is a directory, Hub id or .gguf file; with "
    "none, the small bundled model `pamphlet`.",
    rich_markup_mode="markdown",  # rich would take "[default: …]" for markup and drop it
    pretty_exceptions_enable=False,
)
app.command()(calibrate)
app.command()(quantize)
app.command()(tune)
app.command()(chat)
app.command()(generate)
app.command()(serve)
app.command()(accuracy)
app.command()(doctor)
app.command()(speed)
app.command()(report)
app.command()(memory)
app.command()(plan)

app.add_typer(scales, name="scales")
app.add_typer(session, name="session")

lite = Verbs(help="The verb of LMDeploy's page: `octavo lite calibrate …`.")
lite.command()(calibrate)
lite.callback()(lambda: None)  # with a single command typer would drop its name
app.add_typer(lite, name="lite", hidden=True)

BARS_OF_OTHERS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # but for the Hub's, when a model is fetched


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What comes before a verb."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Bad input is one line on stderr and status 2, an interrupt status 130."""
    argv = sys.argv[1:] if argv is None else argv
    for name in BARS_OF_OTHERS:
        os.environ.setdefault(name, "1")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if argv[:2] == ["chat", "turbomind"]:  # as on LMDeploy's page, which names its engine here
        argv = ["chat", *argv[2:]]
    try:
        app(argv)
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

"""The `octavo` command: one short file for each verb, each calls functions that Python can call too."""

import atexit
import errno
import gc
import os
import sys
import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Annotated

import typer

from octavo import __version__
from octavo.cli.verbs import Verbs, tell_interrupted
from octavo.errors import OctavoError

VERBS = (  # each a function in a file of its name
    "calibrate", "quantize", "tune", "chat", "generate", "serve",
    "accuracy", "doctor", "speed", "report", "memory", "plan",
)  # fmt: skip
GROUPS = ("scales", "session")  # verbs of several verbs: each an `app` in a file of its name
KNOWN = (*VERBS, *GROUPS, "lite")

BARS_OF_OTHERS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # but for the Hub's, when a model is fetched


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"octavo {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What comes before a verb."""


def commands(wanted: Collection[str] = KNOWN) -> Verbs:
    """The command line with the verbs that are wanted: to import and describe all of them takes a tenth of a second."""
    app = Verbs(
        help="KV caches in 8 and 4 bits for Hugging Face language models. MODEL is a directory, Hub id or .gguf file; "
        "with none, the small bundled model `pamphlet`.",
        rich_markup_mode="markdown",  # rich would take "[default: …]" for markup and drop it
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name in VERBS:
        if name in wanted:
            app.command()(_verb(name))
    for name in GROUPS:
        if name in wanted:
            app.add_typer(import_module(f"octavo.cli.{name}").app, name=name)
    if "lite" in wanted:
        lite = Verbs(help="The verb of LMDeploy's page: `octavo lite calibrate …`.")
        lite.command()(_verb("calibrate"))
        lite.callback()(lambda: None)  # with a single command typer would drop its name
        app.add_typer(lite, name="lite", hidden=True)
    return app


def _verb(name: str) -> Callable[..., None]:
    command: Callable[..., None] = getattr(import_module(f"octavo.cli.{name}"), name)
    return command


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Bad input is one error on stderr and status 2, an interrupt status 130."""
    argv = sys.argv[1:] if argv is None else argv
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who has started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (as long as the process)
    for name in BARS_OF_OTHERS:
        os.environ.setdefault(name, "1")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if argv[:2] == ["chat", "turbomind"]:  # as on LMDeploy's page, which names its engine here
        argv = ["chat", *argv[2:]]
    atexit.register(gc.freeze)  # or leaving takes a second: the interpreter looks through all that torch has made
    wanted = argv[:1] if argv and argv[0] in KNOWN else KNOWN
    try:
        try:
            commands(wanted)(argv)
        finally:
            sys.stdout.flush()
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at the exit
        if error.errno == errno.EPIPE:  # who reads no further knows
            sys.exit(1)
        print(f"error: {error.filename or 'the output'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:  # typer's exits with the same status once a verb has begun
        tell_interrupted(interrupt)
        sys.exit(130)

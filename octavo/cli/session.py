"""`octavo session`: saved sessions as plain numbers, for research, and back."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.loading import ServeOptions
from octavo.cli.options import check_file, takes, tell_loading
from octavo.cli.verbs import Verbs

app = Verbs(help="Saved sessions as plain numbers, K and V row by row, and back.")


@app.command("export")
@takes(ServeOptions)
def export(
    options: ServeOptions,
    saved: Annotated[
        Path, typer.Argument(help="A saved session: of /save in a chat, the server, or LLM.save.", metavar="SAVED")
    ],
    plain: Annotated[Path, typer.Argument(help="The safetensors file to write.", metavar="PLAIN")],
) -> None:
    """Write the rows of a saved session of MODEL as float32: SAVED, PLAIN, then MODEL. --kv is the session's own
    unless it is said."""
    check_file("SAVED", saved)
    tell_loading(options.model)
    from octavo.cache.session import SavedSession
    from octavo.plain_sessions import export_session

    options = _in_format(options, SavedSession.open(saved).header.identity.formats)
    count = export_session(options.llm(told=True), saved, plain)
    print(f"saved to {plain}: K and V of {count} tokens")


@app.command("import")
@takes(ServeOptions)
def import_(
    options: ServeOptions,
    plain: Annotated[Path, typer.Argument(help="A file that export wrote, perhaps changed since.", metavar="PLAIN")],
    saved: Annotated[Path, typer.Argument(help="The session to write.", metavar="SAVED")],
) -> None:
    """Make a session of MODEL from plain rows: PLAIN, SAVED, then MODEL. --kv may be another format than it was."""
    check_file("PLAIN", plain)
    tell_loading(options.model)
    from octavo.plain_sessions import format_of, import_session

    count = import_session(_in_format(options, [format_of(plain)]).llm(told=True), plain, saved)
    print(f"saved to {saved}: codes of {count} tokens")


def _in_format(options: ServeOptions, formats: Sequence[str]) -> ServeOptions:
    """The options with the format of a file, where they name none. Layers that differ are tuned ones."""
    if options.format_name() is not None or options.quant_policy is not None:
        return options
    return replace(options, kv=formats[0] if len(set(formats)) == 1 else "tuned")

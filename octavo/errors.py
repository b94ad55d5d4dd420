"""Errors that the user can mend: one sentence that names the thing and the remedy, shown without a traceback."""

import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

LISTED = "docs/ARCHITECTURES.md lists what is served."


class OctavoError(Exception):
    """Bad input. The command line prints the message alone and exits with status 2. `field` is the parameter of the
    request that is at fault, if it is one, and `code` names a fault that programs tell from others."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.field, self.code = field, code


class Unsupported(OctavoError):
    """A model or option Octavo does not handle. Raised at load: nothing is accepted and then ignored."""


def require_writable(directory: Path, option: str) -> None:
    """Make the directory. Raise OctavoError, which names the `option` that chooses another, where nothing can be
    written in it: before the work, not after it."""
    from tempfile import TemporaryDirectory  # takes a while to import

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory, prefix=".octavo-"):
            pass
    except OSError as error:
        raise OctavoError(f"nothing can be written in {directory} ({error.strerror}): name another {option}") from None


def require_new(directory: Path, source: Path | None) -> None:
    """Raise OctavoError where a model cannot be written to `directory`; `source` is where it comes from, if it is here.
    Called before the work as well as after."""
    if source is not None and directory.exists() and directory.resolve() == source.resolve():
        raise OctavoError(f"{directory} is the model that is quantized: name another directory with --work-dir")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OctavoError(f"{directory} is there already and not empty: name a new directory with --work-dir")
    require_writable(directory.parent, "--work-dir")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The one of the known names that was perhaps meant, as a question and a space; nothing if none is like it."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}? " if near else ""


@cache
def warn_once(message: str) -> None:
    """A warning that each process shows once, at no line of ours: it is about a machine or a model."""
    warnings.warn(message, stacklevel=2)


def one_line(error: Exception) -> str:
    """The first line of what an error of another library says, with the next where it ends in a colon; or its name."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def install(extra: str) -> str:
    """The command that adds an extra to this installation. No package index has Octavo: a checkout is installed anew
    with it, an installed wheel gets the packages that it stands for."""
    from importlib import metadata  # takes a while to import

    root = Path(__file__).parents[1]
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if (root / "pyproject.toml").is_file():
        constraints, own = shlex.quote(str(root / "constraints.txt")), shlex.quote(f"{root}[{extra}]")
        return f"{pip} --constraint {constraints} --editable {own}"
    needed = (line.partition(";") for line in metadata.requires("octavo") or ())
    packages = [package.strip() for package, _, when in needed if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", when)]
    return f"{pip} {shlex.join(packages)}"

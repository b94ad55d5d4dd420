"""Where a result was measured, as every results file carries it: the machine, the versions and the commit."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from octavo.measure import machine

HERE = Path(__file__).parent


def describe() -> dict[str, Any]:
    return {"commit": commit(), **machine.describe(torch.device("cpu"))}


def here() -> dict[str, Any]:
    """What a row of results says of where it was measured: a file may hold rows of several machines."""
    found = describe()
    return {key: found[key] for key in ("commit", "date", "processor")}


def tell(document: dict[str, Any], out: Path | None) -> None:
    """Print the results on one line, and keep them in a file if one is named."""
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


@cache
def commit() -> str | None:
    """The commit of the working tree when this was first asked; None where there is no git or no repository.

    Where octavo/ has changes that are not committed, `COMMIT+tree.HASH`: the hash is git's own of that folder, by which
    the commit is found that has it in the end (`git rev-parse COMMIT:octavo`).
    """
    try:
        head = _git("rev-parse", "--short", "HEAD")
        if not _git("status", "--porcelain", "../octavo"):
            return head
        with TemporaryDirectory() as directory:  # an index of its own: the user's stays as it is
            index = os.environ | {"GIT_INDEX_FILE": str(Path(directory, "index"))}
            _git("read-tree", "HEAD", env=index)
            _git("add", "--all", "../octavo", env=index)
            return f"{head}+tree.{_git('write-tree', '--prefix=octavo/', env=index)[:12]}"
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()

"""Fetch chat templates as the models' publishers wrote them: `python -m tests.clients.templates DIR`.

llama.cpp tests itself with them; they come in its Python package's source release. Each is under its model's licence,
so none is in this repository.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PIN = "llama-cpp-python==0.3.36"


def fetch(home: Path) -> None:
    """Put them into a directory, unless they are there."""
    mark = home / "pinned"
    if mark.exists() and mark.read_text() == PIN:
        return
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as there:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", there, PIN], check=True)
        (release,) = Path(there).iterdir()
        with tarfile.open(release) as files:
            for file in files:
                path = Path(file.name)
                content = files.extractfile(file) if path.match("models/templates/*.jinja") else None
                if content:
                    (home / path.name).write_bytes(content.read())
    mark.write_text(PIN)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))

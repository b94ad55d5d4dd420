"""Make an environment for each client below a directory: `python tests/clients/environments.py DIR [NAME …]`.

Clients want different releases of the same libraries, so each has an environment of its own. A program of Python is
pinned by NAME.txt, the one of JavaScript by package.json and its lock. What is there already is left alone. `templates`
is no client: it has the chat templates that llama.cpp tests itself with, as the models' publishers wrote them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
JAVASCRIPT = "vercel-ai"
TEMPLATES = "templates"
NAMES = (*sorted(file.stem for file in HERE.glob("*.txt")), JAVASCRIPT)


def ready(environments: Path, name: str) -> bool:
    """Whether a client's environment is as its pins say."""
    mark = environments / name / "pins"
    return mark.exists() and mark.read_bytes() == _pins(name).read_bytes()


def make(environments: Path, name: str) -> None:
    """Install one client; raises CalledProcessError where its registry does not have it."""
    home = environments / name
    shutil.rmtree(home, ignore_errors=True)
    if name == JAVASCRIPT:
        home.mkdir(parents=True)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(HERE / file, home)
        subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=home, check=True)
    elif name == TEMPLATES:
        home.mkdir(parents=True)
        _take_templates(home)
    else:
        venv.create(home, with_pip=True)
        pip = [home / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", _pins(name)], check=True)
    shutil.copy(_pins(name), home / "pins")


def _take_templates(home: Path) -> None:
    """Put the templates of a package's source release into a directory."""
    with tempfile.TemporaryDirectory() as there:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", there, "--requirement", _pins(TEMPLATES)], check=True)
        (release,) = Path(there).iterdir()
        with tarfile.open(release) as files:
            for file in files:
                path = Path(file.name)
                content = files.extractfile(file) if path.match("models/templates/*.jinja") else None
                if content:
                    (home / path.name).write_bytes(content.read())


def _pins(name: str) -> Path:
    return HERE / ("package-lock.json" if name == JAVASCRIPT else f"{name}.txt")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in sys.argv[2:] or NAMES:
        if not ready(root, name):
            print(f"installing {name}", flush=True)
            make(root, name)

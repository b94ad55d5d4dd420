"""Where the kernels cannot be built the package installs without them and says why: CMake's part of an install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def configure(directory: Path, compiler: str, *options: str) -> str:
    """What CMake warns of."""
    if not shutil.which("cmake") or not shutil.which("g++"):
        pytest.skip("cmake or g++ is not installed")
    command = ["cmake", "-S", str(ROOT), "-B", str(directory), f"-DPython_EXECUTABLE={sys.executable}", *options]
    result = subprocess.run(command, env={**os.environ, "CXX": compiler}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return " ".join(result.stderr.split())  # CMake breaks lines


def test_without_a_compiler(tmp_path: Path) -> None:
    said = configure(tmp_path, str(tmp_path / "none"))
    assert "No C++ compiler: Octavo installs without its native CPU kernels" in said


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_without_the_headers_of_python(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    said = configure(tmp_path, "g++", f"-DPython_INCLUDE_DIR={tmp_path / folder}")
    assert "No headers of Python" in said
    assert "Octavo installs without its native CPU kernels" in said


def test_with_a_compiler_that_cannot_compile_the_kernels(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$*" in *attention/native/write.cpp*) exit 1;; esac\nexec g++ "$@"\n')
    old.chmod(0o755)
    said = configure(tmp_path / "build", str(old))
    assert f"The C++ compiler {old} is too old: Octavo installs without its native CPU kernels" in said

"""The kernels of products with sanitizers and for other processors, as in tests/attention/test_native_build.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from octavo.weights import cpu
from tests.attention.test_native_build import FLAGS, ROOT, SANITIZE, isa_flags, require

NATIVE = ROOT / "octavo" / "weights" / "native"


def build(directory: Path, compiler: str, isa: str, more: list[str]) -> Path:
    program = directory / "selftest"
    kernels = [str(NATIVE / f"{name}.cpp") for name in ("int4", "panels", "elementwise")]
    sources = [*kernels, str(Path(__file__).parent / "selftest.cpp")]
    names = [f"-DISA={isa}", f'-DISA_NAME="{isa}"', f"-DTESTED={isa}"]
    command = [compiler, *FLAGS, f"-I{NATIVE}", *isa_flags(isa), *names, *more, *sources, "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    require("g++")
    if not cpu.extension.isas:
        pytest.skip("which instruction sets there are is not known")
    result = subprocess.run([build(tmp_path, "g++", cpu.extension.isas[0], SANITIZE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is right" in result.stdout


@pytest.mark.parametrize("isa", ["neon_dotprod", "neon_i8mm"])
def test_neon_is_right_under_emulation(isa: str, tmp_path: Path) -> None:
    require("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    program = build(tmp_path, "aarch64-linux-gnu-g++", isa, ["-static"])
    command = ["qemu-aarch64-static", "-cpu", "max", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is right" in result.stdout

"""The kernels built in ways that the installed extension is not: with sanitizers, and for other processors.

Each build compares one instruction set with the portable one (selftest.cpp). Those for other processors run under
qemu's user emulation: Debian's g++-aarch64-linux-gnu and qemu-user-static.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from octavo.attention import cpu

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "octavo" / "attention" / "native"
SHARED = ROOT / "octavo" / "native"
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
FLAGS.append(f"-I{SHARED}")
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]  # -O2 compiles half as fast


def isa_flags(isa: str) -> list[str]:
    """The compiler flags of an instruction set, from CMakeLists.txt."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    named = dict(re.findall(r"set\((\w+) ?([^)]*)\)", cmake))
    return named[f"FLAGS_{isa}"].replace("${AVX2}", named["AVX2"]).split()


def build(directory: Path, compiler: str, isa: str, more: list[str], encoding: tuple[str, str] | None = None) -> Path:
    """The program that compares the instruction set with the portable one; `encoding` replaces text of its assembly."""
    sources = [source for source in NATIVE.glob("*.cpp") if source.name != "module.cpp"]

    def assemble(name: str, source: Path) -> Path:
        assembly = directory / f"{source.stem}.{name}.s"
        define = [f"-DISA={name}", f'-DISA_NAME="{name}"']
        command = [compiler, *FLAGS, *isa_flags(name), *define, *more, "-S", str(source), "-o", str(assembly)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return assembly

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        objects = list(compilers.map(assemble, *zip(*product((isa, "portable"), sources), strict=True)))
    if encoding:
        replaced = 0
        for assembly in objects[: len(sources)]:
            text = assembly.read_text()
            replaced += text.count(encoding[0])
            assembly.write_text(text.replace(*encoding))
        assert replaced
    program = directory / "selftest"
    main = str(ROOT / "tests" / "attention" / "selftest.cpp")
    subprocess.run(
        [compiler, *FLAGS, f"-DTESTED={isa}", *more, f"-I{NATIVE}", main, *objects, "-o", str(program)], check=True
    )
    return program


def require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu.extension.isas)
def test_sanitizers_find_nothing(isa: str, tmp_path: Path) -> None:
    require("g++")
    if isa == "portable":
        pytest.skip("compared with itself in every other case")
    result = subprocess.run([build(tmp_path, "g++", isa, SANITIZE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agrees with portable" in result.stdout


def test_avxvnni_agrees_in_the_encoding_of_avx512(tmp_path: Path) -> None:
    """The same instructions on the same registers: a processor with AVX512-VNNI alone runs them in its own encoding."""
    require("g++")
    if "avx512vnni" not in cpu.extension.isas:
        pytest.skip("this processor has no AVX512-VNNI")
    program = build(tmp_path, "g++", "avxvnni", [], encoding=("{vex} vpdpbusd", "vpdpbusd"))
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agrees with portable" in result.stdout


@pytest.mark.parametrize("isa", ["neon_dotprod", "neon_i8mm"])
def test_neon_agrees_under_emulation(isa: str, tmp_path: Path) -> None:
    require("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    program = build(tmp_path, "aarch64-linux-gnu-g++", isa, ["-static"])
    command = ["qemu-aarch64-static", "-cpu", "max", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agrees with portable" in result.stdout

"""The kernels built in ways that the installed extensions are not: with sanitizers, and for other processors.

Attention's are compared with the portable ones, those of products with plain arithmetic (selftest.cpp of each). Builds
for other processors run under qemu's user emulation: Debian's g++-aarch64-linux-gnu and qemu-user-static.
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

from octavo.attention import cpu as attention
from octavo.weights import cpu as weights

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
FLAGS.append(f"-I{ROOT}/octavo/native")
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]  # -O2 compiles half as fast
OTHERS = [("attention", isa) for isa in attention.extension.isas if isa != "portable"]


def isa_flags(isa: str) -> list[str]:
    """The compiler flags of an instruction set, from CMakeLists.txt."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    named = dict(re.findall(r"set\((\w+) ?([^)]*)\)", cmake))
    return named[f"FLAGS_{isa}"].replace("${AVX2}", named["AVX2"]).split()


def check(
    directory: Path, part: str, isa: str, compiler: str, more: list[str], *emulator: str,
    encoding: tuple[str, str] | None = None,
) -> None:  # fmt: skip
    """Build the self-test of a part's kernels and run it; `encoding` replaces text of their assembly."""
    for program in (compiler, *emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    native = ROOT / "octavo" / part / "native"
    sources = [source for source in native.glob("*.cpp") if source.name != "module.cpp"]

    def assemble(name: str, source: Path) -> Path:
        assembly = directory / f"{source.stem}.{name}.s"
        define = [f"-DISA={name}", f'-DISA_NAME="{name}"']
        command = [compiler, *FLAGS, *isa_flags(name), *define, *more, "-S", str(source), "-o", str(assembly)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return assembly

    isas = [isa, "portable"] if part == "attention" else [isa]
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        objects = list(compilers.map(assemble, *zip(*product(isas, sources), strict=True)))
    if encoding:
        replaced = 0
        for assembly in objects[: len(sources)]:
            text = assembly.read_text()
            replaced += text.count(encoding[0])
            assembly.write_text(text.replace(*encoding))
        assert replaced
    program = directory / "selftest"
    main = [str(ROOT / "tests" / part / "selftest.cpp"), f"-DTESTED={isa}", f"-I{native}"]
    subprocess.run([compiler, *FLAGS, *more, *main, *objects, "-o", str(program)], check=True)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("agrees with portable|is right", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "isa"), [*OTHERS, *(("weights", isa) for isa in weights.extension.isas[:1])])
def test_sanitizers_find_nothing(part: str, isa: str, tmp_path: Path) -> None:
    check(tmp_path, part, isa, "g++", SANITIZE)


def test_avxvnni_agrees_in_the_encoding_of_avx512(tmp_path: Path) -> None:
    """The same instructions on the same registers: a processor with AVX512-VNNI alone runs them in its own encoding."""
    if "avx512vnni" not in attention.extension.isas:
        pytest.skip("this processor has no AVX512-VNNI")
    check(tmp_path, "attention", "avxvnni", "g++", [], encoding=("{vex} vpdpbusd", "vpdpbusd"))


def test_products_by_a_matrix_unit_are_right_where_it_is_emulated(tmp_path: Path) -> None:
    if "avx512vnni" not in weights.extension.isas:
        pytest.skip("this processor has no AVX-512")
    check(tmp_path, "weights", "avx512vnni", "g++", ["-DEMULATE_TILES"])


@pytest.mark.parametrize("isa", ["neon_dotprod", "neon_i8mm"])
@pytest.mark.parametrize("part", ["attention", "weights"])
def test_neon_is_right_under_emulation(part: str, isa: str, tmp_path: Path) -> None:
    check(tmp_path, part, isa, "aarch64-linux-gnu-g++", ["-static"], "qemu-aarch64-static", "-cpu", "max")

"""Compile the GPU kernels on a machine without a GPU, and say what they take: docs/KERNELS.md.

    python scripts/compile_kernels.py --jobs 4     # every format, head dim and target, writes docs/KERNELS.md
    python scripts/compile_kernels.py --formats fp8                  # only these, and the page's other rows stay
    python scripts/compile_kernels.py --formats int8 --dims 128 --targets 90 --check    # only fail on spills

The kernels are given what a real step gives them: a step is run on CPU tensors with each launch replaced by a
compilation. Registers, stack and spills are from the ptxas that comes with Triton, instructions from its nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import mangle_type

from octavo.attention import AttentionSpec
from octavo.attention.cuda import launch
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.store import KVCache
from octavo.engine.sequence import Sequence
from octavo.quant.calibration import Calibration, Header
from octavo.quant.format import KVFormat

PAGE = Path(__file__).parent.parent / "docs" / "KERNELS.md"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FORMATS = ["bf16", "int8", "fp8", "int8-token", "int4-token", "int8-token/int4-token", "kv8", "k8v4", "kv4"]
DIMS = [64, 128, 256]  # others are padded to these
TARGETS = [80, 90]  # compute capability × 10
BLOCK = 64
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a program may take
HEADER = Header("synthetic", "none", 1, 1, 1, (0, 0))


@dataclass(frozen=True)
class Variant:
    """What a layer has beside its format and its dimension."""

    name: str = ""
    group: int = 4
    kv_heads: int = 8
    v_dim: int | None = None  # as k_dim if None
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


PLAIN = Variant()
MQA = [Variant(f"{n} query heads, one KV head", group=n, kv_heads=1) for n in (16, 32, 48, 64)]
MQA_DIMS = [64, 80, 96, 128, 192, 256]
VARIANTS = [
    Variant("window", window=4096),
    Variant("soft cap", softcap=50.0),
    Variant("sinks", sinks=True),
    Variant("fp16 queries", dtype=torch.float16),
    Variant("V of 64", v_dim=64),
    Variant("one query head a KV head", group=1),
    Variant("eight query heads a KV head", group=8),
]


@dataclass
class Result:
    kernel: str
    registers: int
    spills: int  # bytes stored to and loaded from local memory
    shared: int  # bytes
    warps: int
    loop: list[str]  # machine instructions of the loop over blocks


NOTHING = Result("", 0, 0, 0, 0, [])


def compiled(format: str, dim: int, target: int, variant: Variant) -> Iterator[Result]:
    """Compile what a step of one decode and one chunk launches in a layer of that format."""
    launch.multiprocessors = lambda device: 132  # noqa: ARG005 - those of an H100
    launch._shared_memory = lambda device: SHARED[target]  # noqa: ARG005
    shape = LayerShape(variant.kv_heads, dim, variant.v_dim or dim, dtype=variant.dtype)
    values = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "reader": 1.0}
    sides = {
        side: {name: torch.full((variant.kv_heads, n), value) for name, value in values.items()}
        for side, n in (("k", shape.k_dim), ("v", shape.v_dim))
    }
    calibration = Calibration(HEADER, [sides])
    plans = plan_layers([shape], KVFormat.parse(format), calibration)
    cache = KVCache(plans, 2, Layout(BLOCK, "pages"), raw_pages=10)
    work = [Sequence([0] * 2), Sequence([0] * 40)]
    work[0].num_cached = 1
    for i, sequence in enumerate(work):
        sequence.tables, sequence.first_page, sequence.ring = [[i]], i, 2 + 4 * i
    heads = variant.kv_heads * variant.group
    rows = [torch.zeros(41, n, width, dtype=variant.dtype)
            for n, width in ((heads, dim), (variant.kv_heads, dim), (variant.kv_heads, shape.v_dim))]  # fmt: skip

    seen: list[tuple[str, CompiledKernel, int]] = []
    kernels = {name: getattr(launch, name) for name in ("write", "scan", "combine")}
    for name, kernel in kernels.items():
        setattr(launch, name, _Compiler(kernel, target, lambda *found, name=name: seen.append((name, *found))))
    try:
        sinks = torch.zeros(heads) if variant.sinks else None
        spec = AttentionSpec(shape, heads, dim**-0.5, variant.window, variant.softcap, sinks)
        batch = Batch.build([(work[0], 1), (work[1], 40)], BLOCK, span=cache.span)
        launch.attend(spec, cache.layers[0], rows[0], rows[1], rows[2], batch)
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)
    names = ["write", "scan (decode)", "combine (decode)", "scan (chunk)", "combine (chunk)"]
    for name, (_, kernel, warps) in zip(names, seen, strict=True):
        yield Result(name, *_resources(kernel, target), kernel.metadata.shared, warps, _loop(kernel))


class _Compiler:
    """Stands in for a kernel: a launch compiles it for exactly those arguments and hands over the result."""

    def __init__(self, kernel: Any, target: int, found: Callable[[CompiledKernel, int], None]):
        self.kernel, self.target, self.found = kernel, GPUTarget("cuda", target, 32), found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile(*args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
            signature, attributes = {}, {}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            for i, name in enumerate(self.kernel.arg_names):
                value, parameter = given[name], self.kernel.params[i]
                if name in constants or value is None:
                    constants[name] = value
                    signature[name] = "constexpr"
                else:
                    signature[name] = mangle_type(value)
                    fixed = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
                    if fixed and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
                        attributes[i,] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, constants, attributes)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            self.found(triton.compile(source, target=self.target, options=options), num_warps)

        return compile


def _resources(kernel: CompiledKernel, target: int) -> tuple[int, int]:
    """Registers a thread, and bytes spilled, as ptxas reports them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        arch = "sm_90a" if target == 90 else f"sm_{target}"
        command = [BINARIES / "ptxas", "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    assert registers, said
    return int(registers[1]), sum(map(int, spills))


def _loop(kernel: CompiledKernel) -> list[str]:
    """The instructions of the shortest loop with a product in it: over blocks, those that nothing is masked in. Where
    some loops have products of bytes, the others read raw pages."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([BINARIES / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                loops.append(code[labels[back[1]] :])
    for product in ("IMMA", "IGMMA", "MMA"):
        if found := [loop for loop in loops if any(product in line for line in loop)]:
            return min(found, key=len)
    return []


def row(format: str, dim: int, target: int, variant: Variant, result: Result) -> str:
    layer = f"{format}, {variant.name}" if variant.name else format
    per_code, loads, cores = "", "", ""
    if result.kernel.startswith("scan"):
        codes = BLOCK * (dim + (variant.v_dim or dim))
        per_code = f"{len(result.loop) * 32 * result.warps / codes:.2f}"
        count = {name: sum(name in line for line in result.loop) for name in ("LDGSTS", "GMMA", "MMA")}
        wide = sum("LDGSTS" in line and ".128" in line for line in result.loop)
        loads = f"{wide} of {count['LDGSTS']}"
        cores = f"{count['GMMA']} wgmma" if count["GMMA"] else f"{count['MMA']} mma"
    return (
        f"| {layer} | {dim} | {target / 10:.1f} | {result.kernel} | {result.warps} | {result.registers} | "
        f"{result.shared} | {result.spills} | {per_code} | {loads} | {cores} |"
    )


def table(case: tuple[str, int, int, Variant]) -> tuple[list[str], list[str]]:
    """The rows of one layer, and those of them that would run badly or not at all."""
    found = [(row(*case, result), result) for result in compiled(*case)]
    target = case[2]
    bad = [line for line, r in found if r.shared > SHARED[target] or (r.spills and "decode" in r.kernel)]
    return [line for line, _ in found], bad


def plain_cases(formats: list[str], dims: list[int], targets: list[int]) -> list[tuple[str, int, int, Variant]]:
    return [(f, dim, target, PLAIN) for target in targets for f in formats for dim in dims]


def page_cases(formats: list[str], dims: list[int], targets: list[int]) -> list[tuple[str, int, int, Variant]]:
    """What the page has of these formats, in its order."""
    more = [("int8-token", dim, 90, variant) for dim in MQA_DIMS for variant in MQA]
    more += [("kv8", dim, 90, MQA[-1]) for dim in dims]
    more += [(f, 128, target, variant) for f, target in (("kv8", 90), ("int8", 80)) for variant in VARIANTS]
    more += [(f, 256, 89, PLAIN) for f in formats]  # the largest tiles in the least shared memory
    return plain_cases(formats, dims, targets) + [case for case in more if case[0] in formats]


def on_page() -> dict[str, list[str]]:
    """Rows by what they are of, if the page was made with this Triton."""
    text = PAGE.read_text() if PAGE.is_file() else ""
    if f"with Triton {triton.__version__}," not in text:
        return {}
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| format"):
            rows.setdefault(layer_of(line), []).append(line)
    return rows


def layer_of(line: str) -> str:
    """The first three columns: layer, dimension, target."""
    return "|".join(line.split("|")[1:4])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--dims", nargs="+", type=int, default=DIMS)
    parser.add_argument("--targets", nargs="+", type=int, default=TARGETS, help="compute capability × 10")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a decode kernel spills or shared memory is short"
    )
    given = parser.parse_args()
    asked = given.formats, given.dims, given.targets
    if given.check:
        cases = [(*case[:3], variant) for variant in (PLAIN, MQA[-1]) for case in plain_cases(*asked)]
    else:
        cases = page_cases(*asked)
    rows, bad = on_page(), []
    with ProcessPoolExecutor(given.jobs) as pool:
        for lines, its_bad in pool.map(table, cases):
            rows[layer_of(lines[0])] = lines
            bad += its_bad
            print(*lines, sep="\n", flush=True)
    if not given.check:
        every = [*page_cases(FORMATS, DIMS, TARGETS), *cases]
        found = dict.fromkeys(layer_of(row(*case, NOTHING)) for case in every)
        lines = [line for layer in found for line in rows.get(layer, ())]
        PAGE.write_text(HEAD.format(triton=triton.__version__) + "\n".join(lines) + "\n")
    if bad:
        print("a decode kernel spills, or a kernel takes too much shared memory:", *bad, sep="\n", file=sys.stderr)
    return 1 if bad else 0


HEAD = """# The GPU kernels as compiled

Generated by `scripts/compile_kernels.py` with Triton {triton}, on a machine without a GPU. **Nothing here has run on a
GPU**: these are the compiler's numbers, of one layer with 8 KV heads and, where a row does not say otherwise, 32 query
heads, bf16 queries, no window, no soft cap and no sinks; blocks of 64 tokens. Another Triton compiles otherwise: torch
2.11 comes with 3.6.

*Shared* and *spilled* are bytes. *Per code* is every instruction of the loop over blocks (loads, products, softmax,
conversions; of a chunk the loop over blocks that every row sees whole), threads times instructions, divided by the
codes of K and V that a turn of the loop reads. *16-byte loads* are the copies from global to shared memory in that
loop that move 16 bytes a thread, of all of them; where one is left over, it reads the block table. Products are `wgmma`
on 9.0 where a tile has 64 rows, `mma` elsewhere. With edges (`kv8`, `k8v4`, `kv4`) these columns are of the loop over
codes; the program that reads raw pages has another.

| format | head dim | target | kernel | warps | registers | shared | spilled | per code | 16-byte loads | tensor cores |
|---|---|---|---|---|---|---|---|---|---|---|
"""

if __name__ == "__main__":
    sys.exit(main())

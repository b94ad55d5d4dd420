"""What the processor at hand is and can do, and so in what a model computes on it.

The environment variable OCTAVO_ISA limits the native kernels to an instruction set, for tests and benchmarks:
`OCTAVO_ISA=avx2` on a newer machine runs what an AVX2 machine runs. torch has limits of its own
(ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2).
"""

import platform
from functools import cache
from pathlib import Path

from octavo.attention import cpu as attention
from octavo.weights import cpu as weights

_SETS = {
    "avx512vnni": "AVX-512", "avxvnni": "AVX2 with VNNI", "avx2": "AVX2", "neon_i8mm": "NEON with I8MM",
    "neon_dotprod": "NEON", "portable": "no vector instructions that Octavo knows",
}  # fmt: skip
_ZEN = {  # AMD's families and models, as in cpuid: the first model of each generation
    0x17: ((0x00, "Zen"), (0x08, "Zen+"), (0x11, "Zen"), (0x18, "Zen+"), (0x30, "Zen 2")),
    0x19: ((0x00, "Zen 3"), (0x10, "Zen 4"), (0x20, "Zen 3"), (0x60, "Zen 4"), (0x80, "Zen 3"), (0xA0, "Zen 4")),
    0x1A: ((0x00, "Zen 5"),),
}


def has_bf16() -> bool:
    """Whether products of bf16 numbers are this processor's fastest."""
    return attention.extension.has_bf16


@cache
def name() -> str:
    """Of the processor: its generation where that says more than its name."""
    facts = _facts()
    if facts.get("vendor_id") == "AuthenticAMD":
        steps = _ZEN.get(int(facts.get("cpu family", 0)), ())
        known = [zen for first, zen in steps if first <= int(facts.get("model", 0))]
        if known:
            return known[-1]
    return full_name()


def full_name() -> str:
    """As the processor names itself."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def _facts() -> dict[str, str]:
    """What Linux says of the first core."""
    facts: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return facts
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def instructions() -> str:
    """The instruction set that the native kernels use, in words."""
    if attention.unavailable() is not None:
        return "without native kernels"
    unit = " and AMX" if weights.has_tiles() else ""
    return _SETS[attention.isa()] + (f" with BF16{unit}" if has_bf16() else "")

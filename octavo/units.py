"""Amounts of memory as people write them."""

import re

from octavo.errors import OctavoError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str | int) -> int:
    """'4GiB', '512 MB', '1e9B' → bytes. A number in a text needs a unit: who writes 80 means GiB, and would get bytes;
    one that is no text is of bytes."""
    if type(text) is int and text >= 0:
        return text
    if not isinstance(text, str):
        raise OctavoError(f"{text!r} is not an amount of memory; write it like '4GiB' or as a number of bytes")
    match = re.fullmatch(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]+)?)\s*([kmgt]i?b?|b|)", text.strip().lower())
    if not match:
        raise OctavoError(f"{text!r} is not an amount of memory; write it like 4GiB or 512MB")
    number, unit = float(match[1]), match[2]
    if number and not unit:
        raise OctavoError(f"{text!r} has no unit; write {text.strip()}GiB, {text.strip()}MiB or {text.strip()}B")
    size = number * UNITS[unit.removesuffix("b")]
    if size == float("inf"):
        raise OctavoError(f"{text!r} is more memory than there is")
    return int(size)


def format_bytes(n: float) -> str:
    """Bytes → '1.5 GiB', with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1000 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.{max(0, 3 - len(str(int(n))))}f} {unit}"
        n /= 1024
    raise AssertionError

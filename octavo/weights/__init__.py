"""4-bit weights. What may be asked for is said here, without torch."""

from __future__ import annotations

from typing import Literal, get_args

from octavo.errors import OctavoError

Method = Literal["awq", "rtn"]
METHODS: tuple[str, ...] = get_args(Method)
GROUP_SIZES = (32, 64, 128)  # weights that share a scale: what kernels elsewhere take


def validate(group_size: int, method: str) -> None:
    """Raises OctavoError for what no AWQ checkpoint is made with."""
    if group_size not in GROUP_SIZES:
        raise OctavoError(f"a group of {group_size} weights: choose {', '.join(map(str, GROUP_SIZES))}")
    if method not in METHODS:
        raise OctavoError(f"the method {method!r} is unknown: choose {' or '.join(METHODS)}")

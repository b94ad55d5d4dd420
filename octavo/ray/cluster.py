"""A Ray cluster: one that runs at an address, or one that is started on this machine and ends with the command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from octavo.errors import OctavoError, install, one_line

LOCAL = "local"
OBJECTS = 200 << 20  # bytes of Ray's object store on this machine: prompts and answers pass through it, no tensors


def require(option: str) -> None:
    """Raise OctavoError where Ray is not installed."""
    if find_spec("ray") is None:
        raise OctavoError(f"{option} needs ray, which is not installed: {install('ray')}")


@contextmanager
def cluster(address: str, option: str = "--ray") -> Iterator[None]:
    """The cluster at `address` (as `ray.init` takes it, like auto, 10.0.0.1:6379 or ray://head:10001), or one of this
    machine's own, local. Raises OctavoError where there is none."""
    require(option)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's default from 2.60 on; it warns until then
    import ray

    own = {"object_store_memory": OBJECTS, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address, **own)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise OctavoError(
            f"there is no Ray cluster at {address} ({one_line(error)}); `{option} local` starts one on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()

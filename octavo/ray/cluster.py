"""A Ray cluster: one that runs at an address, or one that is started on this machine and ends with the command."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from octavo.cores import choose
from octavo.errors import OctavoError, install, one_line

LOCAL = "local"
OBJECTS = 200 << 20  # bytes of Ray's object store on this machine: prompts and answers pass through it, no tensors
PATIENCE = 10.0  # seconds in which an address must answer
OURS = {  # where nobody has chosen otherwise
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's default from 2.60 on; it warns until then
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a proxy that died is started anew after three looks
    "RAY_enable_metrics_collection": "0",  # of Ray's own, which nobody reads without its dashboard
    "REPORTER_UPDATE_INTERVAL_MS": "600000",  # nor what it sees of all processes, every five seconds by default
}


def require(option: str) -> None:
    """Raise OctavoError where Ray is not installed."""
    if find_spec("ray") is None:
        raise OctavoError(f"{option} needs ray, which is not installed: {install('ray')}")


@contextmanager
def cluster(address: str, option: str = "--ray") -> Iterator[None]:
    """The cluster at `address` (as `ray.init` takes it, like auto, 10.0.0.1:6379 or ray://head:10001), or one of this
    machine's own, local. Raises OctavoError where there is none."""
    require(option)
    os.environ.update(OURS | os.environ)
    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of each step
    import ray

    own = {"num_cpus": choose().threads, "object_store_memory": OBJECTS, "include_dashboard": False}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdigit():  # Ray itself goes on asking for minutes
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        ray.init(address, logging_level=logging.ERROR, **(own if address == LOCAL else {}))
    except Exception as error:  # what did not start in time is a plain Exception
        if address == LOCAL:
            raise OctavoError(f"Ray cannot start on this machine: {one_line(error)}") from error
        raise OctavoError(
            f"there is no Ray cluster at {address} ({one_line(error)}); `{option} local` starts one on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Placement:
    """Models side by side: how many, and the CPUs and GPUs of each."""

    count: int
    cpus: float
    gpus: float


def placement(count: int | None, device: str = "auto", each: int = 1) -> Placement:
    """Where `count` models go in the cluster at hand, each with `each` GPUs; by default as many as there are GPUs for,
    or one on each machine without any. Raises OctavoError where GPUs are too few, and without CPUs."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        count = count or max(1, gpus // each)
        if count * each > gpus:
            raise OctavoError(f"{count} models of {each} GPUs each: the Ray cluster has {gpus}; lower --replicas")
        return Placement(count, 0, each)
    cpus = [found for node in nodes if (found := int(node.get("CPU", 0)))]
    if not cpus:
        raise OctavoError("the Ray cluster has no CPUs for a model: start it with --num-cpus")
    count = count or len(cpus)
    return Placement(count, _share(cpus, count), 0)


def _share(cpus: list[int], count: int) -> float:
    """The most CPUs that each of `count` models can have on machines with so many: whole ones, or a part of one, which
    Ray counts in ten-thousandths."""
    parts = {own // n or 10_000 * own // n / 10_000 for own in cpus for n in range(1, count + 1)}
    return max(part for part in parts if sum(int(own / part) for own in cpus) >= count)

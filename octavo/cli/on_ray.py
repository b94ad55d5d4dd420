"""The options of verbs that can work on a Ray cluster, and the cluster that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from octavo.cli.options import option
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.ray.cluster import Placement

RAY = option("Work on a Ray cluster: its address, like auto or 10.0.0.1:6379; local starts one here.", panel="Ray")
REPLICAS = option("Models on it. [default: one on each GPU, or on each machine]", min=1, panel="Ray")


def check_replicas(ray: str | None, replicas: int | None) -> None:
    if replicas is not None and ray is None:
        raise OctavoError("--replicas are on a Ray cluster: name it with --ray, or start one here with --ray local")
    if ray is not None:
        from octavo.ray.cluster import require

        require("--ray")


@contextmanager
def on_ray(address: str | None, replicas: int | None, device: str) -> Iterator[Placement | None]:
    """The cluster that --ray names, and where models go on it; None without one."""
    if address is None:
        yield None
        return
    from octavo.ray.cluster import cluster, placement

    with cluster(address):
        yield placement(replicas, device)

"""How many threads to compute with, and where: one for each fast physical core of one socket.

A step waits for its slowest thread, so one on an efficiency core, on a core's second hardware thread or in another
socket, whose memory is far, slows all of them. What the process may not use does not count: its affinity (`taskset`,
cpusets) and the quota of its control groups (`docker --cpus`, Kubernetes' limits).
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FAST = 0.8  # of the fastest core's speed: favoured cores of one kind differ by a few percent
TOLD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # who sets one of these has chosen


@dataclass(frozen=True)
class Cores:
    """What to compute on."""

    threads: int
    cpus: frozenset[int]  # as the system counts them: both hardware threads of a core; none where it does not say


def choose(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> Cores:
    """The fast physical cores of the socket that has most of them, among the CPUs that this process may use; no more
    threads than its quota has time for. `root` is where /sys and /proc are."""
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cpus = sorted(allowed)
    system = root / "sys" / "devices"
    slow = _listed(_text(system / "cpu_atom" / "cpus"))  # efficiency cores, as Intel's processors name them
    speeds = {cpu: 0.0 if cpu in slow else _speed(system / "system" / "cpu" / f"cpu{cpu}") for cpu in cpus}
    fastest = max(speeds.values())
    sockets: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for cpu in cpus:
        topology = system / "system" / "cpu" / f"cpu{cpu}" / "topology"
        if speeds[cpu] >= FAST * fastest:
            core = _text(topology / "core_id") or f"cpu {cpu}"
            sockets[_text(topology / "physical_package_id")][f"{_text(topology / 'die_id')} {core}"].add(cpu)
    best = max(sockets.values(), key=len)  # the first of equals
    quota = _quota(root)
    threads = len(best) if quota is None else max(1, min(len(best), int(quota)))
    return Cores(threads, frozenset().union(*best.values()))


def use() -> None:
    """Have torch, and so the native kernels, compute on the cores of `choose`, unless OMP_NUM_THREADS says otherwise.

    For a process that does nothing else, before its first computation: of threads that are there already only the
    caller moves to the chosen socket.
    """
    if any(map(os.environ.get, TOLD)):
        return
    import torch  # seconds, which who only asks how many cores there are need not wait

    cores = choose()
    torch.set_num_threads(cores.threads)
    if hasattr(os, "sched_setaffinity") and cores.cpus < os.sched_getaffinity(0):
        os.sched_setaffinity(0, cores.cpus)


def _speed(cpu: Path) -> float:
    """How fast a CPU is, to be compared with others of this machine."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        if text := _text(cpu / name):
            return float(text)
    return 1.0


def _quota(root: Path) -> float | None:
    """CPUs' worth of time that the process' control groups leave it; None if they set no limit."""
    limits = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys" / "fs" / "cgroup"
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            mount /= "cpu"
        group = mount / path.lstrip("/")
        for place in (group, *group.parents):  # a container sees its own group as the root, whatever its path says
            if not place.is_relative_to(mount):
                break
            quota, period = (_text(place / "cpu.max") or "max 1").split()
            if controllers:
                quota, period = _text(place / "cpu.cfs_quota_us") or "-1", _text(place / "cpu.cfs_period_us") or "1"
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _listed(text: str) -> set[int]:
    """ "0-3,8" → 0, 1, 2, 3, 8."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

"""Threads follow the cores that a process may use and that are fast: on trees of /sys as machines have them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo import cores


def machine(root: Path, cpus: dict[int, dict[str, object]], **files: str) -> Path:
    """/sys with these CPUs; other files by their path, with "__" for "/"."""
    for cpu, facts in cpus.items():
        for name, value in facts.items():
            topology = "" if name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq") else "topology/"
            write(root / f"sys/devices/system/cpu/cpu{cpu}/{topology}{name}", str(value))
    for path, text in files.items():
        write(root / path.replace("__", "/"), text)
    return root


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def smt(count: int, sockets: int = 1) -> dict[int, dict[str, object]]:
    """`count` cores a socket with two hardware threads each, numbered as Linux does: first threads first."""
    total = count * sockets
    return {
        cpu: {"core_id": cpu % total % count, "physical_package_id": cpu % total // count, "die_id": 0}
        for cpu in range(2 * total)
    }


def test_hardware_threads_of_a_core_are_one(tmp_path: Path) -> None:
    found = cores.choose(machine(tmp_path, smt(4)), range(8))
    assert (found.threads, found.cpus) == (4, frozenset(range(8)))


def test_one_socket_is_chosen(tmp_path: Path) -> None:
    """The one that has more of the cores that may be used, else the first."""
    root = machine(tmp_path, smt(4, sockets=2))
    assert cores.choose(root, range(16)) == cores.Cores(4, frozenset({0, 1, 2, 3, 8, 9, 10, 11}))
    assert cores.choose(root, [0, 1, 4, 5, 6]) == cores.Cores(3, frozenset({4, 5, 6}))


def test_dies_of_a_socket_may_number_their_cores_alike(tmp_path: Path) -> None:
    facts = {cpu: {"core_id": cpu % 2, "physical_package_id": 0, "die_id": cpu // 2} for cpu in range(4)}
    assert cores.choose(machine(tmp_path, facts), range(4)).threads == 4


def test_efficiency_cores_are_left_out(tmp_path: Path) -> None:
    """By Intel's list, by ARM's capacity, by frequency; those a little faster than others are of their kind."""
    intel = smt(2) | {cpu: {"core_id": cpu, "physical_package_id": 0} for cpu in range(4, 8)}
    root = machine(tmp_path / "intel", intel, sys__devices__cpu_atom__cpus="4-7")
    assert cores.choose(root, range(8)) == cores.Cores(2, frozenset(range(4)))
    assert cores.choose(root, range(4, 8)).threads == 4  # if there are no others
    for name, speeds in {
        "cpu_capacity": (446, 1024, 1000),
        "cpufreq/cpuinfo_max_freq": (3300000, 5000000, 4900000),
    }.items():
        facts = {
            cpu: {"core_id": cpu, "physical_package_id": 0, name: speeds[0] if cpu < 4 else speeds[1 + cpu % 2]}
            for cpu in range(8)
        }
        assert cores.choose(machine(tmp_path / name, facts), range(8)).cpus == frozenset(range(4, 8))


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"proc__self__cgroup": "0::/", "sys__fs__cgroup__cpu.max": "250000 100000"}, 2),
        ({"proc__self__cgroup": "0::/a/b", "sys__fs__cgroup__a__cpu.max": "50000 100000",
          "sys__fs__cgroup__a__b__cpu.max": "max 100000"}, 1),
        ({"proc__self__cgroup": "0::/", "sys__fs__cgroup__cpu.max": "max 100000"}, 4),
        ({"proc__self__cgroup": "0::/", "sys__fs__cgroup__cpu.max": "1600000 100000"}, 4),
        ({"proc__self__cgroup": "5:memory:/x\n3:cpu,cpuacct:/docker/y",
          "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "300000",
          "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"}, 3),
        ({"proc__self__cgroup": "3:cpu,cpuacct:/", "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1"}, 4),
        ({}, 4),
    ],
)  # fmt: skip
def test_a_quota_of_time_limits_the_threads(tmp_path: Path, files: dict[str, str], threads: int) -> None:
    """Of control groups of version 2 and 1, of the process' own or of one above."""
    assert cores.choose(machine(tmp_path, smt(4), **files), range(8)).threads == threads


def test_a_machine_that_says_nothing_has_as_many_cores_as_cpus(tmp_path: Path) -> None:
    assert cores.choose(tmp_path, range(6)) == cores.Cores(6, frozenset(range(6)))


def test_what_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    cores.use()
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before


def test_a_process_computes_on_the_cores_that_it_may_use() -> None:
    """torch's threads too."""
    one = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "import torch\nfrom octavo import cores\ncores.use()\n"
        f"assert torch.get_num_threads() == 1 and os.sched_getaffinity(0) == {{{one}}}"
    )
    environment = {name: value for name, value in os.environ.items() if name not in cores.TOLD}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)

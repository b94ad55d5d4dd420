"""Starting and ending the ranks of a model: as processes of our own, or as those that torchrun has started."""

import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist

from octavo.cores import TOLD
from octavo.devices import HOST, find_device
from octavo.errors import OctavoError, one_line
from octavo.models.locate import locate
from octavo.models.model import Model
from octavo.parallel.division import ByPlan, check
from octavo.parallel.follower import Task, follow
from octavo.parallel.ranks import KEY, PATIENCE, RUN, RankFailed, Ranks, connect, own_device

LEAVING = 5.0  # seconds that a rank has for its end


def start(model: str | Path | None, count: int, *, device: str = "auto", **loading: Any) -> Model:
    """As `octavo.parallel.load`, of two ranks or more."""
    if dist.is_initialized():
        raise OctavoError("a process holds one divided model: share it between LLMs with LLM(llm.model, …)")
    name, path = locate(model)
    check(path, name, loading)
    kind = find_device(device)
    if RUN in os.environ:
        ranks = _of_torchrun(count)
        if ranks.rank:
            follow(ranks, path, str(kind), loading)
            raise SystemExit(0)
    else:
        ranks = _started(count, path, kind, loading)
    try:
        own = own_device(kind, ranks)
        _await(ranks)
        connect(ranks, own)
        loaded = Model.load(model, device=str(own), division=ByPlan(ranks), **loading)
    except BaseException as error:
        reason = _reason(ranks, error) if isinstance(error, Exception) else None
        _end(ranks)
        if reason is not None:
            raise OctavoError(reason) from error
        raise
    # Not before: reading weights may take the interpreter's lock for long.
    Thread(target=ranks.watch, daemon=True).start()
    loaded.bound.close = finalize(loaded.bound, _end, ranks)  # type: ignore[attr-defined]
    return loaded


def _started(count: int, path: Path, device: torch.device, loading: dict[str, Any]) -> Ranks:
    store = dist.TCPStore("127.0.0.1", 0, None, True, PATIENCE, wait_for_workers=False)
    ranks = Ranks(0, count, count, store, secrets.token_bytes(32))
    threads = torch.get_num_threads()
    if device == HOST and not any(map(os.environ.get, TOLD)):
        threads = max(1, threads // count)
        torch.set_num_threads(threads)
    for rank in range(1, count):
        child = subprocess.Popen(
            [sys.executable, "-m", "octavo.parallel.follower"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is rank 0's
        )
        ranks.processes.append(child)
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is seen below
            pickle.dump(Task(rank, count, store.port, ranks.key, path, str(device), threads, loading), child.stdin)
            child.stdin.flush()
        Thread(target=_watch, args=(ranks, rank, child), daemon=True).start()
    return ranks


def _of_torchrun(count: int) -> Ranks:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != count:
        raise OctavoError(f"torchrun has started {world} processes, and the model is to be divided among {count}: "
                          f"give --nproc-per-node {count}")  # fmt: skip
    if not (key := os.environ.get(KEY, "")):
        raise OctavoError(f"{KEY} is not set: ranks that torchrun starts sign their commands with it. Before torchrun, "
                          f"export {KEY}=$(openssl rand -hex 32), the same on all machines")  # fmt: skip
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port + 1, None, rank == 0, PATIENCE, wait_for_workers=False)
    return Ranks(rank, count, local, store, key.encode())


def _await(ranks: Ranks) -> None:
    """Until all ranks are there. Raises RankFailed if one ends before."""
    end = time.monotonic() + PATIENCE.total_seconds()
    for rank in range(1, ranks.count):
        while not ranks.store.check([f"here {rank}"]):
            ranks.check()
            if time.monotonic() > end:
                ranks.fail(f"rank {rank} of {ranks.count} has not started within {PATIENCE}")
            time.sleep(0.02)
        if not ranks.processes:
            ranks.pids[rank] = int(ranks.store.get(f"here {rank}"))


def _watch(ranks: Ranks, rank: int, child: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a rank's process, which before that of the model is a failure."""
    code = child.wait()
    key, why = f"failed {rank}", ""
    with suppress(Exception):  # the store may have ended meanwhile
        if ranks.store.check([key]):
            why = ranks.store.get(key).decode()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    ranks.fail(f"rank {rank} of {ranks.count} {how}{': ' if why else ''}{why}")


def _reason(ranks: Ranks, error: Exception) -> str | None:
    """Why loading has failed, where another rank is at fault: that of the other, which all the others' errors follow
    from."""
    if isinstance(error, RankFailed):
        return str(error)
    if isinstance(error, OctavoError) and not isinstance(error.__cause__, dist.DistError | RuntimeError):
        return None
    failed = str(ranks.explain(error))
    return None if one_line(error) in failed else failed


def _end(ranks: Ranks) -> None:
    """Have all ranks end, and the group with them."""
    if ranks.failure is None:
        with suppress(Exception):
            ranks.send("stop")
        ranks.failure = "the model is closed"
    for child in ranks.processes:
        if child.stdin is not None:
            with suppress(OSError):
                child.stdin.close()
    end = time.monotonic() + LEAVING
    for child in ranks.processes:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
        child.kill()
    if dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()

"""The process of a rank other than 0, started as `python -m octavo.parallel.follower` by start.py.

What it is to load comes as a pickle on its standard input, which stays open as long as rank 0 lives: its end is the
process' own.
"""

import os
import pickle
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from octavo.errors import OctavoError, one_line
from octavo.models.model import Model
from octavo.parallel.division import ByPlan
from octavo.parallel.ranks import PATIENCE, Ranks, connect, own_device


@dataclass(frozen=True)
class Task:
    """What a rank is to hold."""

    rank: int
    count: int
    port: int  # of the store, on this machine
    key: bytes  # of its commands
    path: Path
    device: str
    threads: int
    loading: dict[str, Any]  # further arguments of Model.load


def main() -> None:
    task: Task = pickle.load(sys.stdin.buffer)
    Thread(target=_leave_with_rank_0, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's
    warnings.simplefilter("ignore")  # rank 0 says the same
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    store = dist.TCPStore("127.0.0.1", task.port, None, False, PATIENCE, wait_for_workers=False)
    try:
        follow(Ranks(task.rank, task.count, task.count, store, task.key), task.path, task.device, task.loading)
    except dist.DistNetworkError:  # rank 0 is gone
        pass
    except BaseException as error:
        reason = str(error) if isinstance(error, OctavoError) else f"{type(error).__name__}: {one_line(error)}"  # type: ignore[arg-type]
        store.set(f"failed {task.rank}", reason)
        if not isinstance(error, OctavoError):
            traceback.print_exc()
        os._exit(1)
    os._exit(0)  # at once: the group's threads would wait for each other


def follow(ranks: Ranks, path: Path, device: str, loading: dict[str, Any]) -> None:
    """Hold a share of the model in `path` until rank 0 ends."""
    own = own_device(torch.device(device), ranks)
    Thread(target=ranks.beat, daemon=True).start()
    ranks.store.set(f"here {ranks.rank}", str(os.getpid()))
    connect(ranks, own)
    model = Model.load(path, device=str(own), division=ByPlan(ranks), **loading)
    model.bound.obey()  # type: ignore[attr-defined]


def _leave_with_rank_0() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()

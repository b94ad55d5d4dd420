"""The processes that hold a model together, as each of them sees it.

Products meet in torch.distributed's default group, and each rank counts these meetings: one that does not come to where
rank 0 waits is stuck. Commands go from rank 0 to the others through a TCPStore: one that
has nothing to do waits there for as long as it takes, and is told at once when rank 0 is gone. The store takes
anybody's values and commands are pickles, so each is signed with a key that only the ranks have.
"""

import hmac
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from octavo.devices import HOST
from octavo.errors import OctavoError, one_line

PATIENCE = timedelta(minutes=10)  # that a rank waits for the others in one operation: kernels may be compiled first
GLANCE = timedelta(
    hours=1
)  # after which a rank that waits for a command asks anew; the end of rank 0 it is told at once
SIGNATURE = 32  # bytes
KEY = "OCTAVO_RANKS_KEY"  # a secret for the ranks that torchrun starts
RUN = "TORCHELASTIC_RUN_ID"  # torchrun's name for what it has started
SETTLED = 5.0  # seconds in which the end of a rank is known, once an operation with it has failed
BEAT = 1.0  # seconds from one sign of life to the next, and from look to look
MISSED = 30  # looks in a row without one: the process stands still, or its machine cannot be reached
STUCK = 120  # looks in a row at a rank that lives, but does not come to where rank 0 waits for it


class RankFailed(RuntimeError):
    """One of the ranks has ended, and with it the model that they hold together."""


class Ranks:
    """`count` ranks, of which this is `rank`; `local` of them are on this machine."""

    def __init__(self, rank: int, count: int, local: int, store: dist.TCPStore, key: bytes):
        self.rank, self.count, self.local, self.store, self.key = rank, count, local, store, key
        self.failure: str | None = None  # why no more can be computed
        self.on_failure: list[Callable[[RankFailed], None]] = []
        self.processes: list[subprocess.Popen[bytes]] = []  # of the others, that this one has started
        self.pids: dict[int, int] = {}  # of those that torchrun has started, wherever they are
        self.meetings = 0  # operations of all ranks that this one has come to
        self._sent = 0

    def each(self, x: Tensor) -> Tensor:
        """`x` of every rank, in their order: [ranks, …]."""
        x = x.contiguous()
        found = x.new_empty(self.count, *x.shape)
        self.meetings += 1
        dist.all_gather(list(found), x)
        return found

    def joined(self, x: Tensor, width: int) -> Tensor:
        """The ranks' columns side by side, `width` of them, divided as `own` says."""
        if missing := -(-width // self.count) - x.shape[-1]:
            x = torch.nn.functional.pad(x, (0, missing))
        return self.each(x).movedim(0, -2).flatten(-2)[..., :width]

    def own(self, outputs: int) -> slice:
        """Which outputs of a divided layer are this rank's: as torch cuts a dimension, the last may have fewer."""
        size = -(-outputs // self.count)
        return slice(min(outputs, self.rank * size), min(outputs, (self.rank + 1) * size))

    def total(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum over all ranks, or what another operation makes of their `x`."""
        x = x.contiguous()
        self.meetings += 1
        dist.all_reduce(x, operation)
        return x

    def gathered(self, x: Tensor) -> list[Tensor]:
        """On rank 0 every rank's `x`, in their order; nothing on the others. Bytes are sent, whatever the type."""
        parts = [] if self.rank else [torch.empty_like(x) for _ in range(self.count)]
        self.meetings += 1
        dist.gather(x.view(torch.uint8), [part.view(torch.uint8) for part in parts] or None)
        return parts

    def scattered(self, own: Tensor, parts: Sequence[Tensor] | None) -> Tensor:
        """`own`, filled with this rank's of the `parts` that rank 0 alone has."""
        self.meetings += 1
        dist.scatter(own.view(torch.uint8), None if parts is None else [part.view(torch.uint8) for part in parts])
        return own

    def send(self, command: str, *arguments: Any) -> None:
        """Have the other ranks do something, which this one does too."""
        self.check()
        self._sent += 1
        pickled = pickle.dumps((command, arguments))
        self.store.set(f"command {self._sent}", self._sign(pickled) + pickled)  # type: ignore[arg-type]

    def receive(self) -> tuple[str, tuple[Any, ...]]:
        """The next command, however long it takes. Raises DistError when rank 0 is gone."""
        self._sent += 1
        key = f"command {self._sent}"
        while not self._comes(key):
            pass
        signature, pickled = (value := self.store.get(key))[:SIGNATURE], value[SIGNATURE:]
        if not hmac.compare_digest(signature, self._sign(pickled)):
            raise OctavoError(
                f"{key} is not signed by rank 0: somebody else writes to the ranks' store, "
                f"or {KEY} is not the same on all machines"
            )
        found: tuple[str, tuple[Any, ...]] = pickle.loads(pickled)
        if self.store.add(f"read {self._sent}", 1) == self.count - 1:
            self.store.delete_key(key)
            self.store.delete_key(f"read {self._sent}")
        return found

    def _sign(self, pickled: bytes) -> bytes:
        """Of the command whose turn it is, so that none can be sent twice."""
        return hmac.digest(self.key, self._sent.to_bytes(8) + pickled, "sha256")

    def _comes(self, key: str) -> bool:
        try:
            self.store.wait([key], GLANCE)
            return True
        except dist.DistNetworkError:
            raise
        except dist.DistError:  # it has not come yet
            return False

    def beat(self) -> None:
        """Give signs of life for as long as this process runs, whatever else it does, and say how far it is."""
        with suppress(dist.DistError):  # rank 0 is gone
            store, told = self._connection(), 0
            while True:
                store.add(f"beats {self.rank}", 1)
                store.add(f"meetings {self.rank}", (now := self.meetings) - told)
                told = now
                time.sleep(BEAT)

    def _connection(self) -> dist.Store:
        """To the store, of one's own: whoever waits on another holds its lock."""
        return dist.TCPStore(self.store.host, self.store.port, None, False, PATIENCE, wait_for_workers=False)

    def watch(self) -> None:
        """On rank 0: fail once another gives no sign of life, or does not come to where this one waits. Looks are
        counted, not seconds: where this process has stood still too, nobody is at fault."""
        store, seen = self._connection(), dict.fromkeys(range(1, self.count), (0, 0))
        silent, behind = dict.fromkeys(seen, 0), dict.fromkeys(seen, 0)
        while self.failure is None:
            for rank, (beats, meetings) in seen.items():
                own = self.meetings
                seen[rank] = store.add(f"beats {rank}", 0), store.add(f"meetings {rank}", 0)
                silent[rank] = silent[rank] + 1 if seen[rank][0] == beats else 0
                behind[rank] = behind[rank] + 1 if seen[rank][1] == meetings < own else 0
                if silent[rank] >= MISSED:
                    self.fail(f"rank {rank} of {self.count} has given no sign of life for {MISSED * BEAT:.0f} s")
                elif behind[rank] >= STUCK:
                    self.fail(f"rank {rank} of {self.count} lives, but has not got on for {STUCK * BEAT:.0f} s")
            time.sleep(BEAT)

    def check(self) -> None:
        """Raise RankFailed once a rank has failed."""
        if self.failure is not None:
            raise RankFailed(self.failure)

    def fail(self, reason: str) -> None:
        """Nothing more can be computed, and the others end. The first reason counts."""
        if self.failure is None:
            self.failure = reason
            for process in self.processes:
                process.kill()
            for rank, pid in self.pids.items():
                if _is_rank(pid, rank):
                    os.kill(pid, signal.SIGKILL)
            for tell in self.on_failure:
                tell(RankFailed(reason))
            if dist.group.WORLD is not None:  # over NCCL the end of a process ends no wait for it
                with suppress(Exception):
                    dist.group.WORLD.abort()

    def explain(self, error: Exception) -> RankFailed:
        """What an operation with the others has failed by: the rank that ended, which shows a moment later."""
        end = time.monotonic() + SETTLED
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.05)
        self.fail(f"the ranks no longer compute together: {one_line(error)}")
        return RankFailed(self.failure)


def _is_rank(pid: int, rank: int) -> bool:
    """Whether a process of this machine is that rank of this run of torchrun."""
    with suppress(OSError):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return {f"RANK={rank}".encode(), f"{RUN}={os.environ[RUN]}".encode()} <= set(environment)
    return False


def connect(ranks: Ranks, device: torch.device) -> None:
    """Make the group of all ranks, once they all are there."""
    backend = "gloo" if device == HOST else f"cpu:gloo,{device.type}:nccl"
    store = dist.PrefixStore("group", ranks.store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.count, timeout=PATIENCE)


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of this rank, which is also the one that transformers will choose."""
    rank = ranks.rank % ranks.local
    accelerator = torch.accelerator.current_accelerator()
    if device == HOST:
        if accelerator not in (None, HOST):
            raise OctavoError(
                "transformers divides a model over the GPUs that it sees: to divide it among ranks on the CPU, set "
                "CUDA_VISIBLE_DEVICES to nothing"
            )
        return device
    if device.index is not None:
        raise OctavoError(f"each rank has a GPU of its own: name the device cuda, not {device}, and choose GPUs with "
                          "CUDA_VISIBLE_DEVICES")  # fmt: skip
    if rank >= torch.cuda.device_count():
        raise OctavoError(f"rank {rank} has no GPU: this machine has {torch.cuda.device_count()}")
    os.environ["LOCAL_RANK"] = str(rank)
    torch.cuda.set_device(rank)
    return torch.device(device.type, rank)

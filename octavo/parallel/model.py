"""The bound model of which every rank holds a share. Rank 0 sends the others what it does; they do the same.

Loading, binding and rearranging weights run alike on all ranks, without a command. After that whatever they compute
together begins with one: caches are made, and steps run over them, with rank 0's batch.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from threading import RLock
from typing import Any
from weakref import WeakMethod, WeakValueDictionary, finalize

import torch
import torch.distributed as dist
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.plan import LayerPlan, LayerShape
from octavo.cache.store import KVCache
from octavo.devices import HOST, device_of
from octavo.errors import Unsupported
from octavo.interrupts import held
from octavo.models.bound import BoundModel, Watch
from octavo.models.hook import itself
from octavo.parallel.cache import ParallelCache
from octavo.parallel.heads import Share
from octavo.parallel.ranks import RankFailed, Ranks

SHOWN = 4  # tokens by which the ranks see which heads they have


class ParallelModel(BoundModel):
    """A rank's share. `shapes` and `layers` are the rank's own, `whole` the model's."""

    alone = interruptible = False
    close: Callable[[], object]  # ends the other ranks, on rank 0; so does the end of this process

    def __init__(self, bound: BoundModel, ranks: Ranks):
        super().__init__(bound.hf, bound.max_context)
        self.layers, self.computes, self.slower, self.ranks = bound.layers, bound.computes, bound.slower, ranks
        self.shares = self._find_shares()
        self.commands: dict[str, Callable[..., Any]] = {
            "cache": self._new_cache,
            "count": lambda number: self._caches[number].gather_counts(),
            "drop": self._drop,
            "free": self._free_memory,
            "read": lambda number, pages: self._caches[number].gather(pages),
            "step": self._step,
            "write": lambda number, pages: self._caches[number].divide(pages),
        }
        # Caches by number. On rank 0 they belong to whoever has asked for them; the others keep them until told.
        self._caches: MutableMapping[int, ParallelCache] = {} if ranks.rank else WeakValueDictionary()
        self._made = 0
        self.dropped: list[int] = []  # caches that rank 0 has no longer
        self.turn = RLock()  # one command at a time, whatever the threads

    @property
    def whole(self) -> list[LayerShape]:
        return [share.whole(shape) for share, shape in zip(self.shares, self.shapes, strict=True)]

    def everywhere(self, x: Tensor) -> Tensor:
        return self.ranks.each(x).flatten(0, 1)

    def make_cache(self, plans: Sequence[LayerPlan], *size: Any) -> KVCache:
        with self.turn:
            self._made += 1
            number = self._made
            cache: KVCache = self.together("cache", number, list(plans), *size)
            finalize(cache, self.dropped.append, number)
            return cache

    def step(self, cache: KVCache, batch: Batch, every: bool = False, watch: Watch | None = None) -> Tensor:
        if watch is not None:
            raise Unsupported(
                "what K and V look like is observed in an undivided model: run `octavo calibrate` first, without "
                "--tensor-parallel-size"
            )
        sent = replace(batch, plan={}, others=[replace(other, plan={}) for other in batch.others])
        assert isinstance(cache, ParallelCache)
        return self.together("step", cache.number, sent, every)

    def free_memory(self) -> int:
        return self.together("free")

    def on_failure(self, tell: Callable[[Exception], None]) -> None:
        method = WeakMethod(tell)  # an LLM is not kept for it

        def call(error: RankFailed) -> None:
            if (alive := method()) is not None:
                alive(error)

        self.ranks.on_failure.append(call)

    def obey(self) -> None:
        """What a rank other than 0 does for the rest of its life."""
        while (command := self.ranks.receive())[0] != "stop":
            self.commands[command[0]](*command[1])

    def together(self, command: str, *arguments: Any) -> Any:
        """Have all ranks do something; what it returns here."""
        with self.turn, held():  # Ctrl-C in between would leave the others waiting
            dropped: list[int] = []
            while self.dropped:  # one by one: a cache may be collected at any moment, and add its number
                dropped.append(self.dropped.pop())
            if dropped:
                self.ranks.send("drop", dropped)
            self.ranks.send(command, *arguments)
            try:
                return self.commands[command](*arguments)
            except Exception as error:
                raise self.ranks.explain(error) from error

    def _new_cache(self, number: int, plans: list[LayerPlan], *size: Any) -> KVCache:
        layers = zip(self.shares, plans, self.shapes, strict=True)
        own = [share.sliced(plan, shape, self.ranks.rank) for share, plan, shape in layers]
        cache = self._caches[number] = ParallelCache(own, *size)
        cache.ranks, cache.number, cache.together = self.ranks, number, self.together
        cache.shares, cache.whole = self.shares, plans
        return cache

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self._caches.pop(number, None)

    def _step(self, number: int, batch: Batch, every: bool) -> Tensor:
        return super().step(self._caches[number], batch, every)

    def _free_memory(self) -> int:
        """The least that a rank has; on the host they share it."""
        free = device_of(self.device).free_memory()
        least = torch.tensor(free // self.ranks.local if self.device == HOST else free)
        return int(self.ranks.total(least, dist.ReduceOp.MIN))

    def _find_shares(self) -> list[Share]:
        seen: dict[int, Tensor] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen[layer] = k
            return itself(layer, q, k, v)

        ids = torch.tensor(self.random_tokens(SHOWN), device=self.device)
        rows = torch.arange(SHOWN, device=self.device)
        self.forward(ids, rows, rows[-1:], attend)
        return [Share.of(self.ranks.each(seen[layer])) for layer in range(len(self.layers))]

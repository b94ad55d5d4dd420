"""What is done once on a GPU before anything is served: kernels are compiled, and the memory of steps is measured.

A kernel is compiled when it is first launched, which takes seconds: steps of the kinds there are launch them all. What
the largest step takes beside weights and cache is measured, and the cache is then made of what is left
(cache/size.py), so a full step later on finds its memory free.
"""

from dataclasses import dataclass

from octavo.cache.store import KVCache
from octavo.devices import device_of
from octavo.engine.graphs import NotCapturable
from octavo.engine.params import SamplingParams
from octavo.engine.runner import Runner
from octavo.engine.sampling import sample
from octavo.engine.sequence import Sampled, Sequence
from octavo.models.bind import BoundModel


@dataclass(frozen=True)
class LargestStep:
    """So many sequences, none longer than `session_len`, that compute so many tokens together and all gain one."""

    sequences: int
    tokens: int
    session_len: int

    def lengths(self) -> list[int]:
        """One prompt as long as can be, then the next; a token at least is left for each of the others."""
        found: list[int] = []
        rest = self.tokens
        for others in reversed(range(self.sequences)):
            found.append(max(1, min(self.session_len, rest - others)))
            rest -= found[-1]
        return found

    def kinds(self) -> list[list[int]]:
        """New tokens of each sequence of the steps that between them launch every kernel there can be.

        Kernels differ between one new token and several, and by whether a tile is split over its context, which it is
        where there are few: so of either kind the fewest and the most tiles.
        """
        several = min(self.sequences, self.tokens // 2)
        return [[1], [1] * self.sequences, *([[2], [2] * several] if several else []), self.lengths()]

    def run(self, model: BoundModel, cache: KVCache) -> list[Sampled]:
        """Compute it on a cache of one block, to be thrown away."""
        return run_step(self.lengths(), model, cache)

    def nbytes(self, model: BoundModel, cache: KVCache) -> int:
        """Bytes of the model's GPU that it takes at its peak, beside what was taken before, and those that the graphs
        of decode steps keep. Every kernel that steps launch is compiled before."""
        device = device_of(model.device)
        for lengths in self.kinds():
            run_step(lengths, model, cache)
        device.forget_peak()
        before = device.taken()
        self.run(model, cache)
        peak = device.peak()
        device.trim()
        return peak - before + self.graph_nbytes(model, cache)

    def graph_nbytes(self, model: BoundModel, cache: KVCache) -> int:
        """Bytes that the largest graph keeps; those of fewer rows share its memory."""
        device = device_of(model.device)
        before = device.free_memory()
        try:
            graphs = Runner(model, cache).captured(self.sequences, self.session_len, [self.sequences])
        except NotCapturable:
            return 0
        device.trim()
        kept = before - device.free_memory()
        del graphs
        return max(0, kept)


def run_step(lengths: list[int], model: BoundModel, cache: KVCache) -> list[Sampled]:
    """A step of so many new tokens for each sequence, on a cache of one block, to be thrown away: every sequence stands
    in that block, many times."""
    size = cache.layout.block_size
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=0)
    work = []
    for length in lengths:
        sequence = Sequence([0] * length, params)
        sequence.tables = [[0] * -(-length // size)] * len(cache.blocks)
        sequence.first_page = sequence.ring = 0
        sequence.state_slot = 0 if cache.states is not None else None
        work.append((sequence, length))
    logits = Runner(model, cache).run(cache.batch(work))
    return sample(logits, [sequence for sequence, _ in work])

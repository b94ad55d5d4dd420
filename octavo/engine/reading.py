"""Reading: a model runs over texts without the engine, as it would serve them. All that observes or measures runs so.

Every text gets a cache of its own, which is freed when the text is read. Long texts are read in chunks, as the engine
cuts long prompts.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from octavo.attention import backend_for
from octavo.cache.edges import EdgePool
from octavo.cache.holding import Holding
from octavo.cache.plan import own_span, plan_layers
from octavo.engine.scheduler import CHUNK_TOKENS
from octavo.models.bind import BoundModel
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat

LOGIT_ROWS = 256  # tokens of a forward whose every row's logits are wanted: with a large vocabulary they are large

Observe = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""Called in every layer of every forward with (layer, q [T, heads, k_dim], k [T, kv_heads, k_dim], v). What it returns,
if anything, stands in for attention's output [T, heads, v_dim]."""


@dataclass
class Reading:
    """How texts are read: by which model, and through which cache.

    `formats` is one format for each layer, or one for all; by default the model's own, unquantized. `calibration` is as
    for `plan_layers`. `simulate` changes K and V before they are written.
    """

    bound: BoundModel
    formats: KVFormat | Iterable[KVFormat] | None = None
    calibration: Calibration | None = None
    simulate: Callable[[Tensor], Tensor] | None = None
    outside: int = field(default=0, init=False)  # values of K and V beyond their codec's range, in all texts read
    written: int = field(default=0, init=False)  # values of K and V in all texts read

    def run(self, tokens: Sequence[int], observe: Observe | None = None, positions: Tensor | None = None) -> None:
        """Read a text. It stands at `positions` [len(tokens)], int64, by default 0, 1, …"""
        for _ in self.steps([tokens], _chunks(len(tokens), CHUNK_TOKENS), observe, positions, every=False):
            pass

    def logits(self, tokens: Sequence[int]) -> Generator[Tensor, None, None]:
        """Read a text; yields the float32 logits [rows, vocabulary] of all its rows, at most LOGIT_ROWS at a time."""
        return self.steps([tokens], _chunks(len(tokens), LOGIT_ROWS))

    def steps(
        self,
        texts: Sequence[Sequence[int]],
        cuts: Sequence[Sequence[int]],
        observe: Observe | None = None,
        positions: Tensor | None = None,
        *,
        every: bool = True,
    ) -> Generator[Tensor, None, None]:
        """Read texts together: step i computes the next cuts[i][j] tokens of text j. Yields each step's float32 logits,
        text after text, of every row or of the texts' last rows alone."""
        bound = self.bound
        formats = self.formats or bound.raw_format
        plans = plan_layers(bound.whole, formats, self.calibration)
        layout = backend_for(plans).layout
        span = own_span([plan.format for plan in plans], layout.block_size)
        raw_pages = len(texts) * (span // layout.block_size + 1) if span else 0
        edges = EdgePool(span, layout.block_size, raw_pages, len(texts), prefix_caching=False) if span else None
        sequences, blocks = [], 0
        for i, tokens in enumerate(texts):
            own = -(-len(tokens) // layout.block_size)
            table, slot = list(range(blocks, blocks + own)), i if bound.states else None
            sequence = Holding(tokens=list(tokens), tables=[table], state_slot=slot)
            if edges is not None:
                sequence.first_page, sequence.ring = edges.take(tokens, hit=False)
            sequences.append(sequence)
            blocks += own
        cache = bound.new_cache(plans, blocks, layout, raw_pages, len(texts))
        watched = observe is not None or self.simulate is not None

        def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            if self.simulate is not None:
                k, v = self.simulate(k), self.simulate(v)
            return k, v, observe(layer, q, k, v) if observe is not None else None

        try:
            for cut in cuts:
                work = [(sequence, n) for sequence, n in zip(sequences, cut, strict=True) if n]
                batch = cache.batch(work)
                if positions is not None:
                    batch.positions = positions[batch.positions]
                yield bound.step(cache, batch, every, watch if watched else None).float()
                for sequence, n in work:
                    sequence.num_cached += n
        finally:
            outside, written = cache.counts()[[i for i, _ in cache.owners]].sum((0, 1)).tolist()
            self.outside += outside
            self.written += written


def _chunks(length: int, size: int) -> list[list[int]]:
    return [[min(size, length - start)] for start in range(0, length, size)]

"""The probe: is an architecture exact through Octavo, or refused? Nothing else is allowed.

A tiny model of the zoo runs packed steps over the real cache (fp32 format, reference attention): a prefill of three
sequences, decodes, and steps that mix decodes with chunks of a fourth sequence's prompt. The logits are compared with
those of the model's own eager attention over each sequence alone, without a cache.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attention import attend
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import plan_layers
from octavo.cache.store import KVCache
from octavo.errors import LISTED, Unsupported
from octavo.models.bind import BoundModel, bind
from octavo.models.prepack import prepack
from octavo.models.states import StateStep
from octavo.quant.format import KVFormat
from tests.models import zoo

TOLERANCE = 1e-4  # of a row's norm; float32 rounding is two orders below
LENGTHS = (18, 12, 24, 14)  # tokens of the four sequences
STEPS = (  # new tokens of each sequence
    (11, 5, 17, 0), (1, 1, 1, 0), (1, 1, 1, 0), (1, 1, 1, 0), (1, 1, 1, 0), (1, 1, 1, 9), (2, 1, 1, 5), (0, 1, 1, 0),
)  # fmt: skip
BLOCK = 4  # tokens; small, so that every sequence has several blocks


@dataclass
class Sequence:
    full: list[int]
    block_table: list[int]
    tokens: list[int] = field(default_factory=list)
    num_cached: int = 0
    state_slot: int | None = None

    @property
    def tables(self) -> list[list[int]]:
        return [self.block_table]


@dataclass(frozen=True)
class Outcome:
    name: str
    verdict: Literal["exact", "refused", "wrong"]
    reason: str = ""  # of a refusal
    error: float = 0.0  # the largest of a row of logits, relative to its norm
    features: tuple[str, ...] = ()


@cache
def probe(name: str) -> Outcome:
    """What happens to the model of that name. Any other exception than a refusal is the binding's bug."""
    hf = zoo.build(name)
    own = deepcopy(hf)  # which is never bound
    try:
        bound = bind(hf)
    except Unsupported as refusal:
        return Outcome(name, "refused", reason=str(refusal).removesuffix(f". {LISTED}"))
    prepack(bound)  # as a model is that is loaded
    error = largest_error(own, bound)
    return Outcome(name, "exact" if error < TOLERANCE else "wrong", error=error, features=features(bound))


def largest_error(own: PreTrainedModel, bound: BoundModel) -> float:
    """Of a bound model beside `own`, the same that is not bound."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randint(3, zoo.VOCABULARY, (sum(LENGTHS),), generator=generator).split(LENGTHS)
    return packed_error(bound, full, eager(own, full))


@torch.inference_mode()
def eager(hf: PreTrainedModel, full: tuple[Tensor, ...]) -> list[Tensor]:
    """Logits [length, vocabulary] of each sequence alone, by a model that was never bound."""
    hf.set_attn_implementation("eager")
    return [hf(input_ids=ids[None], use_cache=False).logits[0] for ids in full]


def packed_error(bound: BoundModel, full: tuple[Tensor, ...], want: list[Tensor]) -> float:
    """The largest relative error of a row of logits, over packed steps on a paged cache: of every row in the first
    step, of the rows a batch asks for in the others."""
    blocks = [-(-len(ids) // BLOCK) for ids in full]
    tables = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).split(blocks)
    sequences = [Sequence(ids.tolist(), table.tolist()) for ids, table in zip(full, tables, strict=True)]
    plans = plan_layers(bound.shapes, KVFormat.parse("fp32"))
    kv = KVCache(plans, sum(blocks), Layout(BLOCK), states=bound.states, sessions=len(full))
    if kv.states is not None:
        for sequence in sequences:
            sequence.state_slot = kv.states.take()
    errors = []
    for step in STEPS:
        work = [(sequence, n) for sequence, n in zip(sequences, step, strict=True) if n]
        for sequence, n in work:
            sequence.tokens = sequence.full[: sequence.num_cached + n]
        batch = Batch.build(work, BLOCK, states=kv.states is not None)
        rows = torch.arange(len(batch.ids)) if step is STEPS[0] else batch.logits_at
        step_ = StateStep.of(batch, kv)
        got = bound.forward(batch.ids, batch.positions, rows, partial(_attend, bound, kv, batch), step_)
        owners = torch.arange(len(full)).repeat_interleave(torch.tensor(step))[rows].tolist()
        expected = torch.stack([want[i][p] for i, p in zip(owners, batch.positions[rows].tolist(), strict=True)])
        errors.append((got - expected).norm(dim=-1) / expected.norm(dim=-1))
        for sequence, n in work:
            sequence.num_cached += n
    return torch.cat(errors).max().item()  # NaN if any is


def _attend(bound: BoundModel, kv: KVCache, batch: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(bound.layers[layer], kv.layers[layer], q, k, v, batch)


def features(bound: BoundModel) -> tuple[str, ...]:
    """What the dry trace saw, over all layers."""
    layers, shapes = bound.layers, bound.shapes
    dims = {(shape.k_dim, shape.v_dim) for shape in shapes}
    seen = {
        "GQA": any(layer.heads > layer.shape.kv_heads for layer in layers),
        "window": any(layer.window is not None for layer in layers),
        "soft cap": any(layer.softcap is not None for layer in layers),
        "sinks": any(layer.sinks is not None for layer in layers),
        "K and V of different dims": any(k != v for k, v in dims),
        "layers of different shapes": len({(shape.kv_heads, shape.k_dim, shape.v_dim) for shape in shapes}) > 1,
        "KV-shared layers": any(shape.shares is not None for shape in shapes),
        "states": bool(bound.states),
        "own scale": any(abs(layer.scale - layer.shape.k_dim**-0.5) > 1e-6 for layer in layers),
    }
    return tuple(name for name, present in seen.items() if present)

"""A bound model: transformers' own code, run over packed rows with our function in the place of attention."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attention import AttentionSpec, attend
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan, LayerShape
from octavo.cache.states import StatePlan
from octavo.cache.store import KVCache
from octavo.devices import device_of
from octavo.errors import OctavoError, Unsupported
from octavo.interrupts import let_through
from octavo.models import states
from octavo.models.hook import Attend, Recorder, attending, itself
from octavo.models.states import Mixer, StateStep
from octavo.quant.format import KVFormat, dtype_name

Watch = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""(layer, q, k, v) as for Attend → k and v in their place, and what stands in for attention's output, or None"""

NO_ROWS = "has no layer of attention: there are no rows to fold, and all formats are the same"


class BoundModel:
    """A model whose attention goes through the `attend` that each forward is given. Made by `bind`."""

    alone = True  # whether this process holds all of it; else see octavo/parallel
    interruptible = True  # whether Ctrl-C may end a forward
    shortened = False  # whether the last layer computes only rows that are due: see due.py

    def __init__(self, hf: PreTrainedModel, max_context: int, attends: bool = True):
        self.hf = hf
        self.attends = attends  # whether there is attention to send through the interface
        self.dtype = self.computes = hf.dtype  # of the weights and the baseline cache, and of the activations
        self.max_context = max_context
        self.layers: list[AttentionSpec] = []  # of attention
        self.states = StatePlan()  # of the layers that keep states
        self.mixers: list[Mixer] = []  # they themselves
        self.slower: list[str] = []  # what a CPU does not compute in its fastest way, and why (prepack.py)

    def expect_rows(self) -> None:
        """Raise OctavoError for a model without attention."""
        if not self.layers:
            raise OctavoError(f"{self.hf.config.model_type} {NO_ROWS}")

    @property
    def shapes(self) -> list[LayerShape]:
        return [layer.shape for layer in self.layers]

    @property
    def whole(self) -> list[LayerShape]:
        """The shapes with all KV heads of the model, of which this process may hold a share."""
        return self.shapes

    @property
    def rotary(self) -> str:
        """Names RoPE's frequencies, and what scales its sines, in four digits: they may follow the context, and be
        overridden."""
        digest = sha256()
        for name, buffer in self.hf.named_buffers():
            if name.endswith("inv_freq"):
                digest.update(" ".join(f"{x:.4g}" for x in buffer.flatten().tolist()).encode())
        for module in self.hf.modules():
            if isinstance(scale := getattr(module, "attention_scaling", 1.0), float) and scale != 1:
                digest.update(f" × {scale:.4g}".encode())
        return digest.hexdigest()[:8]

    @property
    def arithmetic(self) -> str:
        """What K and V depend on beside the weights: their type, that of activations, and RoPE's frequencies."""
        types = " computed in ".join(dtype_name(dtype) for dtype in {self.dtype: 0, self.computes: 0})
        return f"{types}, rotary frequencies {self.rotary}"

    @property
    def raw_format(self) -> KVFormat:
        """The cache that keeps K and V in the type of the weights: the baseline."""
        return KVFormat.raw(self.dtype)

    def random_tokens(self, *shape: int, seed: int = 0) -> list[Any]:
        """Token ids in lists of that shape, the same every time."""
        return torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).tolist()

    def find_states(self, prove: bool = True) -> None:
        """See which layers keep states, of what shapes and types, and have each show that it computes packed steps
        exactly. To be done once the weights lie where they stay, in the type that the model computes in."""
        self.states = StatePlan()
        if not states.may_keep_states(self.hf):
            return
        ids = torch.tensor(self.random_tokens(states.TOKENS), device=self.device)
        with attending(itself):
            found = states.find(self.hf, ids)
        types = getattr(self.hf.config.get_text_config(), "layer_types", None) or ()
        if len({each.mixer.layer for each in found}) < sum(kind in states.TYPES for kind in types):
            raise Unsupported(
                f"{self.hf.config.model_type} keeps the states of its recurrent layers in a way of its own, and not in "
                "transformers' cache"
            )
        states.install(found)
        if prove and not ids.is_meta:
            states.prove(self.hf.config.model_type, found)
        self.mixers = [each.mixer for each in found]
        self.states = StatePlan(tuple(mixer.states for mixer in self.mixers))

    def new_step(self, q_lens: Sequence[int]) -> StateStep | None:
        """For a forward over the beginnings of so many sequences, with states of their own."""
        return StateStep.of_new(self.states, q_lens) if self.states else None

    @cached_property  # a decode step asks for it, and the way there is long
    def device(self) -> torch.device:
        """Where token ids go in and logits come out."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        return self.hf.config.get_text_config().vocab_size

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        logits_at: Tensor,
        attend: Attend | Recorder,
        step: StateStep | None = None,
    ) -> Tensor:
        """Packed rows: ids and positions [T], int64; float logits [n, vocabulary] of the rows `logits_at` [n].

        `step` says whose states the layers that keep some go on from. Without it all rows are one sequence to them, and
        its beginning. Several threads may run forwards over one model at a time; each attends to what its own was
        given.
        """
        due, at = None, logits_at
        if self.shortened and len(logits_at) < len(ids):
            at = torch.arange(len(logits_at), device=logits_at.device)
            due = logits_at if len(logits_at) else logits_at.new_zeros(1)  # not every module takes 0 rows
        through = let_through() if self.interruptible else nullcontext()  # Ctrl-C may end it
        with attending(attend, due), states.stepping(step), through:
            logits = self.hf(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=at
            ).logits[0]
        return logits if len(logits) == len(at) else logits[at]  # a model that keeps every row's

    def new_cache(
        self,
        plans: Sequence[LayerPlan],
        blocks: int | Sequence[int],
        layout: Layout,
        raw_pages: int = 0,
        sessions: int = 0,
        snapshots: int = 0,
    ) -> KVCache:
        """A cache for this model, as KVCache makes it of `plans` of the layers in `whole`."""
        return self.make_cache(plans, blocks, layout, raw_pages, self.states, sessions, snapshots)

    def make_cache(self, *arguments: Any) -> KVCache:
        """What `new_cache` makes, in each process that holds a share of the model."""
        return KVCache(*arguments)

    def step(self, cache: KVCache, batch: Batch, every: bool = False, watch: Watch | None = None) -> Tensor:
        """A forward over a cache of `new_cache`: logits [n, vocabulary] of the rows that are due, or of `every` row, in
        the model's dtype, where the model is. `watch` sees, and may change, what each layer writes."""
        batch = batch.on(self.device)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if watch is not None:
                k, v, output = watch(layer, q, k, v)
                if output is not None:
                    return output
            return attend(self.layers[layer], cache.layers[layer], q, k, v, batch.of(cache.group_of[layer]))

        rows = torch.arange(len(batch.ids), device=self.device) if every else batch.logits_at
        return self.forward(batch.ids, batch.positions, rows, attention, StateStep.of(batch, cache))

    def free_memory(self) -> int:
        """Bytes that a cache can still take where the model is."""
        return device_of(self.device).free_memory()

    def on_failure(self, tell: Callable[[Exception], None]) -> None:
        """Have the method `tell` called, from any thread, once nothing more can be computed although no step has
        failed: when another process that holds a share of the model ends."""

    def everywhere(self, x: Tensor) -> Tensor:
        """What each process that holds a share of the model has found, one after the other: [n · processes, …]."""
        return x

"""Bind a Hugging Face model to our attention: any architecture, one hook, or a clear refusal.

transformers sends every attention layer of a model through a function that can be registered. Ours finds, on the module
that calls it, which layer that is, and hands q, k and v to whatever `attend` the forward was given: the serving cache,
the observer of a calibration, a recorder. A forward's `attend` belongs to the thread that runs it, so several threads
may run forwards over one model. Nothing is taken from the model's config that a dry run can tell: it records
each layer's geometry, scale, window, soft cap and sinks.

Layers that keep a state of fixed size in place of K and V, or beside them, take part through transformers' interface
for such states (states/).

What cannot be right is refused here, since it would be wrong in silence: states that are kept in another way, attention
patterns other than a window, keywords that change the scores, models that never reach the hook, that mix the rows of a
packed step or that count positions in a way of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from octavo.attention import AttentionSpec
from octavo.cache.plan import LayerShape
from octavo.cache.states import StatePlan
from octavo.errors import LISTED, Unsupported, one_line
from octavo.interrupts import let_through
from octavo.models import states
from octavo.models.rope import pin_rope, short_context
from octavo.models.states import StateStep
from octavo.quant.format import RAW_NAMES, KVFormat

NAME = "octavo"
ALONE = "octavo-alone"  # the same function under a name for which transformers makes masks, so that they can be read
NO_WINDOW = -1  # an attention pattern that is none
UNLIMITED = 1 << 30  # context of a model that names no limit
LAYER_TYPES = {"full_attention", "sliding_attention"} | states.TYPES | states.STATELESS
ATTENDING = {"full_attention", "sliding_attention", "hybrid", "hybrid_sliding"}
_COMPRESSED = "it attends to compressed groups of rows: it would need them cached beside K and V"
NEEDED = {  # by layers of other types
    "indexed_attention": "an indexer chooses the rows that a query sees: it would need the indexer's keys cached beside "
    "K and V, and attention to chosen rows",
    "minimax_m3_sparse": "it chooses blocks of rows by keys of its own: it would need those keys cached beside K and "
    "V, and attention to chosen blocks",
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
    "chunked_attention": "a query sees its own chunk alone: it would need windows that begin at multiples of a number",
    "reference_sliding_attention": "an image's rows are seen from everywhere and others through a window: it would "
    "need masks by row",
}
# Keywords of the attention call that cannot change what is computed here. Any other one that is set is refused.
HARMLESS = {
    "attention_mask", "cache_position", "dropout", "is_causal", "layer_idx", "logits_to_keep", "output_attentions",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "training", "use_cache",
}  # fmt: skip

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, k_dim], k [T, kv_heads, k_dim], v [T, kv_heads, v_dim]) → [T, heads, v_dim]"""


class _Thread(threading.local):
    """What the forward that this thread runs attends to; None between forwards."""

    attend: Attend | _Trace | None = None


_thread = _Thread()


@contextmanager
def _attending(attend: Attend | _Trace) -> Iterator[None]:
    assert _thread.attend is None, "a forward cannot start within another forward of the same thread"
    _thread.attend = attend
    try:
        yield
    finally:
        _thread.attend = None


class BoundModel:
    """A model whose attention goes through the `attend` that each forward is given. Made by `bind`."""

    def __init__(self, hf: PreTrainedModel, max_context: int, attends: bool = True):
        self.hf = hf
        self.attends = attends  # whether there is attention to send through the interface
        self.dtype = self.computes = hf.dtype  # of the weights and the baseline cache, and of the activations
        self.max_context = max_context
        self.layers: list[AttentionSpec] = []  # of attention
        self.states = StatePlan()  # of the layers that keep states

    @property
    def shapes(self) -> list[LayerShape]:
        return [layer.shape for layer in self.layers]

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
        types = " computed in ".join(str(dtype).removeprefix("torch.") for dtype in {self.dtype: 0, self.computes: 0})
        return f"{types}, rotary frequencies {self.rotary}"

    @property
    def raw_format(self) -> KVFormat:
        """The cache that keeps K and V in the type of the weights: the baseline."""
        return KVFormat.parse(RAW_NAMES[str(self.dtype).removeprefix("torch.")])

    def random_tokens(self, *shape: int, seed: int = 0) -> list[Any]:
        """Token ids in lists of that shape, the same every time."""
        return torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).tolist()

    def find_states(self, prove: bool = True) -> None:
        """See which layers keep states, of what shapes and types, and have each show that it computes packed steps
        exactly. To be done again where the type that a model computes in has changed."""
        self.states = StatePlan()
        if not states.may_keep_states(self.hf):
            return
        ids = torch.tensor(self.random_tokens(states.TOKENS), device=self.device)
        with _attending(_itself):
            found = states.find(self.hf, ids)
        types = getattr(self.hf.config.get_text_config(), "layer_types", None) or ()
        if len({each.mixer.layer for each in found}) < sum(kind in states.TYPES for kind in types):
            raise Unsupported(
                f"{self.hf.config.model_type} keeps the states of its recurrent layers in a way of its own, and not in "
                "transformers' cache"
            )
        self.states = states.install(found)
        if prove and not ids.is_meta:
            states.prove(self.hf.config.model_type, found)

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
        attend: Attend | _Trace,
        step: StateStep | None = None,
    ) -> Tensor:
        """Packed rows: ids and positions [T], int64; float logits [n, vocabulary] of the rows `logits_at` [n].

        `step` says whose states the layers that keep some go on from. Without it all rows are one sequence to them, and
        its beginning. Several threads may run forwards over one model at a time; each attends to what its own was
        given.
        """
        with _attending(attend), states.stepping(step), let_through():  # Ctrl-C may end it
            logits = self.hf(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=logits_at
            ).logits[0]
        return logits if len(logits) == len(logits_at) else logits[logits_at]  # a model that keeps every row's


def bind(hf: PreTrainedModel, context: int | None = None) -> BoundModel:
    """Bind a loaded model in place; raises `Unsupported` with the reason where the result could be wrong.

    `context` is the longest sequence to be served, the model's own limit by default: RoPE variants that change their
    frequencies with the length are pinned to it, so that a sequence's neighbours never change its answer.
    """
    try:
        return _bind(hf, context)
    except Unsupported as refusal:
        raise Unsupported(f"{refusal}. {LISTED}") from refusal.__cause__


def _bind(hf: PreTrainedModel, context: int | None) -> BoundModel:
    config = hf.config.get_text_config()
    name = hf.config.model_type
    if getattr(hf.config, "is_encoder_decoder", False):
        raise Unsupported(f"{name} is an encoder-decoder; Octavo serves decoder-only language models")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if strange:
        why = next((f": {NEEDED[kind]}" for kind in strange if kind in NEEDED), ", which Octavo does not know")
        raise Unsupported(f"{name} has layers of type {', '.join(strange)}{why}")
    if getattr(config, "attn_temperature_tuning", False):  # llama4: by the row's number, thousands of rows apart
        raise Unsupported(f"{name} scales its queries by their place in the step, not by their position")
    attends = hf._can_set_attn_implementation()
    if not attends and not states.may_keep_states(hf):
        raise Unsupported(f"{name} does not send its attention through transformers' AttentionInterface")
    max_context = getattr(config, "max_position_embeddings", None) or UNLIMITED
    pin_rope(hf, context or max_context)
    if (short := short_context(hf.config)) is not None and (context or max_context) <= short:
        max_context = min(short, max_context)

    bound = BoundModel(hf.eval(), max_context, attends)
    if attends:
        AttentionInterface.register(NAME, _attention)
        hf.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise Unsupported(f"{name} did not accept the attention function; it kept {config._attn_implementation!r}")
    bound.find_states()
    with _Trace(bound) as trace:
        trace.run()
    _expect_all_layers(bound, len(trace.specs))
    bound.layers = [replace(spec, shape=replace(spec.shape, reach=reach))
                    for spec, reach in zip(trace.specs, _reaches(trace.specs, max_context), strict=True)]  # fmt: skip
    return bound


def _expect_all_layers(bound: BoundModel, attending: int) -> None:
    """Raise Unsupported unless every layer of a model attends, keeps states that are known, or keeps nothing."""
    config, name = bound.hf.config.get_text_config(), bound.hf.config.model_type
    types, keeping = getattr(config, "layer_types", None) or (), len(bound.states.layers)
    if keeping and types:
        expected = sum(kind in ATTENDING for kind in types)
    else:
        expected = getattr(config, "num_hidden_layers", attending) - keeping
    if attending != expected or not attending + keeping:
        raise Unsupported(
            f"only {attending} of the {expected} layers of {name} reach the attention function; "
            "the others keep a state that is not a KV cache"
        )


def _reaches(layers: list[AttentionSpec], context: int) -> list[int | None]:
    """Of each layer's cache, which several layers may read, how many last rows a query sees at most; None: all."""
    owner = [i if layer.shape.shares is None else layer.shape.shares for i, layer in enumerate(layers)]
    seen = [layer.window if layer.window is not None and layer.window < context else None for layer in layers]
    readers = [[window for window, other in zip(seen, owner, strict=True) if other == own] for own in owner]
    return [None if None in windows else max(window for window in windows if window) for windows in readers]


def attention_modules(hf: PreTrainedModel) -> dict[int, nn.Module]:
    """The modules of a bound model that call attention, by layer."""
    return {vars(module)[NAME]: module for module in hf.modules() if NAME in vars(module)}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered function: q [1, heads, T, dim], k and v [1, kv_heads, T, dim] after RoPE, before a GQA repeat."""
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    attend = _thread.attend
    if attend is None:
        raise RuntimeError("a bound model runs through BoundModel.forward")
    if isinstance(attend, _Trace):
        attend.record(module, q, k, v, attention_mask, kwargs)
        return _itself(0, q, k, v)[None], None
    layer: int | None = 0 if attend is _itself else getattr(module, NAME, None)
    if layer is None:
        raise RuntimeError(f"{type(module).__name__} was not reached when its model was bound")
    return attend(layer, q, k, v)[None], None


def _itself(_: int, q: Tensor, __: Tensor, v: Tensor) -> Tensor:
    """Every row sees itself alone, in whatever layer: none has a number yet."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


class _Trace:
    """Two dry runs of the tokens a, b, a that record the layers in the order in which they are reached.

    In both every row attends to itself alone, so a row may depend on nothing but its token and its position. First as
    the engine runs it, two sequences packed: positions 0, 1, 0. Row 0 must equal row 2, or the model mixes rows
    (convolutions, recurrent states) or takes positions from the rows' order. Then as one sequence whose positions the
    model counts itself, with a mask: rows 0 and 1 must be what they were, and the mask tells the window.
    """

    def __init__(self, bound: BoundModel):
        self.bound = bound
        self.name = bound.hf.config.model_type
        self.specs: list[AttentionSpec] = []
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # kept alive: identity tells a shared K/V from a new one
        self.masks: dict[int, tuple[Tensor, Callable[..., Tensor]]] = {}  # what transformers made, by address
        self.alone = False  # the second run

    def __enter__(self) -> _Trace:
        for module in self.bound.hf.modules():
            vars(module).pop(NAME, None)  # of an earlier binding
        return self

    def __exit__(self, *_: object) -> None:
        if self.bound.attends:
            self.bound.hf.set_attn_implementation(NAME)
        self.seen.clear()
        self.masks.clear()

    def run(self) -> None:
        hf = self.bound.hf
        try:
            a, b = self.bound.vocab_size // 2, self.bound.vocab_size // 3
            ids = torch.tensor([a, b, a], device=self.bound.device)
            rows = torch.arange(3, device=self.bound.device)
            step = None if ids.is_meta else self.bound.new_step([2, 1])
            self.expect_finite("its logits", self.bound.forward(ids, rows % 2, rows, self, step).amax(-1))
            if ids.is_meta or not self.bound.attends:  # shapes only: the second run compares values
                return
            AttentionInterface.register(ALONE, _attention)
            AttentionMaskInterface.register(ALONE, _mask)
            hf.set_attn_implementation(ALONE)
            self.alone = True
            with _attending(self), torch.inference_mode():
                hf(input_ids=ids[None], use_cache=False)
        except (Unsupported, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if next(hf.parameters()).is_meta:  # code that looks at values: no fault of the model's
                raise
            raise Unsupported(f"{self.name} does not run on token ids alone: {one_line(error)}") from error

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        if not hasattr(module, NAME):
            setattr(module, NAME, len(self.specs))
        index: int = getattr(module, NAME)
        if self.alone:
            self.compare(index, q, k, v, mask)
            return
        if index != len(self.specs):
            raise Unsupported(f"{self.name} runs one attention module as several layers, which one cache cannot hold")
        if mask is not None:
            raise Unsupported(f"{self.name} puts part of its attention into a mask")
        if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
            raise Unsupported(f"{self.name} has attention that is not causal")
        known = {"scaling", "sliding_window", "softcap", "s_aux"} | HARMLESS
        strange = [key for key, value in kwargs.items() if key not in known and value is not None]
        if strange:
            raise Unsupported(f"{self.name} calls attention with {', '.join(strange)}, which Octavo does not know")
        self.expect_finite(f"queries, keys or values of layer {index}", q, k, v)
        if not all(_alike(x[0], x[2]) for x in (q, k, v)):
            raise Unsupported(
                f"layer {index} of {self.name} mixes the rows of a packed step, or takes positions from their order"
            )
        scale = kwargs.get("scaling")
        shares = next((i for i, (_, old_k, old_v) in enumerate(self.seen) if _same(k, old_k) and _same(v, old_v)), None)
        self.seen.append((q, k, v))
        self.specs.append(
            AttentionSpec(
                shape=LayerShape(k.shape[1], k.shape[2], v.shape[2], k.device, shares, k.dtype),
                heads=q.shape[1],
                scale=float(scale) if scale is not None else q.shape[2] ** -0.5,
                window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
        )

    def expect_finite(self, what: str, *values: Tensor) -> None:
        if not all(x.is_meta or bool(x.isfinite().all()) for x in values):
            dtype = str(self.bound.dtype).removeprefix("torch.")
            raise Unsupported(
                f"{self.name} overflows in {dtype}: {what} are not finite. Choose a --dtype of a larger range, bf16 or "
                "fp32; if it is one already, the weights are corrupted"
            )

    def compare(self, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """The second run of a layer."""
        if not all(_alike(x[:2], old[:2]) for x, old in zip((q, k, v), self.seen[index], strict=True)):
            raise Unsupported(
                f"{self.name} does not count positions from 0: given as 0, 1, … it computes something else"
            )
        if mask is None:
            return
        # The keyword and the mask may disagree. The model's own attention obeys the mask.
        _, shown = self.masks.get(mask.data_ptr(), (None, None))
        pattern: int | None = NO_WINDOW
        if shown is not None:
            pattern = _window(shown, self.bound.max_context, self.specs[index].window, mask.device)
        if pattern == NO_WINDOW:
            raise Unsupported(f"{self.name} masks its attention in a pattern that is not a causal window")
        self.specs[index] = replace(self.specs[index], window=pattern)


def _mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **kwargs: Any
) -> Tensor:
    """Registered for ALONE: a mask that hides nothing, remembered with the function that would have filled it."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=kwargs.get("device"))
    if isinstance(_thread.attend, _Trace):
        _thread.attend.masks[mask.data_ptr()] = mask, mask_function
    return mask


def _window(shown: Callable[..., Tensor], context: int, default: int | None, device: torch.device) -> int | None:
    """How many last tokens a mask function shows every query, itself included: None if all, NO_WINDOW if it does not
    tell by distance alone. A function that looks up the tokens at hand knows no others; if it is causal for these, the
    window is the default."""

    def row(query: int, keys: Tensor) -> Tensor:
        zero = torch.tensor(0, device=device)
        return shown(zero, zero, torch.tensor(query, device=device), keys).expand(len(keys))

    last = min(context, 1 << 20) - 1
    keys = torch.arange(last + 2, device=device)  # to one beyond the query
    try:
        rows = {query: row(query, keys) for query in (last, last - 1)}
    except Exception:
        return default if all(torch.equal(row(q, keys[:3]), keys[:3] <= q) for q in range(3)) else NO_WINDOW
    counts = [int(row.sum()) for row in rows.values()]
    for (query, seen), count in zip(rows.items(), counts, strict=True):
        if not torch.equal(seen, (keys <= query) & (keys > query - count)):
            return NO_WINDOW
    if counts == [last + 1, last]:
        return None
    return counts[0] if counts[0] == counts[1] else NO_WINDOW


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding. A model on the meta device has shapes and no values: all are."""
    return a.is_meta or bool((a.float() - b.float()).norm() <= 0.01 * b.float().norm())


def _same(a: Tensor, b: Tensor) -> bool:
    # By storage, not by address: tensors on the meta device have none.
    same_place = a.untyped_storage() is b.untyped_storage() and a.storage_offset() == b.storage_offset()
    return same_place and a.shape == b.shape and a.stride() == b.stride()


@contextmanager
def unbound(bound: BoundModel, implementation: str = "sdpa") -> Iterator[PreTrainedModel]:
    """The plain transformers model for a while, with its own attention: the baseline of tests and benchmarks."""
    if bound.attends:
        bound.hf.set_attn_implementation(implementation)
    try:
        yield bound.hf
    finally:
        if bound.attends:
            bound.hf.set_attn_implementation(NAME)

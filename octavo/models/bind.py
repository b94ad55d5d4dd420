"""Bind a Hugging Face model to our attention: any architecture, one hook, or a clear refusal.

transformers sends every attention layer of a model through a function that can be registered. Ours hands q, k and v to
whatever `attend` the forward was given (hook.py): the serving cache, the observer of a calibration, a recorder. Nothing
is taken from the model's config that a dry run can tell: it records each layer's geometry, scale, window, soft cap and
sinks (trace.py).

Layers that keep a state of fixed size in place of K and V, or beside them, take part through transformers' interface
for such states (states/).

What cannot be right is refused here, since it would be wrong in silence: states that are kept in another way, attention
patterns other than a window, keywords that change the scores, models that never reach the hook, that mix the rows of a
packed step or that count positions in a way of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from transformers import AttentionInterface, PreTrainedModel

from octavo.attention import AttentionSpec
from octavo.errors import LISTED, Unsupported
from octavo.models import states
from octavo.models.bound import BoundModel as BoundModel
from octavo.models.files import quiet
from octavo.models.hook import NAME, attention
from octavo.models.rope import pin_rope, short_context
from octavo.models.trace import Trace
from octavo.recurrences.cpu import refuses

UNLIMITED = 1 << 30  # context of a model that names no limit
LAYER_TYPES = {"full_attention", "sliding_attention"} | states.TYPES | states.STATELESS
ATTENDING = {"full_attention", "sliding_attention", "hybrid", "hybrid_sliding"}
_COMPRESSED = "it attends to compressed groups of rows: it would need them cached beside K and V"
NEEDED = {  # by layers of other types
    "indexed_attention": "an indexer chooses the rows that a query sees: it would need the indexer's keys cached "
    "beside K and V, and attention to chosen rows",
    "minimax_m3_sparse": "it chooses blocks of rows by keys of its own: it would need those keys cached beside K and "
    "V, and attention to chosen blocks",
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
    "chunked_attention": "a query sees its own chunk alone: it would need windows that begin at multiples of a number",
    "reference_sliding_attention": "an image's rows are seen from everywhere and others through a window: it would "
    "need masks by row",
}


def bind(hf: PreTrainedModel, context: int | None = None, prove: bool = True) -> BoundModel:
    """Bind a loaded model in place; raises `Unsupported` with the reason where the result could be wrong.

    `context` is the longest sequence to be served, the model's own limit by default: RoPE variants that change their
    frequencies with the length are pinned to it, so that a sequence's neighbours never change its answer. Without
    `prove` layers that keep states are found, and `prove_states` is left to a caller who goes on to change the weights
    or the type they are computed in.
    """
    with _told(hf):
        return _bind(hf, context, prove)


def prove_states(bound: BoundModel) -> None:
    """Have the layers of a model that keep states show that they compute packed steps exactly, as `bind` does; raises
    `Unsupported`."""
    with _told(bound.hf):
        bound.find_states()


@contextmanager
def _told(hf: PreTrainedModel) -> Iterator[None]:
    """A refusal says where all that is served is listed. transformers advises to install kernels for recurrences: not
    where native ones compute them."""
    with quiet() if refuses(hf.device) is None else nullcontext():
        try:
            yield
        except Unsupported as refusal:
            raise Unsupported(f"{refusal}. {LISTED}") from refusal.__cause__


def _bind(hf: PreTrainedModel, context: int | None, prove: bool) -> BoundModel:
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
        AttentionInterface.register(NAME, attention)
        hf.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise Unsupported(f"{name} did not accept the attention function; it kept {config._attn_implementation!r}")
    bound.find_states(prove)
    with Trace(bound) as trace:
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

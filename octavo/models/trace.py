"""The dry runs that tell the geometry of every attention layer, and refuse what could not be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from octavo.attention import AttentionSpec
from octavo.cache.plan import LayerShape
from octavo.errors import Unsupported, one_line
from octavo.models.bound import BoundModel
from octavo.models.changes import close
from octavo.models.hook import NAME, attended, attending, attention
from octavo.quant.format import dtype_name

ALONE = "octavo-alone"  # the same function under a name for which transformers makes masks, so that they can be read
NO_WINDOW = -1  # an attention pattern that is none
# Keywords of the attention call that cannot change what is computed here. Any other one that is set is refused.
HARMLESS = {
    "attention_mask", "cache_position", "dropout", "is_causal", "layer_idx", "logits_to_keep", "output_attentions",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "training", "use_cache",
}  # fmt: skip


class Trace:
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

    def __enter__(self) -> Trace:
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
            AttentionInterface.register(ALONE, attention)
            AttentionMaskInterface.register(ALONE, _mask)
            hf.set_attn_implementation(ALONE)
            self.alone = True
            with attending(self), torch.inference_mode():
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
            dtype = dtype_name(self.bound.dtype)
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
    if isinstance(trace := attended.get(), Trace):
        trace.masks[mask.data_ptr()] = mask, mask_function
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
    """Equal but for rounding, which recurrences in 16 bits add up. A model on the meta device has shapes and no values:
    all are."""
    return a.is_meta or close(a.float(), b.float(), 0.01 if a.dtype == torch.float32 else 0.05)


def _same(a: Tensor, b: Tensor) -> bool:
    # By storage, not by address: tensors on the meta device have none.
    same_place = a.untyped_storage() is b.untyped_storage() and a.storage_offset() == b.storage_offset()
    return same_place and a.shape == b.shape and a.stride() == b.stride()

"""The cache that `attach` gives: to transformers a Cache, in memory the codes that our kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from octavo.attachment.hook import Hook
from octavo.attachment.layers import copy_states, layers_of, select_states, state_layers, states_nbytes
from octavo.attachment.sequences import Sequences
from octavo.attention import attend
from octavo.cache.batch import Batch
from octavo.errors import OctavoError
from octavo.quant.format import Format


class CodedCache(Cache):
    """K and V as codes, for `model.generate(…, past_key_values=cache)` and whatever else takes a transformers Cache.

    A context manager: on exit, or by `detach`, the model is as it was before. `reset` empties it; without that the next
    call goes on where the last one ended, as with transformers' own caches. `copy.deepcopy` keeps a prompt for many
    answers. Rows that the attention mask hides are not stored. Where layers keep states, transformers' own layers hold
    them, beside ours.
    """

    def __init__(self, hook: Hook, format: Format, sequences: Sequences):
        self.hook, self.format = hook, format
        super().__init__(layers=self._new_layers())
        self.sequences = sequences
        self.seen = torch.ones(0, 0, dtype=torch.bool)  # [batch, columns]: which tokens the mask showed
        self.running = False  # a forward is on its way
        self.broken = False  # one has begun that overwrites what it goes on from, and has not ended
        self._attached = False
        self._step: tuple[Batch | None, Tensor | None, Tensor] = None, None, self.seen

    def __enter__(self) -> CodedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, _: dict[int, Any]) -> CodedCache:
        other = CodedCache(self.hook, self.format, self.sequences.copy())
        other.seen, other.broken = self.seen.clone(), self.broken
        copy_states(self.layers, other.layers)
        return other

    def attach(self) -> CodedCache:
        """Count as a user of the model's hook."""
        self.hook.users += 1
        self._attached = True
        return self

    def detach(self) -> None:
        """The model no longer needs to know codes for this cache; without other caches it is as it was before."""
        if self._attached:
            self._attached = False
            self.hook.release()

    @property
    def installed(self) -> bool:
        return self.hook.installed

    @property
    def columns(self) -> int:
        """Tokens of each sequence, those included that the mask hides."""
        return self.seen.shape[1]

    @property
    def nbytes(self) -> int:
        """Of all tensors that hold K and V, and of the states."""
        return self.sequences.cache.nbytes + states_nbytes(self.layers)

    @property
    def batch_size(self) -> int:
        return len(self.sequences.rows) or -1

    def saturation(self) -> list[tuple[float, float]]:
        """Share of values that lay outside the format's range, (K, V) of each layer."""
        return self.sequences.cache.saturation()

    def begin(self, batch: int, length: int, mask: Tensor | None) -> None:
        """A forward of `length` new tokens in each of `batch` sequences. `mask` [batch, columns + length] is 0 for
        tokens that nobody sees."""
        self.running = False
        if self.broken:
            raise OctavoError("a forward has failed, and what the next would go on from is overwritten: reset() it")
        if not self.columns:
            self.sequences.start(batch)
            self.seen = torch.ones(batch, 0, dtype=torch.bool)
        if batch != len(self.seen):
            raise OctavoError(
                f"the cache holds {len(self.seen)} sequences and the model was called with {batch}: reset() it, or "
                "batch_repeat_interleave() it first"
            )
        seen = self._seen(length, mask)
        new = seen[:, self.columns :]
        counts = new.sum(1).tolist()
        longest = max(row.num_cached + count for row, count in zip(self.sequences.rows, counts, strict=True))
        if self.hook.pinned and longest > self.hook.bound.max_context:
            context = self.hook.bound.max_context
            raise OctavoError(f"attached, this model has a context of {context} tokens; its RoPE changes beyond them")
        at = None if bool(new.all()) else new.flatten().nonzero()[:, 0]
        self._step = self.sequences.begin(counts), at, seen
        self.broken = bool(state_layers(self.layers)) or self.sequences.overwrites  # until it has ended
        self.running = True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [batch, heads, length, k_dim], which first stores k [batch, kv_heads, length, k_dim] and v;
        returns [batch, length, heads, v_dim]. Rows that the mask hides get 0."""
        batch, at, _ = self._step
        spec, whole = self.hook.bound.layers[layer], self.sequences.cache
        cache = whole.layers[layer]
        asked = q.shape[2]  # layers that share another's K and V may compute the last rows alone
        q = torch.nn.functional.pad(q, (0, 0, k.shape[2] - asked, 0))
        shape = q.shape[0], q.shape[2], q.shape[1], v.shape[3]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        if batch is None:
            return q.new_zeros(shape)[:, -asked:]
        if at is not None:
            at = at.to(q.device)
            q, k, v = q[at], k[at], v[at]
        if spec.shape.shares is None:
            self.sequences.record(cache, k, v)
        out = attend(spec, cache, q, k, v, batch.of(whole.group_of[layer]))
        if at is not None:
            out = out.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy_(0, at, out)
        return out.view(shape)[:, -asked:]

    def end(self, done: bool) -> None:
        """The forward is over. If it failed, the cache is as it was before, or has to be reset."""
        self.running = False
        if done:
            self.broken = False
            self.sequences.commit()
            self.seen = self._step[2]

    def reset(self) -> None:
        self.sequences.start(0)
        self.seen = torch.ones(0, 0, dtype=torch.bool)
        self.layers, self.broken = self._new_layers(), False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([i for i in range(len(self.seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self.seen))[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last |n| tokens from every sequence; transformers passes them negative. Those of the span before are
        exact again where the past was recorded, and otherwise what their codes stand for."""
        if any(any(layer.is_recurrent_states_initialized.values()) for layer in state_layers(self.layers)):
            raise OctavoError("the states of recurrent layers cannot be cut back: copy.deepcopy the cache before")
        count = min(abs(tokens_to_remove), self.columns)
        left = self.columns - count
        for layer in state_layers(self.layers):
            LinearAttentionLayer.crop(layer, -count)
        self.sequences.crop(self.seen[:, left:].sum(1).tolist())
        self.seen = self.seen[:, :left]

    def activate_past_recording(self) -> None:
        self.sequences.record_past()
        for layer in state_layers(self.layers):
            layer.activate_past_recording()

    def is_recording_past(self, layer_idx: int) -> bool:
        layer = self.layers[layer_idx]
        return layer.record_past if isinstance(layer, LinearAttentionLayer) else self.sequences.records

    def _new_layers(self) -> list[Any]:
        return layers_of(self, self.hook.hf, len(self.hook.bound.layers), bool(self.hook.bound.states))

    def _select(self, indices: Sequence[int]) -> None:
        self.sequences.select(indices)
        select_states(self.layers, indices)
        self.seen = self.seen[torch.tensor(indices, dtype=torch.int64)]

    def _seen(self, length: int, mask: Tensor | None) -> Tensor:
        """Which tokens are seen once the step is done, [batch, columns + length]."""
        if mask is None:
            if not bool(self.seen.all()):
                raise OctavoError("the cache has hidden tokens, such as padding: pass its attention_mask again")
            return torch.ones(len(self.seen), self.columns + length, dtype=torch.bool)
        mask = mask.bool().cpu()
        if mask.shape != (len(self.seen), self.columns + length):
            raise OctavoError(
                f"attention_mask is {list(mask.shape)}; {len(self.seen)} sequences with {self.columns} tokens in the "
                f"cache and {length} new ones need {[len(self.seen), self.columns + length]}"
            )
        if not torch.equal(mask[:, : self.columns], self.seen):
            raise OctavoError("attention_mask changes for tokens that are in the cache: reset() it first")
        return mask

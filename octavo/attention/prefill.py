"""Attention of a chunk of a prompt: many queries of one sequence over tiles of keys and values, in plain torch.

A chunk is computed in parts that skip what is hidden; the logarithm of a part's denominator, returned beside its
output, is what joins the parts (Milakov & Gimelshein 2018).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 1 << 22  # of float32 at a time: 16 MB
WINDOW_ROWS = 256  # queries that share a tile of a window's keys, or as many as the window is long


@dataclass(frozen=True)
class ChunkPart:
    """Some queries of a chunk and some keys among which they see: query i of the part stands at key `offset + i`."""

    rows: slice
    keys: slice
    offset: int
    window: int | None
    joins: bool = False  # its queries have been in a part before
    masks: dict[Any, Tensor] = field(default_factory=dict)  # kept by all parts of a chunk: most of them look alike

    @classmethod
    def of_chunk(cls, n: int, length: int, window: int | None) -> list[ChunkPart]:
        """Parts of the last n of `length` tokens that skip what is hidden from all: future keys and those left behind
        by the window. Without a window they are the chunk itself and all that came before it."""
        past, parts = length - n, []
        masks: dict[Any, Tensor] = {}
        if window is None:
            parts = [cls(slice(0, n), slice(past, length), 0, None)]
            return parts if past == 0 else [*parts, cls(slice(0, n), slice(0, past), past, None, joins=True)]
        step = max(window, WINDOW_ROWS)
        for begin in range(0, n, step):
            end = min(begin + step, n)
            oldest = max(0, past + begin - window + 1)
            parts.append(cls(slice(begin, end), slice(oldest, past + end), past + begin - oldest, window, masks=masks))
        return parts

    def hidden(self, begin: int, end: int) -> Tensor:
        """True where the part's queries begin…end must not see a key: [end − begin, keys]."""
        position = torch.arange(self.offset + begin, self.offset + end)[:, None]
        key = torch.arange(self.keys.stop - self.keys.start)
        hidden = key > position
        return hidden if self.window is None else hidden | (key <= position - self.window)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a query sees a key, −∞ where not [queries, keys]."""
        n, m = self.rows.stop - self.rows.start, self.keys.stop - self.keys.start
        key = n, m, self.offset, dtype
        if key not in self.masks:
            self.masks[key] = torch.zeros(n, m, dtype=dtype).masked_fill_(self.hidden(0, n), -torch.inf)
        return self.masks[key]

    def put(self, some: Tensor, its_total: Tensor, out: Tensor, total: Tensor) -> None:
        """The part's output and log Σ exp(score), as `flash` returns them, into those of the chunk's same rows."""
        if not self.joins:
            out.copy_(some)
            total.copy_(its_total)
        else:
            out.lerp_(some.float(), (its_total - total).sigmoid_()[..., None])
            total.copy_(torch.logaddexp(total, its_total))


def flash(q: Tensor, keys: Tensor, values: Tensor, shift: Tensor, part: ChunkPart) -> tuple[Tensor, Tensor]:
    """torch's own attention of q [heads, group, n, k_dim] over keys [heads, m, k_dim] and values [heads, m, v_dim]:
    the output [heads, group, n, v_dim], and log Σ exp(score + shift) [heads, group, n]."""
    v_dim = values.shape[-1]
    if q.shape[-1] != v_dim:  # it knows one dimension
        widest = max(q.shape[-1], v_dim)
        q, keys, values = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, keys, values))
    keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    mask = part.mask(q.dtype) if part.window is not None else None
    causal = part.window is None and part.offset == 0
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, causal, attn_mask=mask, scale=1.0
    )
    return out[..., :v_dim], total + shift


def capped(
    q: Tensor, keys: Tensor, values: Tensor, shift: Tensor, part: ChunkPart, softcap: float
) -> tuple[Tensor, Tensor]:
    """As `flash` in float32, with scores of softcap·tanh((score + shift)/softcap); some queries at a time."""
    out, total = q.new_empty(*q.shape[:3], values.shape[-1]), torch.empty_like(shift)
    step = max(1, SCORES // (q.shape[0] * q.shape[1] * keys.shape[1]))
    for begin in range(0, q.shape[2], step):
        rows = slice(begin, min(begin + step, q.shape[2]))
        score = (q[:, :, rows].flatten(1, 2) @ keys.mT).unflatten(1, (q.shape[1], -1))
        score = score.add_(shift[:, :, rows, None]).div_(softcap).tanh_().mul_(softcap)
        score.masked_fill_(part.hidden(rows.start, rows.stop), -torch.inf)
        total[:, :, rows] = score.logsumexp(-1)
        weights = score.sub_(total[:, :, rows, None]).exp_()
        out[:, :, rows] = (weights.flatten(1, 2) @ values).unflatten(1, (q.shape[1], -1))
    return out, total

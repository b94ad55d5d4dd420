"""Attention on codes with the native CPU kernels (native/kernel.cpp): the fast counterpart of reference.py.

Sequences with few new tokens go through one kernel call for the whole step. A chunk of many is arithmetic, not memory
traffic: some heads' codes at a time become a tile of numbers in the query's own type, and torch's own attention (AMX
where there is one) does the rest; the folded formula holds there too. What it returns beside its output, the logarithm
of its denominator, joins the chunk with what came before it, and with a sink.

The extension may be missing (no compiler when the package was installed): `unavailable()` says why.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.store import LayerCache, RowStore
from octavo.quant.codec import TOKEN_LIMIT, TOKEN_RECIPROCAL, TOKEN_SCALE

if TYPE_CHECKING:
    from octavo.attention import AttentionSpec

try:
    from octavo.attention import _native  # type: ignore[attr-defined]
except ImportError as error:
    _native, _missing = None, str(error)

FEW = 1  # new tokens of a sequence that the decode kernel takes: prompts are computed alike however they are cut
LARGEST = 512  # kernel.h
TILE_ELEMENTS = 1 << 22  # of the tiles of a chunk: some heads' keys and values, some queries' scores
WINDOW_ROWS = 256  # queries that share a tile of a window's keys, or as many as the window is long
FLOATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # kernel.h: Float
CODES = {"bf16": 0, "fp16": 1, "fp32": 2}  # kernel.h: Code; integer codes are 3 and 4


@cache
def unavailable() -> str | None:
    """Why the kernels cannot be used here; None if they can."""
    if _native is None:
        return f"the native extension is not built ({_missing})"
    try:
        _native.set_parallel_for(torch_parallel_for())
    except (OSError, AttributeError, StopIteration) as error:
        return f"this torch exports no thread pool ({error})"
    return None


def torch_parallel_for() -> int | None:
    """The address of torch's own parallel loop. Raises OSError, AttributeError or StopIteration where it has none."""
    library = Path(torch.__file__).parent / "lib"
    torch_cpu = ctypes.CDLL(str(next(library.glob("libtorch_cpu.*"))))
    return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value


def devices() -> tuple[str, ...]:
    return ("cpu",)


def takes(k_dim: int, v_dim: int) -> bool:
    """Whether the kernels have rows of these dimensions; they have every codec."""
    return k_dim % 8 == v_dim % 8 == 0 and max(k_dim, v_dim) <= LARGEST


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """As `octavo.attention.attend`."""
    if spec.shape.shares is None:
        write(cache.k, k, batch.slots)
        write(cache.v, v, batch.slots)
    if q.stride(-1) != 1:
        q = q.contiguous()
    step = _step(batch)
    out = torch.empty(len(q), spec.heads, cache.v.dim, dtype=q.dtype)
    if step.few is not None:
        sinks = spec.sinks.float().contiguous() if spec.sinks is not None else None
        attention = _native.Attention(spec.heads, spec.scale, spec.window or 0, spec.softcap or 0.0, _address(sinks))
        _native.decode(
            _side(cache.k), _side(cache.v), attention, step.few,
            q.data_ptr(), FLOATS[q.dtype], q.stride(0), q.stride(1), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    for rows, chunk in step.chunks:
        out[rows] = _attend_chunk(spec, cache, q[rows], chunk)
    return out


def write(store: RowStore, x: Tensor, slots: Tensor) -> None:
    """As `RowStore.write`."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    _native.write(
        _side(store), x.data_ptr(), FLOATS[x.dtype], x.stride(0), x.stride(1), slots.data_ptr(), len(x),
        torch.get_num_threads(),
    )  # fmt: skip
    store.written += x.numel()


def read(store: RowStore, heads: slice, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of some heads and blocks [n] as numbers that only the static part separates from x:
    [heads, n·block_size, dim]."""
    count = heads.stop - heads.start
    out = torch.empty(count, len(blocks) * store.layout.block_size, store.dim, dtype=dtype)
    _native.read(
        _side(store), heads.start, count, blocks.data_ptr(), len(blocks), FLOATS[dtype], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def stream(store: RowStore, blocks: Tensor) -> int:
    """Read the codes of blocks [n] and nothing else: the yardstick of benchmarks/attention_cpu.py."""
    return _native.stream(_side(store), blocks.data_ptr(), len(blocks), torch.get_num_threads())


@dataclass(frozen=True)
class Part:
    """Some queries of a chunk and some keys among which they see: query i of the part stands at key `offset + i`."""

    rows: slice
    keys: slice
    offset: int
    window: int | None

    @classmethod
    def of_chunk(cls, n: int, length: int, window: int | None) -> list[Part]:
        """Parts of the last n of `length` tokens that skip what is hidden from all: future keys and those left behind
        by the window. Without a window they are the chunk itself and all that came before it."""
        past, parts = length - n, []
        if window is None:
            parts = [cls(slice(0, n), slice(past, length), 0, None)]
            return parts if past == 0 else [*parts, cls(slice(0, n), slice(0, past), past, None)]
        step = max(window, WINDOW_ROWS)
        for begin in range(0, n, step):
            end = min(begin + step, n)
            oldest = max(0, past + begin - window + 1)
            parts.append(cls(slice(begin, end), slice(oldest, past + end), past + begin - oldest, window))
        return parts

    def hidden(self, begin: int, end: int) -> Tensor:
        """True where the part's queries begin…end must not see a key: [end − begin, keys]."""
        position = torch.arange(self.offset + begin, self.offset + end)[:, None]
        key = torch.arange(self.keys.stop - self.keys.start)
        hidden = key > position
        return hidden if self.window is None else hidden | (key <= position - self.window)


def _attend_chunk(spec: AttentionSpec, cache: LayerCache, q: Tensor, batch: Batch) -> Tensor:
    """One sequence with many new tokens: q [n, heads, k_dim] → [n, heads, v_dim].

    bf16 queries meet tiles in bf16, which holds every int8 code exactly (and others rounded); others meet float32, and
    so do those with a soft cap, which torch's attention does not know.
    """
    n, kv_len, size = batch.q_lens[0], batch.kv_lens[0], cache.k.layout.block_size
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 and spec.softcap is None else torch.float32
    first = 0 if spec.window is None else max(0, kv_len - n + 1 - spec.window) // size
    blocks = batch.block_table[0, first : -(-kv_len // size)].contiguous()
    parts = Part.of_chunk(n, kv_len - first * size, spec.window)

    query = (q.float() * spec.scale).unflatten(1, (cache.k.heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, n, ·]
    shift = query.new_zeros(query.shape[:3])  # q·mu is the same for every key: a soft cap and a sink see it
    if cache.k.static is not None:
        if spec.softcap is not None or spec.sinks is not None:
            shift = torch.einsum("hgnd,hd->hgn", query, cache.k.static.mu)
        query = query * cache.k.static.c[:, None, None]
    query = query.to(dtype)
    out = torch.zeros(*query.shape[:3], cache.v.dim)
    total = torch.full(query.shape[:3], -torch.inf)  # log Σ exp(score) of what was seen so far
    together = max(1, TILE_ELEMENTS // (len(blocks) * size * (cache.k.dim + cache.v.dim)))
    for head in range(0, cache.k.heads, together):
        heads = slice(head, min(head + together, cache.k.heads))
        keys, values = read(cache.k, heads, blocks, dtype), read(cache.v, heads, blocks, dtype)
        for part in parts:
            tile = query[heads, :, part.rows], keys[:, part.keys], values[:, part.keys], shift[heads, :, part.rows]
            some, its_total = _flash(*tile, part) if spec.softcap is None else _capped(*tile, part, spec.softcap)
            before = total[heads, :, part.rows]
            after = torch.logaddexp(before, its_total)
            kept = out[heads, :, part.rows].mul_((before - after).exp_()[..., None])
            kept.addcmul_(some, (its_total - after).exp_()[..., None])
            before.copy_(after)
    if spec.sinks is not None:
        weight = (total - spec.sinks.float().view(cache.k.heads, -1, 1)).sigmoid_()[..., None]
        out *= weight
    else:
        weight = torch.ones(())  # every query sees itself
    if cache.v.static is not None:
        mu, c = (x[:, None, None] for x in (cache.v.static.mu, cache.v.static.c))
        out = torch.addcmul(weight * mu, out, c)
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)


def _flash(q: Tensor, keys: Tensor, values: Tensor, shift: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """torch's own attention of q [heads, group, n, k_dim] over keys [heads, m, k_dim] and values [heads, m, v_dim]:
    the output [heads, group, n, v_dim], and log Σ exp(score + shift) [heads, group, n]."""
    v_dim = values.shape[-1]
    if q.shape[-1] != v_dim:  # it knows one dimension
        widest = max(q.shape[-1], v_dim)
        q, keys, values = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, keys, values))
    keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    mask = None
    if part.window is not None:
        mask = q.new_zeros(q.shape[2], keys.shape[2]).masked_fill_(part.hidden(0, q.shape[2]), -torch.inf)
    causal = part.window is None and part.offset == 0
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, causal, attn_mask=mask, scale=1.0
    )
    return out[..., :v_dim].float(), total + shift


def _capped(
    q: Tensor, keys: Tensor, values: Tensor, shift: Tensor, part: Part, softcap: float
) -> tuple[Tensor, Tensor]:
    """As `_flash` in float32, with scores of softcap·tanh((score + shift)/softcap); some queries at a time."""
    out, total = q.new_empty(*q.shape[:3], values.shape[-1]), torch.empty_like(shift)
    step = max(1, TILE_ELEMENTS // (q.shape[0] * q.shape[1] * keys.shape[1]))
    for begin in range(0, q.shape[2], step):
        rows = slice(begin, min(begin + step, q.shape[2]))
        score = (q[:, :, rows].flatten(1, 2) @ keys.mT).unflatten(1, (q.shape[1], -1))
        score = score.add_(shift[:, :, rows, None]).div_(softcap).tanh_().mul_(softcap)
        score.masked_fill_(part.hidden(rows.start, rows.stop), -torch.inf)
        total[:, :, rows] = score.logsumexp(-1)
        weights = score.sub_(total[:, :, rows, None]).exp_()
        out[:, :, rows] = (weights.flatten(1, 2) @ values).unflatten(1, (q.shape[1], -1))
    return out, total


class _Step:
    """What the kernels need to know of a step, made once and kept for all layers."""

    def __init__(self, batch: Batch):
        starts = batch.q_start
        few = [i for i, n in enumerate(batch.q_lens) if n <= FEW]
        self.few: Any = None
        if few:
            chosen = torch.tensor(few)
            self.keep = (  # alive as long as their addresses are
                starts[chosen],
                torch.tensor(batch.q_lens)[chosen],
                batch.kv_len[chosen],
                batch.block_table[chosen],
            )
            self.few = _native.Step(len(few), *(x.data_ptr() for x in self.keep), batch.block_table.shape[1])
        self.chunks = [
            (slice(int(starts[i]), int(starts[i + 1])), batch.only(i)) for i, n in enumerate(batch.q_lens) if n > FEW
        ]


def _step(batch: Batch) -> _Step:
    if "native" not in batch.plan:
        batch.plan["native"] = _Step(batch)
    return batch.plan["native"]


def _side(store: RowStore) -> Any:
    """The kernel's view of a store, made once: the tensors it points to live as long as the store."""
    if store.native is None:
        codec, static = store.codec, store.static
        tables: list[Tensor | None] = [None] * 3
        if codec.kind == "token":
            tables = [table[codec.bits] for table in (TOKEN_SCALE, TOKEN_RECIPROCAL, TOKEN_LIMIT)]
        store.native = _native.side(
            CODES[str(codec)] if codec.kind == "raw" else 3 if codec.bits == 8 else 4,
            store.heads,
            store.dim,
            store.layout.order == "k-tiles",
            codec.rotated,
            store.codes.data_ptr(),
            _address(store.scales),
            *(_address(x) for x in ((static.mu, static.c, static.reciprocal) if static else (None,) * 3)),
            *(_address(table) for table in tables),
            store.codes[0, 0].nbytes,
            store.saturated.data_ptr(),
        )
    return store.native


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()

"""Attention on codes with the native CPU kernels (native/kernel.cpp): the fast counterpart of reference.py.

Sequences with few new tokens go through one kernel call for the whole step. A chunk of many is arithmetic, not memory
traffic: some heads' codes at a time become a tile of numbers in the query's own type, and torch's own attention (AMX
where there is one) does the rest; the folded formula holds there too. What it returns beside its output, the logarithm
of its denominator, joins the chunk with what came before it, and with a sink.

The extension may be missing (no compiler when the package was installed): `unavailable()` says why.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.attention.chunk import Part, capped, flash
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
TILE_ELEMENTS = 1 << 22  # of the keys and values of a tile: 8 MB in bf16
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


def _attend_chunk(spec: AttentionSpec, cache: LayerCache, q: Tensor, batch: Batch) -> Tensor:
    """One sequence with many new tokens: q [n, heads, k_dim] → [n, heads, v_dim] in float32.

    bf16 queries meet tiles in bf16, which holds every int8 code exactly (and others rounded); others meet float32, and
    so do those with a soft cap, which torch's attention does not know.
    """
    n, kv_len, size = batch.q_lens[0], batch.kv_lens[0], cache.k.layout.block_size
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 and spec.softcap is None else torch.float32
    first = 0 if spec.window is None else max(0, kv_len - n + 1 - spec.window) // size
    blocks = batch.block_table[0, first : -(-kv_len // size)].contiguous()
    parts = Part.of_chunk(n, kv_len - first * size, spec.window)

    q = q.unflatten(1, (cache.k.heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, n, k_dim]
    folded = torch.tensor(spec.scale)
    shift = torch.zeros(q.shape[:3])  # q·mu is the same for every key: a soft cap and a sink see it
    if cache.k.static is not None:
        folded = folded * cache.k.static.c[:, None, None]
        if spec.softcap is not None or spec.sinks is not None:
            shift = torch.einsum("hgnd,hd->hgn", q.float(), cache.k.static.mu * spec.scale)
    query = (q.float() * folded).to(dtype)

    packed = torch.empty(n, *q.shape[:2], cache.v.dim)
    out = packed.permute(1, 2, 0, 3)
    total = torch.empty(q.shape[:3])  # log Σ exp(score) of what was seen
    together = max(1, TILE_ELEMENTS // (len(blocks) * size * (cache.k.dim + cache.v.dim)))
    for head in range(0, cache.k.heads, together):
        heads = slice(head, min(head + together, cache.k.heads))
        keys, values = read(cache.k, heads, blocks, dtype), read(cache.v, heads, blocks, dtype)
        for part in parts:
            tile = query[heads, :, part.rows], keys[:, part.keys], values[:, part.keys], shift[heads, :, part.rows]
            some = flash(*tile, part) if spec.softcap is None else capped(*tile, part, spec.softcap)
            part.put(*some, out[heads, :, part.rows], total[heads, :, part.rows])
    weight = torch.ones(())  # every query sees itself
    if spec.sinks is not None:
        weight = (total - spec.sinks.float().view(cache.k.heads, -1, 1)).sigmoid_()[..., None]
        out *= weight
    if cache.v.static is not None:
        out.mul_(cache.v.static.c[:, None, None]).add_(weight * cache.v.static.mu[:, None, None])
    return packed.flatten(1, 2)


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


def torch_parallel_for() -> int | None:
    """The address of torch's own parallel loop. Raises OSError, AttributeError or StopIteration where it has none."""
    library = Path(torch.__file__).parent / "lib"
    torch_cpu = ctypes.CDLL(str(next(library.glob("libtorch_cpu.*"))))
    return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()

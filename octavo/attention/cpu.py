"""Attention on codes with the native CPU kernels (native/kernel.cpp): the fast counterpart of reference.py.

Sequences with few new tokens go through one kernel call for the whole step. A chunk of many is arithmetic, not memory
traffic: one head's codes at a time become a tile of numbers in the query's own type, and torch's own attention (AMX
where there is one) does the rest; the folded formula holds there too.

The extension may be missing (no compiler when the package was installed): `unavailable()` says why.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention import reference
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
LARGEST = 512  # head_dim up to which 15-bit queries times codes fit int32
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


def takes(dim: int) -> bool:
    """Whether the kernels have rows of this dimension; they have every codec."""
    return dim % 8 == 0 and dim <= LARGEST


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
        # torch's attention knows neither soft caps nor sinks.
        plain = spec.softcap is None and spec.sinks is None
        attend_chunk = _attend_chunk if plain else reference.attend
        out[rows] = attend_chunk(spec, cache, q[rows], chunk)
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


def read(store: RowStore, head: int, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """One head's rows of blocks [n] as numbers that rotation and static part separate from x: [n·block_size, dim]."""
    out = torch.empty(len(blocks) * store.layout.block_size, store.dim, dtype=dtype)
    _native.read(
        _side(store), head, blocks.data_ptr(), len(blocks), FLOATS[dtype], out.data_ptr(), torch.get_num_threads()
    )
    return out


def stream(store: RowStore, blocks: Tensor) -> int:
    """Read the codes of blocks [n] and nothing else: the yardstick of benchmarks/attention_cpu.py."""
    return _native.stream(_side(store), blocks.data_ptr(), len(blocks), torch.get_num_threads())


def _attend_chunk(spec: AttentionSpec, cache: LayerCache, q: Tensor, batch: Batch) -> Tensor:
    """One sequence with many new tokens: q [n, heads, k_dim] → [n, heads, v_dim].

    bf16 queries meet tiles in bf16, which holds every int8 code exactly (and one times a token scale rounded); others
    meet float32.
    """
    n, kv_len = batch.q_lens[0], batch.kv_lens[0]
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    group = spec.heads // cache.k.heads
    first = 0 if spec.window is None else max(0, kv_len - n + 1 - spec.window) // cache.k.layout.block_size
    blocks = batch.block_table[0, first : -(-kv_len // cache.k.layout.block_size)].contiguous()
    start = first * cache.k.layout.block_size
    folded = cache.k.fold(q.float().unflatten(1, (cache.k.heads, group)))
    seen = None  # all of them new, and no window: plainly causal, which torch knows without a mask
    if spec.window is not None or n < kv_len:
        query, key = torch.arange(kv_len - n, kv_len)[:, None], torch.arange(start, kv_len)
        seen = key <= query
        if spec.window is not None:
            seen &= key > query - spec.window
    out = torch.empty(n, cache.k.heads, group, cache.v.dim)
    for head in range(cache.k.heads):
        keys = read(cache.k, head, blocks, dtype)[: kv_len - start]
        values = read(cache.v, head, blocks, dtype)[: kv_len - start]
        out[:, head] = _scaled_dot_product(folded[:, head].to(dtype), keys, values, seen, spec.scale)
    weight = torch.ones(1, 1, 1, 1)  # every query sees itself
    return cache.v.unfold(out, weight).flatten(1, 2).to(q.dtype)


def _scaled_dot_product(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """torch's attention of q [n, group, k_dim] over keys [m, k_dim] and values [m, v_dim]: over those `seen` [n, m], or
    causal. Returns [n, group, v_dim]."""
    q = q.transpose(0, 1)[None]  # [1, group, n, k_dim]
    keys, values = (x.expand(1, q.shape[1], -1, -1) for x in (keys, values))
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, is_causal=seen is None, scale=scale)
    return out[0].transpose(0, 1)


class _Step:
    """What the kernels need to know of a step, made once and kept for all layers."""

    def __init__(self, batch: Batch):
        starts = torch.tensor([0, *batch.q_lens]).cumsum(0)
        few = [i for i, n in enumerate(batch.q_lens) if n <= FEW]
        self.few: Any = None
        if few:
            chosen = torch.tensor(few)
            self.keep = (  # alive as long as their addresses are
                starts[chosen],
                torch.tensor(batch.q_lens)[chosen],
                torch.tensor(batch.kv_lens)[chosen],
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

"""The kernel table: decode and chunk attention of one layer, D = 128, block tables random.

A decode is the whole of `attend`: write the new rows, scan the cache, combine. Its share of the copy bandwidth counts
the codes and token scales it has to read, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from clock import Run, captured, copy_bandwidth, medians
from rows import dry_run, emit, guarded
from torch import Tensor

from octavo.attention import AttentionSpec, attend, backend_for
from octavo.cache.batch import Batch
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.store import KVCache
from octavo.quant.calibration import Calibration, Header
from octavo.quant.format import KVFormat

DIM = 128
PAGE = 16  # tokens of FlashInfer's pages
FORMATS = ("bf16", "int8", "int8-token", "int4-token", "kv8", "kv4")
CASES = [(64, 8192, 32, 8), (64, 8192, 32, 32), (8, 8192, 32, 8), (1, 32768, 32, 8), (64, 1024, 32, 8)]


class Session:
    def __init__(self, tokens: int, new: int, blocks: list[int], pages: list[int]):
        self.tokens, self.num_cached, self.tables = [0] * tokens, tokens - new, [blocks]
        self.first_page, self.ring = pages[:2]


class Contestant:
    """Attention of one format over full caches; each sequence computes its last `new` tokens."""

    def __init__(self, name: str, case: tuple[int, int, int, int], device: torch.device, new: int = 1):
        batch, tokens, heads, kv_heads = case
        shape = LayerShape(kv_heads, DIM, DIM, device, dtype=torch.bfloat16)
        values = {"min": -5.0, "max": 5.0, "mean": 0.0, "std": 1.0, "reader": 1.0}
        side = {name: torch.full((kv_heads, DIM), value) for name, value in values.items()}
        calibration = Calibration(Header("", "", 0, 0, 0, (0, 0)), [{"k": side, "v": side}])
        plans = plan_layers([shape], KVFormat.parse(name), calibration)
        layout = backend_for(plans).layout
        blocks = -(-tokens // layout.block_size)
        pages = 1 + KVFormat.parse(name).edges // layout.block_size  # raw ones of a sequence
        self.cache = KVCache(plans, batch * blocks, layout, batch * pages)
        self.spec = AttentionSpec(shape, heads, DIM**-0.5)
        for store in self.cache.stores:  # codes and scales of plausible rows
            if store.codec.kind == "raw":
                store.codes.normal_()
            else:
                store.codes.random_(0 if store.codes.dtype == torch.uint8 else -100, 100)
            if store.scales is not None:
                store.scales.fill_(120)
        table = torch.randperm(batch * blocks).view(batch, blocks).tolist()
        sessions = (Session(tokens, new, row, [i * pages, i * pages + 1]) for i, row in enumerate(table))
        self.batch = Batch.build([(session, new) for session in sessions], layout.block_size, span=self.cache.span)
        self.batch = self.batch.on(device)
        rows = batch * new
        self.q = torch.randn(rows, heads, DIM, dtype=torch.bfloat16, device=device)
        self.k, self.v = torch.randn(2, rows, kv_heads, DIM, dtype=torch.bfloat16, device=device)
        self.bytes = batch * tokens * shape.token_bytes(KVFormat.parse(name))

    def __call__(self) -> Tensor:
        return attend(self.spec, self.cache.layers[0], self.q, self.k, self.v, self.batch)


def flashinfer_decode(case: tuple[int, int, int, int], device: torch.device) -> Run:
    """FlashInfer's paged decode in bf16 on caches of the same size; raises ImportError where it is not installed."""
    import flashinfer

    batch, tokens, heads, kv_heads = case
    pages = tokens // PAGE
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=heads > kv_heads)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * pages
    table = torch.randperm(batch * pages, device=device).int()
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=device)
    wrapper.plan(starts, table, last, heads, kv_heads, DIM, PAGE, data_type=torch.bfloat16, q_data_type=torch.bfloat16)
    cache = torch.randn(batch * pages, 2, PAGE, kv_heads, DIM, dtype=torch.bfloat16, device=device)
    q = torch.randn(batch, heads, DIM, dtype=torch.bfloat16, device=device)
    return lambda: wrapper.run(q, cache)


def decode(case: tuple[int, int, int, int], device: torch.device, bandwidth: float, rounds: int) -> dict[str, Any]:
    contestants = {name: Contestant(name, case, device) for name in FORMATS}
    ms = medians({name: captured(run, device) for name, run in contestants.items()}, device, rounds)
    share = {name: contestants[name].bytes / (1e-3 * ms[name]) / bandwidth for name in FORMATS}
    return {
        "ms": ms,
        "share_of_copy_bandwidth": share,
        "int8_over_bf16": ms["bf16"] / ms["int8"],
        "int8_token_over_int8": ms["int8"] / ms["int8-token"],
        "int4_token_over_int8": ms["int8"] / ms["int4-token"],
        "kv8_over_int8_token": ms["int8-token"] / ms["kv8"],
        "kv4_over_int4_token": ms["int4-token"] / ms["kv4"],
    }


def against_flashinfer(case: tuple[int, int, int, int], device: torch.device, rounds: int) -> dict[str, Any]:
    runs: dict[str, Callable[[], Any]] = {"flashinfer": flashinfer_decode(case, device)}
    runs |= {name: Contestant(name, case, device) for name in ("bf16", "int8")}
    ms = medians({name: captured(run, device) for name, run in runs.items()}, device, rounds)
    return {"ms": ms, "int8_over_flashinfer_bf16": ms["flashinfer"] / ms["int8"]}


def chunk(new: int, before: int, device: torch.device, rounds: int) -> dict[str, Any]:
    case = (1, before + new, 32, 8)
    ms = medians(
        {name: Contestant(name, case, device, new) for name in ("bf16", "int8", "int8-token", "kv8")}, device, rounds
    )
    return {"ms": ms, "int8_over_bf16": ms["bf16"] / ms["int8"], "kv8_over_int8_token": ms["int8-token"] / ms["kv8"]}


def main() -> None:
    dry = dry_run()
    torch.manual_seed(0)
    device = torch.device("cpu" if dry else "cuda")
    cases, rounds, chunks = (CASES, 30, (2048, 8192)) if not dry else ([(2, 128, 2, 1)], 1, (17, 64))
    bandwidth = copy_bandwidth(device, 1 << 20 if dry else 1 << 30)
    emit({"measure": "copy bandwidth", "bytes_per_second": bandwidth})
    with torch.inference_mode():
        for case in cases:
            shape = dict(zip(("batch", "tokens", "heads", "kv_heads"), case, strict=True))
            guarded({"measure": "decode", **shape}, lambda case=case: decode(case, device, bandwidth, rounds))
        new, before = chunks
        what = {"measure": "chunk", "new": new, "before": before, "heads": 32, "kv_heads": 8}
        guarded(what, lambda: chunk(new, before, device, min(rounds, 10)))
        for case in cases[:2]:
            shape = dict(zip(("batch", "tokens", "heads", "kv_heads"), case, strict=True))
            guarded(
                {"measure": "flashinfer decode", **shape}, lambda case=case: against_flashinfer(case, device, rounds)
            )


if __name__ == "__main__":
    main()

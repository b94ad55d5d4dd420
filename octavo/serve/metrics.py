"""What `/metrics` and `/cache` tell: counted where it happens, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from octavo.cache.size import CacheSize
from octavo.llm import LLM
from octavo.quant.format import KVFormat
from octavo.serve.sessions import SessionDir
from octavo.serve.worker import Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self, llm: LLM, worker: Worker):
        self.llm, self.worker = llm, worker
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "octavo_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.aborted = Counter("octavo_requests_aborted", "Requests whose client left.", registry=self.registry)
        self.first_token = Histogram(
            "octavo_time_to_first_token_seconds",
            "From request to first piece.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "octavo_request_seconds", "From request to the answer's end.", buckets=SECONDS, registry=self.registry
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, as they are now. Lengths and counts alone: other threads may read them."""
        engine, counts = self.llm.engine, self.worker.counts
        pool, scheduler, edges = engine.pool, engine.scheduler, engine.pool.edges
        gauges = {
            "octavo_blocks_total": ("Blocks of the KV cache.", len(pool)),
            "octavo_blocks_used": ("Blocks that running sessions hold.", pool.used),
            "octavo_raw_pages_total": ("Raw pages, of rows at edges.", self.llm.cache.raw_pages),
            "octavo_raw_pages_used": ("Raw pages that running sessions hold.", edges.used if edges else 0),
            "octavo_sessions_running": ("Sequences in the batch.", len(scheduler.running)),
            "octavo_sessions_waiting": ("Sequences in the queue.", len(scheduler.waiting)),
            "octavo_cache_bytes": ("Bytes of the KV cache.", self.llm.cache.nbytes),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(name, help, value)
        totals = {
            "octavo_generated_tokens": ("Tokens generated.", counts.generated_tokens),
            "octavo_prompt_tokens": ("Prompt tokens of complete answers.", counts.prompt_tokens),
            "octavo_prefix_hit_tokens": ("Of those, found in the prefix cache.", counts.hit_tokens),
            "octavo_failed_steps": ("Steps of the engine that failed.", counts.failures),
        }
        for name, (help, value) in totals.items():
            yield CounterMetricFamily(name, help, value)


def cache_state(llm: LLM, worker: Worker, model: str, sessions: SessionDir | None = None) -> dict[str, Any]:
    """The cache in numbers; on the engine's thread, since it walks through the blocks."""
    cache, pool, scheduler, edges = llm.cache, llm.engine.pool, llm.engine.scheduler, llm.engine.pool.edges
    size, size_16 = cache.size, CacheSize.of(cache.shapes, KVFormat.parse("bf16"), pool.block_size)
    used, kept = [group.used for group in pool.groups], [group.kept for group in pool.groups]
    raw_used, raw_kept = (edges.used, edges.firsts.kept) if edges else (0, 0)
    return {
        "model": model,
        "format": str(llm.format),
        "block_size": pool.block_size,
        "block_bytes": size.block,
        "block_bytes_16_bits": size_16.block,
        "blocks_total": len(pool),
        "blocks_used": used[0],
        "blocks_cached": kept[0],
        "raw_page_bytes": size.raw_page,
        "raw_pages_total": cache.raw_pages,
        "raw_pages_used": raw_used,
        "raw_pages_cached": raw_kept,
        "raw_pages_per_session": size.ring + 1 if size.ring else 0,
        "bytes_allocated": cache.nbytes,
        "bytes_used": size.of_blocks(used) + raw_used * size.raw_page,
        "bytes_used_16_bits": size_16.of_blocks(used),
        "bytes_cached": size.of_blocks(kept) + raw_kept * size.raw_page,
        "bytes_cached_16_bits": size_16.of_blocks(kept),
        "sessions_running": len(scheduler.running),
        "sessions_waiting": len(scheduler.waiting),
        "sessions_saved": len(sessions.chains) if sessions else None,
        "sessions_saved_bytes": sessions.nbytes if sessions else None,
        "restored_tokens": sessions.restored_tokens if sessions else None,
        "prefix_hit_tokens": worker.counts.hit_tokens,
        "prefix_query_tokens": worker.counts.prompt_tokens,
        "tokens_per_second": round(worker.tokens_per_second, 1),
        "generated_tokens": worker.counts.generated_tokens,
    }

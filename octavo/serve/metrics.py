"""What `/metrics` and `/cache` tell: counted where it happens, read when it is asked for.

What vLLM counts too has vLLM's name and labels, so that dashboards made for it show this server. The rest is ours.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from octavo.cache.size import CacheSize
from octavo.cache.snapshots import Snapshots
from octavo.llm import LLM
from octavo.quant.format import KVFormat
from octavo.serve.accounting import Account
from octavo.serve.sessions import SessionDir
from octavo.serve.worker import Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)  # seconds from a token to the next
TOKENS = tuple(10**power * one for power in range(6) for one in (1, 2, 5))
TIMES = {  # of a request
    "vllm:time_to_first_token_seconds": ("From request to first piece.", SECONDS),
    "vllm:request_time_per_output_token_seconds": ("From first piece to end, per token.", BETWEEN),
    "vllm:e2e_request_latency_seconds": ("From request to the answer's end.", SECONDS),
    "vllm:request_queue_time_seconds": ("From request to a place in the engine.", SECONDS),
    "vllm:request_prefill_time_seconds": ("From there to the first piece.", SECONDS),
    "vllm:request_decode_time_seconds": ("From there to the answer's end.", SECONDS),
    "vllm:request_prompt_tokens": ("Tokens of a request's prompts.", TOKENS),
    "vllm:request_generation_tokens": ("Tokens of a request's answers.", TOKENS),
}


class Metrics:
    """Of one server, in a registry of its own. `waiting` tells how many answers the engine has not taken up."""

    def __init__(self, llm: LLM, worker: Worker, model: str, waiting: Callable[[], int]):
        self.llm, self.worker, self.waiting = llm, worker, waiting
        self.labels = {"model_name": model, "engine": "0"}
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "octavo_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.aborted = Counter("octavo_requests_aborted", "Requests whose client left.", registry=self.registry)
        self.ended = Counter(
            "vllm:request_success",
            "Complete answers by what ended them.",
            [*self.labels, "finished_reason"],
            registry=self.registry,
        )
        self.of_requests = {
            name: Histogram(name, help, [*self.labels], buckets=buckets, registry=self.registry).labels(**self.labels)
            for name, (help, buckets) in TIMES.items()
        }
        self.registry.register(self)

    def answered(self, account: Account) -> None:
        """A request's answers are complete."""
        end = time.monotonic()
        begun, first = account.begun or account.start, account.first or end
        generated = account.generated_tokens
        values = (
            first - account.start,
            (end - first) * len(account.generations) / max(1, generated - len(account.generations)),
            end - account.start,
            begun - account.start,
            first - begun,
            end - first,
            account.prompt_tokens,
            generated,
        )
        for histogram, value in zip(self.of_requests.values(), values, strict=True):
            histogram.observe(value)
        for generation in account.generations:
            self.ended.labels(**self.labels, finished_reason=generation.sequence.finish_reason).inc()

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, as they are now. Lengths and counts alone: other threads may read them."""
        engine, counts, cache = self.llm.engine, self.worker.counts, self.llm.cache
        pool, scheduler, edges = engine.pool, engine.scheduler, engine.pool.edges
        snapshots = pool.states.snapshots if pool.states is not None else Snapshots(0, pool.block_size)
        fullest = max(group.used / len(group) for group in pool.groups)  # the group that admission waits for
        gauges = {
            "vllm:num_requests_running": ("Choices in the batch.", len(scheduler.running)),
            "vllm:num_requests_waiting": ("Choices that wait for the engine.", self.waiting()),
            "vllm:kv_cache_usage_perc": ("Share of the blocks that running answers hold.", fullest),
            "octavo_blocks_total": ("Blocks of the KV cache.", len(pool.groups[0])),
            "octavo_blocks_used": ("Blocks that running answers hold.", pool.groups[0].used),
            "octavo_raw_pages_total": ("Raw pages, of rows at edges.", cache.raw_pages),
            "octavo_raw_pages_used": ("Raw pages that running answers hold.", edges.used if edges else 0),
            "octavo_snapshots_total": ("Snapshots of states that there is room for.", snapshots.slots),
            "octavo_snapshots_taken": ("Prefixes whose states have one.", len(snapshots.by_prefix)),
            "octavo_cache_bytes": ("Bytes of the KV cache.", cache.nbytes),
        }
        for name, (help, value) in gauges.items():
            yield self._with_labels(GaugeMetricFamily, name, help, value)
        again = pool.states.computed_again if pool.states is not None else 0
        totals = {
            "vllm:generation_tokens": ("Tokens generated.", counts.generated_tokens),
            "vllm:prompt_tokens": ("Prompt tokens of complete answers.", counts.prompt_tokens),
            "vllm:prefix_cache_queries": ("Of those, looked up in the prefix cache.", counts.prompt_tokens),
            "vllm:prefix_cache_hits": ("Of those, found in the prefix cache.", counts.hit_tokens),
            "octavo_prefix_cache_computed_again": ("Of those, cached but for their states.", again),
            "octavo_failed_steps": ("Steps of the engine that failed.", counts.failures),
        }
        for name, (help, value) in totals.items():
            yield self._with_labels(CounterMetricFamily, name, help, value)
        config = {"cache_dtype": str(self.llm.format), "block_size": str(pool.block_size)}
        info = {**self.labels, **config, "num_gpu_blocks": str(len(pool.groups[0]))}
        family = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is made.", labels=[*info])
        family.add_metric([*info.values()], 1)
        yield family

    def _with_labels(self, kind: Any, name: str, help: str, value: float) -> Metric:
        """A number; with the labels of vLLM, if the name is vLLM's."""
        labels = self.labels if name.startswith("vllm:") else {}
        family: Metric = kind(name, help, labels=[*labels])
        family.add_metric([*labels.values()], value)  # type: ignore[attr-defined]
        return family


def cache_state(
    llm: LLM, worker: Worker, model: str, waiting: int, sessions: SessionDir | None = None
) -> dict[str, Any]:
    """The cache in numbers; on the engine's thread, since it walks through the blocks."""
    cache, pool, scheduler, edges = llm.cache, llm.engine.pool, llm.engine.scheduler, llm.engine.pool.edges
    size, size_16 = cache.size, CacheSize.of(cache.shapes, KVFormat.parse("bf16"), pool.block_size)
    used, kept = [group.used for group in pool.groups], [group.kept for group in pool.groups]
    raw_used, raw_kept = (edges.used, edges.firsts.kept) if edges else (0, 0)
    snapshots = pool.states.snapshots if pool.states is not None else Snapshots(0, pool.block_size)
    states_used = size.states * (len(scheduler.running) + snapshots.held)
    states_cached = size.states * (len(snapshots.by_prefix) - snapshots.held)
    return {
        "model": model,
        "format": str(llm.format),
        "block_size": pool.block_size,
        "block_bytes": size.block,
        "block_bytes_16_bits": size_16.block,
        "blocks_total": len(pool.groups[0]),
        "blocks_used": used[0],
        "blocks_cached": kept[0],
        "raw_page_bytes": size.raw_page,
        "raw_pages_total": cache.raw_pages,
        "raw_pages_used": raw_used,
        "raw_pages_cached": raw_kept,
        "raw_pages_per_session": size.ring + 1 if size.ring else 0,
        "state_bytes_per_session": size.states,
        "snapshots_total": snapshots.slots,
        "snapshots_used": snapshots.held,
        "snapshots_cached": len(snapshots.by_prefix) - snapshots.held,
        "bytes_allocated": cache.nbytes,
        "bytes_used": size.of_blocks(used) + raw_used * size.raw_page + states_used,
        "bytes_used_16_bits": size_16.of_blocks(used) + states_used,
        "bytes_cached": size.of_blocks(kept) + raw_kept * size.raw_page + states_cached,
        "bytes_cached_16_bits": size_16.of_blocks(kept) + states_cached,
        "sessions_running": len(scheduler.running),
        "sessions_waiting": waiting,
        "sessions_saved": len(sessions.chains) if sessions else None,
        "sessions_saved_bytes": sessions.nbytes if sessions else None,
        "restored_tokens": sessions.restored_tokens if sessions else None,
        "prefix_hit_tokens": worker.counts.hit_tokens,
        "prefix_query_tokens": worker.counts.prompt_tokens,
        "tokens_per_second": round(worker.tokens_per_second, 1),
        "generated_tokens": worker.counts.generated_tokens,
    }

"""`octavo generate --ray`: many files of prompts, answered by models on many machines."""

import time
from collections import defaultdict
from typing import Any

import typer

from octavo.cli.answer_file import shaping_of
from octavo.cli.loading import ServeOptions
from octavo.cli.progress import progress, say
from octavo.cli.sampling import SamplingOptions
from octavo.errors import OctavoError
from octavo.ray.cluster import cluster, placement, require


def generate_on_ray(
    address: str,
    replicas: int | None,
    options: ServeOptions,
    sampling: SamplingOptions,
    input: str,
    output: str,
    chat: bool,
    logprobs: int | None,
) -> None:
    if options.tensor_parallel_size > 1:
        raise OctavoError("--ray gives each model one GPU: leave --tensor-parallel-size out")
    require("--ray")
    from octavo.ray.shards import Output

    params = sampling.given() | ({} if logprobs is None else {"logprobs": logprobs})
    answers = Output(input, output, shaping_of(options, chat, logprobs) | params)
    left = answers.left()
    done = sum(shard.rows for shard in answers.shards) - sum(shard.rows for shard in left)
    if done:
        say(f"{done:,} rows are answered in {output} already")
    if not left:
        return
    with cluster(address):
        from octavo.ray.generate import answer_files

        place = placement(replicas, options.device)
        start, total = time.perf_counter(), {"answered": 0, "refused": 0, "tokens": 0}
        by_replica: dict[str, dict[str, float]] = defaultdict(lambda: {"shards": 0, "tokens": 0, "seconds": 0.0})
        with progress() as bar:
            task = bar.add_task(f"answering, {place.count} models", total=sum(shard.rows for shard in left))

            def show(one: dict[str, Any]) -> None:
                for name in total:
                    total[name] += one[name]
                own = by_replica[one["replica"]]
                own["shards"] += 1
                own["tokens"] += one["tokens"]
                own["seconds"] += one["seconds"]
                rate = total["tokens"] / (time.perf_counter() - start)
                rows = total["answered"] + total["refused"]
                bar.update(task, completed=rows, description=f"answering, {place.count} models, {rate:.0f} tok/s")

            answer_files(answers, options.arguments(), params, chat, place, show)
        for name, own in sorted(by_replica.items()):
            rate = own["tokens"] / own["seconds"]
            say(f"replica {name[:8]}: {own['shards']:.0f} shards, {own['tokens']:,.0f} tokens, {rate:.1f} tok/s")
        seconds = time.perf_counter() - start
        say(f"{total['answered']:,} rows answered, {total['tokens']:,} tokens in {seconds:.1f} s")
        if total["refused"]:
            say(f"{total['refused']:,} rows could not be served: see {output}/errors-*.jsonl")
            raise typer.Exit(1)

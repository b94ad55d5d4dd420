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
from octavo.measure.answered import Answered
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
        start, total = time.perf_counter(), Answered()
        by_replica: dict[str, Answered] = defaultdict(Answered)
        with progress() as bar:
            task = bar.add_task(f"answering, {place.count} models", total=sum(shard.rows for shard in left))

            def show(one: dict[str, Any]) -> None:
                part = Answered(one["answered"], one["refused"], one["tokens"], one["seconds"])
                by_replica[one["replica"]].add(part)
                total.add(part)
                total.seconds = time.perf_counter() - start
                title = f"answering, {place.count} models, {total.rate:.0f} tok/s"
                bar.update(task, completed=total.done, description=title)

            answer_files(answers, options.arguments(), params, chat, place, show)
        for name, own in sorted(by_replica.items()):
            say(f"replica {name[:8]}: {own.done:,} rows, {own.tokens:,} tokens, {own.rate:.1f} tok/s")
        say(f"{total.rows:,} rows answered, {total.tokens:,} tokens in {total.seconds:.1f} s")
        if total.refused:
            say(f"{total.refused:,} rows could not be served: see {output}/errors-*.jsonl")
            raise typer.Exit(1)

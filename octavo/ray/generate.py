"""Batches: rows are answered by models on many machines.

`Generate` is for `Dataset.map_batches`. `answer_files` is what `octavo generate --ray` runs: files are cut into shards
(shards.py), and Ray Data gives each to a model that reads it, answers it, and writes its answers whole or not at all.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ray
import ray.data

from octavo.engine.params import SamplingParams, allowed
from octavo.errors import OctavoError
from octavo.jsonl import answer, checked, fields, parse
from octavo.llm import LLM
from octavo.ray.cluster import Placement
from octavo.ray.shards import Output, Shard, read

ASKED = ("prompt", "messages")
ADDED = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "error")


class Generate:
    """Answers rows of a dataset:

        dataset.map_batches(Generate, fn_constructor_kwargs={"model": …, "kv": "kv8"}, batch_size=256,
                            compute=ray.data.ActorPoolStrategy(size=4))

    A row has a column `prompt` (text or token ids) or `messages`, and may have columns of request parameters
    (docs/PARAMETERS.md); all columns stay. It gets `text`, `finish_reason`, `prompt_tokens`, `completion_tokens`,
    `cached_tokens`, and `error`: why a row cannot be answered, else empty. `params` are request parameters for all
    rows, `chat` puts prompts into the model's chat template, everything else is an argument of `octavo.LLM`.
    """

    def __init__(self, *, params: Mapping[str, Any] | None = None, chat: bool = False, **llm: Any):
        self.llm, self.chat = LLM(**llm), chat
        self.defaults = replace(self.llm.default_params, **(params or {}))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        known = {*ASKED, *allowed("JSON lines")} & batch.keys()
        count = len(next(iter(batch.values())))
        rows = [{name: _plain(batch[name][i]) for name in known} for i in range(count)]
        rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        found = self.answers([partial(checked, row) for row in rows])
        empty = {"text": "", "finish_reason": "", "error": ""}
        return {**batch, **{name: [one.get(name, empty.get(name, 0)) for one in found] for name in ADDED}}

    def answers(self, rows: Sequence[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
        """An answer to each row, in their order: as those of `octavo generate`, or `error`. A row gives its fields when
        it is called, or raises OctavoError."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        asked: dict[int, tuple[list[int], SamplingParams]] = {}
        for i, row in enumerate(rows):
            try:
                asked[i] = parse(row(), self.llm, self.defaults, self.chat)
            except OctavoError as error:
                found[i] = {"error": str(error)}
        if asked:
            prompts, params = zip(*asked.values(), strict=True)
            for i, one in zip(asked, self.llm.generate(list(prompts), list(params)), strict=True):
                found[i] = {"error": one.error} if one.error else answer(self.llm, one)
        return found


class AnswerShards(Generate):
    """Answers whole shards, and writes what it answers."""

    def __init__(self, output: Output, **more: Any):
        super().__init__(**more)
        self.output = output

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        done = [self.shard(Shard(**json.loads(text))) for text in batch["shard"]]
        replica = ray.get_runtime_context().get_actor_id()
        return {name: [one[name] for one in done] for name in done[0]} | {"replica": [replica] * len(done)}

    def shard(self, shard: Shard) -> dict[str, Any]:
        begun = time.perf_counter()
        rows = read(self.output.inputs, shard)
        answers = self.answers([partial(_asked, row) for _, _, row in rows])
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for (id, line, _), one in zip(rows, answers, strict=True):
            (bad if "error" in one else good).append({"id": id, "file": shard.file, "line": line, **one})
        self.output.write(shard, good, bad)
        return {
            "shard": shard.number,
            "answered": len(good),
            "refused": len(bad),
            "tokens": sum(one["completion_tokens"] for one in good),
            "seconds": time.perf_counter() - begun,
        }


def answer_files(
    output: Output,
    llm: dict[str, Any],
    params: dict[str, Any],
    chat: bool,
    placement: Placement,
    progress: Callable[[dict[str, Any]], None],
) -> None:
    """Answer the shards that are not done; `progress` is called with what each came to, as they end."""
    left = output.left()
    if not left:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `progress` tells of each step
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"shard": json.dumps(asdict(shard))} for shard in left]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        AnswerShards,
        fn_constructor_kwargs={"output": output, "params": params, "chat": chat, **llm},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(placement.count, len(left)), max_tasks_in_flight_per_actor=1),
        num_cpus=placement.cpus,
        num_gpus=placement.gpus or None,
    )
    for row in dataset.iter_rows():
        progress(row)


def _plain(value: Any) -> Any:
    """A value of numpy or pandas as one of JSON; None for what is missing."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and value != value:
        return None
    return value


def _asked(row: bytes | dict[str, Any]) -> dict[str, Any]:
    """The fields of a line of JSON, or of a row of columns."""
    return checked(row) if isinstance(row, dict) else fields(row)

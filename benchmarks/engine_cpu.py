"""A whole engine step (schedule, batch, forward, sample, commit) by format, beside transformers' forward alone.

One process, one model's weights, one engine for each format, and transformers' plain model with a DynamicCache, whose
prefill takes minutes where the processor has no bf16 unit (--no-transformers). Each prefills the same prompts; then all
decode in turn, one step each, in an order that is turned round every time, so that a disturbance meets them all. A
ratio is the median over steps. The last line is one JSON document.

    python benchmarks/engine_cpu.py MODEL --calibration DIR --batch 8 --out benchmarks/results/engine-cpu-zen3.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from over_models import keep, kept
from transformers import DynamicCache, PreTrainedModel

from octavo import LLM, SamplingParams
from octavo.models.load import load_model
from octavo.models.model import Model

FORMATS = ("bf16", "int8", "int8-token", "kv8", "int4-token", "kv4")
PAIRS = (("kv8", "int8-token"), ("kv4", "int4-token"), ("int8", "bf16"), ("kv8", "bf16"), ("kv4", "bf16"))
FORWARD = "transformers' forward"
WARM = 3  # steps that are not counted: tapes are recorded then, caches grow


def engine(llm: LLM, prompts: list[list[int]], steps: int) -> Callable[[], Any]:
    """The prompts are computed; what is returned decodes one token of each."""
    params = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
    sequences = [llm.sequence(prompt, params) for prompt in prompts]
    for sequence in sequences:
        llm.engine.add(sequence)
    while any(not sequence.sampled for sequence in sequences):
        llm.engine.step()
    return llm.engine.step


def forward(hf: PreTrainedModel, prompts: list[list[int]]) -> Callable[[], Any]:
    """The same, by transformers' forward and the greedy token."""
    cache = DynamicCache(config=hf.config)
    token = torch.tensor(prompts)

    @torch.inference_mode()
    def step() -> None:
        nonlocal token
        token = hf(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    step()
    return step


def measure(
    path: str | None, calibration: Path | None, batch: int, context: int, steps: int, transformers: bool
) -> dict[str, Any]:
    model = Model.load(path) if path else Model.load()
    torch.manual_seed(0)
    prompts = torch.randint(4, model.bound.vocab_size, (batch, context)).tolist()
    settings: dict[str, Any] = {"max_batch_size": batch, "session_len": context + steps + 64, "prefix_caching": False}
    start: dict[str, Callable[[], Callable[[], Any]]] = {}
    if transformers:
        hf = load_model(model.path)
        start[FORWARD] = lambda: forward(hf, prompts)
    for kv in FORMATS:
        llm = LLM(model, kv, calibration=None if kv == "bf16" else calibration, **settings)
        start[kv] = lambda llm=llm: engine(llm, prompts, steps)  # type: ignore[misc]

    ready, prefill = {}, {}
    for name, begin in start.items():
        began = time.perf_counter()
        ready[name] = begin()
        prefill[name] = batch * context / (time.perf_counter() - began)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(steps):
        for name in list(ready)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            ready[name]()
            seconds[name].append(time.perf_counter() - began)
    counted = {name: values[WARM:] for name, values in seconds.items()}

    def speed(first: str, second: str) -> list[float]:
        """How many times as fast the first is: quartiles over the steps."""
        ratios = [b / a for a, b in zip(counted[first], counted[second], strict=True)]
        return [round(quartile, 3) for quartile in statistics.quantiles(ratios, n=4)]

    return {
        "model": model.path.name,
        "batch": batch,
        "context": context,
        "steps": steps - WARM,
        "prefill_tokens_per_second": {name: round(value, 1) for name, value in prefill.items()},
        "step_ms": {name: round(1e3 * statistics.median(values), 3) for name, values in counted.items()},
        "over_forward": {kv: speed(kv, FORWARD) for kv in FORMATS} if transformers else {},
        "pairs": [{"kv": a, "over": b, "quartiles": speed(a, b)} for a, b in PAIRS],
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("model", nargs="?", help="a directory; the bundled model if none")
    cli.add_argument("--calibration", type=Path, help="where the model's calibration is, for the formats that take one")
    cli.add_argument("--batch", type=int, default=8)
    cli.add_argument("--context", type=int, default=1024)
    cli.add_argument("--steps", type=int, default=40)
    cli.add_argument("--no-transformers", action="store_true")
    cli.add_argument("--out", type=Path, help="rows of other models, batches and contexts in it stay")
    args = cli.parse_args()
    row = measure(args.model, args.calibration, args.batch, args.context, args.steps, not args.no_transformers)
    same = ("model", "batch", "context")
    rows = [old for old in kept(args.out) if any(old[key] != row[key] for key in same)]
    document = {"benchmark": "engine_cpu", **describe(), "rows": [*rows, row]}
    if args.out:
        keep(args.out, document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()

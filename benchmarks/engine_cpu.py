"""What the engine takes and gives: a decode step against transformers' bare forward, and int8 prefill against bf16.

Decode: the engine's step and the bare forward of the plain transformers model with a DynamicCache, on the bundled model
in its own dtype, in the same process, in turn: prefill to the same context, then decode. The ratio is of medians over
the steps of a round; what is reported is the median ratio over rounds, with its range. Then where a step's time goes.
Prefill: prompts of 4096 tokens through the engine, in turn, on the random Llama of the peers' comparison, for the
bundled model's context is shorter. The last line is one JSON document.

    python benchmarks/engine_cpu.py --out benchmarks/results/engine-cpu-zen3.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe, tell
from random_llama import calibrated, random_llama, served
from step_profile import profile
from transformers import DynamicCache, PreTrainedModel

from octavo import LLM, SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.load import load_model
from octavo.models.model import BUNDLED, Model

PROMPT = 4096  # tokens of the prefill


def bare_step(hf: PreTrainedModel, batch: int, context: int, steps: int) -> float:
    """Median seconds of transformers' own decode step, sampling not included."""
    with torch.inference_mode():
        cache = DynamicCache(config=hf.config)
        ids = torch.randint(4, 4096, (batch, context))
        token = hf(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            token = hf(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def engine_step(llm: LLM, batch: int, context: int, steps: int) -> float:
    """Median seconds of a whole engine step: schedule, batch, forward, sample, commit."""
    sequences = decoding(llm, batch, context, steps)
    times = []
    for _ in range(steps - 1):
        start = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - start)
    for sequence in sequences:
        llm.engine.finish(sequence)
    return statistics.median(times)


def decoding(llm: LLM, batch: int, context: int, steps: int) -> list[Sequence]:
    """Sequences with random prompts of `context` tokens, each with its first token."""
    params = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
    sequences = [llm.sequence(torch.randint(4, 4096, (context,)).tolist(), params) for _ in range(batch)]
    for sequence in sequences:
        llm.engine.add(sequence)
    while any(not sequence.sampled for sequence in sequences):
        llm.engine.step()
    return sequences


def step_shares(model: Model, llm: LLM, batch: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds of a decode step, by where they go."""
    sequences = decoding(llm, batch, context, steps)
    shares = profile(model.bound, llm.engine.step, steps - 1)
    for sequence in sequences:
        llm.engine.finish(sequence)
    return {name: round(1e3 * seconds, 3) for name, seconds in shares.items()}


def prefill_ratio(rounds: int) -> dict[str, Any]:
    """Speed of a prefill into int8, as a share of one into bf16."""
    model = served(random_llama())
    calibration = calibrated(model)
    settings: dict[str, Any] = {"session_len": PROMPT + 64, "max_batch_size": 1, "prefix_caching": False}
    llms = {
        "bf16": LLM(model, "bf16", **settings),
        "int8": LLM(model, "int8", calibration=calibration, **settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in llms}
    for _ in range(rounds):
        prompt = torch.randint(model.bound.vocab_size, (PROMPT,)).tolist()
        for name, llm in llms.items():
            start = time.perf_counter()
            llm.engine.add(llm.sequence(prompt, SamplingParams(max_tokens=1)))
            while llm.engine.busy:
                llm.engine.step()
            seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["int8"], seconds["bf16"], strict=True)]
    return {
        "tokens": PROMPT,
        "tokens_per_second": {name: round(PROMPT / statistics.median(values), 1) for name, values in seconds.items()},
        "int8_over_bf16": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--context", type=int, default=512)
    cli.add_argument("--steps", type=int, default=24)
    cli.add_argument("--rounds", type=int, default=7)
    cli.add_argument("--kv", nargs="+", default=["bf16", "int8-token", "int4-token"])
    cli.add_argument("--calibration", type=Path, help="measures int8 too")
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()

    torch.manual_seed(0)
    model, hf = Model.load(), load_model(BUNDLED)
    names = [*args.kv, *(["int8"] if args.calibration else [])]
    rows, shares = [], []
    for batch in (1, 16):
        llms = {name: LLM(model, kv=name, calibration=args.calibration, max_batch_size=batch) for name in names}
        ratios: dict[str, list[float]] = {name: [] for name in names}
        bare = []
        for _ in range(args.rounds):
            bare.append(bare_step(hf, batch, args.context, args.steps))
            for name, llm in llms.items():
                ratios[name].append(engine_step(llm, batch, args.context, args.steps) / bare[-1])
        for name, values in ratios.items():
            row = {
                "kv": name,
                "batch": batch,
                "context": args.context,
                "bare_ms": round(1e3 * statistics.median(bare), 3),
                "ratio": round(statistics.median(values), 3),
                "range": [round(min(values), 3), round(max(values), 3)],
            }
            rows.append(row)
            print(
                f"batch {batch:2d}  {name:12s} {row['ratio']:.2f}× the bare step of {row['bare_ms']} ms  {row['range']}"
            )
        for name, llm in llms.items():
            shares.append({"kv": name, "batch": batch, "ms": step_shares(model, llm, batch, args.context, args.steps)})
            print(f"batch {batch:2d}  {name:12s} " + "  ".join(f"{k} {v} ms" for k, v in shares[-1]["ms"].items()))
    prefill = prefill_ratio(args.rounds)
    print(f"prefill of {PROMPT}: int8 {prefill['int8_over_bf16']}× the speed of bf16  {prefill['range']}")
    document = {
        "benchmark": "engine_cpu",
        **describe(),
        "rounds": args.rounds,
        "rows": rows,
        "step": shares,
        "prefill": prefill,
    }
    tell(document, args.out)


if __name__ == "__main__":
    main()

"""What the engine adds to a decode step: its own step against the bare forward of transformers with a DynamicCache.

Both run on the bundled model in its own dtype, in the same process, in turn: prefill to the same context, then decode.
The ratio is of medians over the steps of a round; what is reported is the median ratio over rounds, with its range.
The last line is one JSON document.

    python benchmarks/engine_cpu.py --out benchmarks/results/engine-cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from machine import describe
from transformers import DynamicCache

from octavo import LLM, SamplingParams
from octavo.models.bind import unbound
from octavo.models.model import Model


def bare_step(model: Model, batch: int, context: int, steps: int) -> float:
    """Median seconds of transformers' own decode step, sampling not included."""
    with unbound(model.bound) as hf, torch.inference_mode():
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
    engine = llm.engine
    params = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
    sequences = [llm.sequence(torch.randint(4, 4096, (context,)).tolist(), params) for _ in range(batch)]
    for sequence in sequences:
        engine.add(sequence)
    while any(not sequence.sampled for sequence in sequences):
        engine.step()
    times = []
    for _ in range(steps - 1):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    for sequence in sequences:
        engine.finish(sequence)
    return statistics.median(times)


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
    model = Model.load()
    names = [*args.kv, *(["int8"] if args.calibration else [])]
    rows = []
    for batch in (1, 16):
        llms = {name: LLM(model, kv=name, calibration=args.calibration, max_batch_size=batch) for name in names}
        ratios: dict[str, list[float]] = {name: [] for name in names}
        bare = []
        for _ in range(args.rounds):
            bare.append(bare_step(model, batch, args.context, args.steps))
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
    document = {"benchmark": "engine_cpu", **describe(), "rounds": args.rounds, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()

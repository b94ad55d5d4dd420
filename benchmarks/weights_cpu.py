"""4-bit weights on a CPU: one layer by the number of rows, and a whole model's decode and prefill.

Layer: the packed product, tiles decoded for torch's, and torch's own int4 operator, each against torch's bf16 product
of the same weights, in turn; ratios are of times within a round, and their median is reported. The weights of a round
are several layers', so that one row reads them from memory. Model: a random Llama of a billion parameters, bf16 against
the same architecture with 4-bit linear layers, both in one process, their steps in turn through the engine.
The last line is one JSON document.

    python benchmarks/weights_cpu.py --out benchmarks/results/weights-cpu-zen4.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe, tell

from octavo import LLM, SamplingParams
from octavo.models.load import load_model
from octavo.models.model import Model
from octavo.models.packed import weight_bytes
from octavo.weights import cpu
from octavo.weights.layouts import Int4Weight
from octavo.weights.linear import PackedLinear

GROUP = 128
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))  # out, in: a billion parameters' layers
CACHES = 64 << 20  # bytes of bf16 weights in a round of few rows
FEW = 64
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "vocab_size": 32000, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}


def random_weight(out: int, columns: int) -> Int4Weight:
    groups = out, columns // GROUP
    codes = torch.randint(16, (out, columns), dtype=torch.uint8)
    zeros = torch.randint(16, groups, dtype=torch.uint8)
    return Int4Weight(codes, zeros, (torch.rand(groups) * 0.02 + 0.01).half())


def products(weights: list[Int4Weight], x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Each way of multiplying x by all of the weights, bf16 first."""
    dense = [w.dequantize().bfloat16() for w in weights]
    layers = [PackedLinear(w.codes.shape[1], w.codes.shape[0], bias=False) for w in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.fill(weight)
    ways: dict[str, Callable[[], Any]] = {
        "bf16": lambda: [x @ w.T for w in dense],
        "packed": lambda: [layer._packed(x) for layer in layers],
        "tiles": lambda: [layer._sliced(x) for layer in layers],
    }
    if len(x) <= FEW:
        own = []
        for w in weights:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(w.codes.int(), 1)
            scale, zero = w.scales.T.float(), (w.scales.float() * (8 - w.zeros.float())).T
            own.append((packed, torch.stack((scale, zero), -1).bfloat16().contiguous()))
        ways["torch int4"] = lambda: [torch.ops.aten._weight_int4pack_mm_for_cpu(x, q, GROUP, s) for q, s in own]
    return ways


def layer_row(shape: tuple[int, int], rows: int, rounds: int) -> dict[str, Any]:
    out, columns = shape
    count = max(1, CACHES // (2 * out * columns)) if rows <= FEW else 1
    weights = [random_weight(out, columns) for _ in range(count)]
    ways = products(weights, torch.randn(rows, columns).bfloat16())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            way()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    ratios = {
        name: median(b / t for b, t in zip(times["bf16"], own, strict=True))
        for name, own in times.items()
        if name != "bf16"
    }
    found = {"out": out, "in": columns, "rows": rows, "ms": {n: 1e3 * median(t) / count for n, t in times.items()}}
    line = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"{out} × {columns}, {rows} rows: bf16 {found['ms']['bf16']:.2f} ms; times faster: {line}", flush=True)
    return found | {"ratio": ratios}


def load(quantized: bool) -> Model:
    """The Llama with random weights, as it is served."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        config = LLAMA | ({"quantization_config": AWQ} if quantized else {})
        (path / "config.json").write_text(json.dumps(config))
        return Model.of(load_model(path, load_format="dummy"), path / "llama-1b")


class Session:
    """A model that decodes a batch of sessions, a step at a time."""

    def __init__(self, model: Model, batch: int, context: int, steps: int):
        # Prompts that leave the last chunks of prefill room for steps of what has begun.
        self.llm = LLM(model, max_batch_size=batch, session_len=context + 64 + 2 * steps, prefix_caching=False)
        params = SamplingParams(max_tokens=self.llm.session_len, ignore_eos=True)
        prompts = torch.randint(3, 32000, (batch, context)).tolist()
        self.sequences = [self.llm.sequence(prompt, params) for prompt in prompts]
        self.start = time.perf_counter()
        for sequence in self.sequences:
            self.llm.engine.add(sequence)
        while any(not sequence.sampled for sequence in self.sequences):
            self.llm.engine.step()
        self.prefill = time.perf_counter() - self.start

    def step(self) -> float:
        start = time.perf_counter()
        self.llm.engine.step()
        return time.perf_counter() - start

    def close(self) -> None:
        for sequence in self.sequences:
            self.llm.engine.finish(sequence)


def decode_row(models: dict[str, Model], batch: int, context: int, steps: int) -> dict[str, Any]:
    sessions = {name: Session(model, batch, context, steps) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(steps):
        for name, session in sessions.items():
            times[name].append(session.step())
    for session in sessions.values():
        session.close()
    ratio = median(b / q for b, q in zip(times["bf16"], times["int4"], strict=True))
    print(f"decode, batch {batch}, context {context}: {ratio:.2f} times faster than bf16 weights", flush=True)
    return {
        "batch": batch,
        "context": context,
        "steps": steps,
        "ms": {name: 1e3 * median(own) for name, own in times.items()},
        "ratio": ratio,
    }


def prefill_row(models: dict[str, Model], tokens: int, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            session = Session(model, 1, tokens, 1)
            times[name].append(session.prefill)
            session.close()
    ratio = median(b / q for b, q in zip(times["bf16"], times["int4"], strict=True))
    print(f"prefill, {tokens} tokens: {ratio:.2f} of the speed of bf16 weights", flush=True)
    return {"tokens": tokens, "s": {name: median(own) for name, own in times.items()}, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--no-model", action="store_true", help="the layers alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if why := cpu.unavailable():
        raise SystemExit(why)
    torch.manual_seed(0)
    document: dict[str, Any] = {"machine": describe(), "isa": cpu._native.isa(), "group": GROUP}
    with torch.inference_mode():
        document["layer"] = [layer_row(shape, rows, args.rounds) for rows in args.rows for shape in SHAPES]
    if not args.no_model:
        models = {"bf16": load(False), "int4": load(True)}
        linear = {name: weight_bytes(m.bound.hf) - 2 * 2 * 32000 * 2048 for name, m in models.items()}
        document["linear_bytes"] = linear | {"ratio": linear["int4"] / linear["bf16"]}
        document["decode"] = [decode_row(models, batch, 256, args.steps) for batch in (1, 2, 4, 8, 16)]
        document["prefill"] = [prefill_row(models, 2048, 3)]
    tell(document, args.out)


if __name__ == "__main__":
    main()

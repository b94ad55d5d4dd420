"""What 4-bit weights cost in accuracy: rounded to nearest, clipped only, and AWQ's scales with clipping.

Two models: `pamphlet`, and the same with outlier channels as large models have them: four channels of every norm are 30
times as large and the columns behind them as much smaller, which changes nothing that the model computes. Weights are
quantized with text of PTB and measured on PTB test, C4 and the bundled evaluation text, in float32, against the 16-bit
weights. The last line is one JSON document.

    python benchmarks/awq.py --data ../shared/data/text --out benchmarks/results/awq-cpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe, tell

from octavo import quantize as making
from octavo.cli.progress import progress
from octavo.corpus import load_texts
from octavo.models.bind import unbound
from octavo.models.model import BUNDLED, Model
from octavo.text_windows import consecutive_windows, token_windows

OUTLIERS, TIMES = 4, 30.0


def with_outliers(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in model.bound.hf.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, behind in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            channels = torch.randperm(len(norm.weight), generator=generator)[:OUTLIERS]
            norm.weight.data[channels] *= TIMES
            for linear in behind:
                linear.weight.data[:, channels] /= TIMES


def logprobs(model: Model, windows: list[list[int]]) -> torch.Tensor:
    """[windows, tokens, vocabulary]"""
    with unbound(model.bound) as hf, torch.inference_mode():
        return torch.cat([hf(torch.tensor([window]), use_cache=False).logits.log_softmax(-1) for window in windows])


def score(own: torch.Tensor, base: torch.Tensor, windows: list[list[int]]) -> dict[str, float]:
    targets = torch.tensor(windows)[:, 1:, None]
    kl = (base.exp() * (base - own)).sum(-1).mean(1)  # of each window
    return {
        "perplexity": own[:, :-1].gather(-1, targets).mean().neg().exp().item(),
        "kl": kl.mean().item(),
        "kl_standard_error": (kl.std() / len(kl) ** 0.5).item(),
    }


def clipped_only(*args: Any, **more: Any) -> Any:
    """AWQ without scales: every fold is taken for one that nothing absorbs."""
    found = making.find_folds
    making.find_folds = lambda *a: [making.Fold(fold.layers) for fold in found(*a)]
    try:
        return making.quantize(*args, method="awq", **more)
    finally:
        making.find_folds = found


WAYS: dict[str, Callable[..., Any]] = {
    "rtn": lambda *args, **more: making.quantize(*args, method="rtn", **more),
    "clipped only": clipped_only,
    "awq": lambda *args, **more: making.quantize(*args, method="awq", **more),
}


def measure(name: str, change: Callable[[Model], None] | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    def load() -> Model:
        model = Model.load(device="cpu", dtype="float32")
        if change is not None:
            change(model)
        return model

    model = load()
    sources = {"ptb": load_texts("ptb", args.data, "test"), "c4": load_texts("c4", args.data, "test")}
    sources["evaluation.txt"] = load_texts(str(BUNDLED / "evaluation.txt"))
    texts = {
        text: consecutive_windows(source, model.tokenizer, args.window, args.windows)
        for text, source in sources.items()
    }
    drawn = token_windows(load_texts("ptb", args.data), model.tokenizer, args.samples, args.window)
    base = {text: logprobs(model, windows) for text, windows in texts.items()}
    rows = [
        {"model": name, "weights": "16 bits", "text": text, **score(base[text], base[text], texts[text])}
        for text in texts
    ]
    for group_size in args.group_sizes:
        for way, quantize in WAYS.items():
            model = load()
            with progress() as bar:
                tasks: dict[str, Any] = {}

                def show(what: str, done: int, total: int, bar: Any = bar, tasks: dict[str, Any] = tasks) -> None:
                    tasks[what] = tasks[what] if what in tasks else bar.add_task(what, total=total)
                    bar.update(tasks[what], completed=done)

                made = quantize(model.bound, drawn, group_size=group_size, progress=show)
            for text, windows in texts.items():
                row = {"model": name, "weights": way, "group_size": group_size, "bits": made.bits_per_weight}
                rows.append({**row, "text": text, **score(logprobs(model, windows), base[text], windows)})
                print({key: round(x, 4) if isinstance(x, float) else x for key, x in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--data", type=Path, required=True, help="directory with ptb.{train,test}.txt, c4_sample.jsonl")
    cli.add_argument("--samples", type=int, default=32)
    cli.add_argument("--windows", type=int, default=16)
    cli.add_argument("--window", type=int, default=512)
    cli.add_argument("--group-sizes", type=int, nargs="+", default=[128])
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()
    rows = measure("pamphlet", None, args) + measure("pamphlet, outlier channels", with_outliers, args)
    document = {
        "what": "awq",
        "samples": args.samples,
        "windows": args.windows,
        "window": args.window,
        "machine": describe(),
        "rows": rows,
    }
    tell(document, args.out)


if __name__ == "__main__":
    main()

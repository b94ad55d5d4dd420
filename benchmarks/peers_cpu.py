"""The whole engine against its peers on a CPU: llama.cpp, and transformers' `generate` with its own caches.

A Llama of 4 layers with random bf16 weights, prompts of 4096 random tokens, greedy answers, the same threads for all;
transformers computes in float32 where the processor has no bf16 unit, which is then faster.
One prompt alone: in each round every contestant computes a new one, then every one decodes 16 tokens. A batch of eight:
every contestant computes all eight once, or with --copied one of them and copies its K and V for the others; then in
each round every one decodes 16 tokens of each. Reported are medians over rounds, and the median of the ratio within a
round. The last line is one JSON document.

No number is reported of a contestant that computes another model: first each answers a short prompt greedily, and the
log-probabilities of its most likely tokens are held against a float32 forward over the very tokens it chose.

    pip install 'octavo[peers]'
    python -m venv ~/llama-cpp
    CMAKE_ARGS=-DGGML_NATIVE=ON CMAKE_BUILD_PARALLEL_LEVEL=2 \\
        ~/llama-cpp/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    python benchmarks/peers_cpu.py --llama-cpp ~/llama-cpp/bin/python --out benchmarks/results/peers-cpu-zen3.json

llama.cpp has an interpreter of its own because it has an OpenMP runtime of its own: in one process, each would wait for
cores on which the other's threads spin.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, LlamaCpp, Octavo, Transformers
from llama_gguf import write_gguf
from machine import describe, tell
from random_llama import CONFIG, calibrated, random_llama, served
from transformers import LlamaForCausalLM

from octavo import processor

DECODED = 16  # tokens of each sequence in a round
CHECKED = 5  # greedy tokens after a short prompt
TOLERANCE = 0.05  # nats, mean over the most likely tokens; another model's differ by one and more


class Field:
    """Who competes."""

    def __init__(
        self,
        hf: LlamaForCausalLM | None,
        gguf: Path,
        llama_cpp: Path | None,
        length: int,
        kv: list[str],
        llama_kv: list[str],
    ):
        self.hf, self.gguf, self.llama_cpp, self.length, self.kv = hf, gguf, llama_cpp, length, kv
        self.llama_kv = llama_kv
        self.model = served(random_llama())
        self.calibration = calibrated(self.model)

    def contestants(self, batch: int, close: ExitStack) -> dict[str, Contestant]:
        built: dict[str, Contestant] = {}
        for kv in self.kv:
            built[f"octavo {kv}"] = Octavo(self.model, self.calibration, kv, batch, self.length)
        if self.llama_cpp is not None:
            for kv in self.llama_kv:
                worker = LlamaCpp(self.llama_cpp, self.gguf, kv, batch, self.length, torch.get_num_threads())
                built[f"llama.cpp {kv}"] = close.enter_context(worker)
        if self.hf is not None:
            built["transformers DynamicCache"] = Transformers(self.hf, quantized=False)
            built["transformers QuantizedCache int8"] = Transformers(self.hf, quantized=True)
        return built


def errors(contestants: dict[str, Contestant], exact: LlamaForCausalLM) -> dict[str, float]:
    """Mean difference in nats from the float32 model `exact`, of every contestant; ends the program if one is too far
    off."""
    prompt = torch.randint(exact.config.vocab_size, (61,), generator=torch.Generator().manual_seed(1)).tolist()
    answers = {name: contestant.answer(prompt, CHECKED) for name, contestant in contestants.items()}
    found = {}
    for name, top in answers.items():
        tokens = [next(iter(each)) for each in top]
        with torch.inference_mode():
            ids = torch.tensor([prompt + tokens[:-1]])
            logprobs = exact(input_ids=ids, logits_to_keep=CHECKED).logits[0].log_softmax(-1)
        found[name] = statistics.mean(
            abs(logprob - logprobs[i, token].item()) for i, each in enumerate(top) for token, logprob in each.items()
        )
        print(f"{name:34s} {found[name]:.4f} nats from float32, answers {tokens}", flush=True)
    strangers = [name for name, error in found.items() if not error <= TOLERANCE]
    if strangers:
        raise SystemExit(f"{', '.join(strangers)}: not the same model, so nothing is reported")
    return found


def measure(
    contestants: dict[str, Contestant], batch: int, tokens: int, rounds: int, copied: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of every contestant, a round each, for `batch` prompts of `tokens` tokens. Copied ones tell
    nothing of the prefill."""
    kinds = ["decode"] if copied else ["prefill", "decode"]
    rates: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in contestants}
    generator = torch.Generator().manual_seed(2)
    for i in range(rounds):
        if i == 0 or batch == 1:
            prompts = torch.randint(CONFIG.vocab_size, (batch, tokens), generator=generator).tolist()
        for name, contestant in contestants.items():
            if i == 0 or batch == 1:
                if copied:
                    contestant.fill(prompts)
                else:
                    rates[name]["prefill"].append(batch * tokens / contestant.prefill(prompts))
                contestant.decode(2)  # warm
        for name, contestant in contestants.items():
            rates[name]["decode"].append(batch * DECODED / contestant.decode(DECODED))
            print(f"batch {batch} round {i + 1}  {name:34s} " + "  ".join(
                f"{what} {values[-1]:.1f} tok/s" for what, values in rates[name].items()), flush=True)  # fmt: skip
    return rates


def ratios(rates: dict[str, dict[str, list[float]]], ours: str) -> dict[str, dict[str, float]]:
    """How many times as fast as each other contestant `ours` is."""
    return {
        name: {
            what: round(statistics.median(a / b for a, b in zip(rates[ours][what], values, strict=True)), 2)
            for what, values in theirs.items()
        }
        for name, theirs in rates.items()
        if name != ours
    }


def row(
    contestants: dict[str, Contestant],
    found: dict[str, float],
    batch: int,
    tokens: int,
    rounds: int,
    copied: bool = False,
) -> dict[str, Any]:
    """What is reported of a batch, after `errors` has `found` who computes the model."""
    rates = measure(contestants, batch, tokens, rounds, copied)
    return {
        "batch": batch,
        "commit": describe()["commit"],
        "rounds": rounds,
        "copied": copied,
        "nats_from_float32": {name: round(error, 4) for name, error in found.items()},
        "tokens_per_second": {
            name: {what: round(statistics.median(values), 1) for what, values in each.items()}
            for name, each in rates.items()
        },
        "times_as_fast": {name: ratios(rates, name) for name in rates if name.startswith("octavo")},
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--llama-cpp", type=Path, help="the Python that has llama-cpp-python; without, it stays out")
    cli.add_argument("--no-transformers", action="store_true", help="leave it out: it takes most of the time")
    cli.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt")
    cli.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--copied", action="store_true", help="of a batch's prompts compute one")
    cli.add_argument("--llama-kv", nargs="+", default=["f16", "q8_0"])
    cli.add_argument("--kv", nargs="+", default=["int8", "int8-token", "kv8", "bf16"])
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()
    torch.manual_seed(0)

    rows, peers = [], {}
    with tempfile.TemporaryDirectory() as directory:
        gguf = Path(directory) / "random.gguf"
        hf = random_llama()
        write_gguf(hf, gguf)
        length = args.prompt + (args.rounds + 1) * DECODED + 64
        if not processor.has_bf16():
            hf = hf.float()
        field = Field(None if args.no_transformers else hf, gguf, args.llama_cpp, length, args.kv, args.llama_kv)
        for batch in args.batch:
            with ExitStack() as close:
                contestants = field.contestants(batch, close)
                found = errors(contestants, random_llama().float())
                peers |= {name: contestant.about for name, contestant in contestants.items() if contestant.about}
                copied = args.copied and batch > 1
                rows.append(row(contestants, found, batch, args.prompt, args.rounds, copied))
    if args.out and args.out.is_file():  # a batch that was not measured now stays as it was
        old = json.loads(args.out.read_text())
        if old["prompt"] == args.prompt:
            rows = sorted([*(each for each in old["rows"] if each["batch"] not in args.batch), *rows],
                          key=lambda each: each["batch"])  # fmt: skip
            peers = old["peers"] | peers
    document = {"benchmark": "peers_cpu", **describe(), "peers": peers, "prompt": args.prompt, "decoded": DECODED,
                "rounds": args.rounds, "rows": rows}  # fmt: skip
    tell(document, args.out)


if __name__ == "__main__":
    main()

"""Models whose layers are partly recurrent, against transformers' own `generate` with its own cache, both in float32.

Random models of four kinds: tiny, and of the shape of half a billion parameters. In each round both programs answer the
same prompts in turn, greedily: one of 128 tokens (prefill, and decode of a batch of 1), and eight of different lengths
with answers of one length. transformers takes those as one batch, padded on the left to the longest, with a mask, which
all four kinds support: faster than one after another. Prefill is the time to the first tokens, decode that of the
others. Ratios are of times within a round, and their median is given. What a preempted sequence saves is seen beside:
the time to copy its states from a snapshot, and to compute the 64 tokens that this saves at least. That both compute
the same model is checked by their tokens. With one thread (OMP_NUM_THREADS=1) it is the processor's time that counts,
beside other programs too. The last line is one JSON document.

    python benchmarks/hybrids.py --out benchmarks/results/hybrids-cpu-zen3.json
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from machine import describe
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from octavo import LLM, SamplingParams
from octavo.models.model import Model

LAYERS = ["linear_attention"] * 3 + ["full_attention"]
QWEN = {"layer_types": LAYERS * 6, "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 3584,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128}  # fmt: skip
GRANITE = {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4, "num_hidden_layers": 32,
           "hidden_size": 1024, "shared_intermediate_size": 2560, "num_local_experts": 0, "num_experts_per_tok": 0,
           "num_attention_heads": 16, "num_key_value_heads": 4, "mamba_n_heads": 64, "mamba_d_head": 32,
           "mamba_d_state": 128, "mamba_n_groups": 1, "attention_multiplier": 0.125}  # fmt: skip
LFM = {"layer_types": ["conv", "conv", "full_attention"] * 5 + ["conv"], "num_hidden_layers": 16, "hidden_size": 1536,
       "intermediate_size": 4608, "block_auto_adjust_ff_dim": False, "num_attention_heads": 24,
       "num_key_value_heads": 8, "conv_L_cache": 3}  # fmt: skip
FALCON = {"num_hidden_layers": 36, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8,
          "num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64,
          "mamba_d_state": 128, "mamba_n_groups": 1}  # fmt: skip
LARGE = {"qwen3_5_text": QWEN, "granitemoehybrid": GRANITE, "lfm2": LFM, "falcon_h1": FALCON}
TINY = {
    "qwen3_5_text": QWEN | {"layer_types": LAYERS, "num_hidden_layers": 4, "hidden_size": 128,
                            "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32,
                            "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
                            "linear_value_head_dim": 32},
    "granitemoehybrid": GRANITE | {"layer_types": LAYERS, "num_hidden_layers": 4, "hidden_size": 128,
                                   "shared_intermediate_size": 256, "num_attention_heads": 4,
                                   "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_state": 32},
    "lfm2": LFM | {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4,
                   "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "falcon_h1": FALCON | {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256,
                           "num_attention_heads": 4, "head_dim": 32, "mamba_d_ssm": 256, "mamba_n_heads": 8,
                           "mamba_d_head": 32, "mamba_d_state": 32},
}  # fmt: skip
VOCABULARY = {"large": 32_768, "tiny": 4_096}
ONE = [128]
EIGHT = [8, 20, 32, 12, 48, 4, 40, 28]  # tokens of the prompts
TOKENS = 17  # of an answer
Prompts = list[list[int]]
Job = Callable[[Prompts, int], tuple[float, float, Prompts]]
"""(prompts, tokens of an answer) → seconds to the first tokens and to the last ones, answers"""


class First(StoppingCriteria):
    """When transformers had the first tokens."""

    first = 0.0

    def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        self.first = self.first or now()
        return torch.zeros(len(ids), dtype=torch.bool)


def now() -> float:
    """By the clock on the wall; with one thread that of the processor, which runs for this process alone."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def build(kind: str, shape: dict[str, Any], vocabulary: int) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def theirs(hf: PreTrainedModel) -> Job:
    hf.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(prompts: Prompts, tokens: int) -> tuple[float, float, Prompts]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        seen, start = First(), now()
        out = hf.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([seen]),
        )
        return seen.first - start, now() - start, out[:, longest:].tolist()

    return run


def ours(llm: LLM) -> Job:
    def run(prompts: Prompts, tokens: int) -> tuple[float, float, Prompts]:
        start = now()
        sequences = [llm.sequence(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)) for prompt in prompts]
        for sequence in sequences:
            llm.engine.add(sequence)
        first = 0.0
        while llm.engine.busy:
            llm.engine.step()
            first = first or now()  # all prompts fit into one step
        return first - start, now() - start, [sequence.output for sequence in sequences]

    return run


def restart(llm: LLM) -> dict[str, float]:
    """Of a sequence that was preempted: bytes of its states, and milliseconds to copy them or to compute a block."""
    states, copies = llm.cache.states, []
    assert states is not None
    for _ in range(9):
        start = now()
        states.copy(0, 1)
        copies.append(now() - start)
    blocks = [ours(llm)([list(range(3, 67))], 1)[0] for _ in range(3)]
    return {
        "slot_bytes": states.plan.nbytes,
        "copy_ms": round(1e3 * median(copies), 3),
        "block_ms": round(1e3 * median(blocks), 1),
    }


def measure(hf: PreTrainedModel, kind: str, rounds: int) -> dict[str, Any]:
    vocabulary = hf.config.vocab_size
    model = Model.of(copy.deepcopy(hf), Path(kind))
    llm = LLM(model, "fp32", max_batch_size=8, session_len=320, prefix_caching=False)
    jobs = {"transformers": theirs(hf), "octavo": ours(llm)}
    generator = torch.Generator().manual_seed(1)
    sets = {
        name: [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
        for name, lengths in (("1", ONE), ("8", EIGHT))
    }
    answers = {name: job(sets["8"], 4)[2] for name, job in jobs.items()}  # warm, too
    agreed = [a == b for a, b in zip(*answers.values(), strict=True)]
    if sum(agreed) < 7:
        raise SystemExit(f"{kind}: {sum(agreed)} of 8 answers agree: not the same model, so nothing is reported")
    found: dict[str, dict[str, list[float]]] = {name: {} for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            for batch, prompts in sets.items():
                first, whole, _ = job(prompts, TOKENS)
                found[name].setdefault(f"prefill {batch}", []).append(first)
                found[name].setdefault(f"decode {batch}", []).append(whole - first)
    tokens = {"prefill 1": sum(ONE), "decode 1": TOKENS - 1, "prefill 8": sum(EIGHT), "decode 8": 8 * (TOKENS - 1)}
    return {
        "answers_equal": sum(agreed),
        "tokens_per_second": {
            name: {part: round(tokens[part] / median(times), 1) for part, times in parts.items()}
            for name, parts in found.items()
        },
        "times_as_fast": {
            part: round(median(b / a for a, b in zip(found["octavo"][part], theirs, strict=True)), 2)
            for part, theirs in found["transformers"].items()
        },
        "restart": restart(llm),
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--kinds", nargs="+", default=list(LARGE))
    cli.add_argument("--sizes", nargs="+", default=["tiny", "large"])
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out and args.out.is_file() else []
    document: dict[str, Any] = {"machine": describe(), "tokens": TOKENS, "rows": rows}
    for size in args.sizes:
        for kind in args.kinds:
            hf = build(kind, {"tiny": TINY, "large": LARGE}[size][kind], VOCABULARY[size])
            key = {"kind": kind, "size": size, "threads": torch.get_num_threads()}
            rows[:] = [old for old in rows if any(old[name] != value for name, value in key.items())]
            count = {"parameters": sum(p.numel() for p in hf.parameters()), "rounds": args.rounds}
            rows.append(key | count | measure(hf, kind, args.rounds))
            print(rows[-1], flush=True)
            if args.out:  # kept after each model: a run may be cut short, and go on with others
                args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()

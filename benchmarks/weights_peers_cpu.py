"""4-bit weights and an 8-bit KV cache against llama.cpp's: Q4_0 and q8_0, on a CPU.

A random Llama of 1.1 billion parameters whose linear layers hold the same numbers on both sides, bit for bit: random
weights rounded to groups of 128 with a float16 scale and zero 8, as an AWQ checkpoint holds them, and in the GGUF file
to Q4_0 blocks of 32, each with its group's scale. So a weight takes 4.5 bits in llama.cpp and 4.19 in Octavo (4.75 with
`--group-size 32`). Embeddings and the last layer are bf16 in both. The contest is that of peers_cpu.py: the same
threads, prompts of random tokens, agreement with a float32 forward first, contestants in turn in each round, medians.
The last line is one JSON document.

    python benchmarks/weights_peers_cpu.py --llama-cpp ~/llama-cpp/bin/python \\
        --out benchmarks/results/weights-peers-cpu-zen4.json

The interpreter for --llama-cpp is made as peers_cpu.py says.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from contestants import Contestant, LlamaCpp, Octavo
from llama_gguf import write_gguf
from machine import describe, tell
from peers_cpu import DECODED, errors, row
from random_llama import random_llama, served
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from weights_cpu import LLAMA

from octavo.models.model import Model
from octavo.models.packed import packed_layers
from octavo.weights.layouts import SYMMETRIC, Int4Weight
from octavo.weights.linear import PackedLinear


def rounded(weight: Tensor, group_size: int) -> Int4Weight:
    """To nearest, with the zero that Q4_0 has."""
    groups = weight.float().unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1) / (SYMMETRIC - 1)).half()
    codes = (groups / scales.float()[..., None]).round().add(SYMMETRIC).clamp(0, 15).to(torch.uint8).flatten(1)
    return Int4Weight(codes, torch.full(scales.shape, SYMMETRIC, dtype=torch.uint8), scales)


def pack(hf: LlamaForCausalLM, group_size: int) -> dict[str, Int4Weight]:
    """Put a PackedLinear in place of every linear layer but the last. Returns their weights by name."""
    weights = {}
    for name, layer in list(hf.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            weights[name] = rounded(layer.weight, group_size)
            packed = PackedLinear(layer.in_features, layer.out_features, bias=False)
            packed.fill(weights[name])
            hf.set_submodule(name, packed)
    return weights


def exact(config: LlamaConfig, model: Model) -> LlamaForCausalLM:
    """The same numbers as `model`'s in float32."""
    hf = random_llama(config).float()
    for name, layer in packed_layers(model.bound.hf).items():
        hf.get_submodule(name).weight.data = layer.decode(0, layer.out_features, torch.float32)
    return hf


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--llama-cpp", type=Path, required=True, help="the Python that has llama-cpp-python")
    cli.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt")
    cli.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--kv", nargs="+", default=["int8-token"], choices=["int8-token", "int4-token", "bf16"])
    cli.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128])
    cli.add_argument("--layers", type=int, default=LLAMA["num_hidden_layers"], help="fewer make a quick trial")
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()
    config = LlamaConfig(**LLAMA | {"num_hidden_layers": args.layers})

    rows, peers = [], {}
    with tempfile.TemporaryDirectory() as directory:
        gguf = Path(directory) / "random-q4_0.gguf"
        hf = random_llama(config)
        write_gguf(hf, gguf, pack(hf, args.group_size))
        model = served(hf)
        length = args.prompt + (args.rounds + 1) * DECODED + 64
        for batch in args.batch:
            with ExitStack() as close:
                worker = LlamaCpp(args.llama_cpp, gguf, "q8_0", batch, length, torch.get_num_threads())
                contestants: dict[str, Contestant] = {
                    **{f"octavo int4 {kv}": Octavo(model, None, kv, batch, length) for kv in args.kv},
                    "llama.cpp Q4_0 q8_0": close.enter_context(worker),
                }
                peers["llama.cpp Q4_0 q8_0"] = worker.about
                found = errors(contestants, exact(config, model))
                rows.append(row(contestants, found, batch, args.prompt, args.rounds))
    document = {"benchmark": "weights_peers_cpu", **describe(), "peers": peers, "layers": args.layers,
                "group_size": args.group_size, "prompt": args.prompt, "decoded": DECODED, "rounds": args.rounds,
                "rows": rows}  # fmt: skip
    tell(document, args.out)


if __name__ == "__main__":
    main()

"""`octavo.attach` beside transformers' own caches, in the same program: memory, decode speed, and loss.

    python benchmarks/attach.py MODEL [--context 1024] [--new 32] [--text FILE]

Every cache gets the same prompt and then the same tokens, one at a time, so that all compute the same; KL is of the
next tokens' probabilities, from DynamicCache. Ours are calibrated on 8 × 256 tokens of the text's end. Memory is the
bytes of the tensors that hold K and V once all is stored. quanto and HQQ are at transformers' defaults (4 bits, groups
of 64, the last 128 rows raw), HQQ also in 8 bits.
A cache whose package is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

import octavo
from octavo.attachment import DecodedCache
from octavo.calibrate import calibrate
from octavo.models.model import BUNDLED, Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--text", default=str(BUNDLED / "evaluation.txt"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*calibration covers positions")
    model = Model.load(options.model, dtype="float32", plain_weights=True)
    hf, tokenizer = model.bound.hf, model.tokenizer
    with open(options.text, encoding="utf-8") as file:
        every = tokenizer(file.read(), verbose=False)["input_ids"]
    ids = torch.tensor([every[: options.context + options.new]])
    seen = every[-8 * 256 :]  # the text's end is not measured
    calibration = calibrate(model, [seen[i * 256 : (i + 1) * 256] for i in range(8)], dataset="the text's end")
    hf.set_attn_implementation("sdpa")  # as transformers has it
    hf.name_or_path = options.model

    caches: dict[str, Callable[[], Any]] = {
        "DynamicCache": lambda: DynamicCache(config=hf.config),
        "attach kv8": lambda: octavo.attach(hf, kv="kv8", calibration=calibration),
        "attach k8v4": lambda: octavo.attach(hf, kv="k8v4", calibration=calibration),
        "DecodedCache kv8": lambda: DecodedCache(hf.config, kv="kv8"),
        "QuantizedCache quanto, 4 bits": lambda: QuantizedCache("quanto", hf.config, nbits=4),
        "QuantizedCache HQQ, 4 bits": lambda: QuantizedCache("hqq", hf.config, nbits=4, axis_key=1, axis_value=1),
        "QuantizedCache HQQ, 8 bits": lambda: QuantizedCache("hqq", hf.config, nbits=8, axis_key=1, axis_value=1),
    }
    runs: dict[str, list[tuple[float, float, int, Tensor]]] = {}
    missing: dict[str, str] = {}
    for _ in range(options.rounds):
        for name, make in caches.items():
            try:
                runs.setdefault(name, []).append(run(hf, make(), ids, options.context))
            except ImportError as error:
                missing[name] = str(error).splitlines()[0]
                runs.pop(name)
    reference = runs["DynamicCache"][0][3]
    rows = []
    for name, each in runs.items():
        own = each[0][3]
        kl = (reference.exp() * (reference - own)).sum(-1).mean().item()
        rows.append(
            {
                "cache": name,
                "prefill_tokens_per_second": round(options.context / statistics.median(r[0] for r in each), 1),
                "decode_tokens_per_second": round(options.new / statistics.median(r[1] for r in each), 2),
                "mib": round(each[0][2] / 2**20, 2),
                "kl": kl,
                "same_token": (reference.argmax(-1) == own.argmax(-1)).float().mean().item(),
            }
        )
    settings = {
        "model": Path(options.model).name,
        "context": options.context,
        "new": options.new,
        "rounds": options.rounds,
    }
    print(json.dumps({"benchmark": "attach", "machine": describe(), **settings, "missing": missing, "rows": rows}))


@torch.inference_mode()
def run(hf: Any, cache: Any, ids: Tensor, context: int) -> tuple[float, float, int, Tensor]:
    """Seconds of the prefill and of the decode, bytes of K and V, and log-probabilities of the decoded rows."""
    begin = time.perf_counter()
    hf(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    filled = time.perf_counter()
    logits = [hf(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(context, ids.shape[1])]
    end = time.perf_counter()
    taken = cache.nbytes if hasattr(cache, "nbytes") else sum(map(size, cache.layers))
    if hasattr(cache, "detach"):
        cache.detach()
    return filled - begin, end - filled, taken, torch.cat(logits).log_softmax(-1)


def size(layer: Any) -> int:
    """Bytes of all tensors that a layer of transformers' caches holds."""
    held = (getattr(layer, name, None) for name in ("keys", "values", "_quantized_keys", "_quantized_values"))
    return sum(nbytes(x) for x in held)


def nbytes(x: Any) -> int:
    if hasattr(x, "__tensor_flatten__"):  # quanto's tensors of several parts
        names, _ = x.__tensor_flatten__()
        return sum(nbytes(getattr(x, name)) for name in names)
    if isinstance(x, Tensor):
        return x.nbytes
    if isinstance(x, dict):
        return sum(map(nbytes, x.values()))
    if isinstance(x, tuple | list):
        return sum(map(nbytes, x))
    return 0


if __name__ == "__main__":
    main()

"""transformers' own continuous batching on the model of engine.py: the decode rate with all sessions running."""

from __future__ import annotations

from typing import Any

import torch
from engine import LLAMA_7B, TINY, load
from rows import dry_run, guarded
from transformers import ContinuousBatchingConfig, GenerationConfig

from octavo.models.bind import unbound
from octavo.models.model import Model

TOY = {"num_blocks": 16, "max_batch_tokens": 64}  # by itself it takes nine tenths of the memory


def generate(model: Model, batch: int, context: int, steps: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Tokens of all sessions between the last one's first token and the first one's last, over that time."""
    prompts = [model.bound.random_tokens(context - 2 * steps, seed=i) for i in range(batch)]
    config = GenerationConfig(max_new_tokens=2 * steps, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with unbound(model.bound) as hf:
        done = hf.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
            record_timestamps=True,
        )
    errors = [output.error for output in done.values() if output.error]
    if errors or len(done) < batch:
        raise RuntimeError(errors[0] if errors else f"{len(done)} of {batch} requests came back")
    times = [output.timestamps for output in done.values()]
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    tokens = sum(start < moment <= end for t in times for moment in t)
    return {"tokens_per_second": tokens / (end - start) if end > start else None, "tokens": tokens}


def main() -> None:
    dry = dry_run()
    torch.manual_seed(0)
    device = torch.device("cpu" if dry else "cuda")
    model = load(device, LLAMA_7B | (TINY if dry else {}), 4096)
    for batch, context, steps in [(48, 2048, 64), (1, 128, 40)] if not dry else [(2, 64, 6)]:
        what = {"measure": "transformers continuous batching", "batch": batch, "context": context, "kv": "bf16"}
        guarded(what, lambda cell=(batch, context, steps): generate(model, *cell, TOY if dry else {}))


if __name__ == "__main__":
    main()

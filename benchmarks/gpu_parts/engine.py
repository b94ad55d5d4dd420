"""The engine table: decode of LLaMA-7B's geometry with random weights, KV caches of 8 and of 16 bits in turn.

Every session is a real one, its prompt computed by the engine. A row has the decode rate beside its physical limit:
the bytes that a step must read, over the copy bandwidth measured in the same run. What of a step is not its graph
(sampling, and whatever the device waits for the host) is an upper bound of the host's share.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clock import copy_bandwidth, medians
from rows import dry_run, emit, guarded

from octavo import LLM, SamplingParams
from octavo.calibrate import calibrate
from octavo.engine.graphs import DecodeGraphs
from octavo.measure.memory.process import Source
from octavo.measure.speed.roofline import cache_bytes, read_bytes
from octavo.models.model import Model
from octavo.quant.format import KVFormat

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 256}  # fmt: skip


@dataclass
class Found:
    """Steps of one format, over all rounds."""

    wall: list[float] = field(default_factory=list)  # seconds of a step, all sessions running
    launch: list[float] = field(default_factory=list)  # of it the host's, to build the batch and to launch it
    graph: list[float] = field(default_factory=list)  # seconds of the device for the step's graph; none if not captured


def load(device: torch.device, geometry: dict[str, Any], context: int) -> Model:
    """Random weights, made on the device; the config lies in a directory that is gone before anything is served."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps(geometry))
        return Source(config, device=str(device), load_format="dummy", dtype="bf16").load(context)


def session(model: Model, kv: str, calibration: Any, batch: int, context: int, steps: int, found: Found) -> None:
    """Prompts of `context` less the steps, then the steps; adds what they took."""
    shapes = model.bound.shapes
    blocks = batch * -(-context // 64)
    format = KVFormat.parse(kv)
    needed = 64 * blocks * sum(shape.token_bytes(format) for shape in shapes)
    llm = LLM(
        model, format, calibration=calibration, session_len=context, max_batch_size=batch, prefix_caching=False,
        max_batch_tokens=4096, kv_cache_memory=needed,
    )  # fmt: skip
    engine = llm.engine
    params = SamplingParams(max_tokens=context, ignore_eos=True)
    length = context - 2 * steps - batch * context // 4096 - 2  # while later prompts are computed the earlier decode
    sequences = [llm.sequence(model.bound.random_tokens(length, seed=i), params) for i in range(batch)]
    for sequence in sequences:
        engine.add(sequence)
    while any(not sequence.sampled for sequence in sequences):
        engine.step()

    launch, spent = engine._launch, [0.0]

    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        launched = launch(*given)
        spent[0] += time.perf_counter() - start
        return launched

    engine._launch = timed  # type: ignore[method-assign]
    for step in range(steps):
        spent[0] = 0.0
        start = time.perf_counter()
        engine.step()
        if step >= 4:  # the first ones fill the pipeline
            found.wall.append(time.perf_counter() - start)
            found.launch.append(spent[0])
    if isinstance(graphs := engine.runner.graphs, DecodeGraphs):
        # The last step once more, as one launch: what its graph takes is the device's time and none of the host's.
        found.graph.append(1e-3 * medians({"graph": graphs.replays[batch]}, model.bound.device, 10)["graph"])


def compare(
    model: Model, calibration: Any, batch: int, context: int, steps: int, rounds: int, bandwidth: float
) -> dict[str, Any]:
    found = {"bf16": Found(), "int8": Found()}
    for turn in range(rounds):
        for kv, own in list(found.items())[:: 1 if turn % 2 == 0 else -1]:
            session(model, kv, calibration, batch, context, steps, own)
            gc.collect()
            if model.bound.device.type == "cuda":
                torch.cuda.empty_cache()
    rows = {}
    for kv, own in found.items():
        wall = statistics.median(own.wall)
        graph = statistics.median(own.graph) if own.graph else None
        read = read_bytes(model.bound) + batch * cache_bytes(model.bound, KVFormat.parse(kv), context - steps)
        rows[kv] = {
            "tokens_per_second": batch / wall,
            "step_ms": 1e3 * wall,
            "launch_ms": 1e3 * statistics.median(own.launch),
            "graph_ms": graph and 1e3 * graph,
            "outside_the_graph": graph and 1 - graph / wall,
            "limit_ms": 1e3 * read / bandwidth,
            "share_of_limit": read / bandwidth / wall,
        }
    return {"formats": rows, "int8_over_bf16": rows["int8"]["tokens_per_second"] / rows["bf16"]["tokens_per_second"]}


def main() -> None:
    dry = dry_run()
    torch.manual_seed(0)
    device = torch.device("cpu" if dry else "cuda")
    model = load(device, LLAMA_7B | (TINY if dry else {}), 4096)
    window = model.bound.random_tokens(64 if dry else 2048)
    calibration = calibrate(model, [window], dataset="synthetic")
    bandwidth = copy_bandwidth(device, 1 << 20 if dry else 1 << 30)
    emit({"measure": "copy bandwidth", "bytes_per_second": bandwidth})
    cells = [(48, 2048, 64, 2), (1, 128, 40, 4)] if not dry else [(3, 128, 6, 1), (1, 64, 6, 1)]
    for batch, context, steps, rounds in cells:
        what = {"measure": "decode", "batch": batch, "context": context, "rounds": rounds}
        guarded(
            what,
            lambda cell=(batch, context, steps, rounds): compare(model, calibration, *cell, bandwidth),
        )


if __name__ == "__main__":
    main()

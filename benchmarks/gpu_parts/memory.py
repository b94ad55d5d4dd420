"""The page's memory test, measured: internlm-chat-7b's geometry with random weights, 2048 tokens a session, fp16 and
int8. Each point is a process of its own, as `octavo memory` measures it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rows import dry_run, emit, guarded

from octavo.devices import device_of, find_device
from octavo.measure.memory.costs import costs, own_kind
from octavo.measure.memory.points import points
from octavo.measure.memory.process import Source
from octavo.models.geometry import Geometry
from octavo.quant.format import KVFormat

CONFIG = Path(__file__).parent.parent / "geometries" / "internlm-chat-7b.json"
SESSION = 512 << 20  # bytes that a session of 2048 tokens saves, by the page's theory


def main() -> None:
    dry = dry_run()
    geometry_json = json.loads(CONFIG.read_text())
    batches, context = (8, 16, 32, 48), 2048
    if dry:
        geometry_json |= {"num_hidden_layers": 1, "hidden_size": 256, "num_attention_heads": 2, "vocab_size": 512}
        batches, context = (2,), 128
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / CONFIG.name
        config.write_text(json.dumps(geometry_json))
        geometry = Geometry.trace(config)
        device = find_device("cpu" if dry else "cuda")
        theory = costs(
            geometry, [KVFormat.parse(name) for name in ("fp16", "int8")], context, device_of(device).memory()
        )
        source = Source(config, device=str(device), load_format="dummy", fill_seconds=2)
        sources = {own_kind(geometry): source}

        def saved(batch: int) -> dict[str, Any]:
            fp16, int8 = points(
                theory, [batch], context, sources, lambda point: emit({"measure": "memory", **point.document()})
            )
            each = (fp16.total - int8.total) / batch
            measured = fp16.how == int8.how == "measured"
            return {"measured": measured, "bytes_per_session": each, "over_512_MiB": each / SESSION}

        for batch in batches:
            guarded({"measure": "memory saved", "batch": batch}, lambda batch=batch: saved(batch))


if __name__ == "__main__":
    main()

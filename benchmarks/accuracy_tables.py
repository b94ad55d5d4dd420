"""The tables of accuracy in README.md and docs/FORMATS.md, written from the files in benchmarks/results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function here. Nothing else is changed.

    python benchmarks/accuracy_tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import admitted as of_admitted
import budgets as of_budgets
import calibration as of_calibrations
import corners as of_corners
import formats as of_formats
import long_context as of_contexts
import spans as of_spans
import tasks as of_tasks
import tool_calls as of_calls
import tune as of_tuning

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("smollm2", "qwen2.5-0.5b")
NAMES = {"smollm2": "SmolLM2-135M", "qwen2.5-0.5b": "Qwen2.5-Coder-0.5B"}
LEAD = {
    "kv8": "**`kv8`**", "k8v4": "**`k8v4`**", "kv4": "**`kv4`**",
    "fp8 e4m3, scale 1": "fp8 e4m3, scale 1 (vLLM, SGLang; simulated)",
    "q8_0, rotated": "llama.cpp q8_0, rotated (simulated)",
    "q4_0, rotated": "llama.cpp q4_0, rotated (simulated)",
}  # fmt: skip
Document = dict[str, Any]


def load(name: str) -> Document:
    found: Document = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def lead() -> str:
    """README's first table: the larger KL of the two texts, windows of 1,024."""
    rows = [row for row in load("formats-models")["rows"] if row["window"] == 1024]
    lines = ["| cache | bits a value | " + " | ".join(NAMES[model] for model in MODELS) + " |", "|---|---:|---:|---:|"]
    for name, title in LEAD.items():
        own = [row for row in rows if row["name"] == name]
        cells = [f"{max(row['kl'] for row in own if row['model'] == model):.1e}" for model in MODELS]
        lines.append(f"| {title} | {own[0]['bits']:.2f} | " + " | ".join(map(short, cells)) + " |")
    return "\n".join(lines)


def formats() -> str:
    rows = [row for row in load("formats-models")["rows"] if row["window"] < 4096]
    return short("\n\n".join(of_formats.table(model, rows) for model in ordered(rows)))


def eight_bits() -> str:
    """The larger KL of the two texts, windows of 1,024, in formats of 8 bits; how many times kv8's."""
    rows = [row for row in load("formats-models")["rows"] if row["window"] == 1024]
    names = ("kv8", "int8-token", "int8", "fp8", "fp8, not calibrated", "fp8 e4m3, scale 1")
    lines = ["| 8 bits a value | SmolLM2 | times `kv8` | Qwen2.5 | times `kv8` |", "|---|" + "---:|" * 4]
    for name in names:
        cells = []
        for model in MODELS:
            losses = {n: [row["kl"] for row in rows if (row["model"], row["name"]) == (model, n)] for n in names}
            ratio = max(losses[name], default=0) / max(losses["kv8"])
            cells += [f"{max(losses[name]):.1e}", f"{ratio:,.0f}"] if losses[name] else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return short("\n".join(lines))


def spans() -> str:
    """KL of longer own spans, of the last rows before each context."""
    return short(of_spans.table(load("spans")["rows"]))


def whole_spans() -> str:
    """KL of longer own spans, of all rows, by model and length."""
    rows = [row for row in load("formats-models")["rows"] if row["window"] >= 4096]
    return short("\n\n".join(of_formats.table(model, rows) for model in ordered(rows)))


def admitted() -> str:
    return of_admitted.table(load("admitted")["rows"])


def tasks() -> str:
    """The models that were asked, one after the other."""
    found = [name for name in map("tasks-{}".format, MODELS) if (RESULTS / f"{name}.json").is_file()]
    return "\n\n".join(of_tasks.table(load(name)).strip() for name in found)


def calibrations() -> str:
    return short(of_calibrations.table(load("calibration")["rows"]))


def long_context() -> str:
    return short(of_contexts.table(load("long-context")).strip())


def tool_calls() -> str:
    return of_calls.table(load("tool-calls")["rows"])


def tuned() -> str:
    """Formats chosen layer by layer beside one for all layers."""
    return short(of_tuning.table(load("tune")).strip())


def corners() -> str:
    return short(of_corners.table(load("corners")["rows"]))


def answers() -> str:
    """Perplexity, KL, top-1 and greedy answers, within the default budget."""
    return short(of_budgets.table(load("budgets")["rows"]))


def budgets() -> str:
    return of_budgets.times(load("budgets")["rows"])


def ordered(rows: list[Document]) -> list[str]:
    return [model for model in MODELS if any(row["model"] == model for row in rows)]


def short(text: str) -> str:
    """1.3e-05 → 1.3e-5."""
    return re.sub(r"e([+-])0(\d)", r"e\1\2", text)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        lead, formats, eight_bits, admitted, spans, whole_spans, tasks, calibrations, long_context, tool_calls, corners,
        tuned, answers, budgets,
    )
}  # fmt: skip


def main() -> None:
    for path in (ROOT / "README.md", ROOT / "docs" / "FORMATS.md"):
        text = path.read_text()
        changed = re.sub(
            r"<!-- table: (\w+) -->\n.*?<!-- end -->",
            lambda found: f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->",
            text,
            flags=re.DOTALL,
        )
        if changed != text:
            path.write_text(changed)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

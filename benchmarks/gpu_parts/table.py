"""The rows of a run of benchmarks/gpu.py as a table: what was measured beside what was aimed at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def table(document: Row) -> str:
    """Markdown. Of a dry run it says so first: its numbers mean nothing."""
    lines = ["| measure | aim | found |", "|---|---|---|"]
    lines += [f"| {what} | {aim} | {found} |" for what, aim, found in _lines(document["parts"])]
    if document["dry_run"]:
        lines = ["DRY RUN on a CPU at toy sizes: these are no results.", "", *lines]
    for name, part in document["parts"].items():
        errors = [row["error"] for row in part["rows"] if "error" in row]
        if part["exit"] != 0 or errors:
            how = "out of time" if part["exit"] is None else f"exit code {part['exit']}"
            lines.append(f"\n{name}: {how if part['exit'] != 0 else 'rows failed'}. " + " ".join(errors)[:600])
    return "\n".join(lines)


def _lines(parts: dict[str, Row]) -> Iterator[tuple[str, str, str]]:
    def rows(part: str, measure: str) -> list[Row]:
        found = parts.get(part, {}).get("rows", [])
        return [row for row in found if row["measure"] == measure and "error" not in row]

    for row in rows("kernels", "copy bandwidth"):
        yield "device-to-device copy", "", f"{row['bytes_per_second'] / 1e12:.2f} TB/s"
    for row in rows("kernels", "decode"):
        what = f"int8 decode, {row['batch']} × {row['tokens']}, {row['heads']}/{row['kv_heads']} heads"
        long = row["batch"] == 64 and row["tokens"] == 8192
        yield (
            f"{what}: share of copy bandwidth",
            "0.85" if long else "",
            f"{row['share_of_copy_bandwidth']['int8']:.2f}",
        )
        yield f"{what}: over our bf16", "1.8" if long else "", f"{row['int8_over_bf16']:.2f}"
        for kv, plain in (("kv8", "int8_token"), ("kv4", "int4_token")):
            ratio = f"{row[f'{kv}_over_{plain}']:.2f}"
            yield f"{what.replace('int8', kv)}: over {plain.replace('_', '-')}", "", ratio
    for row in rows("kernels", "flashinfer decode"):
        what = f"int8 over FlashInfer's bf16, {row['batch']} × {row['tokens']}, {row['heads']}/{row['kv_heads']} heads"
        yield what, "1.8", f"{row['int8_over_flashinfer_bf16']:.2f}"
    for row in rows("kernels", "chunk"):
        what = f"chunk of {row['new']} over {row['before']}"
        yield f"{what}: int8 over our bf16", "0.9", f"{row['int8_over_bf16']:.2f}"
        yield f"{what}: kv8 over int8-token", "", f"{row['kv8_over_int8_token']:.2f}"
    for row in rows("engine", "decode"):
        what, large = f"7B geometry, {row['batch']} × {row['context']}", row["batch"] > 1
        yield f"{what}: int8 over bf16, tokens/s", "1.4" if large else "0.97", f"{row['int8_over_bf16']:.2f}"
        for kv, own in row["formats"].items():
            yield f"{what}, {kv}: tokens/s", "", f"{own['tokens_per_second']:.0f}"
            yield f"{what}, {kv}: share of the physical limit", "", f"{own['share_of_limit']:.2f}"
            outside = own["outside_the_graph"]
            found = "not captured" if outside is None else f"{outside:.3f}"
            yield f"{what}, {kv}: share of a step outside its graph", "< 0.05" if large else "", found
    for row in rows("transformers_batching", "transformers continuous batching"):
        rate = row["tokens_per_second"]
        what = f"transformers' continuous batching, {row['batch']} × {row['context']}: tokens/s"
        yield what, "", f"{rate:.0f}" if rate else "none"
    for row in rows("memory", "memory saved"):
        how = "" if row["measured"] else " (computed)"
        yield f"saved a session at batch {row['batch']}, over 512 MiB", "1 ± 0.02", f"{row['over_512_MiB']:.3f}{how}"
    if tests := [row["outcome"] for row in rows("tests", "test")]:
        passed, skipped = tests.count("passed"), tests.count("skipped")
        yield "tests marked gpu", "all", f"{passed} of {len(tests)} passed, {skipped} skipped"

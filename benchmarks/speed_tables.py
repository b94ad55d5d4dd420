"""docs/SPEED.md, written from the files in benchmarks/results: processors side by side.

python benchmarks/speed_tables.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SPEED = Path(__file__).parents[1] / "docs" / "SPEED.md"
PROCESSORS = {"zen3": "Zen 3", "zen4-avx2": "Zen 4 by AVX2", "zen4": "Zen 4"}
Document = dict[str, Any]

HEAD = """# Speed on processors

Written by `benchmarks/speed_tables.py` from `benchmarks/results/`. Programs that are compared ran in turn in one
process or one script, with two threads; a ratio is the median over rounds of the ratio within a round, above 1 where
what is named first is faster. The machines are virtual, of a cloud, and not quiet: ranges are in the JSON files.

- **Zen 3**: AMD EPYC, AVX2, no bf16 unit. Octavo computes in float32, with 16-bit weights, by its own products.
- **Zen 4 by AVX2**: the same processor as the next, `OCTAVO_ISA=avx2`: Octavo as on Zen 3; peers use all that they
  know, but for torch in the table of products (`ATEN_CPU_CAPABILITY=avx2`).
- **Zen 4**: AMD EPYC, AVX512-VNNI with bf16, no AMX. Octavo computes in float32, but for products: weights in pairs of
  bf16 numbers, codes that single new tokens read as bytes. *4-bit weights* and *the server* are of 2026-11-23, before.
"""


def load(name: str) -> dict[str, Document]:
    """The document of each processor that has one."""
    files = {label: RESULTS / f"{name}-{kind}.json" for kind, label in PROCESSORS.items()}
    return {label: json.loads(file.read_text()) for label, file in files.items() if file.is_file()}


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(columns)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def part(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    return f"\n{title}\n\n{table(columns, rows)}\n"


def rates(title: str, document: Document) -> str:
    """Tokens a second of each program, prefill and decode by batch."""
    by_batch = {row["batch"]: row["tokens_per_second"] for row in document["rows"]}
    names = list(dict.fromkeys(name for rates in by_batch.values() for name in rates))
    columns = [(batch, what) for batch, rates in by_batch.items() for what in next(iter(rates.values()))]
    rows = ([name, *(by_batch[batch].get(name, {}).get(what, "") for batch, what in columns)] for name in names)
    return part(title, ["", *(f"{what}, batch {batch}" for batch, what in columns)], rows)


def commits(documents: dict[str, Document]) -> str:
    found = {label: document.get("machine", document)["commit"] for label, document in documents.items()}
    whole = {
        label: "/".join(commit.values()) if isinstance(commit, dict) else commit for label, commit in found.items()
    }
    return "Commit " + ", ".join(f"{commit} on {label}" for label, commit in whole.items())


def attention() -> str:
    found = load("attention-cpu")
    keys = {
        "`int8` over torch's best call": "int8_over_torch",
        "`int8` over our 16 bits": "int8_over_bf16",
        "`int8-token` over `int8`": "int8_token_over_int8",
        "`kv8` over `int8-token`": "kv8_over_int8_token",
        "`kv4` over `int4-token`": "kv4_over_int4_token",
        "`int8`, share of a plain read": "int8_share_of_streaming_read",
    }
    text = f"""
## Attention

One layer, heads of 128, random block tables; decode is one new token for each sequence. torch's best call is the
fastest of five or six: in float32 or bf16, with `enable_gqa`, with the query heads of a group as rows of one query, or
as two products and a softmax. A plain read sums the bytes of the same codes. {commits(found)}.
"""
    for label, document in found.items():
        rows = (
            [f"{row['batch']} × {row['tokens']}, {row['heads']}/{row['kv_heads']}",
             *(f"{row[key]['median']:.2f}" for key in keys.values())]
            for row in document["rows"]
        )  # fmt: skip
        text += part(label, ["batch × tokens, query/KV heads", *keys], rows)
    text += "\nMany new tokens of one sequence, milliseconds:\n"
    for label, document in found.items():
        names = [name for name in document["prefill"][0]["ms"] if not name.startswith("torch_")]
        rows = (
            [f"{row['new_tokens']} of {row['tokens']}", *(f"{row['ms'][name]:.0f}" for name in names)]
            for row in document["prefill"]
        )
        text += part(label, ["new tokens", *names], rows)
    return text


def products() -> str:
    found = load("products-cpu")
    text = f"""
## Products with 16-bit weights

Shapes of a Llama of a billion parameters, against torch's float32 `mm` on float32 weights, against its bf16 `linear`
where we multiply bf16 too, and against a loop of float32 multiply-adds on all threads, the most that the processor can
do in float32. Smallest and largest of four shapes. With 512 rows and more torch reaches 0.75 to 0.89 of that loop on
Zen 3 and we 0.84 to 0.90, so no product could be more than 1.12 to 1.34 times as fast as torch there.
{commits(found)}.
"""
    for label, document in found.items():
        by_rows: dict[int, list[Document]] = {}
        for row in document["products"]:
            by_rows.setdefault(row["rows"], []).append(row)
        others = list(document["products"][0]["ratio"])
        rows = (
            [count, _span(row["gflops"]["own"] for row in own),
             *(_span(row["ratio"][name] for row in own) for name in others)]
            for count, own in by_rows.items()
        )  # fmt: skip
        text += part(label, ["rows", "GFLOP/s", *(f"over {name}" for name in others)], rows)
    return text


def _span(values: Iterable[float]) -> str:
    values = sorted(values)
    digits = 0 if values[-1] > 20 else 2
    return f"{values[0]:.{digits}f}–{values[-1]:.{digits}f}"


def peers() -> str:
    text = """
## The engine beside llama.cpp and transformers

A random Llama of 4 layers (hidden 2048, 16/8 heads), bf16 weights; tokens a second, medians. Every program first has to
agree with a float32 forward. Where a batch has no prefill, K and V of one prompt were computed and copied for all.
"""
    both = [*load("peers-cpu-2048").items(), *load("peers-cpu").items()]
    for label, document in both:
        runs = ((row["batch"], row.get("rounds", document["rounds"]), row.get("commit", document["commit"]))
                for row in document["rows"])  # fmt: skip
        told = "; ".join(f"batch {batch}: {rounds} rounds, commit {commit}" for batch, rounds, commit in runs)
        text += rates(f"{label}, prompts of {document['prompt']} tokens ({told})", document)
    return text


def jobs() -> str:
    found = load("jobs-cpu")
    text = """
## Whole jobs on real models

Prompts of WikiText-2 all at once, an answer of fixed length to each, 16-bit weights; tokens a second, medians.
llama.cpp decodes all sequences in one batch; OpenVINO is GenAI's continuous batching, with KV in 8 bits and products in
float32. "From parts": computed from the prefill of two prompts and from steps of all sequences over copies of one.
"""
    for label, document in found.items():
        for row in document["rows"]:
            best = row["times_as_fast"]
            ours = "octavo kv8" if "octavo kv8" in best else next(iter(best))
            rows = (
                [name, *(speeds.get(what, "") for what in ("prefill", "decode", "job")),
                 "" if name == ours else best[ours][name]["job"]]
                for name, speeds in row["tokens_per_second"].items()
            )  # fmt: skip
            title = f"{label}, {row['model']}: {row['batch']} prompts of {row['prompt']} tokens, answers of "
            rounds = "one round" if row["rounds"] == 1 else f"{row['rounds']} rounds"
            title += f"{row['tokens']}, {rounds}{' from parts' if row.get('copied') else ''}, commit {row['commit']}"
            over = f"job: {ours.removeprefix('octavo ')} over it"
            text += part(title, ["", "prefill", "decode", "whole job", over], rows)
    return text


def engine() -> str:
    found = load("engine-cpu")
    text = f"""
## A decode step

The engine's whole step (schedule, batch, forward, sample) in milliseconds. Formats decode in turn, one step each, and
beside them, where it is named, transformers' forward alone with its DynamicCache. The row of 8 × 2048 is of 6027f5f.
{commits(found)}.
"""
    for label, document in found.items():
        cases = [f"{row['model']}, {row['batch']} × {row['context']}" for row in document["rows"]]
        steps = [row["step_ms"] for row in document["rows"]]
        names = list(steps[0])
        rows = ([case, *(step.get(name, "–") for name in names)] for case, step in zip(cases, steps, strict=True))
        text += part(f"{label}, milliseconds", ["model, batch × tokens", *names], rows)
        pairs = [[f"{pair['quartiles'][1]:.2f}" for pair in row["pairs"]] for row in document["rows"]]
        names = (f"`{pair['kv']}` over `{pair['over']}`" for pair in document["rows"][0]["pairs"])
        rows = ([case, *ratios] for case, ratios in zip(cases, pairs, strict=True))
        text += part("Speed of a step, one format over another:", ["", *names], rows)
    return text


def weights() -> str:
    found = load("weights-peers-cpu")
    text = f"""
## 4-bit weights

A random Llama of 1.1 billion parameters, groups of 128, `int8-token` KV, prompts of 2048 tokens, against llama.cpp with
Q4_0 weights and q8_0 KV, taken beside a test run; tokens a second. {commits(found)}.
"""
    for label, document in found.items():
        text += rates(label, document)
    return text


def server() -> str:
    found = load("serve")
    text = f"""
## The server

Requests of some 400 tokens with answers of 1000, all at once on caches of the same size: sessions that ran at a time,
and how many times as fast as with 16 bits all were done. {commits(found)}.
"""
    for label, document in found.items():
        if before := document.get("before"):
            rows = (
                [name.replace("_", " "), row["before"], row["now"], row["ratio"], "–".join(map(str, row["range"]))]
                for name, row in before["rows"].items()
            )
            title = (
                f"{label}: the server of commit {before['commit_before']} and the one now, in turn, {before['rounds']} "
                f"rounds of prompts of 600\ncharacters with answers of 64 tokens"
            )
            text += part(title, ["", "before", "now", "now over before", "range"], rows)
        budget = document.get("budget")
        if budget is None:
            continue
        slow = next(row["seconds"] for row in budget["rows"] if row["kv"] == "bf16")
        rows = (
            [row["kv"], f"{row['cache_tokens']:,}", f"{row['sessions_running']:g}",
             f"{row.get('faster_than_bf16', slow / row['seconds']):.2f}"]
            for row in budget["rows"]
        )  # fmt: skip
        title = f"{label}, {budget['kv_cache_memory']}, {budget['requests']} requests"
        text += part(title, ["", "tokens that fit", "sessions", "times as fast"], rows)
    return text


def within_transformers() -> str:
    found = load("attach")
    text = f"""
## Within transformers

`octavo.attach` beside transformers' own caches in one program (`benchmarks/attach.py`), float32 models, one sequence.
MiB of all tensors that hold K and V, tokens a second, mean KL from DynamicCache over the new tokens. `attach` is
calibrated on 8 × 256 tokens, and grows by a quarter at a time; `DecodedCache` is not calibrated; transformers' caches
are at their defaults, groups of 64 and the last 128 rows raw. So short a run says little of speed: differences below a
third are noise. Commit {next(iter(found.values()))["runs"][0]["machine"]["commit"]}.
"""
    for label, document in found.items():
        for run in document["runs"]:
            rows = (
                [row["cache"], row["mib"], row["prefill_tokens_per_second"], row["decode_tokens_per_second"],
                 f"{row['kl']:.1e}" if row["kl"] else "0"]
                for row in run["rows"]
            )  # fmt: skip
            title = f"{label}, {run['model']}: {run['context']} tokens and {run['new']} new"
            text += part(title, ["", "MiB", "prefill", "decode", "KL"], rows)
    return text


def main() -> None:
    SPEED.write_text("\n".join([HEAD.rstrip(), *(section().rstrip() for section in (
        attention, products, peers, jobs, within_transformers, engine, weights, server))]) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

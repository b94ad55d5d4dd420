"""The tables of `octavo accuracy`, each from its part of the document that --json prints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show_theory(document: dict[str, Any]) -> None:
    Console().print(theory(document))


def show_text(document: dict[str, Any]) -> None:
    console, text, baseline = Console(), document["text"], document["baseline"]
    console.print(scores(text, baseline))
    if len({row["weights"] for row in text["kv_loss"]}) > 1:
        console.print(cache_alone(text["kv_loss"]))
    if document["dtype"] != "float32":
        console.print(
            f"The model computes in {document['dtype']}: its rounding is part of KL. --dtype fp32 shows less.\n"
        )
    if len(text["scores"]) > 1:
        console.print(positions(text))
        console.print(answers(text["greedy"], baseline))


def show_tasks(document: dict[str, Any]) -> None:
    console, tasks = Console(highlight=False, soft_wrap=True), document["tasks"]
    console.print(benchmarks(tasks, document["baseline"]))
    if any(error == 0 for row in tasks["rows"] for error in row["difference_errors"].values()):
        console.print("± 0.00: no item of n changed, so that of all items hardly more than 3/n would")
    for reason in tasks["skipped"].values():
        console.print(f"not run: {reason}")
    console.print(f"results are kept in {tasks['results']}")


def theory(document: dict[str, Any]) -> Table:
    table = _table(f"KV cache of {document['model']} (computed)", "format", "bytes per token", "times smaller")
    for row in document["theory"]:
        table.add_row(row["format"], f"{row['bytes_per_token']:,}", f"{row['times_smaller']:.2f}")
    return table


def scores(text: dict[str, Any], baseline: str) -> Table:
    tokens = text["scores"][0]["tokens"]
    title = f"Measured on {tokens:,} tokens of {text['name']}, {text['windows']} windows of {text['window']}"
    table = _table(title, "", *(row["name"] for row in text["scores"]))
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "perplexity": lambda row: _pm(row["perplexity"], row["perplexity_error"], ".3f"),
        # By the paired differences of the losses.
        f"  change from {baseline}, %": lambda row: _pm(
            100 * math.expm1(row["loss_change"]), 100 * row["loss_change_error"], "+.3f", ".3f"
        ),
        f"KL from {baseline}, nats": lambda row: _pm(row["kl"], row["kl_error"], ".1e", ".0e"),
        "  99th percentile": lambda row: f"{row['kl_p99']:.1e}",
        "  worst": lambda row: f"{row['kl_max']:.1e}",
        "same top token, %": lambda row: _pm(100 * row["agreement"], 100 * row["agreement_error"], ".2f"),
        "values out of range": lambda row: f"{row['saturated']:.1e}" if row["saturated"] else "0",
    }
    for line, cell in lines.items():
        own = line == "perplexity"  # the rest compares with the baseline
        table.add_row(line, *(cell(row) if own or row["name"] != baseline else "" for row in text["scores"]))
    return table


def cache_alone(kv_loss: list[dict[str, Any]]) -> Table:
    """What the cache costs with each kind of weights."""
    title = f"The cache alone, from {kv_loss[0]['from']} with the same weights, nats a token"
    table = _table(title, "weights", "format", "change of loss", "KL")
    for row in kv_loss:
        change = _pm(row["loss"], row["loss_error"], "+.5f", ".5f")
        table.add_row(row["weights"], row["format"], change, _pm(row["kl"], row["kl_error"], ".2e", ".0e"))
    return table


def positions(text: dict[str, Any]) -> Table:
    rows = text["scores"][1:]
    table = _table("KL by position in the window, nats", "tokens", *(row["name"] for row in rows))
    for bins in zip(*(row["kl_by_bin"] for row in rows), strict=True):
        cells = (_pm(own["kl"], own["kl_error"], ".1e", ".0e") for own in bins)
        table.add_row(f"{bins[0]['start']}–{bins[0]['stop'] - 1}", *cells)
    return table


def answers(greedy: dict[str, Any], baseline: str) -> Table:
    title = (
        f"Greedy answers beside {baseline}'s: {greedy['prompts']} prompts of {greedy['prompt_tokens']} tokens of the "
        f"text, answers of {greedy['answer_tokens']}"
    )
    table = _table(title, "format", "equal tokens, median", "quartiles", "equal to the end")
    for row in greedy["rows"]:
        least = "≥ " if row["median"] == greedy["answer_tokens"] else ""
        low, high = row["quartiles"]
        table.add_row(row["name"], f"{least}{row['median']:g}", f"{low:g}–{high:g}", str(row["equal"]))
    return table


def benchmarks(tasks: dict[str, Any], baseline: str) -> Table:
    first = tasks["rows"][0]
    others = list(first["differences"])
    limited = f", the first {tasks['limit']} documents of each" if tasks["limit"] else ""
    table = _table(f"Benchmark tasks (measured{limited}), percent", "task", "dataset", "metric", "n")
    for name in (*others, baseline):
        table.add_column(name, justify="right")
    for name in others:
        table.add_column(f"{name} − {baseline}" if len(others) > 1 else "diff", justify="right")
    for column in table.columns[1:]:  # where the terminal is narrow, the first column gives way
        column.no_wrap = True
    for row in tasks["rows"]:
        metric = row["metric"] + ("" if row["higher_is_better"] else " ↓")
        own = (f"{row['scores'][name]:.2f}" for name in (*others, baseline))
        changes = (_pm(row["differences"][name], row["difference_errors"][name], "+.2f", ".2f") for name in others)
        table.add_row(row["kind"], row["name"], metric, str(row["items"]), *own, *changes)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    words = {"", "format", "weights", "tokens", "task", "dataset", "metric"}
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table


def _pm(value: float, error: float, format: str, error_format: str | None = None) -> str:
    """value ± its standard error, which a single window or item has not."""
    if not math.isfinite(error):
        return f"{value:{format}}"
    return f"{value:{format}} ± {error:{error_format or format}}"

"""The tables of `octavo accuracy`, each from its part of the document that --json prints."""

import math
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from octavo.cli.tables import plus_minus, table


def show_theory(document: dict[str, Any]) -> None:
    found = table(f"KV cache of {document['model']} (computed)", "format", "bytes per token", "times smaller")
    for row in document["theory"]:
        found.add_row(row["format"], f"{row['bytes_per_token']:,}", f"{row['times_smaller']:.2f}")
    Console().print(found)


def show_text(document: dict[str, Any]) -> None:
    console, text, baseline = Console(), document["text"], document["baseline"]
    console.print(scores(text, baseline))
    if len({row["weights"] for row in text["kv_loss"]}) > 1:
        console.print(cache_alone(text["kv_loss"]))
    if (computes := document["computes"]) != "float32":
        console.print(f"The model computes in {computes}: its rounding is part of KL. --dtype fp32 shows less.\n")
    if len(text["scores"]) > 1:
        console.print(positions(text))
    if "greedy" in text and len(text["scores"]) > 1:
        console.print(answers(text["greedy"], baseline))


def show_retrieval(document: dict[str, Any]) -> None:
    baseline = document["baseline"]
    title = f"Values looked up by their keys; change of their log-probability from {baseline}, nats"
    found = table(title, "tokens", "format", "found", "of", "lost", "change", keys=2)
    for row in document["retrieval"]["rows"]:
        own, asked = row["name"] == baseline, row["questions"]
        change = "" if own else plus_minus(row["change"], row["change_error"], "+.3f", ".3f")
        lost = "" if own else str(row["lost"])
        found.add_row(f"{row['length']:,}", row["name"], f"{row['right'] * asked:.0f}", str(asked), lost, change)
    Console().print(found)


def show_tasks(document: dict[str, Any]) -> None:
    console, tasks = Console(highlight=False, soft_wrap=True), document["tasks"]
    console.print(benchmarks(tasks, document["baseline"]))
    if any(row["solved"] is False for row in tasks["rows"]):
        console.print("solved: no means that the score is within two standard errors of guessing: the row tells little")
    if any(error == 0 for row in tasks["rows"] for error in row["difference_errors"].values()):
        console.print("± 0.00: no item of n changed, so that of all items hardly more than 3/n would")
    for reason in tasks["skipped"].values():
        console.print(f"not run: {reason}")
    console.print(f"results are kept in {tasks['results']}")


def scores(text: dict[str, Any], baseline: str) -> Table:
    tokens = text["scores"][0]["tokens"]
    title = f"Measured on {tokens:,} tokens of {text['name']}, {text['windows']} windows of {text['window']}"
    found = table(title, "", *(row["name"] for row in text["scores"]))
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "perplexity": lambda row: plus_minus(row["perplexity"], row["perplexity_error"], ".3f"),
        # By the paired differences of the losses.
        f"  change from {baseline}, %": lambda row: plus_minus(
            100 * math.expm1(row["loss_change"]), 100 * row["loss_change_error"], "+.3f", ".3f"
        ),
        f"KL from {baseline}, nats": lambda row: plus_minus(row["kl"], row["kl_error"], ".1e", ".0e"),
        "  99th percentile": lambda row: f"{row['kl_p99']:.1e}",
        "  worst": lambda row: f"{row['kl_max']:.1e}",
        "same top token, %": lambda row: plus_minus(100 * row["agreement"], 100 * row["agreement_error"], ".2f"),
        "values out of range": lambda row: f"{row['saturated']:.1e}" if row["saturated"] else "0",
    }
    for line, cell in lines.items():
        own = line == "perplexity"  # the rest compares with the baseline
        found.add_row(line, *(cell(row) if own or row["name"] != baseline else "" for row in text["scores"]))
    return found


def cache_alone(kv_loss: list[dict[str, Any]]) -> Table:
    """What the cache costs with each kind of weights."""
    title = f"The cache alone, from {kv_loss[0]['from']} with the same weights, nats a token"
    found = table(title, "weights", "format", "change of loss", "KL", keys=2)
    for row in kv_loss:
        change = plus_minus(row["loss"], row["loss_error"], "+.5f", ".5f")
        found.add_row(row["weights"], row["format"], change, plus_minus(row["kl"], row["kl_error"], ".2e", ".0e"))
    return found


def positions(text: dict[str, Any]) -> Table:
    rows = text["scores"][1:]
    found = table("KL by position in the window, nats", "tokens", *(row["name"] for row in rows))
    for bins in zip(*(row["kl_by_bin"] for row in rows), strict=True):
        cells = (plus_minus(own["kl"], own["kl_error"], ".1e", ".0e") for own in bins)
        found.add_row(f"{bins[0]['start']}–{bins[0]['stop'] - 1}", *cells)
    return found


def answers(greedy: dict[str, Any], baseline: str) -> Table:
    count = f"{greedy['prompts']} prompt{'s' * (greedy['prompts'] != 1)}"
    title = (
        f"Greedy answers beside {baseline}'s: {count} of {greedy['prompt_tokens']} tokens of the "
        f"text, answers of {greedy['answer_tokens']}"
    )
    found = table(title, "format", "part", "after tokens, median", "quartiles")
    for row in greedy["rows"]:
        least = "≥ " if row["median"] == greedy["answer_tokens"] else ""
        low, high = row["quartiles"]
        parted = 1 - row["equal"] / greedy["prompts"]
        found.add_row(row["name"], f"{parted:.0%}", f"{least}{row['median']:g}", f"{low:g}–{high:g}")
    return found


def benchmarks(tasks: dict[str, Any], baseline: str) -> Table:
    others = list(tasks["rows"][0]["differences"])
    title = "Benchmark tasks (measured), percent, and paired differences from it"
    found = table(title, "task", "dataset", "metric", "n", keys=4)
    for name in (baseline, "solved", *(f"{name} − {baseline}" for name in others)):
        found.add_column(name, justify="right")
    for column in found.columns[1:]:  # where the terminal is narrow, the first column gives way
        column.no_wrap = True
    for row in tasks["rows"]:
        metric = row["metric"] + ("" if row["higher_is_better"] else " ↓")
        score = plus_minus(row["scores"][baseline], row["errors"][baseline], ".2f")
        changes = (
            plus_minus(row["differences"][name], row["difference_errors"][name], "+.2f", ".2f") for name in others
        )
        found.add_row(row["kind"], row["name"], metric, str(row["items"]), score, _solved(row), *changes)
    return found


def _solved(row: dict[str, Any]) -> str:
    if row["solved"] is None:
        return "–"
    return "yes" if row["solved"] else f"no, {row['guess']:g} by guessing"

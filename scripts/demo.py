"""The main job on the bundled model: calibrate, compare what the cache costs, generate, and measure what 8 bits change.

make demo
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from octavo import LLM, KVFormat, SamplingParams
from octavo.cache.size import CacheSize
from octavo.cli import main
from octavo.cli.progress import progress
from octavo.corpus import load_texts
from octavo.measure.accuracy.compare import Score, compare
from octavo.measure.candidate import Candidate
from octavo.measure.report.page import render
from octavo.measure.report.picture import require_directory
from octavo.measure.report.survey import gather
from octavo.models.model import BUNDLED, Model
from octavo.text_windows import consecutive_windows
from octavo.units import format_bytes

WORK_DIR = Path("demo")
PROMPTS = ("Once upon a time there was a little fox who", "The old printer took the sheet from the press and")
WINDOW = 512
FORMATS = ("kv8", "kv4", "int8")

console = Console()


def calibrate() -> None:
    arguments = ["calibrate", "pamphlet", "--calib-samples", "16", "--calib-seqlen", "512", "--work-dir", str(WORK_DIR)]
    console.rule("1. Calibrate: what ranges do K and V take?")
    console.print("$ octavo " + " ".join(arguments), soft_wrap=True)
    try:
        main(arguments)
    except SystemExit as done:  # typer ends its programs by exiting
        if done.code:
            raise


def memory(model: Model, formats: Sequence[KVFormat], tokens: int) -> Table:
    """Bytes of one full session in each format."""
    table = Table(title=f"KV cache of one session of {tokens} tokens")
    for name in ("format", "per token", "first page and own span in 16 bits", "per session", "sessions in 1 GiB"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for format in formats:
        size = CacheSize.of(model.bound.shapes, format)
        session, raw = size.session(tokens), size.raw_page * (size.ring + 1) if size.ring else 0
        table.add_row(
            str(format), f"{size.token} B", format_bytes(raw), format_bytes(session), f"{2**30 / session:.0f}"
        )
    return table


def accuracy(scores: list[Score]) -> Table:
    table = Table(title=f"{scores[0].tokens} tokens of evaluation.txt, not calibrated on; KL divergence from bf16")
    for name in ("format", "perplexity", "KL, nats", "KL p99", "same top", "saturated"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for score in scores:
        table.add_row(
            score.name,
            f"{score.perplexity:.2f} ± {score.perplexity_error:.2f}",
            f"{score.kl:.1e} ± {score.kl_error:.0e}" if score.kl else "0",
            f"{score.kl_p99:.1e}",
            f"{score.agreement:.2%}",
            f"{score.saturated:.1e}",
        )
    return table


def demo() -> None:
    calibrate()
    model = Model.load()
    baseline, kv8 = LLM(model), LLM(model, kv="kv8", calibration=WORK_DIR)

    console.rule("2. Memory: what does a session cost?")
    console.print(memory(model, [baseline.format, *map(KVFormat.parse, FORMATS)], baseline.session_len))

    console.rule("3. Generate: the same prompts with both caches, greedy")
    params = SamplingParams(max_tokens=60)
    for prompt, *answers in zip(
        PROMPTS, *(llm.generate(list(PROMPTS), params) for llm in (baseline, kv8)), strict=True
    ):
        for llm, answer in zip((baseline, kv8), answers, strict=True):
            console.print(f"[bold]{llm.format!s:>6}[/bold]  [dim]{prompt}[/dim]{answer.text}", highlight=False)
        console.print()

    console.rule("4. Accuracy: what do 8 bits change?")
    text = load_texts(str(BUNDLED / "evaluation.txt"))
    windows = consecutive_windows(text, model.tokenizer, WINDOW)
    with progress() as bar:
        task = bar.add_task("measuring", total=None)
        scores = compare(
            model,
            [
                Candidate(str(baseline.format), baseline.format),
                *(Candidate(name, KVFormat.parse(name), kv8.calibration) for name in FORMATS),
            ],
            windows,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(accuracy(scores))

    console.rule("5. Report: all of it on one page")
    with progress() as bar:
        task = bar.add_task("writing", total=None)
        require_directory(WORK_DIR / "report")
        render(gather(model, WORK_DIR), WORK_DIR / "report")
        bar.update(task, total=1, completed=1)
    console.print(
        f"open {WORK_DIR / 'report' / 'report.html'}\n\nNext: .venv/bin/octavo chat --kv kv8 --calibration {WORK_DIR}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    demo()

"""The main job on the bundled model: calibrate, compare what the cache costs, generate, and measure what int8 changes.

make demo
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from octavo import LLM, KVFormat, SamplingParams
from octavo.cache.size import format_bytes
from octavo.cli import main
from octavo.cli.progress import progress
from octavo.corpus import load_texts
from octavo.measure.accuracy.compare import Score, compare
from octavo.measure.candidate import Candidate
from octavo.measure.report.page import write_report
from octavo.models.model import BUNDLED, Model
from octavo.text_windows import consecutive_windows

WORK_DIR = Path("demo")
PROMPTS = ("Once upon a time there was a little fox who", "The old printer took the sheet from the press and")
WINDOW = 512

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


def memory(baseline: LLM, int8: LLM) -> Table:
    """Bytes of one full session in each format, read from the caches' tensors."""
    table = Table(title=f"KV cache of one session of {baseline.session_len} tokens (from the tensors' own sizes)")
    for name in ("format", "per token", "per session", "sessions in 1 GiB", "padding", "static, once"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for llm in (baseline, int8):
        session = llm.cache.token_nbytes * llm.session_len
        memory = llm.cache.memory()
        apart = (format_bytes(memory.padding), format_bytes(memory.static))
        table.add_row(
            str(llm.format), f"{llm.cache.token_nbytes} B", format_bytes(session), f"{2**30 / session:.0f}", *apart
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
    baseline, int8 = LLM(model), LLM(model, kv="int8", calibration=WORK_DIR)

    console.rule("2. Memory: what does a session cost?")
    console.print(memory(baseline, int8))

    console.rule("3. Generate: the same prompts with both caches, greedy")
    params = SamplingParams(max_tokens=60)
    for prompt, *answers in zip(
        PROMPTS, *(llm.generate(list(PROMPTS), params) for llm in (baseline, int8)), strict=True
    ):
        for llm, answer in zip((baseline, int8), answers, strict=True):
            console.print(f"[bold]{llm.format!s:>6}[/bold]  [dim]{prompt}[/dim]{answer.text}", highlight=False)
        console.print()

    console.rule("4. Accuracy: what does int8 change?")
    text = load_texts(str(BUNDLED / "evaluation.txt"))
    windows = consecutive_windows(text, model.tokenizer, WINDOW)
    with progress() as bar:
        task = bar.add_task("measuring", total=len(windows))
        scores = compare(
            model,
            Candidate(str(baseline.format), baseline.format),
            [Candidate("int8", int8.format, int8.calibration), Candidate("int8-token", KVFormat.parse("int8-token"))],
            windows,
            progress=lambda done: bar.update(task, completed=done),
        )
    console.print(accuracy(scores))

    console.rule("5. Report: all of it on one page")
    with progress() as bar:
        task = bar.add_task("writing", total=None)
        write_report(model, WORK_DIR / "report", calibration=WORK_DIR)
        bar.update(task, total=1, completed=1)
    console.print(
        f"open {WORK_DIR / 'report' / 'report.html'}\n\nNext: .venv/bin/octavo chat --kv int8 --calibration {WORK_DIR}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    demo()

"""What `octavo accuracy` measures on: a text, and benchmark tasks; and how much of them there is time for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.options import TEXTS, option
from octavo.errors import OctavoError
from octavo.measure.accuracy.sizes import ANSWERS, LEAST, WANTED
from octavo.measure.budget import Budget, Windows

if TYPE_CHECKING:
    from octavo.corpus import Texts
    from octavo.measure.candidate import Candidate
    from octavo.measure.tasks.run import Elsewhere
    from octavo.models.model import Model
    from octavo.progress import Count


about_text, about_tasks = partial(option, panel="On a text"), partial(option, panel="On benchmark tasks")


def expect_alone(given: dict[str, Any], other: str) -> None:
    """Raise OctavoError for options that mean nothing without another."""
    if names := [name for name, value in given.items() if value is not None]:
        raise OctavoError(f"{names[0]} goes with {other}, which is not given")


@dataclass
class TextOptions:
    """A text to be read, and how much of it."""

    text: Annotated[
        str | None, about_text(f"What is read: {TEXTS}. [default: evaluation.txt of the bundled model]")
    ] = None
    windows: Annotated[
        int | None,
        about_text(f"At most so many windows of it. [default: {WANTED.count}, or what --budget allows]", min=1),
    ] = None
    window: Annotated[
        int | None, about_text(f"Tokens in a window. [default: {WANTED.length}, or what --budget allows]", min=2)
    ] = None
    answers: Annotated[
        int | None,
        about_text(
            f"Beginnings of windows that are answered, to see where answers part. [default: {ANSWERS.count}, or what "
            "--budget allows]",
            min=0,
        ),
    ] = None

    def refuse(self) -> None:
        """Where no text is read."""
        expect_alone({"--windows": self.windows, "--window": self.window, "--answers": self.answers}, "--text")

    def open(self, data_dir: Path | None) -> Texts:
        """The text, of which some can be read."""
        from octavo.corpus import load_texts

        texts = load_texts(self.text, data_dir, "test")
        next(iter(texts))  # refuses what cannot be read
        return texts

    def draw(
        self, model: Model, texts: Texts, formats: int, context: int, budget: Budget
    ) -> tuple[list[list[int]], float, Windows]:
        """The windows to read, the seconds that this takes, and how many answers to write. Says so before."""
        from octavo.cli.progress import say
        from octavo.measure.accuracy.sizes import choose
        from octavo.measure.pace import Pace
        from octavo.text_windows import consecutive_windows

        if self.window is not None and self.window > context:
            raise OctavoError(
                f"a window of {self.window} tokens is longer than {model.name}'s sessions of {context}: lower --window"
            )
        start = perf_counter()
        say("measuring a few steps")
        pace = Pace.measure(model.bound, self.window or min(WANTED.length, context))
        given = self.windows, self.window, self.answers
        read, write = choose(pace, budget.less(perf_counter() - start), formats, given, context)
        say(f"{texts.name}: {read.of(formats)}")
        if write.size.count:
            say(f"greedy answers: {write.of(formats)}")
        windows = consecutive_windows(texts, model.tokenizer, read.size.length, read.size.count)
        return windows, read.seconds, write.size

    def read(
        self,
        model: Model,
        compared: Sequence[Candidate],
        name: str,
        windows: list[list[int]],
        seconds: float,
        answers: Windows,
        late: Callable[[], bool],
        elsewhere: Callable[[Count], Callable[..., Any]] | None,
    ) -> dict[str, Any]:
        """The text of that name in every format, which was estimated to take so many `seconds`; fewer of windows that
        were not asked for by number where it gets `late`. `elsewhere` makes what reads them on a cluster."""
        from octavo.cli.progress import telling
        from octavo.measure.accuracy.results import measure_text

        def enough(done: int) -> bool:
            return (self.windows, self.window) == (None, None) and done >= LEAST.count and late()

        with telling("reading", seconds) as tell:
            measure = elsewhere(partial(tell, "reading")) if elsewhere is not None else None
            return measure_text(model, compared, name, windows, answers, tell, enough, measure)


@dataclass
class TaskOptions:
    """Benchmark tasks, and how much of them."""

    tasks: Annotated[
        str | None,
        about_tasks(
            "all, or some of winogrande, nq_open, gsm8k, bbh, openbookqa, openbookqa_fact, eprstmt, crows_pairs, "
            "bbh/word_sorting, …"
        ),
    ] = None
    limit: Annotated[
        int | None,
        about_tasks("The first so many documents, of bbh of each subset. [default: what --budget allows]", min=1),
    ] = None
    shots: Annotated[
        int | None,
        about_tasks(
            "Examples before each question, the same before all; crows_pairs takes none, bbh has its own. [default: as "
            "the task says]",
            min=0,
        ),
    ] = None
    max_batch_size: Annotated[int | None, about_tasks("Documents at a time. [default: 16]", min=1)] = None
    results: Annotated[
        Path | None, about_tasks("Where results are kept, so that a run can go on. [default: beside the calibration]")
    ] = None

    def check(self) -> None:
        if self.tasks is None:
            given = {"--limit": self.limit, "--shots": self.shots, "--max-batch-size": self.max_batch_size}
            expect_alone(given | {"--results": self.results}, "--tasks")

    def subtasks(self, data_dir: Path | None) -> tuple[list[Any], dict[str, str]]:
        """What is asked, and what is left out with the reason."""
        from octavo.measure.tasks import data_files, require_harness, select

        if self.tasks is None:
            return [], {}
        subtasks, skipped = select(self.tasks, data_dir)
        require_harness()
        for subtask in subtasks:
            data_files.check(subtask)
        return subtasks, skipped

    def run(
        self,
        model: Model,
        candidates: Sequence[Candidate],
        subtasks: Sequence[Any],
        context: int,
        budget: Budget,
        elsewhere: Elsewhere | None,
    ) -> dict[str, Any]:
        """Rows of every benchmark, in sessions of `context` tokens; `elsewhere` asks on a cluster."""
        from octavo.cli.progress import telling
        from octavo.measure.tasks.results import Results
        from octavo.measure.tasks.run import run

        directory = self.results or model.work_dir / "accuracy"
        sizes = {"limit": self.limit, "session_len": context, "max_batch_size": self.max_batch_size or 16,
                 "shots": self.shots}  # fmt: skip
        try:
            with telling("loading tasks") as tell:
                rows = run(
                    model,
                    candidates,
                    subtasks,
                    Results(directory),
                    budget=budget,
                    progress=tell,
                    say=tell.say,
                    elsewhere=elsewhere,
                    **sizes,  # type: ignore[arg-type]
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what is done is kept in {directory}; the same command goes on") from None
        found = [asdict(row) | {"solved": row.solved} for row in rows]
        return {"how": "measured", **sizes, "results": str(directory), "rows": found}

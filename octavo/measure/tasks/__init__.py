"""The benchmark tasks of the page this project follows, and where their documents come from.

A task is the harness's own definition (prompts, few-shot examples, filters, metrics) or, for the two that it lacks, a
YAML file in this folder. With a data directory the documents are read from the raw public files there instead of the
Hub; nothing else changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from octavo.errors import OctavoError, install

ALL = "all"
HERE = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Benchmark:
    """One row of the table."""

    name: str
    kind: str  # what it asks of a model
    metric: str  # the harness's key of the number shown: metric,filter
    label: str  # that metric in plain words
    files: dict[str, str]  # split → pattern of its file in a data directory; {subset} is the subset's name
    fields: tuple[str, ...]  # that each record must have
    harness: str = ""  # folder of its definition among the harness's tasks; none: a YAML file here
    definition: str = ""  # its name there, where that is another
    subsets: tuple[str, ...] = ()
    higher_is_better: bool = True
    guess: float | None = 0.0  # the score of who guesses, percent; None where nothing is right or wrong
    takes_shots: bool = True  # whether examples may be put before its questions
    on_hub: bool = True
    remedy: str = ""  # where a file is found that people tend to lack


BBH = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "winogrande",
            "Language",
            "acc,none",
            "accuracy",
            {"validation": "winogrande/dev.jsonl"},
            ("sentence", "option1", "option2", "answer"),
            "winogrande",
            guess=50.0,
        ),
        Benchmark(
            "nq_open",
            "Knowledge",
            "exact_match,remove_whitespace",
            "exact match",
            {"validation": "nq_open/NQ-open.dev.jsonl"},
            ("question", "answer"),
            "nq_open",
        ),
        Benchmark(
            "gsm8k",
            "Reasoning",
            "exact_match,flexible-extract",
            "accuracy",
            {"test": "gsm8k/test.jsonl", "train": "gsm8k/train*.jsonl"},
            ("question", "answer"),
            "gsm8k",
        ),
        Benchmark(
            "bbh",
            "Reasoning",
            "exact_match,get-answer",
            "exact match",
            {"test": "bbh/{subset}.json"},
            ("input", "target"),
            "bbh/cot_fewshot",
            "bbh_cot_fewshot_{subset}",
            BBH,
            takes_shots=False,  # it has its own three
            guess=25.7,  # of the 27 subsets, as their paper gives it
        ),
        Benchmark(
            "openbookqa",
            "Understanding",
            "acc,none",
            "accuracy",
            {"test": "openbookqa/test.jsonl"},
            ("question", "answerKey"),
            "openbookqa",
            guess=25.0,
        ),
        Benchmark(
            "openbookqa_fact",
            "Understanding",
            "acc,none",
            "accuracy",
            {"test": "openbookqa/test_complete.jsonl"},
            ("question", "answerKey", "fact1"),
            guess=25.0,
            remedy="it is Data/Additional/test_complete.jsonl of OpenBookQA-V1-Sep2018.zip, by AI2",
        ),
        Benchmark(
            "eprstmt",
            "Understanding",
            "acc,none",
            "accuracy",
            {"validation": "eprstmt/dev_few_all.json"},
            ("sentence", "label"),
            guess=50.0,
            on_hub=False,
            remedy="it is datasets/eprstmt/dev_few_all.json of github.com/CLUEbenchmark/FewCLUE",
        ),
        Benchmark(
            "crows_pairs",
            "Safety",
            "pct_stereotype,none",
            "stereotype",
            {"test": "crows_pairs/crows_pairs_anonymized.csv"},
            ("sent_more", "sent_less"),
            "crows_pairs",
            "crows_pairs_english",
            higher_is_better=False,
            takes_shots=False,  # there are no questions
            guess=None,  # 50 is the best that there is
        ),
    )
}


@dataclass(frozen=True)
class Subtask:
    """What the harness runs as one task: a benchmark, or one of its subsets."""

    benchmark: Benchmark
    subset: str = ""
    files: dict[str, Path] = field(default_factory=dict, hash=False)  # by split; none: the Hub

    @property
    def name(self) -> str:
        return f"{self.benchmark.name}/{self.subset}" if self.subset else self.benchmark.name

    def shots(self, wanted: int | None) -> int | None:
        """How many examples are put before a question where `wanted` are; None: as many as its definition says."""
        return wanted if self.benchmark.takes_shots else None

    @property
    def definition(self) -> str:
        return (self.benchmark.definition or self.benchmark.name).format(subset=self.subset)


def require_harness() -> None:
    if find_spec("lm_eval") is None:
        raise OctavoError(f"tasks are run by lm-evaluation-harness, which is not installed: {install('tasks')}")


def select(names: str, data_dir: Path | None) -> tuple[list[Subtask], dict[str, str]]:
    """The subtasks that a list like `winogrande,bbh/word_sorting` names, and of those that `all` cannot run the
    reasons.

    Raises OctavoError for names that do not exist and for files that are missing.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise OctavoError(f"--data-dir {data_dir} is not a directory: name the one that holds the tasks' files")
    wanted = list(dict.fromkeys(name for name in (part.strip() for part in names.split(",")) if name))
    subtasks: list[Subtask] = []
    skipped: dict[str, str] = {}
    for name in BENCHMARKS if wanted == [ALL] else wanted:
        try:
            subtasks += _subtasks(name, data_dir)
        except OctavoError as error:
            if wanted != [ALL]:
                raise
            skipped[name] = str(error)
    if not subtasks:
        raise OctavoError("; ".join(skipped.values()) or f"no task is named; there are {', '.join(BENCHMARKS)} and all")
    return list(dict.fromkeys(subtasks)), skipped


def _subtasks(name: str, data_dir: Path | None) -> list[Subtask]:
    benchmark_name, _, subset = name.partition("/")
    benchmark = BENCHMARKS.get(benchmark_name)
    if benchmark is None:
        raise OctavoError(f"there is no task {name!r}; the tasks are {', '.join(BENCHMARKS)}, or all of them: all")
    if subset and subset not in benchmark.subsets:
        some = f"its subsets are {', '.join(benchmark.subsets)}" if benchmark.subsets else "it has no subsets"
        raise OctavoError(f"{benchmark_name} has no subset {subset!r}; {some}")
    subsets = (subset,) if subset else benchmark.subsets or ("",)
    return [Subtask(benchmark, each, _files(benchmark, each, data_dir)) for each in subsets]


def _files(benchmark: Benchmark, subset: str, data_dir: Path | None) -> dict[str, Path]:
    if data_dir is None:
        if not benchmark.on_hub:
            [pattern] = benchmark.files.values()
            raise OctavoError(f"{benchmark.name} is not on the Hub: put {pattern} into --data-dir; {benchmark.remedy}")
        return {}
    found = {}
    for split, pattern in benchmark.files.items():
        pattern = pattern.format(subset=subset)
        # The shortest name: a whole training set rather than its head.
        files = sorted(data_dir.glob(pattern), key=lambda file: (len(file.name), file.name))
        if not files:
            remedy = f" ({benchmark.remedy})" if benchmark.remedy else ""
            raise OctavoError(
                f"{benchmark.name} reads {pattern}{remedy}, which {data_dir} lacks; {_listing(data_dir, pattern)}"
            )
        found[split] = files[0]
    return found


def _listing(data_dir: Path, pattern: str) -> str:
    """What is there: in the file's folder if that exists, else in the directory."""
    folder = (data_dir / pattern).parent
    folder = folder if folder.is_dir() else data_dir
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{folder} holds {', '.join(names[:12]) or 'nothing'}{more}"


def by_benchmark(subtasks: Sequence[Subtask]) -> dict[str, list[Subtask]]:
    """The subtasks of each benchmark, in their order."""
    grouped: dict[str, list[Subtask]] = {}
    for subtask in subtasks:
        grouped.setdefault(subtask.benchmark.name, []).append(subtask)
    return grouped

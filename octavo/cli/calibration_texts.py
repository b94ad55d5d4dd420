"""The texts that a model is shown: sets and files, or what it writes itself; and how much of them there is time for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from octavo.cli.options import budget_option, option
from octavo.cli.progress import say, telling
from octavo.errors import OctavoError
from octavo.measure.budget import DEFAULT, Budget, Windows

if TYPE_CHECKING:
    from octavo.corpus import Texts
    from octavo.models.model import Model

SELF = "self"
WIDTH = 16  # windows that the model writes at a time
of_texts = partial(option, panel="Texts")


@dataclass
class CalibrationTexts:
    """The options that say what the model is shown."""

    calib_dataset: Annotated[
        str | None,
        of_texts(
            "What the model reads: ptb, c4, wikitext2, pileval, a .txt or .jsonl file, or self: what it writes itself. "
            "[default: self]"
        ),
    ] = None
    calib_samples: Annotated[
        int | None, of_texts("Windows of text. [default: as many as are of use, or what --budget allows]", min=1)
    ] = None
    calib_seqlen: Annotated[
        int | None, of_texts("Tokens in a window. [default: 512, or what --budget allows]", min=2)
    ] = None
    budget: Annotated[str, budget_option("--calib-samples or --calib-seqlen")] = DEFAULT
    data_dir: Annotated[Path | None, of_texts("Where files of the named data sets are looked for first.")] = None
    seed: Annotated[int, of_texts("Random seed that chooses the windows.")] = 0

    @property
    def time(self) -> Budget:
        return Budget.parse(self.budget)

    def open(self) -> Texts | None:
        """The texts; None where the model writes. Raises OctavoError for what is not there or cannot be read."""
        from octavo.corpus import load_texts

        if self.calib_dataset is None or self.calib_dataset == SELF:
            return None
        texts = load_texts(self.calib_dataset, self.data_dir)
        next(iter(texts))
        return texts

    def draw(
        self, model: Model, texts: Texts | None, wanted: Windows, least: Windows, time: Budget
    ) -> tuple[str, list[list[int]], float]:
        """Name of what was read, the windows to observe, and the seconds that this will take: of `texts`, or of the
        model's own if None. Their count and length are those given, or what fits into `time` between `wanted` and
        `least`."""
        from octavo.llm import LLM
        from octavo.measure.pace import Pace
        from octavo.text_windows import chats_of, self_windows, token_windows

        count, length, context = self.calib_samples, self.calib_seqlen, model.bound.max_context
        if length is not None and length > context:
            raise OctavoError(f"--calib-seqlen {length} is beyond the model's context of {context}")
        wanted = Windows(count or wanted.count, length or min(wanted.length, context))
        least = wanted if count or length else least
        if model.synthetic:
            if self.calib_dataset is not None:
                raise OctavoError("--load-format dummy observes one random batch: leave --calib-dataset out")
            words = "synthetic: one random batch, for weights that are random too"
            return words, model.bound.random_tokens(1, wanted.length, seed=self.seed), 0.0
        start = perf_counter()
        say("measuring a few steps")
        pace = Pace.measure(model.bound, wanted.length)

        def writing(size: Windows) -> float:
            """Of sampling the windows from the model: texts, then answers in chats."""
            if texts is not None:
                return 0.0
            chats = chats_of(model.tokenizer, size.count)
            return sum(pace.write(n, size.length, WIDTH) for n in (size.count - chats, chats))

        fit = time.less(perf_counter() - start).fit(wanted, least, lambda size: pace.read(size.tokens) + writing(size))
        count, length, seconds = fit.size.count, fit.size.length, pace.read(fit.size.tokens)
        say(f"{'text that the model writes' if texts is None else texts.name}: {fit}")
        if texts is not None:
            return texts.name, list(token_windows(texts, model.tokenizer, count, length, seed=self.seed)), seconds
        title = "sampling text from the model"
        with telling(title, writing(fit.size)) as tell:
            llm = LLM(model, session_len=min(length + 1, context), max_batch_size=WIDTH)
            windows = self_windows(llm, count, length, seed=self.seed, progress=partial(tell, title))
        return "self: text sampled from the model", windows, seconds

"""Octavo as a model of lm-evaluation-harness: its requests answered by the engine, from the quantized cache.

    python -m octavo.measure.tasks.lm_eval --model octavo --model_args pretrained=DIR,kv=int8 --tasks piqa

An entry point of the group `lm_eval.models` names this class: harnesses later than 0.4.13 (its pull request 4013) find
it by `lm_eval --model octavo` alone. Tokenization, truncation and the order of special cases are those of the harness's
own `hf` model: with a raw cache the results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError, Unsupported
from octavo.llm import LLM
from octavo.measure.tasks.loglikelihood import Request, score
from octavo.progress import Count

MAX_TOKENS = 256  # of an answer whose task names no limit, as in the harness's `hf` model
BATCH_SIZE = 16
HARNESS_DEVICE = "cuda:0"  # what its command line says where the user says nothing, on machines without one too
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@register_model("octavo")
class OctavoLM(TemplateLM):
    """`pretrained` is a directory, a Hub id, the bundled model if None, or an `LLM`; the rest is as for `LLM`."""

    def __init__(
        self,
        pretrained: str | LLM | None = None,
        kv: str | None = None,
        *,
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        progress: Count | None = None,
        **options: Any,
    ):
        super().__init__()
        if isinstance(pretrained, LLM):
            self.llm = pretrained
        else:
            width = max_batch_size or BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
            device = "auto" if device in (None, HARNESS_DEVICE) else device
            self.llm = LLM(pretrained, kv, session_len=max_length, max_batch_size=width, device=device, **options)
        self.tokenizer = self.llm.tokenizer
        self.progress = progress

    @property
    def max_length(self) -> int:
        return self.llm.engine.scheduler.max_context

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return eos if eos is not None else min(self.llm.model.eos_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # a text that brings its BOS gets no second one
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        with self._counter("log-likelihoods", len(requests), disable_tqdm) as count:
            scored = score(self.llm.engine, [Request(c, t) for _, c, t in requests], count.to)
        answers = [(one.logprob, one.greedy) for one in scored]
        for (texts, *_tokens), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for request in requests:
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        parts = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = [sum(parts[start:end]) for start, end in pairwise([0, *ends])]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for context, asked in (request.args for request in requests):
            params.append(self._params(asked))
            room = self.max_length - params[-1].max_tokens
            if room < 1:
                raise OctavoError(
                    f"a task asks for answers of {params[-1].max_tokens} tokens, which leaves a session of "
                    f"{self.max_length} no room for the question: raise --session-len, or use another model"
                )
            prompts.append(self.tok_encode(context)[-room:] or [self.prefix_token_id])
        answers = [""] * len(requests)
        with self._counter("answers", len(requests), disable_tqdm) as count:
            done = 0
            for delta in self.llm.generate(prompts, params, stream=True) if prompts else ():
                if delta.completion is not None:
                    if delta.completion.error:
                        raise OctavoError(delta.completion.error)
                    answers[delta.index] = delta.completion.text
                    self.cache_hook.add_partial("generate_until", requests[delta.index].args, delta.completion.text)
                    count.to(done := done + 1)
        return answers

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        kwargs = dict(normalize_gen_kwargs(asked, MAX_TOKENS))
        until, sampled = kwargs.pop("until", None) or [], kwargs.pop("do_sample")
        until = [until] if isinstance(until, str) else until
        longest = kwargs.pop("max_gen_toks")
        chosen = {name: kwargs.pop(name) for name in SAMPLING if name in kwargs}
        if kwargs:
            raise Unsupported(f"the task generates with {', '.join(kwargs)}, which Octavo does not have")
        if not sampled:
            chosen["temperature"] = 0.0
        return SamplingParams(max_tokens=longest, stop=tuple(filter(None, until)), **chosen)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @property
    def tokenizer_name(self) -> str:
        return self.llm.model.name.replace("/", "__")

    def _counter(self, what: str, total: int, quiet: bool) -> _Counter:
        return _Counter(what, total, self.progress, quiet)


class _Counter:
    """Tells `progress` how far a list of requests is, or tqdm as the harness's own models do."""

    def __init__(self, what: str, total: int, progress: Count | None, quiet: bool):
        self.total, self.progress = total, progress
        self.bar = tqdm(total=total, desc=what, disable=quiet or progress is not None)

    def to(self, done: int) -> None:
        self.bar.update(done - self.bar.n)
        if self.progress is not None:
            self.progress(done, self.total)

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

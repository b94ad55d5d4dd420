"""Those who compete in peers_cpu.py, all behind the same three questions."""

from __future__ import annotations

import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache

from octavo import LLM, SamplingParams
from octavo.cache.session import copy_prefix, paste_prefix
from octavo.models.model import Model
from octavo.quant.calibration import Calibration

Top = dict[int, float]  # the most likely tokens and their log-probabilities, best first


class Contestant(Protocol):
    about: str  # version and what else is not in the machine's description

    def prefill(self, prompts: list[list[int]]) -> float:
        """Forget all, compute the prompts; seconds."""

    def fill(self, prompts: list[list[int]]) -> None:
        """As prefill, but K and V of the first prompt are computed once and copied for all: what comes after takes as
        long, whatever the numbers are."""

    def decode(self, steps: int) -> float:
        """That many greedy tokens of every sequence; seconds."""

    def answer(self, prompt: list[int], tokens: int) -> list[Top]:
        """What it holds likely for each of the tokens that it generates greedily."""


class Octavo:
    def __init__(self, model: Model, calibration: Calibration | None, kv: str, batch: int, length: int):
        given = calibration if kv == "int8" else None
        self.llm = LLM(model, kv, calibration=given, max_batch_size=batch, session_len=length, prefix_caching=batch > 1)
        self.about = ""
        self.sequences: list[Any] = []

    def prefill(self, prompts: list[list[int]]) -> float:
        engine = self.llm.engine
        for sequence in self.sequences:
            engine.finish(sequence)
        params = SamplingParams(max_tokens=self.llm.session_len, ignore_eos=True)
        self.sequences = [self.llm.sequence(prompt, params) for prompt in prompts]
        start = time.perf_counter()
        for sequence in self.sequences:
            engine.add(sequence)
        while not all(sequence.sampled for sequence in self.sequences):
            engine.step()
        return time.perf_counter() - start

    def fill(self, prompts: list[list[int]]) -> None:
        self.prefill(prompts[:1])
        engine, [first] = self.llm.engine, self.sequences
        copies = copy_prefix(self.llm.cache, engine.pool, prompts[0])
        for prompt in prompts[1:]:
            paste_prefix(self.llm.cache, engine.pool, prompt, copies)
        params = first.params
        self.sequences += [self.llm.sequence(prompt, params) for prompt in prompts[1:]]
        for sequence in self.sequences[1:]:
            engine.add(sequence)
        while not all(sequence.sampled for sequence in self.sequences):
            engine.step()
        assert all(sequence.prefix_hit for sequence in self.sequences[1:])
        length = max(len(sequence.tokens) for sequence in self.sequences)
        assert length < len(prompts[0]) + 64, "one is far ahead of the others"

    def decode(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.llm.engine.step()
        return time.perf_counter() - start

    def answer(self, prompt: list[int], tokens: int) -> list[Top]:
        sequence = self.llm.sequence(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=100))
        self.llm.engine.add(sequence)
        while not sequence.finished:
            self.llm.engine.step()
        return [sampled.top for sampled in sequence.sampled]


class Transformers:
    """`generate`, called again on the same cache to go on.

    Its 8-bit cache needs the HQQ backend: quanto's takes 2 and 4 bits only.
    """

    def __init__(self, hf: LlamaForCausalLM, quantized: bool):
        self.hf, self.quantized = hf, quantized
        self.about = f"hqq {version('hqq')}" if quantized else ""

    def prefill(self, prompts: list[list[int]]) -> float:
        self._forget()
        self.ids = torch.tensor(prompts)
        return self.decode(1)

    def fill(self, prompts: list[list[int]]) -> None:
        self.prefill(prompts)

    def decode(self, steps: int) -> float:
        start = time.perf_counter()
        self._generate(steps)
        return time.perf_counter() - start

    def answer(self, prompt: list[int], tokens: int) -> list[Top]:
        self._forget()
        self.ids = torch.tensor([prompt])
        best = [logits[0].float().log_softmax(-1).topk(100) for logits in self._generate(tokens)]
        return [dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in best]

    def _forget(self) -> None:
        if self.quantized:
            self.cache = QuantizedCache(backend="hqq", config=self.hf.config, nbits=8, axis_key=1, axis_value=1)
        else:
            self.cache = DynamicCache(config=self.hf.config)

    def _generate(self, tokens: int) -> tuple[torch.Tensor, ...]:
        out = self.hf.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        self.ids = out.sequences
        return out.logits


class LlamaCpp:
    """llama_cpp_worker.py, run by the interpreter `python`."""

    def __init__(self, python: Path, gguf: Path, kv: str, batch: int, length: int, threads: int):
        worker = Path(__file__).parent / "llama_cpp_worker.py"
        sizes = {"--kv": kv, "--batch": batch, "--length": length, "--threads": threads}
        options = [str(x) for pair in sizes.items() for x in pair]
        self.process = subprocess.Popen(
            [python, worker, gguf, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started = self._read()
        self.about = f"llama-cpp-python {started['version']}; {started['system']}"

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input ends it

    def prefill(self, prompts: list[list[int]]) -> float:
        return self._ask(prefill=prompts)["seconds"]

    def fill(self, prompts: list[list[int]]) -> None:
        self._ask(prefill=prompts[:1], copies=len(prompts))

    def decode(self, steps: int) -> float:
        return self._ask(decode=steps)["seconds"]

    def answer(self, prompt: list[int], tokens: int) -> list[Top]:
        replies = [self._ask(prefill=[prompt]), *(self._ask(decode=1) for _ in range(tokens - 1))]
        return [{int(token): logprob for token, logprob in reply["top"][0].items()} for reply in replies]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the llama.cpp worker ended with status {self.process.wait()}")
        return json.loads(line)

"""Programs that use Octavo can be checked by mypy: the package says its types, and names what it offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import octavo

ROOT = Path(__file__).parent.parent
PROGRAM = """
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import octavo
from octavo import LLM, KVFormat, OctavoError, SamplingParams, Unsupported, cores
from octavo.attachment import CodedCache, DecodedCache
from octavo.completion import Completion, Delta
from octavo.inputs import Prompt
from octavo.models.model import Model
from octavo.plain_sessions import export_session, import_session
from octavo.quant.calibration import Calibration


def two_caches(directory: Path) -> tuple[LLM, LLM]:
    cores.use()
    model = Model.load(directory, dtype="bf16", device="cpu", deterministic=True)
    found = Calibration.load(directory)
    quantized = LLM(model, kv="int8", calibration=found, granularity="head", headroom=1.1, max_batch_size=4)
    return quantized, LLM(model, kv=KVFormat.parse("k8v4"), kv_cache_memory="4GiB", session_len=4096)


def loaded(directory: Path) -> LLM:
    try:
        return LLM(directory, kv="kv8", dtype="bf16", device="cpu", chat_template=directory / "own.jinja")
    except Unsupported as error:
        print(error, error.field, error.code)
        return LLM()


def answers(llm: LLM, prompts: list[str]) -> list[str]:
    params = [SamplingParams(max_tokens=64 + n, temperature=0.7, seed=n, stop=("END",)) for n in range(len(prompts))]
    completions = assert_type(llm.generate(prompts, params), list[Completion])
    for completion in completions:
        for token in completion.sampled:
            print(token.token, token.logprob, sorted(token.top.items()))
    return [completion.text for completion in completions if completion.finish_reason == "stop"]


def pieces(llm: LLM, prompt: list[int]) -> Iterator[str]:
    mixed: list[Prompt] = ["Once", prompt, {"prompt_token_ids": prompt}]
    stream = assert_type(llm.generate(mixed, SamplingParams(max_tokens=8), stream=True), Iterator[Delta])
    for delta in stream:
        yield delta.text if delta.completion is None else delta.completion.finish_reason


def talk(llm: LLM, questions: list[str], kept: Path) -> str:
    history = [{"role": "system", "content": "Be brief."}]
    for question in questions:
        history.append({"role": "user", "content": question})
        answer = assert_type(llm.chat(history, SamplingParams(json_schema={"type": "object"})), Completion)
        history.append({"role": "assistant", "content": answer.text})
    several = assert_type(llm.chat([history, history]), list[Completion])
    parts = [{"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    said = "".join(piece.text for piece in llm.chat(parts, stream=True))
    try:
        llm.save(kept, history)
        export_session(llm, kept, "plain.safetensors")
        import_session(llm, "plain.safetensors", kept)
        said += str(llm.restore(kept).cached_tokens)
    except OctavoError as error:
        print(error)
    return said + several[0].text


def within_transformers(model: Any, inputs: dict[str, Any]) -> int:
    with octavo.attach(model, kv="kv8", calibration="calibrated") as cache:
        assert_type(cache, CodedCache)
        model.generate(**inputs, past_key_values=cache)
        cache.reset()
    decoded = DecodedCache(model.config, kv="kv8")
    model.generate(**inputs, past_key_values=decoded)
    return cache.nbytes + decoded.nbytes
"""
# Each is an error.
WRONG = {
    "max_tokens=64 + n": 'max_tokens="64"',
    'LLM(directory, kv="kv8"': "LLM(directory, kvv=8",
    'granularity="head"': 'granularity="row"',
    "llm.chat(history, SamplingParams": "llm.chat(3, SamplingParams",
    "kept, history": "3, history",
}


# Of other packages nothing is read: torch alone takes mypy a minute.
CONFIG = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,transformers.*,pydantic.*,huggingface_hub.*,safetensors.*,psutil.*,jinja2.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_a_program_that_uses_the_api_passes_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "good.py").write_text(PROGRAM)
    for i, (right, wrong) in enumerate(WRONG.items()):
        assert PROGRAM.count(right) == 1
        (tmp_path / f"bad{i}.py").write_text(PROGRAM.replace(right, wrong))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *sorted(file.name for file in tmp_path.glob("*.py"))],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = {line.partition(":")[0] for line in done.stdout.splitlines() if ": error: " in line}
    assert found == {f"bad{i}.py" for i in range(len(WRONG))}, done.stdout + done.stderr


def test_the_package_shows_the_names_it_offers_and_no_others() -> None:
    assert dir(octavo) == sorted(octavo.__all__)
    assert all(getattr(octavo, name) is not None for name in octavo.__all__)
    assert (Path(octavo.__file__).parent / "py.typed").is_file()

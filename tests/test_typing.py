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
from octavo import LLM, KVFormat, OctavoError, SamplingParams

def answers(prompts: list[str]) -> list[str]:
    llm = LLM("model-dir", kv=KVFormat.parse("kv8"), max_batch_size=4, kv_cache_memory="4GiB")
    params = SamplingParams(max_tokens=64, temperature=0.7, seed=1)
    completions = llm.generate(prompts, params)
    return [completion.text for completion in completions if completion.finish_reason == "stop"]

def talk(question: str) -> str:
    llm = LLM()
    said = ""
    try:
        for piece in llm.chat([{"role": "user", "content": question}], stream=True):
            said += piece.text
        one = llm.chat([{"role": "user", "content": question}])
        said += one.text
        llm.save("talk.kv", question)
        said += str(llm.restore("talk.kv").cached_tokens)
    except OctavoError as error:
        print(error)
    return said
"""


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
    wrong = PROGRAM.replace("max_tokens=64", 'max_tokens="64"')
    (tmp_path / "good.py").write_text(PROGRAM)
    (tmp_path / "bad.py").write_text(wrong)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "good.py", "bad.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    [error] = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert error.startswith("bad.py:")
    assert "incompatible type" in error


def test_the_package_shows_the_names_it_offers_and_no_others() -> None:
    assert dir(octavo) == sorted(octavo.__all__)
    assert all(getattr(octavo, name) is not None for name in octavo.__all__)
    assert (Path(octavo.__file__).parent / "py.typed").is_file()

"""`llm -m octavo/DIR "…"`, with the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llm", reason="the extra octavo[llm] is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where llm keeps its settings and conversations."""
    return tmp_path_factory.mktemp("llm")


def llm(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LLM_USER_PATH": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "llm", *words], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_prompt_is_answered_and_the_conversation_goes_on(home: Path, tmp_path: Path):
    """A directory by its path; `-c` continues with the model that was used, which nothing names any more."""
    from octavo.models.model import BUNDLED

    model = tmp_path / "model"
    model.symlink_to(BUNDLED)
    options = ("-o", "max_tokens", "12", "-o", "temperature", "0", "-o", "kv", "fp32")
    first = llm(home, "-m", f"octavo/{model}", *options, "Tell me a story.")
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    more = llm(home, "-c", *options, "And then?")
    assert more.returncode == 0, more.stderr
    assert more.stdout.strip()


def test_a_format_that_there_is_none_of_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch):
    from click.testing import CliRunner
    from llm.cli import cli

    monkeypatch.setenv("LLM_USER_PATH", str(home))
    wrong = CliRunner().invoke(cli, ["-m", "octavo/pamphlet", "-o", "kv", "int9", "Hello"])
    assert wrong.exit_code == 1
    assert "there is no KV format" in wrong.output
    assert "Traceback" not in wrong.output


def test_llm_knows_the_bundled_model_without_loading_torch(home: Path):
    code = "import sys; import llm; llm.get_model('octavo/pamphlet'); print('torch' in sys.modules)"
    environment = os.environ | {"LLM_USER_PATH": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

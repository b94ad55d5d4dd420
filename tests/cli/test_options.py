"""Options: what the command line says is what an LLM and its sampling get, and nothing is accepted and ignored."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from octavo.cli import commands, main
from octavo.cli.loading import LoadOptions, ServeOptions
from octavo.cli.options import takes
from octavo.cli.sampling import SamplingOptions
from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from tests.conftest import status_of

DEFAULTS = SamplingParams(max_tokens=99, temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.1)


@dataclass
class Left:
    width: Annotated[int, typer.Option()] = 1


@dataclass
class Right:
    name: Annotated[str | None, typer.Option()] = None


class Reached(Exception):
    """A command came to the point where it loads its model."""


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of the command that wanted to load a model."""
    seen: list[Any] = []

    def load(self: LoadOptions, **_: Any) -> None:
        seen.append(self)
        raise Reached

    monkeypatch.setattr(LoadOptions, "load", load)
    monkeypatch.setattr("octavo.models.locate.require_known", lambda _: None)  # would ask the Hub
    return seen


def test_what_is_not_given_is_the_models_default() -> None:
    assert SamplingOptions().params(DEFAULTS) == DEFAULTS
    assert SamplingOptions(stop=[], stop_token_ids=[], ignore_eos=None).params(DEFAULTS) == DEFAULTS


def test_what_is_given_overrides_it_zero_too() -> None:
    params = SamplingOptions(temperature=0, top_k=0, seed=0, stop=["a", "b"], stop_token_ids=[5], ignore_eos=True)
    assert params.params(DEFAULTS) == SamplingParams(
        max_tokens=99, temperature=0, top_k=0, top_p=0.9, repetition_penalty=1.1, seed=0, stop=("a", "b"),
        stop_token_ids=(5,), ignore_eos=True,
    )  # fmt: skip


def test_a_cut_that_a_greedy_model_would_ignore_is_refused() -> None:
    greedy = SamplingParams()
    with pytest.raises(OctavoError, match="--top-p changes nothing"):
        SamplingOptions(top_p=0.9).params(greedy)
    assert SamplingOptions(top_p=0.9, temperature=0.5).params(greedy).top_p == 0.9
    assert SamplingOptions(top_p=0.9, temperature=0).params(greedy).temperature == 0  # greedy by the user's own word


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("flag", [("--top-p", "2"), ("--max-tokens", "0"), ("--temperature", "-1"), ("--stop", "")])
def test_nonsense_is_refused_before_a_model_is_loaded(
    verb: str, flag: tuple[str, str], reached: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(verb, *flag) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag[0][2:].replace('-', '_')} is ")
    assert not reached


def test_unknown_options_are_refused() -> None:
    assert status_of("generate", "--temprature", "1") == 2


def test_takes_hands_each_dataclass_its_own_fields() -> None:
    seen: list[Any] = []
    app = typer.Typer()

    @app.command()
    @takes(Left, Right)
    def command(left: Left, right: Right, own: Annotated[bool, typer.Option("--own")] = False) -> None:
        """What it does."""
        seen.append((left, right, own))

    runner = CliRunner()
    assert runner.invoke(app, ["--name", "x", "--own"]).exit_code == 0
    assert runner.invoke(app, ["--width", "3"]).exit_code == 0
    assert seen == [(Left(1), Right("x"), True), (Left(3), Right(None), False)]
    assert "What it does." in runner.invoke(app, ["--help"]).output


def test_quant_policy_is_the_pages_word_for_a_format() -> None:
    assert [ServeOptions(quant_policy=n).format_name() for n in (None, 0, 4, 8)] == [None, None, "int8", "int8"]
    assert ServeOptions(kv="int8", quant_policy=4).format_name() == "int8"
    with pytest.raises(OctavoError, match="contradict"):
        ServeOptions(kv="int4-token", quant_policy=4).format_name()
    with pytest.raises(OctavoError, match="not 3"):
        ServeOptions(quant_policy=3).format_name()


def test_the_pages_chat_command(reached: list[Any]) -> None:
    with pytest.raises(Reached):
        main(["chat", "turbomind", "internlm/internlm-chat-7b", "--model-format", "hf", "--quant-policy", "4"])
    (options,) = reached
    assert (options.model, options.model_format, options.format_name()) == ("internlm/internlm-chat-7b", "hf", "int8")


def test_the_pages_calibrate_command(reached: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it makes the directory MODEL
    monkeypatch.setattr("octavo.corpus.load_texts", lambda *_: ["text"])  # the Hub's, before the model is loaded
    line = "lite calibrate MODEL --calib-dataset ptb --calib-samples 128 --calib-seqlen 2048 --work-dir MODEL"
    with pytest.raises(Reached):
        main(line.split())
    assert reached[0].model == "MODEL"


def test_the_command_line_comes_up_without_torch() -> None:
    script = (
        "import sys, octavo.cli; print([m for m in ('torch', 'transformers', 'prompt_toolkit') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("verb", [[], ["serve"], ["chat"], ["scales", "import"], ["lite", "calibrate"]])
def test_help_names_types_of_options_that_take_a_value_alone(verb: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = CliRunner().invoke(commands(), [*verb, "--help"]).stdout
    assert "--help" in text
    assert "bool" not in text
    assert "<str>" in text or not verb


WRONG = {
    "chat ./nowhere": "There is no directory ./nowhere",
    f"generate {'once' * 100}": "File name too long",
    "chat smollm/mistyped": "There is no directory smollm/mistyped with a config.json, and the Hub cannot be",
    "memory smollm/mistyped": "There is no directory smollm/mistyped with a config.json, and the Hub cannot be",
    "chat --kv kv9": "did you mean kv8?",
    "accuracy --kv bf16,int8_token": "did you mean int8-token?",
    "speed --kv k8v": "did you mean k8v4?",
    "doctor --dtype fb16": "--dtype fb16: did you mean fp16?",
    "doctor --budget soon": "--budget soon: write a time like 90s",
    "calibrate --calib-dataset nothing.txt": "no set of texts named nothing.txt",
    "plan --memory 80": "'80' has no unit; write 80GiB",
    "serve --kv-cache-memory 4": "'4' has no unit; write 4GiB",
    "memory --batch-size 0": "--batch-size takes whole numbers",
    "serve --calibration nowhere": "there is no calibration at nowhere",
    "generate --prompt x --headroom 0": "a headroom of 0.0 makes no sense",
    "chat --chat-template none.jinja": "--chat-template none.jinja: there is no such file",
    "memory --device gpu": "there is no device 'gpu'",
    "plan --model-format gguf": "--model-format gguf: choose hf, awq",
    "quantize --work-dir x --dtype int8": "--dtype int8: choose auto",
    "generate --input nothing.jsonl": "nothing.jsonl cannot be read",
    "tune --bits 5 --text nothing.txt": "no set of texts named nothing.txt",
    "plan --fleet": "--fleet needs --sessions",
    "plan --plot x.bmp": "--plot x.bmp: a picture's name ends with .png",
    "report --out /dev/null/x": "nothing can be written in /dev/null/x",
    "scales show nowhere": "there is no nowhere",
    "serve --ssl-certfile none.pem": "TLS by none.pem is not possible: No such file",
    "tune --bits 5 --memory 4GiB": "one of them",
    "serve --api-key=": "--api-key is empty",
    "serve --session-dir /dev/null/x": "nothing can be written in /dev/null/x",
    "calibrate --work-dir /dev/null/x": "nothing can be written in /dev/null/x",
    "calibrate --calib-dataset blank.txt": "blank.txt holds no text",
    "tune --bits 5 --text latin.txt": "latin.txt is not UTF-8 text",
    "doctor --text blank.txt": "blank.txt holds no text",
    "report --out x --text latin.txt": "latin.txt is not UTF-8 text",
}
EACH = """
import sys
from pathlib import Path
from octavo.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as end:
        print(end.code, "torch" in sys.modules)
    print(file=sys.stderr)
"""


def test_wrong_arguments_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", EACH, *WRONG]
    done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=tmp_path)
    assert done.stdout.splitlines() == ["2 False"] * len(WRONG), done.stderr
    for told, message in zip(done.stderr.strip().split("\n\n"), WRONG.values(), strict=True):
        assert told.splitlines()[-1].startswith("error: ")
        assert message in told


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("octavo gen", ["generate"]),
        ("octavo scales e", ["export"]),
        ("octavo chat --max-b", ["--max-batch-size"]),
        ("octavo serve --kv tun", ["tuned"]),
        ("octavo accuracy --kv bf16,kv", ["bf16,kv8", "bf16,kv4"]),
        ("octavo doctor --dtype bf", ["bf16", "bfloat16"]),
    ],
)
def test_the_shell_completes_verbs_options_and_their_values(typed: str, told: list[str]) -> None:
    """As the script does that `octavo --install-completion` puts into a bash's start."""
    asked = {"_OCTAVO_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-c", "import sys; sys.argv = ['octavo']; from octavo.cli import main; main()"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == told, done.stderr


@pytest.mark.parametrize("said", [(), ("3 lines are answered",)])
def test_ctrl_c_ends_a_command_with_one_line_and_status_130(
    said: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr(LoadOptions, "load", load)
    assert status_of("doctor") == 130
    assert capsys.readouterr().err == ": ".join(("interrupted", *said)) + "\n"

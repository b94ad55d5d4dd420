"""`octavo generate` on the bundled model: one prompt to stdout, files of prompts into files that may be resumed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.loading import LoadOptions
from octavo.engine.params import SamplingParams
from octavo.llm import LLM, Delta
from octavo.models.model import Model
from tests.conftest import status_of

SHORT = ["--kv", "int8-token", "--temperature", "0", "--max-tokens", "12", "--session-len", "128"]
Run = Callable[..., int]


@pytest.fixture
def octavo(pamphlet: Model, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line on the bundled model that is loaded already; returns the exit status."""
    monkeypatch.setattr(LoadOptions, "load", lambda *_, **__: pamphlet)

    def run(*argv: object, stdin: bytes = b"") -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return status_of(*argv)

    return run


@pytest.fixture(scope="module")
def llm(pamphlet: Model) -> LLM:
    return LLM(pamphlet, "int8-token", session_len=128)


GREEDY = SamplingParams(max_tokens=12)


def records(path: Path) -> dict[int, dict[str, Any]]:
    return {record["line"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def texts(path: Path) -> dict[int, str]:
    return {number: record["text"] for number, record in records(path).items()}


# --- one prompt -------------------------------------------------------------------------------------------------------


def test_text_on_stdout_numbers_on_stderr(octavo: Run, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo("generate", "pamphlet", "Once upon a time", *SHORT) == 0
    out, err = capsys.readouterr()
    assert out == llm.generate("Once upon a time", GREEDY)[0].text + "\n"
    *said, numbers = err.splitlines(keepends=True)  # what the processor computes in comes first
    assert [line for line in said if line.startswith("warning: int8-token runs without a calibration")]
    # 15 of 16 tokens are stored: one block of 64 of 1,560 bytes each.
    assert numbers.startswith("4 tokens in, 12 out in ")
    assert numbers.endswith("finish: length · KV int8-token: 97.5 KiB, in 16 bits 192 KiB\n")


def test_a_text_in_place_of_a_model_is_shown_its_place(octavo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo("generate", "Once upon a time") == 2
    assert "--prompt" in capsys.readouterr().err


def test_json_is_one_document_and_nothing_else(octavo: Run, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo("generate", *SHORT, "--prompt", "Once upon a time", "--json", "--logprobs", "2") == 0
    document = json.loads(capsys.readouterr().out)
    expected = llm.generate("Once upon a time", SamplingParams(max_tokens=12, logprobs=2))[0]
    assert document["text"] == expected.text
    assert (document["finish_reason"], document["completion_tokens"], document["kv"]) == ("length", 12, "int8-token")
    assert (document["kv_bytes"], document["kv_bytes_16_bits"]) == (64 * 1560, 64 * 3072)
    assert [one["token"] for one in document["logprobs"]] == expected.token_ids
    assert all(one["top"][0]["logprob"] == one["logprob"] for one in document["logprobs"])  # greedy takes the best


def test_chat_puts_the_prompt_into_the_template(octavo: Run, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo("generate", *SHORT, "--prompt", "Tell me a story", "--chat") == 0
    expected = llm.chat([{"role": "user", "content": "Tell me a story"}], GREEDY)
    assert capsys.readouterr().out == expected.text + "\n"


@pytest.mark.parametrize("argv", [[], ["--prompt", "-"]])
def test_the_prompt_may_come_from_a_pipe(
    argv: list[str], octavo: Run, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert octavo("generate", *SHORT, *argv, stdin=b"Once upon a time\n") == 0
    assert capsys.readouterr().out == llm.generate("Once upon a time", GREEDY)[0].text + "\n"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "the prompt is empty"),
        (["--prompt", "x", "--logprobs", "1"], "add --json"),
        (["pamphlet", "x", "--prompt", "x"], "PROMPT and --prompt are the same"),
        (["--prompt", "x", "--input", "y"], "--input and a prompt exclude each other"),
        (["--json", "--input", "y"], "--input and --json"),
        (["--prompt", "x", "--output", "y"], "--output is for the answers to an --input"),
        (["--input", "no-such-file"], "no-such-file cannot be read: No such file"),
        (["--prompt", "a " * 200], "a session holds 128"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    argv: list[str], reason: str, octavo: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert octavo("generate", *SHORT, *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert reason in err.splitlines()[-1]


# --- a file of prompts ------------------------------------------------------------------------------------------------

GOOD = [
    {"prompt": "Once upon a time"},
    {"prompt": [1177, 590, 262], "id": "three", "max_tokens": 3, "logprobs": 1},
    {"messages": [{"role": "user", "content": "Tell me a story"}], "id": 17},
    {"prompt": "The cat", "stop": ["the", "a"], "temperature": 1.0, "seed": 5, "top_p": None},
]
BAD = {
    "{torn": "not JSON",
    "[1, 2]": "not a JSON object",
    '{"id": 1}': "either a prompt or messages",
    '{"prompt": "x", "messages": []}': "either a prompt or messages",
    '{"prompt": "x", "temprature": 1}': "unknown field 'temprature'",
    '{"prompt": 5}': "prompt is 5; it must be text",
    '{"prompt": "half \\ud800"}': "prompt holds half of a surrogate pair",
    '{"prompt": [1, "x"]}': "prompt[1] is 'x'; a prompt that is a list holds token ids",
    '{"prompt": [99999]}': "token 99999 is not in the model's vocabulary",
    '{"prompt": ""}': "the prompt is empty",
    '{"messages": [{"role": "user"}]}': "messages[0]['content'] is None; it must be text",
    '{"messages": [{"role": "user", "content": 5}]}': "messages[0]['content'] is 5; it must be text",
    '{"prompt": "x", "max_tokens": "5"}': "max_tokens is '5'; it must be a whole number",
    '{"prompt": "x", "max_tokens": true}': "max_tokens is True; it must be a whole number",
    '{"prompt": "x", "temperature": NaN}': "NaN is not a finite number",
    '{"prompt": "x", "stop": [1]}': "stop is [1]; it must be",
    '{"prompt": "x", "stop_token_ids": "3"}': "stop_token_ids is '3'; it must be a token id or a list",
    '{"prompt": "x", "ignore_eos": 1}': "ignore_eos is 1; it must be true or false",
    '{"prompt": "x", "frequency_penalty": "a"}': "frequency_penalty is 'a'; it must be a number",
    '{"prompt": "x", "logit_bias": {"a": 1}}': "logit_bias is {'a': 1}; it must be an object",
    '{"prompt": "x", "logit_bias": {"4096": 1}}': "token 4096 is not in the model's vocabulary",
    '{"prompt": "x", "seed": 1' + "0" * 5000 + "}": "not JSON that can be read",
    '{"prompt": "x", "json_schema": {"const": NaN}}': "NaN is not a finite number",
    '{"prompt": "x", "json_schema": 1}': "json_schema is 1; it must be a JSON schema",
    '{"prompt": "x", "json_schema": {"type": "y"}}': "the JSON schema cannot be served",
    json.dumps({"prompt": "a " * 200}): "a session holds 128",
    "[" * 100_000: "nested too deep",
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, GOOD)) + "\n")
    return path


def test_each_line_is_answered_as_if_it_were_alone(octavo: Run, llm: LLM, prompts: Path, tmp_path: Path) -> None:
    assert octavo("generate", *SHORT, "--input", prompts, "--output", tmp_path / "out.jsonl") == 0
    answers = records(tmp_path / "out.jsonl")
    assert {n: answer["id"] for n, answer in answers.items()} == {1: 1, 2: "three", 3: 17, 4: 4}
    alone = [
        llm.generate("Once upon a time", GREEDY)[0],
        llm.generate([1177, 590, 262], SamplingParams(max_tokens=3))[0],
        llm.chat([{"role": "user", "content": "Tell me a story"}], GREEDY),
        llm.generate("The cat", SamplingParams(max_tokens=12, temperature=1, seed=5, stop=("the", "a"), top_p=0.9))[0],
    ]
    for n, expected in enumerate(alone, 1):
        assert answers[n]["text"] == expected.text
        assert answers[n]["finish_reason"] == expected.finish_reason
        assert answers[n]["prompt_tokens"] == expected.prompt_tokens
        assert answers[n]["completion_tokens"] == len(expected.token_ids)
        assert answers[n]["cached_tokens"] == 0
    assert [n for n, answer in answers.items() if "logprobs" in answer] == [2]


def test_bad_lines_are_named_and_cost_the_others_nothing(
    octavo: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.encode() for line in BAD] + [b'{"prompt": "\xff"}', b"", json.dumps(GOOD[0]).encode()]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    assert octavo("generate", *SHORT, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl") == 1
    answers = records(tmp_path / "out.jsonl")
    err = capsys.readouterr().err
    for n, reason in enumerate([*BAD.values(), "not UTF-8"], 1):
        assert reason in answers[n]["error"]
        assert "text" not in answers[n]
        assert f"line {n}: {answers[n]['error']}" in err
    assert len(BAD) + 2 not in answers  # blank
    assert answers[len(BAD) + 3]["text"]
    assert f"{len(BAD) + 1} lines could not be served" in err


def test_without_output_answers_go_to_stdout(octavo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo("generate", *SHORT, "--input", "-", stdin=json.dumps(GOOD[0]).encode()) == 0
    assert json.loads(capsys.readouterr().out)["line"] == 1


def test_an_interrupted_file_is_gone_on_with(
    octavo: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    octavo("generate", *SHORT, "--input", prompts, "--output", whole)
    real = LLM.generate

    def interrupted(self: LLM, *args: Any, **more: Any) -> Iterator[Delta]:
        for delta in real(self, *args, **more):
            yield delta
            if delta.completion:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "generate", interrupted)
        assert octavo("generate", *SHORT, "--input", prompts, "--output", path) == 130
    assert "interrupted: 1 line answered; the same command goes on" in capsys.readouterr().err
    first = path.read_bytes()
    assert first.count(b"\n") == 1

    for torn in (b"", b'{"li', b'{"line": 1, "id": 1, "text": "\xe2\x82'):
        path.write_bytes(first + torn)
        assert octavo("generate", *SHORT, "--input", prompts, "--output", path) == 0
        assert "1 of 4 lines are answered" in capsys.readouterr().err
        assert path.read_bytes().startswith(first)
        assert texts(path) == texts(whole)

    before = path.read_bytes()
    assert octavo("generate", *SHORT, "--input", prompts, "--output", path) == 0  # nothing is left to do
    assert path.read_bytes() == before


def test_lines_that_failed_get_another_chance(octavo: Run, tmp_path: Path) -> None:
    source, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{json.dumps(GOOD[0])}\n{{oops\n")
    assert octavo("generate", *SHORT, "--input", source, "--output", path) == 1
    source.write_text(f"{json.dumps(GOOD[0])}\n{json.dumps(GOOD[1])}\n")
    assert octavo("generate", *SHORT, "--input", source, "--output", path) == 0
    assert [record.get("error") for record in records(path).values()] == [None, None]
    assert len(path.read_bytes().splitlines()) == 2


def test_answers_to_something_else_are_not_touched(
    octavo: Run, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    octavo("generate", *SHORT, "--input", prompts, "--output", path)
    before = path.read_bytes()
    capsys.readouterr()
    for changed in (["--seed", "3"], ["--kv", "int4-token"], ["--chat"]):
        assert octavo("generate", *SHORT, *changed, "--input", prompts, "--output", path) == 2
        assert "or was made with other options: name another --output" in capsys.readouterr().err
    # How fast is not what.
    assert octavo("generate", *SHORT, "--max-batch-size", 2, "--input", prompts, "--output", path) == 0
    prompts.write_text(json.dumps({"prompt": "Another"}))
    assert octavo("generate", *SHORT, "--input", prompts, "--output", path) == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["a diary", "a diary\n", '{"prompt": "x"}\n', '{"line": 1}', "[]\n"])
def test_a_file_of_another_kind_is_not_touched(content: str, octavo: Run, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    status = octavo("generate", *SHORT, "--input", prompts, "--output", path)
    if content == '{"line": 1}':  # how a torn answer looks
        assert status == 0
    else:
        assert (status, path.read_text()) == (2, content)


def test_a_full_disk_is_one_line(octavo: Run, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    assert octavo("generate", *SHORT, "--input", prompts, "--output", "/dev/full") == 2
    assert "error: /dev/full cannot be written: No space left on device" in capsys.readouterr().err

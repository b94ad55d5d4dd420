"""`octavo chat`: transcripts with scripted answers, the cache's work between turns, and one real terminal."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo.cache.session import SavedSession
from octavo.cli import main
from octavo.cli.chat import Chat, _Stop
from octavo.cli.conversation import Conversation
from octavo.cli.loading import LoadOptions
from octavo.cli.wrap import Wrap
from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.llm import LLM, Completion, Delta
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from tests.conftest import status_of

STOP = object()  # in a script: Ctrl-C


class Scripted(LLM):
    """An LLM whose answers are known: lists of pieces, in their order."""

    def __init__(self, model: Model, *answers: list[Any], **options: Any):
        super().__init__(model, "int8-token", session_len=256, **options)
        self.answers = list(answers)
        self.prompts: list[str] = []
        self.closed = 0

    def generate(self, prompts: Any, _: Any = None, *, stream: bool = False) -> Any:
        assert stream
        return self._pieces(prompts)

    def _pieces(self, prompt: list[int]) -> Iterator[Delta]:
        self.engine.add(sequence := self.sequence(prompt, SamplingParams()))
        self.engine.finish(sequence)
        self.prompts.append(self.tokenizer.decode(prompt))
        try:
            for piece in (pieces := self.answers.pop(0)):
                if piece is STOP:
                    raise KeyboardInterrupt
                yield Delta(0, piece)
            yield Delta(0, "", Completion("".join(pieces), [5] * len(pieces), "stop", len(prompt), 0, []))
        finally:
            self.closed += 1


def talk(llm: LLM, *lines: str, monkeypatch: pytest.MonkeyPatch, params: SamplingParams | None = None) -> Conversation:
    """A whole chat with these lines in the pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    conversation = Conversation(llm, params or SamplingParams(max_tokens=8))
    Chat(conversation).run()
    return conversation


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


# --- transcripts ------------------------------------------------------------------------------------------------------


def test_a_chat_from_a_pipe(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = Scripted(pamphlet, ["Hel", "lo", "."], ["Yes."])
    talk(llm, "Hi", "", "two\\", "lines", "/quit", "never", monkeypatch=monkeypatch)
    out, err = capsys.readouterr()
    assert out == "Hello.\nYes.\n"
    assert err.splitlines()[0].startswith("octavo ")
    assert "pamphlet on cpu · sessions of up to 256 tokens" in err.splitlines()[0]
    # float32 weights, but what the cache would take is compared with 16 bits.
    assert err.splitlines()[1] == "KV cache int8-token · 1,560 bytes per token, in 16 bits 3,072 (1.97 times)"
    assert err.splitlines()[2].startswith("/help")
    assert llm.prompts == [
        "<|user|>Hi<|end|><|assistant|>",
        "<|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>two\nlines<|end|><|assistant|>",
    ]
    assert llm.closed == 2


@pytest.mark.filterwarnings("always:too large")
def test_a_warning_comes_after_the_answer_that_it_is_about(pamphlet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the middle of its last line."""

    class Warned(Scripted):
        def _pieces(self, prompt: list[int]) -> Iterator[Delta]:
            yield Delta(0, "Hel")
            warnings.warn("too large", stacklevel=1)
            yield from super()._pieces(prompt)

    llm, seen = Warned(pamphlet, ["lo."]), io.StringIO()
    monkeypatch.setattr(sys, "stdout", seen)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: seen.write(f"warning: {message}\n"))
    talk(llm, "Hi", monkeypatch=monkeypatch)
    assert seen.getvalue() == "Hello.\nwarning: too large\n"


def test_commands(pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm = Scripted(pamphlet, ["a"], ["b"], ["c"], ["d"])
    lines = ["/system Be brief.", "1", "/clear", "2", "/system", "/system -", "3", " /not a command", "/help", "/nix"]
    talk(llm, *lines, monkeypatch=monkeypatch)
    out, err = capsys.readouterr()
    assert out.splitlines()[:4] == ["a", "b", "c", "d"]
    assert [line.split()[0] for line in out.splitlines()[4:]] == [
        "/help", "/system", "/clear", "/params", "/stats", "/save", "/load", "/quit",
    ]  # fmt: skip
    assert err.splitlines()[4:] == [
        "(system prompt: Be brief.)",
        "(the conversation is forgotten; the system prompt stays)",
        "(system prompt: Be brief.)",
        "(no system prompt)",
        "error: there is no command /nix; there are /help, /system, /clear, /params, /stats, /save, /load, /quit "
        "(a message that begins with / takes a space before it)",
    ]
    # pamphlet's template knows no system role and shows it as a message of the user's.
    assert llm.prompts[1] == "<|user|>Be brief.<|end|><|user|>2<|end|><|assistant|>"
    assert llm.prompts[3].endswith("<|assistant|>c<|end|><|user|> /not a command<|end|><|assistant|>")


def test_params_says_what_is_in_force_and_who_has_set_it(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's generation config asks for 0.7 and 0.9, and nobody for a penalty."""
    monkeypatch.setattr(LoadOptions, "load", lambda *_, **__: pamphlet)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/params\n"))
    with pytest.raises(SystemExit):
        main(["chat", "--session-len", "128", "--top-p", "0.8", "--stop", "END"])
    assert [line.rstrip().split(maxsplit=2) for line in capsys.readouterr().out.splitlines()] == [
        ["max_tokens", "256", "(the model's generation config)"],
        ["temperature", "0.7", "(the model's generation config)"],
        ["top_p", "0.8", "(the command line)"],
        ["stop", "END", "(the command line)"],
    ]


@pytest.mark.parametrize("command", ["/help", "/params"])
def test_what_is_too_wide_for_the_screen_stays_in_its_column(
    command: str, pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    Chat(Conversation(Scripted(pamphlet), SamplingParams(temperature=0)), interactive=True).command(command, "")
    lines = capsys.readouterr().out.rstrip().splitlines()
    column = re.match(r"  \S+( [A-Z]+)?  +", lines[0]).end()  # type: ignore[union-attr]
    starts = [len(line) - len(line.lstrip()) for line in lines]
    assert set(starts) >= {2, column}
    assert all(start == 2 or start >= column for start in starts)
    assert max(map(len, lines)) <= 50


def test_stats(
    pamphlet: Model, calibration: Calibration, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM(pamphlet, "int8", calibration=calibration, session_len=512)
    tell = "Tell me a story about a cat that goes to the park and finds a friend there, and they play. " * 3
    talk(llm, "/stats", tell, "And then?", "/stats", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    first, second = (block.partition("out of range")[0] for block in out.split("16 bits")[1:])
    assert "this conversation        0 B        0 B" in first
    assert "bytes per token        1,536      3,072" in second
    assert "this conversation    192 KiB    384 KiB" in second
    assert "the whole cache     12.0 MiB   24.0 MiB" in second
    assert "calibrated ranges   18.0 KiB" in second
    tokens = next(line for line in second.splitlines() if line.startswith("tokens"))
    stored = int(tokens.split()[1])
    assert 64 < stored <= 128
    assert tokens.split()[2:] == ["of", "512"]
    assert f"2 of 128, of 64 tokens each; the last one holds {stored - 64}" in second
    # The first message fills one block, found again with the second.
    assert "64 of its " in second


# --- the conversation -------------------------------------------------------------------------------------------------


def test_turns_find_each_other_in_the_cache(pamphlet: Model) -> None:
    conversation = Conversation(LLM(pamphlet, "int8-token", session_len=256), SamplingParams(max_tokens=70))
    "".join(conversation.ask("Tell me a story"))
    assert conversation.last is not None
    assert conversation.last.cached_tokens == 0
    "".join(conversation.ask("Go on"))
    assert conversation.last.cached_tokens == 64
    assert conversation.footprint().tokens == conversation.last.prompt_tokens + conversation.last.answer_tokens - 1


def test_a_stopped_answer_stays_as_far_as_it_came(pamphlet: Model) -> None:
    llm = Scripted(pamphlet, ["one", " two", " three"], ["four", STOP], [STOP], ["five"])
    conversation = Conversation(llm, SamplingParams())
    pieces = conversation.ask("count")
    assert [next(pieces), next(pieces)] == ["one", " two"]
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "one two"}
    assert conversation.last is not None
    assert (conversation.last.finish_reason, conversation.last.cached_tokens) == ("abort", None)
    for text, kept in (("more", 4), ("nothing said", 4)):
        with pytest.raises(KeyboardInterrupt):
            list(conversation.ask(text))
        assert len(conversation.messages) == kept
    assert list(conversation.ask("last")) == ["five"]
    assert llm.prompts[-1].endswith(
        "one two<|end|><|user|>more<|end|><|assistant|>four<|end|><|user|>last<|end|><|assistant|>"
    )
    assert llm.closed == 4


def test_a_stopped_answer_gives_its_blocks_back(pamphlet: Model) -> None:
    llm = LLM(pamphlet, "int8-token", session_len=256)
    pieces = Conversation(llm, SamplingParams()).ask("Tell me a story")
    next(pieces)
    pieces.close()
    assert not llm.engine.busy
    llm.engine.scheduler.check()


def test_a_session_that_is_full(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM(pamphlet, "int8-token", session_len=48)
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    talk(llm, "Tell me a story", "And then?", "/clear", "a " * 200, "Hi", monkeypatch=monkeypatch, params=params)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 2
    full = "(the session is full with 48 tokens: /clear, or start with a larger --session-len)"
    refused = [line for line in err.splitlines() if line.startswith("error")]
    assert err.count(full) == 2
    assert len(refused) == 2
    assert all("but a session holds 48" in line and "/clear starts a new conversation" in line for line in refused)


def test_what_is_cut_off_says_so(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(LLM(pamphlet, "int8-token", session_len=128), "Tell me a story", monkeypatch=monkeypatch)
    assert capsys.readouterr().err.endswith("(cut off after 8 tokens (--max-tokens))\n")


def test_save_and_load(
    pamphlet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a chat.kv"
    talk(Scripted(pamphlet, ["Hé"]), "/system Be", "Hi", f"/save {path}", f"/save {path}", monkeypatch=monkeypatch)
    assert f"(2 messages saved in {path}, with the cache of 0 tokens)" in capsys.readouterr().err
    llm = Scripted(replace(pamphlet, name="other"), ["gone"], ["b"])
    conversation = talk(llm, "old", f"/load {path}", "new", monkeypatch=monkeypatch)
    assert conversation.system == "Be"
    assert llm.prompts[1] == "<|user|>Be<|end|><|user|>Hi<|end|><|assistant|>Hé<|end|><|user|>new<|end|><|assistant|>"
    assert f"(2 messages taken up from {path}, held with pamphlet)" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a chat.kv"]


def test_a_loaded_conversation_is_not_prefilled_and_goes_on_as_the_saved_one(
    pamphlet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, params = tmp_path / "chat.kv", SamplingParams(max_tokens=90, ignore_eos=True)

    def talking(*lines: str, kv: str = "int8-token") -> tuple[Conversation, str, str]:
        llm = LLM(pamphlet, kv, session_len=512)
        conversation = talk(llm, *lines, monkeypatch=monkeypatch, params=params)
        return conversation, *capsys.readouterr()

    first, out, err = talking("Tell me a story", f"/save {path}", "And then?")
    assert "with the cache of 64 tokens)" in err
    again, continued, err = talking(f"/load {path}", "And then?")
    assert re.search(r"\(64 of their \d+ tokens are cached already\)", err)
    assert again.last is not None
    assert again.last.cached_tokens == 64
    assert out.endswith(continued)
    assert again.messages == first.messages

    # In another format the text is taken up all the same.
    other, _, err = talking(f"/load {path}", "And then?", kv="int4-token")
    assert "holds int8-token codes, and this cache int4-token" in err
    assert other.last is not None
    assert other.last.cached_tokens == 0
    assert other.messages[:3] == first.messages[:3]


def test_an_empty_conversation_is_saved_too(pamphlet: Model, tmp_path: Path) -> None:
    conversation = Conversation(Scripted(pamphlet), SamplingParams(), "Be")
    assert conversation.save(tmp_path / "none.kv") == 0
    conversation.system = None
    conversation.load(tmp_path / "none.kv")
    assert (conversation.system, conversation.messages) == ("Be", [])


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        (None, "not a file of Octavo's"),
        ({}, "a saved session, but not of a chat"),
        ({"kind": "octavo chat", "version": 2}, "a chat of version 2"),
        ({"kind": "octavo chat", "version": 1, "model": "m", "messages": [{}]}, "it must be a message like"),
        ({"kind": "octavo chat", "version": 1, "model": "m"}, "it must be a list of messages"),
        ({"kind": "octavo chat", "version": 1, "model": 3, "messages": []}, "model or system prompt is not text"),
    ],
)
def test_other_files_are_neither_loaded_nor_overwritten(
    about: Any, reason: str, pamphlet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "file"
    llm = Scripted(pamphlet, ["a"])
    if about is None:
        path.write_bytes(b"some other file")
    else:
        llm.save(path, [], about)
    before = path.read_bytes()
    conversation = talk(llm, "Hi", f"/load {path}", f"/save {path}", monkeypatch=monkeypatch)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert reason in errors[0]
    assert len(conversation.messages) == 2
    assert path.read_bytes() == before


def test_files_that_cannot_be(
    pamphlet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/save", "/load", f"/load {tmp_path}/none", f"/save {tmp_path}/no/dir", "/save " + "x" * 300, "/save a\0b"]
    talk(Scripted(pamphlet), *lines, f"/load {tmp_path}", monkeypatch=monkeypatch)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 7
    assert errors[0] == "error: /save takes a file name: /save chat.kv"
    assert errors[2] == f"error: {tmp_path}/none: No such file or directory"


def test_a_model_without_a_template(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pamphlet.tokenizer, "chat_template", None)
    monkeypatch.setattr(LoadOptions, "load", lambda *_, **__: pamphlet)
    assert status_of("chat") == 2
    err = capsys.readouterr().err
    assert "--chat-template" in err
    assert "octavo generate" in err


def test_a_template_that_refuses_costs_one_message(pamphlet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    monkeypatch.setattr(pamphlet.tokenizer, "chat_template", refusing)
    conversation = Conversation(Scripted(pamphlet, ["a"]), SamplingParams())
    conversation.system = "Be"
    with pytest.raises(OctavoError, match="no system here"):
        list(conversation.ask("Hi"))
    conversation.system = None
    assert list(conversation.ask("Hi")) == ["a"]


def test_the_command_itself(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LoadOptions, "load", lambda *_, **__: pamphlet)
    # A byte that is no UTF-8 reaches the model as U+FFFD.
    raw = io.TextIOWrapper(io.BytesIO(b"Tell me a story\xff\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", raw)
    options = ["--kv", "int8-token", "--session-len", "128", "--temperature", "0", "--max-tokens", "9"]
    assert status_of("chat", "turbomind", *options) == 0
    llm = LLM(pamphlet, "int8-token", session_len=128)
    expected = llm.chat([{"role": "user", "content": "Tell me a story\ufffd"}], SamplingParams(max_tokens=9))
    assert capsys.readouterr().out == expected.text + "\n"


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_words_are_not_broken_at_the_edge() -> None:
    wrap = Wrap(width=10)
    pieces = ["The ", "qui", "ck brown", " fox\njum", "ps ", "over\tincomprehensibilities", " x\x1b[31m"]
    text = "".join(map(wrap.push, pieces)) + wrap.flush()
    assert text == "The quick \nbrown fox\njumps over\nincomprehensibilities x[31m"
    assert Wrap(width=4).push("full \nnext line ") == "full\nnext\nline"
    wide = Wrap(width=10)
    assert wide.push("漢字") == "漢字"  # no space will come


def test_ctrl_c_waits_for_the_engine_to_rest_once_there_is_text() -> None:
    stop = _Stop()
    with pytest.raises(KeyboardInterrupt):  # the prompt may take long to read
        stop.press()
    stop = _Stop()
    stop.speaking = True
    stop.press()
    assert stop.pressed
    with pytest.raises(KeyboardInterrupt):  # nothing reacts
        stop.press()


def test_history_that_cannot_be_kept_is_not_fatal(tmp_path: Path) -> None:
    from octavo.cli.keyboard import History

    history = History(tmp_path / "state" / "octavo" / "history")
    history.store_string("one\ntwo")
    assert list(History(tmp_path / "state" / "octavo" / "history").load_history_strings()) == ["one\ntwo"]
    for impossible in (tmp_path, Path("/dev/null/history"), Path("/dev/full")):
        broken = History(impossible)
        broken.store_string("lost")
        if impossible != Path("/dev/full"):  # an endless file of zeros
            assert list(broken.load_history_strings()) == []


class Terminal:
    """A child under a terminal of its own, typed at and read from through pipes."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        command = [sys.executable, "-c", f"import pty; pty.spawn({[sys.executable, *argv]!r})"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.seen = ""

    def type(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What has come up to `text`, which is then behind us."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            new = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            assert new, f"{text!r} did not come, but {self.seen!r}"
            self.seen += new.decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty on Windows")
def test_in_a_real_terminal(tmp_path: Path) -> None:
    env = {
        **os.environ, "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "LINES": "40",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    argv = ["chat", "--kv", "int8-token", "--temperature", "0", "--max-tokens", "1900", "--ignore-eos"]
    terminal = Terminal(["-c", "from octavo.cli import main; main()", *argv], env)
    try:
        terminal.wait_for("Ctrl-D quits")
        terminal.wait_for("›")
        terminal.type("Tell me a sto\x1b\rry\r")  # Alt-Enter: a line of its own
        terminal.wait_for("Once upon a time,")
        terminal.type("\x03")
        assert len(terminal.wait_for("(stopped)")) < 4000
        terminal.wait_for("›")
        terminal.type("/stats\r")
        terminal.wait_for("1,560")
        terminal.wait_for("of 512, of 64 tokens each")
        terminal.wait_for("›")
        terminal.type(f"/save {tmp_path}/chat.kv\r")
        terminal.wait_for("2 messages saved")
        terminal.wait_for("›")
        terminal.type("half a line\x03\x03")  # cleared; then there is nothing to clear
        terminal.wait_for("/quit leaves the chat")
        terminal.type("/quit\r")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
    user, answer = SavedSession.open(tmp_path / "chat.kv").about["messages"]
    assert user["content"] == "Tell me a sto\nry"
    assert answer["content"].startswith("Once upon a time,")
    assert "+Tell me a sto\n+ry\n" in (tmp_path / "octavo" / "chat_history").read_text()

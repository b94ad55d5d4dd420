"""`octavo chat`: a conversation in the terminal, or one message per line from a pipe.

Answers and what commands show go to stdout; the banner, notes and errors to stderr. All about the conversation itself
is in conversation.py; this is where it meets keys and screen.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.loading import ServeOptions
from octavo.cli.options import option, takes, tell_loading
from octavo.cli.progress import warnings_after
from octavo.cli.sampling import SamplingOptions
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.cli.conversation import Conversation

COMMANDS = {
    "/help": "what can be typed here",
    "/system TEXT": "set the system prompt; `/system` shows it, `/system -` removes it",
    "/clear": "forget the conversation",
    "/params": "the sampling parameters in force, and who has set them",
    "/stats": "what the conversation takes in the cache",
    "/save FILE": "write the conversation and its cache to a file",
    "/load FILE": "take up a saved conversation where it was",
    "/quit": "leave; so does Ctrl-D",
}
NAMES = [usage.split()[0] for usage in COMMANDS]
KEYS = {
    "Alt-Enter": "a new line; so do Esc and then Enter, and a \\ at the line's end",
    "Ctrl-C": "stop the answer, or clear the line",
}


@takes(ServeOptions, SamplingOptions)
def chat(
    options: ServeOptions, sampling: SamplingOptions, system: Annotated[str | None, option("System prompt.")] = None
) -> None:
    """Talk to a model in the terminal, or pipe in a message per line."""
    tell_loading(options.model)
    from octavo.cli.conversation import Conversation

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    llm = options.llm(told=True)
    defaults = llm.default_params
    if not llm.model.generation.get("max_new_tokens"):
        defaults = replace(defaults, max_tokens=llm.session_len)  # an answer ends where its model ends it
    Chat(Conversation(llm, sampling.params(defaults), system), interactive, sampling.given()).run()


class Chat:
    """Lines in, answers out. `interactive`: there is someone at a terminal. `given`: the sampling parameters that the
    command line has set."""

    def __init__(self, conversation: Conversation, interactive: bool = False, given: Collection[str] = ()):
        from rich.console import Console

        self.conversation, self.interactive, self.given = conversation, interactive, given
        self.screen = Console(highlight=False, soft_wrap=not interactive)
        self.notes = Console(stderr=True, highlight=False, soft_wrap=not interactive)

    def run(self) -> None:
        self._banner()
        for line in _keyboard() if self.interactive else _pipe():
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    name, _, argument = line.strip().partition(" ")
                    if name == "/quit":
                        return
                    self.command(name, argument.strip())
                else:
                    self.answer(line)
            except OctavoError as error:
                self.notes.print(f"error: {error}", style="red", markup=False)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise

    def answer(self, text: str) -> None:
        """Stream an answer; Ctrl-C at a terminal stops it."""
        from octavo.cli.wrap import Wrap

        wrap = Wrap() if self.interactive else None
        asked = closing(self.conversation.ask(text))
        with warnings_after(), asked as pieces, _stoppable(self.interactive) as stop:
            try:
                for piece in pieces:
                    stop.speaking = True
                    print(wrap.push(piece) if wrap else piece, end="", flush=True)
                    if stop.pressed:
                        break
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
            finally:
                if stop.speaking:
                    print(wrap.flush() if wrap else "", flush=True)
        if stop.pressed:
            self._note("stopped" if stop.speaking else "stopped before the answer began; the message is not kept")
        else:
            self._limits()
        if self.interactive:
            print()

    def command(self, name: str, argument: str) -> None:
        if name not in NAMES:
            raise OctavoError(
                f"there is no command {name}; there are {', '.join(NAMES)} (a message that begins with / "
                "takes a space before it)"
            )
        getattr(self, "_" + name[1:])(argument)

    def _help(self, _: str) -> None:
        from octavo.cli.tables import listing

        rows = listing()
        for usage, meaning in (COMMANDS | KEYS if self.interactive else COMMANDS).items():
            rows.add_row(f"[bold]{usage}[/]", meaning)
        self.screen.print(rows)

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.system = None if argument == "-" else argument
        self._note(f"system prompt: {self.conversation.system}" if self.conversation.system else "no system prompt")

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        kept = "; the system prompt stays" if self.conversation.system else ""
        self._note(f"the conversation is forgotten{kept}")

    def _params(self, _: str) -> None:
        from octavo.cli.tables.chat import show_params

        show_params(self.conversation, self.given, self.screen)
        self._note("all others are off")

    def _stats(self, _: str) -> None:
        from octavo.cli.tables.chat import show_stats

        show_stats(self.conversation, self.screen)

    def _save(self, argument: str) -> None:
        path = _file("/save", argument)
        kept = self.conversation.save(path)
        self._note(f"{len(self.conversation.messages)} messages saved in {path}, with the cache of {kept:,} tokens")

    def _load(self, argument: str) -> None:
        path = _file("/load", argument)
        loaded = self.conversation.load(path)
        other = "" if loaded.model == self.conversation.llm.model.name else f", held with {loaded.model}"
        self._note(f"{len(self.conversation.messages)} messages taken up from {path}{other}")
        if loaded.refused:
            self._note(f"their cache is not, so the next message computes it again: {loaded.refused}")
        else:
            self._note(f"{loaded.cached_tokens:,} of their {loaded.tokens:,} tokens are cached already")

    def _limits(self) -> None:
        """Say why an answer that did not end by itself ended."""
        last, capacity = self.conversation.last, self.conversation.capacity
        if last is None or last.finish_reason != "length":
            return
        if last.prompt_tokens + last.answer_tokens >= capacity:
            self._note(f"the session is full with {capacity:,} tokens: /clear, or start with a larger --session-len")
        else:
            self._note(f"cut off after {last.answer_tokens:,} tokens (--max-tokens)")

    def _note(self, text: str) -> None:
        self.notes.print(f"({text})", style="dim", markup=False)

    def _banner(self) -> None:
        from rich.markup import escape

        from octavo import __version__
        from octavo.measure.memory.footprint import Footprint
        from octavo.units import format_bytes

        llm, one = self.conversation.llm, Footprint.of(self.conversation.llm, 1)
        where = f"{llm.model.bound.device} · sessions of up to {self.conversation.capacity:,} tokens"
        self.notes.print(f"[bold]octavo {__version__}[/] · [bold]{escape(llm.model.name)}[/] on {where}")
        size, in_16 = one.size, one.size_16.token
        beside = f", in 16 bits {in_16:,} ({in_16 / size.token:.2f} times)" if in_16 != size.token else ""
        edges = f", and {format_bytes(size.session(0))} for the edges of a session" if size.ring else ""
        states = f", and {format_bytes(size.states)} for states" if size.states else ""
        self.notes.print(f"KV cache [bold]{one.format}[/] · {size.token:,} bytes per token{beside}{edges}{states}")
        self.notes.print("/help lists the commands · Ctrl-C stops an answer · Ctrl-D quits\n", style="dim")


def _file(command: str, argument: str) -> Path:
    if not argument or "\0" in argument:
        raise OctavoError(f"{command} takes a file name: {command} chat.kv")
    return Path(argument).expanduser()


def _pipe() -> Iterator[str]:
    """Messages from stdin, one per line; a line that ends with a backslash goes on with the next."""
    lines: list[str] = []
    for line in sys.stdin:
        lines.append(line.rstrip("\r\n"))
        if lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
        else:
            yield _clean("\n".join(lines))
            lines = []
    if lines:
        yield _clean("\n".join(lines))


def _keyboard() -> Iterator[str]:
    from octavo.cli.keyboard import session

    keyboard = session(NAMES)
    while True:
        try:
            yield _clean(keyboard.prompt())
        except KeyboardInterrupt:  # between two prompts
            continue
        except EOFError:
            return


def _clean(text: str) -> str:
    """Without what no tokenizer takes: bytes that were not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextmanager
def _stoppable(interactive: bool) -> Iterator[_Stop]:
    stop = _Stop()
    if not interactive:
        yield stop
        return
    from octavo.cli.keyboard import no_echo

    before = signal.signal(signal.SIGINT, stop.press)
    try:
        with no_echo():
            yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _Stop:
    """Ctrl-C during an answer: looked at between two pieces, where the engine is at rest. As long as there is no piece,
    because the prompt is still being read, it interrupts at once; so does a second one."""

    def __init__(self) -> None:
        self.pressed = self.speaking = False

    def press(self, *_: Any) -> None:
        at_once = self.pressed or not self.speaking
        self.pressed = True
        if at_once:
            raise KeyboardInterrupt

"""A file of prompts, and the file of their answers, which can be taken up again where it was left.

Every line is its own request: one that cannot be served is answered by its error and costs the others nothing. Lines
have the numbers an editor shows. An answer carries its line's number and `request`, a hash of the line and of all
options that shape answers: what is in the output already is recognized by it, and an output of other prompts or other
options is refused before a model is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from octavo.engine.params import SamplingParams, allowed
from octavo.errors import OctavoError
from octavo.inputs import read_messages, read_prompt

if TYPE_CHECKING:
    from octavo.llm import LLM

START = b'{"line": '  # how every answer begins


@dataclass(frozen=True)
class Line:
    """A line of the input that is not blank."""

    number: int
    text: bytes
    request: str  # identifies the answer

    @property
    def id(self) -> Any:
        """The line's own id, or its number."""
        with suppress(OctavoError):
            return _fields(self.text).get("id", self.number)
        return self.number


def read_lines(file: BinaryIO, options: dict[str, Any]) -> list[Line]:
    """The requests of a file; `options` are those that shape the answers."""
    key = blake2b(json.dumps(options, sort_keys=True, default=str).encode(), digest_size=16).digest()
    return [
        Line(number, text, blake2b(text, key=key, digest_size=8).hexdigest())
        for number, text in enumerate(map(bytes.strip, file), 1)
        if text
    ]


def parse(text: bytes, llm: LLM, defaults: SamplingParams, chat: bool) -> tuple[list[int], SamplingParams]:
    """The prompt's tokens and the sampling parameters a line asks for; raises OctavoError for what cannot be served."""
    from octavo.text import encode_chat

    asked = _fields(text)
    asked.pop("id", None)
    if ("prompt" in asked) == ("messages" in asked):
        raise OctavoError("a line holds either a prompt or messages")
    if "messages" in asked:
        messages = read_messages(asked.pop("messages"))
    else:
        prompt = read_prompt(asked.pop("prompt"))
        messages = [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else []
    params = replace(defaults, **{name: value for name, value in asked.items() if value is not None})
    sequence = llm.sequence(encode_chat(llm.tokenizer, messages) if messages else prompt, params)
    llm.engine.scheduler.expect_room(sequence)
    return sequence.tokens, params


class Output:
    """The file of answers, one JSON object in each line, written as they come."""

    def __init__(self, path: Path | None, lines: Iterable[Line]):
        """Take up the file if there is one; with no path stdout. `answered` are the numbers of the lines in it. A torn
        last line is cut off, and so are errors: their lines get another chance."""
        self.path = path
        self.answered: set[int] = set()
        if path is None:
            return
        try:
            old = path.read_bytes() if path.is_file() else b""  # a device is no file
            kept = self._recognize(old, {line.number: line.request for line in lines})
            if kept != old:
                part = path.with_name(f".{path.name}.{os.getpid()}.part")
                part.write_bytes(kept)
                part.replace(path)
            self.file: BinaryIO = path.open("ab")
        except OSError as error:
            raise OctavoError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, line: Line, answer: dict[str, Any]) -> None:
        record = {"line": line.number, "id": line.id, "request": line.request, **answer}
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        if self.path is None:
            print(text.decode(), end="", flush=True)
            return
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as error:
            raise OctavoError(
                f"{self.path} cannot be written: {error.strerror}; the same command goes on later"
            ) from None

    def _recognize(self, old: bytes, requests: dict[int, str]) -> bytes:
        """The answers of `old` that stay."""
        *whole, torn = old.split(b"\n")
        if not (torn.startswith(START) or START.startswith(torn)):
            raise OctavoError(f"{self.path} is not a file of answers: name another --output")
        kept = []
        for number, text in enumerate(whole, 1):
            try:
                answer = json.loads(text)
                line, request, failed = answer["line"], answer["request"], "error" in answer
            except (ValueError, RecursionError, TypeError, KeyError):
                raise OctavoError(f"line {number} of {self.path} is not an answer: name another --output") from None
            if failed:
                continue
            if requests.get(line) != request:
                raise OctavoError(
                    f"line {number} of {self.path} answers another prompt than line {line} of the input, or was made "
                    "with other options: name another --output"
                )
            self.answered.add(line)
            kept.append(text + b"\n")
        return b"".join(kept)


def _fields(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError:
        raise OctavoError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise OctavoError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise OctavoError("not JSON that can be read: nested too deep") from None
    except ValueError as error:  # NaN, an integer of too many digits
        raise OctavoError(f"not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise OctavoError('not a JSON object: a line is like {"prompt": "…"}')
    known = ["id", "prompt", "messages", *allowed("JSON lines")]
    if strange := sorted(value.keys() - set(known)):
        raise OctavoError(f"unknown field {strange[0]!r}; the fields are {', '.join(known)}")
    return value


def _finite(text: str) -> float:
    """A number of JSON, which has no NaN and no infinity."""
    if not isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number

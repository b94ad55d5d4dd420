"""A file of prompts, and the file of their answers, which can be taken up again where it was left.

Every line is its own request: one that cannot be served is answered by its error and costs the others nothing. Lines
have the numbers an editor shows. An answer carries its line's number and `request`, a hash of the line and of all
options that shape answers: what is in the output already is recognized by it, and an output of other prompts or other
options is refused before a model is loaded.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from octavo.cli.loading import ServeOptions
from octavo.errors import OctavoError
from octavo.jsonl import own_id
from octavo.quant.format import is_tuned

# Options that change how fast answers are made, and not what they are.
WITHOUT_EFFECT = {
    "cache_max_entry_count", "device", "device_map", "kv_cache_memory", "max_batch_size", "session_len",
    "snapshot_memory",
}  # fmt: skip
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
        return own_id(self.text, self.number)


def read_lines(file: BinaryIO, options: dict[str, Any]) -> list[Line]:
    """The requests of a file; `options` are those that shape the answers."""
    key = blake2b(json.dumps(options, sort_keys=True, default=str).encode(), digest_size=16).digest()
    return [
        Line(number, text, blake2b(text, key=key, digest_size=8).hexdigest())
        for number, text in enumerate(map(bytes.strip, file), 1)
        if text
    ]


def shaping_of(options: ServeOptions, chat: bool, logprobs: int | None) -> dict[str, Any]:
    """The options that shape answers, beside those of sampling."""
    shaping = {name: value for name, value in asdict(options).items() if name not in WITHOUT_EFFECT}
    if is_tuned(options.format_name() or ""):
        from octavo.models.locate import locate
        from octavo.models.model import tuned_formats  # imports torch

        place = locate(options.model)
        shaping["formats"] = tuned_formats(*place, options.calibration).header.formats
    return shaping | {"kv": options.format_name(), "quant_policy": None, "chat": chat, "logprobs": logprobs}


class Output:
    """The file of answers, one JSON object in each line, written as they come."""

    def __init__(self, path: Path | None, lines: Iterable[Line]):
        """Take up the file if there is one; with no path stdout. `answered` are the numbers of the lines in it. A last
        line that is incomplete is cut off, and so are errors: their lines get another chance."""
        self.path = path
        self.answered: set[int] = set()
        if path is None:
            return
        try:
            old = path.read_bytes() if path.is_file() else b""  # a device is no file
            kept = self._recognize(old, {line.number: line.request for line in lines})
            if kept != old:
                from octavo.artefact import replacing  # imports torch

                with replacing(path) as part:
                    part.write_bytes(kept)
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

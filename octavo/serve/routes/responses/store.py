"""Responses that are kept, so that a request can go on with one: the latest, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.serve.errors import ApiError
from octavo.text import Message

MOST = 4096  # responses
ROOM = 64 << 20  # characters of all their conversations together


@dataclass(frozen=True)
class Kept:
    """A response as it was sent, and the conversation up to its end, without the instructions."""

    document: dict[str, Any]
    messages: Sequence[Message]
    size: int


class Store:
    """Of one server, in memory. Read beside the loop too."""

    def __init__(self, most: int = MOST, room: int = ROOM):
        self.most, self.room, self.size = most, room, 0
        self.kept: OrderedDict[str, Kept] = OrderedDict()
        self.lock = threading.Lock()

    def add(self, document: dict[str, Any], messages: Sequence[Message]) -> None:
        """Keep a response; the least recently used go. One that is too large alone is not kept."""
        size = len(repr(document)) + sum(len(repr(message)) for message in messages)
        if size > self.room:
            return
        with self.lock:
            self.kept[document["id"]] = Kept(document, messages, size)
            self.size += size
            while self.size > self.room or len(self.kept) > self.most:
                _, gone = self.kept.popitem(last=False)
                self.size -= gone.size

    def get(self, id: str, param: str | None = None) -> Kept:
        """Raises ApiError for one that is not here, or not any more."""
        with self.lock:
            if id in self.kept:
                self.kept.move_to_end(id)
                return self.kept[id]
        message = "there is no response of that id here, or not any more: send its conversation as the input"
        if param is None:
            raise ApiError(404, message)
        raise ApiError(400, message, param=param, code="previous_response_not_found")

    def remove(self, id: str) -> None:
        gone = self.get(id)
        with self.lock:
            if self.kept.pop(id, None) is not None:
                self.size -= gone.size

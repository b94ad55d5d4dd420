"""Responses that are kept, so that a request can go on with one: the latest, within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from octavo.text import Message

MOST = 4096  # responses
ROOM = 64 << 20  # characters of all their conversations together


@dataclass(frozen=True)
class Kept:
    """A response as it was sent, and the conversation up to its end, without the instructions."""

    document: dict[str, Any]
    messages: Sequence[Message]

    @property
    def size(self) -> int:
        return len(repr(self.document)) + sum(len(repr(message)) for message in self.messages)


class Store(Protocol):
    """Where responses are kept: in this process, or in one that several servers ask."""

    async def add(self, kept: Kept) -> None:
        """Keep a response. One that is too large alone is not kept."""

    async def get(self, id: str) -> Kept | None:
        """The response of that id; None where it is not here, or not any more."""

    async def remove(self, id: str) -> bool:
        """Forget a response; whether it was here."""


class InMemory:
    """A Store of this process, all on one event loop."""

    def __init__(self, most: int = MOST, room: int = ROOM):
        self.most, self.room, self.size = most, room, 0
        self.kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()  # least recently used first

    async def add(self, kept: Kept) -> None:
        size = kept.size
        if size > self.room:
            return
        await self.remove(kept.document["id"])
        self.kept[kept.document["id"]] = kept, size
        self.size += size
        while self.size > self.room or len(self.kept) > self.most:
            _, (_, gone) = self.kept.popitem(last=False)
            self.size -= gone

    async def get(self, id: str) -> Kept | None:
        if id not in self.kept:
            return None
        self.kept.move_to_end(id)
        return self.kept[id][0]

    async def remove(self, id: str) -> bool:
        if id not in self.kept:
            return False
        self.size -= self.kept.pop(id)[1]
        return True

"""Requests as servers get them, made here: token ids from a seeded generator, and nothing of anybody's text.

    chats     conversations of ten turns, side by side; a third of them leaves what the model thought out of the history
    agents    loops of a model and its tools: a large common beginning, short calls, results of all sizes
    users     one system prompt, many users, one question each
    edits     long histories in whose middle a message is changed, from where the conversation goes on

A trace is what one server sees, in the order of arrival. `with_small` puts small requests between them that have
nothing in common with anything, as completions of lines, titles and the like are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

VOCABULARY = 50_000


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    answer: list[int]
    small: bool = False  # one of those in between


class Tokens:
    """Makes up texts: as long as asked for, or of about that length."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def exactly(self, count: int) -> list[int]:
        return self.random.choices(range(VOCABULARY), k=count)

    def about(self, median: int, spread: float = 0.8, most: int = 100_000) -> list[int]:
        """Lengths of a log-normal distribution, as messages have."""
        return self.exactly(max(4, min(most, round(median * self.random.lognormvariate(0, spread)))))


def interleaved(tokens: Tokens, loops: list[Iterator[Request]], together: int) -> Iterator[Request]:
    """Requests of several conversations, `together` of them at a time, in a random order but each in its own."""
    waiting, active = list(loops), []
    while waiting or active:
        while waiting and len(active) < together:
            active.append(waiting.pop(0))
        loop = tokens.random.choice(active)
        request = next(loop, None)
        if request is None:
            active.remove(loop)
        else:
            yield request


def chats(seed: int = 1, conversations: int = 48, turns: int = 10, together: int = 16) -> list[Request]:
    tokens = Tokens(seed)
    system, before, after = tokens.exactly(90), tokens.exactly(4), tokens.exactly(5)

    def chat(thinks: bool) -> Iterator[Request]:
        history = list(system)
        for _ in range(turns):
            prompt = history + before + tokens.about(80) + after
            thought = tokens.about(300) if thinks else []
            said = tokens.about(220)
            yield Request(prompt, thought + said)
            history = prompt + said

    return list(interleaved(tokens, [chat(i % 3 == 0) for i in range(conversations)], together))


def agents(seed: int = 2, loops: int = 18, steps: int = 25, together: int = 6) -> list[Request]:
    tokens = Tokens(seed)
    tools = tokens.exactly(2800)

    def loop() -> Iterator[Request]:
        history = tools + tokens.about(200)
        for _ in range(steps):
            call = tokens.about(70, 0.5)
            yield Request(history, call)
            history = history + call + tokens.about(350, 1.2, most=6000)

    return list(interleaved(tokens, [loop() for _ in range(loops)], together))


def users(seed: int = 3, count: int = 300) -> list[Request]:
    tokens = Tokens(seed)
    system = tokens.exactly(1965)
    return [Request(system + tokens.about(60), tokens.about(150)) for _ in range(count)]


def edits(seed: int = 4, conversations: int = 12, turns: int = 8, changes: int = 6, together: int = 6) -> list[Request]:
    tokens = Tokens(seed)

    def conversation() -> Iterator[Request]:
        messages = [tokens.about(2500)]  # a document, or code
        for change in range(changes + 1):
            if change:
                at = tokens.random.randrange(0, len(messages), 2)  # a user's message, to be said otherwise
                message = messages[at]
                keep = tokens.random.randrange(len(message))
                messages = [*messages[:at], [*message[:keep], *tokens.about(30), *message[keep + 30 :]]]
            for turn in range(turns if not change else 2):
                if turn:
                    messages.append(tokens.about(200, 1.2))
                prompt = list(chain.from_iterable(messages))
                answer = tokens.about(350)
                yield Request(prompt, answer)
                messages.append(answer)

    return list(interleaved(tokens, [conversation() for _ in range(conversations)], together))


def with_small(requests: list[Request], each: int = 3, seed: int = 5) -> list[Request]:
    """The same, with `each` small requests after every one."""
    tokens = Tokens(seed)
    found = []
    for request in requests:
        found.append(request)
        found += [Request(tokens.about(300, 0.6), tokens.about(20), small=True) for _ in range(each)]
    return found


TRACES: dict[str, Callable[[], list[Request]]] = {"chats": chats, "agents": agents, "users": users, "edits": edits}

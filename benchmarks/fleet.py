"""Routing by policy over 1 to 1,000 replicas: a discrete-event simulation, seeded; nothing is served.

    python benchmarks/fleet.py [--replicas 1,4,16,64,256,1000] [--seconds 60] [--out benchmarks/results/fleet.json]

The requests have the shape of Mooncake's conversation trace (Qin et al., FAST 2025): turns of conversations, long
prompts and short answers, some beginnings shared by many. They are drawn here, not read from it; what was drawn is in
the results. A replica computes prompts one after the other and decodes up to SLOTS answers together; its prefix cache
is LRU over conversations and shared beginnings. The policy `prefix` is the function that octavo.ray routes by.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from octavo.ray.choice import choose

SEED = 20261129
RATE = 1.0  # requests a second for each replica
PREFILL = 20_000.0  # tokens a second: an 8B model on one GPU, about
STEP, STEP_EACH = 0.008, 0.00012  # seconds of a decode step, and of each answer in it
SLOTS = 64
CACHE = 600_000  # tokens that a replica's cache holds: 40 GB of kv8 for 8 KV heads of 128 in 32 layers
FREE = SLOTS // 2  # requests up to which a conversation's home always gets it
TURNS, THINKING = 3.5, 10.0  # of a conversation, and seconds between them
GROUPS, SHARED = 40, 1200  # system prompts, by Zipf's law, and their mean tokens
FIRST, LATER, ANSWER = 6000, 1500, 340  # mean tokens of a first message, of a later one, of an answer


@dataclass(order=True)
class Event:
    at: float
    number: int
    run: Callable[[float], None] = field(compare=False)


@dataclass
class Request:
    arrived: float
    conversation: int
    group: int
    shared: int  # tokens of the group's beginning
    prompt: int  # tokens of all of it
    answer: int
    done: Callable[[float], None]  # the conversation goes on


class Replica:
    """One engine: prompts one after the other, answers together."""

    def __init__(self, simulation: Simulation, name: str):
        self.simulation, self.name = simulation, name
        self.waiting: list[Request] = []
        self.running = 0
        self.free_at = 0.0  # when its last prompt is computed
        self.cached: OrderedDict[tuple[str, int], int] = OrderedDict()  # tokens by conversation or group, oldest first
        self.tokens = 0

    def take(self, now: float, request: Request) -> None:
        self.waiting.append(request)
        self.simulation.loads[self.name] += 1
        self._start(now)

    def _start(self, now: float) -> None:
        while self.waiting and self.running < SLOTS:
            request = self.waiting.pop(0)
            self.running += 1
            hit = self._hit(request)
            self.simulation.prompt_tokens += request.prompt
            self.simulation.hit_tokens += hit
            self.free_at = max(now, self.free_at) + (request.prompt - hit) / PREFILL
            self.simulation.first.append(self.free_at + STEP - request.arrived)
            end = self.free_at + request.answer * (STEP + STEP_EACH * self.running)
            self.simulation.post(end, lambda at, request=request: self._end(at, request))  # type: ignore[misc]

    def _end(self, now: float, request: Request) -> None:
        self.running -= 1
        self.simulation.loads[self.name] -= 1
        self._keep(("conversation", request.conversation), request.prompt + request.answer - request.shared)
        self._start(now)
        request.done(now)

    def _hit(self, request: Request) -> int:
        shared = ("group", request.group)
        if shared not in self.cached:
            self._keep(shared, request.shared)
            return 0
        self.cached.move_to_end(shared)
        own = ("conversation", request.conversation)
        if own in self.cached:
            self.cached.move_to_end(own)
        return min(request.shared + self.cached.get(own, 0), request.prompt - 1)

    def _keep(self, key: tuple[str, int], tokens: int) -> None:
        self.tokens += tokens - self.cached.pop(key, 0)
        self.cached[key] = tokens
        while self.tokens > CACHE and len(self.cached) > 1:
            self.tokens -= self.cached.popitem(last=False)[1]


Policy = Callable[["Simulation", Request], str]


class Simulation:
    """Requests to `replicas` for so many seconds, each sent where `policy` says."""

    def __init__(self, replicas: int, policy: Policy, seconds: float, seed: int = SEED):
        self.random = random.Random(seed)  # of the requests: the same for every policy
        self.choice = random.Random(seed + 1)  # of the policy
        self.replicas = {str(i): Replica(self, str(i)) for i in range(replicas)}
        self.names = list(self.replicas)
        self.loads = dict.fromkeys(self.names, 0)  # requests that each has, of which a policy knows
        self.policy, self.seconds = policy, seconds
        self.events: list[Event] = []
        self.numbers, self.turn = count(), count()
        self.first: list[float] = []  # seconds to the first token
        self.prompt_tokens = self.hit_tokens = 0
        self.prompts: list[int] = []
        self.answers: list[int] = []

    def post(self, at: float, run: Callable[[float], None]) -> None:
        heapq.heappush(self.events, Event(at, next(self.numbers), run))

    def run(self) -> None:
        begin = RATE * len(self.replicas) / TURNS  # conversations a second
        at = 0.0
        for number in count():
            at += self.random.expovariate(begin)
            if at > self.seconds:
                break
            self.post(at, self._conversation(number))
        while self.events:
            event = heapq.heappop(self.events)
            event.run(event.at)

    def _conversation(self, number: int) -> Callable[[float], None]:
        draw = random.Random(self.random.random())
        group = min(int(draw.paretovariate(0.6)), GROUPS) - 1
        shared = SHARED // 2 + 61 * group % SHARED
        turns = iter(_turns(draw, shared))

        def ask(now: float) -> None:
            found = next(turns, None)
            if found is None or now > self.seconds:
                return
            prompt, answer = found
            self.prompts.append(prompt)
            self.answers.append(answer)
            later = draw.expovariate(1 / THINKING)
            request = Request(now, number, group, shared, prompt, answer, lambda at: self.post(at + later, ask))
            self.replicas[self.policy(self, request)].take(now, request)

        return ask


def _turns(draw: random.Random, shared: int) -> Iterator[tuple[int, int]]:
    """Tokens of prompt and answer of each turn; the prompt is all that was said before, and a new message."""
    said = shared
    for turn in count():
        said += int(draw.lognormvariate(0, 1) / 1.65 * (LATER if turn else FIRST)) + 1
        answer = int(draw.lognormvariate(0, 0.8) / 1.38 * ANSWER) + 1
        yield said, answer
        said += answer
        if draw.random() < 1 / TURNS:
            return


def by_prefix(simulation: Simulation, request: Request) -> str:
    loads = simulation.loads
    return min(choose(str(request.conversation), loads, FREE)[0], key=loads.__getitem__)


POLICIES: dict[str, Policy] = {
    "random": lambda s, _: s.choice.choice(s.names),
    "round robin": lambda s, _: s.names[next(s.turn) % len(s.names)],
    "least loaded": lambda s, _: min(s.names, key=s.loads.__getitem__),
    "two choices": lambda s, _: min(s.choice.choices(s.names, k=2), key=s.loads.__getitem__),
    "prefix": by_prefix,
}


def simulate(replicas: int, name: str, seconds: float) -> dict[str, object]:
    simulation = Simulation(replicas, POLICIES[name], seconds)
    simulation.run()
    ordered = sorted(simulation.first)
    return {
        "replicas": replicas,
        "policy": name,
        "requests": len(ordered),
        "hit_rate": round(simulation.hit_tokens / simulation.prompt_tokens, 4),
        "ttft_median": round(ordered[len(ordered) // 2], 3),
        "ttft_p99": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        "prompt_mean": round(statistics.fmean(simulation.prompts)),
        "answer_mean": round(statistics.fmean(simulation.answers)),
    }


def deciding(replicas: int, times: int = 200) -> float:
    """Seconds of one decision of octavo.ray's policy."""
    loads = {f"replica-{i}": i % 7 for i in range(replicas)}
    begun = time.perf_counter()
    for i in range(times):
        choose(str(i), loads, FREE)
    return (time.perf_counter() - begun) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="1,4,16,64,256,1000")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    counts = [int(part) for part in options.replicas.split(",")]
    rows = []
    for replicas in counts:
        for name in POLICIES:
            rows.append(simulate(replicas, name, options.seconds))
            print(rows[-1], flush=True)
    decisions = {replicas: round(1e6 * deciding(replicas), 1) for replicas in counts}
    print("microseconds of a decision", decisions)
    if options.out is not None:
        document = {
            "how": "simulated",
            "seed": SEED,
            "seconds": options.seconds,
            "assumed": {
                name.lower(): value for name, value in globals().items() if name.isupper() and name != "POLICIES"
            },
            "rows": rows,
            "decision_microseconds": decisions,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

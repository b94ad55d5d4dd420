"""Which replica gets a request: the one where its conversation's blocks are, unless that one has far more to do.

Every key has an order of the replicas of its own, by rendezvous hashing: the hash of key and replica. The first is its
home. All ingresses agree on it without telling each other anything, and when a replica comes or goes only the
conversations whose home it is move. A home with too much to do is passed over for the less loaded of the two that
follow: two choices as ever, but the conversation's own, so that it may find its blocks there the next time too.
"""

import random
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b

import numpy as np

BOUND = 1.25  # of the mean load, which a home may have


def choose(key: str, loads: Mapping[str, int], free: int, rng: random.Random | None = None) -> list[list[str]]:
    """Ranks of replicas: of the first that takes a request at all, the least loaded gets it.

    `loads` are the requests that each replica has. Up to `free` a home always gets its own: a batch with room in it
    makes nobody wait, and a prefix computed again does. Without a key any two are the choice.
    """
    if not key:
        order = (rng or random.Random()).sample(sorted(loads), len(loads))
        return [order[:2], order[2:]]
    names = tuple(loads)
    home, *others = (names[i] for i in _first(_mixed(np.uint64(_number(key)) ^ _numbers(names)), 3))
    rest = [replica for replica in names if replica != home and replica not in others]
    mean = (sum(loads.values()) + 1) / len(loads)
    if loads[home] < max(free, BOUND * mean):
        return [[home], others, rest]
    return [[home, *others], rest]


@lru_cache(1 << 16)
def _number(name: str) -> int:
    """64 bits of a name, the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())


@lru_cache(16)
def _numbers(names: tuple[str, ...]) -> np.ndarray:
    return np.array([_number(name) for name in names], np.uint64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of a result depends on every bit of its x (the finalizer of splitmix64): two numbers may be joined by
    xor before."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _first(x: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` smallest are, or all of fewer, in their order."""
    if len(x) > count:
        found = np.argpartition(x, count)[:count]
        return found[np.argsort(x[found])]
    return np.argsort(x)

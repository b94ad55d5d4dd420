"""Fill the cache of a number of sessions, every slot of it, as fast as may be.

The model fills the sessions in chunks, as serving does. What it has not filled when its time is up is written as random
rows, encoded and put into every slot that is left: the same bytes, touched in the same way.
"""

import time
from functools import cache

import torch

from octavo.cache.holding import Holding
from octavo.engine.scheduler import CHUNK_TOKENS
from octavo.llm import LLM

ROWS = 128  # random rows written at a time, so few that they need no memory to speak of


def fill(llm: LLM, sessions: list[Holding], seconds: float) -> int:
    """Fill all sessions, each with blocks of its own, to their last token, at first by the model and after `seconds` by
    random rows; then decode that token in one step of all. Returns the number of tokens that the model wrote."""
    runner, pool, size = llm.engine.runner, llm.engine.pool, llm.engine.pool.block_size
    deadline, by_model = time.monotonic() + seconds, 0
    for session in sessions:
        rest = len(session.tokens) - 1
        while session.num_cached < rest and time.monotonic() < deadline:
            n = min(CHUNK_TOKENS, rest - session.num_cached)
            pool.reserve(session, n)
            runner.run(llm.cache.batch([(session, n)]))
            session.num_cached += n
            by_model += n
        for places in torch.arange(session.num_cached, rest).split(ROWS):
            pool.reserve(session, len(places))
            tables = [torch.tensor(table) for table in session.tables]
            _write_random_rows(llm, [table[places // size] * size + places % size for table in tables])
            session.num_cached += len(places)
        pool.reserve(session, 1)
    runner.run(llm.cache.batch([(session, 1) for session in sessions]))
    return by_model + len(sessions)


def _write_random_rows(llm: LLM, slots: list[torch.Tensor]) -> None:
    """K and V rows of every layer into slots [tokens], those of its group."""
    for layer, own in llm.cache.owners:
        for store in (own.k, own.v):
            rows, to = (
                _random_rows(store.heads, store.dim, llm.model.bound.dtype, store.codes.device),
                slots[llm.cache.group_of[layer]],
            )
            store.write(rows[: len(to)], to.to(rows.device))


@cache
def _random_rows(heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[ROWS, heads, dim], the same again and again: what they say changes no byte."""
    return torch.randn(ROWS, heads, dim, device=device).to(dtype)

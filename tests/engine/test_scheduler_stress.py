"""The scheduler under load: nobody starves, and nothing that may happen mixes up whose K and V are whose."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.sequence import Sequence
from octavo.errors import OctavoError
from tests.engine.shadow import Shadow, alone


def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones():
    s = Shadow(blocks=32, block_size=4, batch=4, budget=16)
    for _ in range(4):
        s.request(4, max_tokens=8)
    long = s.request(100, max_tokens=4)
    for _ in range(60):
        s.request(4, max_tokens=8)
        s.step()
        if long.finished:
            break
    assert long.finished
    s.run()


def test_first_tokens_come_in_the_order_of_arrival_even_through_preemptions():
    s = Shadow(blocks=12, block_size=4, batch=6, budget=9)
    arrived = []
    for i in range(40):
        arrived.append(s.request(1 + (i * 7) % 24, max_tokens=5 + i % 9))
        s.step()
    s.run()
    assert sum(sequence.preemptions for sequence in arrived) > 5
    assert s.order == arrived


def test_the_oldest_sequence_advances_in_every_step():
    s = Shadow(blocks=10, block_size=4, batch=8, budget=8)
    arrived = [s.request(5 + i % 20, max_tokens=12) for i in range(30)]
    while s.running or s.waiting:
        oldest = next(sequence for sequence in arrived if not sequence.finished)
        assert s.step()[0][0] is oldest


# --- anything at all -------------------------------------------------------------------------------------------------

prompts = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),  # of three tokens: many share a prefix
    st.builds(lambda n, rest: [0] * n + rest, st.integers(0, 25), st.lists(st.integers(0, 7), min_size=1, max_size=5)),
)
events = st.one_of(
    st.tuples(st.just("request"), prompts, st.integers(1, 20)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("clear")),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@settings(max_examples=300, deadline=None)
@given(
    blocks=st.integers(2, 12),
    block_size=st.sampled_from([1, 2, 4, 5]),
    batch=st.integers(1, 5),
    budget=st.integers(1, 20),
    context=st.integers(4, 60),
    hits=st.booleans(),
    snapshots=st.one_of(st.none(), st.integers(0, 6)),
    ring=st.integers(0, 2),
    happenings=st.lists(events, max_size=40),
)
def test_any_requests_and_aborts_give_each_its_own_answer_and_leave_the_pool_whole(
    blocks, block_size, batch, budget, context, hits, snapshots, ring, happenings
):
    s = Shadow(blocks, block_size, batch, budget, context, hits, snapshots=snapshots, ring=ring)
    arrived: list[Sequence] = []
    for what, *details in happenings:
        if what == "request":
            prompt, max_tokens = details
            if len(prompt) >= s.max_context:
                with pytest.raises(OctavoError):
                    s.request(prompt, max_tokens)
            else:
                arrived.append(s.request(prompt, max_tokens, frozenset({3})))
        elif what == "abort" and arrived:
            s.finish(arrived[details[0] % len(arrived)], "abort")
            s.check()
        elif what == "clear":
            s.pool.clear()
            s.check()
        elif what == "step":
            for _ in range(details[0]):
                if s.running or s.waiting:
                    s.step()
    s.run()
    for sequence in arrived:
        expected = alone(sequence.tokens[: sequence.num_prompt], sequence.max_len, frozenset({3}))
        if sequence.finish_reason == "abort":
            assert sequence.output == expected[: len(sequence.output)]
        else:
            assert sequence.output == expected
            assert sequence.finish_reason == ("stop" if expected[-1] == 3 else "length")
        assert len(sequence.sampled) == len(sequence.output)
        assert sequence.prefix_hit < sequence.num_prompt
        assert sequence.prefix_hit % block_size == 0

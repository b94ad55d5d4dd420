"""The scheduler alone, without a model: who runs, with how many tokens, on which blocks."""

from __future__ import annotations

import pytest

from octavo.engine.sequence import Sampled
from octavo.errors import OctavoError
from tests.engine.shadow import Shadow, alone

EOS = 99


# --- a step's work ---------------------------------------------------------------------------------------------------


def test_a_prompt_within_the_budget_is_one_step_and_each_token_one_more():
    s = Shadow(budget=16)
    a = s.request(10, max_tokens=3)
    assert s.step() == [(a, 10)]
    assert s.step() == [(a, 1)]
    assert s.step() == [(a, 1)]
    assert a.finish_reason == "length"
    assert len(a.output) == 3


def test_a_long_prompt_is_computed_in_chunks_and_gains_no_token_before_the_last():
    s = Shadow(budget=16)
    a = s.request(40)
    for chunk, outputs in ((16, 0), (16, 0), (8, 1), (1, 2)):
        assert s.step() == [(a, chunk)]
        assert len(a.output) == outputs


def test_commit_returns_those_that_gained_a_token_and_only_those():
    s = Shadow(budget=16)
    s.request(3)
    s.request(40)
    work = s.schedule()
    assert [n for _, n in work] == [3, 13]
    assert s.commit(work, [Sampled(7)]) == [work[0][0]]


def test_a_step_mixes_decodes_and_a_chunk_and_decodes_are_not_held_up():
    s = Shadow(blocks=64, budget=16)
    a, b = s.request(5), s.request(6)
    s.step()
    c = s.request(40)
    assert s.step() == [(a, 1), (b, 1), (c, 14)]
    assert s.step() == [(a, 1), (b, 1), (c, 14)]
    assert s.step() == [(a, 1), (b, 1), (c, 12)]
    assert s.step() == [(a, 1), (b, 1), (c, 1)]


def test_what_the_budget_leaves_goes_to_the_next_in_line():
    s = Shadow(budget=16)
    a, b, c = s.request(10), s.request(10), s.request(10)
    assert s.step() == [(a, 10), (b, 6)]
    assert s.step() == [(a, 1), (b, 4), (c, 10)]
    assert s.step() == [(a, 1), (b, 1), (c, 1)]


def test_the_budget_is_never_below_one_token_for_every_sequence_of_a_batch():
    s = Shadow(batch=4, budget=1)
    assert s.max_batch_tokens == 4
    for _ in range(4):
        s.request(1)
    s.step()
    assert [n for _, n in s.step()] == [1, 1, 1, 1]


def test_no_more_sequences_run_than_the_batch_size():
    s = Shadow(batch=2, budget=100)
    a, b, c = (s.request(3, max_tokens=2) for _ in range(3))
    assert s.step() == [(a, 3), (b, 3)]
    s.step()
    assert s.step() == [(c, 3)]


# --- admission -------------------------------------------------------------------------------------------------------


def test_first_come_is_first_served_even_when_a_later_one_would_fit():
    s = Shadow(blocks=8, block_size=4, budget=100)
    a = s.request(20, max_tokens=4)  # 5 of 8 blocks
    b = s.request(16)  # 4: not before a is done
    c = s.request(2)  # 1: would fit, and waits its turn
    assert s.step() == [(a, 20)]
    assert list(s.waiting) == [b, c]
    while not a.finished:
        assert s.step() == [(a, 1)]
    assert s.step() == [(b, 16), (c, 2)]


def test_a_sequence_is_admitted_only_if_there_is_room_for_all_its_tokens_even_if_its_first_chunk_is_small():
    s = Shadow(blocks=8, block_size=4, budget=16)
    a = s.request(12)  # 3 blocks
    s.request(24)  # 6, its first chunk of 4 needs 1
    assert s.step() == [(a, 12)]
    assert len(s.waiting) == 1
    assert len(s.pool.groups[0].free) == 5


def test_a_refused_admission_leaves_no_references_on_the_prefix_it_found():
    s = Shadow(blocks=8, block_size=4, budget=100)
    first = s.request([1] * 12, max_tokens=1)
    s.step()
    assert first.finished
    s.request(19, max_tokens=8)  # 5 blocks; 3 are left, all of the freed prefix
    s.step()
    s.request([1] * 12 + [2] * 8)  # 3 found and 2 to take
    s.step()
    assert len(s.waiting) == 1
    assert len(s.pool.groups[0].free) == 3
    s.run()


def test_a_shared_prefix_counts_once_so_that_sharers_fit_where_strangers_would_not():
    s = Shadow(blocks=8, block_size=4, budget=100)
    a = s.request([1] * 24)  # 6 blocks
    s.step()
    b = s.request([1] * 25)
    assert s.step() == [(a, 1), (b, 1)]
    assert b.prefix_hit == 24
    assert a.tables[0][:6] == b.tables[0][:6]


def test_a_hit_never_covers_the_last_token():
    s = Shadow(block_size=4, budget=100)
    s.request([1] * 8, max_tokens=1)
    s.run()
    for length, hit in ((8, 4), (9, 8), (5, 4), (4, 0)):
        b = s.request([1] * length, max_tokens=1)
        assert s.step() == [(b, length - hit)]
        assert b.prefix_hit == hit


def test_generated_tokens_are_found_by_a_later_prompt_that_repeats_them():
    s = Shadow(block_size=4, budget=100)
    a = s.request([1] * 6, max_tokens=7)  # 13 tokens, of which 12 were computed
    s.run()
    b = s.request([*a.tokens, 5, 6])
    s.step()
    assert b.prefix_hit == 12


def test_without_prefix_caching_nothing_is_found_or_counted():
    s = Shadow(block_size=4, budget=100, hits=False)
    for _ in range(2):
        a = s.request([1] * 12, max_tokens=1)
        assert s.step() == [(a, 12)]
        assert a.prefix_hit == 0


def test_a_block_that_is_not_full_is_never_shared():
    s = Shadow(block_size=4, budget=100)
    a = s.request([1] * 7)
    s.step()
    b = s.request([1] * 7)
    s.step()
    assert b.prefix_hit == 4
    assert a.tables[0][0] == b.tables[0][0]
    assert a.tables[0][1] != b.tables[0][1]


def test_cold_copies_wait_for_the_first_to_compute_their_common_blocks():
    s = Shadow(blocks=32, block_size=4, budget=8)
    a, b, c = (s.request([1] * 17, max_tokens=3) for _ in range(3))
    assert s.step() == [(a, 8)]
    assert s.step() == [(a, 8)]
    assert s.step() == [(a, 1), (b, 1), (c, 1)]
    assert b.tables[0][:4] == a.tables[0][:4] == c.tables[0][:4]
    assert (a.prefix_hit, b.prefix_hit, c.prefix_hit) == (0, 16, 16)
    s.run()
    assert a.output == b.output == c.output


def test_cold_copies_do_not_wait_where_nothing_is_shared():
    s = Shadow(blocks=32, block_size=4, budget=100, hits=False)
    a, b = s.request([1] * 9), s.request([1] * 9)
    assert s.step() == [(a, 9), (b, 9)]
    s = Shadow(blocks=32, block_size=4, budget=100)
    a, b = s.request([1] * 4), s.request([1] * 4)  # the last token is never a hit
    assert s.step() == [(a, 4), (b, 4)]


# --- preemption ------------------------------------------------------------------------------------------------------


def test_the_latest_comer_is_preempted_and_returns_first_in_line():
    s = Shadow(blocks=6, block_size=4, budget=100)
    a, b = s.request(8, max_tokens=10), s.request(8, max_tokens=10)
    s.step()
    c = s.request(7, max_tokens=10)
    assert [w for w, _ in s.step()] == [a, b]  # 3 blocks each: c waits
    while not b.preemptions:
        assert [w for w, _ in s.step()] in ([a, b], [a])
    assert a.preemptions == 0
    assert list(s.waiting) == [b, c]
    assert b.tables == []
    assert b.num_cached == 0
    s.run()
    assert s.order == [a, b, c]
    for sequence in (a, b, c):
        assert sequence.output == alone(sequence.tokens[: sequence.num_prompt], sequence.num_prompt + 10)


def test_several_preempted_in_one_step_return_in_the_order_of_their_arrival():
    s = Shadow(blocks=5, block_size=4, budget=100)
    a, b, c = s.request(8), s.request(8), s.request(4)
    s.step()
    d = s.request(1)
    assert s.step() == [(a, 1)]  # c gives up its one block for a, and b itself for want of another
    assert (a.preemptions, b.preemptions, c.preemptions) == (0, 1, 1)
    assert list(s.waiting) == [b, c, d]
    s.run()


def test_a_preempted_sequence_keeps_its_tokens_and_what_it_had_found():
    s = Shadow(blocks=6, block_size=4, budget=100)
    s.request([1] * 8, max_tokens=1)
    s.run()
    a = s.request(8, max_tokens=14)
    b = s.request([1] * 9, max_tokens=10)
    s.step()
    assert b.prefix_hit == 8
    while not b.preemptions:
        s.step()
    kept = list(b.tokens)
    s.run()
    assert b.tokens[: len(kept)] == kept
    assert b.prefix_hit == 8  # not what it found of its own
    assert b.finish_reason == a.finish_reason == "length"


def test_a_sequence_that_fills_the_whole_cache_runs_to_its_end_alone():
    s = Shadow(blocks=4, block_size=4, budget=5)
    a, b = s.request(15), s.request(15)
    s.run()
    assert len(a.tokens) == len(b.tokens) == 16
    assert a.finish_reason == b.finish_reason == "length"


def test_nobody_is_admitted_in_the_step_that_preempts():
    s = Shadow(blocks=4, block_size=4, budget=100)
    a, b = s.request(8, max_tokens=6), s.request(7, max_tokens=6)
    s.step()
    c = s.request(1, max_tokens=1)
    work = s.step()  # a needs a third block
    assert [w for w, _ in work] == [a]
    assert list(s.waiting) == [b, c]


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_sequence_and_stays_in_its_output():
    s = Shadow()
    a = s.request(5, stop_ids=frozenset({EOS, 98}))
    s.step(token=1)
    s.step(token=98)
    assert a.finish_reason == "stop"
    assert a.output == [1, 98]
    assert not s.running


def test_a_stop_token_that_is_also_the_last_allowed_is_a_stop():
    s = Shadow()
    a = s.request(5, max_tokens=1, stop_ids=frozenset({EOS}))
    s.step(token=EOS)
    assert a.finish_reason == "stop"


def test_a_stop_token_within_the_prompt_ends_nothing():
    s = Shadow()
    a = s.request([EOS, EOS, EOS], max_tokens=2, stop_ids=frozenset({EOS}))
    s.step(token=1)
    assert not a.finished
    s.step(token=1)
    assert a.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "asked", "context", "got"), [(6, 100, 10, 4), (9, 100, 10, 1), (6, 3, 10, 3), (6, 4, 10, 4)]
)
def test_a_sequence_ends_at_its_own_limit_or_at_the_context(prompt: int, asked: int, context: int, got: int):
    s = Shadow(context=context)
    a = s.request(prompt, max_tokens=asked)
    assert a.max_len == prompt + got
    s.run()
    assert len(a.output) == got
    assert a.finish_reason == "length"


def test_the_context_is_never_longer_than_the_cache():
    s = Shadow(blocks=4, block_size=4, context=1000)
    assert s.max_context == 16
    a = s.request(10)
    s.run()
    assert len(a.tokens) == 16


def test_an_aborted_sequence_frees_its_blocks_at_once():
    s = Shadow()
    a, b = s.request(6), s.request(7)
    s.step()
    s.finish(a, "abort")
    s.check()
    assert a.finish_reason == "abort"
    assert a.tables == []
    assert len(s.pool.groups[0].free) == len(s.pool.groups[0]) - 2
    assert s.step() == [(b, 1)]


def test_an_abort_while_waiting_lets_the_next_one_through():
    s = Shadow(blocks=4, block_size=4)
    a, b, c = s.request(8), s.request(14), s.request(4, max_tokens=2)
    s.step()
    s.finish(b, "abort")
    s.check()
    assert b.output == []
    assert s.step() == [(a, 1), (c, 4)]


def test_an_abort_in_the_middle_of_a_prompt_frees_it_and_leaves_its_full_blocks_to_be_found():
    s = Shadow(blocks=16, block_size=4, budget=10)
    a = s.request([1] * 30)
    assert s.step() == [(a, 10)]
    s.finish(a, "abort")
    s.check()
    assert not s.pool.groups[0].used
    assert a.output == []
    b = s.request([1] * 30)
    s.step()
    assert b.prefix_hit == 8


def test_an_abort_of_a_preempted_sequence_takes_it_out_of_the_line():
    s = Shadow(blocks=4, block_size=4, budget=100)
    a, b = s.request(8), s.request(7)
    s.step()
    s.step()
    assert b.preemptions
    s.finish(b, "abort")
    s.check()
    assert list(s.waiting) == []
    assert s.step() == [(a, 1)]


def test_finishing_twice_keeps_the_first_reason():
    s = Shadow()
    a = s.request(4, max_tokens=1)
    s.step()
    s.finish(a, "abort")
    assert a.finish_reason == "length"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused():
    with pytest.raises(OctavoError, match="empty"):
        Shadow().request([])


def test_a_prompt_too_long_for_the_cache_is_refused_with_both_numbers_and_the_remedy():
    s = Shadow(blocks=4, block_size=4, context=1000)
    with pytest.raises(OctavoError, match=r"prompt has 16 tokens .* KV cache holds 16 tokens .*--kv-cache-memory"):
        s.request(16)
    s.request(15)


@pytest.mark.parametrize("context", [12, 16])  # 16: the cache was made for just that session
def test_a_prompt_too_long_for_the_session_is_refused_with_both_numbers_and_the_remedy(context: int):
    s = Shadow(blocks=4, block_size=4, context=context)
    with pytest.raises(OctavoError, match=rf"prompt has 20 tokens .* session holds {context} .*--session-len"):
        s.request(20)
    with pytest.raises(OctavoError, match=f"{context} tokens"):
        s.request(context)
    s.request(context - 1)


def test_a_refused_sequence_is_not_queued():
    s = Shadow(blocks=4, block_size=4)
    with pytest.raises(OctavoError):
        s.request(100)
    assert not s.waiting

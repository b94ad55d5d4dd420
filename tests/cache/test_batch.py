"""What a step reads and writes, worked out by hand and by the slow definition."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from octavo.cache.batch import Batch
from octavo.cache.holding import Holding


@dataclass
class Sequence:
    tokens: list[int]
    num_cached: int
    block_table: list[int]

    @property
    def tables(self) -> list[list[int]]:
        return [self.block_table]


def test_chunks_and_decodes_share_a_step() -> None:
    work = [
        (Sequence([10, 11, 12, 13, 14], 4, [7, 2]), 1),  # decode
        (Sequence([20, 21, 22, 23, 24, 25, 26], 0, [5, 1]), 3),  # the first chunk of a prompt
        (Sequence([30, 31, 32, 33, 34, 35], 3, [0, 9, 4]), 3),  # the last chunk, across a block's edge
        (Sequence([40], 0, [3]), 1),  # a prompt of one token
    ]
    batch = Batch.build(work, block_size=4)
    assert batch.ids.tolist() == [14, 20, 21, 22, 33, 34, 35, 40]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4, 5, 0]
    assert batch.slots.tolist() == [2 * 4 + 0, 20, 21, 22, 0 * 4 + 3, 9 * 4 + 0, 9 * 4 + 1, 12]
    assert batch.block_table.tolist() == [[7, 2, 2], [5, 1, 1], [0, 9, 4], [3, 3, 3]]
    assert batch.q_lens == [1, 3, 3, 1]
    assert batch.kv_lens == [5, 3, 6, 1]
    assert batch.logits_at.tolist() == [0, 6, 7]  # the second sequence's prompt goes on
    for tensor in (batch.ids, batch.positions, batch.slots, batch.block_table, batch.logits_at):
        assert tensor.dtype == torch.int64


def test_a_step_of_chunks_alone_may_owe_no_token() -> None:
    batch = Batch.build([(Sequence(list(range(9)), 0, [1, 0]), 8), (Sequence(list(range(9)), 4, [2, 3]), 4)], 8)
    assert batch.logits_at.shape == (0,)
    assert batch.logits_at.dtype == torch.int64
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert batch.slots.tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23]


def test_a_table_may_be_longer_than_what_is_written_yet() -> None:
    batch = Batch.build([(Sequence([1, 2, 3], 0, [6, 5, 4]), 2)], 2)
    assert batch.slots.tolist() == [12, 13]
    assert batch.block_table.tolist() == [[6, 5, 4]]


def test_a_batch_on_its_own_device_is_itself() -> None:
    batch = Batch.build([(Sequence([1], 0, [0]), 1)], 4)
    assert batch.on(torch.device("cpu")) is batch


def test_a_batch_on_another_device_is_one_copy_of_its_tensors() -> None:
    batch = Batch.build([(Sequence([1, 2], 0, [0]), 2)], 4)
    meta = torch.device("meta")
    moved = batch.on(meta)
    assert moved is batch.on(meta)
    assert moved.plan is not batch.plan
    for name in ("ids", "positions", "slots", "block_table", "logits_at"):
        assert getattr(moved, name).device == meta
        assert getattr(batch, name).device == torch.device("cpu")


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, list[tuple[Sequence, int]]]:
    size = draw(st.sampled_from([1, 2, 5, 64]))
    free = draw(st.permutations(range(60)))
    work = []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 10))
        cached = draw(st.integers(0, length - 1))
        new = draw(st.integers(1, length - cached))
        total = -(-(cached + new) // size)
        table, free = free[:total], free[total:]
        work.append((Sequence([100 * number + i for i in range(length)], cached, list(table)), new))
    return size, work


@given(steps())
@settings(max_examples=100, deadline=None)
def test_every_row_goes_where_its_sequence_says(step: tuple[int, list[tuple[Sequence, int]]]) -> None:
    size, work = step
    batch = Batch.build(work, size)
    rows = [(sequence, sequence.num_cached + i) for sequence, new in work for i in range(new)]
    assert batch.ids.tolist() == [sequence.tokens[at] for sequence, at in rows]
    assert batch.positions.tolist() == [at for _, at in rows]
    assert batch.slots.tolist() == [sequence.block_table[at // size] * size + at % size for sequence, at in rows]
    last = [i for i, (sequence, at) in enumerate(rows) if at == len(sequence.tokens) - 1]
    assert batch.logits_at.tolist() == last


def test_a_step_of_one_token_each_has_what_those_sequences_have_beside_a_chunk() -> None:
    """With edges, states, and two groups of layers: the two ways to a batch are one."""
    alone = [
        Holding(tokens=list(range(at + 1)), num_cached=at, first_page=i, ring=10 + 2 * i, state_slot=20 + i,
                tables=[list(range(5 * i, 5 * i + 5)), list(range(30 + 5 * i, 35 + 5 * i))])
        for i, at in enumerate((0, 3, 63, 64, 130, 200))
    ]  # fmt: skip
    chunk = Holding(
        tokens=[1, 2], first_page=9, ring=28, state_slot=29, tables=[[50, 51, 52, 53, 54], [55, 56, 57, 58, 59]]
    )
    work = [(sequence, 1) for sequence in alone]
    few, more = (Batch.build(own, 64, span=128, states=True) for own in (work, [*work, (chunk, 2)]))
    for group in (0, 1):
        own, beside = few.of(group), more.of(group)
        for name in ("ids", "positions", "slots", "block_table", "kv_len", "logits_at", "raw_slots", "first", "ring",
                     "state_slots"):  # fmt: skip
            assert torch.equal(getattr(own, name), getattr(beside, name)[: len(alone)]), name
        assert torch.equal(own.q_start, beside.q_start[: len(alone) + 1])
        assert own.kv_lens == beside.kv_lens[: len(alone)]

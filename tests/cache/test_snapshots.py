"""Where snapshots of states are taken, and which of them goes first."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest

from octavo.cache.snapshots import Place, Snapshot, Snapshots, Trail

UNIT = 64
names = count()


def taken(
    snapshots: Snapshots, length: int, place: Place = "prompt", trail: Trail | None = None, prefix: bytes = b""
) -> Snapshot:
    """A snapshot of a prefix that no other has, or of this one."""
    slot = snapshots.take()
    assert slot is not None
    return snapshots.put(
        slot, prefix or str(next(names)).encode(), length, place, trail or snapshots.begin(None, length)
    )


def small(snapshots: Snapshots, requests: int) -> None:
    for _ in range(requests):
        taken(snapshots, 256)


def there(snapshots: Snapshots, *some: Snapshot) -> list[bool]:
    return [snapshots.by_prefix.get(one.prefix) is one for one in some]


def test_small_requests_never_push_out_a_conversation():
    """Ten thousand of them between two turns, each larger than all the conversation."""
    snapshots = Snapshots(6, UNIT)
    first = taken(snapshots, 128)
    second = taken(snapshots, 192, trail=snapshots.begin(first, 200))
    for _ in range(10_000):
        taken(snapshots, 4096)
    assert there(snapshots, first, second) == [False, True]
    snapshots.check([])


def test_nor_do_they_where_all_other_slots_are_held():
    """Then there is no slot for them."""
    snapshots = Snapshots(3, UNIT)
    first = taken(snapshots, 128)
    second = taken(snapshots, 192, trail=snapshots.begin(first, 200))
    snapshots.drop(first)
    for _ in range(2):
        trail = snapshots.begin(None, 4096)
        snapshots.hold(trail, taken(snapshots, 4096, "answer", trail))
    assert snapshots.take() is None
    assert there(snapshots, second) == [True]


def test_small_requests_do_not_push_out_a_long_prompt_soon():
    """Nothing has gone on from it yet, but it saves as much as fifty of them."""
    snapshots = Snapshots(8, UNIT)
    long = taken(snapshots, 50 * 256)
    small(snapshots, 8 * 40)
    assert there(snapshots, long) == [True]
    small(snapshots, 8 * 20)
    assert there(snapshots, long) == [False], "what is not used does not stay for ever"


def test_of_two_that_save_as_much_the_least_recently_used_goes_first():
    snapshots = Snapshots(3, UNIT)
    some = [taken(snapshots, 512) for _ in range(3)]
    snapshots.begin(some[0], 512)
    small(snapshots, 1)
    assert there(snapshots, *some) == [True, False, True]


def test_an_answer_goes_before_its_prompt():
    """Without the answer's snapshot the answer is computed again, without the prompt's all of the conversation."""
    snapshots = Snapshots(2, UNIT)
    trail = snapshots.begin(None, 1000)
    prompt = taken(snapshots, 960, "prompt", trail)
    answer = taken(snapshots, 1216, "answer", trail)
    small(snapshots, 1)
    assert there(snapshots, prompt, answer) == [True, False]


def test_what_a_later_turn_has_gone_on_from_is_worth_what_it_saves_beside_the_others():
    snapshots = Snapshots(3, UNIT)
    first = snapshots.begin(None, 3000)
    begun = taken(snapshots, 1984, "shared", first)
    prompt = taken(snapshots, 2944, "prompt", first)
    assert [begun.worth, prompt.worth] == [1984, 2944]
    after = snapshots.begin(prompt, 4000)
    assert prompt.worth == 2944, "until the later turn has a snapshot of its own"
    taken(snapshots, 3968, "prompt", after)
    assert prompt.worth == 960
    assert after.goes_on


def test_the_same_prompt_asked_again_is_no_conversation():
    snapshots = Snapshots(4, UNIT)
    prompt = taken(snapshots, 960, trail=snapshots.begin(None, 1000))
    assert not snapshots.begin(prompt, 1000).goes_on
    assert snapshots.begin(prompt, 1001).goes_on


def test_a_beginning_that_many_share_stays_once_it_was_found_again():
    snapshots = Snapshots(4, UNIT)
    shared = taken(snapshots, 512, "shared")
    snapshots.begin(shared, 600)
    for _ in range(1000):
        taken(snapshots, 8192)
    assert there(snapshots, shared) == [True]


def test_what_is_gone_on_from_twice_is_a_beginning_that_requests_share():
    """So is the end of one prompt that is where others begin."""
    snapshots = Snapshots(4, UNIT)
    prompt = taken(snapshots, 512)
    taken(snapshots, 1024, trail=snapshots.begin(prompt, 1100))
    assert (prompt.place, prompt.is_kept) == ("prompt", False)
    assert not snapshots.begin(prompt, 1100).goes_on
    assert (prompt.place, prompt.is_kept) == ("shared", True)


def test_what_a_running_sequence_holds_never_goes():
    """It holds the last one it took; when all are held there is no slot for another."""
    snapshots = Snapshots(2, UNIT)
    turns = [snapshots.begin(None, 100) for _ in range(2)]
    held = [taken(snapshots, 128, "answer", trail) for trail in turns]
    for trail, one in zip(turns, held, strict=True):
        snapshots.hold(trail, one)
    assert snapshots.take() is None
    snapshots.hold(turns[0], None)
    small(snapshots, 1)
    assert there(snapshots, *held) == [False, True]


def test_an_answer_that_goes_on_has_one_snapshot():
    """That at its end so far; the one before it is forgotten, but not the prompt's."""
    snapshots = Snapshots(8, UNIT)
    trail = snapshots.begin(None, 100)
    some = [taken(snapshots, length, place, trail) for length, place in ((64, "prompt"), (128, "answer"))]
    for one in some:
        snapshots.hold(trail, one)
    last = taken(snapshots, 192, "answer", trail)
    snapshots.hold(trail, last)
    assert there(snapshots, *some, last) == [True, False, True]
    assert last.saves == 192 - 64
    snapshots.check([])


def test_two_sequences_that_write_the_same_share_a_snapshot():
    """The second slot is free again, and the snapshot stays as long as one of them holds it."""
    snapshots = Snapshots(4, UNIT)
    turns = [snapshots.begin(None, 100) for _ in range(2)]
    one, other = (taken(snapshots, 128, "answer", trail, b"same") for trail in turns)
    assert one is other
    assert len(snapshots.free) == 3
    for trail in turns:
        snapshots.hold(trail, one)
    snapshots.hold(turns[0], taken(snapshots, 192, "answer", turns[0]))
    assert there(snapshots, one) == [True]
    snapshots.hold(turns[1], taken(snapshots, 192, "answer", turns[1]))
    assert there(snapshots, one) == [False]


def test_what_nobody_can_find_goes_first():
    """Its blocks are another's by now."""
    snapshots = Snapshots(2, UNIT, findable=lambda prefix: prefix != b"lost")
    lost, other = taken(snapshots, 8192, prefix=b"lost"), taken(snapshots, 256)
    small(snapshots, 1)
    assert there(snapshots, lost, other) == [False, True]


@pytest.mark.parametrize(
    ("start", "shared", "prompt", "expected"),
    [
        (0, 0, 100, {}),  # 64 tokens are not worth a step of their own
        (0, 0, 129, {128: "prompt"}),
        (0, 0, 128, {}),  # the last token is computed, so 64 tokens are the most to be found
        (0, 1024, 1500, {1024: "shared", 1472: "prompt"}),
        (960, 1024, 1500, {1472: "prompt"}),
        (0, 1472, 1500, {1472: "prompt"}),  # the same prompt, whose states are lost
        (0, 0, 9000, {4096: "inner", 8192: "inner", 8960: "prompt"}),
        (8192, 8192, 8300, {}),
    ],
)
def test_snapshots_of_a_prompt_are_taken_where_they_save_enough(
    start: int, shared: int, prompt: int, expected: dict[int, Place]
):
    assert Snapshots(4, UNIT).marks(start, shared, prompt) == expected


def test_any_order_of_events_leaves_every_slot_accounted_for():
    chosen = Random(0)
    snapshots = Snapshots(7, UNIT, findable=lambda _: chosen.random() < 0.9)
    running: list[Trail] = []
    for _ in range(2000):
        known = list(snapshots.by_prefix.values())
        if len(running) < 4 and chosen.random() < 0.4:
            hit = chosen.choice(known) if known and chosen.random() < 0.6 else None
            running.append(snapshots.begin(hit, chosen.randrange(64, 9000)))
        elif running and chosen.random() < 0.3:
            snapshots.hold(running.pop(chosen.randrange(len(running))), None)
        elif running and (slot := snapshots.take()) is not None:
            trail = chosen.choice(running)
            place: Place = chosen.choice(["inner", "shared", "prompt", "answer"])
            prefix = str(chosen.randrange(40)).encode()
            snapshots.hold(trail, snapshots.put(slot, prefix, chosen.randrange(1, 100) * 64, place, trail))
        snapshots.check([])
    for trail in running:
        snapshots.hold(trail, None)
    snapshots.clear()
    assert len(snapshots.free) == 7

"""Which place a prompt gets, and what of it is there already."""

from __future__ import annotations

from llmcompress.inference.caches import LEAST_PREFIX
from llmcompress.serving.slots import Slot, Slots

SYSTEM = list(range(100, 100 + 2 * LEAST_PREFIX))


def fill(slots: Slots, prompt: list[int], member: str | None = None) -> Slot:
    slot, _, _ = slots.take(prompt, member)
    slot.tokens = list(prompt)
    return slot


def test_a_turn_goes_on_in_the_place_of_the_one_before() -> None:
    slots = Slots(3, keep=True)
    first = fill(slots, [*SYSTEM, 1, 2, 3])
    slots.give_back(first)
    slots.give_back(fill(slots, list(range(50))))
    slot, source, count = slots.take([*SYSTEM, 1, 2, 3, 4, 5], None)
    assert slot is source is first
    assert count == len(SYSTEM) + 3
    assert slot.tokens == [*SYSTEM, 1, 2, 3]


def test_what_is_mostly_something_else_is_copied_from() -> None:
    slots = Slots(3, keep=True)
    other = fill(slots, [*SYSTEM, *range(500, 600)])
    slots.give_back(other)
    slot, source, count = slots.take([*SYSTEM, 1, 2], None)
    assert source is other is not slot
    assert (count, slot.tokens) == (len(SYSTEM), [])
    assert len(other.tokens) == len(SYSTEM) + 100


def test_what_is_mostly_the_same_is_gone_on_with_though_it_goes_on_otherwise() -> None:
    slots = Slots(3, keep=True)
    other = fill(slots, [*SYSTEM, *range(500, 510)])
    slots.give_back(other)
    slot, source, count = slots.take([*SYSTEM, 1, 2], None)
    assert slot is source is other and count == len(SYSTEM)


def test_of_equal_prefixes_the_place_that_was_left_longest_ago_is_taken() -> None:
    slots = Slots(4, keep=True)
    held = [fill(slots, [*SYSTEM, number]) for number in (1, 2, 3)]
    for slot in (held[1], held[0]):
        slots.give_back(slot)
    # not the third, which is in use
    assert slots.take([*SYSTEM, 9], None)[:2] == (held[1], held[1])


def test_a_place_that_has_forgotten_the_beginning_is_not_gone_on_from() -> None:
    asked: list[tuple[int, int]] = []
    slots = Slots(2, keep=True, usable=lambda number, tokens: bool(asked.append((number, tokens))))
    held = fill(slots, SYSTEM)
    slots.give_back(held)
    assert slots.take([*SYSTEM, 1], None)[1:] == (None, 0)
    assert asked == [(held.number, len(SYSTEM))]


def test_a_sequence_that_runs_is_copied_from_and_never_taken() -> None:
    slots = Slots(2, keep=True)
    runs = fill(slots, [*SYSTEM, 1])
    slot, source, count = slots.take([*SYSTEM, 1, 2], None)
    assert source is runs is not slot
    assert count == len(SYSTEM) + 1


def test_the_place_that_was_left_longest_ago_is_taken_first() -> None:
    slots = Slots(3, keep=True)
    held = [fill(slots, list(range(100 * i, 100 * i + 40))) for i in range(3)]
    for slot in (held[1], held[2], held[0]):
        slots.give_back(slot)
    assert [fill(slots, [i] * 20) for i in range(3)] == [held[1], held[2], held[0]]


def test_the_last_free_place_is_taken_though_it_holds_something_else() -> None:
    slots = Slots(1, keep=True)
    only = fill(slots, [*SYSTEM, *range(500, 600)])
    slots.give_back(only)
    slot, source, count = slots.take([*SYSTEM, 1, 2], None)
    assert slot is source is only
    assert slot.tokens == SYSTEM[:count] == SYSTEM


def test_members_and_short_prefixes_share_nothing() -> None:
    slots = Slots(4, keep=True)
    slots.give_back(fill(slots, SYSTEM, "ant"))
    assert slots.take(SYSTEM, "bee")[1:] == (None, 0)
    assert slots.take([*SYSTEM[: LEAST_PREFIX - 1], 7, 7], "ant")[1:] == (None, 0)
    assert slots.take(SYSTEM, "ant")[2] == len(SYSTEM) - 1


def test_without_keeping_the_same_place_serves_again() -> None:
    slots = Slots(3, keep=False)
    first = fill(slots, SYSTEM)
    slots.give_back(first)
    slot, source, count = slots.take(SYSTEM, None)
    assert (slot, source, count, slot.tokens) == (first, None, 0, [])


def test_a_place_that_is_gone_on_with_is_taken_and_no_other() -> None:
    slots = Slots(3, keep=True)
    slots.give_back(fill(slots, SYSTEM))
    assert sorted(slots.take([*SYSTEM, number], None)[0].number for number in range(3)) == [0, 1, 2]

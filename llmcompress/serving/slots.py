"""Places of a cache, free and taken, and what each holds: a prompt begins with the longest prefix that is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmcompress.inference.caches import shared_prefix


@dataclass(eq=False)
class Slot:
    """A place for one sequence.

    Attributes:
        number: Which one.
        member: Member of a family, whose tokens it holds.
        tokens: Ids that it holds, those of a sequence that has left included.
    """

    number: int
    member: str | None = None
    tokens: list[int] = field(default_factory=list)


class Slots:
    """Places for sequences; not thread-safe.

    Args:
        count: Places.
        keep: Whether what sequences leave may be used again.
        usable: Whether one may go on from this many first tokens of a place, which may have forgotten what came before.
    """

    def __init__(
        self, count: int, keep: bool, usable: Callable[[int, int], bool] = lambda number, tokens: True
    ) -> None:
        self._usable = usable
        self._all = [Slot(number) for number in range(count)]
        self._keep = keep
        # the next one to be taken is the last: those that nothing was ever in, then what was left longest ago
        self._free = self._all[::-1]

    def take(self, prompt: Sequence[int], member: str | None) -> tuple[Slot, Slot | None, int]:
        """A place for a prompt.

        Args:
            prompt: Token ids.
            member: Member of a family.

        Returns:
            The place, empty; the one that holds the longest prefix of the prompt, possibly the same or one that is in
            use, None for no prefix; and the length of that prefix.
        """
        wanted = list(prompt)
        source, count = None, 0
        if self._keep:
            # from the back: of equally long prefixes a free place's, and there the one whose turn comes first
            for slot in [*self._free[::-1], *(slot for slot in self._all if slot not in self._free)]:
                found = shared_prefix(slot.tokens, wanted) if slot.member == member else 0
                if found > count and self._usable(slot.number, found):
                    source, count = slot, found
        others = [slot for slot in self._free if slot is not source]
        # what is mostly something else is left as it is where it can be, and copied from
        whole = source is not None and 2 * count >= len(source.tokens)
        slot = source if source in self._free and (whole or not others) else others[-1]
        assert slot is not None
        self._free.remove(slot)
        slot.member, slot.tokens = member, wanted[:count] if slot is source else []
        return slot, source, count

    def give_back(self, slot: Slot) -> None:
        """The sequence has left; what its place holds stays until another one needs it."""
        if self._keep:
            self._free.insert(0, slot)
        else:
            # the same place again: no other memory is touched
            self._free.append(slot)

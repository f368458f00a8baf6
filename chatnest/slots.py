"""The places for streams that a process has: who finds none is refused before anything is reserved."""

from __future__ import annotations

from typing import ClassVar

from .conf import settings
from .errors import Overloaded


class StreamSlot:
    """One of the process's MAX_STREAMS_PER_PROCESS. Strangers hold at most half of them, so that users find some.

    Sets, because a slot may be released twice, and in any thread: adding and discarding are one step each.
    """

    _taken: ClassVar[set[StreamSlot]] = set()
    _strangers: ClassVar[set[StreamSlot]] = set()

    @classmethod
    def acquire(cls, *, stranger: bool) -> StreamSlot:
        """Raises Overloaded when all are taken, or all that a stranger may have."""
        places: int = settings.MAX_STREAMS_PER_PROCESS
        for_strangers = (places + 1) // 2  # the one place of a process that has one is theirs too
        if len(cls._taken) >= places or (stranger and len(cls._strangers) >= for_strangers):
            raise Overloaded(retry_after=1)
        slot = cls()
        cls._taken.add(slot)
        if stranger:
            cls._strangers.add(slot)
        return slot

    def release(self) -> None:
        """Again changes nothing."""
        self._taken.discard(self)
        self._strangers.discard(self)

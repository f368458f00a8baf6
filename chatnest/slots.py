"""The places for streams that a process has: who finds none is refused before anything is reserved."""

from __future__ import annotations

from typing import ClassVar, Self

from .conf import settings
from .errors import Overloaded
from .metrics import observe_streams


class StreamSlot:
    """One of the process's MAX_STREAMS_PER_PROCESS. Strangers hold at most half of them, so that users find some.

    ``with`` it what may fail before the stream has it: then it is given back.

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind:
            self.release()

    def release(self) -> None:
        """Again changes nothing."""
        self._taken.discard(self)
        self._strangers.discard(self)


observe_streams(lambda: len(StreamSlot._taken), lambda: settings.MAX_STREAMS_PER_PROCESS)

"""The places for streams in this process."""

from __future__ import annotations

from .conf import settings
from .errors import Overloaded


class StreamSlot:
    """One of the process's MAX_STREAMS_PER_PROCESS. Raises Overloaded when all are taken."""

    _taken = 0

    def __init__(self) -> None:
        if StreamSlot._taken >= settings.MAX_STREAMS_PER_PROCESS:
            raise Overloaded(retry_after=1)
        StreamSlot._taken += 1
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            StreamSlot._taken -= 1

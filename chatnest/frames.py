"""What the pump has made and the reader has not taken: a bounded buffer, in which each waits for the other."""

from __future__ import annotations

import asyncio
from typing import Final

MAX_UNREAD: Final = 16 * 1024  # bytes; past that the provider waits
STUCK: Final = "its reader takes nothing"  # why a request is cancelled: no error of the application


class Frames:
    """Bytes for the reader, each taken for one write. For one loop.

    ``left``: nobody reads any more. ``taken``: when the reader last took something, by the loop's clock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._unread = bytearray()
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._over = False
        self.left = False
        self.taken = loop.time()

    @property
    def reader_waits(self) -> bool:
        return self._reader is not None

    @property
    def writer_waits(self) -> bool:
        return self._writer is not None

    @property
    def is_stuck(self) -> bool:
        """Something is unread, and its reader does not come for it: it waits in the middle of a write."""
        return bool(self._unread) and self._reader is None

    def write(self, frames: bytes) -> None:
        if frames and not self.left:
            self._unread += frames
            _wake(self._reader)

    @property
    def are_enough(self) -> bool:
        """The writer should wait for ``room``."""
        return len(self._unread) > MAX_UNREAD

    async def room(self) -> None:
        """Wait until the reader has taken enough."""
        while self.are_enough:
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None

    async def take(self) -> bytes:
        """All that is unread, once there is something. Raises StopAsyncIteration after the end."""
        while not self._unread:
            if self._over:
                raise StopAsyncIteration
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        frames = bytes(self._unread)
        self._unread.clear()
        self.taken = self._loop.time()
        _wake(self._writer)
        return frames

    def leave(self) -> None:
        """What nobody takes is forgotten, and nobody waits for room."""
        self.left = True
        self._unread.clear()
        _wake(self._writer)

    def end(self) -> None:
        """There will be no more."""
        self._over = True
        _wake(self._reader)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter and not waiter.done():
        waiter.set_result(None)

"""When a stream has waited long enough, and when its reader hears a ping: one timer, set again only when it fired."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from .conf import settings
from .errors import UpstreamTimeout
from .frames import Frames
from .provider.answer import Answer
from .wires import chatnest

GRACE_SECONDS: Final = 1  # for [DONE], once nothing else is missing
REPORT_SECONDS: Final = 3  # for a report of usage after the finish reason


class Enough(Exception):
    """Only ``[DONE]`` is missing, and does not come."""


class Deadlines:
    """Of one stream. ``answer``: of the call that is waited for, once it is open. ``began``: by the loop's clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop, frames: Frames) -> None:
        self.answer: Answer | None = None
        self.began = 0.0
        self._loop = loop
        self._frames = frames
        self._interrupt: Callable[[Exception], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = self._spoke = 0.0  # when the provider last sent anything, and when the model did
        self._deltas = 0

    def begin(self, interrupt: Callable[[Exception], None]) -> None:
        """``interrupt`` is called with what is due: UpstreamTimeout or Enough."""
        self._interrupt = interrupt
        self.began = self._heard = self._frames.taken = self._loop.time()
        self._tick()

    def end(self) -> None:
        self._interrupt = None  # or the stream would wait for the collector
        if self._timer:
            self._timer.cancel()

    def heard(self) -> None:
        """The provider has sent something, or has not been listened to until now."""
        self._heard = self._loop.time()
        if self.answer is None:
            return
        if self.answer.heard > self._deltas:
            self._deltas = self.answer.heard
            self._spoke = self._heard
        if self.answer.may_end:
            self._tick()

    def is_too_late(self, wait: float) -> bool:
        """Whether the first token could not come in time any more after waiting so many seconds."""
        return self._loop.time() + wait > self.began + float(settings.FIRST_TOKEN_SECONDS)

    def _tick(self) -> None:
        if self._timer:
            self._timer.cancel()
        now = self._loop.time()
        if not self._frames.reader_waits:  # the client is slow to read, and hears of it
            self._frames.taken = now
        elif now >= self._frames.taken + settings.HEARTBEAT_SECONDS:
            self._frames.taken = now
            self._frames.write(chatnest.PING)
        due, why = self._next()
        if self._interrupt is None:
            return
        if now >= due:
            self._interrupt(why)
        else:
            # The first piece begins a gap, and arms nothing.
            due = min(due, self._frames.taken + settings.HEARTBEAT_SECONDS, now + settings.GAP_SECONDS)
            self._timer = self._loop.call_at(max(due, now + 0.01), self._tick)

    def _next(self) -> tuple[float, Exception]:
        """When waiting ends, and with what."""
        last = self.began + settings.MAX_STREAM_SECONDS
        answer = self.answer
        if self._frames.writer_waits:  # it is the reader that is waited for
            return last, UpstreamTimeout()
        if answer and answer.finish_reason:
            grace = GRACE_SECONDS if answer.report else REPORT_SECONDS
            return min(last, self._spoke + (grace if answer.may_end else settings.GAP_SECONDS)), Enough()
        if answer and answer.heard:
            return min(last, self._heard + settings.GAP_SECONDS), UpstreamTimeout()
        return min(last, self.began + settings.FIRST_TOKEN_SECONDS), UpstreamTimeout()

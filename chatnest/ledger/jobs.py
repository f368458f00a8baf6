"""What waits in the batcher's queue, and how its answer gets back to the event loop of who asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from .operations import Hold, Reserve, Settle

Release = Callable[[Hold], object]


class Job:
    """Something to do, and the future of who waits for the answer; without a loop nobody does."""

    __slots__ = ("future", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self.future: asyncio.Future[Any] | None = loop.create_future() if loop else None

    @property
    def is_abandoned(self) -> bool:
        """Who asked has given up, so the answer need not be found. Nobody gives up a settlement."""
        return self.future is not None and self.future.done()


class QueryJob(Job):
    __slots__ = ("query",)

    def __init__(self, query: Callable[[], Any], loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(loop)
        self.query = query


class LaterJob(Job):
    """Nobody waits for it: done when ``at`` has come, by the monotonic clock, or when the thread ends."""

    __slots__ = ("at", "work")

    def __init__(self, work: Callable[[], object], at: float) -> None:
        super().__init__()
        self.work = work
        self.at = at


class OperationJob(Job):
    __slots__ = ("is_kept", "operation")

    def __init__(self, operation: Reserve | Settle, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(loop)
        self.operation = operation
        self.is_kept = False  # over an outage


Answers = list[tuple[Job, Any]]


def send(answers: Iterable[tuple[Job, Any]], release: Release) -> None:
    """Wake up each loop that waits, once. A hold whose asker has gone is released. From any thread."""
    of_loop: dict[asyncio.AbstractEventLoop, Answers] = {}
    for job, answer in answers:
        if job.loop:
            of_loop.setdefault(job.loop, []).append((job, answer))
    for loop, its_answers in of_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, its_answers, release)
        except RuntimeError:  # the loop is closed, and with it everyone who waited
            for _, answer in its_answers:
                _release(answer, release)


def _deliver(answers: Answers, release: Release) -> None:
    """In the loop of those who wait."""
    for job, answer in answers:
        assert job.future
        if job.future.done():
            _release(answer, release)
        elif isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)


def _release(answer: object, release: Release) -> None:
    if isinstance(answer, Hold):
        release(answer)

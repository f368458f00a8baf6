"""The async door to the ledger: group commit, leases, and the policy in force. Nobody else awaits the database.

One thread a process, with one connection, drains a queue (``worker``). When the database does not answer, those who
wait to reserve are told so; settlements are kept and tried again.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Final, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

from ..errors import LedgerUnavailable, Overloaded
from ..models import Calibration
from ..policy import Policy, PolicyCache
from .jobs import Job, LaterJob, OperationJob, QueryJob
from .operations import Hold, Lesson, Reserve, Settle
from .outage import Outage
from .worker import LiveStream, Worker, give_back

T = TypeVar("T")

MAX_WAITING: Final = 10_000
ANSWER_SECONDS: Final = 5.0  # a request waits this long for the database, then it is refused
PATIENCE_SECONDS: Final = 2.0  # an answer's end waits this long to say what is left of the day
CLOSE_SECONDS: Final = 10.0


class Batcher:
    """All methods may be called from any thread and any event loop; ``settle`` from a finalizer too."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """A new process's state: also after a fork, whose child has neither the thread nor its connection."""
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outage = Outage()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._live: WeakValueDictionary[UUID, LiveStream] = WeakValueDictionary()
        self._policies = PolicyCache()

    # For the event loops.

    async def policy(self, accounts: Sequence[str]) -> Policy:
        """What operators decided about ``accounts``, at most two seconds old. Raises as ``query`` does."""
        if policy := self._policies.recall(accounts):
            return policy
        return await self.query(partial(self._policies.read, accounts))

    def calibration(self, provider: str, model: str) -> Calibration | None:
        """What was known of a model when the policy was last read."""
        return self._policies.calibration(provider, model)

    def forget_policy(self, *, calibrations: bool = False) -> None:
        self._policies.forget(calibrations=calibrations)

    async def query(self, query: Callable[[], T]) -> T:
        """Run a read in the batcher's thread. Raises LedgerUnavailable and Overloaded."""
        return await self._ask(QueryJob(query, asyncio.get_running_loop()))  # type: ignore[no-any-return]

    async def reserve(self, ask: Reserve) -> Hold:
        """Raises what the ledger refuses with, LedgerUnavailable and Overloaded. If cancelled, leaves no hold."""
        return await self._ask(OperationJob(ask, asyncio.get_running_loop()))  # type: ignore[no-any-return]

    def settle(self, ask: Settle) -> None:
        """Settle some time, whoever lives to see it."""
        self._put(OperationJob(ask))
        self._heed(ask.lesson)

    async def settled(self, ask: Settle) -> int | None:
        """Settle, and wait a little for what is left of the payer's day; None if that takes too long."""
        job = OperationJob(ask, asyncio.get_running_loop())
        assert job.future
        self._put(job)
        await asyncio.wait([job.future], timeout=PATIENCE_SECONDS)
        self._heed(ask.lesson)
        return job.future.result() if job.future.done() and not job.future.exception() else None

    def later(self, seconds: float, work: Callable[[], object]) -> None:
        """Write what nobody waits for in so many seconds, or at the thread's polite end if that is sooner."""
        self._put(LaterJob(work, time.monotonic() + seconds))

    def _heed(self, lesson: Lesson | None) -> None:
        if lesson and lesson.is_news(self.calibration(lesson.provider, lesson.model)):
            self.forget_policy()

    def watch(self, stream: LiveStream) -> None:
        """Renew this stream's lease for as long as the stream exists or until ``unwatch``."""
        self._live[stream.hold.id] = stream

    def unwatch(self, stream: LiveStream) -> None:
        self._live.pop(stream.hold.id, None)

    async def _ask(self, job: Job) -> Any:
        if self._queue.qsize() >= MAX_WAITING:
            raise Overloaded(retry_after=1)
        assert job.future
        assert job.loop
        patience = job.loop.call_later(ANSWER_SECONDS, self._give_up, job.future)
        self._put(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            if not job.future.cancelled() and not job.future.exception() and isinstance(job.future.result(), Hold):
                self._give_back(job.future.result())
            raise
        finally:
            patience.cancel()

    def _give_up(self, future: asyncio.Future[Any]) -> None:
        if not future.done():
            self._outage.begins(f"no answer in {ANSWER_SECONDS:g} s", writing=True, refused=1)
            future.set_exception(LedgerUnavailable(retry_after=5))

    def _give_back(self, hold: Hold) -> None:
        self.settle(give_back(hold))

    def _put(self, job: Job | None) -> None:
        # SimpleQueue.put is reentrant, as a finalizer needs; and no lock is waited for here.
        self._queue.put(job)
        self.start()

    def start(self) -> None:
        """Start the thread, if there is none."""
        if self._thread is None and self._starting.acquire(blocking=False):
            try:
                if self._thread is None:
                    worker = Worker(self._queue, self._live, self._outage, self._give_back)
                    thread = threading.Thread(target=worker.run, name="chatnest-ledger", daemon=True)
                    # What traces requests (Sentry's scope) would take all that the thread does for this one's.
                    Context().run(thread.start)
                    self._thread = thread  # who closes joins it, so not before it runs
            finally:
                self._starting.release()

    def close(self) -> None:
        """Settle what waits, close the connection, end the thread. A later request starts another."""
        while thread := self._thread:
            self._queue.put(None)
            thread.join(CLOSE_SECONDS)
            self._thread, self._outage = None, Outage()
            if not (thread.is_alive() or self._queue.empty()):  # it had ended, and who put this still saw it
                self.start()


batcher: Final = Batcher()
atexit.register(batcher.close)
os.register_at_fork(after_in_child=batcher._begin)

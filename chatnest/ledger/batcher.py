"""The async door to the ledger: group commit, leases, and the policy in force. Nobody else awaits the database.

One thread a process, with one connection, drains a queue: whatever waits goes into one transaction. There is no
timer: a lone request goes at once, and while one transaction commits the next one's requests gather. The thread
also renews the leases of the process's live streams, with one statement every third of a lease, and charges those
that dead processes left, at most a second after it last wrote anything.

When the database does not answer, those who wait to reserve are told so; settlements are kept and tried again.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

from django.db import DataError, Error, IntegrityError, connections

from ..conf import settings
from ..errors import InternalError, LedgerUnavailable, Overloaded
from ..models import Calibration, Reservation
from ..policy import Policy, PolicyCache
from . import decisions, leases
from .operations import Hold, Operation, Reserve, Settle

T = TypeVar("T")

logger = logging.getLogger("chatnest.ledger")

MAX_BATCH: Final = 256
MAX_WAITING: Final = 10_000
ANSWER_SECONDS: Final = 5.0  # a request waits this long for the database, then it is refused
PATIENCE_SECONDS: Final = 2.0  # an answer's end waits this long to say what is left of the day
RETRY_SECONDS: Final = 0.5
LOOK_SECONDS: Final = 1.0  # between two looks for overdue leases
IDLE_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 10.0


class LiveStream(Protocol):
    """A stream whose lease is renewed. ``stop`` is called from the batcher's thread."""

    @property
    def hold(self) -> Hold: ...
    def stop(self) -> None: ...


Query = Callable[[], Any]


class Job:
    """An operation on the ledger, or a query; and the future, in its loop, of who waits for the answer."""

    __slots__ = ("future", "loop", "work")

    def __init__(self, work: Operation | Query, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.work = work
        self.loop = loop
        self.future: asyncio.Future[Any] | None = loop.create_future() if loop else None

    @property
    def forsaken(self) -> bool:
        """Nobody waits for the answer any more, so it need not be found."""
        return not isinstance(self.work, Settle) and self.future is not None and self.future.done()


class Batcher:
    """All methods may be called from any thread and any event loop; ``settle`` from a finalizer too."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """A new process's state: also after a fork, whose child has neither the thread nor its connection."""
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
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
        return await self._ask(query)  # type: ignore[no-any-return]

    async def reserve(self, ask: Reserve) -> Hold:
        """Raises what the ledger refuses with, LedgerUnavailable and Overloaded. If cancelled, leaves no hold."""
        return await self._ask(ask)  # type: ignore[no-any-return]

    def settle(self, ask: Settle) -> None:
        """Settle some time, whoever lives to see it."""
        self._put(Job(ask))

    async def settled(self, ask: Settle) -> int | None:
        """Settle, and wait a little for what is left of the payer's day; None if that takes too long."""
        loop = asyncio.get_running_loop()
        job = Job(ask, loop)
        assert job.future
        self._put(job)
        await asyncio.wait([job.future], timeout=PATIENCE_SECONDS)
        return job.future.result() if job.future.done() and not job.future.exception() else None

    def watch(self, stream: LiveStream) -> None:
        """Renew this stream's lease for as long as the stream exists or until ``unwatch``."""
        self._live[stream.hold.id] = stream

    def unwatch(self, stream: LiveStream) -> None:
        self._live.pop(stream.hold.id, None)

    async def _ask(self, work: Operation | Query) -> Any:
        if self._queue.qsize() >= MAX_WAITING:
            raise Overloaded(retry_after=1)
        loop = asyncio.get_running_loop()
        job = Job(work, loop)
        assert job.future
        patience = loop.call_later(ANSWER_SECONDS, _give_up, job.future)
        self._put(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            if not job.future.cancelled() and not job.future.exception():
                self._release(job.future.result())
            raise
        finally:
            patience.cancel()

    def _deliver(self, answers: Iterable[tuple[Job, Any]]) -> None:
        """In the loop of those who wait: whoever has left meanwhile leaves no hold behind."""
        for job, answer in answers:
            assert job.future
            if job.future.done():
                self._release(answer)
            elif isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    def _release(self, answer: object) -> None:
        if isinstance(answer, Hold):
            self.settle(Settle(hold=answer, outcome=Reservation.Outcome.CANCELLED))

    def _put(self, job: Job | None) -> None:
        # SimpleQueue.put is reentrant, as a finalizer needs; and no lock is waited for here.
        self._queue.put(job)
        if self._thread is None and self._starting.acquire(blocking=False):
            try:
                if self._thread is None:
                    self._thread = threading.Thread(target=Worker(self).run, name="chatnest-ledger", daemon=True)
                    self._thread.start()
            finally:
                self._starting.release()

    def close(self) -> None:
        """Settle what waits, close the connection, end the thread. A later request starts another."""
        if thread := self._thread:
            self._queue.put(None)
            thread.join(CLOSE_SECONDS)
            self._thread = None


class Worker:
    """What runs in the batcher's thread, over one connection."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._queue = batcher._queue
        self._alias: str = settings.DATABASE_ALIAS
        self._kept: deque[Job] = deque()  # settlements that the database has not taken yet
        self._retry_at = 0.0
        self._renew_at = time.monotonic() + settings.LEASE_SECONDS / 3
        self._look_at = 0.0
        self._stirred = False  # something was written since the last look

    def run(self) -> None:
        let_the_loop_go_first()
        _be_impatient(self._alias)
        going_on = True
        while going_on:
            jobs = self._gather()
            if going_on := None not in jobs:
                self._renew_if_due()
            self._work([job for job in jobs if job])
            self._look_if_due()
        while not self._queue.empty():  # what the last answers gave back
            self._work([job for job in self._gather() if job])
        waiting = -1
        while self._kept and len(self._kept) != waiting:  # for as long as the database takes any
            waiting = len(self._kept)
            self._work([])
        if self._kept:
            logger.error("Ending with %d settlements unwritten: their leases charge the full hold", len(self._kept))
        connections.close_all()

    def _gather(self) -> list[Job | None]:
        """Everything that waits, or nothing once it is time for something else. None in it: the end."""
        jobs: list[Job | None] = []
        with suppress(queue.Empty):
            jobs.append(self._queue.get(timeout=self._patience()))
            while len(jobs) < MAX_BATCH and jobs[-1]:
                jobs.append(self._queue.get_nowait())
        return jobs

    def _patience(self) -> float:
        """Seconds until there is something to do that nobody asks for."""
        # Streams may begin to be watched at any time, and nothing tells this thread.
        due = [time.monotonic() + min(IDLE_SECONDS, settings.LEASE_SECONDS / 3)]
        due += [self._retry_at] * bool(self._kept)
        due += [self._renew_at] * bool(self._batcher._live)
        due += [self._look_at] * self._stirred
        return max(0.0, min(due) - time.monotonic())

    def _work(self, jobs: list[Job]) -> None:
        if not (jobs or self._kept or self._batcher._live or self._stirred):
            connections[self._alias].close()  # idle: somebody else may have the place
        jobs = [job for job in jobs if not job.forsaken]
        for job in jobs:
            if callable(job.work):
                self._send([(job, self._answer(job.work))])
        kept = [self._kept.popleft() for _ in range(min(len(self._kept), MAX_BATCH))]
        if due := kept + [job for job in jobs if not callable(job.work)]:
            self._commit(due)

    def _answer(self, query: Query) -> Any:
        try:
            return self._with_fresh_connection(query)
        except Exception as error:
            logger.warning("The database cannot be read", exc_info=error)
            connections[self._alias].close()
            return LedgerUnavailable(retry_after=5)

    def _commit(self, jobs: list[Job]) -> None:
        asked = [job.work for job in jobs if not callable(job.work)]
        try:
            answers = self._with_fresh_connection(lambda: decisions.apply(asked))
        except Exception as error:
            if _is_outage(error):
                self._put_off(jobs, error)
            elif len(jobs) == 1:
                logger.critical("The ledger cannot take %r", asked[0], exc_info=error)
                self._send([(jobs[0], InternalError())])
            else:  # one of them is poison, and fails alone
                for job in jobs:
                    self._commit([job])
        else:
            self._stirred = True
            self._send(list(zip(jobs, answers, strict=True)))

    def _with_fresh_connection(self, work: Any) -> Any:
        """Do it again if a dead connection was to blame: after a restart of the database, the first one is."""
        try:
            return work()
        except Exception as error:
            if not _is_outage(error):
                raise
            connections[self._alias].close()
            return work()

    def _put_off(self, jobs: list[Job], error: Exception) -> None:
        """The database is away: requests are refused, settlements are kept."""
        logger.warning("The database does not answer, %d operations put off: %s", len(jobs), error)
        connections[self._alias].close()
        self._retry_at = time.monotonic() + RETRY_SECONDS
        for job in jobs:
            if isinstance(job.work, Reserve):
                self._kept.append(Job(_undo(job.work)))
            else:
                self._kept.append(job)
        self._send([(job, LedgerUnavailable(retry_after=5)) for job in jobs if isinstance(job.work, Reserve)])

    def _look_if_due(self) -> None:
        """Charge the overdue leases of processes that died. Nobody waits for it, so not in every transaction."""
        if not self._stirred or time.monotonic() < self._look_at:
            return
        self._stirred = False
        self._look_at = time.monotonic() + LOOK_SECONDS
        try:
            self._with_fresh_connection(leases.expire_overdue)
        except Exception as error:
            logger.warning("Overdue leases cannot be charged now: %s", error)
            connections[self._alias].close()

    def _renew_if_due(self) -> None:
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + settings.LEASE_SECONDS / 3
        streams = [stream for ref in self._batcher._live.valuerefs() if (stream := ref())]
        if not streams:
            return
        ids = [stream.hold.id for stream in streams]
        accounts = {account for stream in streams for account in stream.hold.budgets}
        try:
            stopped, paused = self._with_fresh_connection(lambda: leases.renew(ids, accounts))
        except Exception as error:
            logger.warning("Leases cannot be renewed: %s", error)
            connections[self._alias].close()
            self._renew_at = time.monotonic() + RETRY_SECONDS
            return
        self._stirred = True
        for stream in streams:
            if stream.hold.id in stopped or not paused.isdisjoint(stream.hold.budgets):
                stream.stop()

    def _send(self, answers: list[tuple[Job, Any]]) -> None:
        """One wake-up for each loop that waits."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Job, Any]]] = {}
        for job, answer in answers:
            if job.loop:
                loops.setdefault(job.loop, []).append((job, answer))
        for loop, its_answers in loops.items():
            try:
                loop.call_soon_threadsafe(self._batcher._deliver, its_answers)
            except RuntimeError:  # the loop is closed, and with it everyone who waited
                for _, answer in its_answers:
                    self._batcher._release(answer)


def _give_up(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(LedgerUnavailable(retry_after=5))


def _is_outage(error: Exception) -> bool:
    """The database's fault, not the operation's: it may take the same operation later."""
    return isinstance(error, Error) and not isinstance(error, IntegrityError | DataError)


def _undo(ask: Reserve) -> Settle:
    """Gives back a hold that may or may not have been committed."""
    hold = Hold(
        id=ask.id,
        day=ask.day,
        budgets=ask.budgets,
        provider=ask.provider,
        model=ask.model,
        prompt_tokens=ask.prompt_tokens,
        output_tokens=0,
        remaining=0,
    )
    return Settle(hold=hold, outcome=Reservation.Outcome.CANCELLED)


def _be_impatient(alias: str) -> None:
    """Notice a PostgreSQL that has gone away in seconds, not in the minutes that TCP takes by default."""
    connection = connections[alias]
    if connection.vendor == "postgresql":
        patience = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
        options = {**patience, **connection.settings_dict.get("OPTIONS", {})}
        connection.settings_dict = {**connection.settings_dict, "OPTIONS": options}


def let_the_loop_go_first() -> None:
    """This thread need not interrupt another that runs: where it would only wait for the interpreter's lock.

    Under load a sixth of a request's CPU was two threads taking the core from each other. Linux only: it knows
    which threads are batch jobs (https://man7.org/linux/man-pages/man7/sched.7.html).
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


batcher: Final = Batcher()
atexit.register(batcher.close)
os.register_at_fork(after_in_child=batcher._begin)

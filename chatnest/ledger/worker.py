"""The batcher's thread: whatever waits goes into one transaction; leases are renewed, and those of the dead charged.

There is no timer: a lone request goes at once, and while one transaction commits the next one's requests gather.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

from django.db import connections

from ..conf import settings
from ..errors import InternalError, LedgerUnavailable
from ..logs import fields
from ..metrics import renewed
from ..models import Reservation
from . import decisions, leases
from .jobs import Answers, Job, LaterJob, OperationJob, QueryJob, Release, send
from .operations import Hold, Settle
from .outage import Outage
from .transactions import CommitUnknown, is_bug, is_conflict, is_outage

T = TypeVar("T")

logger = logging.getLogger("chatnest.ledger")

MAX_BATCH: Final = 256
RETRY_SECONDS: Final = 0.5
LOOK_SECONDS: Final = 1.0  # between two looks for overdue leases
IDLE_SECONDS: Final = 10.0


class LiveStream(Protocol):
    """A stream whose lease is renewed. ``stop`` is called from the worker's thread."""

    @property
    def hold(self) -> Hold: ...
    def stop(self) -> None: ...


class Worker:
    """What runs in the thread, over one connection, until a None is in the queue."""

    def __init__(
        self,
        jobs: queue.SimpleQueue[Job | None],
        live: WeakValueDictionary[UUID, LiveStream],
        outage: Outage,
        release: Release,
    ) -> None:
        self._queue = jobs
        self._live = live
        self._outage = outage
        self._release = release
        self._alias: str = settings.DATABASE_ALIAS
        self._unsettled: deque[OperationJob] = deque()  # settlements that the database has not taken yet
        self._later: list[LaterJob] = []
        self._wrote = False  # something since the last look for overdue leases
        self._retry_at = self._look_at = 0.0
        self._renewed_at = time.monotonic()

    def run(self) -> None:
        let_the_loop_go_first()
        limit_waiting(self._alias)
        going_on = True
        while going_on:
            jobs = self._gather()
            if going_on := None not in jobs:
                self._renew_if_due()
            self.work([job for job in jobs if job])
            self._do_later(time.monotonic())
            self._look_if_due()
        while not self._queue.empty():  # what the last answers gave back
            self.work([job for job in self._gather() if job])
        unsettled = -1
        while self._unsettled and len(self._unsettled) != unsettled:  # for as long as the database takes any
            unsettled = len(self._unsettled)
            self.work([])
        self._do_later(math.inf)
        if self._unsettled:
            logger.error(
                "Ending with %d settlements unwritten: their leases charge the full hold", len(self._unsettled)
            )
        connections.close_all()

    def _gather(self) -> list[Job | None]:
        """Everything that waits, or nothing once it is time for something else. None in it: the end."""
        jobs: list[Job | None] = []
        with suppress(queue.Empty):
            jobs.append(self._queue.get(timeout=self._seconds_until_due()))
            while len(jobs) < MAX_BATCH and jobs[-1]:
                jobs.append(self._queue.get_nowait())
        return jobs

    @property
    def _renew_at(self) -> float:
        seconds: float = settings.LEASE_SECONDS / 3
        return self._renewed_at + seconds

    def _seconds_until_due(self) -> float:
        """Until there is something to do that nobody asks for."""
        # Streams may begin to be watched at any time, and nothing tells this thread.
        due = [time.monotonic() + min(IDLE_SECONDS, settings.LEASE_SECONDS / 3)]
        due += [self._retry_at] * bool(self._unsettled)
        due += [self._renew_at] * bool(self._live)
        due += [self._look_at] * self._wrote
        due += [job.at for job in self._later]
        return max(0.0, min(due) - time.monotonic())

    def work(self, jobs: Sequence[Job]) -> None:
        if not (jobs or self._unsettled or self._live or self._wrote or self._later):
            connections[self._alias].close()  # idle: somebody else may have the place
        jobs = [job for job in jobs if not job.is_abandoned]
        self._later += [job for job in jobs if isinstance(job, LaterJob)]
        for job in jobs:
            if isinstance(job, QueryJob):
                send([(job, self._answer(job.query))], self._release)
        again = [self._unsettled.popleft() for _ in range(min(len(self._unsettled), MAX_BATCH))]
        if due := again + [job for job in jobs if isinstance(job, OperationJob)]:
            self._commit(due)

    def _answer(self, query: Callable[[], object]) -> object:
        try:
            answer = self._on_a_live_connection(query)
        except Exception as error:
            # One that failed while it was made is half made: it would open no transaction, and commit nothing.
            connections[self._alias].close()
            if is_outage(error):
                self._outage.begins(error, writing=False, refused=1)
                return LedgerUnavailable(retry_after=5)
            logger.critical("The ledger cannot be read", exc_info=error)
            return InternalError()
        self._outage.ends(writing=False)
        return answer

    def _do_later(self, now: float) -> None:
        due = [job for job in self._later if job.at <= now]
        self._later = [job for job in self._later if job.at > now]
        for job in due:
            self._answer(job.work)

    def _commit(self, jobs: Sequence[OperationJob]) -> None:
        try:
            answers = self._on_a_live_connection(lambda: decisions.apply([job.operation for job in jobs]))
        except Exception as error:
            if is_outage(error):
                send(self._refuse_or_keep(jobs, error), self._release)
            elif is_bug(error) or len(jobs) == 1:
                others = f" and {len(jobs) - 1} others" if len(jobs) > 1 else ""
                first = jobs[0].operation
                about = fields(first.hold if isinstance(first, Settle) else first)
                logger.critical("The ledger cannot take %r%s", first, others, exc_info=error, extra=about)
                send([(job, InternalError()) for job in jobs], self._release)
            else:  # one of them is poison, and fails alone
                for job in jobs:
                    self._commit([job])
        else:
            self._wrote = True
            self._outage.ends(writing=True)
            send(zip(jobs, answers, strict=True), self._release)

    def _refuse_or_keep(self, jobs: Sequence[OperationJob], error: Exception) -> Answers:
        """The database is away: requests are refused, settlements are kept."""
        connections[self._alias].close()
        self._retry_at = time.monotonic() + RETRY_SECONDS
        refused, kept = [], 0
        for job in jobs:
            if isinstance(job.operation, Settle):
                kept += not job.is_kept
                job.is_kept = True
                self._unsettled.append(job)
                continue
            refused.append(job)
            if isinstance(error, CommitUnknown):  # else nothing of it is there to give back
                self._unsettled.append(OperationJob(give_back(job.operation.held())))
        self._outage.begins(error, writing=True, refused=len(refused), kept=kept)
        return [(job, LedgerUnavailable(retry_after=5)) for job in refused]

    def _on_a_live_connection(self, work: Callable[[], T]) -> T:
        """Again, if a dead connection was to blame: after a restart of the database, the first one is."""
        try:
            return work()
        except Exception as first:
            if not is_outage(first) or is_conflict(first):  # of conflicts it has had enough
                raise
            connections[self._alias].close()
            try:
                return work()
            except Exception as second:
                if isinstance(first, CommitUnknown) and is_outage(second):
                    raise first from second  # what the first one did is still not known
                raise

    def _look_if_due(self) -> None:
        """Charge the overdue leases of processes that died. Nobody waits for it, so not in every transaction."""
        if not self._wrote or time.monotonic() < self._look_at:
            return
        self._wrote = False
        self._look_at = time.monotonic() + LOOK_SECONDS
        try:
            self._on_a_live_connection(leases.expire_overdue)
        except Exception as error:
            self._note(error, "Overdue leases cannot be charged")

    def _renew_if_due(self) -> None:
        if time.monotonic() < self._renew_at:
            return
        self._renewed_at = time.monotonic()
        streams = [stream for ref in self._live.valuerefs() if (stream := ref())]
        if not streams:
            return
        ids = [stream.hold.id for stream in streams]
        accounts = {account for stream in streams for account in stream.hold.accounts}
        try:
            stopped, paused = self._on_a_live_connection(lambda: leases.renew(ids, accounts))
        except Exception as error:
            renewed(len(ids), error)
            self._note(error, "Leases cannot be renewed")
            if is_outage(error):
                self._renewed_at = time.monotonic() + RETRY_SECONDS - settings.LEASE_SECONDS / 3
            return
        renewed(len(ids))
        self._wrote = True
        self._outage.ends(writing=True)
        for stream in streams:
            if stream.hold.id in stopped or not paused.isdisjoint(stream.hold.accounts):
                stream.stop()

    def _note(self, error: Exception, what: str) -> None:
        connections[self._alias].close()
        if is_outage(error):
            self._outage.begins(error, writing=True)
        else:
            logger.critical(what, exc_info=error)


def give_back(hold: Hold) -> Settle:
    """Whoever asked for it has gone, or does not know whether it was committed. Its provider was never called."""
    return Settle(hold=hold, outcome=Reservation.Outcome.CANCELLED)


def limit_waiting(alias: str) -> None:
    """Notice a PostgreSQL that has gone away in seconds, not in the minutes that TCP takes by default."""
    connection = connections[alias]
    if connection.vendor == "postgresql":
        limits = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
        options = {**limits, **connection.settings_dict.get("OPTIONS", {})}
        connection.settings_dict = {**connection.settings_dict, "OPTIONS": options}


def let_the_loop_go_first() -> None:
    """This thread need not interrupt another that runs: where it would only wait for the interpreter's lock.

    Under load a sixth of a request's CPU was two threads taking the core from each other. Linux only: it knows
    which threads are batch jobs (https://man7.org/linux/man-pages/man7/sched.7.html).
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

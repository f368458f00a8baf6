"""The book of one ledger transaction: its rows locked in key order, changed in memory, written once.

A usage row's lock guards that account's reservations and rate windows of the day too, so no other row needs
one to be counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Max, Q

from ..conf import moment, settings, stored
from ..models import Adjustment, Calibration, DailyUsage, RateWindow, Reservation, UsageLine
from .bulk import Rows, Statement, insert, run, update
from .days import days_of, month_of
from .lines import ADD_TO_LINE, Bills
from .operations import Lesson
from .rows import RESERVATION, RESOLUTION, USAGE, ReservationRow, UsageRow, columns, reservation_row
from .statements import (
    ADD_TO_WINDOW,
    READ_COMMITTED,
    add_to_calibration,
    add_up_month,
    count_requests,
    count_streams,
    lock_reservations,
    lock_usage,
)

Key = tuple[date, str]
Month = tuple[date, str]  # its first day, and an account
Read = tuple[Statement, Callable[[Rows], None]]
Rate = tuple[str, int]  # a payer, and the length of its rate window in seconds
State, UsageSource, Kind = Reservation.State, Reservation.UsageSource, Adjustment.Kind


_NOTHING_LEARNED: Final = {
    "reports": 0,
    "prompt_excess": 0,
    "completion_excess": 0,
    "reasons_unseen": False,
    "ignores_max_tokens": False,
}


class Book:
    """Opened inside a transaction with what will be touched; ``write`` before the commit."""

    def __init__(
        self,
        *,
        keys: Iterable[Key] = (),
        ids: Iterable[UUID] = (),
        rates: Iterable[Rate] = (),
        months: Iterable[Month] = (),
    ) -> None:
        self._alias: str = settings.DATABASE_ALIAS
        self.moment = moment()
        self.now = stored(self.moment)
        self._usage: dict[Key, UsageRow] = {}
        self.reservations: dict[UUID, ReservationRow] = {}
        self._rates = {rate: [0, 0] for rate in rates}
        self._streams: dict[str, int] = {}
        self._inserted: dict[UUID, dict[str, Any]] = {}
        self._changed: dict[UUID, ReservationRow] = {}
        self._posted: set[Key] = set()
        self.bills = Bills()
        self._months: dict[Month, int] = dict.fromkeys(sorted(set(months)), 0)
        self._counted: Counter[tuple[date, Rate]] = Counter()
        self._adjustments: list[dict[str, Any]] = []
        self._forgiven_now: set[Key] = set()
        self._learned: dict[tuple[str, str], dict[str, Any]] = {}
        self._after_commit: list[Callable[[], object]] = []
        self._keys, self._ids = sorted({*keys, *self._months}), sorted(set(ids))
        self._read()
        if self._some_were_made_meanwhile():
            self._read()
        self._missing = {key for key in self._keys if key not in self._usage}
        self._usage |= {key: UsageRow(*key) for key in self._missing}

    # Reading: all in one round trip, the locks first.

    def _read(self) -> None:
        reads = [
            *self._isolate(),
            *self._lock(),
            *self._find(),
            *self._add_up_months(),
            *self._count_requests(),
            *self._count_streams(),
        ]
        for (_, take), rows in zip(reads, run(self._alias, [one for one, _ in reads]), strict=True):
            take(rows)

    def _some_were_made_meanwhile(self) -> bool:
        """Rows that were not there to be locked: of a reservation whose commit was waited for."""
        keys = ((row.day, account) for row in self.reservations.values() for account in row.accounts)
        return any(key not in self._usage for key in keys)

    def _isolate(self) -> Iterator[Read]:
        connection = self._connection
        if connection.vendor == "postgresql" and not connection.savepoint_ids:  # within another's it is too late
            yield READ_COMMITTED, lambda rows: None

    def _lock(self) -> Iterator[Read]:
        for day, of_day in groupby(self._keys, itemgetter(0)):

            def take(rows: Rows, day: date = day) -> None:
                self._usage.update({(day, row[-1]): UsageRow(day, row[-1], *row[:-1]) for row in rows})

            yield lock_usage(self._connection, day, [account for _, account in of_day]), take

    def _find(self) -> Iterator[Read]:
        def take(rows: Rows) -> None:
            self.reservations = {row.id: row for row in map(reservation_row, rows)}

        if self._ids:
            yield lock_reservations(self._connection, self._ids, self.now), take

    def _add_up_months(self) -> Iterator[Read]:
        """What accounts have spent in a month, by all its days, of which two are locked: that which is spent from, and
        the first, so that nobody else spends from the month meanwhile on another day."""
        for month in sorted({month for month, _ in self._months}):
            of_month = [account for first, account in self._months if first == month]

            def take(rows: Rows, month: date = month, of_month: list[str] = of_month) -> None:
                costs: dict[str, Any] = dict(rows)
                self._months.update({(month, account): int(costs.get(account, 0)) for account in of_month})

            yield add_up_month(self._connection, days_of(month), of_month), take

    def _count_requests(self) -> Iterator[Read]:
        for seconds in {seconds for _, seconds in self._rates}:
            of_payer = {payer: self._rates[payer, length] for payer, length in self._rates if length == seconds}

            def take(rows: Rows, of_payer: dict[str, list[int]] = of_payer) -> None:
                for counts in of_payer.values():
                    counts[:] = 0, 0
                for payer, is_this, count in rows:
                    of_payer[payer][0 if is_this else 1] += count

            yield count_requests(self._connection, seconds, *self._windows(seconds), [*of_payer]), take

    def _windows(self, seconds: int) -> tuple[datetime, datetime]:
        """The starts of this window and of the one before."""
        start = int(self.moment.timestamp()) // seconds * seconds
        return stored(datetime.fromtimestamp(start, UTC)), stored(datetime.fromtimestamp(start - seconds, UTC))

    def _count_streams(self) -> Iterator[Read]:
        def take(rows: Rows) -> None:
            self._streams = dict.fromkeys(payers, 0) | dict(rows)

        if payers := [*{payer for payer, _ in self._rates}]:
            yield count_streams(self._connection, payers, self.now), take

    @property
    def _connection(self) -> BaseDatabaseWrapper:
        return connections[self._alias]

    # Asking.

    def used(self, day: date, account: str) -> int:
        return self._usage[day, account].tokens_used

    def crossed(self, day: date, account: str) -> int:
        """The percentage of its limit whose crossing has been told."""
        return self._usage[day, account].crossed

    def committed(self, day: date, account: str) -> int:
        """Tokens spent or promised; 0 for a key that this book did not open."""
        usage = self._usage.get((day, account))
        return usage.tokens_used + usage.tokens_reserved if usage else 0

    def cost(self, day: date, account: str) -> int:
        """Money spent or promised in a day."""
        usage = self._usage[day, account]
        return usage.cost_used + usage.cost_reserved

    def cost_of_month(self, day: date, account: str) -> int:
        """Money spent or promised in the month of ``day``, which this book must have been opened with."""
        return self._months[month_of(day), account]

    def used_cost(self, day: date, account: str) -> int:
        return self._usage[day, account].cost_used

    def streams(self, payer: str) -> int:
        """The payer's open reservations."""
        return self._streams.get(payer, 0)

    def rate(self, payer: str, seconds: int) -> tuple[int, int, float]:
        """The requests in this window and in the one before, and how much of this one has passed (0 to 1)."""
        this, last = self._rates[payer, seconds]
        return this, last, (self.now - self._windows(seconds)[0]).total_seconds() / seconds

    def was_forgiven(self, day: date, account: str, since: datetime) -> bool:
        """Whether what the account had used by then was forgiven."""
        key = day, account
        return key in self._forgiven_now or (key in self._forgiven and self._forgiven[key] >= since)

    @cached_property
    def _forgiven(self) -> dict[Key, datetime]:
        """When each account was last forgiven anything. Few transactions ask; one that does asks for all it opened."""
        chosen = Q(pk__in=())
        for day, of_day in groupby(sorted(self._usage), itemgetter(0)):
            chosen |= Q(day=day, account__in=[account for _, account in of_day])
        rows = Adjustment.objects.using(self._alias).filter(chosen, kind=Kind.FORGIVEN).order_by()
        rows = rows.filter(Q(tokens__lt=0) | Q(cost__lt=0))  # the others take some of it back
        return {(day, name): at for day, name, at in rows.values_list("day", "account").annotate(Max("created_at"))}

    # Changing.

    def post(self, day: date, account: str, **changes: int) -> None:
        """Add to the counters of one account's day."""
        usage = self._usage[day, account]
        self._posted.add((day, account))
        for counter, change in changes.items():
            setattr(usage, counter, getattr(usage, counter) + change)
        if self._months and (month := (month_of(day), account)) in self._months:
            self._months[month] += changes.get("cost_used", 0) + changes.get("cost_reserved", 0)

    def hold_month(self, day: date, account: str) -> None:
        """Something is spent from the month of ``day``: leave the row by which it is locked."""
        if (first := (month_of(day), account)) in self._missing:
            self._posted.add(first)

    def cross(self, day: date, account: str, percent: int) -> None:
        self._usage[day, account].crossed = percent
        self._posted.add((day, account))

    def insert(self, held: ReservationRow, *, lease: timedelta) -> None:
        """A new reservation, and how long it lives unless it is renewed."""
        self.reservations[held.id] = held
        self._inserted[held.id] = {"created_at": self.now, "expires_at": self.now + lease}
        self._streams[held.payer] = self.streams(held.payer) + 1

    def change(self, held: ReservationRow) -> None:
        if held.id not in self._inserted:
            self._changed[held.id] = held

    def close_stream(self, held: ReservationRow) -> None:
        """``held`` has left open: it is no longer one of its payer's streams."""
        if held.payer in self._streams and not held.is_overdue:
            self._streams[held.payer] -= 1

    def count_request(self, day: date, payer: str, seconds: int) -> None:
        self._rates[payer, seconds][0] += 1
        self._counted[day, (payer, seconds)] += 1

    def adjust(
        self,
        day: date,
        account: str,
        tokens: int,
        cost: int,
        kind: Adjustment.Kind,
        *,
        reason: str = "",
        actor: str = "",
    ) -> None:
        """Correct a day's use, and its cost, beside its charges."""
        if tokens or cost:
            self.post(day, account, tokens_used=tokens, cost_used=cost)
            if kind == Kind.FORGIVEN and (tokens < 0 or cost < 0):
                self._forgiven_now.add((day, account))
            self._adjustments.append(
                {
                    "day": day,
                    "account": account,
                    "tokens": tokens,
                    "cost": cost,
                    "kind": kind.value,
                    "reason": reason,
                    "actor": actor,
                    "created_at": self.now,
                }
            )

    def learn(self, lesson: Lesson) -> None:
        """Add to what is known of a model: counts add up, excesses grow, a flag once raised stays."""
        key = lesson.provider, lesson.model
        known = self._learned.setdefault(key, {"provider": key[0], "model": key[1], **_NOTHING_LEARNED})
        known["reports"] += lesson.reported
        for excess in ("prompt_excess", "completion_excess"):
            known[excess] = max(known[excess], getattr(lesson, excess))
        for flag in ("reasons_unseen", "ignores_max_tokens"):
            known[flag] = known[flag] or getattr(lesson, flag)
        known["updated_at"] = self.now

    def after_commit(self, tell: Callable[[], object]) -> None:
        """Do this once what the book says is true; never, if it is not committed."""
        self._after_commit.append(tell)

    def write(self) -> None:
        """All in one round trip. An account that nothing was posted to leaves no row behind."""
        opened = [{**columns(self.reservations[id], RESERVATION), **more} for id, more in self._inserted.items()]
        changed = [columns(held, RESOLUTION) for held in self._changed.values()]
        made = [columns(self._usage[key], USAGE) for key in sorted(self._posted & self._missing)]
        posted = [columns(self._usage[key], USAGE) for key in sorted(self._posted - self._missing)]
        counted = [
            {
                "day": day,
                "account": payer,
                "window_start": self._windows(seconds)[0],
                "window_seconds": seconds,
                "count": count,
            }
            for (day, (payer, seconds)), count in self._counted.items()
        ]
        learned = [row for _, row in sorted(self._learned.items())]
        run(
            self._alias,
            [
                *insert(self._alias, DailyUsage, made),  # the one that may be in conflict
                *insert(self._alias, Reservation, opened),
                *update(self._alias, Reservation, changed, by=("id",)),
                *update(self._alias, DailyUsage, posted, by=("day", "account")),
                *insert(self._alias, UsageLine, self.bills.rows(), ADD_TO_LINE),
                *insert(self._alias, RateWindow, counted, ADD_TO_WINDOW),
                *insert(self._alias, Adjustment, self._adjustments),
                *insert(self._alias, Calibration, learned, add_to_calibration(self._connection)),
            ],
        )
        for tell in self._after_commit:
            transaction.on_commit(tell, using=self._alias, robust=True)

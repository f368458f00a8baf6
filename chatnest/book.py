"""The rows of one ledger transaction: locked in key order, changed in memory, written once.

A usage row's lock guards that account's reservations and rate windows of the day too, so no other row needs
one to be counted. Everyone locks usage rows first, by day and name, so nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, date, datetime
from typing import Any, Final
from uuid import UUID

from django.db import models
from django.db.models import Count
from django.utils import timezone

from .conf import settings, time_zone
from .models import Adjustment, DailyUsage, RateWindow, Reservation

Key = tuple[date, str]
Rate = tuple[str, int]  # a payer, and the length of its rate window in seconds

_RESOLUTION: Final = (
    "state outcome usage_source prompt_tokens completion_tokens tokens_charged settled_at".split()
)
_COUNTERS: Final = "tokens_used tokens_reserved prompt_tokens completion_tokens requests".split()


def today(now: datetime | None = None) -> date:
    """The budget's day: the local date, so a day has 23 or 25 hours where clocks change."""
    return timezone.localdate(now, time_zone())


class Book:
    """Opened inside a transaction with what will be touched; ``write`` before the commit.

    ``accounts`` are today's, ``keys`` those of a given day. ``overdue`` are the open reservations whose lease
    has run out: whoever opens a book resolves them.
    """

    def __init__(
        self,
        *,
        accounts: Iterable[str] = (),
        keys: Iterable[Key] = (),
        ids: Iterable[UUID] = (),
        rates: Iterable[Rate] = (),
    ) -> None:
        self._alias: str = settings.DATABASE_ALIAS
        self.now = timezone.now()
        self.today = today(self.now)
        overdue = list(self._rows(Reservation).overdue(self.now).only("id", "day", "accounts"))
        self._usage = self._lock(
            {
                *((self.today, account) for account in accounts),
                *keys,
                *((row.day, account) for row in overdue for account in row.accounts),
            }
        )
        self.reservations = self._read_reservations({*ids, *(row.id for row in overdue)})
        self.overdue = [row for row in self.reservations.values() if row.is_overdue(self.now)]
        self._windows = self._read_windows(set(rates))
        self._streams = self._count_streams({payer for payer, _ in rates})
        self._inserted: dict[UUID, Reservation] = {}
        self._changed: dict[UUID, Reservation] = {}
        self._posted: dict[Key, DailyUsage] = {}
        self._counted: dict[tuple[str, int], RateWindow] = {}
        self._adjustments: list[Adjustment] = []

    # Reading, in the order of the locks.

    def _rows(self, model: type[models.Model]) -> Any:
        return model._default_manager.using(self._alias)

    def _lock(self, keys: Collection[Key]) -> dict[Key, DailyUsage]:
        if not keys:
            return {}
        usage = self._locked(keys)
        if missing := sorted(set(keys) - usage.keys()):
            rows = [DailyUsage(day=day, account=account) for day, account in missing]
            self._rows(DailyUsage).bulk_create(rows, ignore_conflicts=True)
            usage = self._locked(keys)
        return usage

    def _locked(self, keys: Collection[Key]) -> dict[Key, DailyUsage]:
        rows = self._rows(DailyUsage).named(keys).order_by("day", "account").select_for_update()
        return {(row.day, row.account): row for row in rows}

    def _read_reservations(self, ids: Collection[UUID]) -> dict[UUID, Reservation]:
        if not ids:
            return {}
        rows = self._rows(Reservation).filter(id__in=ids).order_by("id").select_for_update()
        return {row.id: row for row in rows}

    def _read_windows(self, rates: Collection[Rate]) -> dict[tuple[str, int, datetime], list[RateWindow]]:
        windows: dict[tuple[str, int, datetime], list[RateWindow]] = {}
        if rates:
            payers, lengths = {payer for payer, _ in rates}, {seconds for _, seconds in rates}
            starts = {start for seconds in lengths for start in self._starts(seconds)}
            for row in self._rows(RateWindow).filter(account__in=payers, window_start__in=starts):
                windows.setdefault((row.account, row.window_seconds, row.window_start), []).append(row)
        return windows

    def _starts(self, seconds: int) -> tuple[datetime, datetime]:
        """The starts of this window and of the one before."""
        start = int(self.now.timestamp()) // seconds * seconds
        return datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(start - seconds, UTC)

    def _count_streams(self, payers: Collection[str]) -> dict[str, int]:
        if not payers:
            return {}
        live = self._rows(Reservation).open().filter(payer__in=payers, expires_at__gt=self.now)
        return dict(live.order_by().values_list("payer").annotate(Count("id")))

    # Asking.

    def used(self, day: date, account: str) -> int:
        return self._usage[day, account].tokens_used

    def committed(self, day: date, account: str) -> int:
        """Tokens spent or promised; 0 for a key that this book did not open."""
        usage = self._usage.get((day, account))
        return usage.tokens_used + usage.tokens_reserved if usage else 0

    def streams(self, payer: str) -> int:
        """The payer's open reservations."""
        return self._streams.get(payer, 0)

    def rate(self, payer: str, seconds: int) -> tuple[int, int, float]:
        """The requests in this window and in the one before, and how much of this one has passed (0 to 1)."""
        start, before = self._starts(seconds)
        this, last = (sum(row.count for row in self._windows.get((payer, seconds, at), ())) for at in (start, before))
        return this, last, (self.now - start).total_seconds() / seconds

    # Changing.

    def post(self, day: date, account: str, **changes: int) -> None:
        """Add to the counters of one account's day."""
        usage = self._posted[day, account] = self._usage[day, account]
        for counter, change in changes.items():
            setattr(usage, counter, getattr(usage, counter) + change)

    def insert(self, row: Reservation) -> None:
        self.reservations[row.id] = self._inserted[row.id] = row
        self._streams[row.payer] = self.streams(row.payer) + 1

    def resolve(self, row: Reservation) -> None:
        """``row`` has left open: it is no longer one of its payer's streams."""
        if row.payer in self._streams and row.expires_at > self.now:
            self._streams[row.payer] -= 1
        self.change(row)

    def change(self, row: Reservation) -> None:
        if row.id not in self._inserted:
            self._changed[row.id] = row

    def count_request(self, payer: str, seconds: int) -> None:
        start, _ = self._starts(seconds)
        rows = self._windows.setdefault((payer, seconds, start), [])
        row = next((row for row in rows if row.day == self.today), None)
        if row is None:
            row = RateWindow(day=self.today, account=payer, window_start=start, window_seconds=seconds)
            rows.append(row)
        row.count += 1
        self._counted[payer, seconds] = row

    def adjust(self, day: date, account: str, tokens: int, *, reason: str, actor: str = "") -> None:
        """Correct a day's use beside its charges, never below zero: what a reset forgave cannot be refunded too."""
        tokens = max(tokens, -self.used(day, account))
        if tokens:
            self.post(day, account, tokens_used=tokens)
            self._adjustments.append(
                Adjustment(
                    day=day, account=account, tokens=tokens, reason=reason, actor=actor, created_at=self.now
                )
            )

    def write(self) -> None:
        self._rows(Reservation).bulk_create(self._inserted.values())
        self._rows(Adjustment).bulk_create(self._adjustments)
        self._upsert(Reservation, self._changed.values(), ["id"], _RESOLUTION)
        self._upsert(DailyUsage, self._posted.values(), ["day", "account"], _COUNTERS)
        counted = ["account", "window_start", "window_seconds", "day"]
        self._upsert(RateWindow, self._counted.values(), counted, ["count"])

    def _upsert(
        self, model: type[models.Model], rows: Iterable[models.Model], unique: list[str], fields: list[str]
    ) -> None:
        """One statement for rows that all differ. The locks make absolute values right."""
        self._rows(model).bulk_create(
            list(rows), update_conflicts=True, unique_fields=unique, update_fields=fields
        )

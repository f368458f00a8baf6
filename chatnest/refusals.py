"""Refusals: remembered, so that the next one costs little, and counted, so that operators see who was refused and why.

Both are bounded, and neither is exact. What is not remembered is asked of the ledger. Counts are summed in memory and
written by the ledger's thread, once a second at most and at its end: a process that dies loses its last ones, and whose
names are too many are counted together.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import asdict, dataclass
from datetime import date, datetime
from typing import Final

from .accounts import ANONYMOUS, SITE, is_stranger
from .conf import moment, now, settings, stored, today
from .errors import ChatError, DailyBudgetExceeded, MonthlyBudgetExceeded, RateLimited
from .ledger.batcher import batcher
from .ledger.bulk import insert, run, table
from .logs import log_refused
from .models import Refusal
from .policy import Terms
from .signals import tell_refused

MOST_REMEMBERED: Final = 10_000
MOST_NAMES: Final = 1000  # counted by name, of a process and a day
BUDGET_SECONDS: Final = 1.0
WRITE_SECONDS: Final = 1.0
AWAY_SECONDS: Final = 10.0  # after a write that failed
LOG_SECONDS: Final = 60.0  # between two lines about the same name and code
DETAIL_LENGTH: Final = 200

Key = tuple[datetime, str, str]  # the hour, the account, the code


@dataclass(frozen=True, slots=True)
class Remembered:
    """That these terms were refused, for so many seconds in which it cannot have changed."""

    refusal: ChatError
    terms: Terms
    at: datetime
    seconds: float

    def again(self, terms: Terms) -> ChatError | None:
        age = (now() - self.at).total_seconds()
        if not (0 <= age < self.seconds and self._covers(terms)):
            return None
        wait = (self.refusal.retry_after or 0) - age
        return type(self.refusal)(self.refusal.message, retry_after=wait, detail=self.refusal.detail)

    def _covers(self, terms: Terms) -> bool:
        """Whether what refused the one refuses the other: an edit, or less of a client's own tightening, may not."""
        if isinstance(self.refusal, RateLimited):
            rate, before = terms.limits, self.terms.limits
            return (rate.rate_max_requests, rate.rate_window_seconds) == (
                before.rate_max_requests,
                before.rate_window_seconds,
            )
        budgets = self.terms.budgets
        if (terms.money, terms.price) != (self.terms.money, self.terms.price):
            return False
        return terms.budgets.keys() == budgets.keys() and all(
            limit <= budgets[name] for name, limit in terms.budgets.items()
        )


@dataclass(slots=True)
class Tally:
    count: int
    last_at: datetime
    last_detail: str


class Refusals:
    """Of one process."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new process's state: also after a fork, or what the parent counted would be written twice."""
        self._remembered: dict[tuple[str, str], Remembered] = {}  # by payer and profile, the oldest first
        self._tallies: dict[Key, Tally] = {}
        self._named: set[tuple[str, str]] = set()
        self._quiet: dict[tuple[str, str], float] = {}  # until when a name and code need not be logged again
        self._day: date | None = None
        self._lock = threading.Lock()  # the chat's loops and the site's threads count, the ledger's writes
        self._is_due = False  # somebody will write

    # Remembered.

    def recall(self, terms: Terms) -> ChatError | None:
        """The refusal that the ledger would give again, or None: then it must be asked."""
        found = self._remembered.get(_payer_and_profile(terms))
        return found.again(terms) if found else None

    def remember(self, terms: Terms, refusal: ChatError) -> None:
        """Of rate: until one more request fits. Of a budget: for a second, as anything that settles may change it."""
        # What is told to wait is rounded up; and nobody is refused too long.
        seconds = (refusal.retry_after or 0) - 1.0
        if isinstance(refusal, DailyBudgetExceeded | MonthlyBudgetExceeded):
            seconds = min(seconds, BUDGET_SECONDS)
        elif not isinstance(refusal, RateLimited):
            return
        key = _payer_and_profile(terms)
        self._remembered.pop(key, None)
        if seconds > 0:
            self._remembered[key] = Remembered(refusal, terms, now(), seconds)
            if len(self._remembered) > MOST_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]

    # Counted.

    def note(self, payer: str, refusal: ChatError) -> None:
        """Count it, from any thread, and tell who listens. Within a second or two operators see it.

        The log has the first of a name and code in each minute: an attack is to be seen in it, and not to fill it.
        """
        tell_refused(payer, refusal)
        with self._lock:
            key = self._key(payer, refusal.code)
            tally = self._tallies.setdefault(key, Tally(0, now(), ""))
            tally.count += 1
            tally.last_at, tally.last_detail = now(), refusal.detail[:DETAIL_LENGTH]
            is_due, self._is_due = self._is_due, True
            is_news = self._is_news(key[1:])
        if is_news:
            log_refused(payer, refusal)
        if not is_due:
            batcher.later(WRITE_SECONDS, self._write)

    def _key(self, payer: str, code: str) -> Key:
        """Under the payer's name; of so many that a day has, under what they share."""
        hour = moment().replace(minute=0, second=0, microsecond=0)
        if (day := today(hour)) != self._day:
            self._day, self._named, self._quiet = day, set(), {}
        name = (payer, code)
        if name not in self._named:
            if len(self._named) >= MOST_NAMES:
                return hour, ANONYMOUS if is_stranger(payer) else SITE, code
            self._named.add(name)
        return hour, payer, code

    def _is_news(self, name: tuple[str, str]) -> bool:
        now = time.monotonic()
        if now < self._quiet.get(name, 0.0):
            return False
        self._quiet[name] = now + LOG_SECONDS
        return True

    def _write(self) -> None:
        """In the ledger's thread."""
        with self._lock:
            tallies, self._tallies, self._is_due = self._tallies, {}, False
        try:
            if tallies:
                _insert([_row(*each) for each in sorted(tallies.items())])
        except Exception:  # the database is away
            self._keep(tallies)
            raise

    def _keep(self, tallies: dict[Key, Tally]) -> None:
        with self._lock:
            for key, tally in tallies.items():
                newer = self._tallies.setdefault(key, tally)
                if newer is not tally:
                    newer.count += tally.count
            is_due, self._is_due = self._is_due, True
        if not is_due:
            batcher.later(AWAY_SECONDS, self._write)


def _payer_and_profile(terms: Terms) -> tuple[str, str]:
    return next(iter(terms.budgets)), terms.profile


def _row(key: Key, tally: Tally) -> dict[str, object]:
    hour, account, code = key
    return {"day": today(hour), "hour": stored(hour), "account": account, "code": code, **asdict(tally)}


def _insert(rows: list[dict[str, object]]) -> None:
    alias = settings.DATABASE_ALIAS
    more = (
        'ON CONFLICT ("hour", "account", "code") DO UPDATE SET '
        f'"count" = {table(Refusal)}."count" + excluded."count", '
        '"last_at" = excluded."last_at", "last_detail" = excluded."last_detail"'
    )
    run(alias, insert(alias, Refusal, rows, more))


refusals: Final = Refusals()
os.register_at_fork(after_in_child=refusals.clear)

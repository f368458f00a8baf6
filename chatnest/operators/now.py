"""What the Usage page says, read in seven queries, whatever the site's size; a money limit of the month costs one more.

Django's session, its user, and the people's names are three beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Final

from django.db.models import Case, F, OuterRef, Q, QuerySet, Subquery, Sum, Value, When

from ..accounts import SHARED, SITE
from ..conf import now, settings, today
from ..errors import DailyBudgetExceeded, MonthlyBudgetExceeded, UpstreamMisconfigured
from ..models import Account, Change, DailyUsage, Refusal, Reservation, UsageLine
from ..models.usage import BILLED
from ..policy import Policy, read_profiles
from ..reports import Person, people
from . import traffic
from .standing import Standing, money_of, month_costs

MOST_ACCOUNTS: Final = 50  # of those that used most
MOST_RUNNING: Final = 500
MOST_LISTED: Final = 30
MOST_REFUSALS: Final = 5000  # rows: an account, an hour and a reason each
FAILURE_DAYS: Final = 7
DIED_HOURS: Final = 24
REFUSED_KEY_HOURS: Final = 24

Outcome, State = Reservation.Outcome, Reservation.State


@dataclass(frozen=True, slots=True)
class Trouble:
    """A refusal (``count`` in an hour) or a failure, for one list."""

    at: datetime
    account: str
    code: str
    detail: str
    count: int = 1
    reservation: Reservation | None = None


class Snapshot:
    """One reading. ``who``: all, ``high`` (above 80 %) or ``shut`` (get no answer)."""

    def __init__(self, who: str = "") -> None:
        self.at = now()
        self.day = today()
        self.hours = traffic.Hours.current()
        refusals = self._read_refusals()
        self.traffic = traffic.read(self.hours)
        traffic.add_refusals(self.traffic, refusals)
        rows = self._read_reservations()
        self.running = [row for row in rows if row.state == State.OPEN]
        self.failures = [row for row in rows if row.state != State.OPEN]
        self.troubles = _merged(refusals, self.failures)
        standings = self._read_standings([row for row in refusals if row.day == self.day])
        self.budgets = [standings[name] for name in SHARED]
        self.others = [one for name, one in standings.items() if name not in SHARED]
        self.who = [one for one in self.others if _belongs(one, who)]
        self.changes, self.proof, self.stop = _read_changes()
        self.people: Mapping[str, Person] = people(self._names())

    def _read_refusals(self) -> list[Refusal]:
        """Of today and of yesterday's same hours, the latest first."""
        rows = Refusal.objects.using(settings.DATABASE_ALIAS)
        since = self.hours.before[0]
        return list(rows.filter(Q(hour__gte=since) | Q(day=self.day)).order_by("-last_at")[:MOST_REFUSALS])

    def _read_reservations(self) -> list[Reservation]:
        """All that are open, the oldest first, and the latest that failed."""
        rows = Reservation.objects.using(settings.DATABASE_ALIAS)
        failed = Q(outcome__in=Reservation.FAILURES, created_at__gte=self.at - timedelta(days=FAILURE_DAYS))
        is_open = Case(When(state=State.OPEN, then=Value(0)), default=Value(1))
        order = is_open, Case(When(state=State.OPEN, then=F("created_at"))), "-created_at"
        return list(rows.filter(Q(state=State.OPEN) | failed).order_by(*order)[:MOST_RUNNING])

    def _read_standings(self, refusals: Iterable[Refusal]) -> dict[str, Standing]:
        """Of the shared accounts, of those that used most, were refused for their budget, or are paused."""
        refused: Counter[str] = Counter()
        for_budget: Counter[str] = Counter()
        for row in refusals:
            refused[row.account] += row.count
            if row.code in (DailyBudgetExceeded.code, MonthlyBudgetExceeded.code):
                for_budget[row.account] += row.count
        usages = {row.account: row for row in _usage(self.day, [name for name, _ in for_budget.most_common(100)])}
        rows = _accounts(usages)
        policy = Policy(read_profiles(), rows)
        running = Counter(name for row in self.running for name in row.accounts)
        names = list(dict.fromkeys([*SHARED, *usages, *(name for name, row in rows.items() if row.paused)]))
        month = month_costs(policy, names)
        return {
            name: Standing(
                usages.get(name) or DailyUsage(day=self.day, account=name),
                policy.daily_limit(name),
                rows.get(name),
                running[name],
                refused[name],
                for_budget[name],
                money_of(policy, name),
                month.get(name, 0),
            )
            for name in names
        }

    def _names(self) -> set[str]:
        return {
            *(one.account for one in self.who),
            *(row.payer for row in self.running),
            *(one.account for one in self.troubles),
            *(change.subject for change in self.changes if change.kind == "account"),
        }

    # What is wrong.

    @property
    def is_stopped(self) -> bool:
        return self.budgets[0].is_paused

    @property
    def proof_differs(self) -> bool:
        return bool(self.proof and self.proof.new != "0")

    @property
    def strangers_are_out(self) -> bool:
        return self.budgets[1].is_paused

    @cached_property
    def died(self) -> list[Reservation]:
        """Whose process died within DIED_HOURS, and those whose lease nobody renews."""
        since = self.at - timedelta(hours=DIED_HOURS)
        expired = [row for row in self.failures if row.outcome == Outcome.EXPIRED and row.created_at >= since]
        return [*(row for row in self.running if row.is_overdue(self.at)), *expired]

    @cached_property
    def refused_keys(self) -> list[Reservation]:
        """The last answer of each model that its provider refuses: our key, its name or our credit."""
        since = self.at - timedelta(hours=REFUSED_KEY_HOURS)
        found: dict[tuple[str, str], Reservation] = {}
        for row in self.failures:
            if row.error == UpstreamMisconfigured.code and row.created_at >= since:
                found.setdefault((row.provider, row.model), row)
        answered = self.traffic.answered
        return [row for key, row in found.items() if key not in answered or answered[key] < row.created_at]


def _belongs(one: Standing, who: str) -> bool:
    return (who != "high" or one.is_high) and (who != "shut" or one.is_shut_out)


def _usage(day: Any, names: Sequence[str]) -> QuerySet[DailyUsage]:
    """The day's rows of the shared accounts, of ``names``, and of those that used most; what was billed of each."""
    lines = UsageLine.objects.using(settings.DATABASE_ALIAS).filter(account=OuterRef("account"), day=day).order_by()
    first = Case(When(account__in=[*SHARED, *names], then=Value(0)), default=Value(1))
    return (
        DailyUsage.objects.using(settings.DATABASE_ALIAS)
        .filter(day=day)
        .annotate(billed=Subquery(lines.values("account").annotate(sum=Sum(BILLED)).values("sum")))
        .order_by(first, -(F("tokens_used") + F("tokens_reserved")), "account")[
            : len(SHARED) + len(names) + MOST_ACCOUNTS
        ]
    )


def _accounts(names: Iterable[str]) -> dict[str, Account]:
    """What operators decided about these, and all that are paused."""
    rows = Account.objects.using(settings.DATABASE_ALIAS).select_related("profile")
    chosen = Q(name__in=[*SHARED, *names]) | Q(paused=True)
    return {row.name: row for row in rows.filter(chosen).order_by("-paused", "name")[: MOST_RUNNING + MOST_ACCOUNTS]}


def _merged(refusals: Sequence[Refusal], failures: Sequence[Reservation]) -> list[Trouble]:
    refused = [
        Trouble(row.last_at, row.account, row.code, row.last_detail, row.count) for row in refusals[:MOST_LISTED]
    ]
    failed = [
        Trouble(row.settled_at or row.created_at, row.payer, row.error or row.outcome, "", reservation=row)
        for row in failures[:MOST_LISTED]
    ]
    return sorted([*refused, *failed], key=lambda one: one.at, reverse=True)[:MOST_LISTED]


def _read_changes() -> tuple[list[Change], Change | None, Change | None]:
    """The latest; the last proof; and who stopped the chat, or started it again."""
    rows = Change.objects.using(settings.DATABASE_ALIAS)
    site = rows.filter(kind="account", subject=SITE, field="paused")
    wanted = rows.exclude(kind="proof")[:MOST_LISTED], rows.filter(kind="proof")[:1], site[:1]
    chosen = [Q(pk__in=some.values("pk")) for some in wanted]
    found = list(rows.filter(chosen[0] | chosen[1] | chosen[2]))
    latest = [one for one in found if one.kind != "proof"][:MOST_LISTED]
    proof = next((one for one in found if one.kind == "proof"), None)
    stop = next((one for one in found if (one.kind, one.subject, one.field) == ("account", SITE, "paused")), None)
    return latest, proof, stop

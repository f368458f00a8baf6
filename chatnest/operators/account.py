"""All about one account: what is in force and why, today, thirty days, its answers, refusals and changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

from django.db.models import Sum

from ..accounts import SHARED
from ..conf import settings, today
from ..errors import DailyBudgetExceeded, MonthlyBudgetExceeded
from ..models import Account, Adjustment, Change, DailyUsage, Refusal, Reservation, UsageLine
from ..models.usage import BILLED
from ..policy import Policy, read_profiles
from .actions import running
from .standing import Standing, money_of, month_costs, pays_beside

DAYS: Final = 30
MOST_LISTED: Final = 30


@dataclass(frozen=True, slots=True)
class Month:
    """Thirty days: ``used`` counts against the budgets, ``billed`` is owed. ``cost`` in millionths."""

    days: Sequence[date]
    used: Mapping[date, int]
    billed: int
    cost: int
    unpriced: int

    @property
    def counts(self) -> int:
        return sum(self.used.values())

    @property
    def forgiven(self) -> int:
        return self.billed - self.counts


@dataclass(frozen=True, slots=True)
class History:
    standing: Standing
    beside: Sequence[Standing]
    month: Month
    running: Sequence[Reservation]
    answers: Sequence[Reservation]
    refusals: Sequence[Refusal]
    changes: Sequence[Change]
    adjustments: Sequence[Adjustment]

    @property
    def is_known(self) -> bool:
        """It has a row, or was charged in these days."""
        return bool(self.standing.row or self.month.used)


def read(account: str) -> History:
    alias = settings.DATABASE_ALIAS
    names = [account, *pays_beside(account)]
    rows = {row.name: row for row in Account.objects.using(alias).filter(name__in=names).select_related("profile")}
    policy = Policy(read_profiles(), rows)
    refusals = list(Refusal.objects.using(alias).filter(account=account).order_by("-last_at")[:MOST_LISTED])
    open_ = running(account)
    month = month_costs(policy, names)
    standings = [_standing(name, policy, month, refusals, len(open_)) for name in names]
    changes = list(Change.objects.using(alias).filter(kind="account", subject=account)[:MOST_LISTED])
    adjustments = list(Adjustment.objects.using(alias).filter(account=account)[:MOST_LISTED])
    return History(
        standings[0], standings[1:], _month(account), open_, _answers(account), refusals, changes, adjustments
    )


def _standing(
    account: str, policy: Policy, month: Mapping[str, int], refusals: Sequence[Refusal], answers: int
) -> Standing:
    day = today()
    usage = DailyUsage.objects.using(settings.DATABASE_ALIAS).filter(day=day, account=account).first()
    own = [row for row in refusals if row.account == account and row.day == day]
    budgets = DailyBudgetExceeded.code, MonthlyBudgetExceeded.code
    for_budget = sum(row.count for row in own if row.code in budgets)
    return Standing(
        usage or DailyUsage(day=day, account=account),
        policy.daily_limit(account),
        policy.accounts.get(account),
        answers,
        sum(row.count for row in own),
        for_budget,
        money_of(policy, account),
        month.get(account, 0),
    )


def _days() -> list[date]:
    """Each by its name: an index of day and account finds them, and does not read what others did in a month."""
    return [today() - timedelta(days=ago) for ago in reversed(range(DAYS))]


def _month(account: str) -> Month:
    days = _days()
    alias = settings.DATABASE_ALIAS
    span = {"account": account, "day__in": days}
    used = dict(DailyUsage.objects.using(alias).filter(**span).order_by().values_list("day", "tokens_used"))
    sums = UsageLine.objects.using(alias).filter(**span).order_by()
    owed = sums.aggregate(billed=Sum(BILLED, default=0), cost=Sum("cost", default=0), none=Sum("unpriced", default=0))
    return Month(days, used, owed["billed"], owed["cost"], owed["none"])


def _answers(account: str) -> list[Reservation]:
    """The latest; of one that many pay from, what everybody was answered."""
    rows = Reservation.objects.using(settings.DATABASE_ALIAS).exclude(state=Reservation.State.OPEN)
    if account in SHARED:
        rows = rows.filter(payer__startswith="ip:") if account != SHARED[0] else rows
        return list(rows.order_by("-created_at")[:MOST_LISTED])
    rows = rows.filter(payer=account, day__in=_days())
    return list(rows.order_by("-day", "-created_at")[:MOST_LISTED])

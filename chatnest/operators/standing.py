"""An account's day: what it has used, what is held, what its limit is and who says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from django.db.models import F, Sum
from django.utils.translation import gettext as _

from ..accounts import SHARED, SITE, is_stranger
from ..conf import moment, settings, today
from ..ledger import day_ends
from ..models import Account, DailyUsage
from ..policy import DailyLimit, Policy
from ..prices import MoneyLimits
from .words import number

HIGH = 0.8  # of a limit


@dataclass(frozen=True, slots=True)
class Standing:
    """``usage``: the day's row, of zeros if there is none. ``refused``: how often today. ``running``: answers now.

    Money is in millionths.
    """

    usage: DailyUsage
    limit: DailyLimit
    row: Account | None
    running: int = 0
    refused: int = 0
    for_budget: int = 0  # of the refused: because a budget was used up
    money: MoneyLimits = field(default_factory=MoneyLimits)
    month_cost: int = 0  # used and reserved, where there is a limit of the month

    @property
    def account(self) -> str:
        return self.usage.account

    @property
    def is_shared(self) -> bool:
        return self.account in SHARED

    @property
    def used(self) -> int:
        return self.usage.tokens_used

    @property
    def reserved(self) -> int:
        return self.usage.tokens_reserved

    @property
    def cost(self) -> int:
        """In millionths, of what counts against its budget."""
        return self.usage.cost_used

    @property
    def billed(self) -> int:
        """What was charged, forgiven or not."""
        return int(getattr(self.usage, "billed", None) or 0)

    @property
    def forgiven(self) -> int:
        return max(0, self.billed - self.used)

    @property
    def share(self) -> float:
        """Used of the tightest limit; more than 1 where it was lowered since."""
        shares = [_share(self.used + self.reserved, self.limit.in_force)]
        shares += [_share(spent, limit) for _name, spent, limit in self.spent]
        return max(shares)

    @property
    def spent(self) -> list[tuple[str, int, int]]:
        """Of each money limit its name, what is used and reserved, and the limit."""
        found = []
        if self.money.daily is not None:
            found.append((_("today"), self.usage.cost_used + self.usage.cost_reserved, self.money.daily))
        if self.money.monthly is not None:
            found.append((_("this month"), self.month_cost, self.money.monthly))
        return found

    @property
    def is_paused(self) -> bool:
        return bool(self.row and self.row.paused)

    @property
    def is_shut_out(self) -> bool:
        """For a reason of its own; that all are stopped is said once, above."""
        return self.is_paused or self.share >= 1 or (self.for_budget > 0 and self.is_high)

    @property
    def is_high(self) -> bool:
        return self.share >= HIGH

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.is_paused:
            return _("paused")
        if self.is_shut_out:
            return _("used up")
        return _("above 80 %") if self.is_high else _("ok")

    @property
    def level(self) -> str:
        """``bad``, ``high`` or ``ok``: how it is shown."""
        return "bad" if self.is_shut_out else "high" if self.is_high else "ok"

    @property
    def why(self) -> str:
        """Why this limit is in force."""
        return reasons(self.limit, self.row)

    @property
    def profile(self) -> str:
        """The profile that its row forces on it, or else the largest that it may choose."""
        if self.row and self.row.profile:
            return self.row.profile.name
        return "" if self.is_shared else self.limit.source

    def used_up_at(self, tokens: int, seconds: float) -> datetime | None:
        """When its limit is reached at this pace, if that is today."""
        left = self.limit.in_force - self.used - self.reserved
        if left <= 0 or tokens <= 0:
            return None
        wait = left * seconds / tokens
        ends = day_ends(today())
        at = moment()
        return at + timedelta(seconds=wait) if wait < (ends - at).total_seconds() else None


def _share(used: int, limit: int) -> float:
    return used / limit if limit else float(used > 0)


def month_costs(policy: Policy, accounts: Iterable[str]) -> dict[str, int]:
    """What those that have a money limit of the month have used and reserved of it. One query, or none."""
    limited = [name for name in accounts if money_of(policy, name).monthly is not None]
    if not limited:
        return {}
    day = today()
    days = [day.replace(day=number) for number in range(1, day.day + 1)]
    rows = DailyUsage.objects.using(settings.DATABASE_ALIAS).filter(day__in=days, account__in=limited).order_by()
    spent = rows.values("account").annotate(cost=Sum(F("cost_used") + F("cost_reserved")))
    return {account: int(cost) for account, cost in spent.values_list("account", "cost")}


def money_of(policy: Policy, account: str) -> MoneyLimits:
    """Its limits in money; of a payer with the profile that is forced on it, or the largest that it may choose."""
    row = policy.accounts.get(account)
    profile = row.profile if row else None
    if profile is None and account not in SHARED:
        profile = policy.profiles.get(policy.daily_limit(account).source)
    return policy.money(account, profile)


def daily_limit(row: Account, day: date | None = None, policy: Policy | None = None) -> DailyLimit:
    """What is in force with this row, saved or not."""
    return (policy or Policy.read(SHARED)).with_row(row).daily_limit(row.name, day)


def given(limit: DailyLimit) -> str:
    return _("%(tokens)s by %(source)s") % {"tokens": number(limit.given), "source": limit.source or _("no profile")}


def decided(limit: DailyLimit, row: Account) -> list[str]:
    """What its row makes of that today."""
    told = []
    if row.daily_token_limit is not None and row.daily_token_limit < limit.given:
        told.append(_("lowered to %s") % number(row.daily_token_limit))
    if extra := row.extra_on(today()):
        told.append(_("%s more today") % number(extra))
    return told


def reasons(limit: DailyLimit, row: Account | None) -> str:
    """Why this limit is in force."""
    told = [given(limit)]
    if row:
        told += [_("profile forced")] * bool(row.profile)
        told += decided(limit, row)
        lowered = limit.given if row.daily_token_limit is None else min(limit.given, row.daily_token_limit)
        extra = row.extra_on(today())
        told += [_("capped by the code")] * bool(extra and limit.in_force < lowered + extra)
    return ", ".join(told)


def pays_beside(account: str) -> list[str]:
    """The shared accounts whose limits hold for it too."""
    return [name for name in SHARED if name != account and (name == SITE or is_stranger(account))]

"""Sums of the usage lines. Every charge is once in the lines of ``site``, and once in those of each who paid it.

Three figures, of tokens and of money: *billed* is what the provider is owed (reported + counted + held), *forgiven*
is what operators gave back, and what is *used* counts against the budget: billed - forgiven.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any, Final, Literal, get_args

from django.db.models import F, QuerySet, Sum

from ..accounts import SHARED, SITE
from ..conf import settings
from ..models import DailyUsage, UsageLine
from .periods import Period

Dimension = Literal["account", "profile", "model", "provider", "label", "day"]
DIMENSIONS: Final[tuple[Dimension, ...]] = get_args(Dimension)
COUNTED: Final = ("account", "day")  # of these only it is known what counts against budgets


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The sums of some lines: requests, tokens, and ``cost`` in millionths of the currency.

    ``key``: what they have in common: the account, the day, the model; a tuple of several; None in a total.
    ``unpriced``: the requests whose price was unknown. ``used`` and ``cost_used``: what counts against the budget, or
    None where that is not known (of a model, say).
    """

    key: Any = None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    tokens_reported: int
    tokens_counted: int
    tokens_held: int
    priced: int  # the cost of what had a price
    unpriced: int
    used: int | None = None
    cost_used: int | None = None

    @property
    def billed(self) -> int:
        return self.tokens_reported + self.tokens_counted + self.tokens_held

    @property
    def cost(self) -> int | None:
        """Of what had a price; None where nothing had: an unknown price is not 0."""
        return None if self.unpriced and self.unpriced >= self.requests and not self.priced else self.priced

    @property
    def forgiven(self) -> int | None:
        return None if self.used is None else self.billed - self.used

    @property
    def cost_forgiven(self) -> int | None:
        return None if self.cost_used is None else self.priced - self.cost_used


# As Figures has them, from ``requests`` to ``unpriced``.
_SUMS: Final = {
    "n_requests": Sum("requests", default=0),
    "n_prompt": Sum("prompt_tokens", default=0),
    "n_cached": Sum("cached_tokens", default=0),
    "n_completion": Sum("completion_tokens", default=0),
    "n_reasoning": Sum("reasoning_tokens", default=0),
    "n_reported": Sum("tokens_reported", default=0),
    "n_counted": Sum("tokens_counted", default=0),
    "n_held": Sum("tokens_held", default=0),
    "n_cost": Sum("cost", default=0),
    "n_unpriced": Sum("unpriced", default=0),
}
_NAMES: Final = (
    *("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"),
    *("tokens_reported", "tokens_counted", "tokens_held", "priced", "unpriced"),
)
_BILLED: Final = F("n_reported") + F("n_counted") + F("n_held")


def totals(period: Period, accounts: Collection[str] = (SITE,)) -> Figures:
    """Of these accounts together. Two queries."""
    sums = lines(period, accounts).aggregate(**_SUMS)
    used = _days(period, accounts).aggregate(tokens=Sum("tokens_used", default=0), cost=Sum("cost_used", default=0))
    return figures(None, [sums[name] for name in _SUMS], (used["tokens"], used["cost"]))


def by(
    dimension: Dimension, period: Period, *, accounts: Collection[str] = (), top: int | None = None
) -> list[Figures]:
    """One each, the dearest first, then who used most tokens; days the last one first. Two queries at most.

    Of these accounts; else of the site, and by account of all who pay (``site`` and ``anonymous`` are everybody's).
    """
    if dimension != "account" and not accounts:
        accounts = (SITE,)
    rows = lines(period, accounts)
    if not accounts:
        rows = rows.exclude(account__in=SHARED)
    order = ["-day"] if dimension == "day" else [F("n_cost").desc(), _BILLED.desc(), dimension]
    found = list(summed(rows, dimension).order_by(*order)[:top])
    used: dict[Any, tuple[int, int]] = {}
    if dimension in COUNTED:
        named = [key for key, *_ in found] if dimension == "account" and (top or accounts) else accounts
        counted = _days(period, named).values(dimension).annotate(tokens=Sum("tokens_used"), cost=Sum("cost_used"))
        used = {key: sums for key, *sums in counted.values_list(dimension, "tokens", "cost")}
    nothing = (0, 0) if dimension in COUNTED else (None, None)
    return [figures(key, sums, used.get(key, nothing)) for key, *sums in found]


def by_day_and_model(period: Period) -> list[Figures]:
    """The site's, each day's dearest model first, the first day first; ``key``: (day, model). For a chart."""
    rows = summed(lines(period, (SITE,)), "day", "model")
    found = rows.order_by("day", F("n_cost").desc(), _BILLED.desc(), "model")
    return [figures((day, model), sums) for day, model, *sums in found]


def by_day_and_account(period: Period, accounts: Collection[str] = ()) -> dict[tuple[date, str], Figures]:
    """Of these accounts, or of all."""
    rows = summed(lines(period, accounts), "day", "account")
    return {(day, account): figures((day, account), sums) for day, account, *sums in rows.iterator()}


def lines(period: Period, accounts: Collection[str] = ()) -> QuerySet[UsageLine]:
    """Of these accounts, or of all."""
    return _within(UsageLine.objects.using(settings.DATABASE_ALIAS), period, accounts)


def summed(rows: QuerySet[UsageLine], *fields: str) -> QuerySet[Any, tuple[Any, ...]]:
    """Tuples of these fields and what ``Figures`` has."""
    sums: QuerySet[Any, tuple[Any, ...]] = (
        rows.order_by().values(*fields).annotate(**_SUMS).values_list(*fields, *_SUMS)
    )
    return sums


def _days(period: Period, accounts: Collection[str]) -> QuerySet[DailyUsage]:
    return _within(DailyUsage.objects.using(settings.DATABASE_ALIAS), period, accounts).order_by()


def _within(rows: QuerySet[Any], period: Period, accounts: Collection[str]) -> QuerySet[Any]:
    rows = rows.filter(day__range=(period.first, period.last))
    return rows.filter(account__in=list(accounts)) if accounts else rows


def figures(key: Any, sums: Iterable[Any], used: Iterable[int | None] = (None, None)) -> Figures:
    """PostgreSQL sums bigints to numerics."""
    tokens, cost = (None if one is None else int(one) for one in used)
    return Figures(key=key, **dict(zip(_NAMES, map(int, sums), strict=True)), used=tokens, cost_used=cost)

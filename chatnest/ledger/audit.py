"""Proving the ledger, and mending it. For each account and day:

    tokens_reserved = the sum of open reservations
    tokens_used     = the sum of charges + the sum of adjustments
    its lines       = the sum of charges + what came late = tokens_used - what was forgiven

the same of their cost, and, until a day is pruned, its prompt and completion tokens, its requests, and what else its
lines say, are those of its reservations.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import date
from operator import add
from typing import Any, Final

from django.db import models
from django.db.models import Aggregate, BigIntegerField, CharField, Count, F, Q, QuerySet, Sum, TextField, Value
from django.db.models.functions import Cast

from ..conf import now, settings
from ..models import Adjustment, DailyUsage, Reservation, UsageLine
from . import leases
from .mending import correct_lines, rebuild_lines
from .transactions import ledger_transaction, retried

MOST_OVERDUE: Final = 1000  # leases charged in a transaction
MANY: Final = 10_000  # accounts repaired in a transaction, which reads the day once more

# What is proven of an account's counters, and of its lines together; once they were pruned, only the first of each.
PROVEN: Final = (
    *(AT_LEAST := ("tokens_reserved", "tokens_used", "cost_reserved", "cost_used")),
    *("prompt_tokens", "completion_tokens", "requests"),
)
ALWAYS: Final = (*AT_LEAST, "billed_tokens", "billed_cost")
# What is read of each; and of it what the lines have, by its number.
FACTS: Final = (*PROVEN, "cached_tokens", "reasoning_tokens", "settled", "unpriced")

BILLED: Final = {
    f"billed_{name}": FACTS.index(fact)
    for name, fact in [
        *(("tokens", "tokens_used"), ("cost", "cost_used"), ("requests", "settled"), ("unpriced", "unpriced")),
        *((f"{name}_tokens", f"{name}_tokens") for name in ("prompt", "cached", "completion", "reasoning")),
    ]
}
NOTHING: Final = [0] * len(FACTS)
Sums = list[int]

Kind, State = Adjustment.Kind, Reservation.State
PRUNED: Final = Kind.PRUNED
Progress = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """A counter that is not the sum of its rows. ``stored`` is 0 where the counters' row is missing."""

    day: date
    account: str
    field: str
    stored: int
    computed: int
    repaired: bool = False

    @property
    def repairable(self) -> bool:
        """Nobody uses less than nothing: one of the rows that add up to that is missing."""
        return self.computed >= 0

    def __str__(self) -> str:
        text = f"{self.day} {self.account} {self.field}: {self.stored:,} stored, {self.computed:,} by its rows"
        if self.repaired:
            return f"{text} (repaired)"
        return text if self.repairable else f"{text} (not repairable: a charge or an adjustment is missing)"


# Proving


def verify(*, repair: bool = False, progress: Progress | None = None) -> list[Discrepancy]:
    """Every counter of every day that is not the sum of its rows; with ``repair``, set to it.

    Reading needs no locks and stops no traffic: one statement a day, so it sees the day as of one commit.
    Repair locks what was found as the ledger does, reads it again, and mends it in the same transaction.
    """
    found = []
    every = days(all_rows(DailyUsage), all_rows(UsageLine), all_rows(Reservation), all_rows(Adjustment))
    for number, day in enumerate(every, 1):
        differences = _differences(day)
        found += _repair(day, differences) if repair else differences
        if progress:
            progress(f"{day} checked, {number:,} of {len(every):,} days")
    if repair:
        charge_overdue()  # after the repair: it subtracts the holds from counters that now contain them
    return found


def _differences(day: date) -> list[Discrepancy]:
    """Sums are lists of FACTS: a site has many accounts, and most of them differ in nothing."""
    stored: dict[str, Sums] = {}
    lines: dict[str, Sums] = {}
    proven: dict[str, Sums] = {}
    billed: dict[str, Sums] = {}
    pruned: set[str] = set()
    for kind, name, *sums in _read(day):
        if kind == "stored":
            stored[name] = sums
        elif kind == "lines":
            lines[name] = sums
        else:
            accounts = json.loads(name) if kind == "charged" else [name]
            for account in accounts:
                proven[account] = [*map(add, proven.get(account, NOTHING), sums)]
                if kind not in (Kind.FORGIVEN, Kind.GRANTED):
                    billed[account] = [*map(add, billed.get(account, NOTHING), sums)]
            if kind == PRUNED:
                pruned.add(name)
    found = []
    for account in sorted(stored.keys() | lines.keys() | proven.keys()):
        counters = zip(PROVEN, stored.get(account, NOTHING), proven.get(account, NOTHING), strict=False)
        its, theirs = (sums.get(account, NOTHING) for sums in (lines, billed))
        all_lines = ((field, its[fact], theirs[fact]) for field, fact in BILLED.items())
        for field, was, computed in (*counters, *all_lines):
            if was != computed and (account not in pruned or field in ALWAYS):
                found.append(Discrepancy(day, account, field, int(was), int(computed)))
    return found


def _read(day: date) -> Iterator[tuple[Any, ...]]:
    """A day's counters and lines, and the sums of its rows: a kind, the account (or the JSON of several), and FACTS."""
    is_open = Q(state=State.OPEN)
    stored = all_rows(DailyUsage, day=day).values_list(Value("stored", CharField()), "account", *_facts(PROVEN))
    lines = _sums(
        all_rows(UsageLine, day=day).values(kind=Value("lines", CharField()), name=F("account")),
        **{name: Sum(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")},
        tokens_used=Sum(F("tokens_reported") + F("tokens_counted") + F("tokens_held")),
        cost_used=Sum("cost"),
        settled=Sum("requests"),
        unpriced=Sum("unpriced"),
    )
    charged = _sums(
        all_rows(Reservation, day=day).values(kind=Value("charged", CharField()), name=Cast("accounts", TextField())),
        **{name: Sum(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")},
        tokens_reserved=Sum("tokens", filter=is_open, default=0),
        tokens_used=Sum("tokens_charged"),
        cost_reserved=Sum("cost_reserved", filter=is_open, default=0),
        cost_used=Sum("cost", default=0),
        requests=Count("id"),
        settled=Count("id", filter=~is_open),
        unpriced=Count("id", filter=~is_open & Q(cost=None)),
    )
    adjusted = _sums(
        all_rows(Adjustment, day=day).values("kind", name=F("account")),
        tokens_used=Sum("tokens"),
        cost_used=Sum("cost"),
    )
    # Django 6.1 orders a union as the first model is ordered, unless told not to.
    return stored.union(lines, charged, adjusted, all=True).order_by().iterator()


def _facts(known: Collection[str], prefix: str = "") -> list[Any]:
    """FACTS as columns, of which those that are not known are 0."""
    return [f"{prefix}{fact}" if fact in known else Value(0) for fact in FACTS]


def _sums(rows: QuerySet[Any], **sums: Aggregate) -> QuerySet[Any]:
    """``rows`` of a kind and a name, grouped by these, and FACTS of each."""
    # PostgreSQL adds bigints up to numerics, which Python reads and adds slowly.
    summed = rows.annotate(**{f"sum_{fact}": Cast(its, BigIntegerField()) for fact, its in sums.items()})
    listed: QuerySet[Any] = summed.values_list("kind", "name", *_facts(sums, "sum_"))
    return listed


def _repair(day: date, differences: list[Discrepancy]) -> list[Discrepancy]:
    """Those that are still there once their rows are locked, as mended."""
    names = sorted({difference.account for difference in differences})
    found = []
    for start in range(0, len(names), MANY):
        found += _repair_accounts(day, set(names[start : start + MANY]))
    return found


@retried
def _repair_accounts(day: date, accounts: set[str]) -> list[Discrepancy]:
    with ledger_transaction(keys=[(day, account) for account in accounts]) as book:
        found = [one for one in _differences(day) if one.account in accounts]
        mended = [one for one in found if one.repairable]
        for one in mended:
            if one.field in PROVEN:
                book.post(day, one.account, **{one.field: one.computed - one.stored})
        _repair_lines(day, {one.account for one in mended if one.field in BILLED})
    return [replace(one, repaired=one.repairable) for one in found]


def _repair_lines(day: date, accounts: set[str]) -> None:
    if not accounts:
        return
    rebuild_lines(day, accounts)
    left: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for one in _differences(day):
        if one.account in accounts and one.field in BILLED and one.repairable:
            left[one.account][one.field.removeprefix("billed_")] = one.computed - one.stored
    for account, corrections in left.items():
        correct_lines(day, account, corrections)


def charge_overdue() -> None:
    """As the ledger does whenever it is asked; where nobody chats, nobody asks it."""
    rows = Reservation.objects.using(settings.DATABASE_ALIAS)
    while overdue := list(rows.overdue(now()).values_list("id", flat=True)[:MOST_OVERDUE]):
        leases.expire(overdue)


def all_rows(model: type[models.Model], **lookups: Any) -> QuerySet[Any]:
    return model._default_manager.using(settings.DATABASE_ALIAS).filter(**lookups).order_by()


def days(*querysets: QuerySet[Any]) -> list[date]:
    return sorted({day for rows in querysets for day in rows.values_list("day", flat=True).distinct()})

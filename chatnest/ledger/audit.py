"""Proving the ledger, mending it, and forgetting old days without losing the proof. For each account and day:

    tokens_reserved = the sum of open reservations
    tokens_used     = the sum of charges + the sum of adjustments
    its lines       = the sum of charges + what came late = tokens_used - what was forgiven

the same of their cost, and, until a day is pruned, its prompt and completion tokens, its requests, and what else its
lines say, are those of its reservations.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from operator import add
from typing import Any, Final

from django.db import models, transaction
from django.db.models import Aggregate, BigIntegerField, CharField, Count, F, Q, QuerySet, Sum, TextField, Value
from django.db.models.functions import Cast

from ..conf import now, settings
from ..models import Adjustment, DailyUsage, RateWindow, Reservation, UsageLine
from . import leases
from .days import today
from .mending import correct_lines, rebuild_lines
from .transactions import ledger_transaction, retried

BATCH: Final = 1000  # rows deleted in a transaction
MANY: Final = 10_000  # accounts repaired in a transaction, which reads the day once more
GRACE: Final = timedelta(days=1)  # how long after its lease a reservation may yet be settled

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


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows were deleted, and the days left for later: a reservation of theirs is not settled yet.

    ``usage_rows`` are only those of zeros.
    """

    reservations: int
    adjustments: int
    rate_windows: int
    skipped: tuple[date, ...]
    usage_rows: int = 0


# Proving


def verify(*, repair: bool = False, progress: Progress | None = None) -> list[Discrepancy]:
    """Every counter of every day that is not the sum of its rows; with ``repair``, set to it.

    Reading needs no locks and stops no traffic: one statement a day, so it sees the day as of one commit.
    Repair locks what was found as the ledger does, reads it again, and mends it in the same transaction.
    """
    found = []
    days = _days(_all(DailyUsage), _all(UsageLine), _all(Reservation), _all(Adjustment))
    for number, day in enumerate(days, 1):
        differences = _differences(day)
        found += _repair(day, differences) if repair else differences
        if progress:
            progress(f"{day} checked, {number:,} of {len(days):,} days")
    if repair:
        _charge_overdue()  # after the repair: it subtracts the holds from counters that now contain them
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
    stored = _all(DailyUsage, day=day).values_list(Value("stored", CharField()), "account", *_facts(PROVEN))
    lines = _sums(
        _all(UsageLine, day=day).values(kind=Value("lines", CharField()), name=F("account")),
        **{name: Sum(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")},
        tokens_used=Sum(F("tokens_reported") + F("tokens_counted") + F("tokens_held")),
        cost_used=Sum("cost"),
        settled=Sum("requests"),
        unpriced=Sum("unpriced"),
    )
    charged = _sums(
        _all(Reservation, day=day).values(kind=Value("charged", CharField()), name=Cast("accounts", TextField())),
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
        _all(Adjustment, day=day).values("kind", name=F("account")), tokens_used=Sum("tokens"), cost_used=Sum("cost")
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


def _charge_overdue() -> None:
    """As the ledger does whenever it is asked; where nobody chats, nobody asks it."""
    rows = Reservation.objects.using(settings.DATABASE_ALIAS)
    while overdue := list(rows.overdue(now()).values_list("id", flat=True)[:BATCH]):
        leases.expire(overdue)


# Pruning


def prune(before: date, *, dry_run: bool = False, progress: Progress | None = None) -> Pruned:
    """Delete the reservations, adjustments and rate windows of days before ``before``; their usage stays.

    One adjustment for each account and day stands for what was deleted of it, written in the same
    transaction: every commit can be proven, so it may be interrupted anywhere, and run again. What was forgiven or
    granted stays as it is, and so do the lines of the bill: with them it is still known what was billed.
    """
    if before > today():
        raise ValueError("Today's rows are in use: only days that are over can be pruned.")
    if not dry_run:
        _charge_overdue()
    deleted: Counter[str] = Counter(reservations=0, adjustments=0, rate_windows=0, usage_rows=0)

    def delete(kind: str, rows: QuerySet[Any], batches: Iterator[int]) -> None:
        for number in (rows.count(),) if dry_run else batches:
            deleted[kind] += number
            if progress:
                progress(", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in deleted.items()))

    skipped = []
    unpruned = _all(Adjustment, day__lt=before, kind=Kind.LATE)
    for day in _days(_all(Reservation, day__lt=before), unpruned):
        reservations, adjustments = _all(Reservation, day=day), unpruned.filter(day=day)
        if reservations.filter(_unsettled()).exists():
            skipped.append(day)
            continue
        # Not all of them: who began before midnight may commit one yet.
        settled = reservations.exclude(_unsettled()).order_by("payer")
        delete("reservations", settled, _fold(day, settled, "accounts", "tokens_charged", "cost"))
        delete("adjustments", adjustments, _fold(day, adjustments, "account", "tokens", "cost"))
    windows = _all(RateWindow, day__lt=before).filter(_passed())
    delete("rate_windows", windows, _delete(windows))
    unused = _all(DailyUsage, day__lt=before, **dict.fromkeys(PROVEN, 0))
    delete("usage_rows", unused, _delete(unused.order_by("day", "account")))
    return Pruned(**deleted, skipped=tuple(skipped))


def _unsettled() -> Q:
    """Open, or charged in full for want of a settlement that may only be late."""
    awaited = Q(usage_source=Reservation.UsageSource.HELD, prompt_tokens=0, completion_tokens=0)
    return Q(state=State.OPEN) | awaited & Q(expires_at__gt=now() - GRACE)


def _passed() -> Q:
    """Windows that no longer count: a rate is that of its window and of the one before."""
    passed = Q(pk__in=())
    for seconds in _all(RateWindow).values_list("window_seconds", flat=True).distinct():
        passed |= Q(window_seconds=seconds, window_start__lte=now() - timedelta(seconds=2 * seconds))
    return passed


def _fold(day: date, rows: QuerySet[Any], *columns: str) -> Iterator[int]:
    """Replace ``rows`` by their accounts' adjustments. Yields how many, after each transaction.

    ``columns``: of the account or accounts, and of what is added up, tokens and their cost.
    """
    while batch := dict(rows.values_list("pk", columns[0])[:BATCH]):
        accounts = {account for value in batch.values() for account in _listed(value)}
        yield _fold_batch(day, accounts, rows.filter(pk__in=batch), columns)


@retried
def _fold_batch(day: date, accounts: set[str], rows: QuerySet[Any], columns: tuple[str, ...]) -> int:
    with ledger_transaction(keys=[(day, account) for account in accounts]):  # a late settlement waits
        earlier = _all(Adjustment, day=day, account__in=accounts, kind=PRUNED)
        sums = {account: [0, 0] for account in accounts}
        for value, tokens, cost in (*rows.values_list(*columns), *earlier.values_list("account", "tokens", "cost")):
            for account in _listed(value):
                sums[account][0] += tokens
                sums[account][1] += cost or 0
        earlier.delete()
        number, _ = rows.delete()
        _all(Adjustment).bulk_create(
            Adjustment(day=day, account=account, tokens=tokens, cost=cost, kind=PRUNED, created_at=now())
            for account, (tokens, cost) in sums.items()
        )
    return number


def _delete(rows: QuerySet[Any]) -> Iterator[int]:
    """Yields how many, after each transaction, which locks them in the order of ``rows``."""

    @retried
    def delete_batch() -> int:
        with transaction.atomic(using=settings.DATABASE_ALIAS):
            batch = list(rows.select_for_update().values_list("pk", flat=True)[:BATCH])
            return rows.filter(pk__in=batch).delete()[0]

    while number := delete_batch():
        yield number


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _all(model: type[models.Model], **lookups: Any) -> QuerySet[Any]:
    return model._default_manager.using(settings.DATABASE_ALIAS).filter(**lookups).order_by()


def _days(*querysets: QuerySet[Any]) -> list[date]:
    return sorted({day for rows in querysets for day in rows.values_list("day", flat=True).distinct()})

"""Forgetting old days without losing the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Final

from django.db import transaction
from django.db.models import Q, QuerySet

from ..conf import now, settings
from ..models import Adjustment, DailyUsage, RateWindow, Reservation
from .audit import PROVEN, PRUNED, Progress, all_rows, charge_overdue, days
from .days import today
from .transactions import ledger_transaction, retried

BATCH: Final = 1000  # rows deleted in a transaction
GRACE: Final = timedelta(days=1)  # how long after its lease a reservation may yet be settled

Kind, State = Adjustment.Kind, Reservation.State


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


def prune(before: date, *, dry_run: bool = False, progress: Progress | None = None) -> Pruned:
    """Delete the reservations, adjustments and rate windows of days before ``before``; their usage stays.

    One adjustment for each account and day stands for what was deleted of it, written in the same
    transaction: every commit can be proven, so it may be interrupted anywhere, and run again. What was forgiven or
    granted stays as it is, and so do the lines of the bill: with them it is still known what was billed.
    """
    if before > today():
        raise ValueError("Today's rows are in use: only days that are over can be pruned.")
    if not dry_run:
        charge_overdue()
    deleted: Counter[str] = Counter(reservations=0, adjustments=0, rate_windows=0, usage_rows=0)

    def delete(kind: str, rows: QuerySet[Any], batches: Iterator[int]) -> None:
        for number in (rows.count(),) if dry_run else batches:
            deleted[kind] += number
            if progress:
                progress(", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in deleted.items()))

    skipped = []
    unpruned = all_rows(Adjustment, day__lt=before, kind=Kind.LATE)
    for day in days(all_rows(Reservation, day__lt=before), unpruned):
        reservations, adjustments = all_rows(Reservation, day=day), unpruned.filter(day=day)
        if reservations.filter(_unsettled()).exists():
            skipped.append(day)
            continue
        # Not all of them: who began before midnight may commit one yet.
        settled = reservations.exclude(_unsettled()).order_by("payer")
        delete("reservations", settled, _fold(day, settled, "accounts", "tokens_charged", "cost"))
        delete("adjustments", adjustments, _fold(day, adjustments, "account", "tokens", "cost"))
    windows = all_rows(RateWindow, day__lt=before).filter(_passed())
    delete("rate_windows", windows, delete_batches(windows))
    unused = all_rows(DailyUsage, day__lt=before, **dict.fromkeys(PROVEN, 0))
    delete("usage_rows", unused, delete_batches(unused.order_by("day", "account")))
    return Pruned(**deleted, skipped=tuple(skipped))


def _unsettled() -> Q:
    """Open, or charged in full for want of a settlement that may only be late."""
    awaited = Q(usage_source=Reservation.UsageSource.HELD, prompt_tokens=0, completion_tokens=0)
    return Q(state=State.OPEN) | awaited & Q(expires_at__gt=now() - GRACE)


def _passed() -> Q:
    """Windows that no longer count: a rate is that of its window and of the one before."""
    passed = Q(pk__in=())
    for seconds in all_rows(RateWindow).values_list("window_seconds", flat=True).distinct():
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
        earlier = all_rows(Adjustment, day=day, account__in=accounts, kind=PRUNED)
        sums = {account: [0, 0] for account in accounts}
        for value, tokens, cost in (*rows.values_list(*columns), *earlier.values_list("account", "tokens", "cost")):
            for account in _listed(value):
                sums[account][0] += tokens
                sums[account][1] += cost or 0
        earlier.delete()
        number, _ = rows.delete()
        all_rows(Adjustment).bulk_create(
            Adjustment(day=day, account=account, tokens=tokens, cost=cost, kind=PRUNED, created_at=now())
            for account, (tokens, cost) in sums.items()
        )
    return number


def delete_batches(rows: QuerySet[Any]) -> Iterator[int]:
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

"""Leases: renewed while their streams live, charged in full when nobody renews them any more."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

from django.db import IntegrityError, transaction

from ..conf import now, settings
from ..models import Account, Reservation
from .decisions import charge_hold
from .transactions import ledger_transaction, retried

logger = logging.getLogger("chatnest.ledger")

MOST_OVERDUE: Final = 500

State, Outcome = Reservation.State, Reservation.Outcome


def expire_overdue() -> None:
    """Charge what the oldest overdue leases hold. Raises what the database raises.

    No decision waits for it: charged or held, they commit the same tokens, and are nobody's streams any more.
    """
    overdue = Reservation.objects.using(settings.DATABASE_ALIAS).overdue(now()).order_by("expires_at")
    if ids := list(overdue.values_list("id", flat=True)[:MOST_OVERDUE]):
        _expire_what_can_be(ids)


def _expire_what_can_be(ids: Sequence[UUID]) -> None:
    try:
        expire(ids)
    except IntegrityError:  # a counter that somebody broke stops only its own leases
        if len(ids) == 1:
            logger.exception(
                "The lease of %s cannot be charged: run manage.py chatnest_verify --repair", ids[0],
                extra={"reservation": str(ids[0])},
            )  # fmt: skip
        else:
            for id in ids:
                _expire_what_can_be([id])


@retried
def expire(ids: Sequence[UUID]) -> None:
    """Charge these leases in full, if they are still open and overdue. Raises what the database raises."""
    alias = settings.DATABASE_ALIAS
    rows = Reservation.objects.using(alias).filter(id__in=ids).values_list("day", "accounts")
    with ledger_transaction(keys=[(day, name) for day, names in rows for name in names], ids=ids) as book:
        for row in book.reservations.values():
            if row.state == State.OPEN and row.is_overdue:
                charge_hold(book, row, State.EXPIRED, Outcome.EXPIRED)


@retried
def renew(ids: Sequence[UUID], accounts: Collection[str] = ()) -> tuple[set[UUID], set[str]]:
    """Extend these leases. Returns the ids whose stream must stop, and those of ``accounts`` that are paused.

    An expired lease does not stop its stream: the full hold is charged, and a late settlement corrects it.
    """
    alias = settings.DATABASE_ALIAS
    held = Reservation.objects.using(alias).filter(id__in=ids)
    with transaction.atomic(using=alias):
        # In the order in which a book locks them, and not as a subquery: with old statistics the join is quadratic.
        live = set(held.open().order_by("id").select_for_update().values_list("id", flat=True))
        until = now() + timedelta(seconds=settings.LEASE_SECONDS)
        Reservation.objects.using(alias).filter(id__in=live).update(expires_at=until)
    stopped = set(ids) - live
    if stopped:
        stopped -= set(held.filter(state=State.EXPIRED).values_list("id", flat=True))
    paused = Account.objects.using(alias).filter(name__in=accounts, paused=True).values_list("name", flat=True)
    return stopped, set(paused)

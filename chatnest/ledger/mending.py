"""Mending the lines of bills, under the locks of their accounts' usage rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any, Final

from ..conf import settings
from ..models import Adjustment, Reservation, UsageLine
from .bulk import insert, run
from .lines import ADD_TO_LINE, ITEM, KEY, Bills

Kind = Adjustment.Kind

# Where a correction is put that no reservation explains.
_COLUMN: Final = {"tokens": "tokens_held"}


def rebuild_lines(day: date, accounts: Iterable[str]) -> None:
    """Make the lines of these accounts anew from their reservations and what came late; not where these were pruned."""
    adjustments = Adjustment.objects.using(settings.DATABASE_ALIAS).filter(day=day, account__in=accounts).order_by()
    names = set(accounts) - set(adjustments.filter(kind=Kind.PRUNED).values_list("account", flat=True))
    late = adjustments.filter(kind=Kind.LATE).values_list("account", "reason", "tokens")
    corrections = {(account, id): tokens for account, id, tokens in late}
    bills = Bills()
    rows = Reservation.objects.using(settings.DATABASE_ALIAS).filter(day=day).exclude(state=Reservation.State.OPEN)
    for row in rows.order_by().iterator():
        for account in names.intersection(row.accounts):
            billed = row.tokens_charged + corrections.get((account, str(row.pk)), 0)
            bills.add(row, billed, accounts=[account])
    UsageLine.objects.using(settings.DATABASE_ALIAS).filter(day=day, account__in=names).delete()
    _write(bills.rows())


def correct_lines(day: date, account: str, corrections: Mapping[str, int]) -> None:
    """Put what no reservation explains in a line without a model."""
    its = {_COLUMN.get(name, name): change for name, change in corrections.items()}
    key = dict(zip(KEY, (account, day, "", "", "", ""), strict=True))
    _write([{**key, **dict.fromkeys(ITEM, 0), **its}])


def _write(rows: list[dict[str, Any]]) -> None:
    run(settings.DATABASE_ALIAS, insert(settings.DATABASE_ALIAS, UsageLine, rows, ADD_TO_LINE))

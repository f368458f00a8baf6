from __future__ import annotations

from datetime import date
from typing import Any

from django.core.management.base import CommandParser

from chatnest import ledger
from chatnest.conf import settings
from chatnest.ledger import pruning
from chatnest.ledger.audit import Progress
from chatnest.models import Refusal

from ..base import OperatorCommand, count, days_earlier, positive


class Command(OperatorCommand):
    help = (
        "Delete old reservations, adjustments, rate windows and refusals. Every account's usage and bill of every day "
        "stay, and chatnest_verify can still prove it; so does the record of changes. Safe while the site serves, and "
        "to interrupt and run again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--days", type=positive, required=True, metavar="N", help="Keep the last N days, today included."
        )
        parser.add_argument("--dry-run", action="store_true", help="Only say what would be deleted.")

    def run(self, *args: Any, days: int, dry_run: bool, **options: Any) -> None:
        before = days_earlier(ledger.today(), days - 1)
        progress = self.progress
        pruned = pruning.prune(before, dry_run=dry_run, progress=progress)
        refusals = prune_refusals(before, dry_run=dry_run, progress=progress)
        self.say(
            f"{'Would delete' if dry_run else 'Deleted'} {count(pruned.reservations, 'reservation')}, "
            f"{count(pruned.adjustments, 'adjustment')}, {count(pruned.rate_windows, 'rate window')} "
            f"and {count(refusals, 'refusal')} from before {before}."
        )
        for day in pruned.skipped:
            self.say(f"Left {day} for another time: reservations of that day may still be settled.")


def prune_refusals(before: date, *, dry_run: bool, progress: Progress | None) -> int:
    """How many rows; each batch is a transaction of its own."""
    rows = Refusal.objects.using(settings.DATABASE_ALIAS).filter(day__lt=before).order_by()
    if dry_run:
        return rows.count()
    deleted = 0
    for number in pruning.delete_batches(rows):
        deleted += number
        if progress:
            progress(count(deleted, "refusal"))
    return deleted

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from chatnest import ledger
from chatnest.ledger import audit

from ..base import OperatorCommand, count, days_earlier, positive


class Command(OperatorCommand):
    help = (
        "Delete old reservations, adjustments and rate windows. Every account's usage of every day stays, "
        "and chatnest_verify can still prove it. Safe while the site serves, and to interrupt and run again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--days", type=positive, required=True, metavar="N", help="Keep the last N days, today included."
        )
        parser.add_argument("--dry-run", action="store_true", help="Only say what would be deleted.")

    def run(self, *args: Any, days: int, dry_run: bool, **options: Any) -> None:
        before = days_earlier(ledger.today(), days - 1)
        pruned = audit.prune(before, dry_run=dry_run, progress=self.progress)
        self.say(
            f"{'Would delete' if dry_run else 'Deleted'} {count(pruned.reservations, 'reservation')}, "
            f"{count(pruned.adjustments, 'adjustment')} and {count(pruned.rate_windows, 'rate window')} "
            f"from before {before}."
        )
        for day in pruned.skipped:
            self.say(f"Left {day} for another time: reservations of that day may still be settled.")

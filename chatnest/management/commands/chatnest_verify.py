from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from chatnest.proofs import prove

from ..base import OperatorCommand, count


class Command(OperatorCommand):
    help = (
        "Prove the counters of every account and day: tokens used are the sum of charges and adjustments, "
        "tokens reserved are the sum of open reservations. Safe while the site serves. "
        "Exits with 1 if a difference remains. When it was proven, and by whom, is recorded."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--repair",
            action="store_true",
            help="Set counters that differ to the sums, and charge what dead processes had reserved.",
        )

    def run(self, *args: Any, repair: bool, **options: Any) -> None:
        found = prove(repair=repair, progress=self.progress)
        for discrepancy in found:
            self.stdout.write(str(discrepancy))
        remaining = sum(not discrepancy.repaired for discrepancy in found)
        if remaining and repair:
            raise CommandError(
                f"{count(remaining, 'difference')} not repaired: those rows add up to less than nothing, "
                "which no counter can hold. Somebody deleted or edited a reservation or an adjustment."
            )
        if remaining:
            raise CommandError(
                f"{count(remaining, 'difference')}. To set the counters to the sums: chatnest_verify --repair"
            )
        proven = "Every counter is proven by its rows."
        self.say(self.style.SUCCESS(f"{count(len(found), 'difference')} repaired. {proven}" if found else proven))

from __future__ import annotations

import argparse
from datetime import date
from typing import Any

from django.core.management.base import CommandError, CommandParser

from chatnest import ledger
from chatnest.accounts import SHARED
from chatnest.conf import settings
from chatnest.models import Account
from chatnest.policy import Policy

from .. import base
from ..base import count, described


class Command(base.OperatorCommand):
    help = (
        "Grant an account more tokens than its limit, for one day. HARD_CAPS still apply; for site and anonymous, the "
        "settings' limits. A second grant for the day takes the place of the first; 0 takes it back."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("account", metavar="NAME", help=base.WHO)
        parser.add_argument("tokens", type=tokens, help="How many more, such as 20000.")
        parser.add_argument("--day", type=base.day, metavar="YYYY-MM-DD", help="Which day (default: today).")

    def run(self, *args: Any, account: str, tokens: int, day: date | None, **options: Any) -> None:
        name, today = base.chargeable(account), ledger.today()
        day = day or today
        if day < today:
            raise CommandError(f"{day} is over. Nothing was granted.")
        rows = Account.objects.using(settings.DATABASE_ALIAS).select_related("profile")
        row = rows.filter(name=name).first() or Account(name=name)
        policy = Policy.read(SHARED)
        row.extra_tokens, row.extra_day = None, None
        without = policy.with_row(row).daily_limit(name, day).in_force
        if tokens:
            row.extra_tokens, row.extra_day = tokens, day
        limit = policy.with_row(row).daily_limit(name, day).in_force
        if tokens and limit == without:
            raise CommandError(
                f"This would change nothing: {described(name)} has {count(limit, 'token')} a day, and no more may be."
            )
        granted = {"extra_tokens": row.extra_tokens, "extra_day": row.extra_day}
        Account.objects.using(settings.DATABASE_ALIAS).update_or_create(name=name, defaults=granted)
        used = sum(row.tokens_used for row in base.usage([name], day=day))
        self.say(f"{described(name)}: {count(limit, 'token')} for {day}, of which {used:,} are used.")


def tokens(text: str) -> int:
    digits = text.replace(",", "").replace("_", "")
    if digits.isdecimal():
        return int(digits)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 20000")

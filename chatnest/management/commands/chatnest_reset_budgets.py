from __future__ import annotations

from collections.abc import Set
from datetime import date
from typing import Any, Final, cast

from django.core.management.base import CommandError, CommandParser

from chatnest import ledger
from chatnest.accounts import SITE
from chatnest.conf import settings
from chatnest.ledger import Reset
from chatnest.models import Reservation

from .. import base
from ..base import count, usage

SITE_TOO: Final = " The budget of site, from which everybody pays, is among them."
REASON: Final = "chatnest_reset_budgets"
UNKNOWN: Final = (
    "Nothing was reset. Accounts are named like site, user:7 or ip:192.0.2.1; chatnest_usage lists those that used "
    "anything."
)
BATCH: Final = 500  # accounts a transaction: live requests wait for no more than these


class Command(base.OperatorCommand):
    help = (
        "Forgive the tokens that accounts have used of a day's budget, so that they may chat again. "
        "Each account has a budget of its own: to reset user:7 does not reset site. Open streams keep what "
        "they have reserved. Each reset is recorded as an adjustment, with the name of who ran this."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument(
            "--account",
            action="extend",
            nargs="+",
            metavar="NAME",
            help="These accounts, such as site, user:7, ip:192.0.2.1, or a user's name or e-mail.",
        )
        whose.add_argument(
            "--all",
            action="store_true",
            dest="everyone",
            help="Every account that used anything that day; site, from which everybody pays, is one of them.",
        )
        parser.add_argument(
            "--day", type=base.day, metavar="YYYY-MM-DD", help="The day of the budget (default: today)."
        )
        parser.add_argument("--dry-run", action="store_true", help="Only say what would be forgiven.")
        parser.add_argument(
            "--noinput", "--no-input", action="store_false", dest="interactive", help="Do not ask first."
        )

    def run(
        self,
        *args: Any,
        account: list[str] | None,
        everyone: bool,
        day: date | None,
        dry_run: bool,
        interactive: bool,
        **options: Any,
    ) -> None:
        if not (account or everyone):
            raise CommandError(
                "Whose budget? Name accounts (--account user:7), or reset every account of the day (--all)."
            )
        day = day or ledger.today()
        if account:
            account = base.charged(account, UNKNOWN)
        used = {row.account: row.tokens_used for row in usage(account, day=day, tokens_used__gt=0)}
        for name in dict.fromkeys(account or ()):
            if name not in used:
                self.say(f"{name}: nothing to forgive")
        shared = SITE_TOO if everyone and SITE in used else ""
        if not used:
            self.say(f"Nothing was reset: no tokens were used on {day}.")
        elif dry_run:
            for name, tokens in used.items():
                self.say(f"{name}: would forgive {count(tokens, 'token')}")
            self.say(
                f"Nothing was reset: without --dry-run, {count(len(used), 'account')} would be, for {day}.{shared}"
            )
        else:
            if interactive:
                confirm(f"This forgives what {listed(list(used))} used on {day}.{shared}")
            self.reset(day, list(used))
            self.say(self.style.SUCCESS(f"{count(len(used), 'account')} reset for {day}."))
            self.mention_streams(day, used.keys())

    def reset(self, day: date, accounts: list[str]) -> None:
        actor, progress = base.operator(), self.progress
        for start in range(0, len(accounts), BATCH):
            batch = accounts[start : start + BATCH]
            resets = [Reset(day=day, account=name, reason=REASON, actor=actor) for name in batch]
            for name, forgiven in zip(batch, ledger.apply(resets), strict=True):
                self.say(f"{name}: forgave {count(cast('int', forgiven), 'token')}")
            if progress:
                progress(f"{start + len(batch):,} of {count(len(accounts), 'account')}")

    def mention_streams(self, day: date, accounts: Set[str]) -> None:
        rows = Reservation.objects.using(settings.DATABASE_ALIAS).open().filter(day=day)
        held = [row.tokens for row in rows.charging(accounts)]
        if held:
            self.say(
                f"Still reserved by {count(len(held), 'open stream')}: {count(sum(held), 'token')}. "
                "What they use will count."
            )


def confirm(question: str) -> None:
    try:
        answer = input(f"{question} Type 'yes' to go on: ")
    except EOFError:
        raise CommandError("Nobody is there to say yes, so nothing was reset. Use --noinput.") from None
    if answer.strip().lower() != "yes":
        raise CommandError("Nothing was reset.")


def listed(accounts: list[str]) -> str:
    shown, more = accounts[:5], len(accounts) - 5
    return ", ".join(shown) + (f" and {count(more, 'more account')}" if more > 0 else "")

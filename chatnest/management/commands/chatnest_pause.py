from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from chatnest.accounts import SITE
from chatnest.conf import settings
from chatnest.models import Account, Reservation

from .. import base
from ..base import count, described


class Command(base.OperatorCommand):
    help = (
        "Pause accounts: nobody who pays from them gets an answer, and those that are being written end within 15 "
        "seconds. Pausing anonymous stops visitors who are not logged in; chatnest_stop stops everybody."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("accounts", nargs="+", metavar="NAME", help=base.WHO)
        parser.add_argument("--resume", action="store_true", help="Let them chat again.")
        parser.add_argument("--reason", default="", metavar="TEXT", help=base.WHY)

    def run(self, *args: Any, accounts: list[str], resume: bool, **options: Any) -> None:
        for name in dict.fromkeys([base.chargeable(typed) for typed in accounts]):
            self.say(pause(name, paused=not resume))


def pause(account: str, *, paused: bool) -> str:
    """What became of it, in a sentence."""
    rows = Account.objects.using(settings.DATABASE_ALIAS)
    who, how = ("The chat", "stopped") if account == SITE else (described(account), "paused")
    if rows.filter(name=account, paused=True).exists() == paused:
        return f"{who} was {how} already." if paused else f"{who} was not {how}."
    rows.update_or_create(name=account, defaults={"paused": paused})
    if not paused:
        return f"{who} is answered again, in every process within 5 seconds."
    answers = len(Reservation.objects.using(settings.DATABASE_ALIAS).open().charging([account]))
    running = f"{count(answers, 'running answer')} {'ends' if answers == 1 else 'end'} within 15 seconds"
    return f"{who} is {how}{' for everybody' * (account == SITE)}. {running}."

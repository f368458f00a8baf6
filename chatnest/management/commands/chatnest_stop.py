from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from chatnest.accounts import SITE

from .. import base
from .chatnest_pause import pause


class Command(base.OperatorCommand):
    help = (
        "Stop the chat for everybody, at once: whoever asks is told to try again later, and answers that are being "
        "written end within 15 seconds. The same as pausing the account site."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--resume", action="store_true", help="Start it again.")
        parser.add_argument("--reason", default="", metavar="TEXT", help=base.WHY)

    def run(self, *args: Any, resume: bool, **options: Any) -> None:
        self.say(pause(SITE, paused=not resume))

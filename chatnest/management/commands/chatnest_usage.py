from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import date
from itertools import groupby
from typing import Any, Final

from django.core.management.base import CommandParser

from chatnest import ledger
from chatnest.accounts import SITE

from .. import base

COLUMNS: Final = (
    *("day", "account"),
    *("tokens_used", "tokens_reserved", "prompt_tokens", "completion_tokens", "requests"),
)
HEADINGS: Final = ("Day", "Account", "Used", "Reserved", "Prompt", "Completion", "Requests")

Row = tuple[Any, ...]  # as COLUMNS


class Command(base.OperatorCommand):
    help = (
        "Show how many tokens each account has used, the site first, then who used most. "
        "Used are charged and adjusted, reserved are held by streams that are open."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--day", type=base.day, metavar="YYYY-MM-DD", help="The last day shown (default: today).")
        parser.add_argument("--days", type=base.positive, default=1, metavar="N", help="How many days (default: 1).")
        parser.add_argument(
            "--account",
            action="extend",
            nargs="+",
            metavar="NAME",
            help="Only these accounts, or users.",
        )
        parser.add_argument(
            "--top",
            type=base.positive,
            metavar="N",
            help="Each day, the site and the N accounts that used most.",
        )
        form = parser.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="A JSON list of objects instead of a table.")
        form.add_argument("--csv", action="store_true", help="CSV with a header instead of a table.")

    def run(
        self,
        *args: Any,
        day: date | None,
        days: int,
        account: list[str] | None,
        top: int | None,
        **options: Any,
    ) -> None:
        last = day or ledger.today()
        first = base.days_earlier(last, days - 1)
        if account:
            account = base.charged(account, "Accounts are named like site or user:7.")
        rows = base.usage(account, day__range=(first, last)).values_list(*COLUMNS)
        shown = list(biggest(rows.iterator(), top))
        if options["json"]:
            self.stdout.write(
                json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in shown], default=str, indent=2)
            )
        elif options["csv"]:
            csv.writer(self.stdout, lineterminator="\n").writerows([COLUMNS, *(map(safe, row) for row in shown)])
        elif shown:
            self.stdout.write("\n".join(table(shown)))
        else:
            self.stdout.write(f"No usage from {first} to {last}." if days > 1 else f"No usage on {last}.")


def safe(cell: object) -> object:
    """No spreadsheet takes it for a formula: https://owasp.org/www-community/attacks/CSV_Injection"""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def biggest(rows: Iterator[Row], top: int | None) -> Iterator[Row]:
    """Each day's first rows: the site does not count as one of the ``top``."""
    for _, of_day in groupby(rows, key=lambda row: row[0]):
        others = 0
        for row in of_day:
            others += row[1] != SITE
            if top is None or others <= top:
                yield row


def table(rows: list[Row]) -> Iterator[str]:
    lines = [
        HEADINGS,
        *((str(day), account, *(f"{n:,}" for n in numbers)) for day, account, *numbers in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells)

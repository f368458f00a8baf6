from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from itertools import groupby
from typing import Any, Final

from django.core.management.base import CommandError, CommandParser

from chatnest import ledger, reports
from chatnest.accounts import SITE
from chatnest.reports import Dimension, Figures, Period, Person

from .. import base

DAILY: Final = (
    *("day", "account"),
    *("tokens_used", "tokens_reserved", "prompt_tokens", "completion_tokens", "requests"),
)
BILLED: Final = ("tokens_billed", "tokens_reported", "tokens_counted", "tokens_held")
MONEY: Final = ("cost", "currency", "unpriced")
NOT_IN_TABLE: Final = {"name", "currency", "unpriced"}  # they stand in others' cells

Row = dict[str, Any]  # of each column


class Command(base.OperatorCommand):
    help = (
        "Show how many tokens each account has used, the site first, then who used most. "
        "Used are charged and adjusted, reserved are held by streams that are open. "
        "With --by, what was billed in the whole period: as the provider reported it, as it was counted without a "
        "report, and whole holds; what operators forgave is in it."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--day", type=base.day, metavar="YYYY-MM-DD", help="The last day shown (default: today).")
        parser.add_argument("--days", type=base.positive, metavar="N", help="How many days (default: 1).")
        parser.add_argument(
            "--from", type=base.day, dest="first", metavar="YYYY-MM-DD", help="The first day, until --to or today."
        )
        parser.add_argument("--to", type=base.day, dest="last", metavar="YYYY-MM-DD", help="The last day.")
        parser.add_argument("--month", type=base.month, metavar="YYYY-MM", help="A calendar month.")
        parser.add_argument(
            "--account",
            action="extend",
            nargs="+",
            metavar="NAME",
            help="Only these accounts, or users.",
        )
        parser.add_argument("--by", choices=reports.DIMENSIONS, help="Sum up the period, a line for each of these.")
        parser.add_argument(
            "--cost", action="store_true", help="What was billed in money too, and how many requests had no price."
        )
        parser.add_argument(
            "--top",
            type=base.positive,
            metavar="N",
            help="Each day, the site and the N accounts that used most; with --by, the N dearest of the period.",
        )
        form = parser.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="A JSON list of objects instead of a table.")
        form.add_argument("--csv", action="store_true", help="CSV with a header instead of a table.")

    def run(self, *args: Any, account: list[str] | None, by: Dimension | None, **options: Any) -> None:
        period = chosen(**{name: options[name] for name in ("day", "days", "first", "last", "month")})
        accounts = base.charged(account, "Accounts are named like site or user:7.") if account else []
        cost, top = options["cost"], options["top"]
        if by:
            check_sums(by, accounts, top)
            rows = [sums(by, one) for one in reports.by(by, period, accounts=accounts, top=top)]
        else:
            rows = list(biggest(daily(period, accounts, cost=cost), top))
        who = reports.people({row["account"] for row in rows if "account" in row})
        if by == "account":
            rows = [{**row, "name": who[row[by]].name if row[by] in who else ""} for row in rows]
        columns = [*(columns_by(by) if by else DAILY), *(MONEY if cost else ())]
        if options["json"]:
            told = [{name: row[name] for name in columns} for row in rows]
            self.stdout.write(json.dumps(told, default=str, indent=2))
        elif options["csv"]:
            cells = ([reports.safe(row[name]) for name in columns] for row in rows)
            csv.writer(self.stdout, lineterminator="\n").writerows([columns, *cells])
        elif rows:
            if by:
                rows.append(total(by, period, accounts))
            self.stdout.write("\n".join(table([name for name in columns if name not in NOT_IN_TABLE], rows, who)))
        elif period.days > 1:
            self.stdout.write(f"No usage from {period.first} to {period.last}.")
        else:
            self.stdout.write(f"No usage on {period.last}.")


def chosen(
    *, day: date | None, days: int | None, first: date | None, last: date | None, month: Period | None
) -> Period:
    """The days that the options mean. Raises CommandError where they contradict each other."""
    ways = (month, first or last, day or days)
    if sum(way is not None for way in ways) > 1:
        raise CommandError("Which days? Name a --month, or --from and --to, or --day and --days.")
    if month:
        return month
    if last and not first:
        raise CommandError("Which is the first day? --to needs --from.")
    if first:
        last = last or ledger.today()
        if first > last:
            raise CommandError(f"The first day, {first}, is after the last, {last}.")
        return Period(first, last)
    last = day or ledger.today()
    return Period(base.days_earlier(last, (days or 1) - 1), last)


def check_sums(by: Dimension, accounts: list[str], top: int | None) -> None:
    if by == "day" and top:
        raise CommandError("Days are shown in their order: --top needs another --by.")
    if SITE in accounts and len(set(accounts)) > 1:
        raise CommandError("What the others used is in site: sum it up alone, or them without it.")


def columns_by(by: Dimension) -> list[str]:
    names = ["account", "name"] if by == "account" else [by]
    used = ["tokens_used"] if by in reports.COUNTED else []
    return [*names, *BILLED, *used, "prompt_tokens", "completion_tokens", "requests"]


def sums(by: Dimension, one: Figures) -> Row:
    same = ("tokens_reported", "tokens_counted", "tokens_held", "prompt_tokens", "completion_tokens", "requests")
    numbers = {name: getattr(one, name) for name in same}
    return {by: one.key, "tokens_billed": one.billed, "tokens_used": one.used, **numbers, **money_of(one)}


def total(by: Dimension, period: Period, accounts: list[str]) -> Row:
    row = {**sums(by, reports.totals(period, accounts or (SITE,))), by: "Total"}
    if by == "account" and not accounts:
        row["tokens_used"] = None  # that of site, which is forgiven apart from theirs
    return row


def daily(period: Period, accounts: list[str], *, cost: bool) -> Iterator[Row]:
    """Of each account and day: what it used, and what was billed in money."""
    costs = reports.by_day_and_account(period, accounts) if cost else {}
    rows = base.usage(accounts, day__range=(period.first, period.last)).values_list(*DAILY)
    for row in rows.iterator():
        yield {**dict(zip(DAILY, row, strict=True)), **money_of(costs.get(row[:2]))}


def money_of(one: Figures | None) -> Row:
    cost = None if one is None or one.cost is None else reports.money(one.cost)
    return {"cost": cost, "currency": reports.currency(), "unpriced": one.unpriced if one else 0}


def biggest(rows: Iterable[Row], top: int | None) -> Iterator[Row]:
    """Each day's first rows: the site does not count as one of the ``top``."""
    for _, of_day in groupby(rows, key=lambda row: row["day"]):
        others = 0
        for row in of_day:
            others += row["account"] != SITE
            if top is None or others <= top:
                yield row


def table(columns: list[str], rows: list[Row], who: Mapping[str, Person]) -> Iterator[str]:
    lines = [[heading(name) for name in columns], *([cell(name, row, who) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            text.ljust(width) if name in reports.DIMENSIONS else text.rjust(width)
            for name, text, width in zip(columns, line, widths, strict=True)
        )
        yield "  ".join(cells)


def heading(column: str) -> str:
    if column == "cost":
        return f"Cost ({reports.currency()})"
    return column.removeprefix("tokens_").removesuffix("_tokens").capitalize()


def cell(column: str, row: Row, who: Mapping[str, Person]) -> str:
    value = row[column]
    if column == "cost":  # never 0 for what is not known
        unpriced = f"unpriced: {row['unpriced']:,}" if row["unpriced"] else ""
        return ", ".join(filter(None, [value, unpriced]))
    if column == "account":
        return base.named(value, who)
    if column in reports.DIMENSIONS:
        return str(value) or "(none)"
    return "" if value is None else f"{value:,}"

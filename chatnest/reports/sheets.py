"""Rows for a bookkeeper's spreadsheet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from itertools import islice
from typing import Any, Final

from ..accounts import SHARED
from ..conf import settings
from .figures import figures, lines, summed
from .periods import Period
from .users import Person, people

CHUNK: Final = 2000
COLUMNS: Final = (
    *("period", "account", "name", "email", "profile", "provider", "model", "label", "requests"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"),
    *("tokens_reported", "tokens_counted", "tokens_held", "tokens_billed", "cost", "currency", "unpriced_requests"),
)
_LINE: Final = ("account", "profile", "provider", "model", "label")


def csv_rows(period: Period, accounts: Collection[str] = (), *, daily: bool = True) -> Iterator[list[Any]]:
    """COLUMNS, then a row for each line of the bills of these accounts, or of all who pay; cells are ``safe``.

    One a day, or with ``daily`` off one for the whole period. ``cost`` is exact, and empty where nothing had a price.
    The rows of all who pay add up to the site's, unless ``PAYER`` charges a request to more than one.
    """
    yield list(COLUMNS)
    rows = lines(period, accounts)
    if not accounts:
        rows = rows.exclude(account__in=SHARED)
    fields = ("day", *_LINE) if daily else _LINE
    whole = f"{period.first} to {period.last}"
    found = summed(rows, *fields).order_by(*fields).iterator(CHUNK)
    who: dict[str, Person | None] = {}  # everybody once, however many days they have
    while some := [row if daily else (whole, *row) for row in islice(found, CHUNK)]:
        new = {account for _, account, *_ in some} - who.keys()
        who |= dict.fromkeys(new) | people(new)
        for row in some:
            yield list(map(safe, _cells(row, who)))


def _cells(row: tuple[Any, ...], who: Mapping[str, Person | None]) -> Iterator[object]:
    day, account, *line = row[:6]
    one = figures(None, row[6:])
    person = who[account]
    yield from (str(day), account, person.name if person else "", person.email if person else "", *line)
    yield from (one.requests, one.prompt_tokens, one.cached_tokens, one.completion_tokens, one.reasoning_tokens)
    yield from (one.tokens_reported, one.tokens_counted, one.tokens_held, one.billed)
    yield from ("" if one.cost is None else money(one.cost), currency(), one.unpriced)


def money(millionths: int) -> str:
    """Exactly, with 6 digits: ``0.001500``."""
    return f"{Decimal(millionths).scaleb(-6):.6f}"


def currency() -> str:
    return str(settings.CURRENCY)


def safe(cell: object) -> object:
    """No spreadsheet takes it for a formula: https://owasp.org/www-community/attacks/CSV_Injection"""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell

"""The lines of a bill: what each account was charged in a day for one profile, provider, model and label.

They are written in the settlement's transaction, and the lock of the account's usage row of the day guards them too.
"""

from __future__ import annotations

from datetime import date
from typing import Any, Final, NamedTuple

from ..models import Reservation, UsageLine
from .bulk import names, table
from .rows import ReservationRow

UsageSource = Reservation.UsageSource


class LineKey(NamedTuple):
    account: str
    day: date
    profile: str
    provider: str
    model: str
    label: str


class Item(NamedTuple):
    """What a charged reservation adds to a line of each of its accounts."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    tokens_reported: int = 0
    tokens_counted: int = 0
    tokens_held: int = 0
    cost: int = 0
    unpriced: int = 0


def _item(row: ReservationRow | Reservation, tokens: int) -> Item:
    """Of a row as it is settled by now, and billed so many tokens."""
    return Item(
        requests=1,
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        completion_tokens=row.completion_tokens,
        reasoning_tokens=row.reasoning_tokens,
        cost=row.cost or 0,
        unpriced=row.cost is None,
        **{_COLUMNS.get(row.usage_source, "tokens_held"): tokens},
    )


_NOTHING: Final = Item()
_COLUMNS: Final = {UsageSource.REPORTED.value: "tokens_reported", UsageSource.COUNTED.value: "tokens_counted"}

ADD_TO_LINE: Final = f"ON CONFLICT ({names(LineKey._fields)}) DO UPDATE SET " + ", ".join(
    f'"{name}" = {table(UsageLine)}."{name}" + excluded."{name}"' for name in Item._fields
)


class Bills:
    """What one transaction adds to the lines."""

    def __init__(self) -> None:
        self._lines: dict[LineKey, Item] = {}

    def add(self, row: ReservationRow, tokens: int, times: int = 1) -> None:
        """Put a charged reservation, as it is now, on its accounts' bills; or, -1 times, take it off."""
        for account in row.accounts:
            self.add_to(account, row, tokens, times)

    def add_to(self, account: str, row: ReservationRow | Reservation, tokens: int, times: int = 1) -> None:
        key = LineKey(account, row.day, row.profile, row.provider, row.model, row.label)
        before, its = self._lines.get(key, _NOTHING), _item(row, tokens)
        self._lines[key] = Item(*(one + times * other for one, other in zip(before, its, strict=True)))

    def rows(self) -> list[dict[str, Any]]:
        return [{**key._asdict(), **added._asdict()} for key, added in sorted(self._lines.items())]

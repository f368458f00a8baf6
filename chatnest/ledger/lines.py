"""The lines of a bill: what each account was charged in a day for one profile, provider, model and label.

They are written in the settlement's transaction, and the lock of the account's usage row of the day guards them too.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import date
from operator import add
from typing import Any, Final

from ..models import Reservation, UsageLine
from .bulk import names, table
from .rows import ReservationRow

UsageSource = Reservation.UsageSource


KEY: Final = ("account", "day", "profile", "provider", "model", "label")
Key = tuple[str, date, str, str, str, str]
ITEM: Final = (
    *("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"),
    *("tokens_reported", "tokens_counted", "tokens_held", "cost", "unpriced"),
)
REPORTED, COUNTED = UsageSource.REPORTED.value, UsageSource.COUNTED.value


def _item(row: ReservationRow | Reservation, tokens: int, times: int) -> tuple[int, ...]:
    """ITEM of a row as it is settled by now, and billed so many tokens, so many times."""
    source = row.usage_source
    its = (
        *(1, row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.reasoning_tokens),
        tokens if source == REPORTED else 0,
        tokens if source == COUNTED else 0,
        0 if source in (REPORTED, COUNTED) else tokens,
        *(row.cost or 0, int(row.cost is None)),
    )
    return its if times == 1 else tuple(times * one for one in its)


class Bills:
    """What one transaction adds to the lines."""

    def __init__(self) -> None:
        self._lines: dict[Key, tuple[int, ...]] = {}

    def add(
        self,
        row: ReservationRow | Reservation,
        tokens: int,
        *,
        times: int = 1,
        accounts: Collection[str] | None = None,
    ) -> None:
        """Put a charged reservation, as it is now, on its accounts' bills; or, -1 times, take it off."""
        its = _item(row, tokens, times)
        for account in row.accounts if accounts is None else accounts:
            key = (account, row.day, row.profile, row.provider, row.model, row.label)
            before = self._lines.get(key)
            self._lines[key] = its if before is None else tuple(map(add, before, its))

    def rows(self) -> list[dict[str, Any]]:
        return [dict(zip((*KEY, *ITEM), (*key, *its), strict=True)) for key, its in sorted(self._lines.items())]


ADD_TO_LINE: Final = f"ON CONFLICT ({names(KEY)}) DO UPDATE SET " + ", ".join(
    f'"{name}" = {table(UsageLine)}."{name}" + excluded."{name}"' for name in ITEM
)

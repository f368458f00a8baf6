"""The rows that a ledger's transaction changes, as it has them in memory; a tenth of a model instance's cost."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from ..models import Reservation

State, UsageSource = Reservation.State, Reservation.UsageSource


class ReservationRow(msgspec.Struct, eq=False):
    """A reservation's row, but for its times."""

    id: UUID
    day: date
    payer: str
    accounts: list[str]
    tokens: int
    cost_reserved: int | None  # this and cost: in millionths of the currency; None: nobody knows
    profile: str
    label: str
    provider: str
    model: str
    state: str = State.OPEN.value
    outcome: str = ""
    usage_source: str = UsageSource.NONE.value
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    tokens_charged: int = 0
    cost: int | None = None
    error: str = ""
    first_token_ms: int | None = None
    settled_at: datetime | None = None
    is_overdue: bool = False  # no column: its lease had run out when it was read

    @property
    def awaits_settlement(self) -> bool:
        """Charged by its lease or an operator, for want of a settlement, which would have recorded its tokens."""
        return self.usage_source == UsageSource.HELD and not (self.prompt_tokens or self.completion_tokens)


class UsageRow(msgspec.Struct, eq=False):
    """A usage row."""

    day: date
    account: str
    tokens_used: int = 0
    tokens_reserved: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    cost_used: int = 0
    cost_reserved: int = 0
    crossed: int = 0  # percent


RESERVATION: Final = ReservationRow.__struct_fields__[:-1]
RESOLUTION: Final = ("id", *RESERVATION[8:])  # what changes when one is resolved
USAGE: Final = UsageRow.__struct_fields__
COUNTERS: Final = USAGE[2:]


def columns(row: msgspec.Struct, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def reservation_row(row: tuple[Any, ...]) -> ReservationRow:
    """Both databases keep JSON as text here; SQLite also UUIDs, and times without their zone, which is UTC."""
    id, day, payer, accounts, tokens, *middle, settled_at, is_overdue = row
    return msgspec.structs.replace(
        ReservationRow(UUID(str(id)), day, payer, msgspec.json.decode(accounts), tokens, *middle),
        settled_at=settled_at and settled_at.replace(tzinfo=UTC),
        is_overdue=bool(is_overdue),
    )

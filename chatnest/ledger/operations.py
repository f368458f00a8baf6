"""What the ledger may be asked: reserve, settle, stop, reset; and what it answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from time import time_ns
from uuid import UUID

from ..conf import DEFAULT_PROVIDER
from ..errors import ChatError
from ..models import Reservation
from .days import today


def new_id() -> UUID:
    """A UUID in order of time (version 7, RFC 9562), so that a large table's index grows at its end only."""
    chance = int.from_bytes(os.urandom(10))
    milliseconds, version, variant = time_ns() // 1_000_000 << 80, 7 << 76, 2 << 62
    return UUID(int=milliseconds | version | (chance >> 62 & 0xFFF) << 64 | variant | chance & (1 << 62) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Hold the prompt and an answer of up to ``max_output_tokens`` in every budget, or in none.

    ``budgets``: each account's daily limit, the payer's first. ``prompt_tokens``: the prompt's bound, of which
    ``prompt_excess`` is what reports have taught. Answered with a Hold, or with RateLimited, TooManyStreams or
    DailyBudgetExceeded.
    """

    budgets: Mapping[str, int]
    profile: str
    provider: str = DEFAULT_PROVIDER
    model: str
    label: str = ""
    prompt_tokens: int
    prompt_excess: int = 0
    max_output_tokens: int
    min_output_tokens: int
    rate_max_requests: int
    rate_window_seconds: int
    max_concurrent_streams: int
    # Fixed by the asking: asked again, even after midnight, it is still found.
    id: UUID = field(default_factory=new_id)
    day: date = field(default_factory=today)

    @property
    def payer(self) -> str:
        return next(iter(self.budgets))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A committed reservation. ``output_tokens`` is the answer's allowance, to be sent to the provider."""

    id: UUID
    day: date
    budgets: Mapping[str, int]
    provider: str = DEFAULT_PROVIDER
    model: str
    prompt_tokens: int
    prompt_excess: int = 0
    output_tokens: int
    remaining: int

    @property
    def tokens(self) -> int:
        """All that is held."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What one answer says about its model, for the model's Calibration. ``reported``: its whole usage was."""

    provider: str
    model: str
    prompt_excess: int = 0
    completion_excess: int = 0
    reasons_unseen: bool = False
    ignores_max_tokens: bool = False
    reported: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """What became of a hold. Answered with the tokens that are left of the payer's day.

    ``total_tokens`` is charged whole, above the hold too. Settling again changes, and teaches, nothing.
    """

    hold: Hold
    outcome: Reservation.Outcome
    source: Reservation.UsageSource = Reservation.UsageSource.NONE
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    lesson: Lesson | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """An operator ends a reservation: its stream ends, and the hold is charged until that says what it used.

    Answered with True if it was open.
    """

    id: UUID
    day: date
    accounts: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """Forgive what an account has used of a day; open reservations stay. Answered with the tokens forgiven."""

    day: date
    account: str
    reason: str
    actor: str = ""


Operation = Reserve | Settle | Stop | Reset
Answer = Hold | int | ChatError

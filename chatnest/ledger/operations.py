"""What the ledger may be asked: reserve, settle, stop, reset; and what it answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from time import time_ns
from types import MappingProxyType
from uuid import UUID

from ..conf import DEFAULT_PROVIDER
from ..errors import ChatError
from ..models import Calibration, Reservation
from ..prices import MoneyLimits, UnitPrice
from ..signals import Exchange
from .days import today


def new_id() -> UUID:
    """A UUID in order of time (version 7, RFC 9562), so that a large table's index grows at its end only."""
    chance = int.from_bytes(os.urandom(10))
    milliseconds, version, variant = time_ns() // 1_000_000 << 80, 7 << 76, 2 << 62
    return UUID(int=milliseconds | version | (chance >> 62 & 0xFFF) << 64 | variant | chance & (1 << 62) - 1)


@dataclass(frozen=True, slots=True)
class Budget:
    """What an account may spend in a period, which is a day: ``limit`` in tokens, ``money`` beside them.

    ``whole``: what its operator allows, where a client asks to be given less.
    """

    account: str
    period: date
    limit: int
    whole: int | None = None
    money: MoneyLimits | None = None  # of the period, and of the month that it is in


def todays_budgets(
    limits: Mapping[str, int],
    whole: Mapping[str, int] = MappingProxyType({}),
    money: Mapping[str, MoneyLimits] = MappingProxyType({}),
) -> tuple[Budget, ...]:
    """Of each account and its daily limit. Fixed by the asking: after midnight it is still this day's.

    ``whole``: the limits of those that a client tightened.
    """
    day = today()
    return tuple(
        Budget(account, day, limit, whole.get(account), money.get(account)) for account, limit in limits.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Hold the prompt and an answer of up to ``max_output_tokens`` in every budget, or in none.

    ``budgets``: the payer's first. ``prompt_tokens``: the prompt's bound, of which ``prompt_excess`` is what reports
    have taught. ``price``: the model's, and ``hold_price``: that of whatever may be asked instead too; None if nobody
    knows. Answered with a Hold, or with RateLimited, TooManyStreams, DailyBudgetExceeded, MonthlyBudgetExceeded or
    PriceUnknown. Asked again with the same ``id``, it holds nothing more.
    """

    budgets: Sequence[Budget]
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
    price: UnitPrice | None = None
    hold_price: UnitPrice | None = None
    id: UUID = field(default_factory=new_id)

    @property
    def payer(self) -> str:
        return self.budgets[0].account

    @property
    def accounts(self) -> list[str]:
        return [budget.account for budget in self.budgets]

    @property
    def day(self) -> date:
        return self.budgets[0].period

    def again(self) -> Reserve:
        """The same, for another attempt: a reservation of its own, paid by the day that it is now."""
        day = today()
        return replace(self, id=new_id(), budgets=[replace(budget, period=day) for budget in self.budgets])

    def or_else(self, other: Reserve) -> tuple[Reserve, Reserve]:
        """This, and the same with the model of ``other``, whose prompt that counts: two that one hold pays for.

        What either has above its model's own bound counts as excess, so that reports teach each the right one.
        """
        most = max(self.prompt_tokens, other.prompt_tokens)
        mine = replace(
            self,
            prompt_tokens=most,
            prompt_excess=self.prompt_excess + most - self.prompt_tokens,
            hold_price=self.price and other.price and self.price.or_dearer(other.price),
        )
        its = other.prompt_excess + most - other.prompt_tokens
        return mine, replace(mine, provider=other.provider, model=other.model, price=other.price, prompt_excess=its)

    def held(self, output_tokens: int = 0, remaining: int = 0) -> Hold:
        """The hold that answers this; without the numbers, as one knows it who did not hear the answer."""
        return Hold(
            id=self.id,
            budgets=self.budgets,
            profile=self.profile,
            provider=self.provider,
            model=self.model,
            prompt_tokens=self.prompt_tokens,
            prompt_excess=self.prompt_excess,
            output_tokens=output_tokens,
            remaining=remaining,
            label=self.label,
            price=self.price,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A committed reservation. ``output_tokens`` is the answer's allowance, to be sent to the provider.

    ``price``: what its model's tokens cost when it was made, and so when it is settled.
    """

    id: UUID
    budgets: Sequence[Budget]
    profile: str = ""
    provider: str = DEFAULT_PROVIDER
    model: str
    prompt_tokens: int
    prompt_excess: int = 0
    output_tokens: int
    remaining: int
    label: str = ""
    price: UnitPrice | None = None

    @property
    def tokens(self) -> int:
        """All that is held."""
        return self.prompt_tokens + self.output_tokens

    @property
    def accounts(self) -> list[str]:
        """All that are charged, the payer first."""
        return [budget.account for budget in self.budgets]

    @property
    def day(self) -> date:
        return self.budgets[0].period


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

    def is_news(self, known: Calibration | None) -> bool:
        """Whether holds and charges change with it."""
        if known is None:
            return True
        return (
            self.prompt_excess > known.prompt_excess
            or self.completion_excess > known.completion_excess
            or self.reasons_unseen > known.reasons_unseen
            or self.ignores_max_tokens > known.ignores_max_tokens
            or (self.reported and not known.reports)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """What became of a hold. Answered with the tokens that are left of the payer's day.

    ``total_tokens`` is charged whole, above the hold too. Settling again changes, and teaches, nothing.
    ``error``: the code of what ended it. ``exchange`` is for the receivers of ``settled``, and in no log.
    """

    hold: Hold
    outcome: Reservation.Outcome
    source: Reservation.UsageSource = Reservation.UsageSource.NONE
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    reasoning_tokens: int = 0  # of the completion
    error: str = ""
    first_token_ms: int | None = None  # from the stream's beginning
    lesson: Lesson | None = None
    exchange: Exchange | None = field(default=None, repr=False)

    @property
    def cost(self) -> int | None:
        """In millionths of the currency: what is charged beyond the prompt is an answer's. None: nobody knows."""
        if not self.total_tokens:
            return 0
        answer = max(self.completion_tokens, self.total_tokens - self.prompt_tokens)
        price = self.hold.price
        return price.cost(self.prompt_tokens, answer, self.cached_tokens) if price else None


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
Answer = Hold | int | bool | ChatError

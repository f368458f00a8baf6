"""Limits in money: what a reservation can cost fits the day and the month of all who pay for it, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import ChatError, DailyBudgetExceeded, MonthlyBudgetExceeded, PriceUnknown
from ..prices import MoneyLimits, shown
from .book import Book
from .days import day_ends, month_ends
from .operations import Budget, Reserve


class _Limit(NamedTuple):
    """In millionths of the currency; ``left`` is below 0 where it was lowered, or a provider overran it."""

    account: str
    is_monthly: bool
    limit: int
    left: int


def fit(book: Book, ask: Reserve, output: int, least: int) -> int:
    """The answer's allowance, up to ``output``: what the tightest limit can pay, if that is ``least`` or more."""
    limits = [limit for budget in ask.budgets for limit in _limits(book, budget)]
    if not limits:
        return output
    if ask.hold_price is None:
        unknown = f"the fallback of {ask.profile}" if ask.price else f"{ask.model!r} of {ask.provider!r}"
        raise PriceUnknown(detail=f"no price is known of {unknown}; {limits[0].account} has a limit in money")
    affordable = ask.hold_price.affords(min(limit.left for limit in limits), ask.prompt_tokens, output)
    if affordable < least:
        needed = ask.hold_price.most(ask.prompt_tokens, least)
        # Of several, the one that is renewed last.
        raise _exceeded(book, ask, max((one for one in limits if one.left < needed), key=_is_monthly), needed)
    return affordable


def held(book: Book, budget: Budget) -> None:
    """It has been: what it spends from the month is seen by whoever spends from that on another day."""
    if budget.money and budget.money.monthly is not None:
        book.hold_month(budget.period, budget.account)
    assert all(limit.left >= 0 for limit in _limits(book, budget))


def _limits(book: Book, budget: Budget) -> Iterator[_Limit]:
    day, account, money = budget.period, budget.account, budget.money or MoneyLimits()
    if money.daily is not None:
        yield _Limit(account, False, money.daily, money.daily - book.cost(day, account))
    if money.monthly is not None:
        yield _Limit(account, True, money.monthly, money.monthly - book.cost_of_month(day, account))


def _is_monthly(limit: _Limit) -> bool:
    return limit.is_monthly


def _exceeded(book: Book, ask: Reserve, limit: _Limit, needed: int) -> ChatError:
    error, ends = (MonthlyBudgetExceeded, month_ends) if limit.is_monthly else (DailyBudgetExceeded, day_ends)
    period = "month" if limit.is_monthly else "day"
    left = f"{limit.account} has {shown(max(0, limit.left))} of {shown(limit.limit)} left of the {period}"
    wait = (ends(ask.day) - book.moment).total_seconds()
    return error(retry_after=wait, detail=f"{left}; {shown(needed)} needed")

"""The ledger decides: reserve before the upstream is called, settle when it ends. The only writer of what is spent.

Synchronous: ``apply`` decides many operations in one transaction. Two phases, as card payments and TigerBeetle
do it (https://docs.tigerbeetle.com/coding/two-phase-transfers). At every commit, for each account and day:

    tokens_reserved = the sum of open reservations
    tokens_used     = the sum of charges + the sum of adjustments
    cost_reserved, cost_used: the same of what these cost
    the lines of a bill = charges + what came late
    tokens_used + tokens_reserved <= the limit that the last reservation was admitted under,

but where a provider used more than it was allowed: all of it is charged, and the budget closes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from math import ceil
from typing import Any

from ..conf import settings
from ..errors import ChatError, DailyBudgetExceeded, InternalError, RateLimited, TooManyStreams
from ..limits import rate_wait
from ..logs import fields
from ..models import Adjustment, DailyUsage, Reservation
from ..signals import Exchange, tell_crossed, tell_settled
from . import money
from .book import Book
from .days import day_ends, month_of
from .operations import Answer, Budget, Hold, Operation, Reserve, Reset, Settle, Stop
from .rows import ReservationRow
from .transactions import ledger_transaction, retried

logger = logging.getLogger("chatnest.ledger")

State, Outcome, UsageSource = Reservation.State, Reservation.Outcome, Reservation.UsageSource
Kind = Adjustment.Kind


@retried
def apply(operations: Sequence[Operation]) -> list[Answer]:
    """Decide ``operations`` in turn, in one transaction. Refusals are answers.

    Raises what the database raises, CommitUnknown where the outcome is not known; else nothing was decided.
    """
    with ledger_transaction(**touched_by(operations)) as book:
        return [decide(book, operation) for operation in operations]


def standing(budgets: Sequence[Budget]) -> tuple[int, int, int]:
    """What the payer (the first) has used and reserved, and what the tightest budget leaves. A plain read."""
    rows = DailyUsage.objects.using(settings.DATABASE_ALIAS).named((one.period, one.account) for one in budgets)
    usage = {row.account: row for row in rows}
    payer = usage.get(budgets[0].account, DailyUsage())
    committed = {name: row.tokens_used + row.tokens_reserved for name, row in usage.items()}
    remaining = min(budget.limit - committed.get(budget.account, 0) for budget in budgets)
    return payer.tokens_used, payer.tokens_reserved, max(0, remaining)


def touched_by(operations: Sequence[Operation]) -> dict[str, Any]:
    reserves = [ask for ask in operations if isinstance(ask, Reserve)]
    settles = [ask for ask in operations if isinstance(ask, Settle)]
    stops = [ask for ask in operations if isinstance(ask, Stop)]
    resets = [ask for ask in operations if isinstance(ask, Reset)]
    return {
        "keys": [
            *((budget.period, budget.account) for ask in reserves for budget in ask.budgets),
            *((budget.period, budget.account) for ask in settles for budget in ask.hold.budgets),
            *((ask.day, account) for ask in stops for account in ask.accounts),
            *((ask.day, ask.account) for ask in resets),
        ],
        "months": [
            (month_of(budget.period), budget.account)
            for ask in reserves
            for budget in ask.budgets
            if budget.money and budget.money.monthly is not None
        ],
        "ids": [*(ask.id for ask in reserves), *(ask.hold.id for ask in settles), *(ask.id for ask in stops)],
        "rates": [(ask.payer, ask.rate_window_seconds) for ask in reserves],
    }


def decide(book: Book, operation: Operation) -> Answer:
    try:
        match operation:
            case Reserve():
                return _reserve(book, operation)
            case Settle():
                return _settle(book, operation)
            case Stop():
                return _stop(book, operation)
            case Reset():
                return _reset(book, operation)
    except ChatError as refusal:
        return refusal


def _reserve(book: Book, ask: Reserve) -> Hold:
    row = book.reservations.get(ask.id)
    if row is None:
        _admit(book, ask)
        row = _hold(book, ask, _fit(book, ask))
    elif row.state != State.OPEN or row.is_overdue:
        raise InternalError()  # resolved, or about to be: its upstream must not be called again
    return ask.held(row.tokens - ask.prompt_tokens, _remaining(book, ask.budgets))


def _admit(book: Book, ask: Reserve) -> None:
    this, last, elapsed = book.rate(ask.payer, ask.rate_window_seconds)
    wait = rate_wait(ask.rate_max_requests, this, last, elapsed)
    # To the clock's own microsecond, or a fraction's rounding would break what Retry-After promised.
    if (seconds := round(wait * ask.rate_window_seconds, 6)) > 0:
        number = ceil(this + last * (1 - elapsed)) + 1
        allowed = f"{ask.profile} allows {ask.rate_max_requests}"
        raise RateLimited(retry_after=seconds, detail=f"request {number} in {ask.rate_window_seconds} s; {allowed}")
    if (streams := book.streams(ask.payer)) >= ask.max_concurrent_streams:
        detail = f"streams open: {streams}; {ask.profile} allows {ask.max_concurrent_streams}"
        raise TooManyStreams(retry_after=5, detail=detail)


def _fit(book: Book, ask: Reserve) -> int:
    """The answer's allowance: what was asked, or what the tightest budget has left if that is enough."""
    room = _room(book, ask.budgets)
    output = min(ask.max_output_tokens, room - ask.prompt_tokens)
    least = min(ask.min_output_tokens, ask.max_output_tokens)
    if output < least:
        tightest = min(ask.budgets, key=lambda budget: _room(book, [budget]))
        _tell_if_crossed(book, tightest, needed=ask.prompt_tokens + least)
        left = f"{tightest.account} has {_remaining(book, [tightest]):,} of {tightest.limit:,} tokens left"
        raise DailyBudgetExceeded(
            retry_after=(day_ends(ask.day) - book.moment).total_seconds(),
            detail=f"{left}; {ask.prompt_tokens + least:,} needed",
        )
    return money.fit(book, ask, output, least)


def _hold(book: Book, ask: Reserve, output: int) -> ReservationRow:
    tokens = ask.prompt_tokens + output
    cost = ask.hold_price.most(ask.prompt_tokens, output) if ask.hold_price else None
    held = ReservationRow(
        id=ask.id,
        day=ask.day,
        payer=ask.payer,
        accounts=ask.accounts,
        tokens=tokens,
        cost_reserved=cost,
        profile=ask.profile,
        label=ask.label,
        provider=ask.provider,
        model=ask.model,
    )
    book.insert(held, lease=timedelta(seconds=settings.LEASE_SECONDS))
    book.count_request(ask.day, ask.payer, ask.rate_window_seconds)
    for budget in ask.budgets:
        book.post(budget.period, budget.account, tokens_reserved=tokens, cost_reserved=cost or 0, requests=1)
        assert book.committed(budget.period, budget.account) <= budget.limit
        money.held(book, budget)
        _tell_if_crossed(book, budget)  # by a lease that ran out since, or for a lower limit
    return held


def _tell_if_crossed(book: Book, budget: Budget, needed: int = 0) -> None:
    """That it has used half of its limit, or four fifths, or all; or so much that what is needed has no room."""
    day, account = budget.period, budget.account
    limit = budget.limit if budget.whole is None else budget.whole
    used = book.used(day, account)
    is_full = used + max(1, needed) > limit
    percent = 100 if is_full else max((one for one in (50, 80) if 100 * used >= one * limit), default=0)
    if used > 0 and percent > book.crossed(day, account):
        book.cross(day, account, percent)
        book.after_commit(partial(tell_crossed, account, day, percent=percent, used=used, limit=limit))


def _room(book: Book, budgets: Sequence[Budget]) -> int:
    """What the tightest budget leaves; below 0 where a limit was lowered, or a provider overran it."""
    return min(budget.limit - book.committed(budget.period, budget.account) for budget in budgets)


def _remaining(book: Book, budgets: Sequence[Budget]) -> int:
    return max(0, _room(book, budgets))


def _settle(book: Book, ask: Settle) -> int:
    row = book.reservations.get(ask.hold.id)
    if row is None and ask.total_tokens:
        row = _write_again(book, ask.hold)
    if row is None:
        pass  # never committed, so never dispatched
    elif row.state == State.OPEN:
        _record(book, row, ask)
        resolve(book, row, State.SETTLED, ask.outcome, ask.source, ask.total_tokens, ask.cost, ask.exchange)
        for budget in ask.hold.budgets:
            _tell_if_crossed(book, budget)
    elif row.awaits_settlement:
        _settle_late(book, row, ask)
    else:  # asked again, for nobody heard the first answer
        book.after_commit(partial(tell_settled, row.id, ask.exchange))
    return _remaining(book, ask.hold.budgets)


def _settle_late(book: Book, row: ReservationRow, ask: Settle) -> None:
    """The hold is charged already: correct it, once, for then it awaits nothing more.

    Its tokens beside the charge, its cost in the row. Of what was forgiven meanwhile, nothing is given back twice.
    """
    assert row.settled_at
    book.bills.add(row, row.tokens_charged, times=-1)
    tokens, cost = ask.total_tokens - row.tokens_charged, (ask.cost or 0) - (row.cost or 0)
    row.usage_source, row.cost = ask.source.value, ask.cost
    _record(book, row, ask)
    book.bills.add(row, ask.total_tokens)
    for account in row.accounts:
        book.post(row.day, account, cost_used=cost)
        book.adjust(row.day, account, tokens, 0, Kind.LATE, reason=str(row.id))
        if (tokens < 0 or cost < 0) and book.was_forgiven(row.day, account, since=row.settled_at):
            back = max(0, -tokens), max(0, -cost)
            book.adjust(row.day, account, *back, Kind.FORGIVEN, reason=str(row.id))
    book.after_commit(partial(tell_settled, row.id, ask.exchange))


def _write_again(book: Book, hold: Hold) -> ReservationRow:
    """Somebody deleted the row; what it used counts all the same, and once. It holds nothing any more."""
    row = ReservationRow(
        id=hold.id,
        day=hold.day,
        payer=hold.accounts[0],
        accounts=hold.accounts,
        tokens=0,
        cost_reserved=0,
        profile=hold.profile,
        label=hold.label,
        provider=hold.provider,
        model=hold.model,
    )
    book.insert(row, lease=timedelta())
    return row


def _record(book: Book, row: ReservationRow, ask: Settle) -> None:
    if ask.lesson:
        book.learn(ask.lesson)
    if ask.source == UsageSource.REPORTED and ask.total_tokens > ask.hold.tokens:
        book.after_commit(partial(_warn_of_excess, ask))
    row.prompt_tokens, row.completion_tokens = ask.prompt_tokens, ask.completion_tokens
    row.cached_tokens, row.reasoning_tokens = ask.cached_tokens, ask.reasoning_tokens
    row.error, row.first_token_ms = ask.error, ask.first_token_ms
    row.provider, row.model = ask.hold.provider, ask.hold.model  # perhaps its fallback
    book.change(row)
    for account in row.accounts:
        book.post(row.day, account, prompt_tokens=ask.prompt_tokens, completion_tokens=ask.completion_tokens)


def _warn_of_excess(ask: Settle) -> None:
    logger.warning(
        "The model %r of provider %r reported %d tokens, more than the %d held for it (reservation %s)",
        ask.hold.model, ask.hold.provider, ask.total_tokens, ask.hold.tokens, ask.hold.id,
        extra=fields(ask.hold, outcome=str(ask.outcome)),
    )  # fmt: skip


def _stop(book: Book, ask: Stop) -> bool:
    row = book.reservations.get(ask.id)
    if row is None or row.state != State.OPEN:
        return False
    charge_hold(book, row, State.SETTLED, Outcome.STOPPED)
    return True


def charge_hold(book: Book, row: ReservationRow, state: Reservation.State, outcome: Reservation.Outcome) -> None:
    """In full: whoever would know what it used has not said so, and may yet."""
    resolve(book, row, state, outcome, UsageSource.HELD, row.tokens, row.cost_reserved)


def resolve(
    book: Book,
    row: ReservationRow,
    state: Reservation.State,
    outcome: Reservation.Outcome,
    source: Reservation.UsageSource,
    charge: int,
    cost: int | None,
    exchange: Exchange | None = None,
) -> None:
    """The one way out of open. ``exchange``: what its stream knows, where that says so."""
    assert row.state == State.OPEN
    row.state, row.outcome, row.usage_source = state.value, outcome.value, source.value
    row.tokens_charged, row.cost, row.settled_at = charge, cost, book.now
    book.close_stream(row)
    book.change(row)
    for account in row.accounts:
        book.post(
            row.day,
            account,
            tokens_reserved=-row.tokens,
            tokens_used=charge,
            cost_reserved=-(row.cost_reserved or 0),
            cost_used=cost or 0,
        )
    book.bills.add(row, charge)
    book.after_commit(partial(tell_settled, row.id, exchange))


def _reset(book: Book, ask: Reset) -> int:
    used, cost = book.used(ask.day, ask.account), book.used_cost(ask.day, ask.account)
    book.adjust(ask.day, ask.account, -used, -cost, Kind.FORGIVEN, reason=ask.reason, actor=ask.actor)
    return used

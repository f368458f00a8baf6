"""The ledger: reserve before the upstream is called, settle when it ends. The only writer of what is spent.

Synchronous: ``apply`` decides many operations in one transaction. Two phases, as card payments and TigerBeetle
do it (https://docs.tigerbeetle.com/coding/two-phase-transfers). At every commit, for each account and day:

    tokens_reserved = the sum of open reservations
    tokens_used     = the sum of charges + the sum of adjustments
    tokens_used + tokens_reserved <= the limit that the last reservation was admitted under,

but where a provider used more than it was allowed: all of it is charged, and the budget closes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from time import time_ns
from typing import Final
from uuid import UUID

from django.db import DatabaseError, IntegrityError, transaction
from django.utils import timezone

from ..conf import settings, time_zone
from ..errors import ChatError, DailyBudgetExceeded, InternalError, RateLimited, TooManyStreams
from ..limits import rate_wait
from ..models import Account, Adjustment, DailyUsage, Reservation
from .book import Book, Held
from .book import today as today  # the ledger's day is its users' too

logger = logging.getLogger("chatnest.ledger")

MOST_OVERDUE: Final = 500

State, Outcome, UsageSource = Reservation.State, Reservation.Outcome, Reservation.UsageSource
Kind = Adjustment.Kind


class CommitUnknown(DatabaseError):
    """The connection was lost at COMMIT. Asking again is safe: the ids tell what was done."""


def new_id() -> UUID:
    """A UUID in order of time (version 7, RFC 9562), so that a large table's index grows at its end only."""
    chance = int.from_bytes(os.urandom(10))
    milliseconds, version, variant = time_ns() // 1_000_000 << 80, 7 << 76, 2 << 62
    return UUID(int=milliseconds | version | (chance >> 62 & 0xFFF) << 64 | variant | chance & (1 << 62) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Hold the prompt and an answer of up to ``max_output_tokens`` in every budget, or in none.

    ``budgets``: each account's daily limit, the payer's first. Answered with a Hold, or with RateLimited,
    TooManyStreams or DailyBudgetExceeded.
    """

    budgets: Mapping[str, int]
    profile: str
    model: str
    prompt_tokens: int
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
    model: str
    prompt_tokens: int
    output_tokens: int
    remaining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """What became of a hold. Answered with the tokens that are left of the payer's day.

    ``total_tokens`` is charged whole, above the hold too. Settling again changes nothing.
    """

    hold: Hold
    outcome: Reservation.Outcome
    source: Reservation.UsageSource = UsageSource.NONE
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


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


def day_ends(day: date) -> datetime:
    """The instant at which the budget of ``day`` is renewed."""
    return datetime.combine(day + timedelta(days=1), time_of_day(), time_zone()).astimezone(UTC)


def apply(operations: Sequence[Operation]) -> list[Answer]:
    """Decide ``operations`` in turn, in one transaction. Refusals are answers.

    Raises what the database raises, CommitUnknown where the outcome is not known; else nothing was decided.
    """
    decided = False
    try:
        with transaction.atomic(using=settings.DATABASE_ALIAS):
            book = open_book(operations)
            answers = [decide(book, operation) for operation in operations]
            book.write()
            decided = True
    except DatabaseError as error:
        if decided:
            raise CommitUnknown(*error.args) from error
        raise
    return answers


def expire_overdue() -> None:
    """Charge what the oldest overdue leases hold. Raises what the database raises.

    No decision waits for it: charged or held, they commit the same tokens, and are nobody's streams any more.
    """
    overdue = Reservation.objects.using(settings.DATABASE_ALIAS).overdue(timezone.now()).order_by("expires_at")
    if ids := list(overdue.values_list("id", flat=True)[:MOST_OVERDUE]):
        _expire_what_can_be(ids)


def _expire_what_can_be(ids: Sequence[UUID]) -> None:
    try:
        expire(ids)
    except IntegrityError:  # a counter that somebody broke stops only its own leases
        if len(ids) == 1:
            logger.exception("The lease of %s cannot be charged: run manage.py chatnest_verify --repair", ids[0])
        else:
            for id in ids:
                _expire_what_can_be([id])


def expire(ids: Sequence[UUID]) -> None:
    """Charge these leases in full, if they are still open and overdue. Raises what the database raises."""
    alias = settings.DATABASE_ALIAS
    rows = Reservation.objects.using(alias).filter(id__in=ids).values_list("day", "accounts")
    with transaction.atomic(using=alias):
        book = Book(keys=[(day, account) for day, accounts in rows for account in accounts], ids=ids)
        for row in book.reservations.values():
            if row.state == State.OPEN and row.is_overdue:
                _resolve(book, row, State.EXPIRED, Outcome.EXPIRED, UsageSource.HELD, row.tokens)
        book.write()


def renew(ids: Sequence[UUID]) -> tuple[set[UUID], set[str]]:
    """Extend these leases. Returns the ids whose stream must stop, and the accounts that are paused.

    An expired lease does not stop its stream: the full hold is charged, and a late settlement corrects it.
    """
    alias = settings.DATABASE_ALIAS
    held = Reservation.objects.using(alias).filter(id__in=ids)
    with transaction.atomic(using=alias):
        # In the order in which a book locks them, and not as a subquery: with old statistics the join is quadratic.
        live = set(held.open().order_by("id").select_for_update().values_list("id", flat=True))
        until = timezone.now() + timedelta(seconds=settings.LEASE_SECONDS)
        Reservation.objects.using(alias).filter(id__in=live).update(expires_at=until)
    stopped = set(ids) - live
    if stopped:
        stopped -= set(held.filter(state=State.EXPIRED).values_list("id", flat=True))
    paused = Account.objects.using(alias).filter(paused=True).values_list("name", flat=True)
    return stopped, set(paused)


def standing(budgets: Mapping[str, int]) -> tuple[int, int, int]:
    """What the payer (the first) has used and reserved today, and what the tightest budget leaves. A plain read."""
    rows = DailyUsage.objects.using(settings.DATABASE_ALIAS).named((today(), account) for account in budgets)
    usage = {row.account: row for row in rows}
    payer = usage.get(next(iter(budgets)), DailyUsage())
    committed = {name: row.tokens_used + row.tokens_reserved for name, row in usage.items()}
    remaining = min(limit - committed.get(account, 0) for account, limit in budgets.items())
    return payer.tokens_used, payer.tokens_reserved, max(0, remaining)


def open_book(operations: Sequence[Operation]) -> Book:
    reserves = [ask for ask in operations if isinstance(ask, Reserve)]
    settles = [ask for ask in operations if isinstance(ask, Settle)]
    stops = [ask for ask in operations if isinstance(ask, Stop)]
    resets = [ask for ask in operations if isinstance(ask, Reset)]
    return Book(
        keys=[
            *((ask.day, account) for ask in reserves for account in ask.budgets),
            *((ask.hold.day, account) for ask in settles for account in ask.hold.budgets),
            *((ask.day, account) for ask in stops for account in ask.accounts),
            *((ask.day, ask.account) for ask in resets),
        ],
        ids=[*(ask.id for ask in reserves), *(ask.hold.id for ask in settles), *(ask.id for ask in stops)],
        rates=[(ask.payer, ask.rate_window_seconds) for ask in reserves],
    )


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
        row = _hold_tokens(book, ask, ask.prompt_tokens + _fit(book, ask))
    elif row.state != State.OPEN or row.is_overdue:
        raise InternalError()  # resolved, or about to be: its upstream must not be called again
    return Hold(
        id=row.id,
        day=row.day,
        budgets=ask.budgets,
        model=ask.model,
        prompt_tokens=ask.prompt_tokens,
        output_tokens=row.tokens - ask.prompt_tokens,
        remaining=_remaining(book, row.day, ask.budgets),
    )


def _admit(book: Book, ask: Reserve) -> None:
    wait = rate_wait(ask.rate_max_requests, *book.rate(ask.payer, ask.rate_window_seconds))
    # To the clock's own microsecond, or a fraction's rounding would break what Retry-After promised.
    if (seconds := round(wait * ask.rate_window_seconds, 6)) > 0:
        raise RateLimited(retry_after=seconds)
    if book.streams(ask.payer) >= ask.max_concurrent_streams:
        raise TooManyStreams(retry_after=5)


def _fit(book: Book, ask: Reserve) -> int:
    """The answer's allowance: what was asked, or what the tightest budget has left if that is enough."""
    room = min(limit - book.committed(ask.day, account) for account, limit in ask.budgets.items())
    output = min(ask.max_output_tokens, room - ask.prompt_tokens)
    if output < min(ask.min_output_tokens, ask.max_output_tokens):
        raise DailyBudgetExceeded(retry_after=(day_ends(ask.day) - book.now).total_seconds())
    return output


def _hold_tokens(book: Book, ask: Reserve, tokens: int) -> Held:
    held = Held(id=ask.id, day=ask.day, payer=ask.payer, accounts=list(ask.budgets), tokens=tokens)
    lease = timedelta(seconds=settings.LEASE_SECONDS)
    book.insert(held, profile=ask.profile, model=ask.model, created_at=book.now, expires_at=book.now + lease)
    book.count_request(ask.day, ask.payer, ask.rate_window_seconds)
    for account in ask.budgets:
        book.post(ask.day, account, tokens_reserved=tokens, requests=1)
    return held


def _remaining(book: Book, day: date, budgets: Mapping[str, int]) -> int:
    return max(0, min(limit - book.committed(day, account) for account, limit in budgets.items()))


def _settle(book: Book, ask: Settle) -> int:
    row = book.reservations.get(ask.hold.id)
    if row is None and ask.total_tokens:
        row = _write_again(book, ask.hold)
    if row is None:
        pass  # never committed, so never dispatched
    elif row.state == State.OPEN:
        _resolve(book, row, State.SETTLED, ask.outcome, ask.source, ask.total_tokens)
        _record(book, row, ask)
    elif row.usage_source == UsageSource.HELD:
        _settle_late(book, row, ask)
    return _remaining(book, ask.hold.day, ask.hold.budgets)


def _settle_late(book: Book, row: Held, ask: Settle) -> None:
    """The hold is charged already: correct it beside the charge, once, for its source is no longer held."""
    row.usage_source = ask.source.value
    _record(book, row, ask)
    assert row.settled_at
    correction = ask.total_tokens - row.tokens_charged
    for account in row.accounts:
        if correction > 0 or not book.was_forgiven(row.day, account, since=row.settled_at):
            book.adjust(row.day, account, correction, Kind.LATE, reason=str(row.id))


def _write_again(book: Book, hold: Hold) -> Held:
    """Somebody deleted the row; what it used counts all the same, and once. It holds nothing any more."""
    row = Held(id=hold.id, day=hold.day, payer=next(iter(hold.budgets)), accounts=list(hold.budgets), tokens=0)
    book.insert(row, profile="", model=hold.model, created_at=book.now, expires_at=book.now)
    return row


def _record(book: Book, row: Held, ask: Settle) -> None:
    row.prompt_tokens, row.completion_tokens = ask.prompt_tokens, ask.completion_tokens
    book.change(row)
    for account in row.accounts:
        book.post(row.day, account, prompt_tokens=ask.prompt_tokens, completion_tokens=ask.completion_tokens)


def _stop(book: Book, ask: Stop) -> bool:
    row = book.reservations.get(ask.id)
    if row is None or row.state != State.OPEN:
        return False
    _resolve(book, row, State.SETTLED, Outcome.STOPPED, UsageSource.HELD, row.tokens)
    return True


def _resolve(
    book: Book,
    row: Held,
    state: Reservation.State,
    outcome: Reservation.Outcome,
    source: Reservation.UsageSource,
    charge: int,
) -> None:
    """The one way out of open."""
    row.state, row.outcome, row.usage_source = state.value, outcome.value, source.value
    row.tokens_charged, row.settled_at = charge, book.now
    book.close_stream(row)
    book.change(row)
    for account in row.accounts:
        book.post(row.day, account, tokens_reserved=-row.tokens, tokens_used=charge)


def _reset(book: Book, ask: Reset) -> int:
    used = book.used(ask.day, ask.account)
    book.adjust(ask.day, ask.account, -used, Kind.FORGIVEN, reason=ask.reason, actor=ask.actor)
    return used

"""What the ledger's tests share: operations with everyday values, a clock to move, and a proof of their own.

``discrepancies`` adds up rows one by one, on purpose unlike ``chatnest.ledger.audit``: it proves that too.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

from django.db import connections

from chatnest import ledger
from chatnest.conf import settings
from chatnest.errors import ChatError
from chatnest.ledger import Hold, Operation, Reserve, Settle
from chatnest.ledger.batcher import batcher
from chatnest.models import Adjustment, Calibration, DailyUsage, Reservation, UsageLine

Outcome, UsageSource = Reservation.Outcome, Reservation.UsageSource


class Clock:
    """``django.utils.timezone.now`` under a test's control."""

    def __init__(self, now: str) -> None:
        self.now = datetime.fromisoformat(now)

    def __call__(self) -> datetime:
        return self.now

    def set(self, now: str) -> None:
        self.now = datetime.fromisoformat(now)

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def ask(payer: str = "user:1", *, limit: int = 1000, site: int = 100_000, **changes: Any) -> Reserve:
    """A request of 10 tokens for an answer of up to 100. ``budgets``: each account's limit, the payer's first."""
    limits = changes.pop("budgets", {payer: limit, "site": site})
    usual: dict[str, Any] = {
        "budgets": ledger.todays_budgets(limits),
        "profile": "balanced",
        "model": "gpt-4o-mini",
        "prompt_tokens": 10,
        "max_output_tokens": 100,
        "min_output_tokens": 64,
        "rate_max_requests": 1000,
        "rate_window_seconds": 60,
        "max_concurrent_streams": 1000,
    }
    return Reserve(**{**usual, **changes})


def used(hold: Hold, tokens: int, **changes: Any) -> Settle:
    """The answer to ``hold`` is complete, and the provider reports ``tokens`` for it all."""
    prompt = min(tokens, hold.prompt_tokens)
    usual: dict[str, Any] = {
        "outcome": Outcome.COMPLETED,
        "source": UsageSource.REPORTED,
        "prompt_tokens": prompt,
        "completion_tokens": tokens - prompt,
        "total_tokens": tokens,
    }
    return Settle(hold=hold, **{**usual, **changes})


def hold_of(question: Reserve) -> Hold:
    """As its asker knows it, who need not have heard the answer."""
    return question.held(question.max_output_tokens)


def known(**learned: Any) -> Calibration:
    """A model whose reports have hidden nothing, but for what is named."""
    return Calibration(**{"provider": "default", "model": "gpt-4o-mini", "reports": 1, **learned})


def given_back(hold: Hold) -> Settle:
    """Nobody asked the provider after all."""
    return Settle(hold=hold, outcome=Outcome.CANCELLED)


def do(operation: Operation) -> Any:
    """One operation in a transaction of its own. Raises the refusal."""
    (answer,) = ledger.apply([operation])
    if isinstance(answer, ChatError):
        raise answer
    return answer


def row_of(hold: Hold | Reserve) -> Reservation:
    return Reservation.objects.using(settings.DATABASE_ALIAS).get(id=hold.id)


def counters(account: str = "user:1", day: Any = None) -> tuple[int, int, int]:
    """The tokens used and reserved, and the requests, of one account's day; today's if not named."""
    rows = DailyUsage.objects.using(settings.DATABASE_ALIAS)
    usage = rows.filter(day=day or ledger.today(), account=account)
    return usage.values_list("tokens_used", "tokens_reserved", "requests").first() or (0, 0, 0)


def waits_for_a_lock(alias: str) -> bool:
    """Whether anybody on this PostgreSQL waits for a lock just now."""
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return bool(cursor.fetchone()[0])


@asynccontextmanager
async def busy() -> AsyncIterator[None]:
    """The batcher's thread is at work on something else, so whatever is asked of it now has to wait."""
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert done.wait(30)

    working = asyncio.create_task(batcher.query(work))
    await asyncio.to_thread(begun.wait, 10)
    try:
        yield
    finally:
        done.set()
        await working


async def waiting(*coroutines: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    """These, begun, and so far that they wait for the batcher."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks


def discrepancies() -> list[str]:
    """Where the counters are not what the rows say. Empty is what every test ends with."""
    alias = settings.DATABASE_ALIAS
    proven: Counter[tuple[Any, ...]] = Counter()
    for row in Reservation.objects.using(alias):
        for account in row.accounts:
            key = (row.day, account)
            if row.state == Reservation.State.OPEN:
                proven[*key, "tokens_reserved"] += row.tokens
                proven[*key, "cost_reserved"] += row.cost_reserved or 0
            else:
                proven[*key, "billed"] += row.tokens_charged
                proven[*key, "billed_cost"] += row.cost or 0
                proven[*key, "unpriced"] += row.cost is None
                proven[*key, "answers"] += 1
            proven[*key, "cached_tokens"] += row.cached_tokens
            proven[*key, "reasoning_tokens"] += row.reasoning_tokens
            proven[*key, "tokens_used"] += row.tokens_charged
            proven[*key, "cost_used"] += row.cost or 0
            proven[*key, "prompt_tokens"] += row.prompt_tokens
            proven[*key, "completion_tokens"] += row.completion_tokens
            proven[*key, "requests"] += 1
    for adjustment in Adjustment.objects.using(alias):
        proven[adjustment.day, adjustment.account, "tokens_used"] += adjustment.tokens
        proven[adjustment.day, adjustment.account, "cost_used"] += adjustment.cost
        if adjustment.kind in (Adjustment.Kind.LATE, Adjustment.Kind.PRUNED):
            proven[adjustment.day, adjustment.account, "billed"] += adjustment.tokens
            proven[adjustment.day, adjustment.account, "billed_cost"] += adjustment.cost
    counted = ("tokens_reserved", "tokens_used", "cost_reserved", "cost_used")
    fields = (*counted, "prompt_tokens", "completion_tokens", "requests")
    stored: Counter[tuple[Any, ...]] = Counter(
        {
            (usage.day, usage.account, field): getattr(usage, field)
            for usage in DailyUsage.objects.using(alias)
            for field in fields
        }
    )
    for line in UsageLine.objects.using(alias):
        key = (line.day, line.account)
        stored[*key, "billed"] += line.tokens_reported + line.tokens_counted + line.tokens_held
        stored[*key, "billed_cost"] += line.cost
        stored[*key, "unpriced"] += line.unpriced
        stored[*key, "answers"] += line.requests
        stored[*key, "cached_tokens"] += line.cached_tokens
        stored[*key, "reasoning_tokens"] += line.reasoning_tokens
    return [
        f"{key}: {stored[key]} stored, {proven[key]} proven"
        for key in sorted(stored.keys() | proven.keys(), key=str)
        if stored[key] != proven[key]
    ]

"""``chatnest.hold``: the site's own calls of a model, from the same budgets as its chat."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from typing import Any

import openai
import pytest
from django.contrib.auth.models import AnonymousUser
from django.db import connections
from openai import AsyncOpenAI, OpenAI

import chatnest
from chatnest.errors import DailyBudgetExceeded, NotAuthenticated, Paused, RateLimited, RequestTooLarge
from chatnest.ledger import Stop, apply, today
from chatnest.ledger.batcher import batcher
from chatnest.models import Account, DailyUsage, Refusal, Reservation
from chatnest.testing import FakeUpstream, Reply

from .conftest import Configure, EditProfile, Settled, eventually

MESSAGES: Any = [{"role": "user", "content": "Sum this up, please."}]


def answer(prompt: int, completion: int) -> Reply:
    """As the provider answers who does not stream."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Done."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }
    return Reply.garbage(json.dumps(body).encode(), headers={"content-type": "application/json"})


def a_task(upstream: FakeUpstream, payer: Any = "user:7", **options: Any) -> int:
    """What a worker of Celery's runs: no request, and no event loop."""
    with OpenAI(api_key="sk", base_url=upstream.url, max_retries=0) as client:
        with chatnest.hold(payer, MESSAGES, **options) as hold:
            said = client.chat.completions.create(model=hold.model, messages=MESSAGES, max_tokens=hold.output_tokens)
            hold.report(said.usage)
        return hold.output_tokens


async def a_view(upstream: FakeUpstream, payer: Any = "user:7", **options: Any) -> None:
    client = AsyncOpenAI(api_key="sk", base_url=upstream.url, max_retries=0)
    async with client, chatnest.hold(payer, MESSAGES, **options) as hold:
        said = await client.chat.completions.create(model=hold.model, messages=MESSAGES, max_tokens=hold.output_tokens)
        hold.report(said.usage)


def test_a_task_pays_from_the_same_day_as_the_chat(upstream: FakeUpstream, database: str, settled: Settled) -> None:
    upstream.replies(answer(12, 3))
    assert a_task(upstream, ["user:7", "team:3"], label="digest") == 400
    (row,) = settled()
    assert (row.outcome, row.usage_source, row.tokens_charged, row.label) == ("completed", "reported", 15, "digest")
    assert upstream.requests[0].json["max_tokens"] == 400
    used = {usage.account: usage.tokens_used for usage in DailyUsage.objects.using(database)}
    assert used == {"user:7": 15, "team:3": 15, "site": 15}


def test_an_async_view_too(upstream: FakeUpstream, settled: Settled) -> None:
    upstream.replies(answer(12, 3))
    asyncio.run(a_view(upstream, max_output_tokens=50, profile="expanded"))
    (row,) = settled()
    assert (row.profile, row.tokens_charged) == ("expanded", 15)
    assert upstream.requests[0].json["max_tokens"] == 50


def test_what_is_not_reported_is_charged_as_it_was_held(database: str, settled: Settled) -> None:
    with pytest.raises(ZeroDivisionError), chatnest.hold("user:7", MESSAGES):
        raise ZeroDivisionError
    with chatnest.hold("user:7", MESSAGES):
        pass
    first, second = settled()
    assert first.tokens_charged == first.tokens == second.tokens_charged
    assert (first.outcome, second.outcome, first.usage_source) == ("cancelled", "completed", "held")


def test_what_was_not_sent_or_refused_costs_nothing(upstream: FakeUpstream, database: str, settled: Settled) -> None:
    with chatnest.hold("user:7", MESSAGES) as hold:
        hold.release()
    upstream.replies(Reply.refuse(429))
    with pytest.raises(openai.RateLimitError):
        a_task(upstream)
    assert [row.tokens_charged for row in settled()] == [0, 0]


def test_a_client_that_retries_by_itself_may_have_been_billed_before(
    upstream: FakeUpstream, database: str, settled: Settled
) -> None:
    upstream.replies(Reply.refuse(503, headers={"retry-after-ms": "1"}), Reply.refuse(429))
    client = OpenAI(api_key="sk", base_url=upstream.url, max_retries=1)
    with client, pytest.raises(openai.RateLimitError), chatnest.hold("user:7", MESSAGES) as hold:
        client.chat.completions.create(model=hold.model, messages=MESSAGES)
    assert len(upstream.requests) == 2
    (row,) = settled()
    assert row.tokens_charged == row.tokens


@pytest.mark.parametrize("nobody", [AnonymousUser(), [], ()])
def test_somebody_must_pay(nobody: Any) -> None:
    with pytest.raises(NotAuthenticated):
        chatnest.hold(nobody, MESSAGES)


def test_it_is_refused_as_the_chat_is(
    upstream: FakeUpstream, database: str, edit_profile: EditProfile, configure: Configure
) -> None:
    upstream.replies(*[answer(12, 3)] * 2)
    edit_profile(rate_max_requests=1)
    a_task(upstream)
    with pytest.raises(RateLimited):
        a_task(upstream)
    configure(SITE_DAILY_TOKEN_LIMIT=40)
    with pytest.raises(DailyBudgetExceeded):
        a_task(upstream, "user:8")
    with pytest.raises(RequestTooLarge), chatnest.hold("user:8", [{"role": "user", "content": "word " * 3000}]):
        raise AssertionError("it begins nothing")
    Account.objects.using(database).create(name="user:9", paused=True)
    with pytest.raises(Paused):
        a_task(upstream, "user:9")
    assert len(upstream.requests) == 1


def test_an_operator_stops_it(database: str, configure: Configure, settled: Settled) -> None:
    configure(LEASE_SECONDS=0.6)

    async def waits() -> None:
        async with chatnest.hold("user:7", MESSAGES) as hold:
            held = hold.hold
            stop = Stop(id=held.id, day=today(), accounts=held.accounts)
            await batcher.query(lambda: apply([stop]))
            await asyncio.sleep(30)

    with pytest.raises(Paused):
        asyncio.run(waits())
    (row,) = settled()
    assert (row.outcome, row.tokens_charged) == ("stopped", row.tokens)


def test_a_long_call_keeps_its_lease(database: str, configure: Configure) -> None:
    configure(LEASE_SECONDS=0.6)
    with chatnest.hold("user:7", MESSAGES) as hold:
        row = Reservation.objects.using(database).get()
        eventually(lambda: Reservation.objects.using(database).get().expires_at > row.expires_at)
        hold.release()


class TimeLimit(BaseException):
    """As Celery's soft limit, raised wherever the task is."""


def test_one_whose_block_never_begins_is_given_back(database: str, settled: Settled) -> None:
    """A task's time is up while its reservation is committed."""
    struck = threading.Event()

    def strike(*_: Any) -> None:
        struck.set()
        raise TimeLimit

    def held(execute: Any, sql: str, *arguments: Any) -> Any:
        if "INSERT" in sql and "chatnest_reservation" in sql and not struck.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            assert struck.wait(10)
        return execute(sql, *arguments)

    asyncio.run(batcher.query(lambda: connections[database].execute_wrappers.append(held)))
    before = signal.signal(signal.SIGUSR1, strike)
    try:
        with pytest.raises(TimeLimit), chatnest.hold("user:7", MESSAGES):
            raise AssertionError("it begins nothing")
    finally:
        signal.signal(signal.SIGUSR1, before)
    batcher.close()  # when all it was asked is done
    (row,) = settled()
    assert (row.outcome, row.tokens_charged) == ("cancelled", 0)


def test_a_user_may_be_named_by_the_user(database: str, django_user_model: Any, settled: Settled) -> None:
    user = django_user_model.objects.create_user("grace")
    with chatnest.hold(user, MESSAGES):
        pass
    assert settled()[0].payer == f"user:{user.pk}"
    assert not hasattr(chatnest, "holding")
    batcher.close()
    assert not Refusal.objects.using(database).exists()

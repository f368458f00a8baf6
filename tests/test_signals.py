"""What a site's code hears, and that no stream does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import transaction
from django.dispatch import Signal
from freezegun import freeze_time

from chatnest import ledger, signals
from chatnest.errors import DailyBudgetExceeded, RateLimited
from chatnest.ledger import Reset
from chatnest.models import Reservation
from chatnest.signals import announcer, budget_crossed, refused, settled
from chatnest.testing import FakeUpstream, Reply
from chatnest.wires import ChatRequest

from .bookkeeping import ask, do, used
from .client import HELLO, Client
from .conftest import Configure, EditProfile, eventually

Hear = Callable[[Signal], "queue.Queue[dict[str, Any]]"]


@pytest.fixture
def hear(database: str) -> Iterator[Hear]:
    """What is sent by a signal, in order: ``hear(settled).get(timeout=5)``."""
    connected = []

    def hear(signal: Signal) -> queue.Queue[dict[str, Any]]:
        heard: queue.Queue[dict[str, Any]] = queue.Queue()

        def receiver(sender: type, **facts: Any) -> None:
            # In a thread where the ORM may be used; not the ledger's, nor the loop's.
            assert get_user_model().objects.count() == 0
            heard.put({**facts, "thread": threading.current_thread().name})

        signal.connect(receiver, weak=False)
        connected.append((signal, receiver))
        return heard

    yield hear
    for signal, receiver in connected:
        signal.disconnect(receiver)
    announcer.close()


def with_metadata(request: Any, chat: ChatRequest) -> ChatRequest:
    return replace(chat, label="help desk", metadata=["conversation", 7])


def test_an_answer_is_told_with_all_that_a_site_would_store(
    client: Client, upstream: FakeUpstream, configure: Configure, hear: Hear
) -> None:
    heard = hear(settled)
    configure(PREPARE=with_metadata)
    upstream.replies(Reply("Hello", " there", finish_reason="length"))
    client.chat()
    told = heard.get(timeout=5)
    row = told["reservation"]
    assert row == Reservation.objects.using(row._state.db).get() and row.state == "settled"
    assert told["payer"] == "ip:127.0.0.1"
    assert told["accounts"] == ["ip:127.0.0.1", "anonymous", "site"]
    assert (told["profile"], told["provider"], told["model"]) == ("balanced", "default", "gpt-4o-mini")
    assert (told["outcome"], told["source"], told["finish_reason"]) == ("completed", "reported", "length")
    assert told["tokens"] == told["prompt_tokens"] + told["completion_tokens"] == row.tokens_charged > 0
    assert 0 < told["time_to_first_token"] <= told["duration"] < 30
    assert (told["label"], told["metadata"]) == ("help desk", ["conversation", 7])
    assert [(one.role, one.content) for one in told["messages"]] == [("user", "Hello!")]
    assert told["text"] == "Hello there"
    assert told["thread"] == "chatnest-signals"


def test_of_a_reader_who_left_what_had_come(client: Client, upstream: FakeUpstream, hear: Hear) -> None:
    heard = hear(settled)
    upstream.replies(Reply("One", "two", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
    told = heard.get(timeout=5)
    assert (told["outcome"], told["text"], told["finish_reason"]) == ("cancelled", "One", None)


def test_a_receiver_that_breaks_breaks_nothing(
    client: Client, upstream: FakeUpstream, hear: Hear, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**facts: Any) -> None:
        raise ValueError("a receiver's own")

    settled.connect(broken)
    try:
        heard = hear(settled)  # called after it
        upstream.replies(Reply("Hello"))
        assert client.chat().events[-1] == "done"
        assert heard.get(timeout=5)["text"] == "Hello"
    finally:
        settled.disconnect(broken)
    assert any(record.exc_info and "a receiver's own" in str(record.exc_info[1]) for record in caplog.records)


def test_an_async_receiver_hears_too(client: Client, upstream: FakeUpstream, database: str) -> None:
    heard: queue.Queue[str] = queue.Queue()

    async def receiver(text: str, **facts: Any) -> None:
        heard.put(text)

    settled.connect(receiver)
    upstream.replies(Reply("Hello"))
    try:
        client.chat()
        assert heard.get(timeout=5) == "Hello"
    finally:
        settled.disconnect(receiver)
        announcer.close()


def test_a_slow_receiver_is_left_behind_and_streams_go_on(
    client: Client,
    upstream: FakeUpstream,
    hear: Hear,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(signals, "MOST_WAITING", 2)
    gate = threading.Event()

    def slow(**facts: Any) -> None:
        gate.wait(10)

    settled.connect(slow)
    try:
        heard = hear(settled)
        for number in range(5):
            upstream.replies(Reply(f"{number}"))
            assert client.chat().events[-1] == "done"
        gate.set()
        eventually(lambda: "2 signals were not sent" in caplog.text)
    finally:
        settled.disconnect(slow)
    assert [heard.get(timeout=5)["text"] for _ in range(3)] == ["0", "1", "2"]
    assert caplog.text.count("too slow") == 1


def test_a_refusal_is_told(client: Client, upstream: FakeUpstream, edit_profile: EditProfile, hear: Hear) -> None:
    heard = hear(refused)
    edit_profile(rate_max_requests=1)
    client.chat()
    assert client.chat().status == 429
    told = heard.get(timeout=5)
    assert (told["payer"], told["code"]) == ("ip:127.0.0.1", "rate_limited")
    assert told["detail"] == "request 2 in 60 s; balanced allows 1"
    assert 0 < told["retry_after"] <= 120


def test_a_lease_that_ran_out_is_told_by_who_charges_it(database: str, hear: Hear) -> None:
    heard = hear(settled)
    with freeze_time("2026-03-02 12:00:00") as clock:
        hold = do(ask())
        clock.tick(timedelta(minutes=1))
        ledger.expire_overdue()
        told = heard.get(timeout=5)
        assert (told["outcome"], told["source"], told["tokens"]) == ("expired", "held", hold.tokens)
        assert (told["text"], told["messages"], told["duration"]) == ("", (), None)

        do(used(hold, 10))  # its process was only slow
        told = heard.get(timeout=5)
        assert told["reservation"].pk == hold.id


def test_what_is_asked_again_is_told_again(database: str, hear: Hear) -> None:
    """Nobody heard the first answer, so perhaps nobody was told."""
    heard = hear(settled)
    hold = do(ask())
    do(used(hold, 10))
    do(used(hold, 10))
    assert [heard.get(timeout=5)["tokens"] for _ in range(2)] == [10, 10]


def test_what_is_not_committed_is_not_told(database: str, hear: Hear) -> None:
    heard = hear(settled)
    with transaction.atomic(using=database):
        do(used(do(ask()), 10))
        transaction.set_rollback(True, using=database)
    do(used(do(ask()), 20))
    assert heard.get(timeout=5)["tokens"] == 20
    assert heard.empty()


# Budgets


def use(tokens: int, **more: Any) -> None:
    do(used(do(ask(**more)), tokens))


def test_a_budget_tells_as_it_is_used(database: str, hear: Hear) -> None:
    heard = hear(budget_crossed)
    with freeze_time("2026-03-02 12:00:00") as clock:
        limits = {"user:1": 1000, "site": 10**6}
        use(400, budgets=limits)
        use(150, budgets=limits)
        told = heard.get(timeout=5)
        del told["signal"], told["thread"]
        assert told == {"account": "user:1", "day": ledger.today(), "percent": 50, "used": 550, "limit": 1000}
        use(1, budgets=limits)
        use(300, budgets=limits)
        assert heard.get(timeout=5)["percent"] == 80
        use(90, budgets=limits)
        with pytest.raises(DailyBudgetExceeded):  # 59 are left, and nobody is let in for them
            do(ask(budgets=limits))
        told = heard.get(timeout=5)
        assert (told["percent"], told["used"]) == (100, 941)
        with pytest.raises(DailyBudgetExceeded):
            do(ask(budgets=limits))
        # Forgiven, and used again: the day has been told.
        ledger.apply([Reset(day=ledger.today(), account="user:1", reason="")])
        use(900, budgets=limits)
        clock.tick(timedelta(days=1))
        use(2000, budgets={"user:1": 1000, "site": 10**6})  # more than it was allowed: all at once
        told = heard.get(timeout=5)
        assert (told["day"], told["percent"]) == (ledger.today(), 100)
        assert heard.empty()


def test_what_is_only_held_crosses_nothing(database: str, hear: Hear) -> None:
    heard = hear(budget_crossed)
    limits = {"user:1": 180, "site": 10**6}
    hold = do(ask(budgets=limits))
    with pytest.raises(DailyBudgetExceeded):
        do(ask(budgets=limits))
    do(used(hold, 100))
    assert heard.get(timeout=5)["percent"] == 50
    assert heard.empty()


def test_a_client_that_asks_for_less_tells_nothing_about_the_budget(
    client: Client, upstream: FakeUpstream, hear: Hear
) -> None:
    heard = hear(budget_crossed)
    upstream.replies(Reply("Hello"), Reply("Hello"))
    client.chat({**HELLO, "dailyTokenLimit": 100})
    assert client.chat({**HELLO, "dailyTokenLimit": 10}).json["code"] == "daily_budget_exceeded"
    announcer.close()
    assert heard.empty()


def test_a_rate_limit_crosses_no_budget(database: str, hear: Hear) -> None:
    heard = hear(budget_crossed)
    do(ask(rate_max_requests=1))
    (answer,) = ledger.apply([ask(rate_max_requests=1)])
    assert isinstance(answer, RateLimited)
    announcer.close()
    assert heard.empty()

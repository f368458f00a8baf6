"""Refusals cost little, are never wrong for longer than a second, and are counted where an operator sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import date
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.models import User
from django.db import OperationalError, connections
from django.test import Client as Browser
from django.utils import timezone
from freezegun import freeze_time
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import chatnest
from chatnest import ledger
from chatnest.conf import today
from chatnest.errors import DailyBudgetExceeded, LedgerUnavailable, Paused, RateLimited, TooManyStreams
from chatnest.ledger import Hold
from chatnest.ledger.batcher import batcher
from chatnest.ledger.bulk import run
from chatnest.limits import profile_name
from chatnest.models import Adjustment, DailyUsage, RateWindow, Refusal, Reservation, UsageLine
from chatnest.policy import Policy, Terms
from chatnest.refusals import Refusals
from chatnest.testing import FakeUpstream, Reply

from .bookkeeping import Clock, used
from .client import HELLO, Client
from .conftest import Configure, EditProfile, eventually, on_sqlite
from .test_accounts import edit_account

PAYER = "ip:127.0.0.1"
LEAST = 10 + 64  # the hold of the shortest answer that is worth beginning


def statements(database: str) -> list[str]:
    """What the ledger's thread asks the database from now on, but for what it counts and renews unasked."""
    asked: list[str] = []

    def listen(execute: Any, sql: str, *args: Any) -> Any:
        asked.extend([sql] if "chatnest_dailyusage" in sql else [])
        return execute(sql, *args)

    asyncio.run(batcher.query(lambda: connections[database].execute_wrappers.append(listen)))
    return asked


# Remembered.


def test_who_was_refused_for_its_rate_is_so_again_without_the_ledger(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, database: str
) -> None:
    edit_profile(rate_max_requests=2)
    assert [client.chat().status for _ in range(2)] == [200, 200]
    first = client.chat().json
    asked = statements(database)
    for _ in range(10):
        again = client.chat()
        assert again.status == 429
        assert again.json.keys() == first.keys()
        assert first["retryAfter"] - 5 <= again.json.pop("retryAfter") <= first["retryAfter"]
        assert again.json["code"] == "rate_limited"
    assert asked == []
    assert len(upstream.requests) == 2


def test_who_was_refused_for_a_budget_is_so_again_without_the_ledger(client: Client, database: str) -> None:
    edit_account(PAYER, database, daily_token_limit=LEAST - 1)
    first = client.chat()
    asked = statements(database)
    answers = [client.chat() for _ in range(3)]
    for answer in answers:
        assert (answer.status, answer.json["code"]) == (429, "daily_budget_exceeded")
        assert answer.json["error"] == first.json["error"]
        assert 0 <= first.json["retryAfter"] - answer.json["retryAfter"] <= 2
    assert asked == []


@on_sqlite
def test_a_refused_request_writes_nothing_in_the_ledger(client: Client, edit_profile: EditProfile) -> None:
    edit_profile(rate_max_requests=0)
    for _ in range(5):
        assert client.chat().json["code"] == "rate_limited"
    assert not Reservation.objects.exists()
    assert not RateWindow.objects.exists()
    assert not DailyUsage.objects.filter(requests__gt=0).exists()


@on_sqlite
def test_after_the_wait_that_it_was_told_everybody_is_admitted(client: Client, edit_profile: EditProfile) -> None:
    edit_profile(rate_max_requests=1)
    with freeze_time("2026-11-25 12:00:00", tick=True, real_asyncio=True) as clock:
        assert client.chat().status == 200
        for seconds in (0, 3, 10):
            clock.tick(seconds)
            wait = client.chat().json["retryAfter"]
        clock.tick(wait)
        assert client.chat().status == 200


@on_sqlite
def test_a_budget_that_a_settlement_opens_is_closed_for_a_second_at_most(
    client: Client, upstream: FakeUpstream
) -> None:
    upstream.replies(Reply("Hi", gate_after=1), Reply("Hi"))
    edit_account(PAYER, daily_token_limit=LEAST + 100)
    with client.stream() as stream:
        stream.until("token")
        assert client.chat().json["code"] == "daily_budget_exceeded"
        upstream.release()
        stream.rest()
    eventually(lambda: client.chat().status == 200, seconds=2)


@on_sqlite
def test_an_operators_edit_is_in_force_at_once_for_the_refused_too(client: Client, edit_profile: EditProfile) -> None:
    edit_profile(rate_max_requests=1)
    assert [client.chat().status for _ in range(3)] == [200, 429, 429]
    edit_profile(rate_max_requests=2)
    assert [client.chat().status for _ in range(3)] == [200, 429, 429]
    edit_profile(rate_max_requests=60)
    row = edit_account(PAYER, daily_token_limit=LEAST)
    assert [client.chat().json["code"] for _ in range(2)] == ["daily_budget_exceeded"] * 2
    row.extra_tokens, row.extra_day = 1000, today()
    row.save()
    assert client.chat().status == 200


@on_sqlite
def test_one_refusal_is_nobody_elses(client: Client, edit_profile: EditProfile, configure: Configure) -> None:
    configure(TRUSTED_PROXIES=1)
    edit_profile(rate_max_requests=1)
    here, there = {"x_forwarded_for": "192.0.2.1"}, {"x_forwarded_for": "192.0.2.2"}
    assert [client.chat(**here).status for _ in range(3)] == [200, 429, 429]
    assert client.chat(**there).status == 200
    assert client.chat({**HELLO, "profile": "expanded"}, **here).status == 200, "another profile's rate"


@on_sqlite
def test_what_a_client_refused_itself_is_no_refusal_for_who_shares_its_account(client: Client) -> None:
    assert client.chat({**HELLO, "dailyTokenLimit": 1}).json["code"] == "daily_budget_exceeded"
    assert client.chat().status == 200


@on_sqlite
def test_a_pause_is_told_to_the_refused_too(client: Client, edit_profile: EditProfile) -> None:
    edit_profile(rate_max_requests=0)
    client.chat()
    edit_account(PAYER, paused=True)
    assert client.chat().json["code"] == "paused"


def terms_of(payer: str = "user:1", profile: str = "balanced", **limits: int) -> Terms:
    """Of an operator's rows."""
    rows = Policy.read((payer, "site"))
    for name, value in limits.items():
        setattr(rows.profiles[profile], name, value)
    return rows.terms((payer, "site"), profile_name(profile))


def ask_of(terms: Terms) -> ledger.Reserve:
    return ledger.Reserve(
        budgets=ledger.todays_budgets(terms.budgets),
        profile=terms.profile,
        provider=terms.provider,
        model=terms.model,
        prompt_tokens=10,
        max_output_tokens=100,
        min_output_tokens=64,
        rate_max_requests=terms.limits.rate_max_requests,
        rate_window_seconds=terms.limits.rate_window_seconds,
        max_concurrent_streams=terms.limits.max_concurrent_streams,
    )


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock("2026-11-25T12:00:00+00:00")
    with mock.patch("django.utils.timezone.now", clock):
        yield clock


moments = st.sampled_from([0.0, 0.2, 0.7, 0.999, 1.0, 1.5, 7.0, 29.3, 59.0, 60.0, 61.0]) | st.floats(0, 130)
edits = st.none() | st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([200, 400, 1000]))
steps = st.lists(
    st.tuples(moments, st.sampled_from(["user:1", "user:2"]), st.sampled_from(["balanced", "expanded"]), edits),
    max_size=25,
)


@on_sqlite
@hypothesis_settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
@example(steps=[(0.0, "user:1", "balanced", (1, 1000))] + [(0.999, "user:1", "balanced", None)] * 70)
@example(steps=[(0.0, "user:1", "balanced", (3, 110)), *[(s, "user:1", "balanced", None) for s in (0.1, 0.6, 0.6)]])
def test_nobody_is_refused_from_memory_whom_the_ledger_would_admit(
    database: str, clock: Clock, steps: list[tuple[float, str, str, tuple[int, int] | None]]
) -> None:
    """For its rate never; for a budget within a second of a refusal, for what settled since."""
    clear_ledger()
    memory, rate, limit = Refusals(), 2, 400
    holds: list[Hold] = []
    refused_at: dict[tuple[str, str], Any] = {}
    for seconds, payer, profile, edit in steps:
        clock.move(seconds)
        if edit:
            rate, limit = edit
        while len(holds) > (seconds < 0.5):
            ledger.apply([used(holds.pop(0), 12)])
        terms = terms_of(payer, profile, rate_max_requests=rate, daily_token_limit=limit)
        remembered = memory.recall(terms)
        (answer,) = ledger.apply([ask_of(terms)])
        if isinstance(answer, Hold):
            holds.append(answer)
            assert not isinstance(remembered, RateLimited)
            if isinstance(remembered, DailyBudgetExceeded):
                assert (clock.now - refused_at[payer, profile]).total_seconds() < 1
            continue
        if remembered:
            assert type(remembered) in (type(answer), RateLimited, DailyBudgetExceeded)
            assert remembered.retry_after is not None
            if isinstance(remembered, type(answer)):
                # Whom another profile admitted since may make it longer.
                assert remembered.retry_after <= answer.retry_after + 1
        else:
            memory.remember(terms, answer)
            refused_at[payer, profile] = clock.now


def clear_ledger() -> None:
    for model in (Adjustment, DailyUsage, UsageLine, RateWindow, Reservation):
        model.objects.all().delete()


@on_sqlite
def test_the_clock_that_is_put_back_forgets_what_it_has_not_seen_yet(database: str, clock: Clock) -> None:
    memory, terms = Refusals(), terms_of()
    memory.remember(terms, RateLimited(retry_after=30))
    assert memory.recall(terms)
    clock.move(-1)
    assert memory.recall(terms) is None


@on_sqlite
@pytest.mark.parametrize("refusal", [TooManyStreams(retry_after=5), Paused(retry_after=60), LedgerUnavailable()])
def test_only_what_lasts_is_remembered(database: str, refusal: Any) -> None:
    memory, terms = Refusals(), terms_of()
    memory.remember(terms, refusal)
    assert memory.recall(terms) is None


@on_sqlite
def test_the_memory_has_a_bound_and_forgets_the_oldest(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatnest.refusals.MOST_REMEMBERED", 3)
    memory = Refusals()
    everybody = [terms_of(f"user:{n}") for n in range(5)]
    for terms in [*everybody, everybody[2]]:
        memory.remember(terms, RateLimited(retry_after=30))
    assert [memory.recall(terms) is not None for terms in everybody] == [False, False, True, True, True]
    memory.remember(terms_of("user:9"), RateLimited(retry_after=30))
    assert [memory.recall(terms) is not None for terms in everybody] == [False, False, True, False, True]


# Counted.

Row = tuple[str, str, int, str]


def rows(database: str) -> list[Row]:
    found = Refusal.objects.using(database).order_by("account", "code")
    return list(found.values_list("account", "code", "count", "last_detail"))


def test_operators_see_who_was_refused_how_often_and_why(
    client: Client, edit_profile: EditProfile, database: str, upstream: FakeUpstream
) -> None:
    edit_profile("balanced", rate_max_requests=1)
    edit_profile("constrained", max_concurrent_streams=1)
    edit_account(PAYER, database, daily_token_limit=2000)
    upstream.replies(Reply("Hi"), Reply("Hi", gate_after=1))
    assert [client.chat().status for _ in range(4)] == [200, 429, 429, 429]
    with client.stream({**HELLO, "profile": "constrained"}) as stream:
        stream.until("token")
        assert client.chat({**HELLO, "profile": "constrained"}).json["code"] == "too_many_streams"
        upstream.release()
        stream.rest()
    small = {**HELLO, "profile": "expanded", "dailyTokenLimit": 40}
    assert client.chat(small).json.keys() == {"error", "code", "retryable", "retryAfter"}, "nothing of the detail"
    assert client.chat({"messages": "none"}).json["code"] == "invalid_messages"
    told = [
        (PAYER, "daily_budget_exceeded", 1, f"{PAYER} has 14 of 40 tokens left; 76 needed"),
        (PAYER, "invalid_messages", 1, ""),
        (PAYER, "rate_limited", 3, "request 2 in 60 s; balanced allows 1"),
        (PAYER, "too_many_streams", 1, "streams open: 1; constrained allows 1"),
    ]
    eventually(lambda: len(rows(database)) == len(told), seconds=5)
    assert rows(database) == told
    for row in Refusal.objects.using(database):
        assert row.day == today()
        assert (timezone.now() - row.last_at).total_seconds() < 10


@on_sqlite
def test_a_pause_counts_whom_it_stops(client: Client) -> None:
    edit_account("site", paused=True)
    for _ in range(3):
        client.chat()
    eventually(lambda: rows("default") == [(PAYER, "paused", 3, "")], seconds=5)


def test_counts_are_summed_and_written_at_most_once_a_second(database: str, client: Client) -> None:
    """Whatever comes in: two processes, or a thousand refusals."""
    written: list[str] = []

    def listen(execute: Any, sql: str, *args: Any) -> Any:
        written.extend([sql] if "INSERT INTO" in sql and "chatnest_refusal" in sql else [])
        return execute(sql, *args)

    asyncio.run(batcher.query(lambda: connections[database].execute_wrappers.append(listen)))

    for process, times in ((Refusals(), 1000), (Refusals(), 500)):
        for _ in range(times):
            process.note("user:1", RateLimited(detail="once more"))
            process.note("user:2", RateLimited(detail="x" * 500))
    told = [("user:1", "rate_limited", 1500, "once more"), ("user:2", "rate_limited", 1500, "x" * 200)]
    eventually(lambda: rows(database) == told, seconds=5)
    assert len(written) == 2


@on_sqlite
def test_names_without_end_are_counted_together(database: str, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr("chatnest.refusals.MOST_NAMES", 3)

    process = Refusals()
    for n in range(10):
        process.note(f"ip:192.0.2.{n}", RateLimited())
    for payer in ("ip:192.0.2.0", "user:1", "user:2", "key:3"):
        process.note(payer, RateLimited(detail=payer))
    clock.move(24 * 3600)
    process.note("user:1", RateLimited())
    batcher.close()
    found = Refusal.objects.order_by("day", "account").values_list("day", "account", "count", "last_detail")
    assert list(found) == [
        (date(2026, 11, 25), "anonymous", 7, ""),
        (date(2026, 11, 25), "ip:192.0.2.0", 2, "ip:192.0.2.0"),
        (date(2026, 11, 25), "ip:192.0.2.1", 1, ""),
        (date(2026, 11, 25), "ip:192.0.2.2", 1, ""),
        (date(2026, 11, 25), "site", 3, "key:3"),
        (date(2026, 11, 26), "user:1", 1, ""),
    ]


@on_sqlite
def test_what_the_database_did_not_take_is_written_later(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatnest.refusals.WRITE_SECONDS", 0.01)
    monkeypatch.setattr("chatnest.refusals.AWAY_SECONDS", 0.01)
    process, tries = Refusals(), 0

    def away(*statement: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            process.note("user:1", LedgerUnavailable(detail=f"try {tries}"))
            raise OperationalError("server closed the connection")
        run(*statement)

    monkeypatch.setattr("chatnest.refusals.run", away)
    process.note("user:1", RateLimited(detail="before"))
    eventually(lambda: len(rows(database)) == 2, seconds=5)
    assert rows(database) == [("user:1", "ledger_unavailable", 3, "try 3"), ("user:1", "rate_limited", 1, "before")]


def test_who_is_refused_in_sync_code_is_counted_too(database: str, edit_profile: EditProfile) -> None:
    """Its loop is gone before anything could be written."""
    edit_profile(rate_max_requests=0)
    for _ in range(2):
        with pytest.raises(RateLimited), chatnest.hold("user:7", HELLO["messages"]):
            raise AssertionError("it begins nothing")
    told = [("user:7", "rate_limited", 2, "request 1 in 60 s; balanced allows 0")]
    eventually(lambda: rows(database) == told, seconds=5)


def test_who_was_refused_just_before_a_polite_end_is_counted(database: str) -> None:
    process = Refusals()
    process.note("user:1", RateLimited())
    batcher.close()
    assert rows(database) == [("user:1", "rate_limited", 1, "")]


@on_sqlite
def test_the_admin_shows_them_to_read(database: str) -> None:
    Refusal.objects.create(
        day=today(),
        hour=timezone.now(),
        account=PAYER,
        code="rate_limited",
        count=1234,
        last_at=timezone.now(),
        last_detail="request 31",
    )
    browser = Browser()
    browser.force_login(User.objects.create_superuser("operator"))
    page = browser.get("/admin/chatnest/refusal/").content.decode()
    assert PAYER in page and "rate_limited" in page and "request 31" in page
    assert browser.get("/admin/chatnest/refusal/add/").status_code == 403
    row = Refusal.objects.get()
    assert browser.post(f"/admin/chatnest/refusal/{row.pk}/change/", {"count": 0}).status_code == 403
    assert browser.post(f"/admin/chatnest/refusal/{row.pk}/delete/", {"post": "yes"}).status_code == 403

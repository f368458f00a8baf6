"""What the ledger promises, a story at a time: budgets, leases, rates, days, and what operators do to them."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from django.db import connections, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatnest import ledger
from chatnest.errors import ChatError, DailyBudgetExceeded, InternalError, RateLimited, TooManyStreams
from chatnest.ledger import Budget, Hold, Reserve, Reset, Stop
from chatnest.ledger.audit import verify
from chatnest.models import Account, Adjustment, DailyUsage, RateWindow, Reservation, UsageLine

from .bookkeeping import (
    Clock,
    Outcome,
    UsageSource,
    ask,
    counters,
    discrepancies,
    do,
    given_back,
    hold_of,
    row_of,
    used,
    waits_for_a_lock,
)
from .conftest import Configure, eventually, on_postgres, on_sqlite

NOON = "2026-11-22T12:00:00+00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """It is noon, and time stands still until a test moves it."""
    clock = Clock(NOON)
    monkeypatch.setattr(timezone, "now", clock)
    return clock


@pytest.fixture(autouse=True)
def proof(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a story does, at its end every counter is what its rows add up to."""
    if "database" not in request.fixturenames:
        yield
        return
    request.getfixturevalue("database")  # so it is still there at the end
    yield
    assert discrepancies() == []


def refusal_of(operation: Any) -> ChatError:
    (answer,) = ledger.apply([operation])
    assert isinstance(answer, ChatError), answer
    return answer


def stop(hold: Hold) -> Stop:
    return Stop(id=hold.id, day=hold.day, accounts=hold.accounts)


def expire_all(clock: Clock) -> None:
    clock.move(31)
    ledger.expire_overdue()


# Reserving: all budgets or none.


def test_a_hold_is_in_every_budget_that_pays(database: str, clock: Clock) -> None:
    hold = do(ask(budgets={"user:1": 1000, "team:7": 5000, "site": 9000}))
    assert (hold.output_tokens, hold.prompt_tokens, hold.model) == (100, 10, "gpt-4o-mini")
    assert hold.remaining == 1000 - 110
    assert [counters(account) for account in ("user:1", "team:7", "site")] == [(0, 110, 1)] * 3
    row = row_of(hold)
    assert (row.payer, row.accounts, row.tokens) == ("user:1", ["user:1", "team:7", "site"], 110)
    assert (row.profile, row.model, row.day) == ("balanced", "gpt-4o-mini", date(2026, 11, 22))
    assert (row.state, row.outcome, row.usage_source) == ("open", "", "none")
    assert (row.prompt_tokens, row.completion_tokens, row.tokens_charged) == (0, 0, 0)
    assert (row.created_at, row.expires_at) == (clock.now, clock.now + timedelta(seconds=30))
    assert row.settled_at is None


@pytest.mark.parametrize("full", ["user:1", "team:7", "site"])
def test_one_full_budget_refuses_and_leaves_no_trace_in_the_others(database: str, full: str) -> None:
    budgets = {"user:1": 1000, "team:7": 1000, "site": 1000, full: 73}
    assert isinstance(refusal_of(ask(budgets=budgets)), DailyBudgetExceeded)
    assert [counters(account) for account in budgets] == [(0, 0, 0)] * 3
    assert not Reservation.objects.using(database).exists()
    assert not RateWindow.objects.using(database).exists()


def test_who_is_refused_leaves_no_row_behind(database: str) -> None:
    """Refusals are free to whoever asks, so they must cost no room: 60,000 of them once were 60,000 rows of zeros."""
    refused = [ask("user:1", limit=0), ask("user:2", rate_max_requests=0), ask("user:3", max_concurrent_streams=0)]
    answers = ledger.apply([*refused, ask("user:4"), given_back(hold_of(ask("user:5")))])
    assert [type(answer) for answer in answers] == [DailyBudgetExceeded, RateLimited, TooManyStreams, Hold, int]
    rows = DailyUsage.objects.using(database).order_by("account")
    assert list(rows.values_list("account", "requests")) == [("site", 1), ("user:4", 1)]
    assert RateWindow.objects.using(database).count() == Reservation.objects.using(database).count() == 1


def test_the_last_tokens_of_a_budget_can_be_spent_and_not_one_more(database: str) -> None:
    answers = ledger.apply([ask(limit=110 + 74), ask(limit=110 + 74), ask(limit=110 + 74)])
    assert [answer.output_tokens for answer in answers[:2]] == [100, 64]
    assert isinstance(answers[2], DailyBudgetExceeded)
    assert counters() == (0, 184, 2)
    assert answers[1].remaining == 0


def test_an_answer_below_the_useful_minimum_is_not_begun(database: str) -> None:
    assert isinstance(refusal_of(ask(limit=73)), DailyBudgetExceeded)
    assert do(ask(limit=74)).output_tokens == 64


def test_a_profile_of_short_answers_needs_only_what_it_answers(database: str) -> None:
    """MIN_OUTPUT_TOKENS is for answers that were cut to fit, not for those that are short by design."""
    assert do(ask(max_output_tokens=5, limit=15)).output_tokens == 5
    assert isinstance(refusal_of(ask("user:2", max_output_tokens=5, limit=14)), DailyBudgetExceeded)


def test_the_tightest_budget_decides_how_long_the_answer_may_be(database: str) -> None:
    do(ask("user:2", site=210))
    hold = do(ask(limit=1000, site=210))
    assert (hold.output_tokens, hold.remaining) == (90, 0)


def test_a_limit_lowered_below_what_was_used_refuses_and_shows_nothing_left(database: str) -> None:
    hold = do(ask(limit=1000))
    assert isinstance(refusal_of(ask(limit=50)), DailyBudgetExceeded)
    assert do(used(hold, 60)) == 940
    assert ledger.standing(ledger.todays_budgets({"user:1": 50, "site": 100_000})) == (60, 0, 0)


def test_what_is_left_counts_open_holds_and_the_tightest_budget(database: str) -> None:
    hold = do(ask(limit=500, site=450))
    assert hold.remaining == 340
    do(ask(limit=500, site=450))
    assert do(used(hold, 60)) == 450 - 60 - 110
    assert ledger.standing(ledger.todays_budgets({"user:1": 500, "site": 450})) == (60, 110, 280)
    assert ledger.standing(ledger.todays_budgets({"user:9": 500, "site": 450})) == (0, 0, 280)


def test_asking_twice_with_one_id_holds_once(database: str) -> None:
    """The connection broke at COMMIT: nobody knows whether it counted, so it is asked again."""
    question = ask()
    first = do(question)
    assert do(question) == first
    assert ledger.apply([question, question]) == [first, first]
    assert counters() == (0, 110, 1)


def test_asking_twice_in_one_transaction_holds_once(database: str) -> None:
    question = ask()
    first, second = ledger.apply([question, question])
    assert first == second
    assert counters() == (0, 110, 1)


def test_ids_are_in_order_of_time_and_never_the_same() -> None:
    ids = [ledger.new_id() for _ in range(10_000)]
    assert len({*ids}) == 10_000
    assert {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}
    assert [id.int >> 80 for id in ids] == sorted(id.int >> 80 for id in ids)
    assert abs((ids[0].int >> 80) / 1000 - time.time()) < 60


def test_asking_again_is_answered_even_when_nothing_else_would_fit(database: str) -> None:
    question = ask(limit=110, rate_max_requests=1, max_concurrent_streams=1)
    assert do(question) == do(question)


@pytest.mark.parametrize("end", ["settled", "stopped", "expired"])
def test_a_hold_that_is_resolved_is_never_given_out_again(database: str, clock: Clock, end: str) -> None:
    """Its upstream may have been called already."""
    question = ask()
    hold = do(question)
    if end == "settled":
        do(given_back(hold))
    elif end == "stopped":
        do(stop(hold))
    else:
        expire_all(clock)
    assert isinstance(refusal_of(question), InternalError)
    assert counters()[1:] == (0, 1)


def test_a_hold_that_is_overdue_is_not_given_out_again_either(database: str, clock: Clock) -> None:
    question = ask()
    do(question)
    clock.move(30)
    assert isinstance(refusal_of(question), InternalError)
    assert counters() == (0, 110, 1)


def test_many_operations_are_decided_in_turn_in_one_transaction(database: str) -> None:
    """The second asker gets what the first one's settlement gave back."""
    hold = do(ask(limit=184))
    answers = ledger.apply([ask("user:2"), ask(limit=184), ask(limit=184), given_back(hold), ask(limit=184)])
    assert [getattr(answer, "output_tokens", answer) for answer in answers[:2]] == [100, 64]
    assert isinstance(answers[2], DailyBudgetExceeded)
    assert answers[3] == 110
    assert answers[4].output_tokens == 100


# Settling: once, whole.


@pytest.mark.parametrize("tokens", [0, 1, 109, 110, 111, 5000], ids="{}".format)
def test_what_was_used_is_charged_whole_less_equal_or_more_than_the_hold(
    database: str, clock: Clock, tokens: int
) -> None:
    hold = do(ask(limit=1000))
    clock.move(7)
    assert do(used(hold, tokens)) == max(0, 1000 - tokens)
    assert [counters(account) for account in ("user:1", "site")] == [(tokens, 0, 1)] * 2
    row = row_of(hold)
    assert (row.state, row.outcome, row.usage_source) == ("settled", "completed", "reported")
    assert (row.tokens, row.tokens_charged, row.settled_at) == (110, tokens, clock.now)
    assert (row.prompt_tokens, row.completion_tokens) == (min(10, tokens), max(0, tokens - 10))


def test_a_budget_that_a_provider_overran_closes(database: str) -> None:
    do(used(do(ask(limit=1000)), 1500))
    assert isinstance(refusal_of(ask(limit=1000)), DailyBudgetExceeded)
    assert counters() == (1500, 0, 1)


def test_settling_twice_changes_nothing_and_answers_the_same(database: str) -> None:
    hold = do(ask())
    first = do(used(hold, 50))
    before = row_of(hold).__dict__
    assert do(used(hold, 50)) == first
    assert do(used(hold, 9999, outcome=Outcome.CANCELLED)) == first
    assert ledger.apply([used(hold, 1), given_back(hold)]) == [first, first]
    assert {**row_of(hold).__dict__, "_state": 0} == {**before, "_state": 0}
    assert counters() == (50, 0, 1)


def test_settling_twice_in_one_transaction_charges_once(database: str) -> None:
    hold = do(ask())
    assert ledger.apply([used(hold, 50), used(hold, 60)]) == [950, 950]
    assert counters() == (50, 0, 1)


def test_a_hold_taken_and_given_back_in_one_transaction_is_resolved(database: str) -> None:
    question = ask(max_concurrent_streams=1)
    hold = do(question)
    do(given_back(hold))
    again = ask(max_concurrent_streams=1)
    undo = given_back(hold_of(again))
    taken, _, next_one = ledger.apply([again, undo, ask(max_concurrent_streams=1)])
    assert isinstance(taken, Hold)
    assert isinstance(next_one, Hold)
    assert row_of(again).state == "settled"
    assert counters() == (0, 110, 3)


def test_giving_back_a_hold_that_was_never_committed_changes_nothing(database: str) -> None:
    hold = hold_of(ask(limit=500, site=900))
    assert do(given_back(hold)) == 500
    assert do(given_back(hold)) == 500
    assert counters() == (0, 0, 0)
    assert not Reservation.objects.using(database).exists()
    assert not Adjustment.objects.using(database).exists()


def test_what_a_stream_used_counts_even_if_its_row_was_deleted_and_counts_once(database: str) -> None:
    """Somebody removed the row to stop the stream, and repaired the sums. The provider bills all the same."""
    hold = do(ask())
    Reservation.objects.using(database).all().delete()
    DailyUsage.objects.using(database).update(tokens_reserved=0, requests=0)
    assert do(used(hold, 50)) == 950
    assert do(used(hold, 50)) == 950
    assert [counters(account)[:2] for account in ("user:1", "site")] == [(50, 0)] * 2
    DailyUsage.objects.using(database).update(requests=Reservation.objects.using(database).count())


def test_the_sums_of_a_deleted_row_settled_twice_in_one_transaction(database: str) -> None:
    hold = do(ask())
    Reservation.objects.using(database).all().delete()
    DailyUsage.objects.using(database).update(tokens_reserved=0, requests=0)
    assert ledger.apply([used(hold, 50), used(hold, 50)]) == [950, 950]
    DailyUsage.objects.using(database).update(requests=Reservation.objects.using(database).count())


# Leases: a crash loses nothing.


def test_an_expired_lease_is_charged_in_full_by_whoever_next_looks(database: str, clock: Clock) -> None:
    hold = do(ask())
    clock.move(15)
    other = do(ask("user:3"))
    clock.move(15)
    ledger.expire_overdue()
    row = row_of(hold)
    assert (row.state, row.outcome, row.usage_source) == ("expired", "expired", "held")
    assert (row.tokens_charged, row.settled_at) == (110, clock.now)
    assert counters() == (110, 0, 1)
    assert row_of(other).state == "open"


def test_a_lease_lasts_to_its_last_moment(database: str, clock: Clock, configure: Configure) -> None:
    configure(LEASE_SECONDS=5)
    hold = do(ask())
    clock.move(4.999999)
    ledger.expire_overdue()
    assert row_of(hold).state == "open"
    clock.move(0.000001)
    ledger.expire_overdue()
    assert row_of(hold).state == "expired"


def test_a_renewed_lease_lives_on(database: str, clock: Clock) -> None:
    hold, other = do(ask()), do(ask())
    clock.move(29)
    assert ledger.renew([hold.id]) == (set(), set())
    clock.move(29)
    ledger.expire_overdue()
    assert [row_of(h).state for h in (hold, other)] == ["open", "expired"]
    clock.move(1)
    ledger.expire_overdue()
    assert row_of(hold).state == "expired"


def test_a_lease_that_was_renewed_or_settled_after_it_was_seen_is_not_charged(database: str, clock: Clock) -> None:
    seen = [do(ask()), do(ask())]
    do(used(seen[1], 50))
    ledger.expire([hold.id for hold in seen])
    assert [row_of(hold).state for hold in seen] == ["open", "settled"]
    assert counters() == (50, 110, 2)


def test_thousands_of_leases_are_renewed_by_as_many_statements_as_one(database: str, clock: Clock) -> None:
    ids = [
        hold.id
        for _ in range(12)
        for hold in ledger.apply([ask(f"user:{n}", limit=10**9, site=10**9) for n in range(250)])
    ]
    clock.move(29)
    counts = []
    for number in (1, 3000):
        with CaptureQueriesContext(connections[database]) as queries:
            assert ledger.renew(ids[:number]) == (set(), set())
        counts.append(len(queries))
    assert counts[0] == counts[1]
    clock.move(29)
    ledger.expire_overdue()
    assert Reservation.objects.using(database).open().count() == 3000


def test_a_lease_that_ran_out_unseen_can_still_be_renewed(database: str, clock: Clock) -> None:
    """The database was away for longer than a lease, and is back: the stream goes on."""
    hold = do(ask())
    clock.move(1000)
    assert ledger.renew([hold.id]) == (set(), set())
    ledger.expire_overdue()
    assert row_of(hold).state == "open"


@pytest.mark.parametrize("tokens", [0, 50, 110, 170], ids="{}".format)
def test_a_late_settlement_corrects_what_the_expired_lease_was_charged(
    database: str, clock: Clock, tokens: int
) -> None:
    hold = do(ask())
    expire_all(clock)
    assert do(used(hold, tokens)) == 1000 - tokens
    assert do(used(hold, tokens)) == 1000 - tokens
    assert [counters(account) for account in ("user:1", "site")] == [(tokens, 0, 1)] * 2
    row = row_of(hold)
    assert (row.state, row.outcome, row.usage_source) == ("expired", "expired", "reported")
    assert (row.tokens_charged, row.prompt_tokens + row.completion_tokens) == (110, tokens)
    adjustments = Adjustment.objects.using(database).order_by("account")
    expected = [("site", tokens - 110), ("user:1", tokens - 110)] if tokens != 110 else []
    assert [(a.account, a.tokens) for a in adjustments] == expected
    assert all((a.kind, a.reason, a.actor) == ("late", str(hold.id), "") for a in adjustments)
    assert all((a.day, a.created_at) == (hold.day, clock.now) for a in adjustments)


def test_a_late_settlement_twice_in_one_transaction_corrects_once(database: str, clock: Clock) -> None:
    hold = do(ask())
    expire_all(clock)
    assert ledger.apply([used(hold, 50), used(hold, 20)]) == [950, 950]


def test_a_settlement_after_the_lease_that_nobody_has_charged_yet_is_simply_on_time(
    database: str, clock: Clock
) -> None:
    hold, other = do(ask()), do(ask())
    clock.move(3600)
    do(used(hold, 50))
    ledger.expire_overdue()
    assert (row_of(hold).state, row_of(hold).tokens_charged) == ("settled", 50)
    assert row_of(other).state == "expired"
    assert counters() == (160, 0, 2)


def test_a_late_refund_opens_the_budget_again(database: str, clock: Clock) -> None:
    hold = do(ask(limit=110))
    expire_all(clock)
    assert isinstance(refusal_of(ask(limit=110)), DailyBudgetExceeded)
    assert do(given_back(hold)) == 110
    assert do(ask(limit=110)).output_tokens == 100


def test_leases_of_many_days_and_payers_expire_together(database: str, clock: Clock) -> None:
    holds = ledger.apply([ask(f"user:{n}") for n in range(20)])
    clock.move(86_400 * 3)
    ledger.apply([ask("user:3")])
    ledger.expire_overdue()
    assert {row_of(hold).state for hold in holds} == {"expired"}
    assert counters("site", holds[0].day) == (20 * 110, 0, 20)
    assert counters("site") == (0, 110, 1)


# Streams at once.


def test_a_payer_has_only_so_many_streams_at_once_and_others_are_not_in_its_way(database: str) -> None:
    first, second = (do(ask(max_concurrent_streams=2)) for _ in range(2))
    refusal = refusal_of(ask(max_concurrent_streams=2))
    assert isinstance(refusal, TooManyStreams)
    assert refusal.retry_after
    do(ask("user:2", max_concurrent_streams=1))
    do(used(first, 50))
    do(ask(max_concurrent_streams=2))
    do(stop(second))
    do(ask(max_concurrent_streams=2))
    assert isinstance(refusal_of(ask(max_concurrent_streams=2)), TooManyStreams)


def test_streams_are_counted_within_one_transaction_too(database: str) -> None:
    first, *rest = ledger.apply([ask(max_concurrent_streams=1) for _ in range(3)])
    assert [type(answer) for answer in rest] == [TooManyStreams] * 2
    answers = ledger.apply(
        [ask(max_concurrent_streams=1), used(first, 50), ask(max_concurrent_streams=1), ask(max_concurrent_streams=1)]
    )
    assert [type(answer) for answer in answers] == [TooManyStreams, int, Hold, TooManyStreams]


def test_no_stream_means_no_stream(database: str) -> None:
    assert isinstance(refusal_of(ask(max_concurrent_streams=0)), TooManyStreams)


def test_a_slot_never_leaks_past_its_lease(database: str, clock: Clock) -> None:
    do(ask(max_concurrent_streams=1))
    clock.move(29.9)
    assert isinstance(refusal_of(ask(max_concurrent_streams=1)), TooManyStreams)
    clock.move(0.1)
    do(ask(max_concurrent_streams=1))


def test_a_late_settlement_frees_no_slot_twice(database: str, clock: Clock) -> None:
    """The slot of a lease that ran out is free already; its settlement must not free the next stream's."""
    hold = do(ask(max_concurrent_streams=1))
    clock.move(31)
    answers = ledger.apply(
        [ask(max_concurrent_streams=1), used(hold, 50), ask(max_concurrent_streams=1), used(hold, 50)]
    )
    assert [type(answer) for answer in answers] == [Hold, int, TooManyStreams, int]
    assert isinstance(refusal_of(ask(max_concurrent_streams=1)), TooManyStreams)


def test_a_stream_that_is_renewed_keeps_its_slot(database: str, clock: Clock) -> None:
    hold = do(ask(max_concurrent_streams=1))
    for _ in range(5):
        clock.move(20)
        ledger.renew([hold.id])
        assert isinstance(refusal_of(ask(max_concurrent_streams=1)), TooManyStreams)


def test_yesterdays_streams_still_take_their_payers_slots(database: str, clock: Clock) -> None:
    clock.set("2026-11-22T23:59:50+00:00")
    hold = do(ask(max_concurrent_streams=1))
    clock.move(15)
    assert isinstance(refusal_of(ask(max_concurrent_streams=1)), TooManyStreams)
    answers = ledger.apply([used(hold, 50), ask(max_concurrent_streams=1)])
    assert [type(answer) for answer in answers] == [int, Hold]


# Rates.


def test_a_burst_fills_the_window_and_waits_as_long_as_it_was_told(database: str, clock: Clock) -> None:
    hold_times = []
    clock.move(1.25)
    for _ in range(40):
        try:
            do(ask(limit=9999, rate_max_requests=5))
        except RateLimited as refusal:
            clock.move(refusal.retry_after - 1)
            sooner = refusal_of(ask(rate_max_requests=5))
            assert (type(sooner), sooner.retry_after) == (RateLimited, 1)
            clock.move(1)
            do(ask(limit=9999, rate_max_requests=5))
        hold_times.append(clock.now)
    for at in hold_times:
        assert sum(at <= other < at + timedelta(seconds=60) for other in hold_times) < 10


def test_refused_requests_do_not_count(database: str, clock: Clock) -> None:
    do(ask(rate_max_requests=1))
    waits = [refusal_of(ask(rate_max_requests=1)).retry_after for _ in range(10)]
    assert waits == [waits[0]] * 10
    assert isinstance(refusal_of(ask(limit=0)), DailyBudgetExceeded)
    assert isinstance(refusal_of(ask(max_concurrent_streams=0)), TooManyStreams)
    assert [row.count for row in RateWindow.objects.using(database)] == [1]


def test_the_window_slides(database: str, clock: Clock) -> None:
    """Half a window on, half of the previous one's requests still count."""

    def burst(requests: int) -> list[type]:
        answers = ledger.apply([ask(limit=9999, rate_max_requests=10) for _ in range(requests)])
        return [type(answer) for answer in answers]

    assert burst(12) == [Hold] * 10 + [RateLimited] * 2
    clock.move(90)
    assert burst(7) == [Hold] * 5 + [RateLimited] * 2
    clock.move(60)
    assert burst(9) == [Hold] * 7 + [RateLimited] * 2, "half of 5 is 2.5"
    clock.move(200)
    assert burst(12) == [Hold] * 10 + [RateLimited] * 2


def test_each_payer_has_a_rate_of_its_own(database: str, clock: Clock) -> None:
    do(ask(rate_max_requests=1))
    do(ask("user:2", rate_max_requests=1))
    assert isinstance(refusal_of(ask(rate_max_requests=1)), RateLimited)


def test_windows_of_different_lengths_are_different_windows(database: str, clock: Clock) -> None:
    do(ask(rate_max_requests=1, rate_window_seconds=60))
    do(ask(rate_max_requests=1, rate_window_seconds=300))
    answers = ledger.apply(
        [
            ask(rate_max_requests=1, rate_window_seconds=60),
            ask(rate_max_requests=1, rate_window_seconds=300),
            ask(rate_max_requests=2, rate_window_seconds=60),
            ask(rate_max_requests=2, rate_window_seconds=300),
            ask(rate_max_requests=2, rate_window_seconds=300),
        ]
    )
    assert [type(answer) for answer in answers] == [RateLimited, RateLimited, Hold, Hold, RateLimited]


def test_a_rate_is_counted_over_midnight(database: str, clock: Clock) -> None:
    """The window from 23:59:30 to 00:00:30 belongs to two days, and to one rate."""
    clock.set("2026-11-22T23:59:50+00:00")
    do(ask(rate_max_requests=2, rate_window_seconds=7200))
    clock.move(20)
    do(ask(rate_max_requests=2, rate_window_seconds=7200))
    assert isinstance(refusal_of(ask(rate_max_requests=2, rate_window_seconds=7200)), RateLimited)


def test_a_rate_of_nothing_admits_nobody(database: str, clock: Clock) -> None:
    refusal = refusal_of(ask(rate_max_requests=0))
    assert isinstance(refusal, RateLimited)
    assert refusal.retry_after


def test_the_rate_is_said_before_the_budget(database: str, clock: Clock) -> None:
    """Who is told to come back tomorrow for a rate that passes in a minute would."""
    do(ask(limit=110, rate_max_requests=1, max_concurrent_streams=1))
    full = {"limit": 110, "max_concurrent_streams": 1}
    assert isinstance(refusal_of(ask(**full, rate_max_requests=1)), RateLimited)
    assert isinstance(refusal_of(ask(**full)), TooManyStreams)
    assert isinstance(refusal_of(ask(limit=110)), DailyBudgetExceeded)


@given(
    limit=st.integers(1, 60),
    current=st.integers(0, 60),
    previous=st.integers(0, 60),
    window=st.integers(1, 300),
    second=st.integers(0, 299),
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@on_sqlite
def test_a_wait_is_long_enough_and_not_a_second_too_long(
    database: str, clock: Clock, limit: int, current: int, previous: int, window: int, second: int
) -> None:
    """Every Retry-After is kept: against windows counted out second by second, in whole numbers."""
    second %= window
    clock.now = datetime.fromtimestamp(1_800_000_000 // window * window + second, UTC)
    payer = f"user:{uuid4()}"
    for start, count in ((second, current), (second + window, previous)):
        RateWindow.objects.create(
            day=ledger.today(), account=payer, window_start=clock.now - timedelta(seconds=start),
            window_seconds=window, count=count,
        )  # fmt: skip

    def fits(later: int) -> bool:
        passed, into = divmod(second + later, window)
        this, last = [(current, previous), (0, current), (0, 0)][min(passed, 2)]
        return this * window + last * (window - into) <= (limit - 1) * window

    soonest = next(later for later in range(2 * window + 1) if fits(later))
    (answer,) = ledger.apply([ask(payer, rate_max_requests=limit, rate_window_seconds=window)])
    assert getattr(answer, "retry_after", 0) == soonest


# Days.


def test_a_budget_is_renewed_at_local_midnight(database: str, clock: Clock, configure: Configure) -> None:
    configure(TIME_ZONE="America/New_York")
    clock.set("2026-11-23T04:30:00+00:00")
    do(ask(limit=110))
    refusal = refusal_of(ask(limit=110))
    assert refusal.retry_after == 1800
    clock.move(1799)
    assert isinstance(refusal_of(ask(limit=110)), DailyBudgetExceeded)
    clock.move(1)
    assert do(ask(limit=110)).day == date(2026, 11, 23)


@pytest.mark.parametrize(
    ("begins", "hours"),
    [("2026-03-28T23:00:00+00:00", 23), ("2026-10-24T22:00:00+00:00", 25), ("2026-06-01T22:00:00+00:00", 24)],
)
@on_sqlite
def test_a_day_is_as_long_as_its_clocks_say(
    database: str, clock: Clock, configure: Configure, begins: str, hours: int
) -> None:
    configure(TIME_ZONE="Europe/Berlin")
    clock.set(begins)
    first = do(ask(limit=110))
    assert refusal_of(ask(limit=110)).retry_after == hours * 3600
    clock.move(hours * 3600 - 1)
    assert isinstance(refusal_of(ask(limit=110)), DailyBudgetExceeded)
    clock.move(1)
    assert do(ask(limit=110)).day == first.day + timedelta(days=1)


@pytest.mark.parametrize(
    "zone",
    ["UTC", "Europe/Berlin", "America/Havana", "Africa/Cairo", "Asia/Beirut", "Pacific/Apia", "Australia/Lord_Howe"],
)
def test_every_day_ends_at_its_midnight_in_zones_that_skip_or_repeat_it(zone: str, configure: Configure) -> None:
    configure(TIME_ZONE=zone)
    there = ZoneInfo(zone)
    for n in range(366 * 16):
        day = date(2011, 1, 1) + timedelta(days=n)
        end = ledger.day_ends(day)
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=there)
        exists = noon.astimezone(UTC).astimezone(there) == noon and ledger.today(noon.astimezone(UTC)) == day
        assert exists or (zone, day) == ("Pacific/Apia", date(2011, 12, 30))
        last_day = day if exists else day - timedelta(days=1)
        assert ledger.today(end - timedelta(microseconds=1)) == last_day
        assert ledger.today(end) > day


def test_a_stream_over_midnight_settles_into_the_day_that_reserved_it(database: str, clock: Clock) -> None:
    clock.set("2026-11-22T23:59:59+00:00")
    hold = do(ask())
    clock.move(2)
    today = do(ask())
    assert do(used(hold, 50)) == 950
    assert counters(day=hold.day) == (50, 0, 1)
    assert counters(day=today.day) == (0, 110, 1)


def test_a_stream_over_midnight_expires_into_the_day_that_reserved_it(database: str, clock: Clock) -> None:
    clock.set("2026-11-22T23:59:59+00:00")
    hold = do(ask())
    expire_all(clock)
    assert counters(day=hold.day) == (110, 0, 1)
    assert counters() == (0, 0, 0)
    do(used(hold, 30))
    assert counters(day=hold.day) == (30, 0, 1)


def test_asking_again_after_midnight_finds_yesterdays_hold(database: str, clock: Clock) -> None:
    """Asked at 23:59:59, lost at COMMIT, asked again at 00:00:00."""
    clock.set("2026-11-22T23:59:59+00:00")
    question = ask()
    hold = do(question)
    clock.move(1)
    assert do(question) == hold


def test_a_request_that_waited_over_midnight_is_paid_by_the_day_it_was_asked_in(database: str, clock: Clock) -> None:
    """So that whoever asks, and whoever takes it back, knows which day it was, whatever became of the answer."""
    clock.set("2026-11-22T23:59:59+00:00")
    question, full = ask(limit=110), ask(limit=110)
    clock.move(2)
    hold, refusal = ledger.apply([question, full])
    assert (hold.day, question.day) == (date(2026, 11, 22), date(2026, 11, 22))
    assert isinstance(refusal, DailyBudgetExceeded)
    assert refusal.retry_after == 1
    assert [row.day for row in RateWindow.objects.using(database)] == [hold.day]
    assert do(ask(limit=110)).day == date(2026, 11, 23)


# Operators.


def test_a_stop_charges_the_hold_until_the_stream_says_what_it_used(database: str, clock: Clock) -> None:
    hold = do(ask())
    assert do(stop(hold)) is True
    row = row_of(hold)
    assert (row.state, row.outcome, row.usage_source) == ("settled", "stopped", "held")
    assert (row.tokens_charged, row.settled_at) == (110, clock.now)
    assert ledger.renew([hold.id]) == ({hold.id}, set())
    assert do(used(hold, 30, outcome=Outcome.STOPPED, source=UsageSource.COUNTED)) == 970
    assert do(used(hold, 40)) == 970
    assert (row_of(hold).outcome, row_of(hold).usage_source) == ("stopped", "counted")
    assert counters() == (30, 0, 1)


def test_only_what_is_open_can_be_stopped(database: str, clock: Clock) -> None:
    settled, expired = do(ask()), do(ask())
    do(used(settled, 50))
    expire_all(clock)
    unknown = Stop(id=uuid4(), day=settled.day, accounts=["user:1", "site"])
    assert ledger.apply([stop(settled), stop(expired), unknown]) == [False] * 3
    assert [row_of(hold).outcome for hold in (settled, expired)] == ["completed", "expired"]
    assert counters() == (160, 0, 2)


def test_a_stop_twice_is_a_stop_once(database: str) -> None:
    hold = do(ask())
    assert ledger.apply([stop(hold), stop(hold)]) == [True, False]
    assert counters() == (110, 0, 1)


def test_a_renewal_tells_which_streams_must_end(database: str, clock: Clock) -> None:
    live, stopped, settled, expired, removed = (do(ask()) for _ in range(5))
    do(stop(stopped))
    do(used(settled, 50))
    do(given_back(removed))
    DailyUsage.objects.using(database).update(requests=4)
    UsageLine.objects.using(database).update(requests=2)
    row_of(removed).delete()
    clock.move(29)
    ledger.renew([live.id])
    clock.move(2)
    ledger.expire_overdue()
    everyone = [hold.id for hold in (live, stopped, settled, expired, removed)]
    assert ledger.renew([live.id]) == (set(), set())
    # An expired lease is charged in full, and its stream may finish: a late settlement corrects it.
    assert ledger.renew(everyone) == ({stopped.id, settled.id, removed.id}, set())


def test_a_renewal_tells_who_is_paused(database: str) -> None:
    Account.objects.using(database).create(name="user:1", paused=True)
    Account.objects.using(database).create(name="user:2")
    Account.objects.using(database).create(name="user:3", paused=True)
    accounts = ["user:1", "user:2", "user:9", "site"]
    assert ledger.renew([], accounts) == (set(), {"user:1"})
    assert ledger.renew([do(ask()).id], accounts) == (set(), {"user:1"})
    assert ledger.renew([do(ask()).id], ["user:2", "site"]) == (set(), set())


def test_a_reset_forgives_what_was_used_and_keeps_what_is_held(database: str, clock: Clock) -> None:
    do(used(do(ask()), 500))
    hold = do(ask())
    assert do(Reset(day=hold.day, account="user:1", reason="a gift", actor="admin")) == 500
    assert counters() == (0, 110, 2)
    assert counters("site") == (500, 110, 2)
    (adjustment,) = Adjustment.objects.using(database)
    assert (adjustment.account, adjustment.tokens, adjustment.day) == ("user:1", -500, hold.day)
    assert (adjustment.kind, adjustment.reason, adjustment.actor) == ("forgiven", "a gift", "admin")
    assert adjustment.created_at == clock.now
    assert do(used(hold, 60)) == 940


def test_a_reset_of_nothing_writes_nothing(database: str) -> None:
    today = ledger.today()
    assert ledger.apply([Reset(day=today, account="user:1", reason="", actor="admin")] * 2) == [0, 0]
    assert not Adjustment.objects.using(database).exists()


def test_a_reset_opens_an_overrun_budget(database: str) -> None:
    do(used(do(ask()), 2000))
    do(Reset(day=ledger.today(), account="user:1", reason="", actor="admin"))
    assert do(ask()).remaining == 890


def test_an_overdue_lease_is_charged_though_the_budget_was_reset(database: str, clock: Clock) -> None:
    hold = do(ask())
    clock.move(31)
    do(Reset(day=hold.day, account="user:1", reason="", actor="admin"))
    ledger.expire_overdue()
    assert row_of(hold).state == "expired"
    assert counters("site") == (110, 0, 1)


@pytest.mark.parametrize("tokens", [0, 50, 110, 300], ids="{}".format)
def test_what_a_reset_forgave_is_not_refunded_a_second_time(database: str, clock: Clock, tokens: int) -> None:
    """A refund after a reset would be taken out of what others have used since."""
    hold = do(ask())
    do(stop(hold))
    clock.move(1)
    do(Reset(day=hold.day, account="user:1", reason="", actor="admin"))
    clock.move(1)
    do(used(do(ask()), 100))
    do(used(hold, tokens))
    assert counters() == (100 + max(0, tokens - 110), 0, 2)
    assert counters("site") == (100 + tokens, 0, 2)


def test_what_a_reset_is_called_changes_nothing(database: str, clock: Clock) -> None:
    """An operator who looked at the rows may well write what chatnest writes. Only its kind says what it is."""
    for n, reason in enumerate(("settled late by me", "late", "pruned", "")):
        payer = f"user:{n}"
        hold = do(ask(payer))
        do(stop(hold))
        clock.move(1)
        do(Reset(day=hold.day, account=payer, reason=reason, actor="admin"))
        clock.move(1)
        do(used(do(ask(payer)), 200))
        do(used(hold, 0))
        assert counters(payer) == (200, 0, 2), reason
        assert verify() == []
    DailyUsage.objects.using(database).filter(account="user:2").update(tokens_used=150, requests=1)
    assert {one.field for one in verify(repair=True)} == {"tokens_used", "requests"}


def test_as_many_late_settlements_as_a_batch_has_cost_as_many_statements_as_one(database: str, clock: Clock) -> None:
    """The batch after every outage, under the lock of the site's row."""
    holds = ledger.apply([ask(f"user:{n}", site=10**9) for n in range(101)])
    expire_all(clock)
    counts = []
    for late in (holds[:1], holds[1:]):
        with CaptureQueriesContext(connections[database]) as queries:
            ledger.apply([used(hold, 50) for hold in late])
        counts.append(len(queries))
    assert counts[0] == counts[1]
    assert counters("site") == (101 * 50, 0, 101)


def test_a_hold_charged_after_the_reset_is_refunded(database: str, clock: Clock) -> None:
    hold = do(ask())
    do(Reset(day=hold.day, account="user:1", reason="", actor="admin"))
    clock.move(1)
    do(used(do(ask()), 100))
    do(stop(hold))
    do(used(hold, 30))
    assert counters() == (130, 0, 2)


def test_a_counter_that_somebody_broke_stops_nobody_else(
    database: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease that cannot be charged is told to the operator, and waits for ``chatnest_verify --repair``."""
    hold = do(ask())
    DailyUsage.objects.using(database).update(tokens_reserved=0)
    clock.move(31)
    do(used(do(ask("user:2")), 50))
    other = do(ask("user:2"))
    clock.move(31)
    ledger.expire_overdue()
    assert row_of(other).state == "expired"
    assert "cannot be charged: run manage.py chatnest_verify --repair" in caplog.text
    assert row_of(hold).state == "open"
    assert verify(repair=True) != []
    ledger.expire_overdue()
    assert row_of(hold).state == "expired"


# Two processes at once.


@pytest.fixture
def elsewhere(database: str) -> Iterator[Callable[[Callable[[], object]], Future[Any]]]:
    """Runs work in a thread with a connection of its own, as another process would."""

    def run(work: Callable[[], object]) -> object:
        try:
            return work()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(8) as threads:
        yield lambda work: threads.submit(run, work)


@contextmanager
def impatient(alias: str) -> Iterator[None]:
    """This connection waits for no lock: what would have waited raises."""
    with connections[alias].cursor() as cursor:
        cursor.execute("SET lock_timeout = 100")
        try:
            yield
        finally:
            cursor.execute("RESET lock_timeout")


@on_postgres
@pytest.mark.parametrize("new", [False, True], ids=["in use", "new"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(("a", 0), ("b", 0)), (("z", 0), ("a", 1))],
    ids=["by name", "by day"],
)
def test_who_waits_for_a_budget_keeps_nobody_from_the_next_one(
    database: str, elsewhere: Any, first: tuple[str, int], second: tuple[str, int], new: bool
) -> None:
    """Usage rows are locked, and made, in one order, so two cannot deadlock: behind the first none is held yet."""

    def question(account: str, later: int) -> Reserve:
        return replace(ask(), id=ledger.new_id(), budgets=(Budget(account, ledger.today() + timedelta(later), 1000),))

    if not new:
        ledger.apply([question(*first), question(*second)])
    with transaction.atomic(using=database):
        ledger.apply([question(*first)])
        waiting = elsewhere(lambda: ledger.apply([question(*second), question(*first)]))
        eventually(lambda: waits_for_a_lock(database))
        with impatient(database):
            (hold,) = ledger.apply([question(*second)])
            assert isinstance(hold, Hold)
    assert [type(answer) for answer in waiting.result(10)] == [Hold, Hold]


@on_postgres
def test_a_renewal_waits_in_the_same_order_as_everyone_else(database: str, elsewhere: Any) -> None:
    """After an outage one process renews what another is about to charge."""
    low, high = UUID(int=1), UUID(int=2)
    ledger.apply([ask(id=high), ask(id=low)])
    ids = Reservation.objects.using(database).select_for_update()
    with transaction.atomic(using=database):
        ids.get(id=low)
        waiting = elsewhere(lambda: ledger.renew([high, low]))
        eventually(lambda: waits_for_a_lock(database))
        with impatient(database):
            ids.get(id=high)
    assert waiting.result(10) == (set(), set())


def test_two_who_see_one_overdue_lease_charge_it_once(database: str, clock: Clock, elsewhere: Any) -> None:
    ledger.apply([ask(f"user:{n}") for n in range(5)])
    clock.move(31)
    together = threading.Barrier(4)

    def look() -> object:
        together.wait(10)
        return ledger.expire_overdue()

    assert [looking.result(30) for looking in [elsewhere(look) for _ in range(4)]] == [None] * 4
    assert counters("site") == (550, 0, 5)


def test_many_at_once_never_spend_a_token_too_much(database: str, elsewhere: Any) -> None:
    """Eight processes, one budget of which half can be served, on a day that nobody has opened yet."""
    together = threading.Barrier(8)

    def spend(n: int) -> list[Hold | ChatError | int]:
        together.wait(10)
        questions = [ask(f"user:{n}", site=8 * 5 * 110 // 2 + 7) for _ in range(5)]
        return [ledger.apply([question])[0] for question in questions]

    asking = [elsewhere(partial(spend, n)) for n in range(8)]
    answers = [answer for thread in asking for answer in thread.result(60)]
    holds = [answer for answer in answers if isinstance(answer, Hold)]
    assert len(holds) == 20
    assert len(answers) == 40
    assert all(isinstance(answer, Hold | DailyBudgetExceeded) for answer in answers)
    assert counters("site") == (0, 20 * 110, 20)

"""What reports teach is written with the settlement that brings it: once, in every process, or not at all."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import IntegrityError, connections
from django.test import Client
from django.utils import timezone

from chatnest import ledger
from chatnest.ledger import Hold, Lesson, Stop
from chatnest.ledger.batcher import batcher
from chatnest.models import Calibration
from chatnest.policy import Policy

from .bookkeeping import Clock, Outcome, UsageSource, ask, counters, discrepancies, do, row_of, used
from .conftest import on_postgres

NOON = "2026-11-22T12:00:00+00:00"


@pytest.fixture(autouse=True)
def proof(database: str) -> Iterator[None]:
    yield
    assert discrepancies() == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(NOON)
    monkeypatch.setattr(timezone, "now", clock)
    return clock


def lesson(model: str = "gpt-4o-mini", provider: str = "default", **learned: Any) -> Lesson:
    return Lesson(provider=provider, model=model, **learned)


def learned(database: str) -> dict[tuple[str, str], tuple[int, int, int, bool, bool]]:
    return {
        (row.provider, row.model): (
            row.reports,
            row.prompt_excess,
            row.completion_excess,
            row.reasons_unseen,
            row.ignores_max_tokens,
        )
        for row in Calibration.objects.using(database)
    }


def test_a_hold_knows_which_model_of_which_provider_it_is_for(database: str) -> None:
    hold = do(ask(provider="azure", model="gpt-5", label="search", prompt_tokens=30, prompt_excess=20))
    assert (hold.provider, hold.model, hold.prompt_tokens, hold.prompt_excess) == ("azure", "gpt-5", 30, 20)
    assert hold.tokens == row_of(hold).tokens == 130
    row = row_of(hold)
    assert (row.provider, row.model, row.label) == ("azure", "gpt-5", "search")
    plain = row_of(do(ask()))
    assert (plain.provider, plain.label) == ("default", "")


def test_each_report_teaches_and_the_most_that_was_seen_stays(database: str, clock: Clock) -> None:
    do(used(do(ask()), 50, lesson=lesson(prompt_excess=21, completion_excess=3)))
    assert learned(database) == {("default", "gpt-4o-mini"): (1, 21, 3, False, False)}
    assert Calibration.objects.using(database).get().updated_at == clock.now
    clock.move(5)
    do(used(do(ask()), 50, lesson=lesson(prompt_excess=4, completion_excess=9, reasons_unseen=True)))
    assert learned(database) == {("default", "gpt-4o-mini"): (2, 21, 9, True, False)}
    do(used(do(ask()), 50, lesson=lesson(ignores_max_tokens=True, reported=False)))
    assert learned(database) == {("default", "gpt-4o-mini"): (2, 21, 9, True, True)}
    assert Calibration.objects.using(database).get().updated_at == clock.now
    do(used(do(ask()), 50))
    assert learned(database) == {("default", "gpt-4o-mini"): (2, 21, 9, True, True)}


def test_many_reports_in_one_transaction_teach_of_their_models(database: str) -> None:
    holds = ledger.apply([ask() for _ in range(4)])
    lessons = [
        lesson("b", prompt_excess=5),
        lesson("a", completion_excess=7, reasons_unseen=True),
        lesson("b", prompt_excess=3, ignores_max_tokens=True),
        lesson("b", provider="azure"),
    ]
    ledger.apply([used(hold, 50, lesson=one) for hold, one in zip(holds, lessons, strict=True)])
    assert learned(database) == {
        ("default", "a"): (1, 0, 7, True, False),
        ("default", "b"): (2, 5, 0, False, True),
        ("azure", "b"): (1, 0, 0, False, False),
    }


def test_a_settlement_that_is_repeated_teaches_once(database: str) -> None:
    hold = do(ask())
    settle = used(hold, 50, lesson=lesson(prompt_excess=5))
    ledger.apply([settle, settle])
    do(settle)
    assert learned(database) == {("default", "gpt-4o-mini"): (1, 5, 0, False, False)}


def test_a_late_settlement_teaches_too_and_once(database: str, clock: Clock) -> None:
    hold = do(ask())
    clock.move(31)
    ledger.expire_overdue()
    for _ in range(2):
        do(used(hold, 50, lesson=lesson(prompt_excess=5)))
    assert learned(database) == {("default", "gpt-4o-mini"): (1, 5, 0, False, False)}


def unreported(hold: Hold) -> Any:
    """The stream ended, and its whole hold is what it may have cost."""
    return used(hold, hold.tokens, source=UsageSource.HELD, outcome=Outcome.CANCELLED)


@pytest.mark.parametrize("before", ["nothing", "a stop", "the end of its lease"])
def test_a_settlement_by_the_hold_is_a_settlement_and_counts_once(database: str, clock: Clock, before: str) -> None:
    """The charge of a lease or a stop awaits its settlement. Where that says the hold, nothing is awaited any more."""
    hold = do(ask())
    if before == "a stop":
        do(Stop(id=hold.id, day=hold.day, accounts=hold.accounts))
    elif before == "the end of its lease":
        clock.move(31)
        ledger.expire_overdue()
    for settle in (unreported(hold), unreported(hold), used(hold, 50)):
        do(settle)
        assert (row_of(hold).usage_source, row_of(hold).completion_tokens) == ("held", 100)
    assert counters() == (110, 0, 1)


def test_a_report_above_its_hold_is_a_warning_with_the_models_name(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    over, exactly, counted = ledger.apply([ask(model="llama-3.1-8b"), ask(), ask()])
    with caplog.at_level(logging.WARNING):
        ledger.apply([used(exactly, 110), used(counted, 500, source=UsageSource.COUNTED)])
        assert not caplog.records
        ledger.apply([used(over, 111), used(over, 111)])
        do(used(over, 111))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("chatnest.ledger", "WARNING")
    assert "'llama-3.1-8b' of provider 'default' reported 111 tokens, more than the 110 held" in record.message


def test_what_was_rolled_back_taught_nothing_and_warned_of_nothing(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    hold, poison = ledger.apply([ask(), ask("user:2")])
    with pytest.raises(IntegrityError):
        ledger.apply([used(hold, 500, lesson=lesson()), used(poison, -5)])
    assert learned(database) == {}
    assert not caplog.records


@on_postgres
def test_two_processes_that_teach_of_the_same_models_do_not_wait_in_a_circle(database: str) -> None:
    """Of payers who share no budget, so that nothing but the calibrations' rows makes one wait for the other."""
    together = threading.Barrier(2)
    failures: list[BaseException] = []

    def teach(payer: str, models: list[str]) -> None:
        try:
            for n in range(30):
                holds = ledger.apply([ask(budgets={f"{payer}-{n}": 1000}) for _ in models])
                together.wait(10)
                ledger.apply([used(hold, 50, lesson=lesson(m)) for hold, m in zip(holds, models, strict=True)])
        except BaseException as failure:
            failures.append(failure)
        finally:
            connections.close_all()

    threads = [
        threading.Thread(target=teach, args=("user:a", ["x", "y"])),
        threading.Thread(target=teach, args=("user:b", ["y", "x"])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert {reports for reports, *_ in learned(database).values()} == {60}


def test_the_policy_has_what_was_learned(database: str) -> None:
    do(used(do(ask()), 50, lesson=lesson(prompt_excess=21)))
    known = Policy.read().calibrations["default", "gpt-4o-mini"]
    assert (known.prompt_excess, known.bills_what_it_shows) == (21, True)


def test_an_operator_clears_what_was_learned_and_nobody_edits_it(database: str, admin_client: Client) -> None:
    do(used(do(ask()), 50, lesson=lesson(prompt_excess=21, reasons_unseen=True)))
    assert not Policy.read().calibrations["default", "gpt-4o-mini"].bills_what_it_shows
    row = Calibration.objects.using(database).get()
    page = f"/admin/chatnest/calibration/{row.pk}"
    assert b"gpt-4o-mini" in admin_client.get("/admin/chatnest/calibration/").content
    assert admin_client.get("/admin/chatnest/calibration/add/").status_code == 403
    assert admin_client.post(f"{page}/change/", {"prompt_excess": 0}).status_code == 403
    asyncio.run(batcher.policy(["site"]))
    assert batcher.calibration("default", "gpt-4o-mini") is not None
    assert admin_client.post(f"{page}/delete/", {"post": "yes"}).status_code == 302
    assert not Calibration.objects.using(database).exists()
    assert batcher.calibration("default", "gpt-4o-mini") is None, "in force at once"

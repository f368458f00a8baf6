"""The proof of the ledger: what it finds, that it finds nothing else, and that forgetting old days keeps it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from functools import partial
from typing import Any

import pytest
from django.db import connections
from django.db.models import F, Model
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from chatnest import ledger
from chatnest.ledger import Hold, Operation, Reset, Settle, Stop, audit, pruning, transactions
from chatnest.ledger.audit import Discrepancy, verify
from chatnest.ledger.book import Book
from chatnest.ledger.pruning import Pruned, prune
from chatnest.models import Adjustment, DailyUsage, RateWindow, Reservation

from .bookkeeping import Clock, Outcome, UsageSource, ask, counters, discrepancies, do, row_of, used, waits_for_a_lock
from .conftest import eventually, on_postgres

TODAY = date(2026, 11, 22)
NOON = "2026-11-22T12:00:00+00:00"
TOMORROW = "2026-11-23T12:00:00+00:00"
LATER = "2026-12-01T12:00:00+00:00"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(NOON)
    monkeypatch.setattr(timezone, "now", clock)
    return clock


@pytest.fixture
def open_hold(database: str, clock: Clock) -> Hold:
    """A day on which everything happened that may. Its last reservation is still open."""
    simple, dear, failed, stopped, late, _lost = apply(ask() for _ in range(6))
    apply([used(simple, 60), used(dear, 500), Settle(hold=failed, outcome=Outcome.UPSTREAM_ERROR)])
    do(used(do(ask(budgets={"user:2": 1000, "team:7": 1000, "site": 9000})), 90))
    do(Stop(id=stopped.id, day=stopped.day, accounts=stopped.accounts))
    clock.move(31)
    ledger.expire_overdue()  # the leases of the last two are over
    do(used(late, 33))
    do(Reset(day=TODAY, account="user:2", reason="said sorry", actor="alice"))
    hold: Hold = do(ask("user:2"))
    return hold


Rows = Callable[[type[Model]], Any]


@pytest.fixture
def rows(database: str) -> Rows:
    return lambda model: model._default_manager.using(database)


def apply(operations: Iterable[Operation]) -> list[Any]:
    return list(ledger.apply(list(operations)))


def snapshot(rows: Rows) -> list[dict[str, Any]]:
    return list(rows(DailyUsage).order_by("day", "account").values())


# Proving.


def test_whatever_the_ledger_did_is_proven(open_hold: Hold, clock: Clock) -> None:
    assert verify() == []
    do(used(open_hold, 44))
    assert verify() == []


def test_an_empty_database_is_proven(database: str) -> None:
    assert verify(repair=True) == []


def test_proving_only_reads(open_hold: Hold, database: str, clock: Clock, rows: Rows) -> None:
    rows(DailyUsage).filter(account="site").update(tokens_used=1)
    clock.move(31)
    with CaptureQueriesContext(connections[database]) as queries:
        assert verify()
    assert {query["sql"].split()[0] for query in queries} <= {"SELECT", "DECLARE"}
    assert row_of(open_hold).state == "open"


def add(field: str, change: int, account: str) -> Callable[[Rows], Any]:
    return lambda rows: rows(DailyUsage).filter(account=account).update(**{field: F(field) + change})


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (add("tokens_used", 7, "site"), {("site", "tokens_used"): +7}),
        (add("tokens_used", -7, "user:1"), {("user:1", "tokens_used"): -7}),
        (add("tokens_reserved", 1000, "user:1"), {("user:1", "tokens_reserved"): +1000}),
        (add("tokens_reserved", -110, "site"), {("site", "tokens_reserved"): -110}),
        (add("prompt_tokens", -1, "team:7"), {("team:7", "prompt_tokens"): -1}),
        (add("completion_tokens", 1, "site"), {("site", "completion_tokens"): +1}),
        (add("requests", -1, "user:2"), {("user:2", "requests"): -1}),
    ],
)
def test_a_counter_that_somebody_changed_is_found_and_set_back(
    open_hold: Hold, rows: Rows, damage: Callable[[Rows], Any], found: dict[tuple[str, str], int]
) -> None:
    before = snapshot(rows)
    damage(rows)
    damaged = snapshot(rows)
    differences = verify()
    assert {(one.account, one.field): one.stored - one.computed for one in differences} == found
    assert {(one.day, one.repaired) for one in differences} == {(TODAY, False)}
    assert snapshot(rows) == damaged
    assert [one.repaired for one in verify(repair=True)] == [True] * len(found)
    assert snapshot(rows) == before
    assert verify() == []


def test_a_lost_usage_row_is_made_again(open_hold: Hold, rows: Rows) -> None:
    def values() -> list[tuple[Any, ...]]:
        return list(rows(DailyUsage).order_by("account").values_list("day", "account", *audit.PROVEN))

    before = values()
    rows(DailyUsage).filter(account__in=["site", "team:7"]).delete()
    assert {(one.account, one.stored) for one in verify()} == {("site", 0), ("team:7", 0)}
    assert all(one.repaired for one in verify(repair=True))
    assert values() == before
    assert verify() == []


def test_the_only_usage_rows_of_a_day_are_made_again(database: str, rows: Rows) -> None:
    do(ask())
    rows(DailyUsage).all().delete()
    assert {(one.account, one.field) for one in verify()} >= {("site", "tokens_reserved"), ("user:1", "requests")}
    verify(repair=True)
    assert counters() == counters("site") == (0, 110, 1)


def test_a_deleted_reservation_no_longer_counts(open_hold: Hold, rows: Rows) -> None:
    rows(Reservation).filter(id=open_hold.id).delete()
    charged = rows(Reservation).get(tokens_charged=500)
    charged.delete()
    found = {(one.account, one.field): one.computed - one.stored for one in verify(repair=True)}
    assert found[("user:2", "tokens_reserved")] == found[("site", "tokens_reserved")] == -110
    assert found[("user:1", "tokens_used")] == -500
    assert verify() == []
    assert discrepancies() == []


def test_a_deleted_adjustment_counts_no_longer(open_hold: Hold, rows: Rows) -> None:
    rows(Adjustment).filter(reason="said sorry").delete()
    assert verify(repair=True) == [Discrepancy(TODAY, "user:2", "tokens_used", 0, 90, repaired=True)]
    assert counters("user:2") == (90, 110, 2)


def test_a_use_below_zero_is_told_and_left_but_the_rest_is_repaired(open_hold: Hold, rows: Rows) -> None:
    rows(Reservation).filter(payer="user:2", state="settled").delete()  # its charge was forgiven already
    add("tokens_reserved", 5, "user:2")(rows)
    found = {(one.account, one.field): one for one in verify(repair=True)}
    impossible = found.pop(("user:2", "tokens_used"))
    assert (impossible.stored, impossible.computed, impossible.repaired) == (0, -90, False)
    assert str(impossible).endswith("(not repairable: a charge or an adjustment is missing)")
    assert found[("user:2", "tokens_reserved")].repaired
    assert all(one.repaired for one in found.values())
    assert verify() == [impossible]


def test_every_day_is_proven_by_itself(open_hold: Hold, clock: Clock, rows: Rows) -> None:
    clock.set(TOMORROW)
    do(ask())
    rows(DailyUsage).filter(account="user:1").update(tokens_used=1)
    heard: list[str] = []
    assert [one.day for one in verify(progress=heard.append)] == [TODAY, TODAY + timedelta(days=1)]
    assert heard == ["2026-11-22 checked, 1 of 2 days", "2026-11-23 checked, 2 of 2 days"]


def test_repair_charges_the_leases_of_the_dead(open_hold: Hold, clock: Clock, rows: Rows) -> None:
    """Also where the counters have lost those holds, so that the ledger could not subtract them."""
    rows(DailyUsage).all().delete()
    clock.move(31)
    verify(repair=True)
    assert (row_of(open_hold).state, row_of(open_hold).tokens_charged) == ("expired", 110)
    assert verify() == []
    assert discrepancies() == []


def test_repair_charges_them_all(database: str, clock: Clock, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MOST_OVERDUE", 2)
    apply(ask() for _ in range(5))
    clock.move(31)
    assert verify(repair=True) == []
    assert not rows(Reservation).open().exists()
    assert counters() == (550, 0, 5)


@on_postgres
def test_two_repairs_at_once_do_not_mend_twice(database: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    do(used(do(ask()), 50))
    rows(DailyUsage).filter(account="site").update(tokens_used=57)
    opened: list[threading.Thread] = []

    class LateBook(Book):
        """Another repair begins and ends before the first one's locks."""

        def __init__(self, **keys: Any) -> None:
            if not opened:
                opened.append(threading.current_thread())
                beside(lambda: verify(repair=True)).join(30)
            super().__init__(**keys)

    monkeypatch.setattr(transactions, "Book", LateBook)
    assert verify(repair=True) == []
    assert counters("site") == (50, 0, 1)


def test_repair_goes_in_batches_of_accounts(database: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MANY", 3)
    apply(ask(f"user:{number}") for number in range(10))
    rows(DailyUsage).update(tokens_used=5)
    assert len(verify(repair=True)) == 11
    assert verify() == []


# While the site serves.


def beside(work: Callable[[], Any], failures: list[BaseException] | None = None) -> threading.Thread:
    """A thread that works, with connections of its own."""

    def run() -> None:
        try:
            work()
        except BaseException as failure:
            if failures is None:
                raise
            failures.append(failure)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@contextmanager
def traffic(database: str, threads: int = 3) -> Iterator[None]:
    """Chats that reserve, settle, are settled late, lose their lease, and are forgiven, all at once."""
    over = threading.Event()
    failures: list[BaseException] = []

    def chats(name: str) -> None:
        while not over.is_set():
            first, *others = apply(ask(f"user:{name}-{n}", limit=10**9, site=10**9) for n in range(5))
            apply(used(hold, 20) for hold in others)
            Reservation.objects.using(database).filter(id=first.id).update(expires_at=F("created_at"))
            ledger.expire_overdue()
            apply([used(first, 20), Reset(day=first.day, account=f"user:{name}-1", reason="sorry")])

    started = [beside(partial(chats, str(number)), failures) for number in range(threads)]
    try:
        yield
    finally:
        over.set()
        for thread in started:
            thread.join(30)
    assert failures == []


def test_live_traffic_is_no_difference(database: str, rows: Rows) -> None:
    with traffic(database):
        alarms = [difference for _ in range(100) for difference in verify()]
    assert rows(Reservation).count() > 10
    assert alarms == []


def test_repair_under_live_traffic_mends_what_is_broken_and_breaks_nothing(database: str, rows: Rows) -> None:
    with traffic(database):
        for number in range(10):
            rows(DailyUsage).filter(account="site").update(tokens_used=F("tokens_used") + 1 + number)
            verify(repair=True)
    assert verify() == []
    assert discrepancies() == []


# Pruning.


def test_a_pruned_day_keeps_its_usage_and_its_proof(open_hold: Hold, clock: Clock, rows: Rows) -> None:
    do(used(open_hold, 44))
    before = snapshot(rows)
    clock.set(LATER)
    adjustments = rows(Adjustment).exclude(kind="forgiven").count()
    assert prune(ledger.today()) == Pruned(reservations=8, adjustments=adjustments, rate_windows=2, skipped=())
    assert not rows(Reservation).exists()
    assert not rows(RateWindow).exists()
    assert snapshot(rows) == before
    forgiven = rows(Adjustment).get(kind="forgiven")  # so that it is still known what was billed
    assert (forgiven.account, forgiven.tokens, forgiven.actor) == ("user:2", -90, "alice")
    kept = {row.account: (row.day, row.tokens) for row in rows(Adjustment).filter(kind="pruned")}
    billed = {usage["account"]: usage["tokens_used"] for usage in before}
    billed["user:2"] += 90
    assert kept == {account: (TODAY, tokens) for account, tokens in billed.items()}
    assert rows(Adjustment).count() == len(kept) + 1
    assert verify() == []


def test_a_second_prune_finds_nothing(open_hold: Hold, clock: Clock, rows: Rows) -> None:
    do(used(open_hold, 44))
    clock.set(LATER)
    prune(ledger.today())
    kept = list(rows(Adjustment).order_by("id").values())
    assert prune(ledger.today()) == Pruned(reservations=0, adjustments=0, rate_windows=0, skipped=())
    assert list(rows(Adjustment).order_by("id").values()) == kept


def test_a_dry_run_tells_what_the_real_one_does(open_hold: Hold, clock: Clock, rows: Rows) -> None:
    do(used(open_hold, 44))
    clock.set(LATER)
    reservations = rows(Reservation).count()
    told = prune(ledger.today(), dry_run=True)
    assert rows(Reservation).count() == reservations
    assert not rows(Adjustment).filter(kind="pruned").exists()
    assert prune(ledger.today()) == told


def test_a_dry_run_charges_no_lease(open_hold: Hold, clock: Clock) -> None:
    clock.set(LATER)
    assert prune(ledger.today(), dry_run=True).skipped == (TODAY,)
    assert row_of(open_hold).state == "open"
    assert prune(ledger.today()).skipped == ()


def test_only_days_before_the_date_are_pruned(open_hold: Hold, clock: Clock, rows: Rows) -> None:
    do(used(open_hold, 44))
    clock.set(TOMORROW)
    do(used(do(ask()), 20))
    clock.set(LATER)
    assert prune(TODAY).reservations == 0
    assert prune(TODAY + timedelta(days=1)).reservations == 8
    assert set(rows(Reservation).values_list("day", flat=True)) == {TODAY + timedelta(days=1)}
    assert verify() == []


def test_today_cannot_be_pruned(database: str) -> None:
    with pytest.raises(ValueError, match="Today"):
        prune(TODAY + timedelta(days=1))


def test_a_stream_over_midnight_keeps_its_day(database: str, clock: Clock, rows: Rows) -> None:
    clock.set("2026-11-22T23:59:50+00:00")
    done, streaming = apply([ask(), ask()])
    do(used(done, 20))
    clock.set("2026-11-23T00:00:05+00:00")
    assert prune(ledger.today()).skipped == (TODAY,)
    assert rows(Reservation).count() == 2
    do(used(streaming, 30))
    assert prune(ledger.today()) == Pruned(reservations=2, adjustments=0, rate_windows=0, skipped=())
    assert counters("site", TODAY) == (50, 0, 2)
    assert verify() == []


def test_a_reservation_that_its_day_learns_of_too_late_is_kept(
    database: str, clock: Clock, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process looked at the clock before midnight, and commits after the prune has looked at that day."""
    monkeypatch.setattr(pruning, "BATCH", 1)
    clock.set("2026-11-22T23:59:59+00:00")
    apply(used(hold, 20) for hold in apply([ask(), ask()]))
    late: list[Hold] = []

    def commit(text: str) -> None:
        if not late:
            clock.set("2026-11-22T23:59:59+00:00")
            late.append(do(ask()))
            clock.set("2026-11-23T00:00:01+00:00")

    clock.set("2026-11-23T00:00:01+00:00")
    assert prune(ledger.today(), progress=commit).reservations == 2
    assert row_of(late[0]).state == "open"
    assert verify() == []
    do(used(late[0], 30))
    assert counters("site", TODAY) == (70, 0, 3)
    assert verify() == []


def test_a_lost_lease_is_kept_for_a_day_lest_a_late_settlement_be_charged_twice(
    database: str, clock: Clock, rows: Rows
) -> None:
    clock.set("2026-11-22T23:59:50+00:00")
    hold = do(ask())
    clock.set("2026-11-23T00:01:00+00:00")
    assert prune(ledger.today()).skipped == (TODAY,)
    assert row_of(hold).state == "expired"
    do(used(hold, 30))
    assert prune(ledger.today()).skipped == ()
    assert counters("user:1", TODAY) == (30, 0, 1)
    assert verify() == []


def test_a_day_is_a_day(database: str, clock: Clock) -> None:
    clock.set("2026-11-22T23:59:50+00:00")
    do(ask())  # its lease ends at 00:00:20
    for now, skipped in (
        ("2026-11-23T00:00:20+00:00", (TODAY,)),
        ("2026-11-23T12:00:00+00:00", (TODAY,)),
        ("2026-11-24T00:00:19+00:00", (TODAY,)),
        ("2026-11-24T00:00:20+00:00", ()),
    ):
        clock.set(now)
        assert prune(ledger.today()).skipped == skipped, now


def test_a_hold_that_was_settled_as_such_awaits_nothing(database: str, clock: Clock) -> None:
    """Nothing was reported, and the whole hold is the charge: that is a settlement like any other."""
    clock.set("2026-11-22T23:59:50+00:00")
    hold = do(ask())
    do(used(hold, hold.tokens, source=UsageSource.HELD))
    clock.set("2026-11-23T00:01:00+00:00")
    assert (prune(ledger.today()).reservations, verify()) == (1, [])


@on_postgres
def test_a_late_settlement_waits_for_a_prune_that_has_begun(database: str, clock: Clock, rows: Rows) -> None:
    """Between the sum and the deletion of its rows, nothing may be added to them."""
    hold = do(ask())
    clock.set(LATER)
    ledger.expire_overdue()
    late: list[threading.Thread] = []
    pruned = threading.Event()

    def settle() -> None:
        with connections[database].execute_wrapper(after_the_prune):
            do(used(hold, 30))

    def after_the_prune(execute: Any, sql: str, *args: Any) -> Any:
        """What it writes again, once it has the lock, is not for this prune to find, which would count it too."""
        if "INSERT" in sql:
            assert pruned.wait(30)
        return execute(sql, *args)

    def settle_meanwhile(execute: Any, sql: str, *args: Any) -> Any:
        if sql.startswith("DELETE") and not late:
            late.append(beside(settle))
            eventually(lambda: waits_for_a_lock(database))
        return execute(sql, *args)

    with connections[database].execute_wrapper(settle_meanwhile):
        assert prune(ledger.today()).reservations == 1
    pruned.set()
    late[0].join(30)
    assert counters("user:1", TODAY) == (140, 0, 1)
    assert verify() == []


def test_usage_rows_that_say_nothing_go_too(database: str, clock: Clock, rows: Rows) -> None:
    do(used(do(ask()), 44))
    for account, day in (("user:7", TODAY), ("user:8", TODAY), ("user:7", date(2026, 11, 30))):
        rows(DailyUsage).create(day=day, account=account)
    rows(DailyUsage).create(day=TODAY, account="user:9", requests=1)
    clock.set("2026-11-30T12:00:00+00:00")
    assert prune(ledger.today(), dry_run=True).usage_rows == 2
    assert prune(ledger.today()).usage_rows == 2
    assert set(rows(DailyUsage).values_list("account", "requests")) == {
        ("user:1", 1),
        ("site", 1),
        ("user:9", 1),
        ("user:7", 0),
    }


def test_a_settlement_later_than_that_is_still_proven(database: str, clock: Clock, rows: Rows) -> None:
    hold = do(ask())
    clock.set(LATER)
    assert prune(ledger.today()).reservations == 1  # charged first: nobody had asked the ledger since
    do(used(hold, 30))
    assert counters("user:1", TODAY) == (140, 0, 1)
    assert verify() == []
    assert prune(ledger.today()).reservations == 1
    assert list(rows(Adjustment).order_by("account").values_list("account", "tokens", "kind")) == [
        ("site", 140, "pruned"),
        ("user:1", 140, "pruned"),
    ]
    assert verify() == []


def test_a_reset_of_a_pruned_day_is_still_proven(open_hold: Hold, clock: Clock) -> None:
    do(used(open_hold, 44))
    clock.set(LATER)
    prune(ledger.today())
    do(Reset(day=TODAY, account="site", reason="sorry"))
    assert verify() == []
    assert prune(ledger.today()).adjustments == 0  # what was forgiven stays
    assert counters("site", TODAY)[0] == 0
    assert verify() == []


def test_of_a_pruned_day_the_tokens_are_still_proven_but_not_the_rest(
    open_hold: Hold, clock: Clock, rows: Rows
) -> None:
    do(used(open_hold, 44))
    clock.set(LATER)
    prune(ledger.today())
    rows(DailyUsage).update(requests=0, prompt_tokens=1, tokens_used=F("tokens_used") + 1)
    assert {one.field for one in verify(repair=True)} == {"tokens_used"}


def test_a_lost_usage_row_of_a_pruned_day_is_made_again(open_hold: Hold, clock: Clock, rows: Rows) -> None:
    do(used(open_hold, 44))
    clock.set(LATER)
    prune(ledger.today())
    spent = counters("site", TODAY)[0]
    rows(DailyUsage).all().delete()
    assert {one.field for one in verify(repair=True)} == {"tokens_used"}
    assert counters("site", TODAY) == (spent, 0, 0)
    assert verify() == []


def test_a_day_that_cost_nothing_is_marked_as_pruned_too(database: str, clock: Clock, rows: Rows) -> None:
    do(Settle(hold=do(ask()), outcome=Outcome.UPSTREAM_ERROR))
    clock.set(LATER)
    prune(ledger.today())
    assert set(rows(Adjustment).values_list("tokens", "kind")) == {(0, "pruned")}
    assert verify() == []


def test_windows_that_a_rate_still_counts_are_kept(database: str, clock: Clock, rows: Rows) -> None:
    clock.set("2026-11-22T23:59:50+00:00")
    do(used(do(ask(rate_window_seconds=60)), 20))
    do(used(do(ask(rate_window_seconds=3600)), 20))
    do(used(do(ask(rate_window_seconds=86400)), 20))
    for now, left in (
        ("2026-11-23T00:00:59+00:00", {60, 3600, 86400}),
        ("2026-11-23T00:01:00+00:00", {3600, 86400}),
        ("2026-11-23T01:00:00+00:00", {86400}),
        ("2026-11-24T00:00:00+00:00", set()),
    ):
        clock.set(now)
        prune(ledger.today())
        assert set(rows(RateWindow).values_list("window_seconds", flat=True)) == left


def test_wherever_it_is_interrupted_everything_is_proven(
    open_hold: Hold, clock: Clock, database: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its statements in turn, until one run comes through."""
    do(used(open_hold, 44))
    monkeypatch.setattr(pruning, "BATCH", 2)
    before = snapshot(rows)
    clock.set(LATER)
    for statements in range(1, 1000):
        try:
            with connections[database].execute_wrapper(after(statements)):
                prune(ledger.today())
            break
        except Interrupted:
            assert verify() == []
    assert statements > 10
    assert not rows(Reservation).exists()
    assert rows(Adjustment).exclude(kind="forgiven").count() == 4
    assert snapshot(rows) == before
    assert verify() == []


class Interrupted(Exception):
    pass


def after(statements: int) -> Callable[..., Any]:
    """Lets so many statements through."""
    left = iter(range(statements))

    def execute(call: Callable[..., Any], *args: Any) -> Any:
        if next(left, None) is None:
            raise Interrupted
        return call(*args)

    return execute


def test_two_prunes_and_late_settlements_at_once(
    database: str, clock: Clock, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "BATCH", 7)
    holds = apply(ask(f"user:{number % 10}", limit=10**6, site=10**6) for number in range(100))
    clock.set(LATER)
    ledger.expire_overdue()
    together = threading.Barrier(3)
    failures: list[BaseException] = []

    def prune_at_once() -> None:
        together.wait(10)
        prune(ledger.today())

    def settle_at_once() -> None:
        together.wait(10)
        for hold in holds:
            do(used(hold, 20))

    for thread in [beside(work, failures) for work in (prune_at_once, prune_at_once, settle_at_once)]:
        thread.join(60)
    assert failures == []
    prune(ledger.today())
    assert not rows(Reservation).exists()
    assert rows(Adjustment).count() == 11
    assert verify() == []

"""The ledger on connections as sites configure them (isolation, binding), and where transactions are in conflict."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from django.db import DatabaseError, OperationalError, connections, transaction
from psycopg import IsolationLevel

from chatnest import ledger
from chatnest.ledger import Hold, Lesson, Reset, transactions
from chatnest.ledger.audit import verify
from chatnest.ledger.batcher import Batcher, batcher
from chatnest.ledger.pruning import prune
from chatnest.ledger.transactions import is_bug, is_conflict, is_outage
from chatnest.models import Calibration, Reservation

from .bookkeeping import ask, counters, discrepancies, do, given_back, hold_of, used, waits_for_a_lock
from .conftest import eventually, on_postgres, on_sqlite

Connect = Callable[..., None]


@pytest.fixture(autouse=True)
def proof(database: str) -> Iterator[None]:
    yield
    assert discrepancies() == []


@pytest.fixture
def connect(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Threads that connect from now on do so with these OPTIONS; this one too."""

    def connect(**options: Any) -> None:
        usual = connections.settings[database]
        changed = {**usual, "OPTIONS": {**usual.get("OPTIONS", {}), **options}}
        monkeypatch.setitem(connections.settings, database, changed)
        batcher.close()
        connections[database].close()
        monkeypatch.setattr(connections[database], "settings_dict", changed)
        connections[database].__dict__["features"].__dict__.pop("uses_server_side_binding", None)

    yield connect
    batcher.close()
    connections[database].close()
    connections[database].__dict__["features"].__dict__.pop("uses_server_side_binding", None)


CONNECTIONS: dict[str, dict[str, Any]] = {
    "read committed": {},
    "repeatable read": {"isolation_level": IsolationLevel.REPEATABLE_READ},
    "serializable": {"isolation_level": IsolationLevel.SERIALIZABLE},
    "bound by the server": {"server_side_binding": True},
    "serializable, bound by the server": {"isolation_level": IsolationLevel.SERIALIZABLE, "server_side_binding": True},
}


async def chats(process: Batcher, payers: int, each: int) -> int:
    """Answers of as many payers, each asking again as soon as it was answered. How many there were."""

    async def chat(payer: str) -> int:
        for _ in range(each):
            hold = await process.reserve(ask(payer, limit=10**9, site=10**9))
            lesson = Lesson(provider=hold.provider, model=hold.model)
            while await process.settled(used(hold, 50, lesson=lesson)) is None:
                pass
        return each

    return sum(await asyncio.gather(*(chat(f"user:{n}") for n in range(payers))))


@pytest.mark.parametrize("options", CONNECTIONS.values(), ids=CONNECTIONS)
@on_postgres
def test_three_processes_refuse_nobody_and_lose_nothing(database: str, connect: Connect, options: Any) -> None:
    """Of the same payers, on a day that none of them has opened."""
    connect(**options)
    together = threading.Barrier(3)

    def process() -> int:
        one = Batcher()
        together.wait(10)
        try:
            return asyncio.run(chats(one, payers=20, each=5))
        finally:
            one.close()

    with ThreadPoolExecutor(3) as threads:
        served = [thread.result(60) for thread in [threads.submit(process) for _ in range(3)]]
    assert served == [100, 100, 100]
    assert counters("site") == (300 * 50, 0, 300)
    assert [counters(f"user:{n}") for n in range(20)] == [(15 * 50, 0, 15)] * 20
    assert Calibration.objects.using(database).get().reports == 300
    assert verify() == []


@pytest.mark.parametrize("options", CONNECTIONS.values(), ids=CONNECTIONS)
@on_postgres
def test_everything_else_works_there_too(database: str, connect: Connect, options: Any) -> None:
    connect(**options)
    connection: Any = connections[database]
    connection.ensure_connection()
    assert connection.isolation_level == options.get("isolation_level", IsolationLevel.READ_COMMITTED)
    assert connection.features.uses_server_side_binding == options.get("server_side_binding", False)
    settled, stopped, expired, live = ledger.apply([ask(f"user:{n}") for n in range(4)])
    do(used(settled, 50))
    assert do(ledger.Stop(id=stopped.id, day=stopped.day, accounts=stopped.accounts)) is True
    do(Reset(day=stopped.day, account="user:1", reason="sorry"))
    do(used(stopped, 20))
    Reservation.objects.using(database).filter(id=expired.id).update(expires_at=expired_at(expired, database))
    ledger.expire_overdue()
    assert ledger.renew([stopped.id, expired.id, live.id]) == ({stopped.id}, set())
    do(used(expired, 500))
    do(used(live, 10))
    assert [counters(f"user:{n}")[0] for n in range(4)] == [50, 0, 500, 10]
    assert ledger.standing(ledger.todays_budgets({"user:2": 600, "site": 10**9})) == (500, 0, 100)
    assert verify(repair=True) == []
    prune(ledger.today())
    assert verify() == []


def expired_at(hold: Hold, database: str) -> Any:
    return Reservation.objects.using(database).get(id=hold.id).created_at


# Conflicts.


class Spoilsport:
    """Fails the first transactions of a connection, at their first statement, as a conflict would."""

    def __init__(self, times: int, error: Callable[[], Exception]) -> None:
        self.left = times
        self.error = error

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if self.left and "chatnest_dailyusage" in sql:
            self.left -= 1
            raise OperationalError("as the driver words it") from self.error()
        return execute(sql, params, many, context)


def busy() -> Exception:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    return error


CONFLICTS = {
    "serialization failure": psycopg.errors.SerializationFailure,
    "deadlock": psycopg.errors.DeadlockDetected,
    "busy": busy,
}


@pytest.mark.parametrize("error", CONFLICTS.values(), ids=CONFLICTS)
def test_a_transaction_that_another_was_in_the_way_of_is_tried_again(
    database: str, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """That is no outage: nobody is refused, and nothing is said."""

    async def story() -> int | None:
        await batcher.query(lambda: connections[database].execute_wrappers.append(Spoilsport(5, error)))
        hold = await batcher.reserve(ask())
        await batcher.query(lambda: connections[database].execute_wrappers.append(Spoilsport(5, error)))
        return await batcher.settled(used(hold, 50))

    assert asyncio.run(story()) == 950
    assert counters() == (50, 0, 1)
    assert not caplog.records


def test_who_is_in_the_way_for_too_long_is_an_outage(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "CONFLICT_SECONDS", 0.05)
    always = Spoilsport(10**9, psycopg.errors.SerializationFailure)
    with connections[database].execute_wrapper(always), pytest.raises(OperationalError) as raised:
        ledger.apply([ask()])
    assert is_conflict(raised.value)
    assert is_outage(raised.value)
    assert always.left < 10**9 - 2
    assert counters() == (0, 0, 0)


def test_within_somebody_elses_transaction_there_is_no_other_try(database: str) -> None:
    """The whole of it must be done again, and only its owner can."""
    spoilsport = Spoilsport(1, psycopg.errors.SerializationFailure)
    with (
        pytest.raises(OperationalError),
        connections[database].execute_wrapper(spoilsport),
        transaction.atomic(using=database),
    ):
        ledger.apply([ask()])
    assert counters() == (0, 0, 0)


@on_postgres
def test_two_who_make_an_accounts_first_row_of_a_day_are_both_admitted(database: str) -> None:
    """It cannot be locked before it is there: the second finds it made, and begins again."""
    made = threading.Event()
    go_on = threading.Event()

    def first() -> None:
        try:
            with transaction.atomic(using=database):
                ledger.apply([ask(budgets={"user:1": 1000})])
                made.set()
                assert go_on.wait(10)
        finally:
            connections.close_all()

    def second() -> Any:
        try:
            return do(ask(budgets={"user:1": 1000}))
        finally:
            connections.close_all()

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(first)
        assert made.wait(10)
        other = threads.submit(second)
        eventually(lambda: waits_for_a_lock(database))
        go_on.set()
        one.result(10)
        assert other.result(10).remaining == 1000 - 2 * 110
    assert counters() == (0, 220, 2)


@on_postgres
def test_who_settles_what_is_only_now_committed_finds_its_counters_too(database: str) -> None:
    """The connection broke at COMMIT, and the server is still at it when the hold is given back."""
    do(given_back(do(ask("user:2"))))  # so that the site's row is there, to wait for; the payer's is not
    question = ask()
    made, go_on = threading.Event(), threading.Event()

    def committing() -> None:
        try:
            with transaction.atomic(using=database):
                ledger.apply([question])
                made.set()
                assert go_on.wait(10)
        finally:
            connections.close_all()

    def giving_back() -> Any:
        try:
            return do(given_back(hold_of(question)))
        finally:
            connections.close_all()

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(committing)
        assert made.wait(10)
        other = threads.submit(giving_back)
        eventually(lambda: waits_for_a_lock(database))
        go_on.set()
        one.result(10)
        assert other.result(10) == 1000
    assert counters() == (0, 0, 1)


@on_sqlite
def test_a_sqlite_that_somebody_else_writes_to_is_waited_for(database: str) -> None:
    """For longer than its connection waits: another program holds it until the third try."""
    other = sqlite3.connect(connections[database].settings_dict["NAME"], isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    tries = 0

    def let_go(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        nonlocal tries
        if sql.startswith("BEGIN"):
            tries += 1
            if tries == 3:
                other.execute("COMMIT")
        return execute(sql, params, many, context)

    with connections[database].cursor() as cursor:
        cursor.execute("PRAGMA busy_timeout = 10")
    try:
        with connections[database].execute_wrapper(let_go):
            assert do(ask()).remaining == 890
    finally:
        connections[database].close()
        other.close()
    assert tries == 3


# What is whose fault.


def test_a_statement_that_the_database_does_not_understand_is_nobodys_outage(database: str) -> None:
    for sql in ("SELECT nothing FROM nowhere", "SELEKT 1"):
        with pytest.raises(DatabaseError) as raised, connections[database].cursor() as cursor:
            cursor.execute(sql)
        assert is_bug(raised.value)
        assert not is_outage(raised.value)
        assert not is_conflict(raised.value)

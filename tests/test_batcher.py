"""The async door: many callers in one transaction, one poisoned operation alone, and no hold of who has left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.utils import timezone

from chatnest import ledger
from chatnest.errors import DailyBudgetExceeded, InternalError, LedgerUnavailable, Overloaded
from chatnest.ledger import Hold, Reset, Stop
from chatnest.ledger.audit import verify
from chatnest.ledger.batcher import batcher
from chatnest.models import Account, Adjustment, DailyUsage, Reservation
from chatnest.testing import FakeUpstream, Reply

from .benchmarks.processes import ROOT, url_of
from .bookkeeping import ask, busy, counters, discrepancies, do, given_back, hold_of, used, waiting
from .client import Client
from .conftest import Configure, EditProfile, Settled, eventually, on_postgres
from .faults import Faults

Rows = Any


@pytest.fixture(autouse=True)
def proof(database: str) -> Iterator[None]:
    """Whatever a story does, at its end every counter is what its rows add up to, and nothing is held."""
    yield
    assert discrepancies() == []
    assert verify() == []
    assert not Reservation.objects.using(database).open().exists()


class Spy:
    """Sees each statement of the batcher's connection; may do something before one of them."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.before: Callable[[str], object] = lambda sql: None

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        self.statements.append(sql)
        self.before(sql)
        return execute(sql, params, many, context)


async def spied(alias: str) -> Spy:
    spy = Spy()
    await batcher.query(lambda: connections[alias].execute_wrappers.append(spy))
    return spy


async def give_back(*holds: Hold) -> None:
    await asyncio.gather(*(batcher.settled(given_back(hold)) for hold in holds))


def transactions(database: str) -> int:
    """How many reserved: the rows of one share their time."""
    return Reservation.objects.using(database).order_by().values("created_at").distinct().count()


def rows_of(database: str) -> list[tuple[str, str, int]]:
    rows = Reservation.objects.using(database).order_by("created_at")
    return list(rows.values_list("payer", "outcome", "tokens_charged"))


# Group commit.


def test_many_who_wait_share_a_transaction(database: str) -> None:
    async def story() -> list[Hold]:
        async with busy():
            tasks = await waiting(*(batcher.reserve(ask(f"user:{n}")) for n in range(100)))
        return await asyncio.gather(*tasks)

    holds = asyncio.run(story())
    assert transactions(database) == 1
    assert [hold.accounts[0] for hold in holds] == [f"user:{n}" for n in range(100)]
    asyncio.run(give_back(*holds))
    assert counters("site") == (0, 0, 100)


def test_a_statement_for_a_hundred_costs_no_more_than_for_one(database: str) -> None:
    async def statements_of(callers: int) -> int:
        spy = await spied(database)
        async with busy():
            tasks = await waiting(*(batcher.reserve(ask(f"user:{callers}-{n}")) for n in range(callers)))
        holds = await asyncio.gather(*tasks)
        async with busy():
            settling = await waiting(*(batcher.settled(used(hold, 50)) for hold in holds))
        assert await asyncio.gather(*settling) == [950] * callers
        await batcher.query(lambda: connections[database].execute_wrappers.remove(spy))
        return sum('ORDER BY "chatnest_reservation"."expires_at"' not in sql for sql in spy.statements)

    async def story() -> tuple[int, int]:
        return await statements_of(1), await statements_of(100)

    do(given_back(do(ask())))  # the day's first also makes the site's row
    alone, together = asyncio.run(story())
    assert together == alone


def test_each_caller_gets_an_answer_of_its_own(database: str) -> None:
    """Of five who ask at once, one after another, three fit."""

    async def story() -> list[Any]:
        async with busy():
            tasks = await waiting(*(batcher.reserve(ask(limit=330)) for _ in range(5)))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await give_back(*(answer for answer in answers if isinstance(answer, Hold)))
        return answers

    answers = asyncio.run(story())
    assert [type(answer) for answer in answers] == [Hold] * 3 + [DailyBudgetExceeded] * 2
    assert [hold.remaining for hold in answers[:3]] == [220, 110, 0]


def test_a_crowd_of_any_size_is_served(database: str) -> None:
    async def story() -> list[Hold]:
        async with busy():
            tasks = await waiting(*(batcher.reserve(ask(f"user:{n}", site=10**9)) for n in range(700)))
        holds = await asyncio.gather(*tasks)
        await give_back(*holds)
        return holds

    assert len({hold.id for hold in asyncio.run(story())}) == 700
    assert transactions(database) <= 4
    assert counters("site") == (0, 0, 700)


def test_a_batch_is_as_large_as_is_said_and_the_rest_is_the_next(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody waits for a transaction that has no end."""
    monkeypatch.setattr("chatnest.ledger.worker.MAX_BATCH", 10)

    async def story() -> list[Hold]:
        async with busy():
            tasks = await waiting(*(batcher.reserve(ask(f"user:{n}")) for n in range(20)))
        return await asyncio.gather(*tasks)

    holds = asyncio.run(story())
    assert transactions(database) == 2
    asyncio.run(give_back(*holds))


def test_several_event_loops_share_the_door(database: str) -> None:
    """Django's test client and management commands run loops of their own; ASGI servers may, too."""

    async def story(loop: int) -> int:
        holds = await asyncio.gather(*(batcher.reserve(ask(f"user:{loop}", limit=9999)) for _ in range(20)))
        return sum([await batcher.settled(used(hold, 1)) is not None for hold in holds])

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda n: asyncio.run(story(n)), range(4))) == [20] * 4
    assert [counters(f"user:{n}") for n in range(4)] == [(20, 0, 20)] * 4


# Poison.

POISON_RESERVE = partial(ask, "user:poison", prompt_tokens=-5000)


def test_a_poisoned_reservation_fails_alone(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """No caller of ours asks for less than nothing. If one did, the database refuses the whole transaction."""

    async def story() -> list[Any]:
        async with busy():
            asks = [ask("user:1"), POISON_RESERVE(), ask("user:2")]
            tasks = await waiting(*(batcher.reserve(question) for question in asks))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await give_back(answers[0], answers[2])
        return answers

    answers = asyncio.run(story())
    assert [type(answer) for answer in answers] == [Hold, InternalError, Hold]
    assert [payer for payer, *_ in rows_of(database)] == ["user:1", "user:2"]
    assert "user:poison" in caplog.text


def test_a_poisoned_settlement_fails_alone_and_its_lease_charges_the_hold(
    database: str, caplog: pytest.LogCaptureFixture, configure: Configure
) -> None:
    configure(LEASE_SECONDS=0.2)

    async def story() -> list[Any]:
        first, second = [await batcher.reserve(ask(payer)) for payer in ("user:1", "user:2")]
        async with busy():
            settling = await waiting(batcher.settled(used(first, -5)), batcher.settled(used(second, 50)))
        return await asyncio.gather(*settling)

    assert asyncio.run(story()) == [None, 950]
    assert "user:1" in caplog.text

    def expired() -> bool:
        ledger.expire_overdue()
        return counters("user:1") == (110, 0, 1)

    eventually(expired)


@on_postgres
def test_a_value_that_its_column_cannot_hold_is_poison_and_no_outage(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> list[Any]:
        async with busy():
            tasks = await waiting(batcher.reserve(ask("user:1")), batcher.reserve(ask("user:" + "9" * 300)))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await give_back(answers[0])
        return answers

    assert [type(answer) for answer in asyncio.run(story())] == [Hold, InternalError]
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]


def test_what_the_database_does_not_understand_is_a_bug_and_said_once_a_transaction(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A site whose migrations are missing. To call it an outage would have its operators look for one."""

    async def story() -> list[Any]:
        async with busy():
            tasks = await waiting(*(batcher.reserve(ask(f"user:{n}")) for n in range(5)), batcher.query(read))
        return await asyncio.gather(*tasks, return_exceptions=True)

    def read() -> int:
        return DailyUsage.objects.using(database).count()

    with connections[database].cursor() as cursor:
        cursor.execute("ALTER TABLE chatnest_dailyusage RENAME TO elsewhere")
        try:
            answers = asyncio.run(story())
        finally:
            cursor.execute("ALTER TABLE elsewhere RENAME TO chatnest_dailyusage")
    assert [type(answer) for answer in answers] == [InternalError] * 6
    assert [record.levelname for record in caplog.records] == ["CRITICAL"] * 2
    assert all("chatnest_dailyusage" in str(record.exc_info) for record in caplog.records)


# An outage: two lines in the log.


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert not any(record.exc_info for record in caplog.records)
    return [f"{record.levelname} {re.sub('[0-9.]+ s:', 'N s:', record.message)}" for record in caplog.records]


AWAY = "ERROR The database does not answer; until it does, the chat is refused: the database is down"


@pytest.fixture
def faults(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    monkeypatch.setattr("chatnest.ledger.worker.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("chatnest.ledger.batcher.PATIENCE_SECONDS", 0.01)
    faults = Faults(database)

    async def install() -> None:
        await batcher.query(faults.install)

    asyncio.run(install())
    yield faults
    batcher.close()


def test_an_outage_is_two_lines_however_many_it_refuses(
    database: str, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    holds = ledger.apply([ask(f"user:{n}") for n in range(3)])

    async def refused(n: int) -> None:
        with pytest.raises(LedgerUnavailable):
            await batcher.reserve(ask(f"user:{n}"))

    async def story() -> None:
        await batcher.query(lambda: faults.at(1, faults.go_down))
        for n in range(7):
            await refused(n)
        with pytest.raises(LedgerUnavailable):
            await batcher.policy(["site"])
        for hold in holds:
            assert await batcher.settled(used(hold, 50)) is None
        assert said(caplog) == [AWAY]
        faults.off()
        while await batcher.settled(given_back(hold_of(ask("nobody")))) is None:
            pass

    asyncio.run(story())
    eventually(lambda: counters("site") == (150, 0, 3))
    assert said(caplog) == [
        AWAY,
        "WARNING The database answers again, after N s: 8 requests were refused, 3 settlements kept",
    ]
    caplog.clear()
    asyncio.run(give_back(do(ask())))
    assert said(caplog) == []


def test_a_database_that_only_answers_questions_is_still_away(
    database: str, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """A standby can be read: the site is refused all the same, and the log must not say otherwise."""

    def read_only(execute: Any, sql: str, *args: Any) -> Any:
        if "chatnest_dailyusage" in sql:
            raise OperationalError("cannot execute SELECT FOR UPDATE in a read-only transaction")
        return execute(sql, *args)

    async def story() -> None:
        await batcher.query(lambda: connections[database].execute_wrappers.append(read_only))
        for _ in range(3):
            with pytest.raises(LedgerUnavailable):
                await batcher.reserve(ask())
            assert await batcher.query(lambda: Account.objects.using(database).count()) == 2
        await batcher.query(lambda: connections[database].execute_wrappers.clear())
        await give_back(await batcher.reserve(ask()))

    asyncio.run(story())
    assert [line.split()[0] for line in said(caplog)] == ["ERROR", "WARNING"]
    assert "3 requests were refused, 0 settlements kept" in said(caplog)[1]


def test_of_those_refused_in_an_outage_nothing_is_left(
    database: str, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of them was sent, so there is nothing to give back, however long the outage."""

    async def story() -> None:
        await batcher.query(lambda: faults.at(1, faults.go_down))
        for n in range(20):
            with pytest.raises(LedgerUnavailable):
                await batcher.reserve(ask(f"user:{n}"))

    asyncio.run(story())
    batcher.close()  # it would say what it has not written
    assert said(caplog) == [AWAY]
    assert not DailyUsage.objects.using(database).exists()


# Whoever leaves leaves no hold behind, at whatever moment.


def test_who_leaves_before_its_turn_is_not_served(database: str) -> None:
    async def story() -> None:
        async with busy():
            leaving, staying = await waiting(batcher.reserve(ask("user:1")), batcher.reserve(ask("user:2")))
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        await give_back(await staying)

    asyncio.run(story())
    assert rows_of(database) == [("user:2", "cancelled", 0)]


def test_who_leaves_while_its_turn_is_decided_is_taken_back(database: str, settled: Settled) -> None:
    async def story() -> None:
        spy = await spied(database)
        begun, go_on = threading.Event(), threading.Event()
        spy.before = lambda sql: (begun.set(), go_on.wait(10)) if "chatnest_reservation" in sql else None
        (leaving,) = await waiting(batcher.reserve(ask()))
        await asyncio.to_thread(begun.wait, 10)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        go_on.set()
        await batcher.query(lambda: None)  # its answer has come by now, and found nobody

    asyncio.run(story())
    assert [(row.outcome, row.tokens_charged) for row in settled()] == [("cancelled", 0)]


def test_who_leaves_with_the_answer_on_its_way_is_taken_back(database: str, settled: Settled) -> None:
    """The answer is in the future, and the task is cancelled before it wakes up to read it."""
    posted = threading.Semaphore(0)

    class Loop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *args: Any, **context: Any) -> Any:
            handle = super().call_soon_threadsafe(*args, **context)
            posted.release()
            return handle

    async def story() -> None:
        (leaving,) = await waiting(batcher.reserve(ask()))
        assert posted.acquire(timeout=10)  # the loop stands still: what is posted runs just before what follows
        asyncio.get_running_loop().call_soon(leaving.cancel)
        with pytest.raises(asyncio.CancelledError):
            await leaving

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(story())
    assert [(row.outcome, row.tokens_charged) for row in settled()] == [("cancelled", 0)]


def test_whose_loop_has_ended_is_taken_back(database: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def story() -> None:
        spy = await spied(database)
        spy.before = lambda sql: (begun.set(), go_on.wait(10)) if "chatnest_reservation" in sql else None
        await waiting(batcher.reserve(ask()))
        await asyncio.to_thread(begun.wait, 10)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(story())
    abandoned = asyncio.all_tasks(loop)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    go_on.set()
    eventually(lambda: rows_of(database) == [("user:1", "cancelled", 0)])
    for task in abandoned:
        task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_who_loses_patience_is_refused_and_taken_back(
    database: str, settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seconds are long enough to wait for a database; the test has less time."""

    async def story() -> None:
        spy = await spied(database)
        go_on = threading.Event()
        spy.before = lambda sql: go_on.wait(10) if "chatnest_reservation" in sql else None
        with monkeypatch.context() as patch, pytest.raises(LedgerUnavailable) as refusal:
            patch.setattr("chatnest.ledger.batcher.ANSWER_SECONDS", 0.05)
            await batcher.reserve(ask())
        assert refusal.value.retry_after
        go_on.set()
        await batcher.query(lambda: None)

    asyncio.run(story())
    assert [(row.outcome, row.tokens_charged) for row in settled()] == [("cancelled", 0)]


def test_an_answer_does_not_wait_for_its_settlement_forever(
    database: str, settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client hears ``done`` though the database is slow; what was used is written when it can be."""
    monkeypatch.setattr("chatnest.ledger.batcher.PATIENCE_SECONDS", 0.05)

    async def story() -> None:
        hold = await batcher.reserve(ask())
        async with busy():
            assert await batcher.settled(used(hold, 50)) is None

    asyncio.run(story())
    assert [row.tokens_charged for row in settled()] == [50]


def test_a_cancelled_settlement_settles_all_the_same(database: str, settled: Settled) -> None:
    async def story() -> None:
        hold = await batcher.reserve(ask())
        async with busy():
            (leaving,) = await waiting(batcher.settled(used(hold, 50)))
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving

    asyncio.run(story())
    assert [(row.outcome, row.tokens_charged) for row in settled()] == [("completed", 50)]


def test_a_settlement_whose_askers_loop_has_ended_settles_all_the_same(database: str) -> None:
    hold = do(ask())
    begun, go_on = threading.Event(), threading.Event()

    async def story() -> None:
        spy = await spied(database)
        spy.before = lambda sql: (begun.set(), go_on.wait(10)) if "chatnest_reservation" in sql else None
        await waiting(batcher.settled(used(hold, 50)))
        await asyncio.to_thread(begun.wait, 10)

    asyncio.run(story())  # it cancels the asker, and closes
    go_on.set()
    eventually(lambda: counters() == (50, 0, 1))
    asyncio.run(give_back(do(ask())))  # the thread lives


# More than it can bear.


def test_one_more_than_may_wait_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatnest.ledger.batcher.MAX_WAITING", 3)

    async def story() -> list[Any]:
        async with busy():
            tasks = await waiting(*(batcher.reserve(ask(f"user:{n}")) for n in range(4)))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await give_back(*answers[:3])
        return answers

    assert [type(answer) for answer in asyncio.run(story())] == [Hold, Hold, Hold, Overloaded]


def test_more_than_the_queue_holds_is_refused_at_once_and_settlements_never_are(
    database: str, settled: Settled
) -> None:
    async def story() -> int:
        hold = await batcher.reserve(ask())
        async with busy():
            tasks: list[asyncio.Future[Any]] = []
            while not any(task.done() for task in tasks[-100:]):
                tasks += await waiting(*(batcher.reserve(ask("user:2")) for _ in range(100)))
            refused = [task.exception() for task in tasks if task.done()]
            assert {type(error) for error in refused} == {Overloaded}
            with pytest.raises(Overloaded):
                await batcher.query(lambda: None)
            batcher.settle(used(hold, 50))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks) - len(refused)

    assert asyncio.run(story()) >= 1000
    assert [(row.payer, row.tokens_charged) for row in settled()] == [("user:1", 50)]


# Its connection and its thread.


@on_postgres
def test_an_idle_process_gives_its_connection_back(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatnest.ledger.worker.IDLE_SECONDS", 0.05)

    def backend() -> int:
        with connections[database].cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return int(cursor.fetchone()[0])

    async def story() -> int:
        await give_back(await batcher.reserve(ask()))
        return await batcher.query(backend)

    first = asyncio.run(story())

    def gone() -> bool:
        with connections[database].cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [first])
            return cursor.fetchone()[0] == 0

    eventually(gone)
    assert asyncio.run(story()) != first


@on_postgres
def test_a_process_with_a_stream_open_keeps_its_connection(
    database: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(LEASE_SECONDS=0.6)
    monkeypatch.setattr("chatnest.ledger.worker.IDLE_SECONDS", 0.02)

    def backend() -> int:
        return int(connections[database].connection.info.backend_pid)

    async def story() -> tuple[Live, int]:
        stream = Live(await batcher.reserve(ask()))
        batcher.watch(stream)
        return stream, await batcher.query(backend)

    stream, first = asyncio.run(story())
    began = leases(database)
    for _ in range(2):
        before = leases(database)
        eventually(lambda: leases(database) > before)  # noqa: B023
    assert leases(database) > began
    assert asyncio.run(batcher.query(backend)) == first
    batcher.unwatch(stream)
    batcher.settle(given_back(stream.hold))
    eventually(lambda: counters() == (0, 0, 1))


@pytest.mark.parametrize(
    ("own", "expected"), [({}, ("5", "10000")), ({"connect_timeout": 2, "tcp_user_timeout": 500}, ("2", "500"))]
)
@on_postgres
def test_its_connection_notices_in_seconds_that_the_database_is_gone(
    database: str, monkeypatch: pytest.MonkeyPatch, own: Any, expected: tuple[str, str]
) -> None:
    """In TCP's own time it would be a quarter of an hour. A site's own limits are its own."""
    usual = connections.settings[database]
    options = {**usual.get("OPTIONS", {}), **own}
    monkeypatch.setitem(connections.settings, database, {**usual, "OPTIONS": options})

    def parameters() -> dict[str, str]:
        connection: Any = connections[database]
        connection.ensure_connection()
        return dict(connection.connection.info.get_parameters())

    shown = asyncio.run(batcher.query(parameters))
    assert (shown["connect_timeout"], shown["tcp_user_timeout"]) == expected


def test_closing_settles_what_waits_and_the_door_opens_again(database: str) -> None:
    async def story() -> list[Hold]:
        return await asyncio.gather(*(batcher.reserve(ask(f"user:{n}", site=10**9)) for n in range(600)))

    for hold in asyncio.run(story()):
        batcher.settle(used(hold, 50))
    batcher.close()
    assert counters("site") == (600 * 50, 0, 600)
    assert not any(thread.name == "chatnest-ledger" for thread in threading.enumerate())
    asyncio.run(give_back(*asyncio.run(story())))


def test_a_settlement_made_where_no_loop_runs_is_settled(database: str, settled: Settled) -> None:
    """As a finalizer makes it."""
    hold = do(ask())
    batcher.settle(used(hold, 50))
    assert [row.tokens_charged for row in settled()] == [50]


def test_what_is_settled_while_the_thread_ends_is_settled(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has looked for the last time, and who settles still sees it: at a server's end, that is the chat."""
    hold = asyncio.run(batcher.reserve(ask()))
    thread = batcher._thread
    assert thread
    join = thread.join

    def settle_then(seconds: float) -> None:
        join(seconds)
        batcher.settle(used(hold, 50))

    monkeypatch.setattr(thread, "join", settle_then)
    batcher.close()
    assert counters() == (50, 0, 1)


def test_closing_twice_is_closing_once(database: str) -> None:
    do(given_back(do(ask())))
    batcher.close()
    batcher.close()


FORKING = """
import asyncio, json, os, sys
import django
django.setup()
from chatnest import ledger
from chatnest.ledger.batcher import batcher
from chatnest.ledger import Hold
from django.db import OperationalError, connections
from tests.bookkeeping import ask, used

def backend():
    connection = connections["default"]
    return connection.vendor == "postgresql" and connection.connection.info.backend_pid

async def chat(payer):
    hold = await batcher.reserve(ask(payer))
    assert await batcher.settled(used(hold, 50)) is not None
    return await batcher.query(backend)

before = asyncio.run(chat("user:parent"))
child = os.fork()
if not child:
    asyncio.run(chat("user:child"))
    sys.exit(0)  # what waits is settled by who exits
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
after = asyncio.run(chat("user:parent"))
assert after == before, "the child took its parent's connection with it"
for n in range(10):
    batcher.settle(used(ledger.apply([ask("user:late", limit=9999)])[0], 10))
"""


def test_a_forked_process_has_a_thread_and_a_connection_of_its_own(database: str) -> None:
    """As gunicorn's workers are, of a parent that has served already. Exiting settles what waits."""
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
        "SECRET_KEY": "tests",
        "DATABASE_URL": url_of(connections[database].settings_dict),
    }
    forking = subprocess.run(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", FORKING],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (forking.returncode, forking.stderr) == (0, "")
    assert [counters(f"user:{who}") for who in ("parent", "child", "late")] == [(100, 0, 2), (50, 0, 1), (100, 0, 10)]


# What operators decided.


def test_the_policy_is_not_read_for_each_request(
    client: Client, upstream: FakeUpstream, database: str, settled: Settled
) -> None:
    spy = asyncio.run(spied(database))
    assert [client.chat().status for _ in range(20)] == [200] * 20
    assert len(settled()) == 20
    reads = [sql for sql in spy.statements if '"chatnest_profile"' in sql]
    assert 1 <= len(reads) <= 2 * 2, "at most once in two seconds, profiles and accounts"


def test_an_edit_is_in_force_at_once_in_the_process_that_made_it(
    client: Client, upstream: FakeUpstream, database: str, settled: Settled, edit_profile: EditProfile
) -> None:
    client.chat()
    edit_profile(max_output_tokens=99)
    client.chat()
    Account.objects.using(database).update_or_create(name="site", defaults={"paused": True})
    assert client.chat().json["code"] == "paused"
    Account.objects.using(database).all().delete()
    client.chat()
    assert [request.json["max_tokens"] for request in upstream.requests] == [400, 99, 99]
    assert len(settled()) == 3


# Leases.


class Live:
    """A stream, as far as its lease goes."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.stopped = threading.Event()

    def stop(self) -> None:
        self.stopped.set()


def leases(database: str) -> list[Any]:
    return list(Reservation.objects.using(database).order_by("payer").values_list("expires_at", flat=True))


def test_all_live_streams_are_renewed_by_one_statement(database: str, configure: Configure) -> None:
    configure(LEASE_SECONDS=1.5)

    async def story() -> tuple[list[Live], Spy]:
        holds = await asyncio.gather(*(batcher.reserve(ask(f"user:{n}")) for n in range(10)))
        streams = [Live(hold) for hold in holds]
        for stream in streams:
            batcher.watch(stream)
        return streams, await spied(database)

    streams, spy = asyncio.run(story())
    first = leases(database)
    renewals = lambda: sum(sql.startswith("UPDATE") and '"expires_at"' in sql for sql in spy.statements)  # noqa: E731
    eventually(lambda: renewals() >= 3)
    assert all(after > before for before, after in zip(first, leases(database), strict=True))
    assert len(set(leases(database))) == 1, "one statement, one time"
    ledger.expire_overdue()
    assert Reservation.objects.using(database).open().count() == 10
    for stream in streams:
        batcher.unwatch(stream)
        batcher.settle(used(stream.hold, 50))
    eventually(lambda: counters("site") == (500, 0, 10))
    assert not any(stream.stopped.is_set() for stream in streams)


async def renewing(hold: Hold) -> Live:
    live = Live(hold)
    batcher.watch(live)
    await batcher.query(lambda: None)  # its thread runs
    return live


WORK = {
    "reserving": lambda other: batcher.reserve(ask("user:2")),
    "being refused": lambda other: batcher.reserve(ask("user:2", limit=0)),
    "settling": lambda other: batcher.settled(used(other, 50)),
    "renewing": renewing,
}


def run_out(database: str, *holds: Hold) -> None:
    """Their process died, half a minute ago."""
    Reservation.objects.using(database).filter(id__in=[hold.id for hold in holds]).update(expires_at=timezone.now())


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_whoever_works_next_charges_the_lease_of_a_dead_process(
    database: str, configure: Configure, work: Callable[[Hold], Any]
) -> None:
    configure(LEASE_SECONDS=3)
    dead, other = do(ask()), do(ask("user:3"))
    run_out(database, dead)

    async def story() -> object:
        with suppress(DailyBudgetExceeded):
            return await work(other)

    answer = asyncio.run(story())
    eventually(lambda: counters("user:1") == (110, 0, 1))
    if isinstance(answer, Hold):
        do(given_back(answer))
    do(given_back(other))


def test_of_two_leases_that_run_out_within_a_second_both_are_charged(database: str) -> None:
    """The second is due to be looked for later, when nothing else happens any more."""
    for dead in (do(ask("user:1")), do(ask("user:2"))):
        run_out(database, dead)
        asyncio.run(batcher.settled(given_back(do(ask("user:3")))))
    eventually(lambda: [counters(name)[:2] for name in ("user:1", "user:2")] == [(110, 0)] * 2)


@pytest.mark.parametrize("lease", [0.5, 3])
def test_a_live_stream_keeps_its_lease_however_short(
    database: str, configure: Configure, upstream: FakeUpstream, client: Client, settled: Settled, lease: float
) -> None:
    """Nothing else happens in this process while the one stream is read."""
    configure(LEASE_SECONDS=lease)
    upstream.replies(Reply("one", " two", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
        (first,) = leases(database)
        eventually(lambda: leases(database)[0] > first, seconds=2 * lease)
        ledger.expire_overdue()
        upstream.release()
        assert [event for event, _ in stream.rest()] == ["token", "usage", "done"]
    assert [(row.state, row.outcome) for row in settled()] == [("settled", "completed")]


def test_a_renewal_that_fails_is_tried_again_soon_and_stops_nobody(
    database: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configure(LEASE_SECONDS=0.9)
    monkeypatch.setattr("chatnest.ledger.worker.RETRY_SECONDS", 0.01)
    failures = 3

    def fails(execute: Any, sql: str, *args: Any) -> Any:
        nonlocal failures
        if failures and sql.startswith("UPDATE") and '"expires_at"' in sql:
            failures -= 1
            raise OperationalError("the connection is lost")
        return execute(sql, *args)

    async def story() -> Live:
        stream = Live(await batcher.reserve(ask()))
        await batcher.query(lambda: connections[database].execute_wrappers.append(fails))
        batcher.watch(stream)
        return stream

    stream = asyncio.run(story())
    (first,) = leases(database)
    eventually(lambda: leases(database)[0] > first)
    assert failures == 0
    assert not stream.stopped.is_set()
    eventually(lambda: [record.levelname for record in caplog.records] == ["ERROR", "WARNING"])
    batcher.unwatch(stream)
    batcher.settle(given_back(stream.hold))
    eventually(lambda: counters() == (0, 0, 1))


def test_a_look_for_overdue_leases_that_fails_is_no_more_than_a_line_in_the_log(
    database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatnest.ledger.worker.LOOK_SECONDS", 0.01)
    dead = do(ask("user:2"))
    run_out(database, dead)
    failures = 2  # it is done again once, on a new connection

    def fails(execute: Any, sql: str, *args: Any) -> Any:
        nonlocal failures
        if failures and 'ORDER BY "chatnest_reservation"."expires_at"' in sql:
            failures -= 1
            raise OperationalError("the connection is lost")
        return execute(sql, *args)

    async def story() -> None:
        await batcher.query(lambda: connections[database].execute_wrappers.append(fails))
        await give_back(await batcher.reserve(ask()))

    asyncio.run(story())
    eventually(lambda: not failures)
    asyncio.run(give_back(do(ask())))
    eventually(lambda: counters("user:2") == (110, 0, 1))
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_a_stream_that_nobody_keeps_is_not_renewed(database: str, configure: Configure) -> None:
    """What has no reader and no reference cannot settle: its lease runs out, and charges the hold."""
    configure(LEASE_SECONDS=0.4)

    async def story() -> None:
        batcher.watch(Live(await batcher.reserve(ask())))

    asyncio.run(story())

    def expired() -> bool:
        ledger.expire_overdue()
        return counters() == (110, 0, 1)

    eventually(expired)


def pause_payer(database: str, row: Reservation) -> None:
    Account.objects.using(database).update_or_create(name=row.payer, defaults={"paused": True})


def pause_site(database: str, row: Reservation) -> None:
    Account.objects.using(database).filter(name="site").update(paused=True)


def stop(database: str, row: Reservation) -> None:
    assert do(Stop(id=row.id, day=row.day, accounts=row.accounts)) is True


def remove(database: str, row: Reservation) -> None:
    row.delete()
    verify(repair=True)


@pytest.mark.parametrize("order", [pause_payer, pause_site, stop, remove])
def test_a_live_stream_obeys_its_operator(
    database: str,
    configure: Configure,
    upstream: FakeUpstream,
    client: Client,
    settled: Settled,
    order: Callable[[str, Reservation], None],
) -> None:
    """It ends with an error frame, its upstream is hung up on, and what it used is charged, once."""
    configure(LEASE_SECONDS=0.6)
    upstream.replies(Reply.endless("word ", 0.01))
    with client.stream() as stream:
        stream.until("token")
        (row,) = Reservation.objects.using(database)
        order(database, row)
        error = json.loads(stream.until("error")[1])
        assert stream.rest() == []
    assert (error["code"], error["retryable"]) == ("paused", True)
    assert error["retryAfter"]
    upstream.wait_for_disconnect()
    eventually(lambda: counters(row.payer)[1] == 0)
    (ended,) = settled()
    assert ended.outcome == "stopped"
    eventually(lambda: settled()[0].usage_source == "counted")
    charged = settled()[0]
    assert charged.completion_tokens > 0
    late = sum(Adjustment.objects.using(database).filter(account="site").values_list("tokens", flat=True))
    assert charged.tokens_charged + late == charged.prompt_tokens + charged.completion_tokens
    if order is remove:  # the repair had forgotten the request too
        verify(repair=True)


def test_a_pause_stops_only_those_who_pay(
    database: str, configure: Configure, upstream: FakeUpstream, client: Client, settled: Settled
) -> None:
    configure(LEASE_SECONDS=0.6, TRUSTED_PROXIES=1)
    upstream.replies(Reply("one", " two", gate_after=1))
    with client.stream(x_forwarded_for="192.0.2.1") as paused, client.stream(x_forwarded_for="192.0.2.2") as other:
        paused.until("token"), other.until("token")
        Account.objects.using(database).create(name="ip:192.0.2.1", paused=True)
        assert paused.until("error")
        upstream.release()
        assert other.until("done")
    assert {row.payer: row.outcome for row in settled()} == {"ip:192.0.2.1": "stopped", "ip:192.0.2.2": "completed"}


def test_a_reset_with_streams_open_is_no_surprise_to_them(
    database: str, upstream: FakeUpstream, client: Client, settled: Settled
) -> None:
    upstream.replies(Reply("one", " two", gate_after=1, usage=(10, 20)))
    with client.stream() as stream:
        stream.until("token")
        for account in ("ip:127.0.0.1", "site"):
            do(Reset(day=ledger.today(), account=account, reason="", actor="admin"))
        upstream.release()
        assert stream.until("done")
    assert [row.tokens_charged for row in settled()] == [30]
    assert counters("site") == (30, 0, 1)

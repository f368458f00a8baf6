"""Each point at which reserve and settle can fail, enumerated: a crash, a cancel, a delay, a lost connection.

A point is before and after each statement that the batcher's connection is given, and before and after each
COMMIT took effect. Whatever happens there: no charge is missing, no hold is left, and the sums are right.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import django
import pytest
from django.db import connections
from django.db.models import F
from django.utils import timezone

from chatnest import ledger
from chatnest.errors import LedgerUnavailable
from chatnest.ledger import Hold, Lesson, Reserve
from chatnest.ledger.audit import verify
from chatnest.ledger.batcher import batcher
from chatnest.models import Adjustment, Calibration, DailyUsage, RateWindow, Reservation, UsageLine
from chatnest.testing import FakeUpstream, Reply
from project.asgi import application

from .benchmarks.processes import ROOT, url_of
from .bookkeeping import Clock, ask, counters, discrepancies, do, given_back, hold_of, row_of, used
from .client import HELLO
from .conftest import Configure, eventually
from .faults import Faults

T = TypeVar("T")
Story = Callable[[int], Awaitable[object]]


@pytest.fixture(autouse=True)
def proof(database: str) -> Iterator[None]:
    """At the end of every story the sums are right, and nothing is held."""
    yield
    assert discrepancies() == []
    assert verify() == []
    assert not Reservation.objects.using(database).open().exists()


@pytest.fixture
def faults(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    # What is put off is tried again soon, so that a story may have many points.
    monkeypatch.setattr("chatnest.ledger.worker.RETRY_SECONDS", 0.01)
    faults = Faults(database)

    async def install() -> None:
        await batcher.query(faults.install)

    asyncio.run(install())
    yield faults
    batcher.close()


async def each_point(faults: Faults, act: Callable[[], object], story: Story) -> int:
    """Tell the story once for each of its points, with ``act`` happening there, and once without."""
    for point in count(1):
        await batcher.query(lambda: faults.at(point, act))  # noqa: B023
        await story(point)
        happened = faults.happened
        await batcher.query(faults.off)
        # What was put off is written with whatever is written next: it is no part of the next story.
        while await batcher.settled(given_back(hold_of(ask("nobody")))) is None:
            pass
        if not happened:
            return point - 1
    raise AssertionError


async def aside(work: Callable[[], T]) -> T:
    """Run what asks the database in a thread, for there must be none of it in an event loop."""

    def run() -> T:
        try:
            return work()
        finally:
            connections.close_all()

    return await asyncio.to_thread(run)


def of(point: int) -> str:
    """Who pays at this point."""
    return f"user:{point}"


def outcomes(database: str) -> list[tuple[str, int]]:
    rows = Reservation.objects.using(database).order_by("created_at")
    return list(rows.values_list("outcome", "tokens_charged"))


# A lost connection: the database answers whoever asks again.


def test_a_connection_lost_anywhere_in_a_reservation_costs_nothing(database: str, faults: Faults) -> None:
    """At COMMIT too, where nobody knows whether it counted: it is asked again, by the id made beforehand."""
    holds: list[Hold] = []

    async def story(point: int) -> None:
        holds.append(await batcher.reserve(ask(of(point))))

    points = asyncio.run(each_point(faults, faults.lose, story))
    assert points >= 6
    assert [(hold.output_tokens, hold.remaining) for hold in holds] == [(100, 890)] * (points + 1)
    assert [counters(of(point)) for point in range(1, points + 2)] == [(0, 110, 1)] * (points + 1)
    assert counters("site") == (0, 110 * (points + 1), points + 1)
    ledger.apply([used(hold, 50) for hold in holds])


def test_a_connection_lost_anywhere_in_a_settlement_charges_it_once(database: str, faults: Faults) -> None:
    left: list[int | None] = []

    async def story(point: int) -> None:
        (hold,) = await aside(lambda: ledger.apply([ask(of(point))]))
        lesson = Lesson(provider=hold.provider, model=hold.model)
        left.append(await batcher.settled(used(hold, 50, lesson=lesson)))

    points = asyncio.run(each_point(faults, faults.lose, story))
    assert points >= 6
    assert Calibration.objects.using(database).get().reports == points + 1
    assert left == [950] * (points + 1)
    assert outcomes(database) == [("completed", 50)] * (points + 1)
    assert counters("site") == (50 * (points + 1), 0, points + 1)
    assert not Adjustment.objects.using(database).exists()


def run_out(database: str, hold: Hold) -> None:
    Reservation.objects.using(database).filter(id=hold.id).update(expires_at=F("created_at"))


def test_a_connection_lost_while_a_late_settlement_is_written_corrects_it_once(database: str, faults: Faults) -> None:
    def expired(payer: str) -> Hold:
        hold = do(ask(payer))
        run_out(database, hold)
        ledger.expire_overdue()
        return hold

    async def story(point: int) -> None:
        hold = await aside(lambda: expired(of(point)))
        assert await batcher.settled(used(hold, 50)) == 950

    points = asyncio.run(each_point(faults, faults.lose, story))
    assert points >= 6
    assert outcomes(database) == [("expired", 110)] * (points + 1)
    assert counters("site") == (50 * (points + 1), 0, points + 1)


def test_a_connection_lost_while_someone_elses_lease_is_charged_is_nothing_to_who_asks(
    database: str, faults: Faults
) -> None:
    async def story(point: int) -> None:
        overdue = await aside(lambda: do(ask(of(-point))))
        await aside(lambda: run_out(database, overdue))
        hold = await batcher.reserve(ask(of(point)))
        assert await batcher.settled(used(hold, 50)) == 950

    points = asyncio.run(each_point(faults, faults.lose, story))
    assert points >= 12
    ledger.expire_overdue()
    assert sorted(outcomes(database)) == [("completed", 50)] * (points + 1) + [("expired", 110)] * (points + 1)
    assert counters("site") == (160 * (points + 1), 0, 2 * (points + 1))


def test_a_connection_lost_while_a_deleted_row_is_settled_charges_it_once(database: str, faults: Faults) -> None:
    async def story(point: int) -> None:
        (hold,) = await aside(lambda: ledger.apply([ask(of(point))]))
        await aside(lambda: delete(hold))
        assert await batcher.settled(used(hold, 50)) == 950

    def delete(hold: Hold) -> None:
        row_of(hold).delete()
        DailyUsage.objects.using(database).update(tokens_reserved=0)

    points = asyncio.run(each_point(faults, faults.lose, story))
    assert points >= 6
    assert counters("site") == (50 * (points + 1), 0, points + 1)


# The database goes down, and comes up again later.


async def refused_or_given_back(question: Reserve) -> None:
    try:
        hold = await batcher.reserve(question)
    except LedgerUnavailable as refusal:
        if refusal.retry_after is None:
            raise
    else:  # nothing went down
        await aside(lambda: ledger.apply([used(hold, 0)]))


def test_a_database_that_goes_down_anywhere_in_a_reservation_refuses_it_and_keeps_no_hold(
    database: str, faults: Faults
) -> None:
    async def story(point: int) -> None:
        await refused_or_given_back(ask(of(point)))

    points = asyncio.run(each_point(faults, faults.go_down, story))
    assert points >= 6
    assert counters("site") == (0, 0, len(outcomes(database)))
    assert set(outcomes(database)) == {("cancelled", 0), ("completed", 0)}


def test_a_hold_that_was_lost_at_midnight_is_given_back_to_the_day_it_came_from(
    database: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gives it back looks at the clock of the next day, and never heard which day reserved it."""
    clock = Clock("2026-11-22T23:59:59+00:00")
    monkeypatch.setattr(timezone, "now", clock)

    def midnight() -> None:
        clock.set("2026-11-23T00:00:00+00:00")
        faults.go_down()

    async def story(point: int) -> None:
        clock.set("2026-11-22T23:59:59+00:00")
        await refused_or_given_back(ask(of(point)))

    points = asyncio.run(each_point(faults, midnight, story))
    assert points >= 6
    assert set(outcomes(database)) == {("cancelled", 0), ("completed", 0)}


def test_a_database_that_goes_down_anywhere_in_a_settlement_gets_it_when_it_is_up(
    database: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatnest.ledger.batcher.PATIENCE_SECONDS", 0.02)

    async def story(point: int) -> None:
        (hold,) = await aside(lambda: ledger.apply([ask(of(point))]))
        await batcher.settled(used(hold, 50))
        await aside(lambda: eventually(lambda: faults.happened or counters(of(point)) == (50, 0, 1)))

    points = asyncio.run(each_point(faults, faults.go_down, story))
    assert points >= 6
    assert outcomes(database) == [("completed", 50)] * (points + 1)
    assert counters("site") == (50 * (points + 1), 0, points + 1)


def test_what_could_not_be_settled_for_longer_than_a_lease_is_corrected(database: str, faults: Faults) -> None:
    """Another process has charged the whole hold meanwhile."""
    hold = do(ask())

    async def story() -> None:
        await batcher.query(lambda: faults.at(1, faults.go_down))
        batcher.settle(used(hold, 50))

    asyncio.run(story())
    eventually(lambda: faults.is_down)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timezone, "now", Clock("2126-01-01T00:00:00+00:00"))
        ledger.expire_overdue()
    assert counters() == (110, 0, 1)
    faults.off()
    eventually(lambda: counters() == (50, 0, 1))


def test_a_process_that_ends_after_an_outage_writes_all_that_it_kept(database: str, faults: Faults) -> None:
    holds = [hold for _ in range(3) for hold in ledger.apply([ask(f"user:{n}", site=10**9) for n in range(256)])]

    async def story() -> None:
        await batcher.query(lambda: faults.at(1, faults.go_down))
        for hold in holds:
            batcher.settle(used(hold, 50))
        with pytest.raises(LedgerUnavailable):
            await batcher.query(lambda: Reservation.objects.using(database).count())

    asyncio.run(story())
    faults.off()
    batcher.close()
    assert counters("site") == (50 * len(holds), 0, len(holds))


def test_a_process_that_ends_in_an_outage_says_what_it_leaves_to_the_leases(
    database: str, faults: Faults, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = do(ask())

    async def story() -> None:
        await batcher.query(lambda: faults.at(1, faults.go_down))
        batcher.settle(used(hold, 50))

    asyncio.run(story())
    batcher.close()
    assert "1 settlements unwritten" in caplog.text
    clock = Clock(timezone.now().isoformat())
    clock.move(31)
    monkeypatch.setattr(timezone, "now", clock)
    ledger.expire_overdue()
    assert counters(day=hold.day) == (110, 0, 1)


# A delay: whoever waited has gone when the answer comes.


@pytest.mark.parametrize("leaving", ["cancelled", "out of patience"])
def test_a_delay_anywhere_in_a_reservation_leaves_no_hold_of_who_did_not_wait(
    database: str, faults: Faults, leaving: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delayed, go_on = threading.Event(), threading.Event()

    def delay() -> None:
        delayed.set()
        assert go_on.wait(10)

    async def story(point: int) -> None:
        delayed.clear(), go_on.clear()
        with monkeypatch.context() as patch:
            if leaving == "out of patience":
                patch.setattr("chatnest.ledger.batcher.ANSWER_SECONDS", 0.02)
            asking = asyncio.ensure_future(batcher.reserve(ask(of(point))))
            await asyncio.sleep(0)  # it has begun to wait
        noticing = asyncio.ensure_future(asyncio.to_thread(delayed.wait, 10))
        await asyncio.wait([asking, noticing], return_when=asyncio.FIRST_COMPLETED)
        if leaving == "cancelled":
            asking.cancel()
        (answer,) = await asyncio.gather(asking, return_exceptions=True)
        delayed.set(), go_on.set()
        await noticing
        if isinstance(answer, Hold):  # nothing was delayed
            await aside(lambda: ledger.apply([used(answer, 0)]))
        elif not faults.happened:  # the machine was slower than the caller's patience
            await batcher.query(lambda: faults.at(point, delay))
            await story(point)

    points = asyncio.run(each_point(faults, delay, story))
    assert points >= 6
    eventually(lambda: not Reservation.objects.using(database).open().exists())
    assert len(outcomes(database)) >= points
    assert set(outcomes(database)) <= {("cancelled", 0), ("completed", 0)}


def test_a_delay_anywhere_in_a_settlement_does_not_lose_it(
    database: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatnest.ledger.batcher.PATIENCE_SECONDS", 0.02)
    go_on = threading.Event()

    async def story(point: int) -> None:
        go_on.clear()
        (hold,) = await aside(lambda: ledger.apply([ask(of(point))]))
        await batcher.settled(used(hold, 50))
        await aside(lambda: eventually(lambda: faults.happened or counters(of(point)) == (50, 0, 1)))
        go_on.set()

    points = asyncio.run(each_point(faults, lambda: go_on.wait(10), story))
    assert points >= 6
    eventually(lambda: outcomes(database) == [("completed", 50)] * (points + 1))


# A crash: the process is no more.


@pytest.mark.parametrize("operation", ["reserve", "settle"])
def test_a_crash_anywhere_loses_no_charge(
    database: str, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at each point. What was committed counts; the rest was never given out; leases charge in full."""
    do(given_back(do(ask("user:first"))))  # the site's row is there, so each point is the same for everyone
    questions = [ask(f"user:{operation}-{point}") for point in range(1, 60)]
    if operation == "settle":
        ledger.apply(questions)
    ids = tmp_path / "ids"
    ids.write_text("\n".join(str(question.id) for question in questions))
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
        "SECRET_KEY": "tests",
        "DATABASE_URL": url_of(connections[database].settings_dict),
    }
    crashing = subprocess.run(
        [sys.executable, "-m", "tests.crashes", operation, str(ids)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (crashing.returncode, crashing.stderr) == (0, "")
    points = int(crashing.stdout)
    assert 6 <= points < 50
    assert discrepancies() == []
    after_crash = [counters(question.payer) for question in questions[: points + 1]]
    if operation == "reserve":
        # Up to its COMMIT there is nothing; from there on there is a hold.
        assert after_crash == sorted(after_crash)
        assert {*after_crash} == {(0, 0, 0), (0, 110, 1)}
    else:
        assert after_crash == sorted(after_crash)
        assert {*after_crash} == {(0, 110, 1), (50, 0, 1)}
    clock = Clock(timezone.now().isoformat())
    clock.move(31)
    monkeypatch.setattr(timezone, "now", clock)
    ledger.expire_overdue()
    day = questions[0].day
    charged = [counters(question.payer, day)[0] for question in questions[: points + 1]]
    assert charged == [reserved or tokens for tokens, reserved, _ in after_crash]


# A cancel at each await of a whole request, from the first to the last.


@types.coroutine
def cancelled_at(point: int, coroutine: Any, passed: list[int]) -> Iterator[Any]:
    """Awaits a coroutine in a task that is cancelled where it waits for the nth time."""
    step, value = coroutine.send, None
    while True:
        try:
            waits_for = step(value)
        except StopIteration as end:
            return end.value
        passed.append(point)
        if len(passed) == point:
            asyncio.current_task().cancel()
        try:
            step, value = coroutine.send, (yield waits_for)
        except BaseException as error:
            step, value = coroutine.throw, error


@pytest.mark.parametrize(("task", "awaits"), [("process_request", 8), ("Chat._run", 4)], ids=["request", "pump"])
@pytest.mark.usefixtures("known_model")
def test_a_request_that_is_cancelled_at_any_await_holds_nothing_and_is_charged_if_it_was_billed(
    database: str, upstream: FakeUpstream, configure: Configure, task: str, awaits: int
) -> None:
    """The server cancels it there: the client has left, or the process ends."""
    configure(LEASE_SECONDS=3)
    body = json.dumps(HELLO).encode()
    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/api/chat",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
    }

    async def request(point: int) -> list[int]:
        passed: list[int] = []

        def begin(loop: asyncio.AbstractEventLoop, coroutine: Any, **context: Any) -> Any:
            if task in getattr(coroutine, "__qualname__", ""):  # Django cancels its own when a client leaves
                coroutine = awaiting(coroutine)
            return asyncio.Task(coroutine, loop=loop, **context)

        async def awaiting(coroutine: Any) -> Any:
            return await cancelled_at(point, coroutine, passed)

        async def send(message: dict[str, Any]) -> None:
            await asyncio.sleep(0)

        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        asyncio.get_running_loop().set_task_factory(begin)
        asking = application(scope, incoming.get, send)
        if task == "process_request" and django.VERSION >= (6, 1):  # where it has no task of its own
            asking = awaiting(asking)
        with suppress(asyncio.CancelledError):
            await asyncio.create_task(asking)
        return passed

    async def story() -> int:
        point, passed = 0, [0]
        while len(passed) >= point:
            point += 1
            upstream.reset()
            upstream.replies(Reply("one", " two", usage=None))
            passed = await request(point)
            await aside(check)
        return point - 1

    def check() -> None:
        """One call is one charge; and no call may mean no more than a hold that was given back."""
        rows = Reservation.objects.using(database)
        eventually(lambda: not rows.open().exists())
        charges = [row.tokens_charged for row in rows.filter(usage_source="counted")]
        assert len(charges) >= len(upstream.requests)
        assert all(charges)
        assert sum(rows.exclude(usage_source="counted").values_list("tokens_charged", flat=True)) == 0
        assert discrepancies() == []
        for model in (Reservation, DailyUsage, UsageLine, RateWindow):
            model._default_manager.using(database).all().delete()

    assert asyncio.run(story()) >= awaits

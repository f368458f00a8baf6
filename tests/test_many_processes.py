"""Four servers on one PostgreSQL, as four machines would be: one budget, whoever asks where, and whoever dies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections

from chatnest import ledger
from chatnest.ledger.audit import verify
from chatnest.limits import DEFAULT_PROFILES
from chatnest.models import Adjustment, DailyUsage, Profile, RateWindow, Reservation, UsageLine
from chatnest.testing import FakeUpstream, Reply

from .benchmarks import processes
from .bookkeeping import discrepancies
from .client import Client, RawStream
from .conftest import Configure, eventually
from .settings import POSTGRES

ALIAS = "processes"
HOLD = 10 + DEFAULT_PROFILES["balanced"].max_output_tokens  # of one "Hello!"
LEAST = 10 + 64  # the hold of the shortest answer that is worth beginning
SITE_LIMIT = 20_000
LEASE = 3.0


@dataclass
class Cluster:
    database: str
    upstream: FakeUpstream
    servers: list[processes.Serving]

    def another(self) -> AbstractContextManager[processes.Serving]:
        return processes.chatnest(
            self.database,
            self.upstream.url,
            application="project.asgi:application",
            SITE_DAILY_TOKEN_LIMIT=SITE_LIMIT,
            LEASE_SECONDS=LEASE,
            PROVIDERS={"default": {"TOKENIZER": "o200k_base"}},  # a hold's tokens are then known
        )

    def stream(self, n: int, payer: str | None = None) -> RawStream:
        """The nth client asks the nth server, and pays for itself."""
        client = Client(self.servers[n % len(self.servers)].port, connection="close")
        return client.stream(x_forwarded_for=payer or str(ip_address("198.18.0.0") + n))

    def at_once(self, clients: int, first: int = 0) -> list[RawStream]:
        with ThreadPoolExecutor(100) as threads:
            return list(threads.map(self.stream, range(first, first + clients)))

    def settled(self) -> list[Reservation]:
        eventually(lambda: not Reservation.objects.using(ALIAS).open().exists())
        assert discrepancies() == []
        assert verify() == []
        return list(Reservation.objects.using(ALIAS).order_by("created_at"))


def site_usage() -> DailyUsage:
    return DailyUsage.objects.using(ALIAS).get(account="site")


def finished(streams: Iterable[RawStream]) -> Counter[str]:
    """How each ended: ``done``, or the code of its refusal."""
    ends: Counter[str] = Counter()
    for stream in streams:
        with stream:
            ends[stream.rest()[-1][0] if stream.status == 200 else json.loads(stream._file.read())["code"]] += 1
    return ends


@pytest.fixture(scope="module")
def database(django_db_blocker: Any) -> Iterator[str]:
    """A database on the tests' PostgreSQL; as URL."""
    POSTGRES.psql(f"CREATE DATABASE {ALIAS}")
    known = {"default": {}, ALIAS: {**connections.settings["postgres"], "NAME": ALIAS}}
    connections.settings[ALIAS] = connections.configure_settings(known)[ALIAS]
    with django_db_blocker.unblock():
        call_command("migrate", database=ALIAS, verbosity=0)
        yield processes.url_of(connections.settings[ALIAS])
        connections[ALIAS].close()
        del connections[ALIAS], connections.settings[ALIAS]


@pytest.fixture(scope="module")
def four(database: str) -> Iterator[Cluster]:
    with FakeUpstream() as upstream, ExitStack() as ends, ThreadPoolExecutor(4) as threads:
        cluster = Cluster(database, upstream, [])
        cluster.servers += threads.map(lambda _: ends.enter_context(cluster.another()), range(4))
        yield cluster


@pytest.fixture
def cluster(four: Cluster, configure: Configure) -> Iterator[Cluster]:
    configure(DATABASE_ALIAS=ALIAS, LEASE_SECONDS=LEASE)
    four.upstream.reset()
    for model in (Reservation, Adjustment, DailyUsage, UsageLine, RateWindow):
        model._default_manager.using(ALIAS).all().delete()
    yield four
    four.upstream.release()
    eventually(lambda: not Reservation.objects.using(ALIAS).open().exists())
    connections[ALIAS].close()


def test_a_nearly_empty_budget_is_spent_to_its_last_token_and_never_one_over(cluster: Cluster) -> None:
    """Hundreds ask at once, each paying for itself; what the site has left is for fifty of them."""
    cluster.upstream.replies(Reply("Hi", gate_after=0, usage=(12, 2)))
    streams = cluster.at_once(300)
    admitted = [stream for stream in streams if stream.status == 200]
    refused = [stream for stream in streams if stream.status != 200]
    assert finished(refused) == {"daily_budget_exceeded": len(refused)}
    usage = site_usage()
    assert usage.tokens_used == 0
    assert usage.tokens_reserved <= SITE_LIMIT
    assert SITE_LIMIT - usage.tokens_reserved < LEAST, "somebody was refused who would have fitted"
    assert SITE_LIMIT // HOLD <= len(admitted) <= SITE_LIMIT // HOLD + 4
    cluster.upstream.wait_for_request(len(admitted))
    asked = [request.json["max_tokens"] for request in cluster.upstream.requests]
    assert sum(asked) + 10 * len(asked) == usage.tokens_reserved

    # They used little of what they held: all that is given back can be had.
    cluster.upstream.release()
    assert finished(admitted) == {"done": len(admitted)}
    assert {row.tokens_charged for row in cluster.settled()} == {14}
    assert site_usage().tokens_used == 14 * len(admitted)
    fitting = (SITE_LIMIT - 14 * len(admitted)) // HOLD
    cluster.upstream.replies(Reply("Hi", gate_after=0, usage=(12, 2)))
    again = cluster.at_once(fitting, first=300)  # who was refused is not asked for again within a second
    cluster.upstream.release()
    assert finished(again) == {"done": fitting}, "refused, though it would have fitted"
    assert len(cluster.settled()) == len(admitted) + fitting
    assert site_usage().tokens_used == 14 * (len(admitted) + fitting)


def test_one_payer_has_its_limits_once_and_not_once_a_process(cluster: Cluster) -> None:
    profile = Profile.objects.using(ALIAS).get(name="balanced")

    def ask(n: int) -> RawStream:
        return cluster.stream(n, payer="192.0.2.1")

    with ThreadPoolExecutor(40) as threads:
        cluster.upstream.replies(Reply("Hi", gate_after=0))
        streams = list(threads.map(ask, range(40)))
        cluster.upstream.release()
        at_once = profile.max_concurrent_streams
        assert finished(streams) == {"done": at_once, "too_many_streams": 40 - at_once}
        cluster.settled()

        # And as many a minute, whichever server it asks.
        total: Counter[str] = Counter(done=at_once)
        while not total["rate_limited"]:
            total += finished(threads.map(ask, range(8)))
            cluster.settled()
    assert total["done"] == len(cluster.upstream.requests) <= profile.rate_max_requests
    assert sum(row.count for row in RateWindow.objects.using(ALIAS)) == total["done"]


def test_a_worker_that_is_killed_leaves_no_token_uncharged_and_none_charged_twice(cluster: Cluster) -> None:
    """kill -9 in the middle of its answers. Each piece that the model was heard to say is paid for."""
    cluster.upstream.replies(Reply("one", " two", " three", gate_after=2, usage=(12, 3)))
    with cluster.another() as victim:
        served = replace(cluster, servers=[victim, *cluster.servers])
        streams = [served.stream(n) for n in range(40)]
        for stream in streams:
            stream.until("token"), stream.until("token")
        victim.process.kill()
        victim.process.wait()
    cut, others = streams[::5], [stream for n, stream in enumerate(streams) if n % 5]
    for stream in cut:
        with stream, pytest.raises((EOFError, ValueError, ConnectionError)):
            stream.until("done")
    cluster.upstream.wait_for_disconnect(len(cut))

    def expired() -> bool:
        """Whoever next looks; nobody else asks while the others' answers are held back."""
        ledger.expire_overdue()
        return Reservation.objects.using(ALIAS).filter(state="expired").count() >= len(cut)

    eventually(expired, seconds=2 * LEASE)
    cluster.upstream.release()
    assert finished(others) == {"done": 32}
    rows = cluster.settled()
    assert len(rows) == len(cluster.upstream.requests) == 40
    of_payer = {row.payer: row for row in rows}
    for n in range(40):
        row = of_payer[f"ip:198.18.0.{n}"]
        if n % 5:
            assert (row.state, row.outcome, row.tokens_charged) == ("settled", "completed", 15)
        else:
            assert (row.state, row.outcome, row.usage_source) == ("expired", "expired", "held")
            assert row.tokens_charged == row.tokens >= HOLD  # reports have taught two tokens more meanwhile
    assert not Adjustment.objects.using(ALIAS).exists()
    assert site_usage().tokens_used == sum(row.tokens_charged for row in rows)


def test_an_operators_edit_is_in_force_in_every_process_within_five_seconds(cluster: Cluster) -> None:
    def edit(tokens: int) -> None:
        Profile.objects.using(ALIAS).filter(name="balanced").update(max_output_tokens=tokens)

    def in_force(server: int) -> int:
        asked = len(cluster.upstream.requests)
        assert finished([cluster.stream(server, payer=str(ip_address("198.19.0.0") + asked))]) == {"done": 1}
        return int(cluster.upstream.requests[asked].json["max_tokens"])

    cluster.upstream.replies(Reply("Hi", usage=(1, 1)))
    assert [in_force(server) for server in range(4)] == [400] * 4
    for tokens in (123, 400):
        edit(tokens)
        eventually(lambda: [in_force(server) for server in range(4)] == [tokens] * 4, seconds=5)  # noqa: B023
    cluster.settled()

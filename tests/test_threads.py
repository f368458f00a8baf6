"""While answers stream, no request holds a thread or a database connection: else a few dozen would be the limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core import signals
from django.core.asgi import get_asgi_application
from django.db import close_old_connections, connections
from django.test import Client as DjangoClient

from chatnest.testing import FakeUpstream, Reply

from .client import Client
from .conftest import Settled, eventually, on_postgres, port_of, served

pytestmark = on_postgres

TOKEN = "a" * 32
PLAIN_MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]


class EverythingInPostgres:
    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "postgres"

    db_for_write = db_for_read


@pytest.fixture
def users_in_postgres(settings: Any) -> None:
    """Sessions and users too: what a request reads before it streams."""
    settings.DATABASE_ROUTERS = [EverythingInPostgres()]


@pytest.fixture
def plain_port(settings: Any) -> Iterator[int]:
    """A site that uses Django's own application and middleware, and none of chatnest's."""
    settings.MIDDLEWARE = PLAIN_MIDDLEWARE
    was_there = signals.request_finished.disconnect(close_old_connections)  # where asgiref lends no threads
    signals.request_finished.connect(close_old_connections)
    try:
        with served(get_asgi_application()) as server:
            yield port_of(server)
    finally:
        if not was_there:
            signals.request_finished.disconnect(close_old_connections)


@pytest.fixture(params=["chatnest's application", "Django's application"])
def site(request: pytest.FixtureRequest, client: Client, users_in_postgres: None) -> Client:
    return client if request.param.startswith("chatnest") else Client(request.getfixturevalue("plain_port"))


def logged_in(count: int) -> list[tuple[User, dict[str, str]]]:
    """Users, and the headers of their browsers."""
    users = User.objects.bulk_create(User(username=f"user{n}", password="!") for n in range(count))
    return [(user, headers_of(user)) for user in users]


def headers_of(user: User) -> dict[str, str]:
    browser = DjangoClient()
    browser.force_login(user)
    return {"cookie": f"sessionid={browser.cookies['sessionid'].value}; csrftoken={TOKEN}", "x_csrftoken": TOKEN}


def connections_held() -> int:
    """Of the test database, but for the one that asks."""
    with connections["postgres"].cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])


def test_twenty_open_answers_hold_one_connection_and_no_thread(
    site: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    """The connection is the ledger's."""
    upstream.replies(Reply("Hello", gate_after=1))
    browsers = logged_in(20)
    with ExitStack() as stack:
        threads = 0
        for n, (_, headers) in enumerate(browsers):
            stack.enter_context(site.stream(**headers)).until("token")
            if n == 1:  # by now whatever is kept for all requests is there
                eventually(lambda: connections_held() <= 1)
                threads = threading.active_count()
        eventually(lambda: connections_held() <= 1)
        eventually(lambda: threading.active_count() <= threads)
        # The request did ask who its user is, in that database.
        assert len(upstream.requests) == 20
        upstream.release()
    rows = settled()
    assert {row.payer for row in rows} == {f"user:{user.pk}" for user, _ in browsers}


def test_fifty_answers_that_are_asked_for_at_once_are_all_given(
    site: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply("Hello", gate_after=1))
    browsers = logged_in(50)
    with ThreadPoolExecutor(50) as people:
        answers = [people.submit(site.chat, **headers) for _, headers in browsers]
        upstream.wait_for_pieces(50)
        # All of them are open now.
        eventually(lambda: connections_held() <= 1)
        assert site.usage(**browsers[0][1])["reservedToday"] == 410
        upstream.release()
        assert [answer.result().events[-1] for answer in answers] == ["done"] * 50
    assert len(settled()) == 50
    eventually(lambda: connections_held() <= 1)


def test_when_all_is_over_no_connection_is_left(site: Client, settled: Settled) -> None:
    ((_, headers),) = logged_in(1)
    for _ in range(5):
        assert site.chat(**headers).events[-1] == "done"
        assert site.usage(**headers)["remainingToday"] > 0
        assert site.request("GET", "/", **headers).status == 200
    settled()
    eventually(lambda: connections_held() <= 1)

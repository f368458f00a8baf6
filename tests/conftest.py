"""Two databases, a real upstream, a real server: what the stories happen on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from chatnest.batcher import batcher
from chatnest.models import Reservation
from chatnest.testing import FakeUpstream
from django.core.asgi import get_asgi_application

from .client import Client


def _on(alias: str, *databases: str) -> Any:
    return pytest.param(
        alias,
        id={"default": "sqlite"}.get(alias, alias),
        marks=pytest.mark.django_db(transaction=True, databases=list(databases)),
    )


@pytest.fixture(params=[_on("default", "default"), _on("postgres", "default", "postgres")])
def database(request: pytest.FixtureRequest, configure: Callable[..., None]) -> Iterator[str]:
    """The alias of the database that the ledger lives in; each test that asks for it runs on both."""
    configure(DATABASE_ALIAS=request.param)
    batcher.forget_policy()
    yield request.param
    batcher.close()


@pytest.fixture
def configure(settings: Any) -> Callable[..., None]:
    """Change ``CHATNEST`` for one test: ``configure(ALLOW_ANONYMOUS=False)``."""

    def configure(**changes: Any) -> None:
        settings.CHATNEST = {**settings.CHATNEST, **changes}
        batcher.forget_policy()

    return configure


@pytest.fixture
def upstream(configure: Callable[..., None]) -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        configure(OPENAI_BASE_URL=upstream.url)
        yield upstream


@pytest.fixture(scope="session")
def server_port() -> Iterator[int]:
    """The site served by uvicorn from a thread, so that a test's settings and clock are the server's too."""
    config = uvicorn.Config(get_asgi_application(), port=0, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture
def client(server_port: int, database: str, upstream: FakeUpstream) -> Client:
    """An anonymous client of the real server, on each database, before the scripted upstream."""
    return Client(server_port)


@pytest.fixture
def settled(database: str) -> Callable[[], list[Reservation]]:
    """All reservations, oldest first, once none is open: a client that left does not wait for its settlement."""

    def settled() -> list[Reservation]:
        rows = Reservation.objects.using(database)
        eventually(lambda: not rows.open().exists())
        return list(rows.order_by("created_at"))

    return settled


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for what another process or thread is about to make true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.005)

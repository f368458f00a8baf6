"""A process begins and ends, under each server that a site may have: whoever ends it politely loses nothing.

https://asgi.readthedocs.io/en/latest/specs/lifespan.html, and what is done where a server has no such thing.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, time, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from asgiref.testing import ApplicationCommunicator
from django.db import connections

from chatnest.asgi import for_streaming
from chatnest.models import Reservation
from chatnest.testing import FakeUpstream, Reply

from .benchmarks import processes
from .benchmarks.machine import ROOT
from .client import Client
from .conftest import eventually, not_here

SITE = "project.asgi:application"
# What each is called, the module that must be there, and how it is told to end its streams within a second or two.
SERVERS = {
    "uvicorn": ("uvicorn", "-m uvicorn {site} --port {port} --timeout-graceful-shutdown 1"),
    "gunicorn": ("uvicorn_worker", "-m gunicorn {site} -k tests.gunicorn_worker.Worker -b 127.0.0.1:{port}"),
    "hypercorn": ("hypercorn", "-m hypercorn {site} --bind 127.0.0.1:{port} --graceful-timeout 1"),
    "daphne": ("daphne", "-m daphne -b 127.0.0.1 -p {port} {site}"),  # has no lifespan
    "granian": ("granian", "-m granian --interface asgi --host 127.0.0.1 --port {port} {site}"),
}
WAITS_FOR_STREAMS = {"granian"}  # however long, and then kills: what is open is charged by its lease


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lifecycle") / "empty.sqlite3"
    migrate = [sys.executable, "manage.py", "migrate", "-v0"]
    subprocess.run(migrate, cwd=ROOT, env={**os.environ, **environment(f"sqlite:///{file}", "")}, check=True)
    return file


def environment(url: str, upstream: str) -> dict[str, str]:
    return {
        "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
        "SECRET_KEY": "lifecycle",
        "DEBUG": "",
        "DATABASE_URL": url,
        "OPENAI_API_KEY": "sk-lifecycle",
        "OPENAI_BASE_URL": upstream,
    }


class Site:
    def __init__(self, file: Path, upstream: FakeUpstream, serving: processes.Serving) -> None:
        self.file, self.upstream, self.serving = file, upstream, serving

    def stream(self, address: str) -> Any:
        return Client(self.serving.port, connection="close").stream(x_forwarded_for=address)

    def reservations(self) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.file)) as connection:
            query = "SELECT payer, state, outcome FROM chatnest_reservation ORDER BY payer"
            return connection.execute(query).fetchall()

    def end(self) -> None:
        self.serving.process.terminate()
        self.serving.process.wait(30)


@contextmanager
def site(name: str, tables: Path, folder: Path) -> Iterator[Site]:
    module, command = SERVERS[name]
    if find_spec(module) is None:
        not_here(f"{name} is not installed")
    file = Path(shutil.copy(tables, folder / "site.sqlite3"))
    port = processes.free_port()
    arguments = command.format(site=SITE, port=port).split()
    with (
        FakeUpstream() as upstream,
        processes.serving(
            sys.executable, *arguments, port=port, env=environment(f"sqlite:///{file}", upstream.url)
        ) as serving,
    ):
        yield Site(file, upstream, serving)


@pytest.mark.parametrize("name", SERVERS)
def test_a_polite_end_settles_what_it_can(name: str, tables: Path, tmp_path: Path) -> None:
    with site(name, tables, tmp_path) as running, ExitStack() as readers:
        running.upstream.replies(Reply("Hello", " world", gate_after=1))
        left, *stay = [readers.enter_context(running.stream(f"198.18.0.{n}")) for n in (1, 2, 3)]
        for stream in (left, *stay):
            stream.until("token")  # it streams: the model is still at it
        left.leave()
        running.upstream.wait_for(lambda: running.upstream.open_connections == len(stay))
        eventually(lambda: ("ip:198.18.0.1", "settled", "cancelled") in running.reservations())
        if name in WAITS_FOR_STREAMS:
            for stream in stay:
                stream.leave()
            running.upstream.wait_for(lambda: running.upstream.open_connections == 0)

        running.end()

        assert [row[1:] for row in running.reservations()] == [("settled", "cancelled")] * 3
        running.upstream.wait_for(lambda: running.upstream.open_connections == 0)


async def site_of_its_own(scope: Any, receive: Any, send: Any) -> None:
    """A site whose application answers lifespan itself, as Starlette's do."""
    for event in ("startup", "shutdown"):
        assert await receive() == {"type": f"lifespan.{event}"}
        scope["state"].append(event)
        await send({"type": f"lifespan.{event}.complete"})


async def one_that_breaks(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise RuntimeError("the site's own startup failed")


async def test_a_site_that_has_a_lifespan_keeps_it() -> None:
    seen: list[str] = []
    server = ApplicationCommunicator(for_streaming(site_of_its_own), {"type": "lifespan", "state": seen})
    for event in ("startup", "shutdown"):
        await server.send_input({"type": f"lifespan.{event}"})
        assert await server.receive_output() == {"type": f"lifespan.{event}.complete"}
    await server.wait()
    assert seen == ["startup", "shutdown"]


async def test_a_site_whose_own_start_fails_is_not_started() -> None:
    server = ApplicationCommunicator(for_streaming(one_that_breaks), {"type": "lifespan"})
    await server.send_input({"type": "lifespan.startup"})
    with pytest.raises(RuntimeError, match="own startup"):
        await server.wait()


# And a site whose clock has no zone.


def test_with_use_tz_off_a_day_is_the_sites_own_and_adds_up(database: str) -> None:
    url = processes.url_of(connections[database].settings_dict)
    port = processes.free_port()
    serve = f"-m uvicorn {SITE} --port {port} --timeout-graceful-shutdown 1".split()
    with FakeUpstream() as upstream:
        env = {**environment(url, upstream.url), "DJANGO_SETTINGS_MODULE": "tests.naive_settings"}
        with processes.serving(sys.executable, *serve, port=port, env=env):
            client = Client(port, connection="close")
            assert [client.chat().events[-1] for _ in range(2)] == ["done", "done"]
            standing = client.usage()
            assert standing["usedToday"] == 28
            midnight = datetime.fromisoformat(standing["resetsAt"]).astimezone(ZoneInfo("Europe/Berlin"))
            assert midnight.time() == time()
            assert timedelta(0) < midnight - datetime.now(UTC) <= timedelta(hours=25)
            with client.stream() as stream:
                stream.until("token")
            eventually(lambda: not Reservation.objects.using(database).open().exists())
        for command in ("chatnest_usage", "chatnest_verify"):
            subprocess.run([sys.executable, "manage.py", command], cwd=ROOT, env={**os.environ, **env}, check=True)

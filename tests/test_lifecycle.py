"""A worker's life under each ASGI server: it streams, it hears who leaves, and told to end it settles what it can."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
from asgiref.sync import ThreadSensitiveContext
from django.core.asgi import get_asgi_application
from django.db import connections

from chatnest import stream as stream_module
from chatnest import tokens
from chatnest.asgi import for_streaming, threads
from chatnest.ledger.batcher import batcher
from chatnest.ledger.charges import IN_FLIGHT
from chatnest.models import Reservation
from chatnest.slots import StreamSlot
from chatnest.stream import ChatStream, end_streams
from chatnest.testing import FakeUpstream, Reply
from chatnest.views import open_stream
from chatnest.wires import ChatRequest, Message

from .benchmarks.processes import Serving, environment, free_port, serving, url_of
from .client import Client
from .conftest import Configure, EditProfile, Settled, eventually, on_sqlite, port_of, served
from .test_call import Silent

PATIENCE_SECONDS = 90  # a server that starts takes its time on a busy machine
OPEN = 4

SITE = "project.asgi:application"
SERVERS = {
    "uvicorn": f"uvicorn {SITE} --port {{port}} --timeout-graceful-shutdown 1",
    "uvicorn without a timeout": f"uvicorn {SITE} --port {{port}}",
    "uvicorn without lifespan": f"uvicorn {SITE} --port {{port}} --lifespan off --timeout-graceful-shutdown 5",
    "uvicorn without for_streaming": "uvicorn django.core.asgi:get_asgi_application --factory --port {port}",
    "gunicorn": f"gunicorn {SITE} -k uvicorn_worker.UvicornWorker -b 127.0.0.1:{{port}}",
    "granian": f"granian {SITE} --interface asgi --port {{port}}",
    "hypercorn": f"hypercorn {SITE} -b 127.0.0.1:{{port}} --graceful-timeout 1",
    "daphne": f"daphne {SITE} -p {{port}}",
}
# Of the site in a file that is saved again; gunicorn with SIGHUP, since uvicorn's worker does not heed --reload.
# daphne has none.
RELOADING = {
    "uvicorn": "uvicorn edited:application --port {port} --reload --reload-dir {folder}",
    "hypercorn": "hypercorn edited:application -b 127.0.0.1:{port} --reload --graceful-timeout 1",
    "gunicorn": "gunicorn edited:application -k uvicorn_worker.UvicornWorker -b 127.0.0.1:{port}",
    "granian": "granian edited:application --interface asgi --port {port} --reload --reload-paths {folder}",
}
# It awaits its asyncio.Server's wait_closed(), which since 3.12 waits for open connections, before its timeout begins:
# https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.Server.wait_closed
waits = pytest.mark.xfail(sys.version_info >= (3, 12), reason="hypercorn waits for open answers", run=False)
CLOSE_FIRST = ("uvicorn", "hypercorn", "daphne")  # the connections of their readers

Serve = Callable[..., Serving]


def each(servers: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=waits if name == "hypercorn" else ()) for name in servers]


@pytest.fixture
def serve(database: str, upstream: FakeUpstream, known_model: object) -> Iterator[Serve]:
    """The site in a process of its own, under a server that a team may have chosen.

    ``serve(SERVERS["daphne"], GAP_SECONDS=1)``
    """
    with ExitStack() as processes:

        def serve(line: str, *, folder: Path | None = None, **changes: Any) -> Serving:
            package = line.split()[0]
            if not find_spec(package) and not os.environ.get("CI"):
                pytest.skip(f"{package} is not installed")
            port = free_port()
            command = (sys.executable, "-m", *line.format(port=port, folder=folder).split())
            env = environment(url_of(connections[database].settings_dict), upstream.url, **changes)
            return processes.enter_context(serving(*command, port=port, env=env))

        yield serve


@pytest.mark.parametrize("name", each(SERVERS))
@on_sqlite
def test_a_server_streams_and_hears_who_leaves_and_settles_all_it_can_before_it_ends(
    name: str, serve: Serve, upstream: FakeUpstream, settled: Settled, database: str
) -> None:
    upstream.replies(Reply("one", " two", " three", gate_after=2))
    server = serve(SERVERS[name])
    client = Client(server.port)
    with client.stream(x_forwarded_for="10.0.0.0") as reader:
        assert [reader.until("token")[1] for _ in range(2)] == ['"one"', '" two"']  # the model has not said more
    upstream.wait_for_disconnect()
    (left,) = settled()
    assert (left.outcome, left.usage_source) == ("cancelled", "counted")

    with ExitStack() as readers:
        streams = [readers.enter_context(client.stream(x_forwarded_for=f"10.0.0.{n + 1}")) for n in range(OPEN)]
        for stream in streams:
            stream.until("token"), stream.until("token")
        server.process.terminate()
        server.process.wait(PATIENCE_SECONDS)
        if name not in CLOSE_FIRST:
            for stream in streams:
                ((event, data),) = stream.rest()
                assert event == "error" and '"code":"overloaded","retryable":true' in data
    upstream.wait_for_disconnect(1 + OPEN)
    rows = Reservation.objects.using(database).exclude(pk=left.pk)
    ends = [(row.state, row.outcome, row.usage_source, row.tokens_charged - row.prompt_tokens) for row in rows]
    assert ends == [("settled", "cancelled", "counted", 2 + IN_FLIGHT)] * OPEN, server.log.read_text()
    said = server.log.read_text()
    assert said.count(" INFO chatnest.chat: Chat cancelled: ") == 1 + OPEN
    assert said.count(" chatnest") == 1 + OPEN, "the package has complained"


@pytest.mark.parametrize("name", each(RELOADING))
@on_sqlite
def test_a_server_that_reloads_settles_what_was_open_and_serves_what_was_saved(
    name: str, serve: Serve, upstream: FakeUpstream, settled: Settled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from project.asgi import application\n\nprint('loaded', {number}, flush=True)\n"
    site = tmp_path / "edited.py"
    site.write_text(code.format(number=1))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    upstream.replies(Reply("one", " two", gate_after=1))
    server = serve(RELOADING[name], folder=tmp_path)
    client = Client(server.port)
    with client.stream() as stream:
        stream.until("token")
        site.write_text(code.format(number=2))
        if name == "gunicorn":
            server.process.send_signal(signal.SIGHUP)
        upstream.wait_for_disconnect(timeout=PATIENCE_SECONDS)
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("cancelled", "counted"), server.log.read_text()
    upstream.replies(Reply("three"))
    eventually(lambda: "loaded 2" in server.log.read_text(), PATIENCE_SECONDS)

    def answers() -> bool:
        with suppress(ConnectionError):
            return '"three"' in client.chat().text
        return False

    eventually(answers, PATIENCE_SECONDS)


@on_sqlite
def test_an_answer_that_is_read_on_unseen_is_settled_too(serve: Serve, upstream: FakeUpstream, database: str) -> None:
    """No server knows of it: its request is over."""
    upstream.replies(Reply("one", " two", gate_after=1))
    server = serve(SERVERS["uvicorn"], ON_DISCONNECT="drain")
    with Client(server.port).stream(x_forwarded_for="10.0.0.0") as reader:
        reader.until("token")
    server.process.terminate()
    server.process.wait(PATIENCE_SECONDS)
    row = Reservation.objects.using(database).get()
    assert (row.state, row.outcome, row.tokens_charged) == ("settled", "cancelled", row.tokens)


@on_sqlite
def test_an_answer_may_still_come_to_its_end(serve: Serve, upstream: FakeUpstream, settled: Settled) -> None:
    upstream.replies(Reply("one", " two", gate_after=1))
    server = serve(SERVERS["uvicorn without a timeout"])
    with Client(server.port).stream(x_forwarded_for="10.0.0.0") as reader:
        reader.until("token")
        server.process.terminate()
        eventually(lambda: "Waiting for connections to close" in server.log.read_text())
        upstream.release()
        assert reader.rest()[-1][0] == "done"
    server.process.wait(PATIENCE_SECONDS)
    assert [row.outcome for row in settled()] == ["completed"]


# Between a reservation and its stream.


@on_sqlite
def test_a_hold_whose_stream_has_not_begun_is_given_back_at_the_end(
    database: str, upstream: FakeUpstream, settled: Settled
) -> None:
    async def story() -> bytes:
        stream = await a_stream()
        await end_streams()
        return b"".join([frames async for frames in stream])

    frames = asyncio.run(story())
    assert frames.startswith(b"event: start\ndata: \n\nevent: error\n") and b'"code":"overloaded"' in frames
    batcher.close()
    (row,) = settled()
    assert (row.outcome, row.tokens_charged) == ("cancelled", 0)
    assert not upstream.requests


@on_sqlite
def test_a_hold_whose_stream_is_kept_and_never_read_is_given_back(
    database: str, upstream: FakeUpstream, settled: Settled, configure: Configure
) -> None:
    configure(LEASE_SECONDS=3)

    def aside() -> list[Reservation]:
        try:
            return settled()
        finally:
            connections[database].close()  # this thread's own: nobody else would

    async def story() -> bytes:
        stream = await a_stream()
        (row,) = await asyncio.to_thread(aside)
        assert (row.outcome, row.tokens_charged) == ("cancelled", 0)
        return b"".join([frames async for frames in stream])

    frames = asyncio.run(story())
    assert frames.startswith(b"event: start\ndata: \n\nevent: error\n") and b'"code":"overloaded"' in frames
    assert not upstream.requests


@on_sqlite
def test_a_hold_that_is_committed_while_the_process_ends_is_given_back(
    database: str, upstream: FakeUpstream, settled: Settled
) -> None:
    """The reservation is at its commit, and so late that lifespan's end has begun."""

    async def story() -> list[bytes]:
        committing, go_on = threading.Event(), threading.Event()

        def held(execute: Any, sql: str, *arguments: Any) -> Any:
            if "INSERT" in sql and "chatnest_reservation" in sql:
                committing.set()
                assert go_on.wait(10)
            return execute(sql, *arguments)

        await batcher.query(lambda: connections[database].execute_wrappers.append(held))
        asking = asyncio.create_task(a_stream())
        await asyncio.to_thread(committing.wait, 10)
        ending = asyncio.create_task(lifespan_ends())
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(eventually, lambda: loop in stream_module._ending)
        go_on.set()
        await ending
        return [frames async for frames in await asking]

    frames = asyncio.run(story())
    assert b'"code":"overloaded"' in frames[0]
    assert not Reservation.objects.using(database).open().exists()  # though nobody closed the ledger since
    assert [(row.outcome, row.tokens_charged) for row in settled()] == [("cancelled", 0)]
    assert not upstream.requests


async def a_stream() -> ChatStream:
    """As the view makes one."""
    accounts = ["user:1", "site"]
    asked = ChatRequest(messages=(Message("user", "Hello!"),), profile="balanced")
    terms = (await batcher.policy(accounts)).terms(accounts, "balanced")
    with StreamSlot.acquire(stranger=False) as slot:
        return await open_stream(asked, terms, slot)


async def lifespan_ends() -> None:
    """What a server says to a worker that is told to end."""
    events = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(events)}

    async def send(message: Any) -> None: ...

    await for_streaming(has_nothing_to_say)({"type": "lifespan"}, receive, send)


# Lifespan, which a site's own application may answer too.


async def answers(scope: Any, receive: Any, send: Any) -> None:
    for _ in range(2):
        await send({"type": f"{(await receive())['type']}.complete"})


async def hears_and_refuses(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError(await receive())


async def breaks_later(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": f"{(await receive())['type']}.complete"})
    raise ValueError


async def has_nothing_to_say(scope: Any, receive: Any, send: Any) -> None:
    return


async def cannot_start(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no cache"})
    raise ValueError


def said_by(application: Any) -> list[str]:
    """What a server hears of a worker."""
    events = iter(["lifespan.startup", "lifespan.shutdown"])
    said = []

    async def receive() -> Any:
        return {"type": next(events)}

    async def send(message: Any) -> None:
        said.append(message["type"])

    asyncio.run(for_streaming(application)({"type": "lifespan"}, receive, send))
    return said


@pytest.mark.parametrize("site", [answers, hears_and_refuses, breaks_later, has_nothing_to_say, get_asgi_application()])
@on_sqlite
def test_a_worker_starts_and_ends_whatever_the_site_makes_of_it(site: Any, database: str) -> None:
    assert said_by(site) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@on_sqlite
def test_a_site_that_cannot_start_does_not(database: str) -> None:
    assert said_by(cannot_start) == ["lifespan.startup.failed"]


@on_sqlite
def test_the_ledger_is_there_before_the_first_request_and_ends_with_the_last(database: str) -> None:
    threads_then: list[Any] = []

    async def looks(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        threads_then.append(batcher._thread)
        await send({"type": "lifespan.startup.complete"})

    said_by(looks)
    assert threads_then[0].name == "chatnest-ledger"
    assert not threads_then[0].is_alive()


@on_sqlite
def test_every_vocabulary_is_loaded_before_the_first_request(
    database: str, edit_profile: EditProfile, configure: Configure
) -> None:
    edit_profile("expanded", model="gpt-4")
    edit_profile("balanced", provider="gone")
    configure(PROVIDERS={"gone": {"BASE_URL": "http://127.0.0.1:9"}})
    tokens._tokenizer.cache_clear()
    said_by(has_nothing_to_say)
    assert tokens._tokenizer.cache_info().misses == 2  # gpt-4o-mini's, and gpt-4's
    assert tokens._tokenizer("cl100k_base") and tokens._tokenizer("o200k_base")
    assert tokens._tokenizer.cache_info().misses == 2


@on_sqlite
def test_what_the_ledger_logs_is_not_filed_under_the_request_that_woke_it(database: str) -> None:
    """Sentry hands a thread the data of whoever starts it."""
    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=Silent)
    try:
        with sentry_sdk.isolation_scope() as request:
            request.set_tag("visitor", "the first")
            tags = asyncio.run(batcher.query(lambda: sentry_sdk.get_isolation_scope()._tags))
    finally:
        sentry_sdk.get_client().close()
        sentry_sdk.init()
    assert tags == {}


# The first request.


@pytest.mark.parametrize(
    ("starts", "is_ready"),
    [("from django.core.asgi import get_asgi_application as setup", True), ("from django import setup", False)],
    ids=["a server", "a command"],
)
def test_what_freezes_a_worker_is_done_before_anybody_asks_it(starts: str, is_ready: bool) -> None:
    """Without for_streaming too. To load the tokenizer takes a second in which nothing else runs, in any thread."""
    script = f"""
import sys
{starts}
setup()
from chatnest import tokens
print(bool(tokens._tokenizer.cache_info().currsize), "openai" in sys.modules, end="")
"""
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "project.settings"}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert ran.stdout == f"{is_ready} {is_ready}", ran.stderr


@on_sqlite
def test_an_asgiref_that_lends_no_threads_serves_with_its_own(
    database: str, upstream: FakeUpstream, settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Before313(ThreadSensitiveContext):
        def __init__(self) -> None:
            super().__init__()

    monkeypatch.setattr(threads, "ThreadSensitiveContext", Before313)
    with served(for_streaming(get_asgi_application())) as server:
        assert Client(port_of(server)).chat().events[-1] == "done"
    settled()

"""The reader leaves: by a closed tab, at any moment, in every way that a server can tell Django or fail to.

The upstream connection ends at once, and what was used is settled. Through a real server and a raw socket first,
then through the ASGI interface, where every moment can be chosen.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import statistics
import struct
import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIRequest
from django.db import connections, transaction
from django.test import AsyncRequestFactory
from django.utils.decorators import async_only_middleware

from chatnest.ledger.batcher import batcher
from chatnest.ledger.charges import IN_FLIGHT
from chatnest.models import DailyUsage, Reservation
from chatnest.testing import FakeUpstream, Reply
from chatnest.views import chat
from project.asgi import application

from .client import HELLO, Client
from .conftest import Configure, EditProfile, Settled, on_sqlite, stalled

pytestmark = pytest.mark.usefixtures("known_model")

HELLO_BOUND = 10
ALLOWANCE = 400
PROMPTLY = 0.1
BODY = json.dumps(HELLO).encode()
SCOPE: dict[str, Any] = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/api/chat",
    "raw_path": b"/api/chat",
    "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 50_000),
    "server": ("127.0.0.1", 80),
}


def only(rows: list[Reservation], outcome: str, source: str, tokens: int) -> None:
    (row,) = rows
    assert (row.outcome, row.usage_source, row.tokens_charged) == (outcome, source, tokens)


def nothing_is_held(database: str) -> None:
    assert sum(DailyUsage.objects.using(database).values_list("tokens_reserved", flat=True)) == 0


# Through a real server.


@pytest.mark.parametrize("point", [-1, 0, 1], ids=["before its head", "before its first piece", "between pieces"])
def test_a_closed_tab_ends_the_answer_and_what_was_used_is_charged(
    client: Client, upstream: FakeUpstream, settled: Settled, database: str, point: int
) -> None:
    upstream.replies(Reply("Hello", " world", gate_after=point))
    with client.stream() as stream:
        stream.until("token" if point == 1 else "start")
        upstream.wait_for_request()
    upstream.wait_for_disconnect()
    only(settled(), "cancelled", "counted", HELLO_BOUND + IN_FLIGHT + max(point, 0))
    nothing_is_held(database)


@on_sqlite
@pytest.mark.parametrize(
    "reply", [Reply("x", gate_after=1), Reply.endless("x ", interval=0.01)], ids=["silent", "busy"]
)
def test_the_upstream_is_closed_within_a_tenth_of_a_second(
    client: Client, upstream: FakeUpstream, settled: Settled, reply: Reply
) -> None:
    upstream.replies(reply)
    took = []
    for n in range(1, 8):
        with client.stream() as stream:
            stream.until("token")
            left = time.monotonic()
        took.append(upstream.wait_for_disconnect(n) - left)
    assert statistics.median(took) < PROMPTLY
    assert {row.outcome for row in settled()} == {"cancelled"}


@on_sqlite
def test_many_tabs_are_closed_at_once(
    client: Client, upstream: FakeUpstream, settled: Settled, edit_profile: EditProfile, database: str
) -> None:
    edit_profile(max_concurrent_streams=16)
    upstream.replies(Reply("x", gate_after=1))
    streams = [client.stream() for _ in range(16)]
    for stream in streams:
        stream.until("token")
    left = time.monotonic()
    for stream in streams:
        stream.leave()
    upstream.wait_for_disconnect(16)
    assert statistics.median(upstream.disconnects) - left < PROMPTLY
    assert [(row.outcome, row.tokens_charged) for row in settled()] == [("cancelled", HELLO_BOUND + IN_FLIGHT + 1)] * 16
    nothing_is_held(database)


@on_sqlite
def test_a_connection_that_is_reset_is_a_closed_tab_too(
    client: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply("Hello", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    upstream.wait_for_disconnect()
    only(settled(), "cancelled", "counted", HELLO_BOUND + IN_FLIGHT + 1)


@on_sqlite
@pytest.mark.usefixtures("generous")
def test_a_reader_who_took_nothing_for_long_may_leave_too(
    client: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    """Every buffer on the way is full by then, so the server waits for room to send."""
    upstream.replies(Reply.endless("x" * 50_000))
    with client.stream() as stream:
        stream.until("token")
        stalled(upstream, seconds=0.3)
        left = time.monotonic()
    assert upstream.wait_for_disconnect() - left < 5 * PROMPTLY
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("cancelled", "held"), "the provider was ahead by all of that"


@on_sqlite
def test_whoever_hangs_up_right_after_asking_leaves_nothing_behind(
    client: Client, upstream: FakeUpstream, settled: Settled, database: str, edit_profile: EditProfile
) -> None:
    """At whatever moment the server happens to notice."""
    edit_profile(rate_max_requests=60, max_concurrent_streams=16)
    upstream.replies(Reply("Hello", gate_after=-1))
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(head % len(BODY) + BODY)
    upstream.release()
    client.chat()  # by its turn, the server has seen them all
    rows = settled()
    upstream.wait_for(lambda: upstream.open_connections <= 1)
    nothing_is_held(database)
    for row in rows:
        assert row.outcome in ("cancelled", "completed")
        assert row.tokens_charged in (0, HELLO_BOUND + IN_FLIGHT, HELLO_BOUND + IN_FLIGHT + 1, 13)


@on_sqlite
def test_half_a_request_is_none(client: Client, upstream: FakeUpstream) -> None:
    head = (
        b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.sendall(head + BODY)
    assert client.chat().status == 200
    assert len(upstream.requests) == Reservation.objects.count() == 1


@on_sqlite
def test_a_place_and_a_slot_are_free_again_once_their_reader_has_left(
    client: Client, upstream: FakeUpstream, settled: Settled, configure: Configure, edit_profile: EditProfile
) -> None:
    configure(MAX_STREAMS_PER_PROCESS=1)
    edit_profile(max_concurrent_streams=1)
    upstream.replies(Reply("Hello", gate_after=1))
    for _ in range(3):
        with client.stream() as stream:
            assert stream.until("token")
        settled()
    upstream.release()
    assert client.chat().events[-1] == "done"


@on_sqlite
def test_an_early_report_is_not_the_whole_cost(client: Client, upstream: FakeUpstream, settled: Settled) -> None:
    """Some providers report at the beginning, with a completion of one token, and again only at the end."""
    early = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}}
    upstream.replies(Reply(early, *["word "] * 200, gate_after=201))
    with client.stream() as stream:
        text = ""
        while len(text) < 5 * 200:
            text += json.loads(stream.until("token")[1])
    upstream.wait_for_disconnect()
    (row,) = settled()
    assert row.tokens_charged >= 9 + 200


# Instead of ending the answer: letting it end, for a provider that bills all of it anyway.


@on_sqlite
@pytest.mark.parametrize("point", [-1, 1], ids=["before its head", "between pieces"])
def test_an_answer_can_be_drained_to_learn_what_it_cost(
    client: Client, upstream: FakeUpstream, settled: Settled, configure: Configure, point: int
) -> None:
    configure(ON_DISCONNECT="drain")
    upstream.replies(Reply("Hello", *[" world"] * 10, usage=(9, 33), gate_after=point, pause=0.03))
    with client.stream() as stream:
        stream.until("token" if point == 1 else "start")
        upstream.wait_for_request()
    upstream.release()
    only(settled(), "cancelled", "reported", 42)
    assert upstream.disconnects == []
    assert upstream.pieces_sent == 11


@on_sqlite
@pytest.mark.parametrize(
    ("reply", "source", "tokens"),
    [
        (Reply("Hello", gate_after=1), "held", HELLO_BOUND + ALLOWANCE),
        (Reply("Hello", gate_after=0), "held", HELLO_BOUND + ALLOWANCE),
        (Reply("Hello", *["x"] * 5, b"data: {oops\n\n", pause=0.03), "reported", 12 + 6),
    ],
    ids=["silent", "silent from the start", "broken"],
)
def test_a_drain_ends_as_an_answer_would(
    client: Client,
    upstream: FakeUpstream,
    settled: Settled,
    configure: Configure,
    reply: Reply,
    source: str,
    tokens: int,
) -> None:
    """Where its end was not read, it may have been billed to its end all the same: that is why it is drained."""
    configure(ON_DISCONNECT="drain", GAP_SECONDS=0.3, FIRST_TOKEN_SECONDS=0.5)
    upstream.replies(reply)
    with client.stream() as stream:
        stream.until("start")
        upstream.wait_for_request()
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("cancelled", source)
    assert row.tokens_charged == tokens
    assert len(upstream.requests) == 1


@on_sqlite
def test_a_drain_does_not_go_on_for_ever(
    client: Client, upstream: FakeUpstream, settled: Settled, configure: Configure
) -> None:
    configure(ON_DISCONNECT="drain", MAX_STREAM_SECONDS=0.5)
    upstream.replies(Reply.endless("x "))
    with client.stream() as stream:
        stream.until("token")
    upstream.wait_for_disconnect()
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("cancelled", "counted")


@on_sqlite
def test_a_drain_that_was_not_yet_asked_for_is_no_call(
    upstream: FakeUpstream, settled: Settled, configure: Configure
) -> None:
    configure(ON_DISCONNECT="drain")
    asyncio.run(left_in_send("http.response.start"))
    only(settled(), "cancelled", "none", 0)
    assert upstream.requests == []


# Through the ASGI interface.


async def left_in_send(blocked_by: str | bytes, app: Any = application) -> float:
    """A reader who leaves while the server waits in a ``send``; answers when, once the application has ended.

    ``blocked_by``: the type of the message, or the start of the body, whose send never returns.
    """
    blocked, left = asyncio.Event(), asyncio.Event()
    messages = iter([{"type": "http.request", "body": BODY, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == blocked_by or message.get("body", b"").startswith(blocked_by or b"-"):
            blocked.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(app(SCOPE, receive, send))
    await asyncio.wait_for(blocked.wait(), 10)
    at = time.monotonic()
    left.set()
    await asyncio.wait_for(running, 10)
    return at


class Reader(ApplicationCommunicator):
    """Asks over ASGI and reads the bodies of the answer."""

    def __init__(self, app: Any = application) -> None:
        super().__init__(app, SCOPE)

    async def ask(self) -> None:
        await self.send_input({"type": "http.request", "body": BODY, "more_body": False})

    async def read(self) -> bytes:
        message = await self.receive_output(10)
        return message.get("body", b"") or await self.read()

    async def until(self, event: bytes) -> None:
        while not (await self.read()).startswith(b"event: " + event):
            pass

    async def leave(self) -> float:
        at = time.monotonic()
        await self.send_input({"type": "http.disconnect"})
        await self.wait(10)
        return at


@on_sqlite
@pytest.mark.parametrize("point", [-1, 0, 1], ids=["before its head", "before its first piece", "between pieces"])
def test_the_server_says_that_the_reader_has_left(upstream: FakeUpstream, settled: Settled, point: int) -> None:
    upstream.replies(Reply("Hello", " world", gate_after=point))

    async def story() -> float:
        reader = Reader()
        await reader.ask()
        await reader.until(b"token" if point == 1 else b"start")
        await asyncio.to_thread(upstream.wait_for_request)
        return await reader.leave()

    left = asyncio.run(story())
    assert upstream.wait_for_disconnect() - left < 5 * PROMPTLY
    only(settled(), "cancelled", "counted", HELLO_BOUND + IN_FLIGHT + max(point, 0))


def test_the_reader_leaves_while_the_server_waits_to_send_a_piece(
    upstream: FakeUpstream, settled: Settled, database: str
) -> None:
    """The generator is not told then: it is suspended at its ``yield``, and would be until it is collected."""
    upstream.replies(Reply("Hello", gate_after=1))
    left = asyncio.run(left_in_send(b"event: token"))
    assert upstream.wait_for_disconnect() - left < 5 * PROMPTLY
    only(settled(), "cancelled", "counted", HELLO_BOUND + IN_FLIGHT + 1)
    nothing_is_held(database)


@on_sqlite
@pytest.mark.parametrize("message", ["http.response.start", b"event: start"], ids=["headers", "first frame"])
def test_the_reader_leaves_before_the_model_was_asked(
    upstream: FakeUpstream, settled: Settled, database: str, message: str | bytes
) -> None:
    """So nothing is asked of it, and nothing charged."""
    asyncio.run(left_in_send(message))
    only(settled(), "cancelled", "none", 0)
    assert upstream.requests == []
    nothing_is_held(database)


@on_sqlite
@pytest.mark.parametrize("message", [b"event: usage", b"event: error"], ids=["done", "error"])
def test_the_reader_leaves_while_the_server_waits_to_send_the_end(
    upstream: FakeUpstream, settled: Settled, message: bytes
) -> None:
    """It has been settled by then, and stays so."""
    upstream.replies(Reply("Hello") if message == b"event: usage" else Reply("Hello", cut_after=0))
    asyncio.run(left_in_send(message))
    if message == b"event: usage":
        only(settled(), "completed", "reported", 13)
    else:
        only(settled(), "upstream_error", "counted", HELLO_BOUND + IN_FLIGHT)


@on_sqlite
def test_the_reader_leaves_before_the_request_was_read(upstream: FakeUpstream, database: str) -> None:
    async def story() -> None:
        reader = Reader()
        await reader.send_input({"type": "http.request", "body": BODY[:10], "more_body": True})
        await reader.leave()

    asyncio.run(story())
    assert upstream.requests == []
    assert not Reservation.objects.exists()


@async_only_middleware
def stuck(get_response: Callable[[ASGIRequest], Awaitable[Any]]) -> Callable[[ASGIRequest], Awaitable[Any]]:
    """A middleware that takes its time with the response, as one that writes an audit log does."""

    async def middleware(request: ASGIRequest) -> Any:
        await get_response(request)
        request.scope["holding"].set()
        await asyncio.Event().wait()

    return middleware


@on_sqlite
def test_the_reader_leaves_while_a_middleware_still_has_the_response(
    upstream: FakeUpstream, settled: Settled, settings: Any
) -> None:
    """Django then drops the response: it neither reads nor closes it."""
    settings.MIDDLEWARE = ["tests.test_disconnect.stuck"]
    app = get_asgi_application()

    async def story() -> None:
        holding = asyncio.Event()
        reader = ApplicationCommunicator(app, {**SCOPE, "holding": holding})
        await reader.send_input({"type": "http.request", "body": BODY, "more_body": False})
        await asyncio.wait_for(holding.wait(), 10)
        await reader.send_input({"type": "http.disconnect"})
        await reader.wait(10)
        gc.collect()

    asyncio.run(story())
    only(settled(), "cancelled", "none", 0)
    assert upstream.requests == []


def test_the_reader_leaves_while_the_ledger_is_busy(
    upstream: FakeUpstream, settled: Settled, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hold may be committed after that, by a thread that knows of no reader: it is given back."""
    reserving = asyncio.Event()
    reserve = batcher.reserve

    async def noticed(ask: Any) -> Any:
        reserving.set()
        return await reserve(ask)

    monkeypatch.setattr(batcher, "reserve", noticed)

    async def story() -> None:
        reader = Reader()
        await reader.ask()
        await asyncio.wait_for(reserving.wait(), 10)
        await asyncio.sleep(0)
        await reader.leave()

    with transaction.atomic(using=database):
        if database == "postgres":
            with connections[database].cursor() as cursor:
                cursor.execute("LOCK TABLE chatnest_dailyusage IN ACCESS EXCLUSIVE MODE")
        asyncio.run(story())
    asyncio.run(batcher.query(lambda: None))  # its turn comes after whatever waited for the lock
    for row in settled():
        assert (row.outcome, row.tokens_charged) == ("cancelled", 0)
    nothing_is_held(database)
    assert upstream.requests == []


@on_sqlite
def test_the_server_gives_the_request_up(upstream: FakeUpstream, settled: Settled) -> None:
    """As a server does that will wait no longer at its end: the task is cancelled, then the loop ends."""
    upstream.replies(Reply("Hello", gate_after=1))

    async def story() -> None:
        reader = Reader()
        await reader.ask()
        await reader.until(b"token")
        reader.future.cancel()
        with suppress(asyncio.CancelledError):
            await reader.future

    asyncio.run(story())
    upstream.wait_for_disconnect()
    only(settled(), "cancelled", "counted", HELLO_BOUND + IN_FLIGHT + 1)


# Without a server: what Django's handler may do with the response, or not do.


async def response() -> Any:
    request = AsyncRequestFactory().post("/api/chat", HELLO, content_type="application/json")
    answer: Any = await chat(request)
    assert answer.status_code == 200
    return answer


async def closed(answer: Any) -> None:
    await asyncio.to_thread(answer.close)


async def forgotten(answer: Any) -> None:
    """Once by the caller, too: the argument is the last reference."""
    del answer
    gc.collect()


async def closed_as_an_iterator(answer: Any) -> None:
    await aiter(answer).aclose()


async def closed_twice(answer: Any) -> None:
    await closed(answer)
    await closed(answer)
    await closed_as_an_iterator(answer)


ENDS = pytest.mark.parametrize("end", [closed, forgotten, closed_as_an_iterator, closed_twice])


@on_sqlite
@ENDS
def test_a_response_that_nobody_reads_costs_nothing(
    upstream: FakeUpstream, settled: Settled, database: str, end: Callable[[Any], Awaitable[None]]
) -> None:
    async def story() -> None:
        await end(await response())

    asyncio.run(story())
    only(settled(), "cancelled", "none", 0)
    assert upstream.requests == []
    nothing_is_held(database)


@on_sqlite
@ENDS
@pytest.mark.parametrize("point", [-1, 1], ids=["before its head", "between pieces"])
def test_a_response_that_is_read_in_part_is_settled_by_any_end(
    upstream: FakeUpstream, settled: Settled, end: Callable[[Any], Awaitable[None]], point: int
) -> None:
    upstream.replies(Reply("Hello", gate_after=point))

    async def read_in_part() -> Any:
        answer = await response()
        frames = aiter(answer)
        await anext(frames)
        if point == 1:
            assert (await anext(frames)).startswith(b"event: token")
        else:
            waiting = asyncio.ensure_future(anext(frames))
            await asyncio.to_thread(upstream.wait_for_request)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
        return answer

    async def story() -> None:
        await end(await read_in_part())
        # Long before the loop ends, which would settle it too.
        await asyncio.to_thread(upstream.wait_for_disconnect)

    asyncio.run(story())
    only(settled(), "cancelled", "counted", HELLO_BOUND + IN_FLIGHT + max(point, 0))


@on_sqlite
def test_frames_may_be_read_by_one_task_after_another(
    upstream: FakeUpstream, settled: Settled, configure: Configure
) -> None:
    """As a middleware does that waits for each with a timeout: heartbeats and deadlines hold all the same."""
    configure(HEARTBEAT_SECONDS=0.1, GAP_SECONDS=0.5)
    upstream.replies(Reply("Hello", gate_after=1))

    async def story() -> list[bytes]:
        frames = aiter(await response())
        read = []
        with suppress(StopAsyncIteration):
            while True:
                read.append(await asyncio.wait_for(asyncio.ensure_future(anext(frames)), 5))
        return read

    frames = asyncio.run(story())
    assert frames.count(b"event: ping\ndata: \n\n") >= 2
    assert frames[-1].startswith(b"event: error")
    only(settled(), "timed_out", "counted", HELLO_BOUND + IN_FLIGHT + 1)


@on_sqlite
def test_a_loop_that_ends_under_an_answer_settles_it(upstream: FakeUpstream, settled: Settled) -> None:
    upstream.replies(Reply("Hello", gate_after=1))
    kept: list[Any] = []

    async def story() -> None:
        kept.append(await response())
        frames = aiter(kept[0])
        await anext(frames)
        await anext(frames)

    asyncio.run(story())
    kept[0].close()  # by now there is no loop to call into
    upstream.wait_for_disconnect()
    only(settled(), "cancelled", "counted", HELLO_BOUND + IN_FLIGHT + 1)


@on_sqlite
def test_leaving_a_loop_behind_breaks_no_later_one(upstream: FakeUpstream, settled: Settled) -> None:
    for _ in range(3):

        async def story() -> list[bytes]:
            return [frame async for frame in await response()]

        frames = b"".join(asyncio.run(story()))
        assert frames.endswith(b"event: done\ndata: \n\n")
    assert [row.outcome for row in settled()] == ["completed"] * 3
    assert upstream.connections_opened == 3


def test_an_answer_that_is_read_to_its_end_leaves_no_reference_cycle_behind(
    upstream: FakeUpstream, settled: Settled, database: str
) -> None:
    """Memory is given back at once, not whenever the collector runs."""

    async def story() -> None:
        answer = await response()
        stream = weakref.ref(aiter(answer))
        async for _ in answer:
            pass
        answer.close()
        del answer
        assert stream() is None

    gc.disable()
    try:
        asyncio.run(story())
    finally:
        gc.enable()
    assert len(settled()) == 1

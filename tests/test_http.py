"""The connection to the provider, below the openai package: every framing, TLS, proxies, what is kept and what closed.

On asyncio's event loop and on uvloop, against servers that say any bytes.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
import ssl
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import openai
import pytest
import trustme
import uvloop

from chatnest.conf import provider as configured
from chatnest.errors import UpstreamError, UpstreamMisconfigured, UpstreamUnavailable
from chatnest.provider import clients, failures, http
from chatnest.provider.call import Call
from chatnest.testing import FakeUpstream, Reply
from chatnest.wires import Message

from .conftest import Configure

Story = Callable[["Provider"], Awaitable[None]]
Play = Callable[..., None]
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
HI = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\n'
BODY = HI + b"data: [DONE]\n\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
ANSWER = OK + LENGTH + BODY
WAIT = b"wait"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Provider:
    """Answers each request with the next of its scripts: bytes to send, WAIT for ``released``, or None to close."""

    def __init__(self) -> None:
        self.scripts: list[list[bytes | None]] = []
        self.requests: list[bytes] = []
        self.opened = self.open = 0
        self.released = asyncio.Event()
        self.servers: list[asyncio.Server] = []
        self.url = ""
        self.port = 0

    async def listen(self, serve: Callable[..., Any], context: ssl.SSLContext | None = None) -> int:
        """The port that is now served so."""
        self.servers.append(await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
        return int(self.servers[-1].sockets[0].getsockname()[1])

    def answers(self, *script: bytes | None) -> None:
        self.scripts.append(list(script))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self.open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                for part in self.scripts.pop(0):
                    if part is None:
                        return
                    if part == WAIT:
                        await self.released.wait()
                    else:
                        writer.write(part)
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass  # asyncio 3.11 would log a cancelled task as an error
        finally:
            self.open -= 1
            writer.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the state of sockets
                await asyncio.sleep(0.001)


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return LOOPS[request.param]


@pytest.fixture
def play(loop_factory: Callable[[], asyncio.AbstractEventLoop], configure: Configure) -> Play:
    """Run a story on a loop of its own, beside a provider that speaks TLS if it is given a certificate."""

    def play(story: Story, certificate: trustme.LeafCert | None = None) -> None:
        async def whole() -> None:
            provider, context = Provider(), None
            if certificate:
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                certificate.configure_cert(context)
            provider.port = await provider.listen(provider.serve, context)
            host = "localhost" if certificate else "127.0.0.1"
            provider.url = f"http{'s' * bool(context)}://{host}:{provider.port}/v1"
            configure(OPENAI_BASE_URL=provider.url)
            try:
                await story(provider)
            finally:
                provider.released.set()
                await closed()
                for server in provider.servers:
                    server.close()

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(whole())

    return play


async def closed() -> None:
    """Close the loop's client, as the loop's end would, so that all who serve it end before the loop does."""
    if made := clients._clients.get(asyncio.get_running_loop()):
        await made[1].aclose()
    if serving := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(serving, timeout=10)


def a_call(provider: str = "default") -> Call:
    return Call(configured(provider), "gpt-4o-mini", [Message("user", "Hello!")], max_tokens=5, temperature=None)


async def read(call: Call) -> str:
    try:
        await call.open()
        text = ""
        while (pieces := await call.read()) is not None:
            text += "".join(piece for _, piece in pieces)
        return text
    finally:
        await call.close()


async def ask() -> str:
    return await read(a_call())


async def fails(error: type[UpstreamError] = UpstreamError, *, billed: bool) -> UpstreamError:
    """Asserts that asking does."""
    call = a_call()
    with pytest.raises(error) as raised:
        await read(call)
    assert call.billed is billed
    return raised.value


# Framing.


@pytest.mark.parametrize(
    "script",
    [
        [ANSWER],
        [bytes([byte]) for byte in ANSWER],
        [CHUNKED + b"10;x=y\r\n" + BODY[:16] + b"\r\n" + chunk(BODY[16:]) + b"0\r\nTrailer: 1\r\n\r\n"],
        [OK + b"\r\n" + BODY[:20], BODY[20:], None],
        [b"HTTP/1.0 200 OK\r\n\r\n" + HI, None],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER],
        [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", ANSWER],
        [OK + b"Content-Encoding: identity\r\n" + LENGTH + BODY],
        # Compressed, though asked not to be.
        [OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(BODY, mtime=0), None],
        [OK + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(BODY), None],
        [CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")]
        + [chunk(bytes([byte])) for byte in gzip.compress(BODY, mtime=0)]
        + [b"0\r\n\r\n"],
    ],
    ids=lambda script: repr(b"".join(filter(None, script))[:60]) + f" in {len(script)}",
)
def test_an_answer_in_any_frame_is_read_to_its_end(play: Play, script: list[bytes | None]) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(*script)
        assert await ask() == "Hi"

    play(story)


@pytest.mark.parametrize(
    "script",
    [
        [None],
        [OK[:10], None],
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [OK + b"X: " + b"x" * 100_000],
        [OK + b"Content-Length: many\r\n\r\n"],
        [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\nfive\r\nhello\r\n"],
        [OK + b"Content-Encoding: gzip\r\nContent-Length: 50\r\n\r\nhello"],
        [OK + b"Content-Length: 50\r\n\r\nhello", None],
        [CHUNKED + chunk(b"hello"), None],
    ],
    ids=lambda script: repr(script)[:70],
)
def test_what_is_no_answer_may_have_been_billed_and_its_connection_is_closed(
    play: Play, script: list[bytes | None]
) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(*script)
        await fails(billed=True)
        await provider.until(lambda: provider.open == 0)

    play(story)


def test_what_came_before_the_connection_broke_is_read_first(play: Play) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(OK + b"Content-Length: 500\r\n\r\n" + HI.replace(b'"stop"', b"null"), None)
        call = a_call()
        await call.open()
        await provider.until(lambda: provider.open == 0)
        assert await call.read() != []
        with pytest.raises(UpstreamError):
            await call.read()
        await call.close()

    play(story)


# Refusals.


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies of refusals, as they are looked at."""
    bodies = []
    refused = failures.refused

    def looked_at(status: int, headers: Any, body: Any, **rest: Any) -> failures.Failure:
        bodies.append(body)
        return refused(status, headers, body, **rest)

    monkeypatch.setattr(failures, "refused", looked_at)
    return bodies


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_of_a_refusal_without_end_only_so_much_is_read(
    upstream: FakeUpstream, refusals: list[bytes], status: int, zipped: bool
) -> None:
    upstream.replies(Reply.garbage(b"x" * 10_000, repeat=True, status=status, gzip=zipped))
    asyncio.run(fails(billed=False))
    upstream.wait_for(lambda: upstream.open_connections == 0)
    (body,) = refusals
    assert set(body) == {ord("x")}
    assert len(body) == http.MAX_REFUSAL_BYTES == 65_536


def test_for_a_refusal_without_end_nobody_waits(
    upstream: FakeUpstream, refusals: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert http.REFUSAL_SECONDS == 2
    monkeypatch.setattr(http, "REFUSAL_SECONDS", 0.05)
    upstream.replies(Reply.garbage(b"why ", b"so", status=500, gate_after=1))
    asyncio.run(fails(UpstreamUnavailable, billed=False))
    upstream.wait_for(lambda: upstream.open_connections == 0)
    assert refusals == [b"why "]


def test_who_leaves_while_a_refusal_is_read_closes_it(upstream: FakeUpstream) -> None:
    async def story() -> None:
        opening = asyncio.create_task(a_call().open())
        await asyncio.to_thread(upstream.wait_for_request)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.to_thread(upstream.wait_for_disconnect)

    upstream.replies(Reply.refuse(500, gate_after=0))
    asyncio.run(story())


@pytest.mark.parametrize(
    ("encoding", "body"),
    [("gzip", b"hello"), ("br", b"hello"), ("gzip", gzip.compress(b"hello")[:15]), ("deflate", b"x\x9cx")],
    ids=["gzip that is none", "br", "gzip cut", "deflate cut"],
)
def test_a_refusal_that_cannot_be_unpacked_is_a_refusal(play: Play, encoding: str, body: bytes) -> None:
    async def story(provider: Provider) -> None:
        head = f"HTTP/1.1 429 Slow Down\r\nRetry-After: 7\r\nContent-Encoding: {encoding}\r\n"
        provider.answers(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        error = await fails(billed=False)
        assert (error.code, error.retry_after) == ("upstream_rate_limited", 7)

    play(story)


def test_a_refusal_that_unpacks_to_a_large_one_is_unpacked_in_part(play: Play, refusals: list[bytes]) -> None:
    async def story(provider: Provider) -> None:
        bomb = gzip.compress(bytes(50_000_000))
        head = b"HTTP/1.1 429 Slow Down\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
        provider.answers(head + bomb)
        await fails(billed=False)

    play(story)
    assert [len(body) for body in refusals] == [http.MAX_REFUSAL_BYTES]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(play: Play, status: int) -> None:
    """The key is for this provider only."""

    async def story(provider: Provider) -> None:
        location = provider.url.encode() + b"/elsewhere"
        provider.answers(b"HTTP/1.1 %d X\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % (status, location))
        await fails(UpstreamMisconfigured, billed=False)
        assert len(provider.requests) == 1

    play(story)


# Kept alive, and closed.


def kept() -> int:
    """How many connections wait for a request."""
    made, _ = clients._clients[asyncio.get_running_loop()]
    waiting = made._http_client._session.connector._conns.values()  # type: ignore[union-attr]
    return sum(protocol.is_connected() for connections in waiting for protocol, _ in connections)


def test_a_connection_is_kept_for_the_next_request(play: Play) -> None:
    async def story(provider: Provider) -> None:
        for _ in range(5):
            provider.answers(ANSWER)
            assert await ask() == "Hi"
        assert (provider.opened, len(provider.requests)) == (1, 5)

    play(story)


def test_the_last_bytes_of_a_known_answer_may_come_later(play: Play) -> None:
    """``data: [DONE]`` ends an answer; the chunk that ends it for HTTP too is often a packet of its own."""

    async def story(provider: Provider) -> None:
        provider.answers(CHUNKED + chunk(BODY), WAIT, b"0\r\n\r\n")
        provider.answers(ANSWER)
        call = a_call()
        await call.open()
        while await call.read() is not None:
            pass
        closing = asyncio.create_task(call.close())
        await asyncio.sleep(0)
        provider.released.set()
        await closing
        assert await ask() == "Hi"
        assert provider.opened == 1

    play(story)


@pytest.mark.parametrize("more", [b"", b"x" * 100_000], ids=["silence", "noise"])
def test_an_answer_that_goes_on_after_its_end_is_closed(
    play: Play, monkeypatch: pytest.MonkeyPatch, more: bytes
) -> None:
    monkeypatch.setattr("chatnest.provider.call.LINGER_SECONDS", 10 if more else 0.01)

    async def story(provider: Provider) -> None:
        provider.answers(OK + b"\r\n" + BODY, *[more] * 20, WAIT)
        assert await ask() == "Hi"
        assert kept() == 0
        provider.released.set()
        await provider.until(lambda: provider.open == 0)

    play(story)


@pytest.mark.parametrize("head", [OK + b"Connection: close\r\n", b"HTTP/1.0 200 OK\r\n"], ids=repr)
def test_a_connection_that_the_provider_will_close_is_not_kept(play: Play, head: bytes) -> None:
    async def story(provider: Provider) -> None:
        for _ in range(2):
            provider.answers(head + LENGTH + BODY)
            assert await ask() == "Hi"
        assert provider.opened == 2
        await provider.until(lambda: provider.open == 0)

    play(story)


def test_a_connection_whose_answer_was_left_is_not_used_again(play: Play) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(CHUNKED + chunk(HI), WAIT)
        provider.answers(ANSWER)
        call = a_call()
        await call.open()
        await call.read()
        await call.close()
        assert await ask() == "Hi"
        assert provider.opened == 2
        provider.released.set()

    play(story)


@pytest.mark.parametrize("end", [[None], [b"HTTP/1.1 408 Request Timeout\r\n\r\n", None]], ids=["closed", "says why"])
def test_a_kept_connection_that_the_provider_ended_is_not_used(play: Play, end: list[bytes | None]) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(ANSWER, WAIT, *end)
        provider.answers(ANSWER)
        assert await ask() == "Hi"
        assert kept() == 1
        provider.released.set()
        await provider.until(lambda: kept() == 0)
        assert await ask() == "Hi"
        assert provider.opened == 2

    play(story)


def test_a_kept_connection_is_closed_when_nobody_needs_it(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the provider does it: a request that meets a closing connection may have been billed."""
    assert http.KEEP_ALIVE_SECONDS < 5, "uvicorn's own"
    monkeypatch.setattr(http, "KEEP_ALIVE_SECONDS", 0.01)

    async def story(provider: Provider) -> None:
        provider.answers(ANSWER)
        assert await ask() == "Hi"
        await provider.until(lambda: provider.open == 0)

    play(story)


def test_an_answer_that_nobody_asked_for_is_not_heard(play: Play) -> None:
    """In the same packet as the one that was: the connection is not used again."""

    async def story(provider: Provider) -> None:
        for more in (ANSWER.replace(b"Hi", b"Ho"), b"HTTP/1.1 2"):
            provider.answers(ANSWER + more)
            assert await ask() == "Hi"
        assert provider.opened == 2

    play(story)


def test_there_is_no_queue_for_a_connection(
    upstream: FakeUpstream, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Pools usually end at 100 connections, or at 1,000; whoever is next waits in silence for another's answer."""

    async def story() -> list[str]:
        asked = [asyncio.create_task(ask()) for _ in range(200)]
        await asyncio.to_thread(upstream.wait_for_request, 200)
        assert upstream.connections_opened == upstream.open_connections == 200
        upstream.release()
        return await asyncio.gather(*asked)

    upstream.replies(Reply("Hi", gate_after=0))
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(story()) == ["Hi"] * 200


@pytest.mark.parametrize("reply", [Reply("Hi", gate_after=1), Reply.endless("Hi")], ids=["silent", "talking"])
def test_the_provider_sees_within_a_tenth_of_a_second_that_nobody_listens(
    upstream: FakeUpstream, loop_factory: Callable[[], asyncio.AbstractEventLoop], reply: Reply
) -> None:
    async def story() -> float:
        call = a_call()
        await call.open()
        await call.read()
        left = time.monotonic()
        await call.close()
        return await asyncio.to_thread(upstream.wait_for_disconnect, len(upstream.requests)) - left

    upstream.replies(reply)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        late = sorted(runner.run(story()) for _ in range(5))
    assert late[2] < 0.1


def test_nor_does_a_provider_that_only_talks_go_on_for_long(
    authority: trustme.CA, loop_factory: Callable[[], asyncio.AbstractEventLoop], configure: Configure
) -> None:
    """Over TLS a polite end waits for the other side's. Who does not read talks on, and bills, for half a minute."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        configure(OPENAI_BASE_URL=f"https://localhost:{listener.getsockname()[1]}/v1")
        gone = threading.Event()

        def talk() -> None:
            connection, _ = listener.accept()
            with context.wrap_socket(connection, server_side=True) as secure, suppress(OSError):
                secure.recv(65536)
                secure.sendall(OK + b"\r\n")
                while not gone.wait(0.001):
                    secure.sendall(HI)

        talking = threading.Thread(target=talk)
        talking.start()

        async def story() -> bool:
            call = a_call()
            await call.open()
            await call.read()
            await call.close()
            await asyncio.to_thread(talking.join, 5)
            return talking.is_alive()

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            assert not runner.run(story())
        gone.set()
        talking.join()


# One client for each provider and loop.


def test_a_provider_has_one_client_and_all_share_their_connections(
    upstream: FakeUpstream, configure: Configure
) -> None:
    other = {"BASE_URL": upstream.url, "API_KEY": "sk-other"}
    configure(PROVIDERS={"other": other})

    async def story() -> None:
        first = clients.client(configured("default"))
        assert clients.client(configured("default")) is first
        assert clients.client(configured("other")) is not first
        assert await ask() == "Hello world"
        configure(OPENAI_API_KEY="sk-new")
        assert clients.client(configured("default")) is not first
        assert await ask() == "Hello world"
        assert [request.headers["authorization"] for request in upstream.requests] == [
            "Bearer sk-tests",
            "Bearer sk-new",
        ]
        assert upstream.connections_opened == 1

    asyncio.run(story())


def test_a_loop_closes_what_it_opened(
    upstream: FakeUpstream, loop_factory: Callable[[], asyncio.AbstractEventLoop], configure: Configure
) -> None:
    made: list[openai.AsyncOpenAI] = []

    def make() -> openai.AsyncOpenAI:
        made.append(openai.AsyncOpenAI(api_key="sk-theirs", base_url=upstream.url))
        return made[-1]

    configure(PROVIDERS={"theirs": {"CLIENT": make}})
    before = {*clients._clients}
    for loops in (1, 2):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            for _ in range(3):
                assert runner.run(ask()) == "Hello world"
                theirs = Call(
                    configured("theirs"), "gpt-4o-mini", [Message("user", "Hi")], max_tokens=5, temperature=None
                )
                assert runner.run(read(theirs)) == "Hello world"
            assert upstream.open_connections == 2
            assert upstream.connections_opened == 2 * loops
        upstream.wait_for(lambda: upstream.open_connections == 0)
    assert len(made) == 2
    assert all(client.is_closed() for client in made)
    assert {*clients._clients} == before
    gc.collect()  # what was left open complains


def test_loops_in_several_threads_do_not_share_a_connection(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hi", gate_after=0))
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(asyncio.run(ask()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    upstream.wait_for_request(3)
    assert upstream.open_connections == 3
    upstream.release()
    for thread in threads:
        thread.join()
    assert answers == ["Hi"] * 3
    upstream.wait_for(lambda: upstream.open_connections == 0)


# TLS.


@pytest.fixture
def authority(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[trustme.CA]:
    """An authority that the environment trusts, as SSL_CERT_FILE."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    http.tls.cache_clear()
    yield ca
    http.tls.cache_clear()


def test_a_provider_is_asked_over_tls_and_kept(play: Play, authority: trustme.CA) -> None:
    async def story(provider: Provider) -> None:
        for _ in range(3):
            provider.answers(ANSWER)
            assert await ask() == "Hi"
        assert provider.opened == 1

    play(story, authority.issue_cert("localhost"))


@pytest.mark.parametrize("wrong", ["name", "authority"])
def test_a_provider_that_is_not_who_it_says_gets_nothing(
    play: Play, authority: trustme.CA, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(provider: Provider) -> None:
        await fails(UpstreamUnavailable, billed=False)
        assert provider.requests == []

    certificate = authority.issue_cert("example.org") if wrong == "name" else trustme.CA().issue_cert("localhost")
    play(story, certificate)
    assert "certificate verify failed" in caplog.text


def test_a_host_with_a_dead_address_is_reached_by_another(
    play: Play, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    """127.0.0.2 refuses; a browser would go on too."""

    async def story(provider: Provider) -> None:

        async def resolve(*asked: Any, **options: Any) -> Any:
            known = {
                "hostname": "model.example",
                "port": provider.port,
                "family": socket.AF_INET,
                "proto": 6,
                "flags": 0,
            }
            return [{**known, "host": host} for host in ("127.0.0.2", "127.0.0.1")]

        monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
        configure(OPENAI_BASE_URL=f"http://model.example:{provider.port}/v1")
        provider.answers(ANSWER)
        assert await ask() == "Hi"

    play(story)


# Proxies.


class Proxy:
    """A forward proxy: leads CONNECT to where it asks, and answers anything else itself."""

    def __init__(self, refusal: bytes = b"") -> None:
        self.refusal = refusal
        self.heads: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            if self.refusal or not head.startswith(b"CONNECT"):
                writer.write(self.refusal or ANSWER)
                await reader.read()
            else:
                host, _, port = head.split()[1].decode().rpartition(":")
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await asyncio.gather(self.pass_on(reader, far_writer), self.pass_on(far_reader, writer))
        writer.close()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()


CREDENTIALS = b"proxy-authorization: basic " + b64encode(b"u@x:secret").lower()


def test_the_environments_proxy_leads_to_a_provider_over_tls(
    play: Play, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(provider: Provider) -> None:
        proxy = Proxy()
        monkeypatch.setenv("HTTPS_PROXY", f"http://u%40x:secret@127.0.0.1:{await provider.listen(proxy.serve)}")
        for _ in range(2):
            provider.answers(ANSWER)
            assert await ask() == "Hi"
        (head,) = proxy.heads
        authority = provider.url.removeprefix("https://").removesuffix("/v1").encode()
        assert head.startswith(b"CONNECT %b HTTP/1.1\r\n" % authority)
        assert CREDENTIALS in head.lower()
        assert b"Bearer" not in head
        assert all(request.startswith(b"POST /v1/chat") and b"Proxy" not in request for request in provider.requests)

    play(story, authority.issue_cert("localhost"))


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_the_environments_proxy_is_asked_for_a_provider_without_tls(
    play: Play, monkeypatch: pytest.MonkeyPatch, name: str, configure: Configure
) -> None:
    async def story(provider: Provider) -> None:
        proxy = Proxy()
        monkeypatch.setenv(name, f"u%40x:secret@127.0.0.1:{await provider.listen(proxy.serve)}")  # without a scheme
        configure(OPENAI_BASE_URL="http://model.example:8000/v1")
        assert await ask() == "Hi"
        (head,) = proxy.heads
        assert head.startswith(b"POST http://model.example:8000/v1/chat/completions HTTP/1.1\r\n")
        assert b"\r\nhost: model.example:8000\r\n" in head.lower()
        assert CREDENTIALS in head.lower()

    play(story)


@pytest.mark.parametrize("spared", ["127.0.0.1,other.example", "*", "127.0.0.1:%d"])
def test_no_proxy_is_honoured(play: Play, monkeypatch: pytest.MonkeyPatch, spared: str) -> None:
    async def story(provider: Provider) -> None:
        proxy = Proxy()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{await provider.listen(proxy.serve)}")
        monkeypatch.setenv("NO_PROXY", spared % provider.port if "%d" in spared else spared)
        provider.answers(ANSWER)
        assert await ask() == "Hi"
        assert proxy.heads == []

    play(story)


@pytest.mark.parametrize("reason", ["refuses", "is not there", "speaks no TLS", "hangs up", "is silent"])
def test_a_proxy_that_does_not_lead_there_means_that_nothing_was_sent(
    play: Play, monkeypatch: pytest.MonkeyPatch, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    established = b"HTTP/1.1 200 Connection established\r\n\r\n"
    refusal = {
        "refuses": b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
        "hangs up": established + b"SSH-2.0-OpenSSH_9.2\r\n",
        "is silent": established,
    }
    monkeypatch.setattr(http, "CONNECT_SECONDS", 0.2)

    async def story(provider: Provider) -> None:
        proxy = Proxy(refusal.get(reason, b"x"))
        port = await provider.listen(proxy.serve)
        if reason == "is not there":
            provider.servers[-1].close()
        scheme = "https" if reason == "speaks no TLS" else "http"
        monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://user:hidden@127.0.0.1:{port}")
        await fails(UpstreamUnavailable, billed=False)
        assert provider.requests == []

    play(story, trustme.CA().issue_cert("localhost"))
    assert "no connection could be made" in caplog.text
    assert "hidden" not in caplog.text


def test_a_proxy_that_is_no_http_proxy_is_named_to_the_operator(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://user:hidden@127.0.0.1:1080")
    asyncio.run(fails(UpstreamMisconfigured, billed=False))
    assert upstream.requests == []
    assert "a proxy that is no HTTP proxy needs a CLIENT in PROVIDERS: socks5" in caplog.text
    assert "hidden" not in caplog.text

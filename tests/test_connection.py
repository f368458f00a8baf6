"""The connection to the provider, against servers that say any bytes: every framing, TLS, proxies, and its own end."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import trustme
import uvloop

from chatnest import connection
from chatnest.provider.connection import Connection, NotSent, Origin, connect, locate
from chatnest.testing import FakeUpstream

Story = Callable[["Provider"], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"


class Provider:
    """Answers each request with the next of its scripts: bytes to send, or None to close."""

    def __init__(self) -> None:
        self.scripts: list[list[bytes | None]] = []
        self.requests: list[bytes] = []
        self.opened = self.open = 0
        self.released = asyncio.Event()
        self.origin = Origin("http", "127.0.0.1", 0)

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
                    if part == b"wait":
                        await self.released.wait()
                    else:
                        writer.write(part)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the state of sockets
                await asyncio.sleep(0.001)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Iterator[Callable[[Story], None]]:
    """Run a story on a loop of its own, beside a provider."""

    def play(story: Story) -> None:
        async def whole() -> None:
            provider = Provider()
            server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            provider.origin = Origin("http", "127.0.0.1", port)
            await story(provider)
            server.close()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(whole())

    before = {*connection._pools}
    yield play
    assert {*connection._pools} <= before


async def ask(origin: Origin, body: bytes = b"{}") -> Connection:
    one = await connect(origin)
    await one.post("/v1/chat", "Accept: text/event-stream\r\n", body)
    return one


async def whole(one: Connection) -> bytes:
    text = b""
    while received := await one.read():
        text += received
    return text


# Framing.


@pytest.mark.parametrize(
    "script",
    [
        [HELLO],
        [bytes([byte]) for byte in HELLO],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nTrailer: 1\r\n\r\n"],
        [OK + b"\r\nhel", b"lo", None],
        [b"HTTP/1.0 200 OK\r\n\r\nhello", None],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO],
        [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 9\r\n\r\n", HELLO],
        [OK + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n" + gzip.compress(b"hello"), None],
        [OK + b"Content-Length: 0\r\n\r\n"],
    ],
    ids=lambda script: repr(b"".join(filter(None, script))[:60]) + f" in {len(script)}",
)
def test_an_answer_in_any_frame_is_read_to_its_end(play: Any, script: list[bytes | None]) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(*script)
        one = await ask(provider.origin)
        assert one.status == 200
        assert await whole(one) == (b"" if b"Length: 0" in (script[0] or b"") else b"hello")
        assert await one.read() == b"", "its end is its end"
        one.finish()

    play(story)


def test_a_request_is_what_was_asked(play: Any) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(HELLO)
        await ask(provider.origin, b'{"a": 1}')
        assert provider.requests == [
            b"POST /v1/chat HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\nContent-Length: 8\r\n\r\n"
            b'{"a": 1}' % provider.origin.port
        ]

    play(story)


@pytest.mark.parametrize(
    "script",
    [
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"],
        [OK + b"X: " + b"x" * 100_000],
        [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"],
        [OK + b"Content-Encoding: br\r\n\r\nhello"],
        [OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"hello") * 2],
        [OK + b"Transfer-Encoding: chunked\r\n\r\nfive\r\nhello\r\n"],
        [OK + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello"],
        [OK[:10], None],
        [None],
        [OK + b"Content-Length: 50\r\n\r\nhello", None],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", None],
    ],
    ids=lambda script: repr(script)[:70],
)
def test_what_is_no_answer_is_an_error_and_its_connection_is_closed(play: Any, script: list[bytes | None]) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(*script)
        one = await connect(provider.origin)
        with pytest.raises((OSError, ValueError)) as raised:
            await one.post("/", "", b"")
            await whole(one)
        assert not isinstance(raised.value, NotSent)
        one.abort()
        await provider.until(lambda: provider.open == 0)

    play(story)


def test_what_came_before_the_connection_broke_is_read_first(play: Any) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(OK + b"Content-Length: 50\r\n\r\nhello", None)
        one = await ask(provider.origin)
        await provider.until(lambda: provider.open == 0)
        assert await one.read() == b"hello"
        with pytest.raises(ConnectionResetError):
            await one.read()

    play(story)


def test_a_read_may_be_cancelled_and_nothing_is_lost(play: Any) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(OK + b"Content-Length: 5\r\n\r\n", b"wait", b"hello")
        one = await ask(provider.origin)
        for _ in range(3):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await one.read()
        provider.released.set()
        assert await whole(one) == b"hello"

    play(story)


def test_a_refusal_that_cannot_be_unpacked_is_a_refusal(play: Any) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(
            b"HTTP/1.1 429 Slow Down\r\nRetry-After: 7\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx"
        )
        one = await ask(provider.origin)
        assert (one.status, one.headers["retry-after"]) == (429, "7")
        with pytest.raises(ValueError, match="an answer in br"):
            await one.read()

    play(story)


def test_what_follows_the_body_changes_nothing(play: Any) -> None:
    async def story(provider: Provider) -> None:
        trailers = b"".join(b"X-%d: %b\r\n" % (n, b"x" * 1000) for n in range(300))
        provider.answers(OK + b"Transfer-Encoding: chunked\r\nX-1: 1\r\n\r\n5\r\nhello\r\n0\r\n" + trailers + b"\r\n")
        one = await ask(provider.origin)
        assert await whole(one) == b"hello"
        assert one.headers == {"transfer-encoding": "chunked", "x-1": "1"}

    play(story)


@pytest.mark.parametrize(
    "more", [b"HTTP/1.1 500 X\r\nContent-Length: 9\r\n\r\nXX", b"HTTP/1.1 2", HELLO, b"\0"], ids=repr
)
def test_an_answer_that_nobody_asked_for_is_not_heard(play: Any, more: bytes) -> None:
    """In the same packet as the one that was: the first is read, and the connection never used again."""

    async def story(provider: Provider) -> None:
        provider.answers(HELLO + more)
        provider.answers(HELLO)
        one = await ask(provider.origin)
        assert one.status == 200
        assert await whole(one) == b"hello"
        one.finish()
        assert await ask(provider.origin) is not one

    play(story)


def test_a_small_answer_that_unpacks_to_a_large_one_is_unpacked_bit_by_bit(play: Any) -> None:
    async def story(provider: Provider) -> None:
        bomb = gzip.compress(bytes(20_000_000))
        provider.answers(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)
        one = await ask(provider.origin)
        sizes = []
        while received := await one.read():
            sizes.append(len(received))
        assert sum(sizes) == 20_000_000
        assert max(sizes) <= connection.MAX_BUFFERED

    play(story)


# Kept alive.


def test_a_connection_is_kept_for_the_next_request(play: Any) -> None:
    async def story(provider: Provider) -> None:
        for _ in range(5):
            provider.answers(HELLO)
            one = await ask(provider.origin)
            assert await whole(one) == b"hello"
            one.finish()
        assert (provider.opened, len(provider.requests)) == (1, 5)

    play(story)


@pytest.mark.parametrize("head", [OK + b"Connection: close\r\n", b"HTTP/1.0 200 OK\r\n"], ids=repr)
def test_a_connection_that_the_provider_will_close_is_not_kept(play: Any, head: bytes) -> None:
    async def story(provider: Provider) -> None:
        for _ in range(2):
            provider.answers(head + b"Content-Length: 5\r\n\r\nhello")
            one = await ask(provider.origin)
            assert await whole(one) == b"hello"
            one.finish()
        assert provider.opened == 2
        await provider.until(lambda: provider.open == 0)

    play(story)


def test_the_last_bytes_of_a_known_answer_may_come_later(play: Any) -> None:
    """``data: [DONE]`` ends an answer; the chunk that ends it for HTTP too is often a packet of its own."""

    async def story(provider: Provider) -> None:
        provider.answers(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"wait", b"0\r\n\r\n")
        provider.answers(HELLO)
        one = await ask(provider.origin)
        assert await one.read() == b"hello"
        one.finish()
        provider.released.set()
        await provider.until(lambda: bool(one._pool.idle.get(provider.origin)))
        assert await ask(provider.origin) is one

    play(story)


def test_an_answer_that_goes_on_after_its_end_is_closed(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.01)

    async def story(provider: Provider) -> None:
        provider.answers(OK + b"\r\nhello", b"wait")
        one = await ask(provider.origin)
        assert await one.read() == b"hello"
        one.finish()
        await provider.until(lambda: one._transport.is_closing())
        provider.released.set()

    play(story)


def test_a_kept_connection_is_closed_when_nobody_needs_it(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE_SECONDS", 0.01)

    async def story(provider: Provider) -> None:
        provider.answers(HELLO)
        one = await ask(provider.origin)
        await whole(one)
        one.finish()
        await provider.until(lambda: provider.open == 0)
        assert one._pool.connections == set()
        assert one._pool.idle == {provider.origin: []}

    play(story)


@pytest.mark.parametrize("end", [[None], [b"HTTP/1.1 408 Request Timeout\r\n\r\n"]], ids=["closed", "says more"])
def test_a_kept_connection_that_the_provider_ended_is_not_used(play: Any, end: list[bytes | None]) -> None:
    async def story(provider: Provider) -> None:
        provider.answers(HELLO, b"wait", *end)
        provider.answers(HELLO)
        one = await ask(provider.origin)
        await whole(one)
        one.finish()
        provider.released.set()
        await provider.until(lambda: one._transport.is_closing())
        other = await ask(provider.origin)
        assert other is not one
        assert await whole(other) == b"hello"

    play(story)


# Where it leads.


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("https://api.openai.com/v1/x", "api.openai.com", "/v1/x"),
        ("https://api.openai.com:443/v1", "api.openai.com", "/v1"),
        ("http://[::1]:8000/v1", "[::1]:8000", "/v1"),
        ("http://localhost:80", "localhost", "/"),
        ("http://user:secret@localhost:81/a b", "localhost:81", "/a%20b"),
        ("https://münchen.example/%41", "xn--mnchen-3ya.example", "/%41"),
        ("http://localhost/a\r\nX: y", "localhost", "/aX:%20y"),
    ],
)
def test_an_address_is_read_as_it_is_meant(url: str, host: str, path: str) -> None:
    origin, found = locate(url)
    assert (origin.authority, found) == (host, path)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "http://",
        "ftp://h/",
        "http://[::1",
        "http://h:x/",
        "http://h:99999/",
        "http://.ä/",
        "http://h/?a=1",
    ],
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(NotSent, match="is no address of a provider"):
        locate(url)


def test_a_host_with_a_dead_address_is_reached_by_another(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 refuses; a browser would go on too."""

    async def story(provider: Provider) -> None:
        loop = asyncio.get_running_loop()
        port = provider.origin.port
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in (2, 1)]

        class Resolving:
            def __getattr__(self, name: str) -> Any:
                return getattr(loop, name)

            async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
                return addresses

        one = await connect(provider.origin)
        one.abort()
        monkeypatch.setattr(one._pool, "loop", Resolving())
        provider.answers(HELLO)
        assert await whole(await ask(provider.origin)) == b"hello"

    play(story)


# TLS and proxies.


@pytest.fixture
def authority(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[trustme.CA]:
    """An authority that the environment trusts, as SSL_CERT_FILE."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    connection.tls.cache_clear()
    yield ca
    connection.tls.cache_clear()


async def secure(provider: Provider, ca: trustme.CA, name: str = "localhost") -> tuple[asyncio.Server, Origin]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(name).configure_cert(context)
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, ssl=context)
    return server, Origin("https", "localhost", server.sockets[0].getsockname()[1])


def test_a_provider_is_asked_over_tls_and_kept(play: Any, authority: trustme.CA) -> None:
    async def story(provider: Provider) -> None:
        server, origin = await secure(provider, authority)
        for _ in range(2):
            provider.answers(HELLO)
            one = await ask(origin)
            assert await whole(one) == b"hello"
            one.finish()
        assert provider.opened == 1
        one.abort()
        await provider.until(lambda: provider.open == 0)
        server.close()

    play(story)


@pytest.mark.parametrize("wrong", ["name", "authority"])
def test_a_provider_that_is_not_who_it_says_gets_nothing(play: Any, authority: trustme.CA, wrong: str) -> None:
    ca, name = (authority, "example.org") if wrong == "name" else (trustme.CA(), "localhost")

    async def story(provider: Provider) -> None:
        server, origin = await secure(provider, ca, name)
        with pytest.raises(NotSent, match="certificate verify failed"):
            await ask(origin)
        assert provider.requests == []
        server.close()

    play(story)


class Proxy:
    """A forward proxy: leads CONNECT to where it asks, and answers anything else itself."""

    def __init__(self, refusal: bytes = b"") -> None:
        self.refusal = refusal
        self.heads: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            if self.refusal or not head.startswith(b"CONNECT"):
                writer.write(self.refusal or HELLO)
                await reader.read()
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(self.pass_on(reader, far_writer), self.pass_on(far_reader, writer))
        except OSError:
            pass
        finally:
            writer.close()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()


async def proxied(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, prefix: str = "http://u%40x:secret@"
) -> asyncio.Server:
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"{prefix}127.0.0.1:{server.sockets[0].getsockname()[1]}")
    return server


CREDENTIALS = b"Proxy-Authorization: Basic " + b64encode(b"u@x:secret")


def test_the_environments_proxy_leads_to_a_provider_over_tls(
    play: Any, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(provider: Provider) -> None:
        server, origin = await secure(provider, authority)
        proxy = Proxy()
        going_through = await proxied(proxy, monkeypatch)
        for _ in range(2):
            provider.answers(HELLO)
            one = await ask(origin)
            assert await whole(one) == b"hello"
            one.finish()
        address = b"localhost:%d" % origin.port
        assert proxy.heads == [b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n\r\n" % (address, address, CREDENTIALS)]
        assert all(request.startswith(b"POST /v1/chat") and b"Proxy" not in request for request in provider.requests)
        one.abort()
        await provider.until(lambda: provider.open == 0)
        server.close()
        going_through.close()

    play(story)


def test_the_environments_proxy_is_asked_for_a_provider_without_tls(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(provider: Provider) -> None:
        proxy = Proxy()
        server = await proxied(proxy, monkeypatch)
        one = await ask(Origin("http", "model.example", 8000))
        assert await whole(one) == b"hello"
        assert proxy.heads[0].startswith(
            b"POST http://model.example:8000/v1/chat HTTP/1.1\r\nHost: model.example:8000\r\n"
        )
        assert CREDENTIALS in proxy.heads[0]
        one.abort()
        server.close()

    play(story)


def test_no_proxy_is_honoured(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(provider: Provider) -> None:
        proxy = Proxy()
        server = await proxied(proxy, monkeypatch)
        monkeypatch.setenv("no_proxy", "127.0.0.1,other.example")
        provider.answers(HELLO)
        assert await whole(await ask(provider.origin)) == b"hello"
        assert proxy.heads == []
        server.close()

    play(story)


@pytest.mark.parametrize("reason", ["refuses", "is not there", "speaks TLS", "hangs up"])
def test_a_proxy_that_does_not_lead_there_means_that_nothing_was_sent(
    play: Any, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    async def story(provider: Provider) -> None:
        proxy = Proxy(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        if reason == "hangs up":
            proxy.refusal = b"HTTP/1.1 200 Connection established\r\n\r\n"
            monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
        server = await proxied(proxy, monkeypatch, "https://" if reason == "speaks TLS" else "")
        if reason == "is not there":
            server.close()
        with pytest.raises(NotSent, match=r"407|refused|Connect call failed|only proxies|no connection to"):
            await ask(Origin("https", "localhost", provider.origin.port))
        assert [
            pool.connections for pool, _ in connection._pools.values() if pool.loop is asyncio.get_running_loop()
        ] == [set()]
        assert provider.requests == []
        server.close()

    play(story)


def test_a_key_that_no_header_can_hold_is_never_sent(upstream: FakeUpstream, settings: Any) -> None:
    from chatnest.provider.call import Call, UpstreamUnavailable

    settings.CHATNEST = {**settings.CHATNEST, "OPENAI_API_KEY": "sk-a\r\nX-Evil: 1", "UPSTREAM_MAX_RETRIES": 0}
    with pytest.raises(UpstreamUnavailable):
        asyncio.run(Call(b"{}").open(1))
    assert upstream.requests == []

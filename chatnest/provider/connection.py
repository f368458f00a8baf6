"""HTTP/1.1 to the provider: one request at a time, its answer as it arrives, the connection kept for the next.

Our own, because a streamed token spends its time here: a general client (aiohttp) takes two microseconds for each
chunk of an answer and a tenth of a request. The parser is llhttp, which is Node's. HTTP/1.1 only: closing an HTTP/2
stream does not reach the provider with today's Python clients (https://github.com/encode/httpcore/issues/943).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import zlib
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httptools
from aiohappyeyeballs import start_connection

CONNECT_SECONDS: Final = 10
KEEP_ALIVE_SECONDS: Final = 15  # less than servers wait, or a request could meet a connection that is just closing
LINGER_SECONDS: Final = 1  # for the last bytes of an answer whose end is known
MAX_BUFFERED: Final = 64 * 1024
MAX_HEAD_BYTES: Final = 64 * 1024


class NotSent(OSError):
    """The request never left, so nobody can have billed it."""


class Origin(NamedTuple):
    """Where a connection leads."""

    scheme: str
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """As ``Host`` names it: without the port that its scheme implies."""
        return self.address.removesuffix(f":{_PORTS[self.scheme]}")


_PORTS: Final = {"http": 80, "https": 443}


class Connection(asyncio.Protocol):
    """Made by ``connect``. ``post``, then ``read`` to the end, then ``finish``; or ``abort`` at any time."""

    __slots__ = (
        "_body",
        "_buffered",
        "_complete",
        "_encoding",
        "_error",
        "_inflate",
        "_origin",
        "_parser",
        "_paused",
        "_pool",
        "_reusable",
        "_timer",
        "_transport",
        "_waiter",
        "headers",
        "on_body",
        "proxy",
        "status",
    )

    def __init__(self, pool: Pool, origin: Origin, proxy: SplitResult | None) -> None:
        self._pool = pool
        self._origin = origin
        self.proxy = proxy
        self._transport: Any = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._paused = False
        self._expect()

    def _expect(self) -> None:
        """Another answer."""
        self._body: list[bytes] = []
        self.on_body = self._body.append  # called for each chunk, and by C
        self._parser: Any = httptools.HttpResponseParser(self)
        self._buffered = 0
        self._complete = self._reusable = False
        self._encoding = ""
        self._inflate: Any = None
        self.status = 0
        self.headers: dict[str, str] = {}

    # For the one who asks.

    async def post(self, path: str, headers: str, body: bytes) -> None:
        """Send a request, and wait for the answer's status and headers. Raises OSError and ValueError."""
        target = f"http://{self._origin.authority}{path}" if self._plain_proxy else path
        head = f"POST {target} HTTP/1.1\r\nHost: {self._origin.authority}\r\n{headers}Content-Length: {len(body)}\r\n"
        if self._plain_proxy:
            head += _credentials(self._plain_proxy)
        await self._ask(head.encode("latin-1") + b"\r\n" + body)
        self._encoding = self.headers.get("content-encoding", "").lower().replace("identity", "")

    async def _ask(self, request: bytes) -> None:
        self._expect()
        self._transport.write(request)
        while not self.status:
            await self._wait()

    async def read(self) -> bytes:
        """What has arrived of the body, b"" at its end. Cancelled, it loses nothing. Raises OSError and ValueError."""
        if self._encoding:
            return await self._read_packed()
        while not (received := self._take()) and not self._complete:
            await self._wait()
        return received

    async def _read_packed(self) -> bytes:
        """For who compresses though asked not to. A little may unpack to a lot: that comes bit by bit."""
        if self._encoding not in ("gzip", "deflate"):
            raise ValueError(f"an answer in {self._encoding}, which was not asked for")
        if not self._inflate:
            self._inflate = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
        while True:
            if self._inflate.unconsumed_tail:
                await asyncio.sleep(0)  # others go on meanwhile
                received = b""
            else:
                received = self._take()
            if unpacked := self._unpacked(received):
                return unpacked
            if not self._inflate.unconsumed_tail:
                if self._complete:
                    return b""
                await self._wait()

    def _unpacked(self, received: bytes) -> bytes:
        try:
            unpacked: bytes = self._inflate.decompress(self._inflate.unconsumed_tail + received, MAX_BUFFERED)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if self._inflate.unused_data:
            raise ValueError("more than one compressed body")
        return unpacked

    def _take(self) -> bytes:
        received = b"".join(self._body)
        self._body.clear()
        self._buffered = 0
        if self._paused and not self._error:
            self._paused = False
            self._transport.resume_reading()
        return received

    async def _wait(self) -> None:
        if self._error:
            raise self._error
        self._waiter = self._pool.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def finish(self) -> None:
        """The answer is known; what may be left of it is not waited for. Another request may use the connection."""
        if self._complete:
            self._keep()
        elif not self._pool.loop.is_closed():
            self._timer = self._pool.loop.call_later(LINGER_SECONDS, self.abort)

    def abort(self) -> None:
        """Close the socket now, which is what tells the provider to stop."""
        if self._transport:
            with suppress(RuntimeError):  # the loop is closed, and its sockets with it
                self._transport.abort()

    # Between two answers.

    def _keep(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._error or self._paused or not self._reusable or self._transport.get_write_buffer_size():
            self.abort()
        else:
            self._timer = self._pool.loop.call_later(KEEP_ALIVE_SECONDS, self.abort)
            self._pool.idle.setdefault(self._origin, []).append(self)

    def leave_pool(self) -> bool:
        """Whether it can still be used."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        return not (self._error or self._transport.is_closing())

    # For the transport.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._pool.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffered += len(data)
        try:
            if self._complete:
                raise ValueError("more than an answer")
            self._parser.feed_data(data)
            if not self.status and self._buffered > MAX_HEAD_BYTES:
                raise ValueError("headers without an end")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError) as error:
            self._error = ValueError(f"not HTTP: {error}")
            self.abort()
        if self._complete and self._timer:  # nobody waits for it any more
            self._keep()
        elif self._buffered > MAX_BUFFERED and not (self._paused or self._error):
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.forget(self, self._origin)
        if self._timer:
            self._timer.cancel()
        framed = "content-length" in self.headers or "transfer-encoding" in self.headers
        if self.status and not framed and not error:
            self._complete = True  # the end of the connection is the end of the answer
        self._error = self._error or error or ConnectionResetError("the connection was closed")
        self._parser = None  # they refer to each other
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # For the parser, which finds ``on_body`` too.

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("more than an answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # after the body, what is called a trailer
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status
        else:  # 100 Continue and its like announce the answer
            self.headers = {}

    def on_message_complete(self) -> None:
        self._complete = bool(self.status)
        self._reusable = self._parser.should_keep_alive()  # true no longer once this returns

    # Through a proxy.

    @property
    def _plain_proxy(self) -> SplitResult | None:
        return self.proxy if self._origin.scheme == "http" else None

    async def tunnel(self, proxy: SplitResult) -> None:
        """Let the proxy lead to the origin, and speak TLS with that."""
        address = self._origin.address
        head = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{_credentials(proxy)}\r\n"
        await self._ask(head.encode("latin-1"))
        if self.status != 200:
            raise OSError(f"the proxy answers {self.status}")
        self._transport = await self._pool.loop.start_tls(
            self._transport, self, tls(), server_hostname=self._origin.host
        )


class Pool:
    """One event loop's connections: kept alive, without a limit, for the process's limit on streams is one.

    A pool that is full makes requests wait in silence; the limit on streams refuses them aloud.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.idle: dict[Origin, list[Connection]] = {}
        self.connections: set[Connection] = set()

    async def take(self, origin: Origin) -> Connection:
        """A connection to ``origin``, the one used last if any is idle. Raises NotSent."""
        while idle := self.idle.get(origin):
            if (connection := idle.pop()).leave_pool():
                return connection
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await self._connect(origin)
        except TimeoutError:
            raise NotSent(f"no connection to {origin.authority} in {CONNECT_SECONDS} seconds") from None
        except (OSError, ValueError) as error:
            raise NotSent(f"{origin.authority}: {error}") from error

    async def _connect(self, origin: Origin) -> Connection:
        proxy = _proxy(origin)
        host, port = (proxy.hostname, proxy.port or 80) if proxy else (origin.host, origin.port)
        secure = origin.scheme == "https" and not proxy
        connection = Connection(self, origin, proxy)
        addresses = await self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sock = await start_connection(addresses, happy_eyeballs_delay=0.25)
        trust: dict[str, Any] = {"ssl": tls(), "server_hostname": host} if secure else {}
        await self.loop.create_connection(lambda: connection, sock=sock, **trust)
        if proxy and origin.scheme == "https":
            try:
                await connection.tunnel(proxy)
            except BaseException:
                connection.abort()
                self.forget(connection, origin)  # a TLS handshake that fails tells nobody
                raise
        return connection

    def forget(self, connection: Connection, origin: Origin) -> None:
        self.connections.discard(connection)
        if connection in (idle := self.idle.get(origin, [])):
            idle.remove(connection)

    def close(self) -> None:
        for connection in [*self.connections]:
            connection.abort()


async def connect(origin: Origin) -> Connection:
    """A connection of this event loop, new or kept. Raises NotSent."""
    loop = asyncio.get_running_loop()
    if loop not in _pools:
        pool = Pool()
        keeper = _closed_with_loop(pool)
        _pools[loop] = pool, keeper
        await anext(keeper)
    return await _pools[loop][0].take(origin)


_pools: Final[dict[asyncio.AbstractEventLoop, tuple[Pool, AsyncGenerator[None]]]] = {}


async def _closed_with_loop(pool: Pool) -> AsyncGenerator[None]:
    """Django tells nobody of a shutdown, but a loop that ends closes its generators (``shutdown_asyncgens``)."""
    try:
        yield
    finally:
        _pools.pop(asyncio.get_running_loop(), None)
        pool.close()
        await asyncio.sleep(0)  # a transport closes its socket in the loop's next turn


@lru_cache(maxsize=16)
def locate(url: str) -> tuple[Origin, str]:
    """The origin and the path of an http or https URL. Raises NotSent."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        if not host or parts.scheme not in _PORTS:
            raise ValueError("it must begin with http:// or https:// and name a host")
        if parts.query:
            raise ValueError("it must not have a query")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        return Origin(parts.scheme, host, parts.port or _PORTS[parts.scheme]), path
    except ValueError as error:
        raise NotSent(f"this is no address of a provider: {error}") from None


@cache
def tls() -> ssl.SSLContext:
    """Python's defaults: the system's authorities, or those of SSL_CERT_FILE; names are checked."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _proxy(origin: Origin) -> SplitResult | None:
    """The proxy that the environment names (HTTP_PROXY, HTTPS_PROXY, NO_PROXY). Raises ValueError."""
    named = getproxies().get(origin.scheme)
    if not named or proxy_bypass(origin.host):
        return None
    proxy = urlsplit(named if "://" in named else f"http://{named}")
    if proxy.scheme != "http":
        raise ValueError("only proxies whose address begins with http:// can be used")
    return proxy


def _credentials(proxy: SplitResult) -> str:
    if not proxy.username:
        return ""
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return f"Proxy-Authorization: Basic {b64encode(pair.encode()).decode()}\r\n"

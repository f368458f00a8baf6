"""What is below the openai package: httpx2's client interface over aiohttp, for one event loop.

Ours, because it is worth its lines: beside the package's own ``DefaultAioHttpClient`` a request costs 1.0 instead of
1.36 x Express, and a token of a burst the same; over the package's default transport 2.3 x. It does what one
request for a stream needs, so files, forms, cookies, redirects and HTTP/2 are left out (closing an HTTP/2 stream
does not reach the provider: https://github.com/encode/httpcore/issues/943).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import cache, lru_cache
from typing import Any, Final
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2

CONNECT_SECONDS: Final = 10
KEEP_ALIVE_SECONDS: Final = 4  # less than uvicorn's 5: a request that meets a closing connection counts as billed
MAX_BUFFERED: Final = 16 * 1024  # bytes of an answer; aiohttp stops reading at twice as much
MAX_RECEIVED: Final = 32 * 1024  # bytes that the kernel takes meanwhile, and aiohttp from it at once
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_REFUSAL_BYTES: Final = 64 * 1024
REFUSAL_SECONDS: Final = 2  # for the rest of a refusal's words


class Body:
    """A request's body, which knows whether it was ``sent``: it is asked for once there is a connection."""

    __slots__ = ("data", "sent")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sent = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.sent = True
        yield self.data


class _Nothing(httpx2.AsyncBaseTransport):
    """In place of httpx2's own transport, which would read certificates."""


class HTTPClient(httpx2.AsyncClient):
    """POSTs a Body, streams the answer. Raises httpx2's errors. Without a limit: the one on streams is aloud."""

    def __init__(self) -> None:
        super().__init__(transport=_Nothing(), trust_env=False)
        connector = aiohttp.TCPConnector(
            ssl=tls(), limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, socket_factory=_socket
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            read_bufsize=MAX_BUFFERED,
            max_field_size=MAX_HEADER_BYTES,  # a security policy may be long
            max_line_size=MAX_HEADER_BYTES,
        )

    def build_request(self, method: str, url: httpx2.URL | str, **given: Any) -> httpx2.Request:
        if params := given.get("params"):
            url = httpx2.URL(url, params=params)
        request = httpx2.Request(method, _parsed(str(url)), headers=given.get("headers"))
        request.extensions["body"] = given["content"]
        return request

    async def send(self, request: httpx2.Request, **given: Any) -> httpx2.Response:
        try:
            response = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                data=request.extensions["body"],
                allow_redirects=False,  # the key is for this host only
                proxy=_proxy(request.url.scheme, request.url.host),
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise httpx2.ConnectError(str(error) or repr(error), request=request) from error
        return httpx2.Response(
            response.status, headers=response.raw_headers, stream=_Received(response, request), request=request
        )

    async def aclose(self) -> None:
        await self._session.close()


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """With little room in the kernel: a provider that is faster than the reader waits, and not its bytes here."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MAX_RECEIVED)
    return made


class _Received(httpx2.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse, request: httpx2.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            if self._response.status >= 300:  # the openai package reads a refusal to its end, however long
                yield await self._refusal()
                return
            content = self._response.content
            while received := await content.readany():
                yield received
        except (aiohttp.ClientError, OSError) as error:
            raise httpx2.ReadError(str(error) or repr(error), request=self._request) from error

    async def _refusal(self) -> bytes:
        said = b""
        try:
            async with asyncio.timeout(REFUSAL_SECONDS):
                while len(said) < MAX_REFUSAL_BYTES and (more := await self._response.content.readany()):
                    said += more
        except (aiohttp.ClientError, TimeoutError):
            pass  # the status is what counts
        return said

    async def aclose(self) -> None:
        connection = self._response.connection  # None once the body was read to its end: it is kept
        if connection and connection.transport:
            connection.transport.abort()  # closed politely, TLS waits for an answer, uvloop's for 30 seconds
        self._response.close()


@lru_cache(maxsize=64)
def _parsed(url: str) -> httpx2.URL:
    return httpx2.URL(url)


@cache
def tls() -> ssl.SSLContext:
    """Python's defaults: the system's authorities, or those of SSL_CERT_FILE; names are checked."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@lru_cache(maxsize=64)
def _proxy(scheme: str, host: str) -> str | None:
    """The proxy that the environment names (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), as the process found it."""
    named = _proxies().get(scheme)
    if not named or proxy_bypass(host):
        return None
    return named if "://" in named else f"http://{named}"


def _proxies() -> Mapping[str, str]:
    return getproxies()

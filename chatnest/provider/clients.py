"""One AsyncOpenAI for each provider and event loop, closed with the loop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import openai
from openai import AsyncOpenAI

from ..conf import Provider
from ..hooks import imported
from .http import HTTPClient

NOBODYS: Final = ("localhost", "test", "example", "invalid")  # no real host has such a name: RFC 2606
USER_AGENT: Final = f"AsyncOpenAI/Python {openai.__version__}"  # some fronts refuse what they do not know


class Client(AsyncOpenAI):
    """The package's client with the headers that PROVIDERS names and no others.

    Left out: the telemetry, and what OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS would send to any
    provider in silence.
    """

    def __init__(self, provider: Provider, http_client: HTTPClient) -> None:
        parts = urlsplit(provider.base_url)
        self._headers: dict[str, Any] = {
            "Content-Type": "application/json",
            "User-Agent": USER_AGENT,
            **({"OpenAI-Organization": provider.organization} if provider.organization else {}),
            **provider.headers,
        }
        super().__init__(
            api_key=_awaitable(provider.api_key) or "none",  # it wants one; ``Call`` leaves the header out
            base_url=urlunsplit(parts._replace(query="")),
            default_query={**dict(parse_qsl(parts.query, keep_blank_values=True)), **provider.query},
            max_retries=0,
            http_client=http_client,
        )
        # Whole, or the package would take it apart and join it for each request.
        self.completions_url = f"{self.base_url}chat/completions"

    @property
    def default_headers(self) -> dict[str, Any]:
        return self._headers


class _Clients:
    """One event loop's. A provider whose settings have changed gets another client; connections are shared."""

    def __init__(self) -> None:
        self._http_client: HTTPClient | None = None
        self._made: dict[str, tuple[Provider, AsyncOpenAI]] = {}
        self._theirs: list[AsyncOpenAI] = []

    def client(self, provider: Provider) -> AsyncOpenAI:
        made = self._made.get(provider.name)
        if made and made[0] == provider:
            return made[1]
        client = self._make(provider)
        self._made[provider.name] = provider, client
        return client

    def _make(self, provider: Provider) -> AsyncOpenAI:
        if provider.client is None:
            guard.look_at(provider)
            self._http_client = self._http_client or HTTPClient()
            return Client(provider, self._http_client)
        client: object = imported(provider.client)()
        if not isinstance(client, AsyncOpenAI):
            raise TypeError(f"CLIENT of the provider {provider.name} must return an AsyncOpenAI, not {type(client)}")
        self._theirs.append(client)
        return client

    async def close(self) -> None:
        for client in self._theirs:
            await client.close()
        if self._http_client:
            await self._http_client.aclose()


class Guard:
    """What a test forgot to script is not asked, and paid, for real. ``lifted``: by ``chatnest.testing``.

    A client that the site makes itself (CLIENT) may be scripted too, and is not looked at.
    """

    def __init__(self) -> None:
        self.lifted = 0

    def look_at(self, provider: Provider) -> None:
        host = urlsplit(provider.base_url).hostname or ""
        is_nobodys = host == "::1" or host.startswith("127.") or host.rpartition(".")[2] in NOBODYS
        if self.lifted or is_nobodys or not _is_tested():
            return
        raise RuntimeError(
            f"This test would ask {host}, and pay. Script the provider (chatnest.testing.FakeUpstream), or say "
            "chatnest.testing.real_provider()"
        )


def _is_tested() -> bool:
    """Between the test runner's setup_test_environment and its teardown: Django's and pytest-django's call it."""
    utils = sys.modules.get("django.test.utils")
    return utils is not None and hasattr(utils._TestState, "saved_data")


guard: Final = Guard()


def client(provider: Provider) -> AsyncOpenAI:
    """The running loop's client of ``provider``."""
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        clients = _Clients()
        keeper = _closed_with_loop(clients)
        _clients[loop] = clients, keeper
        _beginnings.add(begin := loop.create_task(_begin(keeper)))
        begin.add_done_callback(_beginnings.discard)
    return _clients[loop][0].client(provider)


_beginnings: Final[set[asyncio.Task[None]]] = set()
_clients: Final[dict[asyncio.AbstractEventLoop, tuple[_Clients, AsyncGenerator[None]]]] = {}


async def _begin(keeper: AsyncGenerator[None]) -> None:
    await anext(keeper)


async def _closed_with_loop(clients: _Clients) -> AsyncGenerator[None]:
    """Django tells nobody of a shutdown, but a loop that ends closes its generators (``shutdown_asyncgens``)."""
    try:
        yield
    finally:
        _clients.pop(asyncio.get_running_loop(), None)
        await clients.close()
        await asyncio.sleep(0)  # a transport closes its socket in the loop's next turn


def _awaitable(key: str | Callable[[], Any]) -> str | Callable[[], Awaitable[str]]:
    """A key that rotates is asked for at each request; the package wants that to be a coroutine."""
    if isinstance(key, str):
        return key

    async def ask() -> str:
        answer = key()
        return await answer if isinstance(answer, Awaitable) else str(answer)

    return ask

"""One request to the provider, from sent to closed: what it answers, or why not."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import httpx2
import msgspec
import openai
from openai import AsyncAzureOpenAI, AsyncOpenAI, AsyncStream, Omit

from ..conf import Provider
from ..errors import Overloaded, UpstreamError, UpstreamMisconfigured, UpstreamUnavailable
from ..wires import Message
from . import failures
from .answer import Answer
from .chunks import Piece
from .clients import Client, client
from .failures import Failure
from .http import CONNECT_SECONDS, Body

logger = logging.getLogger("chatnest.upstream")

LINGER_READS: Final = 16
LINGER_SECONDS: Final = 1  # for the last bytes of an answer whose end is known: then its connection can be used again
POOL_SECONDS: Final = 1  # for a place in the pool of a client that the site made
RETRY_WITHIN_SECONDS: Final = 5  # a connection that breaks later may have had the whole work done for it
REPEAT_SECONDS: Final = 60  # between two lines about the same fault of the operator's

_TIMEOUT: Final = httpx2.Timeout(None, connect=CONNECT_SECONDS, pool=POOL_SECONDS)  # deadlines are the stream's
_HEADERS: Final[dict[str, Any]] = {
    "Accept": "text/event-stream",
    "Accept-Encoding": "identity",  # a token is seen when it comes
    "x-stainless-retry-count": Omit(),
    "x-stainless-read-timeout": Omit(),
}
# Every option is said, or the package copies its defaults.
_OPTIONS: Final[dict[str, Any]] = {
    "timeout": _TIMEOUT,
    "max_retries": 0,
    "params": {},
    "follow_redirects": False,
    "security": {"bearer_auth": True},
    "post_parser": openai.NOT_GIVEN,
}
_encode = msgspec.json.Encoder().encode


class Call:
    """``open`` it, ``read`` until None, ``close`` it; by one task only. ``max_tokens``: the answer's allowance.

    ``answer`` is what was said. ``refused``: open has failed; ``retry_in``: in how many seconds the same may then be
    asked again, or None.
    """

    def __init__(
        self,
        provider: Provider,
        model: str,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None,
        log_fields: Mapping[str, object] | None = None,
    ) -> None:
        self._provider = provider
        self._log_fields = log_fields
        self._model = model
        self._request = _request(provider, model, messages, max_tokens, temperature)
        self._body = Body(b"")
        self._response: httpx2.Response | None = None
        self._received: AsyncIterator[bytes]
        self.refused = False
        self._not_billed = False
        self.answer = Answer()
        self.retry_in: float | None = None

    @property
    def billed(self) -> bool:
        """Whether the provider may charge for it: it was sent, and not refused in a way that says otherwise."""
        return self._body.sent and not self._not_billed

    async def open(self) -> None:
        """Send the request and wait for the answer's head. Raises UpstreamError and Overloaded."""
        failure = await self._post()
        if failure and failure.stream_options_refused and self._request.pop("stream_options", None):
            _without_stream_options.add(_key(self._provider))
            failure = await self._post()
        if failure:
            self.refused, self._not_billed = True, not failure.error.billed
            self.retry_in = failure.wait or 0.0 if failure.retry else None
            raise self._logged(failure)

    async def _post(self) -> Failure | None:
        self._body = Body(_encode(self._request))
        began = time.monotonic()
        try:
            maker = client(self._provider)
            response: Any = await maker.post(
                _address(maker, self._model),
                content=self._body,
                cast_to=httpx2.Response,  # as it is: a model for each chunk would cost ten times the relay
                stream=True,
                stream_cls=AsyncStream[Any],
                options=self._options(),
            )
        except openai.APIStatusError as error:
            refusal = error.response
            seconds = time.monotonic() - began
            return failures.refused(refusal.status_code, refusal.headers, refusal.content, seconds=seconds)
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, httpx2.PoolTimeout):
                raise Overloaded(retry_after=1) from None
            return self._unreachable(error.__cause__ or error, time.monotonic() - began)
        except Exception as error:  # a CLIENT that cannot be made, a key that no header may hold
            if self._body.sent:
                return self._unreachable(error, time.monotonic() - began)
            return Failure(UpstreamMisconfigured(), "the client", _words(error))
        self._response = response
        encoded = response.headers.get("content-encoding", "identity") != "identity"
        self._received = response.aiter_bytes() if encoded else aiter(response.stream)
        return None

    def _options(self) -> Any:
        headers = {**_HEADERS, "Content-Length": str(len(self._body.data))}
        keyless = not (self._provider.api_key or self._provider.client)
        if keyless and "authorization" not in map(str.lower, self._provider.headers):
            headers["Authorization"] = Omit()  # a local server wants none, and the package wants that said
        return {**_OPTIONS, "headers": headers}

    def _unreachable(self, error: BaseException, seconds: float) -> Failure:
        problem = UpstreamUnavailable()
        problem.billed = self._body.sent
        retry = not problem.billed or seconds < RETRY_WITHIN_SECONDS
        cause = "the connection broke" if problem.billed else "no connection could be made"
        return Failure(problem, cause, _words(error), retry=retry)

    async def read(self) -> list[Piece] | None:
        """What has come since, perhaps nothing; None at the end. Raises UpstreamError where the answer has failed."""
        answer = self.answer
        if not (answer.done or answer.error):
            try:
                pieces = answer.feed(await self._received.__anext__())
            except StopAsyncIteration:
                pieces = answer.end()
            except Exception as error:  # of whatever transport the site's client has
                if not answer.may_end:
                    logger.warning("The provider broke off: %s", _words(error), extra=self._log_fields)
                pieces = answer.end(cut=True)
            if pieces or not (answer.done or answer.error):
                return pieces
        if answer.error:  # its usage may follow
            await self._linger(self._feed_more)
        self.check()
        return None

    async def _feed_more(self) -> bool:
        received = await self._next()
        self.answer.feed(received) if received else self.answer.end()
        return not self.answer.done

    def check(self) -> None:
        """Raises UpstreamError if the answer has failed."""
        if self.answer.error is not None:
            raise self._logged(failures.said(self.answer.error))

    async def _next(self) -> bytes:
        return await anext(self._received, b"")

    async def close(self) -> None:
        """Close the connection; its socket too, unless the answer was read to its end."""
        if self._response:
            response, self._response = self._response, None
            if self.answer.ended:
                await self._linger(self._next)
            with suppress(Exception):
                await response.aclose()

    async def _linger(self, read: Callable[[], Awaitable[object]]) -> None:
        """For what belongs to the end: neither long, nor much."""
        with suppress(Exception):
            async with asyncio.timeout(LINGER_SECONDS):
                for _ in range(LINGER_READS):
                    if not await read():
                        return

    def _logged(self, failure: Failure) -> UpstreamError:
        """The provider's words go to the log, and nowhere else."""
        key = (*_key(self._provider), failure.cause)
        level = logging.WARNING
        if isinstance(failure.error, UpstreamMisconfigured):
            now = time.monotonic()
            if now < _told.get(key, 0.0):
                return failure.error
            _told[key] = now + REPEAT_SECONDS
            level = logging.ERROR
        logger.log(
            level, "The provider %s, model %s: %s: %s", self._provider.name, self._model, failure.cause, failure.words,
            extra=self._log_fields,
        )  # fmt: skip
        return failure.error


_told: Final[dict[tuple[str, ...], float]] = {}  # until when the operator need not be told again
_without_stream_options: Final[set[tuple[str, str]]] = set()


def _words(error: BaseException) -> str:
    """For the log: no key, which the repr of a UnicodeError shows, and no password in a proxy's address."""
    words = _CREDENTIALS.sub("//", f"{type(error).__name__}: {error}")
    return failures.printable(words, failures.LOGGED_CHARACTERS)


_CREDENTIALS: Final = re.compile(r"//[^/@\s]*@")


def _key(provider: Provider) -> tuple[str, str]:
    return provider.name, provider.base_url


def _request(
    provider: Provider, model: str, messages: Sequence[Message], max_tokens: int, temperature: float | None
) -> dict[str, Any]:
    """The JSON of a streaming chat completion."""
    request = {
        **provider.extra_body,
        "model": model,
        "messages": messages,
        "stream": True,
        provider.max_tokens_parameter: max_tokens,
    }
    if provider.stream_options and _key(provider) not in _without_stream_options:
        request["stream_options"] = {"include_usage": True}
    if temperature is not None:
        request["temperature"] = temperature
    return request


def _address(maker: AsyncOpenAI, model: str) -> str:
    """Azure has a path for each deployment, which the package takes from a body that it encodes itself."""
    if isinstance(maker, Client):
        return maker.completions_url
    if isinstance(maker, AsyncAzureOpenAI) and "/deployments/" not in maker.base_url.path:
        return f"/deployments/{model}/chat/completions"
    return "/chat/completions"

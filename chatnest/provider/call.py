"""The provider: one call of an OpenAI-compatible model, from request to pieces of text and usage.

Not the openai package: a read there cannot be cancelled without loss, and a heartbeat interrupts reads.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from ..conf import settings
from ..errors import UpstreamBroken, UpstreamError, UpstreamRateLimited, UpstreamRejected, UpstreamUnavailable
from ..wires import Message
from .connection import Connection, NotSent, connect, locate
from .events import EventDecoder

logger = logging.getLogger("chatnest.upstream")

LOGGED_BYTES: Final = 1000
MAX_EVENT_BYTES: Final = 2 * 1024 * 1024
MAX_TOKENS: Final = 1_000_000_000  # no answer has more, and no sum of a day's answers overflows its column
_TRANSIENT: Final = frozenset({408, 409, 429})


class Usage(msgspec.Struct, frozen=True):
    """What the provider says that it charges, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """The fields of a chunk that are read; decoding only these costs half a microsecond."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode
_encode = msgspec.json.Encoder().encode


def request_body(messages: Sequence[Message], *, model: str, temperature: float | None, max_tokens: int) -> bytes:
    """The JSON of a streaming chat completion request."""
    body: dict[str, object] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        settings.MAX_TOKENS_PARAMETER: max_tokens,
    }
    if temperature is not None:
        body["temperature"] = temperature
    return _encode(body)


class Call:
    """One call of the model: ``open`` it, ``read`` until it returns None, ``close`` it however it ended.

    ``billed`` is True once the provider may have charged for it: a request was sent and not refused.
    ``usage`` is what it reported; ``text`` is all that came, in so many ``pieces``.
    """

    __slots__ = (
        "_body",
        "_carry",
        "_connection",
        "_events",
        "_failure",
        "_finished",
        "_text",
        "billed",
        "ended",
        "pieces",
        "usage",
    )

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._events = EventDecoder(limit=MAX_EVENT_BYTES)
        self._connection: Connection | None = None
        self._finished = False  # the model gave its reason to stop
        self.ended = False  # [DONE], or its like
        self._failure: UpstreamError | None = None
        self._carry = ""  # half of a surrogate pair, whose other half the next piece brings
        self.billed = False
        self.usage: Usage | None = None
        self.pieces = 0
        self._text = bytearray()  # a list of small strings would take ten times as much

    async def open(self, seconds: float) -> None:
        """Send the request, again if it fails in a way that may pass. Raises UpstreamError.

        No retry begins later than ``seconds`` from now. There is none after the first byte: it could bill twice.
        """
        deadline = time.monotonic() + seconds
        attempt = 0
        while True:
            try:
                return await self._attempt()
            except UpstreamError as error:
                wait = max(0.5 * 2**attempt * random.uniform(0.75, 1.25), error.retry_after or 0)
                attempt += 1
                late = time.monotonic() + wait > deadline
                if late or not error.retryable or attempt > settings.UPSTREAM_MAX_RETRIES:
                    raise
            await asyncio.sleep(wait)

    async def _attempt(self) -> None:
        before = self.billed  # an earlier attempt that was cut off may have been billed
        try:
            origin, path = locate(settings.OPENAI_BASE_URL.rstrip("/") + "/chat/completions")
            headers = _headers()
            self._connection = connection = await connect(origin)
            self.billed = True
            await connection.post(path, headers, self._body)
        except NotSent as error:
            raise _logged(UpstreamUnavailable(), "cannot be reached: %s", error) from None
        except (OSError, ValueError) as error:
            self.close()
            raise _logged(UpstreamUnavailable(), "broke the connection off: %r", error) from None
        if connection.status != 200:
            self.billed = before
            self._connection = None
            try:
                raise await _refusal(connection)
            finally:
                connection.finish()

    async def read(self) -> list[str] | None:
        """The pieces of text that have arrived; None at the end. May be cancelled without loss.

        Raises UpstreamBroken where the answer is cut, unreadable, or ends before the model said that it was done.
        """
        assert self._connection
        if self._failure:
            raise self._failure
        if self.ended:
            return None
        try:
            received = await self._connection.read()
        except (OSError, ValueError) as error:
            self._cut("broke off: %r", error)
            return None
        if not received:
            self._cut("ended without a finish reason or [DONE]")
            return None
        pieces: list[str] = []
        try:
            self._take(received, pieces)
        except ValueError as error:  # what came before it is still said
            self._failure = _logged(UpstreamBroken(), "sent what cannot be read: %s", error)
        self.pieces += len(pieces)
        self._text += "".join(pieces).encode()
        return pieces

    @property
    def text(self) -> str:
        return self._text.decode()

    def _cut(self, words: str, *args: object) -> None:
        """The end of the connection: the end of the answer too if the model had said that it was done."""
        if not self._finished:
            raise _logged(UpstreamBroken(), words, *args)
        self.ended = True

    def _take(self, received: bytes, pieces: list[str]) -> None:
        for data in self._events.feed(received):
            lenient = False
            try:
                chunk = _decode(data)
            except msgspec.DecodeError:
                if data.strip() == b"[DONE]":
                    self.ended = True
                    break
                chunk, lenient = _decode_leniently(data), True
            if chunk.error is not None:
                raise ValueError(f"an error: {str(chunk.error)[:LOGGED_BYTES]}")
            if chunk.usage:
                self.usage = _sane(chunk.usage) or self.usage
            for choice in chunk.choices:
                if choice.finish_reason:
                    self._finished = True
                if choice.delta and (text := choice.delta.content):
                    if lenient or self._carry:
                        text = self._join_surrogates(text)
                    if text:
                        pieces.append(text)

    def _join_surrogates(self, text: str) -> str:
        text = self._carry + text
        self._carry = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
        text = text[: len(text) - len(self._carry)]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def close(self) -> None:
        """Close the connection, unless the answer was read to its end; then it is kept for another."""
        if self._connection:
            connection, self._connection = self._connection, None
            if self.ended:
                connection.finish()
            else:
                connection.abort()


def _decode_leniently(data: bytes) -> _Chunk:
    """For what msgspec refuses: half of a surrogate pair, nulls and types that are not OpenAI's. Raises ValueError."""
    try:
        loose = json.loads(data)
    except RecursionError:
        raise ValueError("an event nested too deeply") from None
    if not isinstance(loose, dict):
        raise ValueError("an event that is not an object")
    chunk = _Chunk(error=loose.get("error"))
    with suppress(msgspec.ValidationError):
        chunk.usage = msgspec.convert(loose.get("usage"), Usage | None, strict=False)
    choices = loose.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        delta = choice.get("delta") if isinstance(choice, dict) else None
        content = delta.get("content") if isinstance(delta, dict) else None
        reason = choice.get("finish_reason") if isinstance(choice, dict) else None
        chunk.choices.append(
            _Choice(
                _Delta(content if isinstance(content, str) else None),
                reason if isinstance(reason, str) else None,
            )
        )
    return chunk


def _sane(usage: Usage) -> Usage | None:
    """None for a usage that cannot be true: a provider that reports nothing must not make the model free."""
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    total = usage.total_tokens or prompt + completion
    true = min(prompt, completion) >= 0 and total > 0 and max(prompt, completion, total) <= MAX_TOKENS
    return Usage(prompt, completion, total) if true else None


def _headers() -> str:
    headers = "Content-Type: application/json\r\nAccept: text/event-stream\r\nAccept-Encoding: identity\r\n"
    if key := settings.OPENAI_API_KEY:
        if not (key.isascii() and key.isprintable()):
            raise NotSent("OPENAI_API_KEY holds characters that no header may")
        headers += f"Authorization: Bearer {key}\r\n"
    return headers


async def _refusal(connection: Connection) -> UpstreamError:
    """Our own error for a status that is not 200. The provider's words go to the log, and nowhere else."""
    status, said = connection.status, b""
    with suppress(OSError, ValueError):
        async with asyncio.timeout(2):
            while len(said) < LOGGED_BYTES and (more := await connection.read()):
                said += more
    logger.warning("The provider refused with %d: %s", status, said[:LOGGED_BYTES].decode(errors="replace"))
    if status == 429:
        kind: type[UpstreamError] = UpstreamRateLimited
    elif status in _TRANSIENT or status >= 500:
        kind = UpstreamUnavailable
    else:
        kind = UpstreamRejected
    return kind(retry_after=_retry_after(connection.headers))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds: the header is a number of them or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after", "")
    with suppress(ValueError, TypeError):
        if value.replace(".", "", 1).isdigit():
            return float(value) if len(value) < 10 else None
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _logged(error: UpstreamError, words: str, *args: object) -> UpstreamError:
    logger.warning("The provider " + words, *args)
    return error

"""The chat-nest wire: JSON in, named Server-Sent Events out. DESIGN calls it ``POST /api/chat``.

Unchanged from the Node package chat-nest-server 1.1.1, but for the ``usage`` event and the refusals' codes.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
from django.http import HttpResponse
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy as _

from ..conf import is_number, settings
from ..errors import ChatError, InvalidMessages, InvalidRequest
from ..limits import profile_name
from . import ChatRequest, Message, Usage

CONTENT_TYPE: Final = "text/event-stream; charset=utf-8"
START: Final = b"event: start\ndata: \n\n"
PING: Final = b"event: ping\ndata: \n\n"
DONE: Final = b"event: done\ndata: \n\n"

# Histories are sent whole and trimmed here; past this a client is not having a conversation.
MAX_MESSAGES: Final = 1000

_encode = msgspec.json.Encoder().encode


class _Body(msgspec.Struct):
    # The types are checked below, so that each refusal can say what the field must be.
    messages: Any = None
    profile: Any = None
    aiUsageProfile: Any = None  # noqa: N815 - the wire's name
    dailyTokenLimit: Any = None  # noqa: N815
    maxTokensPerRequest: Any = None  # noqa: N815


_decode = msgspec.json.Decoder(_Body).decode


def parse(body: bytes) -> ChatRequest:
    """The request in ``body``. Raises InvalidMessages and InvalidRequest."""
    typed = _json(body)
    if not isinstance(typed.messages, list):
        raise InvalidMessages()
    if not 1 <= len(typed.messages) <= MAX_MESSAGES:
        raise InvalidRequest(format_lazy(_("messages must have 1 to {most} items."), most=MAX_MESSAGES))
    return ChatRequest(
        messages=tuple(_message(f"messages[{i}]", item) for i, item in enumerate(typed.messages)),
        profile=profile_name(typed.profile if typed.profile is not None else typed.aiUsageProfile),
        daily_token_limit=_limit("dailyTokenLimit", typed.dailyTokenLimit),
        max_tokens_per_request=_limit("maxTokensPerRequest", typed.maxTokensPerRequest),
    )


def _json(body: bytes) -> _Body:
    try:
        text = body.decode()  # msgspec does not look inside the fields that it skips
        escaped = b"\\" in body and (b"\\ud" in body or b"\\uD" in body)  # the first of them is soon told
        return _decode(_mended(text)) if escaped else _decode(body)
    except msgspec.ValidationError as error:
        _said, inside, field = str(error).partition(" - at `$.")
        if not inside:
            raise InvalidRequest(_("The request body must be a JSON object.")) from None
        rule = _("{field} holds a number that is out of range.")  # 1e400: no float can hold it
        raise InvalidRequest(format_lazy(rule, field=field.rstrip("`"))) from None
    except (ValueError, RecursionError):
        raise InvalidRequest(_("The request body must be valid JSON in UTF-8, without NaN or Infinity.")) from None


def _mended(text: str) -> str:
    """Half of a surrogate pair, as a history cut inside an emoji has it, becomes U+FFFD."""
    return _ESCAPED.sub(lambda escape: escape[0] if escape["other"] else "\\ufffd", text)


# An escaped backslash, which escapes nothing more; a whole pair; or half of one.
_ESCAPED: Final = re.compile(
    r"(?P<other>\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def _message(where: str, item: object) -> Message:
    if not isinstance(item, dict):
        raise InvalidRequest(format_lazy(_("{field} must be an object with role and content."), field=where))
    role, content = item.get("role"), item.get("content")
    roles = ("user", "assistant", "system") if settings.CLIENT_SYSTEM_MESSAGES else ("user", "assistant")
    if not isinstance(role, str) or role not in roles:
        raise InvalidRequest(
            format_lazy(_("{field} must be one of {values}."), field=f"{where}.role", values=", ".join(roles))
        )
    if not isinstance(content, str):
        raise InvalidRequest(format_lazy(_("{field} must be a string."), field=f"{where}.content"))
    if "\0" in content:
        raise InvalidRequest(format_lazy(_("{field} must not contain the NUL character."), field=f"{where}.content"))
    return Message(role=role, content=content)  # type: ignore[arg-type]


def _limit(name: str, value: object) -> int | None:
    if value is None:
        return None
    if not is_number(value) or not 0 < value < 2**63:  # type: ignore[operator]
        raise InvalidRequest(format_lazy(_("{field} must be a number above 0 and below 2^63."), field=name))
    return int(value)  # type: ignore[call-overload, no-any-return]


def token(text: str) -> bytes:
    """The frame of a piece of the answer."""
    return b"event: token\ndata: %b\n\n" % _line(text)


def reasoning(text: str) -> bytes:
    """The frame of a piece of the model's visible reasoning."""
    return b"event: reasoning\ndata: %b\n\n" % _line(text)


def _line(text: str) -> bytes:
    """JSON without what some readers take for the end of a line (Python's splitlines, as httpx and requests use it)."""
    encoded = _encode(text)
    if not text.isascii():
        for character, escape in _LINE_ENDS:
            encoded = encoded.replace(character, escape)
    return encoded


_LINE_ENDS: Final = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))


def done(usage: Usage) -> bytes:
    """The ``usage`` frame and the ``done`` frame."""
    data = {
        "promptTokens": usage.prompt_tokens,
        "completionTokens": usage.completion_tokens,
        "totalTokens": usage.total_tokens,
        "remainingToday": usage.remaining,
        "finishReason": usage.finish_reason,
        "droppedMessages": usage.dropped_messages,
    }
    return b"event: usage\ndata: %b\n\n" % _encode(data) + DONE


def error(problem: ChatError) -> bytes:
    """The ``error`` frame that ends a stream without ``done``."""
    return b"event: error\ndata: %b\n\n" % _encode(_problem("message", problem))


def refusal(problem: ChatError) -> HttpResponse:
    """The JSON answer to a request that gets no stream."""
    response = HttpResponse(_encode(_problem("error", problem)), content_type="application/json", status=problem.status)
    response["Cache-Control"] = "no-store"
    if problem.retry_after is not None:
        response["Retry-After"] = str(problem.retry_after)
    return response


def _problem(key: str, problem: ChatError) -> dict[str, object]:
    said: dict[str, object] = {key: str(problem.message), "code": problem.code, "retryable": problem.retryable}
    if problem.retry_after is not None:
        said["retryAfter"] = problem.retry_after
    return said

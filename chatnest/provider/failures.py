"""What a provider's refusal or error means: whose fault it is, whether it may have billed, whether to ask again. Pure.

A status alone does not tell: one 429 passes in a second, another with the next invoice. So the codes that providers
use are looked up first, then their words, and the status decides what neither knows. What providers and gateways
really send stands, with its sources, in ``tests/test_failures.py``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

from ..errors import (
    ContextLengthExceeded,
    UpstreamBroken,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)

LOGGED_CHARACTERS: Final = 1000
_READ_CHARACTERS: Final = 4000
_BILLS_AFTER: Final = 5.0  # seconds: a server that fails sooner has not worked on the prompt
_LONGEST_WAIT: Final = 120.0  # seconds; the openai package waits no longer either
_DAY: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Failure:
    """``error`` is to be raised, with its ``retry_after`` and ``billed``; its message is ours.

    ``cause`` is one of a few fixed word groups, to log once for each. ``words`` are the provider's, printable, at most
    1000 characters. ``retry``: known not billed, and may pass. ``wait``: seconds that the provider asked for, at most a
    day. ``stream_options_refused``: ask once more without them.
    """

    error: UpstreamError
    cause: str
    words: str
    retry: bool = False
    wait: float | None = None
    stream_options_refused: bool = False

    def __post_init__(self) -> None:
        self.error.detail = self.cause  # for operators


class _Meaning(NamedTuple):
    cause: str
    error: type[UpstreamError]
    codes: str = ""  # the whole of a body's code, type, status or reason, in lower case
    words: str = ""  # a pattern, in lower case; gaps in it are bounded, so that no body makes it slow


_QUOTA: Final = _Meaning(
    "quota used up",
    UpstreamMisconfigured,
    "402 insufficient_quota billing_not_active billing_error arrearage exceeded_current_quota_error budget_exceeded"
    " credit_balance_exhausted",
    r"insufficient[ _](?:\w{1,12}[ _])?(?:quota|balance|credit|fund)|(?:余额|额度)(?:不足|已用尽)"
    r"|exceeded your current quota(?![\s\S]{0,2000}retry in)"  # Gemini says this of a minute's limit too
    r"|quota exceeded for metric[^\n]{0,120}limit: 0\b"
    r"|(?:requests?|tokens?|models?|limit|quota)[ \w-]{0,20}per[ _-]?day|bymodelbyday"
    r"|(?:spend|spending|billing|usage|credit|budget|key|monthly)[ _-](?:hard[ _-])?limit"
    r"|budget has been exceeded|(?:over|crossed|exceeded) ?budget"
    r"|credit balance|(?:out of|all available|more|purchase|included) credits"
    r"|account[^.\n]{0,40}(?:suspended|deactivated|not active|good standing)",
)
_TOO_LONG: Final = _Meaning(
    "conversation too long",
    ContextLengthExceeded,
    "413 context_length_exceeded exceed_context_size_error context_exceeded request_too_large tokens_limit_reached",
    r"(?:exceed|maximum|too (?:long|large)|longer|larger|greater)[^.\n]{0,80}?context[ _]?(?:length|window|size|limit)"
    r"|context[ _]?(?:length|window|size|limit)[^.\n]{0,40}?(?:exceed|(?:is|of) (?:only )?\d)"
    r"|\b(?:prompt|input|conversation|request|message)s?(?: body)?(?: is| are)? too (?:long|large)\b"
    r"|'messages[^'\n]{0,40}': string too long|exceeded model token limit|range of input length should be"
    r"|\b(?:input|prompt) (?:tokens?|length|token count)\b[^\n]{0,40}exceed|\bmaximum (?:prompt|input) length is"
    r"|`inputs` (?:tokens \+|must have less than)|reduce (?:the length of the|your) (?:messages?|prompt|input)",
)
_CONTENT: Final = _Meaning(
    "content policy",
    UpstreamRejected,
    "content_filter responsibleaipolicyviolation data_inspection_failed datainspectionfailed sensitive",
    r"content[ _](?:management )?(?:policy|filter)|usage policy|safety system|inappropriate content"
    r"|(?:input|prompt|request) was flagged|content exists risk",
)
_KEY: Final = _Meaning(
    "wrong key",
    UpstreamMisconfigured,
    "401 invalid_api_key authentication_error invalid_authentication_error auth_error token_not_found_in_db"
    " expired_key api_key_invalid unauthorized unauthenticated no_db_connection",
    r"(?:incorrect|invalid|expired|missing)[ _](?:x-)?api[ _-]?key|api key (?:not valid|is invalid)",
)
_MODEL: Final = _Meaning(
    "unknown model",
    UpstreamMisconfigured,
    "404 model_not_found model_decommissioned model_not_available model_not_supported deploymentnotfound"
    " operationnotsupported",
    r"model[^\n]{0,100}?(?:not[ _](?:found|exist)|does not exist|has been decommissioned)|not a valid model"
    r"|(?:invalid|unknown|unsupported|no such)[ _]model|no endpoints found|no models loaded",
)
_FORBIDDEN: Final = _Meaning(
    "not permitted",
    UpstreamMisconfigured,
    "unsupported_country_region_territory model_terms_required permission_denied permission_error",
    r"(?:country|region|territory|location)[^.\n]{0,40}not supported|not allowed to access",
)
_PARAMETER: Final = _Meaning(
    "unsupported parameter",
    UpstreamMisconfigured,
    "unsupported_parameter unknown_parameter unsupported_value extra_forbidden not_supported_error",
    r"\b(?:unsupported|unknown|unrecogni[sz]ed|unexpected|additional|extra)[ _](?:request |keyword )?"
    r"(?:parameter|argument|field|propert|name)|extra inputs"
    r"|\b(?:argument|parameter|field)s?\b[^.\n]{0,60}not (?:supported|permitted|allowed)"
    r"|api[ _-]?versions?\b[^\n]{0,60}?(?:not supported|is required|and later)",
)
_RATE: Final = _Meaning("rate limit", UpstreamRateLimited, "", r"rate[ _-]?limit|too[ _]many[ _]requests|throttl")
_TIMEOUT: Final = _Meaning("timed out", UpstreamTimeout, "", r"timed?[ _-]?out|deadline[ _]exceeded")
_ADDRESS: Final = _Meaning("wrong address", UpstreamMisconfigured)
_UNAVAILABLE: Final = _Meaning("unavailable", UpstreamUnavailable)
_REFUSED: Final = _Meaning("refused", UpstreamRejected)
_BROKEN: Final = _Meaning("broken off", UpstreamBroken)

_KNOWN: Final = (_QUOTA, _TOO_LONG, _CONTENT, _KEY, _MODEL, _FORBIDDEN, _PARAMETER, _RATE, _TIMEOUT)
_BY_CODE: Final = {code: meaning for meaning in _KNOWN for code in meaning.codes.split()}
_BY_WORDS: Final = [(meaning, re.compile(meaning.words)) for meaning in _KNOWN]
_BY_STATUS: Final = (
    {401: _KEY, 402: _QUOTA, 403: _FORBIDDEN, 404: _MODEL, 405: _ADDRESS, 413: _TOO_LONG}
    | {409: _UNAVAILABLE, 425: _UNAVAILABLE, 429: _RATE}
    | {498: _RATE}  # Groq's flex tier is full: https://console.groq.com/docs/errors
    # Somebody on the way gave up waiting; the model goes on, and is paid for. 499 is nginx's, 522 and 524 Cloudflare's:
    # https://developers.cloudflare.com/support/troubleshooting/http-status-codes/cloudflare-5xx-errors/
    | dict.fromkeys((408, 499, 504, 522, 524, 598, 599), _TIMEOUT)
)
_BY_CLASS: Final = {3: _ADDRESS, 4: _REFUSED, 5: _UNAVAILABLE}  # 3: a redirect
# Settings of the operator's in a request; and what quotes a request, whose words are the user's.
_SETTING: Final = re.compile(r"\b(max_(?:\w{1,12}_)?tokens|temperature|stream_options)\b")
_PARAM: Final = re.compile(r"^param (\w+)", re.MULTILINE)
_STREAM_OPTIONS: Final = re.compile(r"stream_options|include_usage")
_ECHO: Final = re.compile(r"""['"](?:input|messages|content)['"]\s{0,3}:|input_value=""")
_SPEAKING_KEYS: Final = frozenset(
    {"code", "type", "status", "reason", "quotaId", "message", "msg", "status_msg", "detail", "error", "raw"}
)
_KEY_LIKE: Final = re.compile(r"\b(Bearer\s+|(?:sk|gsk|xai|hf|nvapi|pplx)[-_]|AIza)[\w.-]{16,}")


def refused(status: int, headers: Mapping[str, str], body: bytes | str, *, seconds: float) -> Failure:
    """For a status that is not 200, which came ``seconds`` after the request. ``headers`` has lower-case names."""
    error = _loaded(body)
    heard = _heard(error)
    meaning = (
        _meaning(heard) or _setting(status, heard) or _BY_STATUS.get(status, _BY_CLASS.get(status // 100, _BROKEN))
    )
    # Known not to have billed: a refusal, and a server that fails at once. A gateway's timeout never is.
    billed = meaning is _TIMEOUT or status < 300 or (status >= 500 and not seconds <= _BILLS_AFTER)
    wait = _wait(headers)
    may_pass = {"true": True, "false": False}.get(
        headers.get("x-should-retry", "").strip().lower(),
        meaning.error in (UpstreamRateLimited, UpstreamUnavailable),
    )
    return Failure(
        _raised(meaning.error, billed, wait),
        meaning.cause,
        _logged(error),
        retry=may_pass and not billed and meaning is not _QUOTA and (wait or 0) <= _LONGEST_WAIT,
        wait=wait,
        stream_options_refused=meaning is _PARAMETER and not billed and bool(_STREAM_OPTIONS.search(heard)),
    )


def said(error: object) -> Failure:
    """For an error in a 200: an object of any form, a failing finish reason, JSON or HTML where a stream should be.

    It may have billed. What asking again would not mend is named; all else is an answer that broke off.
    """
    error = _loaded(error)
    meaning = _meaning(_heard(error)) or _BROKEN
    kind = UpstreamBroken if meaning.error.retryable else meaning.error
    return Failure(_raised(kind, True, None), meaning.cause, _logged(error))


def printable(text: str, limit: int) -> str:
    """``text`` on one line of at most ``limit`` characters.

    Escaped is what Python does not call printable: controls, line ends, marks that turn the direction of writing,
    halves of surrogate pairs. So nobody's text forges a line of the log, or hides one.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:limit])[:limit]


def _raised(kind: type[UpstreamError], billed: bool, wait: float | None) -> UpstreamError:
    error = kind(retry_after=wait if kind.retryable else None)
    error.billed = billed
    return error


def _meaning(heard: str) -> _Meaning | None:
    by_code = (_BY_CODE[line] for line in heard.splitlines() if line in _BY_CODE)
    by_words = (meaning for meaning, words in _BY_WORDS if words.search(heard))
    return next(by_code, None) or next(by_words, None)


def _setting(status: int, heard: str) -> _Meaning | None:
    """An invalid request is the operator's to mend where it is about a setting, and not the messages."""
    if status not in (400, 422):
        return None
    named = set(_PARAM.findall(heard) or _SETTING.findall(heard)) - {"messages", "prompt", "input"}
    return _MODEL if "model" in named else _PARAMETER if named else None


def _heard(error: object) -> str:
    """A line for each code and sentence, and ``param x`` for each field of the request at fault; in lower case."""
    return "\n".join(_gather(error, "error", 0))[:_READ_CHARACTERS].lower()


def _gather(value: object, key: str, depth: int) -> Iterator[str]:
    if isinstance(value, str) and key in _SPEAKING_KEYS:
        inner = _loaded(value)  # a gateway's message is often the body it was given
        if isinstance(inner, str):
            yield " ".join(_ECHO.split(inner, maxsplit=1)[0].split())
            return
        value = inner
    if isinstance(value, int) and key in _SPEAKING_KEYS and 0 < value < 1000:
        yield str(value)
    elif isinstance(value, str) and key == "param" and value:
        yield f"param {value}"
    elif isinstance(value, list) and key == "loc":  # a path to the field, from FastAPI and Mistral
        yield "param " + ".".join(part for part in value if isinstance(part, str) and part != "body")
    elif depth < 12 and isinstance(value, list):
        for item in value:
            yield from _gather(item, key, depth + 1)
    elif depth < 12 and isinstance(value, dict):
        for name, item in value.items():
            yield from _gather(item, name, depth + 1)


def _loaded(error: object) -> object:
    """The JSON in bytes or a text where there is some, else the text."""
    if isinstance(error, bytes | bytearray):
        error = error.decode("utf-8-sig", "replace")
    if isinstance(error, str):
        error = error.strip()
        if error.startswith(("{", "[", '"')):
            with suppress(ValueError, RecursionError):
                return json.loads(error)
    return error


def _logged(error: object) -> str:
    if not isinstance(error, str):
        try:
            error = json.dumps(error, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            error = type(error).__name__
    return printable(_KEY_LIKE.sub(r"\1…", error[:_READ_CHARACTERS]), LOGGED_CHARACTERS)


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds: ``retry-after-ms``, else ``retry-after``, a number or a date (RFC 9110, section 10.2.3)."""
    for name, a_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?", value):
            return min(float(value) / a_second, _DAY)
    with suppress(ValueError, TypeError, OverflowError):
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
        return min(seconds, _DAY) if seconds >= 0 else None
    return None

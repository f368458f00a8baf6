"""stand-in"""

from dataclasses import dataclass

from ..errors import *


@dataclass(frozen=True)
class Failure:
    error: UpstreamError
    cause: str
    words: str
    retry: bool = False
    wait: float | None = None
    stream_options_refused: bool = False


NOT_BILLED_SECONDS = 5


def printable(t, limit=1000):
    return ascii(t)[:limit]


def said(error):
    return Failure(UpstreamBroken(), "said", printable(str(error)))


def refused(status, headers, body, *, seconds):
    w = printable(body.decode(errors="replace"))
    if status == 429:
        return Failure(UpstreamRateLimited(), "429", w, True, float(headers.get("retry-after", 0)))
    if status >= 500:
        return Failure(UpstreamUnavailable(), "5xx", w, True)
    return Failure(UpstreamRejected(), "4xx", w, stream_options_refused="stream_options" in w)

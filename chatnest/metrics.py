"""What OpenTelemetry is told: a span and its measures for each chat, and counters of what this process does.

Through OpenTelemetry's API only: an SDK is the site's to choose. Without one, and without the package (the extra
``otel``), nothing here does anything. Names are those of the conventions for generative AI as opentelemetry.io has them
(https://opentelemetry.io/docs/specs/semconv/gen-ai/, read on 29 November 2026), and ``chatnest.*`` where it has none.
No message, key, word of a provider's or payer's name is in any of it: they are many, and nobody else's business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from . import logs
from .conf import provider

try:
    from opentelemetry import metrics, trace
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True

logger = logging.getLogger("chatnest.metrics")

# As the conventions ask for.
_TOKENS: Final = [4**power for power in range(14)]
_SECONDS: Final = [0.01 * 2**power for power in range(14)]


class Held(logs.Held, Protocol):
    """The ledger's Hold."""

    @property
    def output_tokens(self) -> int: ...


class Settled(logs.Settled, Protocol):
    """The ledger's Settle."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


class Operation:
    """One chat from its hold to its end, with retries; its span is a child of the one that is current now.

    ``end`` it once; again changes nothing. What the site's SDK raises is logged, and ends no chat.
    """

    def __init__(self, hold: Held) -> None:
        self._began = time.monotonic()
        self._span: Any = None
        if INSTALLED:
            try:
                self._span = _tracer.start_span(
                    f"chat {hold.model}",
                    kind=trace.SpanKind.CLIENT,
                    attributes={**_described(hold), "gen_ai.request.max_tokens": hold.output_tokens},
                )
            except Exception:
                logger.exception("A span cannot be begun")

    def current(self) -> AbstractContextManager[object]:
        """What is begun in it belongs to the span: the provider's call, where its HTTP client is instrumented."""
        return nullcontext() if self._span is None else trace.use_span(self._span)

    def end(
        self,
        settle: Settled,
        *,
        error: str = "",
        finish_reason: str | None = None,
        first_token: float | None = None,
    ) -> None:
        """``settle``: what it is charged, and by whom it was answered; ``error``: the code of what ended it.

        ``first_token``: in seconds.
        """
        span, self._span = self._span, None
        if span is None:
            return
        try:
            tokens_used(settle)
            measured = _described(settle.hold) | ({"error.type": error} if error else {})
            _duration.record(time.monotonic() - self._began, measured)
            if first_token is not None:
                _first_token.record(first_token, measured)
            if span.is_recording():
                span.set_attributes(measured | _outcome(settle, finish_reason, first_token))
                if error:
                    span.set_status(trace.StatusCode.ERROR)
            span.end()
        except Exception:
            logger.exception("A span cannot be ended")


def _outcome(settle: Settled, finish_reason: str | None, first_token: float | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "chatnest.outcome": str(settle.outcome),
        "gen_ai.usage.input_tokens": settle.prompt_tokens,
        "gen_ai.usage.output_tokens": settle.completion_tokens,
    }
    if finish_reason:
        told["gen_ai.response.finish_reasons"] = [finish_reason]
    if first_token is not None:
        told["gen_ai.response.time_to_first_chunk"] = first_token
    return told


def _described(hold: logs.Held) -> dict[str, Any]:
    """Who is asked for what. A provider that is not OpenAI's own is called as the settings call it."""
    asked = provider(hold.provider)
    told: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai" if asked.is_openai else asked.name,
        "gen_ai.request.model": hold.model,
    }
    if asked.client is None:
        address = urlsplit(asked.base_url)
        told["server.address"] = address.hostname or ""
        told["server.port"] = address.port or (80 if address.scheme == "http" else 443)
    return told


def tokens_used(settle: Settled) -> None:
    """As they are charged. Also for an attempt that was billed and answered nothing."""
    if INSTALLED and (settle.prompt_tokens or settle.completion_tokens):
        told = _described(settle.hold)
        _tokens.record(settle.prompt_tokens, {**told, "gen_ai.token.type": "input"})
        _tokens.record(settle.completion_tokens, {**told, "gen_ai.token.type": "output"})


def refused(code: str) -> None:
    if INSTALLED:
        _refusals.add(1, {"code": code})


def renewed(leases: int, error: Exception | None = None) -> None:
    """So many leases were renewed, or could not be."""
    if INSTALLED:
        _renewals.add(leases, {"error.type": type(error).__name__} if error else {})


def observe_streams(count_open: Callable[[], int], limit: Callable[[], int]) -> None:
    """Asked whenever an SDK collects."""
    if INSTALLED:

        def observed(count: Callable[[], int]) -> Callable[[Any], Iterable[metrics.Observation]]:
            return lambda options: [metrics.Observation(count())]

        _meter.create_observable_up_down_counter(
            "chatnest.streams.open", [observed(count_open)], "{stream}", "Streams that this process has open."
        )
        _meter.create_observable_gauge(
            "chatnest.streams.limit", [observed(limit)], "{stream}", "How many it may have open."
        )


if INSTALLED:
    _tracer = trace.get_tracer("chatnest")
    _meter = metrics.get_meter("chatnest")
    _tokens = _meter.create_histogram(
        "gen_ai.client.token.usage",
        "{token}",
        "Number of input and output tokens used.",
        explicit_bucket_boundaries_advisory=_TOKENS,
    )
    _duration = _meter.create_histogram(
        "gen_ai.client.operation.duration",
        "s",
        "GenAI operation duration.",
        explicit_bucket_boundaries_advisory=_SECONDS,
    )
    _first_token = _meter.create_histogram(
        "gen_ai.client.operation.time_to_first_chunk",
        "s",
        "Time to receive the first chunk.",
        explicit_bucket_boundaries_advisory=_SECONDS,
    )
    _refusals = _meter.create_counter("chatnest.refusals", "{refusal}", "Requests that were refused, by code.")
    _renewals = _meter.create_counter(
        "chatnest.lease.renewals", "{lease}", "Leases of open streams that were renewed, or with an error could not be."
    )

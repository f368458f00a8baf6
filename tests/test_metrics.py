"""What OpenTelemetry is told: a span for each chat, its tokens and times, and what a process does beside."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import openai
import pytest
from django.db import OperationalError
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import chatnest
from chatnest.errors import RateLimited
from chatnest.ledger import leases
from chatnest.models import Account, Calibration
from chatnest.stream import settle_streams
from chatnest.testing import SECRET, FakeUpstream, Reply
from project.asgi import application

from .client import Client
from .conftest import Configure, EditProfile, Settled, eventually, on_sqlite, port_of, served
from .test_fallback import second, two  # noqa: F401 - fixtures
from .test_holds import MESSAGES, a_task, a_view, answer

ROOT = Path(__file__).parent.parent
EXPORTER = InMemorySpanExporter()
DELTA = AggregationTemporality.DELTA
Point = tuple[dict[str, Any], float]


class Told:
    """What the SDK, which a process has one of, was told since the test began."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self._reader = reader
        self._points: dict[str, list[Point]] = {}

    @property
    def spans(self) -> list[ReadableSpan]:
        """That chatnest ended."""
        ended = EXPORTER.get_finished_spans()
        return [span for span in ended if span.instrumentation_scope and span.instrumentation_scope.name == "chatnest"]

    def points(self, name: str) -> list[Point]:
        """All of a counter's or histogram's: the attributes, and the sum. Of a gauge: its values, the newest last."""
        data = self._reader.get_metrics_data()
        for metric in (m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics) if data else ():
            self._points.setdefault(metric.name, []).extend(
                (dict(point.attributes), getattr(point, "sum", None) or getattr(point, "value", 0))
                for point in metric.data.data_points
            )
        return self._points.get(name, [])

    def total(self, name: str, **attributes: Any) -> float:
        return sum(value for said, value in self.points(name) if attributes.items() <= said.items())


@pytest.fixture(scope="session")
def reader() -> InMemoryMetricReader:
    reader = InMemoryMetricReader(preferred_temporality={Counter: DELTA, Histogram: DELTA})
    metrics.set_meter_provider(MeterProvider([reader], shutdown_on_exit=False))
    tracing = TracerProvider(shutdown_on_exit=False)
    tracing.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(tracing)
    return reader


@pytest.fixture
def told(reader: InMemoryMetricReader) -> Told:
    EXPORTER.clear()
    reader.get_metrics_data()
    return Told(reader)


async def traced(scope: Any, receive: Any, send: Any) -> None:
    """The application as Django's instrumentation has it: each request in a span."""
    with trace.get_tracer("site").start_as_current_span("POST /api/chat"):
        await application(scope, receive, send)


@pytest.fixture
def traced_client(database: str, upstream: FakeUpstream, known_model: Calibration, told: Told) -> Iterator[Client]:
    AioHttpClientInstrumentor().instrument()
    try:
        with served(traced) as server:
            yield Client(port_of(server))
            eventually(lambda: not server.server_state.tasks)
    finally:
        AioHttpClientInstrumentor().uninstrument()


def test_a_chat_is_a_span_of_its_request_with_what_it_used(
    traced_client: Client, upstream: FakeUpstream, told: Told, settled: Settled
) -> None:
    """And the provider's call, which the HTTP client's instrumentation sees, is within it."""
    upstream.replies(Reply("Hello", " there", usage=(12, 7), finish_reason="length"))
    traced_client.chat()
    settled()
    (span,) = told.spans
    eventually(lambda: {one.name for one in EXPORTER.get_finished_spans()} > {"POST /api/chat", "POST"})
    by_name = {one.name: one for one in EXPORTER.get_finished_spans()}
    assert span.parent and span.context and by_name["POST"].parent
    assert span.parent.span_id == by_name["POST /api/chat"].context.span_id
    assert by_name["POST"].parent.span_id == span.context.span_id

    assert (span.name, span.kind, span.status.status_code.name) == ("chat gpt-4o-mini", trace.SpanKind.CLIENT, "UNSET")
    said = dict(span.attributes or {})
    first = said.pop("gen_ai.response.time_to_first_chunk")
    who = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "default",
        "gen_ai.request.model": "gpt-4o-mini",
        "server.address": "127.0.0.1",
        "server.port": int(upstream.url.rpartition(":")[2].removesuffix("/v1")),
    }
    assert said == {
        **who,
        "gen_ai.request.max_tokens": 400,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 7,
        "chatnest.outcome": "completed",
    }
    assert told.points("gen_ai.client.token.usage") == [
        ({**who, "gen_ai.token.type": "input"}, 12),
        ({**who, "gen_ai.token.type": "output"}, 7),
    ]
    assert told.points("gen_ai.client.operation.time_to_first_chunk") == [(who, first)]
    ((duration_of, duration),) = told.points("gen_ai.client.operation.duration")
    assert duration_of == who
    assert 0 < first <= duration  # type: ignore[operator]


def test_a_provider_that_fails_is_an_error_without_its_words(
    traced_client: Client, upstream: FakeUpstream, told: Told, settled: Settled
) -> None:
    upstream.replies(Reply.refuse(401))
    traced_client.chat()
    settled()
    (span,) = told.spans
    assert span.attributes and span.status.status_code.name == "ERROR"
    assert span.attributes["error.type"] == "upstream_misconfigured"
    assert SECRET not in span.to_json() and "words" not in span.to_json() and not span.events
    assert told.points("gen_ai.client.token.usage") == []  # nothing was billed
    ((failed, _),) = told.points("gen_ai.client.operation.duration")
    assert failed["error.type"] == "upstream_misconfigured"


def leaves(stream: Any, database: str) -> None:
    stream.leave()


def is_stopped(stream: Any, database: str) -> None:
    Account.objects.using(database).update_or_create(name="site", defaults={"paused": True})
    assert stream.until("error")


def ends_with_its_process(stream: Any, database: str) -> None:
    settle_streams()


@pytest.mark.parametrize(
    ("how", "outcome", "error"),
    [
        (leaves, "cancelled", None),
        (is_stopped, "stopped", "paused"),
        (ends_with_its_process, "cancelled", None),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_however_a_chat_ends_its_span_does_and_it_is_open_no_more(
    client: Client, upstream: FakeUpstream, told: Told, settled: Settled, database: str, configure: Configure,
    how: Any, outcome: str, error: str | None,
) -> None:  # fmt: skip
    configure(LEASE_SECONDS=1)
    upstream.replies(Reply("One", "two", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
        assert told.points("chatnest.streams.open")[-1] == ({}, 1)
        assert told.spans == []
        how(stream, database)
        (row,) = settled()
        eventually(lambda: told.points("chatnest.streams.open")[-1] == ({}, 0))
    upstream.release()
    (span,) = told.spans
    assert span.attributes and row.outcome == outcome
    assert (span.attributes["chatnest.outcome"], span.attributes.get("error.type")) == (outcome, error)
    used = [value for _, value in told.points("gen_ai.client.token.usage")]
    assert used == [row.prompt_tokens, row.completion_tokens]
    assert told.points("chatnest.streams.limit")[-1] == ({}, 2000)


@on_sqlite
@pytest.mark.usefixtures("two")
def test_what_two_models_used_is_told_of_each(
    client: Client, upstream: FakeUpstream, told: Told, settled: Settled
) -> None:
    """The first broke off, and may have billed; the second answered, and the span says so."""
    upstream.replies(Reply(cut_after=-1))
    assert client.chat().answer == "From the second"
    first, other = settled()
    (span,) = told.spans
    assert (span.attributes or {})["gen_ai.request.model"] == "llama-3.1-8b"
    for row in (first, other):
        model = {"gen_ai.request.model": row.model, "gen_ai.provider.name": row.provider}
        assert told.total("gen_ai.client.token.usage", **model) == row.tokens_charged > 0


@on_sqlite
def test_refusals_are_counted_by_code(
    client: Client, told: Told, edit_profile: EditProfile, configure: Configure
) -> None:
    edit_profile(rate_max_requests=0)
    assert [client.chat().status for _ in range(2)] == [429, 429]
    client.chat(b"{}")
    client.request("GET", "/api/chat")
    with pytest.raises(RateLimited), chatnest.hold("user:7", MESSAGES):
        pass
    configure(ALLOW_ANONYMOUS=False)
    client.chat()
    codes = {said["code"] for said, _ in told.points("chatnest.refusals")}
    counted = {code: told.total("chatnest.refusals", code=code) for code in codes}
    assert counted == {"rate_limited": 3, "invalid_messages": 1, "method_not_allowed": 1, "not_authenticated": 1}
    assert told.spans == []


def test_renewals_are_counted_and_those_that_fail_by_their_error(
    client: Client, upstream: FakeUpstream, told: Told, configure: Configure, settled: Settled
) -> None:
    configure(LEASE_SECONDS=0.6)
    upstream.replies(Reply("One", "two", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
        eventually(lambda: told.points("chatnest.lease.renewals"))
        assert told.points("chatnest.lease.renewals")[0] == ({}, 1)
        with mock.patch.object(leases, "renew", side_effect=OperationalError("away")):
            eventually(lambda: told.total("chatnest.lease.renewals", **{"error.type": "OperationalError"}))
        upstream.release()
        stream.rest()
    settled()


def test_a_hold_is_told_like_a_chat(upstream: FakeUpstream, told: Told, database: str) -> None:
    upstream.replies(answer(12, 3), answer(12, 3), Reply.refuse(401))
    with trace.get_tracer("site").start_as_current_span("a task"):
        a_task(upstream)
        asyncio.run(a_view(upstream, profile="expanded"))
        with pytest.raises(openai.AuthenticationError):
            a_task(upstream)
    one, other, failed = told.spans
    (task,) = [span for span in EXPORTER.get_finished_spans() if span.name == "a task"]
    for span in (one, other):
        assert span.parent and span.parent.span_id == task.context.span_id
        assert span.attributes and span.attributes["gen_ai.usage.output_tokens"] == 3
    assert failed.attributes and failed.attributes["error.type"] == "AuthenticationError"
    assert told.total("gen_ai.client.token.usage", **{"gen_ai.token.type": "input"}) == 24


def test_no_name_or_word_of_a_user_is_told(client: Client, upstream: FakeUpstream, told: Told) -> None:
    upstream.replies(Reply("A secret answer"))
    client.chat()
    eventually(lambda: told.spans)
    everything = told.spans[0].to_json() + str([told.points(name) for name in list(told._points)])
    for private in ("Hello!", "secret", "ip:", "sk-tests", "anonymous"):
        assert private not in everything
    assert "gpt-4o-mini" in everything


@on_sqlite
def test_an_sdk_that_is_broken_breaks_no_chat(
    client: Client, upstream: FakeUpstream, settled: Settled, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies(Reply("Hello"), Reply("Hello"))
    with mock.patch("chatnest.metrics._tracer.start_span", side_effect=ZeroDivisionError):
        assert client.chat().events[-1] == "done"
    with mock.patch("chatnest.metrics._duration.record", side_effect=ZeroDivisionError):
        assert client.chat().events[-1] == "done"
    assert [row.outcome for row in settled()] == ["completed"] * 2
    assert [r.getMessage() for r in caplog.records if r.exc_info] == [
        "A span cannot be begun",
        "A span cannot be ended",
    ]


WITHOUT = """
import json
import sys

import pytest
from asgiref.sync import async_to_sync
from django.test import AsyncClient

import chatnest
from chatnest import metrics
from chatnest.testing import Reply

BODY = '{"messages": [{"role": "user", "content": "Hi!"}]}'


def test_chat(chat_upstream, admin_user):
    async def story():
        response = await AsyncClient().post("/api/chat", BODY, "application/json")
        return b"".join([part async for part in response])

    chat_upstream.replies(Reply("Hello"))
    assert b"event: done" in async_to_sync(story)()
    with chatnest.hold(admin_user, [{"role": "user", "content": "Hi!"}]) as hold:
        hold.release()
    assert not metrics.INSTALLED
    assert [name for name in sys.modules if name.startswith("opentelemetry.")] == []
"""


def test_a_site_without_the_package_chats(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text('import sys\n\nsys.modules["opentelemetry"] = None\n')
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["chatnest.testing.fixtures"]\n')
    (tmp_path / "test_site.py").write_text(WITHOUT)
    command = (sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path))
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "project.settings", "DEBUG": "on", "OPENAI_API_KEY": "sk"}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "CHATNEST_ALLOW_ANONYMOUS": "on",
        "DATABASE_URL": "sqlite:///unused",
    }
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "1 passed" in ran.stdout, ran.stdout

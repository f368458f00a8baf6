"""Every way a provider can answer, well and badly: what the user sees, what is charged, what never leaks."""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from typing import Any

import pytest
import sentry_sdk
from openai import AsyncAzureOpenAI, AsyncOpenAI, DefaultAioHttpClient
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.transport import Transport

from chatnest.conf import provider
from chatnest.models import DailyUsage, Reservation
from chatnest.provider.call import Call
from chatnest.testing import FakeUpstream, Reply
from chatnest.wires import Message

from .client import Answer, Client
from .conftest import Configure, Settled, on_sqlite

HELLO_BOUND = 10

BROKEN = ("upstream_broken", "The AI model's answer broke off. Please try again.", True)
BUSY = ("upstream_rate_limited", "The AI model is busy right now. Please try again shortly.", True)
AWAY = ("upstream_unavailable", "The AI model cannot be reached right now. Please try again shortly.", True)
REJECTED = ("upstream_rejected", "The AI model did not accept this request.", False)


def event(data: Any) -> bytes:
    """One event in raw UTF-8, unlike the fake's own, which are ASCII."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def said(content: Any, **extra: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}}], **extra}


def failed(answer: Answer, failure: tuple[str, str, bool], *before: str) -> None:
    """Asserts that the answer is these pieces and ends with this error and nothing after it."""
    code, message, retryable = failure
    assert answer.status == 200
    assert answer.events == ["start", *["token"] * len(before), "error"]
    assert answer.answer == "".join(before)
    assert answer.data("error") == {"message": message, "code": code, "retryable": retryable}


def charged(rows: list[Reservation], outcome: str, source: str, tokens: int) -> None:
    (row,) = rows
    assert (row.outcome, row.usage_source, row.tokens_charged) == (outcome, source, tokens)


# Forms of an answer.


@on_sqlite
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"newline": b"\r\n"},
        {"newline": b"\r"},
        {"comments": True},
        {"comments": True, "newline": b"\r\n"},
        {"gzip": True},
        {"chunked": False},
        {"gzip": True, "chunked": False},
        {"done": False},
        {"finish_reason": None},
        {"finish_reason": "length"},
        {"slice": 1},
        {"slice": 1, "newline": b"\r\n"},
        {"slice": 1, "newline": b"\r", "comments": True},
        {"slice": 1, "gzip": True, "comments": True, "newline": b"\r\n", "done": False},
        {"slice": 7, "chunked": False},
    ],
    ids=str,
)
def test_an_answer_in_any_form_is_the_same_answer(
    client: Client, upstream: FakeUpstream, settled: Settled, form: dict[str, Any]
) -> None:
    upstream.replies(Reply("Hello,", " 世界 ", "😀", usage=(9, 4), **form))
    answer = client.chat()
    assert answer.events == ["start", "token", "token", "token", "usage", "done"]
    assert answer.answer == "Hello, 世界 😀"
    assert answer.data("usage")["totalTokens"] == 13
    charged(settled(), "completed", "reported", 13)


@on_sqlite
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_characters_arrive_whole_wherever_the_bytes_are_cut(
    client: Client, upstream: FakeUpstream, size: int | None
) -> None:
    """In raw UTF-8, with what Unicode calls line ends and an event stream does not."""
    pieces = ["😀", "é\u2028e\u0301", "\u2029\x85", "\x0b\x0c\x1c\x1d\x1e", "你\r\n好", "\ufeff"]
    upstream.replies(Reply.garbage(*map(event, map(said, pieces)), b"data: [DONE]\n\n", slice=size))
    answer = client.chat()
    assert [json.loads(data) for name, data in answer.frames if name == "token"] == pieces
    assert answer.events[-1] == "done"


@on_sqlite
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["\ud83d", "\ude00"], "😀"),
        (["a\ud83d", "\ude00b"], "a😀b"),
        (["\ud83d", "\ude00\ud83d", "\ude01"], "😀😁"),
        (["\ud83d", "x"], "\ufffdx"),
        (["\ude00"], "\ufffd"),
        (["x", "\ud83d"], "x"),
        (["\ud83d", "", "\ude00"], "😀"),
    ],
    ids=ascii,
)
def test_an_emoji_cut_in_two_by_the_model_is_put_together(
    client: Client, upstream: FakeUpstream, pieces: list[str], text: str
) -> None:
    upstream.replies(Reply(*pieces))
    answer = client.chat()
    assert answer.answer == text
    assert answer.events[-1] == "done"


@on_sqlite
def test_an_event_of_a_megabyte_arrives(client: Client, upstream: FakeUpstream, settled: Settled) -> None:
    text = "0123456789abcdef" * 65_536
    upstream.replies(Reply(text))
    assert client.chat().answer == text
    charged(settled(), "completed", "reported", 13)


@on_sqlite
def test_many_pieces_in_one_packet_are_as_many_frames(client: Client, upstream: FakeUpstream) -> None:
    words = [f"w{n} " for n in range(500)]
    upstream.replies(Reply.garbage(b"".join(event(said(word)) for word in words) + b"data: [DONE]\n\n"))
    answer = client.chat()
    assert [json.loads(data) for name, data in answer.frames if name == "token"] == words


@on_sqlite
def test_an_empty_answer_is_an_answer(client: Client, upstream: FakeUpstream, settled: Settled) -> None:
    upstream.replies(Reply(usage=(9, 0)))
    answer = client.chat()
    assert answer.events == ["start", "usage", "done"]
    assert (answer.answer, answer.data("usage")["completionTokens"]) == ("", 0)
    charged(settled(), "completed", "reported", 9)


@on_sqlite
@pytest.mark.parametrize(
    "chunk",
    [
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [None]},
        {"choices": [7, "x"]},
        {"choices": {}},
        {"choices": 7},
        {"choices": "text"},
        {"choices": [{"delta": None}]},
        {"choices": [{"delta": {}}]},
        {"choices": [{"delta": {"role": "assistant"}}]},
        {"choices": [{"delta": {"content": None}}]},
        {"choices": [{"delta": {"content": ""}}]},
        {"choices": [{"delta": {"content": 7}}]},
        {"choices": [{"delta": "x"}]},
        {"choices": [{"text": "x"}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "x"}}]}}]},
        {"choices": [{"delta": {"reasoning_content": "hm", "refusal": None}}]},
        {"choices": [{"delta": {}, "finish_reason": 7}]},
        {"error": None, "usage": None, "service_tier": "default", "x_groq": {"id": "r"}},
        {"usage": "many"},
        {"usage": [1, 2]},
        {"usage": {"prompt_tokens": "x"}},
        {"usage": {"prompt_tokens": None}},
    ],
    ids=str,
)
def test_what_says_nothing_is_passed_over(
    client: Client, upstream: FakeUpstream, settled: Settled, chunk: dict[str, Any]
) -> None:
    upstream.replies(Reply("Hel", chunk, "lo"))
    answer = client.chat()
    assert answer.events == ["start", "token", "token", "usage", "done"]
    assert answer.answer == "Hello"
    charged(settled(), "completed", "reported", 14)


@on_sqlite
def test_nothing_is_read_after_done(client: Client, upstream: FakeUpstream) -> None:
    upstream.replies(Reply.garbage(event(said("Hi")), b"data:[DONE]\n\n", event(said("more")), b"garbage\n\n"))
    answer = client.chat()
    assert (answer.answer, answer.events[-1]) == ("Hi", "done")


@on_sqlite
def test_an_answer_ends_with_done_even_if_the_connection_does_not(
    client: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply("Hi", b"data: [DONE]\n\n", gate_after=2))
    assert client.chat().events == ["start", "token", "usage", "done"]
    upstream.wait_for(lambda: upstream.open_connections == 0)
    charged(settled(), "completed", "counted", HELLO_BOUND + 1)


# What is charged.


def test_more_than_was_held_is_charged_whole_and_closes_the_budget(
    client: Client, upstream: FakeUpstream, settled: Settled, database: str
) -> None:
    upstream.replies(Reply("Hi", usage=(60_000, 20_000)))
    assert client.chat().data("usage")["remainingToday"] == 0
    charged(settled(), "completed", "reported", 80_000)
    assert DailyUsage.objects.using(database).get(account="site").tokens_used == 80_000
    assert client.chat().json["code"] == "daily_budget_exceeded"


@on_sqlite
def test_the_last_of_several_reports_counts(client: Client, upstream: FakeUpstream, settled: Settled) -> None:
    """Some report with every chunk what it has come to so far."""

    def so_far(text: str, completion: int) -> dict[str, Any]:
        return said(text, usage={"prompt_tokens": 9, "completion_tokens": completion})

    upstream.replies(Reply(so_far("a", 1), so_far("b", 2), so_far("c", 3), usage=None))
    assert client.chat().answer == "abc"
    charged(settled(), "completed", "reported", 12)


# Answers that break.


# Refusals.


@on_sqlite
def test_a_refusal_that_never_ends_is_not_waited_for(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    configure(UPSTREAM_MAX_RETRIES=0)
    upstream.replies(Reply.refuse(500, gate_after=0))
    failed(client.chat(), AWAY)
    upstream.wait_for(lambda: upstream.open_connections == 0)
    charged(settled(), "upstream_error", "none", 0)


@on_sqlite
def test_a_refusal_says_when_the_provider_would_be_asked_again(
    client: Client, upstream: FakeUpstream, configure: Configure
) -> None:
    configure(UPSTREAM_MAX_RETRIES=0)
    upstream.replies(Reply.refuse(429, retry_after=2.5))
    assert client.chat().data("error")["retryAfter"] == 3


@on_sqlite
def test_a_provider_that_cannot_be_reached_costs_nothing(
    client: Client, configure: Configure, settled: Settled, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    configure(UPSTREAM_MAX_RETRIES=0, OPENAI_BASE_URL=f"http://127.0.0.1:{port}/v1")
    answer = client.chat()
    failed(answer, AWAY)
    assert str(port) not in answer.text
    assert str(port) in caplog.text
    charged(settled(), "upstream_error", "none", 0)


@on_sqlite
def test_who_leaves_while_the_provider_is_still_being_reached_pays_nothing(
    client: Client, configure: Configure, settled: Settled
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        configure(OPENAI_BASE_URL=f"https://127.0.0.1:{silent.getsockname()[1]}/v1")
        with client.stream() as stream:
            stream.until("start")
            connection, _ = silent.accept()
            connection.recv(1)  # its side of a handshake that will never be answered
        charged(settled(), "cancelled", "none", 0)
        connection.close()


@on_sqlite
def test_a_connection_that_is_cut_before_its_answer_may_have_been_billed(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    configure(UPSTREAM_MAX_RETRIES=0)
    upstream.replies(Reply("Hi", cut_after=-1))
    failed(client.chat(), AWAY)
    charged(settled(), "upstream_error", "counted", HELLO_BOUND)


# The event stream itself, held to the letter of its specification.


LINES = [
    b"data: x",
    b"data:x",
    b"data",
    b"data:",
    b"data:  y",
    b"datax: 1",
    b": c",
    b"event: e",
    b"id",
    b"",
    b" data: z",
]


# Whose client it is.


def default_client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="sk-theirs", base_url=url)


def aiohttp_client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="sk-theirs", base_url=url, http_client=DefaultAioHttpClient())


def azure_client(url: str, deployment: str | None = None) -> AsyncAzureOpenAI:
    return AsyncAzureOpenAI(
        api_key="sk-theirs",
        api_version="2024-10-21",
        azure_endpoint=url.removesuffix("/v1"),
        azure_deployment=deployment,
    )


@on_sqlite
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (default_client, "/v1/chat/completions"),
        (aiohttp_client, "/v1/chat/completions"),
        (azure_client, "/openai/deployments/gpt-4o-mini/chat/completions?api-version=2024-10-21"),
        (partial(azure_client, deployment="ours"), "/openai/deployments/ours/chat/completions?api-version=2024-10-21"),
    ],
    ids=["default", "aiohttp", "azure", "azure deployment"],
)
def test_a_site_may_bring_its_own_client(
    client: Client, upstream: FakeUpstream, settled: Settled, configure: Configure, make: Any, path: str
) -> None:
    configure(PROVIDERS={"default": {"CLIENT": lambda: make(upstream.url)}})
    upstream.replies(Reply("Hel", "lo"))
    assert client.chat().answer == "Hello"
    (request,) = upstream.requests
    assert request.path == path
    assert "sk-theirs" in str(request.headers)
    assert request.json["stream_options"] == {"include_usage": True}
    charged(settled(), "completed", "reported", 14)


@on_sqlite
@pytest.mark.parametrize("make", [default_client, aiohttp_client], ids=["default", "aiohttp"])
def test_with_a_client_of_the_sites_too_a_closed_tab_closes_the_providers_connection(
    client: Client, upstream: FakeUpstream, settled: Settled, configure: Configure, make: Any
) -> None:
    configure(PROVIDERS={"default": {"CLIENT": lambda: make(upstream.url)}})
    upstream.replies(Reply("Hel", "lo", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
    upstream.wait_for_disconnect()
    assert settled()[0].outcome == "cancelled"


@on_sqlite
@pytest.mark.parametrize("make", [default_client, aiohttp_client], ids=["default", "aiohttp"])
def test_with_a_client_of_the_sites_too_what_was_never_sent_costs_nothing(
    client: Client, settled: Settled, configure: Configure, make: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    configure(PROVIDERS={"default": {"CLIENT": lambda: make(f"http://127.0.0.1:{port}/v1")}}, UPSTREAM_MAX_RETRIES=0)
    failed(client.chat(), AWAY)
    charged(settled(), "upstream_error", "none", 0)


@on_sqlite
def test_a_client_that_cannot_be_made_is_the_operators_to_mend(
    client: Client, settled: Settled, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    configure(PROVIDERS={"default": {"CLIENT": lambda: 1 / 0, "QUERY": {"a": "story of its own"}}})
    assert client.chat().data("error")["code"] == "upstream_misconfigured"
    assert "ZeroDivisionError" in caplog.text
    charged(settled(), "upstream_error", "none", 0)


@on_sqlite
def test_a_key_that_rotates_is_asked_for_each_time(
    client: Client, upstream: FakeUpstream, configure: Configure
) -> None:
    keys = iter(["sk-one", "sk-two"])

    async def key() -> str:
        return next(keys)

    configure(PROVIDERS={"default": {"API_KEY": key}})
    client.chat(), client.chat()
    assert [request.headers["authorization"] for request in upstream.requests] == ["Bearer sk-one", "Bearer sk-two"]


# What others see of a call.


@on_sqlite
def test_sentry_sees_the_call(client: Client, upstream: FakeUpstream) -> None:
    spans: list[Any] = []
    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        traces_sample_rate=1.0,
        before_send_transaction=lambda event, hint: spans.extend(event["spans"]),
        transport=Silent,
    )
    try:
        # A loop of its own: the server's client was made before Sentry was.
        with sentry_sdk.start_transaction(name="a chat"):
            asyncio.run(one_call())
    finally:
        sentry_sdk.get_client().close()
        sentry_sdk.init()
    (span,) = [span for span in spans if span["op"] == "http.client"]
    assert span["description"].startswith(f"POST {upstream.url}/chat/completions")
    assert "sentry-trace" in upstream.requests[0].headers
    assert "Hello!" not in str(spans)


@on_sqlite
def test_opentelemetry_sees_the_call(client: Client, upstream: FakeUpstream) -> None:
    exporter = InMemorySpanExporter()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    AioHttpClientInstrumentor().instrument(tracer_provider=tracing)
    try:
        asyncio.run(one_call())
    finally:
        AioHttpClientInstrumentor().uninstrument()
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.status.is_ok) == ("POST", True)
    assert f"{span.context.trace_id:032x}" in upstream.requests[0].headers["traceparent"]
    assert "Hello!" not in span.to_json()


class Silent(Transport):
    """Sends nothing anywhere."""

    def capture_envelope(self, envelope: Any) -> None:
        pass


async def one_call() -> None:
    call = Call(provider("default"), "gpt-4o-mini", [Message("user", "Hello!")], max_tokens=9, temperature=None)
    await call.open()
    while await call.read() is not None:
        pass
    await call.close()


# Models that reason.


@on_sqlite
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("shown", [False, True])
def test_visible_reasoning_is_shown_to_who_wants_it(
    client: Client, upstream: FakeUpstream, configure: Configure, field: str, shown: bool
) -> None:
    configure(SHOW_REASONING=shown)
    thought = {"choices": [{"index": 0, "delta": {field: "Hm, a greeting."}, "finish_reason": None}]}
    upstream.replies(Reply(thought, "Hello"))
    frames = client.chat().frames
    thoughts = [json.loads(data) for event, data in frames if event == "reasoning"]
    assert thoughts == ["Hm, a greeting."] * shown
    assert [json.loads(data) for event, data in frames if event == "token"] == ["Hello"]

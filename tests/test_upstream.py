"""Every way a provider can answer, well and badly: what the user sees, what is charged, what never leaks."""

from __future__ import annotations

import json
import socket
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatnest.models import DailyUsage, Reservation
from chatnest.provider.events import EventDecoder
from chatnest.testing import SECRET, FakeUpstream, Reply

from .client import HELLO, Answer, Client
from .conftest import Configure, EditProfile, Settled, on_sqlite

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
@pytest.mark.parametrize("end", [b"", b"\n\n"], ids=["never ending", "ending"])
def test_an_event_without_bounds_is_not_waited_for(
    client: Client, upstream: FakeUpstream, settled: Settled, end: bytes
) -> None:
    upstream.replies(Reply.garbage(event(said("Hi")), b"data: " + b"x" * 3_000_000 + end, gate_after=3))
    failed(client.chat(), BROKEN, "Hi")
    upstream.wait_for(lambda: upstream.open_connections == 0)
    charged(settled(), "upstream_error", "counted", HELLO_BOUND + 1)


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
        {"choices": [{"delta": {"content": ["x"]}}]},
        {"choices": [{"delta": {"content": {"text": "x"}}}]},
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


@on_sqlite
@pytest.mark.parametrize(
    ("usage", "prompt", "completion", "total"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}, 7, 5, 12),
        ({"prompt_tokens": 7, "completion_tokens": 5}, 7, 5, 12),
        ({"total_tokens": 12}, 0, 0, 12),
        # Reasoning that is counted in the total alone.
        ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 90}, 7, 5, 90),
        ({"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}, 7, 0, 7),
        ({"prompt_tokens": "7", "completion_tokens": 5.0, "total_tokens": 12}, 7, 5, 12),
        ({"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}, 7, 5, 12),
    ],
    ids=str,
)
def test_what_is_charged_is_what_the_provider_reports(
    client: Client, upstream: FakeUpstream, settled: Settled, usage: Any, prompt: int, completion: int, total: int
) -> None:
    upstream.replies(Reply("Hello", {"choices": [], "usage": usage}, usage=None))
    told = client.chat().data("usage")
    assert told == {
        "promptTokens": prompt,
        "completionTokens": completion,
        "totalTokens": total,
        "remainingToday": 70_000 - total,
    }
    rows = settled()
    charged(rows, "completed", "reported", total)
    assert (rows[0].prompt_tokens, rows[0].completion_tokens) == (prompt, completion)


@on_sqlite
@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": -5, "completion_tokens": 5, "total_tokens": 1},
        {"prompt_tokens": 5, "completion_tokens": -5, "total_tokens": -1},
        {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": -1},
        {"prompt_tokens": 1.5, "completion_tokens": 5, "total_tokens": 6},
        {"prompt_tokens": 10**30, "completion_tokens": 5, "total_tokens": 10**30},
        {"prompt_tokens": 2**63, "completion_tokens": 0, "total_tokens": 2**63},
        {"prompt_tokens": 2**62, "completion_tokens": 2**62},
    ],
    ids=str,
)
def test_a_report_that_cannot_be_true_is_none_and_the_answer_is_counted(
    client: Client, upstream: FakeUpstream, settled: Settled, usage: Any
) -> None:
    upstream.replies(Reply("Hello", " world", {"choices": [], "usage": usage}, usage=None))
    told = client.chat().data("usage")
    assert (told["promptTokens"], told["completionTokens"]) == (HELLO_BOUND, 2)
    charged(settled(), "completed", "counted", HELLO_BOUND + 2)


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


@on_sqlite
def test_for_a_model_of_unknown_encoding_the_answer_counts_at_most_its_allowance(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, settled: Settled
) -> None:
    edit_profile(model="llama-4")
    upstream.replies(Reply("word " * 1000, usage=None))
    assert client.chat().events[-1] == "done"
    # "Hello!" is six bytes.
    charged(settled(), "completed", "counted", 6 + 5 + 3 + 400)


# Answers that break.


@on_sqlite
@pytest.mark.parametrize(
    "reply",
    [
        Reply("Hel", "lo", finish_reason=None, done=False, usage=None),
        Reply("Hel", "lo", finish_reason=None, done=False, usage=None, chunked=False),
        Reply("Hel", "lo", b"data: {oops\n\n", usage=None),
        Reply("Hel", "lo", b"data: \n\n", usage=None),
        Reply("Hel", "lo", b"data: \xff\n\n", usage=None),
        Reply("Hel", "lo", b"data: null\n\n", usage=None),
        Reply("Hel", "lo", b"data: [1]\n\n", usage=None),
        Reply("Hel", "lo", b'data: "text"\n\n', usage=None),
        Reply("Hel", "lo", b"data: 7\n\n", usage=None),
        Reply("Hel", "lo", b"data: NaN\n\n", usage=None),
        Reply("Hel", "lo", b"data: " + b"[" * 100_000 + b"\n\n", usage=None),
        Reply("Hel", "lo", b'data: {"choices": ' + b"[" * 100_000 + b"\n\n", usage=None),
        Reply("Hel", "lo", {"error": {"message": f"Overloaded, {SECRET}", "code": 500}}, usage=None),
        Reply("Hel", "lo", {"error": SECRET}, usage=None),
        Reply("Hel", "lo", {"error": {}}, usage=None),
        Reply("Hel", "lo", b'event: error\ndata: {"error": {"message": "x"}}\n\n', usage=None),
        Reply("Hel", "lo", said("ignored", error={"code": 1}), usage=None),
    ],
    ids=lambda reply: f"{[str(piece)[:30] for piece in reply.pieces[2:]]}{'' if reply.chunked else ' unchunked'}",
)  # fmt: skip
def test_an_answer_that_breaks_off_is_shown_so_far_and_charged_so_far(
    client: Client, upstream: FakeUpstream, settled: Settled, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies(reply)
    answer = client.chat()
    failed(answer, BROKEN, "Hel", "lo")
    assert SECRET not in answer.text
    charged(settled(), "upstream_error", "counted", HELLO_BOUND + 2)
    assert len(upstream.requests) == 1
    assert "The provider" in caplog.text


@on_sqlite
@pytest.mark.parametrize("form", [{}, {"gzip": True}, {"chunked": False}, {"usage": None}], ids=str)
def test_a_connection_that_is_cut_leaves_what_came(
    client: Client, upstream: FakeUpstream, settled: Settled, form: dict[str, Any]
) -> None:
    upstream.replies(Reply("Hel", "lo", gate_after=2, cut_after=2, **form))
    with client.stream() as stream:
        assert [stream.next() for _ in range(3)] == [("start", ""), ("token", '"Hel"'), ("token", '"lo"')]
        upstream.release()
        ((name, data),) = stream.rest()
    code, message, retryable = BROKEN
    assert (name, json.loads(data)) == ("error", {"message": message, "code": code, "retryable": retryable})
    charged(settled(), "upstream_error", "counted", HELLO_BOUND + 2)


@on_sqlite
@pytest.mark.parametrize(
    "reply",
    [
        Reply("Hi", cut_after=0),
        Reply.garbage(),
        Reply.garbage(b"<html><title>502 Bad Gateway</title></html>"),
        Reply.garbage(b"\x00\xff" * 5000),
        Reply.garbage(b"data: {oops\n\n"),
        Reply.garbage(b"data: {oops\n\n", gzip=True),
        Reply.garbage(b"not gzip", headers={"content-encoding": "gzip"}),
        Reply.garbage(json.dumps({"choices": [{"message": {"content": "whole"}}]}).encode()),
        Reply.garbage(event({"error": {"message": SECRET}})),
        Reply.garbage(event({"error": {"message": SECRET}}), b"data: [DONE]\n\n"),
        Reply.garbage(b": ping\n\n" * 10),
        Reply.garbage(b"data: [DONE"),
    ],
    ids=lambda reply: f"{str(reply.pieces)[:40]}{reply.gzip or ''}",
)
def test_an_answer_that_never_was_one_costs_its_prompt(
    client: Client, upstream: FakeUpstream, settled: Settled, reply: Reply
) -> None:
    """A provider that has said 200 may have billed it; it is not asked again."""
    upstream.replies(reply)
    answer = client.chat()
    failed(answer, BROKEN)
    assert SECRET not in answer.text
    charged(settled(), "upstream_error", "counted", HELLO_BOUND)
    assert len(upstream.requests) == 1


@on_sqlite
def test_a_report_that_came_before_the_break_is_believed(
    client: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    report = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}
    upstream.replies(Reply(report, "Hi", gate_after=2, cut_after=2))
    with client.stream() as stream:
        stream.until("token")
        upstream.release()
        assert [name for name, _ in stream.rest()] == ["error"]
    charged(settled(), "upstream_error", "reported", 14)


# Refusals.


@on_sqlite
@pytest.mark.parametrize(
    ("status", "failure"),
    [
        *((status, REJECTED) for status in (201, 302, 307, 400, 401, 403, 404, 413, 418, 422)),
        *((status, AWAY) for status in (408, 409, 500, 502, 503, 504, 529, 599)),
        (429, BUSY),
    ],
)
def test_a_refusal_is_told_in_words_of_our_own_and_costs_nothing(
    client: Client,
    upstream: FakeUpstream,
    settled: Settled,
    configure: Configure,
    caplog: pytest.LogCaptureFixture,
    status: int,
    failure: tuple[str, str, bool],
) -> None:
    configure(UPSTREAM_MAX_RETRIES=0)
    headers = {"location": "/v1/elsewhere", "x-request-id": SECRET}
    upstream.replies(Reply.refuse(status, headers=headers))
    answer = client.chat()
    failed(answer, failure)
    charged(settled(), "upstream_error", "none", 0)
    assert [request.path for request in upstream.requests] == ["/v1/chat/completions"]
    # The provider's words are for the log; its key and address are for nobody.
    for private in (SECRET, "sk-tests", upstream.url, "Incorrect API key"):
        assert private not in answer.text
        assert private not in str(answer.headers)
    assert "sk-tests" not in caplog.text
    assert f"refused with {status}" in caplog.text
    assert "Incorrect API key" in caplog.text


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
@pytest.mark.parametrize("retry_after", ["soon", "-1", "", "NaN", "Infinity", "1e9999", "²", "9" * 400])
def test_a_nonsensical_retry_after_is_none_at_all(
    client: Client, upstream: FakeUpstream, configure: Configure, retry_after: str
) -> None:
    configure(UPSTREAM_MAX_RETRIES=0)
    upstream.replies(Reply.refuse(429, headers={"retry-after": retry_after.encode().decode("latin-1")}))
    failed(client.chat(), BUSY)


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
@pytest.mark.parametrize("url", ["http://", "nonsense", "http://[::1", "https://127.0.0.1:1/v1", "ftp://127.0.0.1/"])
def test_a_wrong_address_is_the_log_readers_to_mend(
    client: Client, configure: Configure, settled: Settled, url: str
) -> None:
    configure(UPSTREAM_MAX_RETRIES=0, OPENAI_BASE_URL=url)
    failed(client.chat(), AWAY)
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


@on_sqlite
def test_after_any_failure_the_next_chat_is_answered(client: Client, upstream: FakeUpstream) -> None:
    upstream.replies(
        Reply("Hi", cut_after=1),
        Reply.garbage(b"data: {oops\n\n"),
        Reply.refuse(401),
        Reply("Hi", {"error": {}}),
        Reply("Hello"),
    )
    ends = [client.chat({**HELLO, "profile": "expanded"}).events[-1] for _ in range(5)]
    assert ends == ["error"] * 4 + ["done"]


# The event stream itself, held to the letter of its specification.


def interpreted(stream: bytes) -> list[bytes]:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html, the whole text at once, for data alone."""
    *lines, _ = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    events, data = [], []
    for line in lines:
        field, _, value = line.partition(b":")
        if not line and data:
            events.append(b"\n".join(data))
            data = []
        elif field == b"data":
            data.append(value.removeprefix(b" "))
    return events


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


@given(
    parts=st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=30),
    tail=st.sampled_from(LINES),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
@example(parts=[(b"data: x", b"\r"), (b"", b"\n")], tail=b"", cuts=[8])
@example(parts=[(b"data: x", b"\r\n"), (b"", b"\r\n"), (b"data: x", b"\n"), (b"", b"\n")], tail=b"", cuts=[8, 9, 10])
@example(parts=[(b"data: x", b"\r\n"), (b"", b"\r"), (b"", b"\r")], tail=b"data", cuts=[8, 9, 10])
@example(parts=[(b"data: x", b"\n"), (b"data", b"\r\n")], tail=b"data: y", cuts=[13, 13])
def test_events_are_the_same_wherever_the_stream_is_cut(
    parts: list[tuple[bytes, bytes]], tail: bytes, cuts: list[int]
) -> None:
    stream = b"".join(line + end for line, end in parts) + tail
    decoder = EventDecoder(limit=10_000)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    events = [event for start, end in pairwise(edges) for event in decoder.feed(stream[start:end])]
    # A CR at the very end may yet turn out to be the first half of a CRLF: that changes no event.
    assert events == interpreted(stream)


def test_an_event_above_the_limit_is_refused_while_it_is_still_arriving() -> None:
    decoder = EventDecoder(limit=100)
    for _ in range(10):
        assert decoder.feed(b"data: 0123456789\n\n" * 5) == [b"0123456789"] * 5
    assert decoder.feed(b"data: 0123456789\n" * 5) == []
    with pytest.raises(ValueError, match="limit"):
        decoder.feed(b"data: 0123456789\n" * 6)

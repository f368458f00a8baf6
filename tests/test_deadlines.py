"""Time: heartbeats, deadlines, and retries before the first byte. In the small seconds of each test's own settings."""

from __future__ import annotations

import email.utils
import json
import socket
import time
from itertools import islice
from typing import Any

import pytest

from chatnest.ledger.charges import IN_FLIGHT
from chatnest.models import Reservation
from chatnest.testing import FakeUpstream, Reply

from .client import HELLO, Client, Frame
from .conftest import Configure, Settled, eventually, on_sqlite, stalled

pytestmark = on_sqlite

HELLO_BOUND = 10
PING = ("ping", "")
TIMEOUT = {
    "message": "The AI model took too long to answer. Please try again.",
    "code": "upstream_timeout",
    "retryable": True,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts nobody waits, unless the provider says how long."""
    monkeypatch.setattr("chatnest.attempts.random.uniform", lambda low, high: 0.0)


def only(rows: list[Reservation], outcome: str, source: str, tokens: int) -> None:
    (row,) = rows
    assert (row.outcome, row.usage_source, row.tokens_charged) == (outcome, source, tokens)


def without_pings(frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame != PING]


# Heartbeats.


@pytest.mark.parametrize("point", [-1, 0, 1], ids=["before its head", "before its first piece", "between pieces"])
def test_while_the_model_is_silent_the_client_hears_that_somebody_is_there(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled, point: int
) -> None:
    configure(HEARTBEAT_SECONDS=0.05)
    upstream.replies(Reply("one", "two", gate_after=point))
    with client.stream() as stream:
        told = (frame for frame in iter(stream.next, None) if frame != PING)  # a slow machine has some
        before = list(islice(told, 2 if point == 1 else 1))
        assert [stream.next() for _ in range(3)] == [PING] * 3
        upstream.release()
        after = without_pings(stream.rest())
    assert [event for event, _ in before + after] == ["start", "token", "token", "usage", "done"]
    only(settled(), "completed", "reported", 14)


def test_heartbeats_keep_their_distance(client: Client, upstream: FakeUpstream, configure: Configure) -> None:
    configure(HEARTBEAT_SECONDS=0.1)
    upstream.replies(Reply("one", gate_after=-1))
    began = time.monotonic()
    with client.stream() as stream:
        for n in range(1, 6):
            stream.until("ping")
            assert time.monotonic() - began >= n * 0.1 - 0.02


def test_while_pieces_come_there_are_no_heartbeats(
    client: Client, upstream: FakeUpstream, configure: Configure
) -> None:
    configure(HEARTBEAT_SECONDS=0.5)
    upstream.replies(Reply(*["x"] * 15, pause=0.05))
    assert "ping" not in client.chat().events


def test_a_providers_own_heartbeats_are_not_passed_on_as_silence(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    """Comments and chunks without text are no frames: the client would take the connection for dead."""
    configure(HEARTBEAT_SECONDS=0.05, GAP_SECONDS=0.5)
    comments = [b": OPENROUTER PROCESSING\n\n"] * 80
    upstream.replies(Reply("one", *comments, "two", pause=0.01))
    frames = client.chat().frames
    # The comments went on for longer than the gap that is allowed: they are a sign of life.
    assert frames.count(PING) >= 3
    assert [event for event, _ in without_pings(frames)] == ["start", "token", "token", "usage", "done"]


# Deadlines.


@pytest.mark.parametrize(
    "reply",
    [
        Reply("Hi", gate_after=-1),
        Reply("Hi", gate_after=0),
        Reply(b": waiting\n\n", repeat=True, pause=0.01),
    ],
    ids=["no head", "no piece", "only comments"],
)
def test_an_answer_that_does_not_begin_is_given_up(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled, reply: Reply
) -> None:
    configure(FIRST_TOKEN_SECONDS=0.4)
    upstream.replies(reply)
    began = time.monotonic()
    answer = client.chat()
    assert 0.35 < time.monotonic() - began < 3
    assert answer.events == ["start", "error"]
    assert answer.data("error") == TIMEOUT
    upstream.wait_for_disconnect()
    only(settled(), "timed_out", "counted", HELLO_BOUND + IN_FLIGHT)
    assert len(upstream.requests) == 1


def test_an_answer_that_stops_half_way_is_given_up(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    configure(GAP_SECONDS=0.4, FIRST_TOKEN_SECONDS=30)
    upstream.replies(Reply("one", " two", " three", gate_after=2))
    began = time.monotonic()
    answer = client.chat()
    assert 0.35 < time.monotonic() - began < 3
    assert answer.events == ["start", "token", "token", "error"]
    assert answer.data("error") == TIMEOUT
    upstream.wait_for_disconnect()
    only(settled(), "timed_out", "counted", HELLO_BOUND + IN_FLIGHT + 2)


def test_the_gap_is_measured_anew_from_each_piece(client: Client, upstream: FakeUpstream, configure: Configure) -> None:
    configure(GAP_SECONDS=0.6, FIRST_TOKEN_SECONDS=0.6)
    upstream.replies(Reply(*["x"] * 10, pause=0.1))
    assert client.chat().events[-1] == "done"


def test_heartbeats_do_not_put_a_deadline_off(client: Client, upstream: FakeUpstream, configure: Configure) -> None:
    configure(HEARTBEAT_SECONDS=0.05, FIRST_TOKEN_SECONDS=0.4)
    upstream.replies(Reply("Hi", gate_after=-1))
    events = client.chat().events
    assert events.count("ping") >= 3
    assert [event for event in events if event != "ping"] == ["start", "error"]


def test_no_answer_goes_on_for_ever(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    configure(MAX_STREAM_SECONDS=0.5)
    upstream.replies(Reply.endless(" x", interval=0.02))
    answer = client.chat()
    assert answer.data("error") == TIMEOUT
    upstream.wait_for_disconnect()
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("timed_out", "counted")
    assert row.prompt_tokens == HELLO_BOUND
    assert row.completion_tokens >= answer.events.count("token") > 5


@pytest.mark.usefixtures("generous")
def test_no_answer_goes_on_for_ever_even_if_nobody_reads_it(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    """The client holds its connection open and takes nothing: the server waits in the middle of a send."""
    configure(MAX_STREAM_SECONDS=1)
    upstream.replies(Reply.endless("x" * 50_000))
    with client.stream() as stream:
        stream.until("token")
        upstream.wait_for_disconnect()
        (row,) = settled()
    assert (row.outcome, row.usage_source) == ("timed_out", "held")


@pytest.mark.usefixtures("generous")
def test_a_reader_who_is_slow_is_not_the_models_fault(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    configure(GAP_SECONDS=0.3, HEARTBEAT_SECONDS=0.1)
    upstream.replies(Reply.endless("x" * 50_000))
    with client.stream() as stream:
        stream.until("token")
        sent = stalled(upstream, seconds=0.6)  # for longer than the gap
        assert sent * 50_000 < 30_000_000  # nothing on the way holds more
        for _ in range(sent + 20):
            assert stream.next()[0] in ("token", "ping")
    upstream.wait_for_disconnect()
    assert [row.outcome for row in settled()] == ["cancelled"]


# Retries.


@pytest.mark.parametrize("status", [409, 429, 500, 502, 503, 529])
@pytest.mark.usefixtures("impatient")
def test_what_may_pass_is_tried_again_before_the_first_byte(
    client: Client, upstream: FakeUpstream, settled: Settled, status: int
) -> None:
    upstream.replies(Reply.refuse(status), Reply.refuse(status), Reply("Hi"))
    answer = client.chat()
    assert answer.events == ["start", "token", "usage", "done"]
    assert len(upstream.requests) == 3
    assert len({request.body for request in upstream.requests}) == 1
    only(settled(), "completed", "reported", 13)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "upstream_rejected"),
        (401, "upstream_misconfigured"),
        (403, "upstream_misconfigured"),
        (404, "upstream_misconfigured"),
        (413, "context_length_exceeded"),
        (422, "upstream_rejected"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    client: Client, upstream: FakeUpstream, settled: Settled, status: int, code: str
) -> None:
    upstream.replies(Reply.refuse(status, retry_after=0), Reply("Hi"))
    assert client.chat().data("error")["code"] == code
    assert len(upstream.requests) == 1
    only(settled(), "upstream_error", "none", 0)


@pytest.mark.usefixtures("impatient")
def test_a_connection_that_is_cut_before_the_answer_is_tried_again_and_both_are_paid(
    client: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    """The provider had the request: nobody knows what it bills for it."""
    upstream.replies(Reply("Hi", cut_after=-1), Reply("Hi"))
    assert client.chat().events[-1] == "done"
    assert len(upstream.requests) == 2
    first, second = settled()
    only([first], "upstream_error", "counted", HELLO_BOUND)
    only([second], "completed", "reported", 13)


@pytest.mark.usefixtures("impatient")
def test_an_attempt_that_was_cut_and_then_refused_may_have_been_billed(
    client: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply("Hi", cut_after=-1), Reply.refuse(400))
    assert client.chat().data("error")["code"] == "upstream_rejected"
    first, second = settled()
    only([first], "upstream_error", "counted", HELLO_BOUND)
    only([second], "upstream_error", "none", 0)


@pytest.mark.usefixtures("impatient")
def test_a_retry_that_no_budget_is_left_for_is_not_made(
    client: Client, upstream: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply("Hi", cut_after=-1), Reply("Hi"))
    answer = client.chat({**HELLO, "dailyTokenLimit": HELLO_BOUND + 65})
    assert answer.data("error")["code"] == "upstream_unavailable"
    assert len(upstream.requests) == 1
    only(settled(), "upstream_error", "counted", HELLO_BOUND)


@pytest.mark.parametrize("status", [408, 504, 524])
def test_a_gateway_that_gave_up_waiting_is_not_asked_again(
    client: Client, upstream: FakeUpstream, settled: Settled, status: int
) -> None:
    """The model behind it goes on, and is paid for."""
    upstream.replies(Reply.refuse(status), Reply("Hi"))
    assert client.chat().data("error")["code"] == "upstream_timeout"
    assert len(upstream.requests) == 1
    only(settled(), "upstream_error", "counted", HELLO_BOUND)


@pytest.mark.usefixtures("impatient")
def test_a_provider_that_is_away_is_tried_three_times(
    client: Client, configure: Configure, settled: Settled, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    configure(OPENAI_BASE_URL=f"http://127.0.0.1:{port}/v1")
    assert client.chat().data("error")["code"] == "upstream_unavailable"
    assert caplog.text.count("no connection could be made") == 3
    only(settled(), "upstream_error", "none", 0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("retries", [0, 1, 4])
def test_the_number_of_retries_is_the_sites(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled, retries: int
) -> None:
    configure(UPSTREAM_MAX_RETRIES=retries)
    upstream.replies(Reply.refuse(503))
    assert client.chat().data("error")["code"] == "upstream_unavailable"
    assert len(upstream.requests) == retries + 1
    only(settled(), "upstream_error", "none", 0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "reply",
    [
        Reply("Hi", cut_after=0),
        Reply("Hi", cut_after=1),
        Reply.garbage(b"<html>busy</html>"),
        Reply({"error": {"code": 429, "message": "slow down"}}),
    ],
    ids=["head", "piece", "garbage", "error"],
)
def test_after_the_first_byte_nothing_is_tried_again(
    client: Client, upstream: FakeUpstream, settled: Settled, reply: Reply
) -> None:
    """It could be billed twice."""
    upstream.replies(reply, Reply("Hi"))
    assert client.chat().data("error")["code"] == "upstream_broken"
    assert len(upstream.requests) == 1
    assert settled()[0].tokens_charged > 0


def test_between_attempts_there_is_a_pause_that_grows(
    client: Client, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatnest.attempts.random.uniform", lambda low, high: low)
    upstream.replies(Reply.refuse(503), Reply.refuse(503), Reply("Hi"))
    began = time.monotonic()
    with client.stream() as stream:
        upstream.wait_for_request(2)
        second = time.monotonic() - began
        upstream.wait_for_request(3)
        third = time.monotonic() - began
        stream.rest()
    assert 0.35 < second < 0.75
    assert third - second > 0.7


@pytest.mark.parametrize("dated", [False, True], ids=["seconds", "date"])
@pytest.mark.usefixtures("impatient")
def test_the_providers_retry_after_is_honoured_and_the_client_hears_pings_meanwhile(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled, dated: bool
) -> None:
    configure(HEARTBEAT_SECONDS=0.1)
    at = time.time() + 2
    retry_after: Any = email.utils.formatdate(at, usegmt=True) if dated else 0.7
    upstream.replies(Reply.refuse(429, retry_after=retry_after), Reply("Hi"))
    began = time.monotonic()
    with client.stream() as stream:
        upstream.wait_for_request(2)
        waited = time.monotonic() - began
        frames = stream.rest()
    # A date has no fractions of a second.
    assert 0.65 < waited < 2.5
    assert frames.count(PING) >= 4
    assert [event for event, _ in without_pings(frames)] == ["start", "token", "usage", "done"]
    only(settled(), "completed", "reported", 13)


def test_a_date_that_has_passed_is_no_wait_at_all(client: Client, upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), Reply("Hi"))
    assert client.chat().events[-1] == "done"


def test_a_wait_beyond_the_deadline_is_not_begun(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    configure(FIRST_TOKEN_SECONDS=5)
    upstream.replies(Reply.refuse(429, retry_after=30), Reply("Hi"))
    began = time.monotonic()
    error = client.chat().data("error")
    assert time.monotonic() - began < 3
    assert (error["code"], error["retryAfter"]) == ("upstream_rate_limited", 30)
    assert len(upstream.requests) == 1
    only(settled(), "upstream_error", "none", 0)


def test_a_client_that_leaves_between_attempts_ends_them(
    client: Client, upstream: FakeUpstream, settled: Settled, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies(Reply.refuse(503, retry_after=1), Reply("Hi"))
    with client.stream() as stream:
        stream.next()
        eventually(lambda: "unavailable" in caplog.text)
    only(settled(), "cancelled", "none", 0)
    with pytest.raises(TimeoutError):
        upstream.wait_for_request(2, timeout=1.2)


def test_an_error_frame_is_the_last_one(client: Client, upstream: FakeUpstream, configure: Configure) -> None:
    configure(HEARTBEAT_SECONDS=0.05, GAP_SECONDS=0.3)
    upstream.replies(Reply("one", "two", gate_after=1))
    *_, (event, data) = client.chat().frames
    assert event == "error"
    assert json.loads(data) == TIMEOUT

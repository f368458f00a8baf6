from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from chatnest.testing import SECRET, FakeUpstream, Reply

CHAT = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


def connect(upstream: FakeUpstream) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(upstream.url).netloc, timeout=10)


def post(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    connection.request("POST", "/v1/chat/completions", json.dumps(CHAT))
    return connection.getresponse()


def ask(upstream: FakeUpstream) -> tuple[http.client.HTTPResponse, bytes]:
    with closing(connect(upstream)) as connection:
        response = post(connection)
        return response, response.read()


def start(upstream: FakeUpstream) -> socket.socket:
    """A raw client that has asked and not yet read."""
    body = json.dumps(CHAT).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: fake\r\nContent-Length: %d\r\n\r\n" % len(body)
    client = socket.create_connection((urlsplit(upstream.url).hostname, urlsplit(upstream.url).port), 10)
    client.sendall(head + body)
    return client


def read_until(client: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        data += client.recv(65536)
    return data


def data_lines(body: bytes) -> list[str]:
    return [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]


def chunks(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(data) for data in data_lines(body) if data != "[DONE]"]


def text(body: bytes) -> str:
    deltas = [choice["delta"] for chunk in chunks(body) for choice in chunk["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


# What it answers


def test_an_answer_is_worded_as_openai_words_it(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", " world"))

    response, body = ask(upstream)

    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    role, hello, world, finish, usage = chunks(body)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert hello["choices"] == [{"index": 0, "delta": {"content": "Hello"}, "logprobs": None, "finish_reason": None}]
    assert hello["object"] == "chat.completion.chunk"
    assert hello["usage"] is None
    assert world["choices"][0]["delta"] == {"content": " world"}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14}
    assert data_lines(body)[-1] == "[DONE]"


def test_it_answers_unscripted(upstream: FakeUpstream) -> None:
    _, body = ask(upstream)

    assert text(body)
    assert chunks(body)[-1]["usage"]


def test_usage_finish_and_done_can_be_left_out(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", usage=None, finish_reason=None, done=False))

    _, body = ask(upstream)

    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks(body)] == ["", "Hello"]
    assert "[DONE]" not in data_lines(body)


def test_usage_and_finish_can_be_given(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", usage=(7, 900), finish_reason="length"))

    *_, finish, usage = chunks(ask(upstream)[1])

    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["total_tokens"] == 907


def test_an_emoji_can_be_split_over_chunks(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("\ud83d", "\ude00"))

    _, body = ask(upstream)

    assert b'"\\ud83d"' in body
    assert text(body).encode("utf-16", "surrogatepass").decode("utf-16") == "😀"


def test_events_and_bytes_go_between_texts(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("a", {"error": {"message": "late"}}, b"data: {oops\n\n", "b", done=False))

    _, body = ask(upstream)

    assert data_lines(body)[2:4] == ['{"error": {"message": "late"}}', "{oops"]
    assert upstream.pieces_sent == 2


def test_garbage_is_sent_as_it_is(upstream: FakeUpstream) -> None:
    upstream.replies(Reply.garbage(b"\xff\x00data: ", b"<html>"))

    response, body = ask(upstream)

    assert (response.status, body) == (200, b"\xff\x00data: <html>")


def test_a_refusal_carries_a_secret(upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(429, retry_after=2, headers={"x-request-id": "req_1"}))

    response, body = ask(upstream)

    assert response.status == 429
    assert response.headers["retry-after"] == "2"
    assert response.headers["x-request-id"] == "req_1"
    assert response.headers["content-type"] == "application/json"
    assert SECRET in json.loads(body)["error"]["message"]


def test_replies_queue_and_the_last_repeats(upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(503), Reply("second"))
    assert [ask(upstream)[0].status for _ in range(3)] == [503, 200, 200]

    upstream.replies(Reply.refuse(500))
    assert ask(upstream)[0].status == 500


# How it sends


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_events_end_in_any_newline(upstream: FakeUpstream, newline: bytes) -> None:
    upstream.replies(Reply("Hello", newline=newline))

    _, body = ask(upstream)

    assert body.endswith(b"data: [DONE]" + newline + newline)
    assert text(body) == "Hello"


def test_comments_surround_the_data(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", comments=True))

    _, body = ask(upstream)

    assert body.startswith(b": keep-alive\n\nevent: message\nid: 7\ndata: {")
    assert text(body) == "Hello"


def test_bytes_can_come_one_at_a_time(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", " world", slice=1))

    async def reads() -> list[bytes]:
        async with aiohttp.ClientSession() as session, session.post(upstream.url, json=CHAT) as response:
            return [data async for data in response.content.iter_any()]

    # In its own loop they take turns: a thread that comes to its turn later finds many at once.
    received = asyncio.run_coroutine_threadsafe(reads(), upstream._loop).result(10)

    assert len(received) > 10
    assert text(b"".join(received)) == "Hello world"


@pytest.mark.parametrize("chunked", [True, False])
def test_a_compressed_body_is_flushed_piece_by_piece(upstream: FakeUpstream, chunked: bool) -> None:
    upstream.replies(Reply("Hello", " world", gzip=True, chunked=chunked, gate_after=1))

    async def read() -> bytes:
        async with aiohttp.ClientSession() as session, session.post(upstream.url, json=CHAT) as response:
            first = await response.content.readany()  # it comes though the rest is held
            assert b'"Hello"' in first
            upstream.release()
            return first + await response.read()

    assert text(asyncio.run(read())) == "Hello world"


def test_a_compressed_body_is_one_gzip_member(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", gzip=True))

    response, body = ask(upstream)

    assert response.headers["content-encoding"] == "gzip"
    assert text(gzip.decompress(body)) == "Hello"


def test_a_body_can_end_with_its_connection(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", chunked=False))

    response, body = ask(upstream)

    assert response.headers["connection"] == "close"
    assert "transfer-encoding" not in response.headers
    assert data_lines(body)[-1] == "[DONE]"
    assert upstream.disconnects == []


@pytest.mark.parametrize("pause", ["pause_before", "pause"])
def test_it_can_be_slow(upstream: FakeUpstream, pause: str) -> None:
    upstream.replies(Reply("Hello", " world", **{pause: 0.05}))

    began = time.monotonic()
    ask(upstream)

    assert time.monotonic() - began >= 0.05


# How it breaks


def test_cut_before_the_status_line(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", cut_after=-1))

    with pytest.raises(ConnectionResetError):
        ask(upstream)


@pytest.mark.parametrize(("point", "received"), [(0, ""), (1, "Hello")])
def test_cut_in_the_body(upstream: FakeUpstream, point: int, received: str) -> None:
    upstream.replies(Reply("Hello", " world", cut_after=point))

    async def read() -> bytes:
        data = b""
        async with aiohttp.ClientSession() as session, session.post(upstream.url, json=CHAT) as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                async for part in response.content.iter_any():
                    data += part
        return data

    assert text(asyncio.run(read())) == received
    upstream.wait_for(lambda: upstream.open_connections == 0)
    assert upstream.disconnects == []  # nobody left: the end was ours


def test_a_held_reply_can_be_cut_on_release(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", gate_after=0, cut_after=0))

    with closing(start(upstream)) as client:
        assert read_until(client, b"\r\n\r\n").endswith(b"\r\n\r\n")
        upstream.release()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


# What it holds and sees


def test_a_gate_holds_until_released(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", " world", gate_after=1))

    with closing(start(upstream)) as client:
        assert text(read_until(client, b'"Hello"}, "logprobs": null, "finish_reason": null}], "usage": null}\n'))
        assert upstream.pieces_sent == 1
        upstream.release()
        read_until(client, b"[DONE]")

    assert upstream.pieces_sent == 2


def test_a_release_may_come_before_the_request(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", gate_after=-1))
    upstream.release()
    ask(upstream)

    upstream.replies(Reply("held anew", gate_after=-1))
    with closing(start(upstream)) as client:
        upstream.wait_for_request(2)
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(1)


@pytest.mark.parametrize("point", [-1, 0, 1])
def test_leaving_a_held_reply_is_seen_at_once(upstream: FakeUpstream, point: int) -> None:
    upstream.replies(Reply("Hello", " world", gate_after=point))
    client = start(upstream)
    upstream.wait_for_request()

    left = time.monotonic()
    client.close()

    assert upstream.wait_for_disconnect() - left < 1
    upstream.wait_for(lambda: upstream.open_connections == 0)


def test_leaving_a_gate_leaves_it_closed_for_the_others(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", gate_after=1))
    leaver, stayer = start(upstream), start(upstream)
    upstream.wait_for_pieces(2)

    leaver.close()
    upstream.wait_for_disconnect()
    upstream.release()

    with closing(stayer):
        read_until(stayer, b"[DONE]")


def test_leaving_a_paused_reply_is_seen_at_once(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", " world", pause=3600))
    client = start(upstream)
    upstream.wait_for_pieces(1)

    left = time.monotonic()
    client.close()

    assert upstream.wait_for_disconnect() - left < 1
    assert upstream.pieces_sent == 1


def test_an_endless_reply_goes_no_faster_than_it_is_read(upstream: FakeUpstream) -> None:
    upstream.replies(Reply.endless("x" * 65536))
    client = start(upstream)

    with pytest.raises(TimeoutError):  # 64 MB are more than the sockets hold
        upstream.wait_for_pieces(1000, timeout=0.5)

    stalled = upstream.pieces_sent
    while upstream.pieces_sent == stalled:
        assert client.recv(65536)

    left = time.monotonic()
    client.close()
    assert upstream.wait_for_disconnect() - left < 1


def test_a_full_answer_is_no_disconnect(upstream: FakeUpstream) -> None:
    for _ in range(50):
        ask(upstream)

    upstream.wait_for(lambda: upstream.open_connections == 0)
    assert upstream.connections_opened == 50
    assert upstream.disconnects == []


def test_a_connection_is_kept_alive(upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(500), Reply("Hello"))

    with closing(connect(upstream)) as connection:
        for status in [500, 200, 200]:
            response = post(connection)
            assert response.status == status
            response.read()

    assert upstream.connections_opened == 1


def test_requests_may_be_pipelined(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("first"), Reply("second"))

    with closing(start(upstream)) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\n\r\n")
        assert b'"second"' in read_until(client, b'"second"')

    assert [request.method for request in upstream.requests] == ["POST", "GET"]


def test_requests_are_recorded(upstream: FakeUpstream) -> None:
    async def ask_with_key() -> None:
        headers = {"Authorization": "Bearer key"}
        url = upstream.url + "/chat/completions"
        async with aiohttp.ClientSession(headers=headers) as session, session.post(url, json=CHAT):
            pass

    asyncio.run(ask_with_key())

    request = upstream.wait_for_request()
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == "Bearer key"
    assert request.json == CHAT
    assert upstream.requests == [request]


def test_what_never_comes_is_a_timeout(upstream: FakeUpstream) -> None:
    with pytest.raises(TimeoutError):
        upstream.wait_for_request(timeout=0.01)


def test_reset_forgets(upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(500))
    ask(upstream)

    upstream.reset()

    assert (upstream.requests, upstream.pieces_sent, upstream.connections_opened) == ([], 0, 0)
    assert ask(upstream)[0].status == 200


def test_leaving_ends_every_connection() -> None:
    with FakeUpstream() as upstream:
        upstream.replies(Reply(gate_after=-1))
        client = start(upstream)
        upstream.wait_for_request()

    with closing(client):
        assert client.recv(1) == b""
    assert upstream.open_connections == 0
    assert upstream.disconnects == []
    with pytest.raises(ConnectionRefusedError):
        start(upstream)


def test_many_held_replies_are_released_together(upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Hello", gate_after=-1))
    clients = [start(upstream) for _ in range(200)]
    upstream.wait_for_request(200)

    upstream.release()

    for client in clients:
        with closing(client):
            assert read_until(client, b"[DONE]").startswith(b"HTTP/1.1 200 ")

"""An OpenAI-compatible upstream that costs little beside what it measures: a token each INTERVAL seconds.

    python -m tests.benchmarks.upstream PORT TOKENS INTERVAL

The first token comes at once; with an interval of 0 all do. Each carries the time at which it was sent
(``~<time.monotonic_ns()>~``). The chunks are as long as OpenAI's, each in an HTTP chunk of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

import uvloop

CHUNK: dict[str, Any] = {
    "id": "chatcmpl-abc123DEF456ghi789JKL012mno",
    "object": "chat.completion.chunk",
    "created": 1763800000,
    "model": "gpt-4o-mini-2024-07-18",
    "service_tier": "default",
    "system_fingerprint": "fp_560af6e559",
    "choices": [],
    "usage": None,
}
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
)
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
BACKLOG = 4096


def event(data: str) -> bytes:
    text = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(text), text)


def choice(delta: dict[str, str], finish_reason: str | None = None) -> str:
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
    return json.dumps({**CHUNK, "choices": choices, "obfuscation": "aBcDeFgHi"})


def end(tokens: int) -> bytes:
    usage = {"prompt_tokens": 12, "completion_tokens": tokens, "total_tokens": 12 + tokens}
    last = event(choice({}, "stop")) + event(json.dumps({**CHUNK, "usage": usage})) + event("[DONE]")
    return last + b"0\r\n\r\n"


# All tokens are of one length, so that only the stamp has to be written into each.
TOKEN = event(choice({"content": f" ~{10**18}~"})).replace(b"%d" % 10**18, b"%019d")


class Answering(asyncio.Protocol):
    """One connection: requests in, answers out, until the client leaves."""

    def __init__(self, tokens: int, interval: float) -> None:
        self.tokens, self.interval = tokens, interval
        self.loop = asyncio.get_running_loop()
        self.received = b""
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if blank and len(body) >= int(length[1] if length else 0):
            self.received = b""
            self.answer()

    def answer(self) -> None:
        token = TOKEN % time.monotonic_ns()
        if self.interval and self.tokens > 1:
            self.transport.write(HEAD + token)
            self.sent = 1
            self.wait(self.loop.time())
        else:
            self.transport.write(HEAD + token * self.tokens + end(self.tokens))

    def wait(self, last: float) -> None:
        due = last + self.interval
        self.timer = self.loop.call_at(due, self.go_on, due)

    def go_on(self, due: float) -> None:
        self.sent += 1
        token = TOKEN % time.monotonic_ns()
        if self.sent < self.tokens:
            self.transport.write(token)
            self.wait(due)
        else:
            self.transport.write(token + end(self.tokens))


async def serve(port: int, tokens: int, interval: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(tokens, interval), "127.0.0.1", port, backlog=BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))

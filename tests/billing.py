"""A provider that keeps its own bill: the prompt as it really counts it, and every token that it has generated,
whether or not anybody has received it. What it does with a request is a ``Play``.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from chatnest.wires import Message

from .leaving import WORD, Reader

PIECE = 4  # tokens in an event
AHEAD = 8  # tokens that its reader has not seen yet, when it sees that he has gone: 80 a second, 100 ms away
THINKS = 8  # tokens in THINKS_SECONDS, without a word
THINKS_SECONDS = 0.001

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

Count = Callable[[Sequence[Message]], int]


class GoneError(Exception):
    """Nobody listens any more."""


class Answer:
    """What is said to one request, and what is billed for it. ``attempt``: which of this reader's requests it is."""

    def __init__(self, reader: Reader, attempt: int, prompt: int, allowance: int, writer: asyncio.StreamWriter) -> None:
        self.reader, self.attempt, self.prompt, self.allowance = reader, attempt, prompt, allowance
        self.generated = self.reasoned = self.unseen = 0
        self.ahead = AHEAD  # tokens
        self.gone = False
        self._writer = writer

    @property
    def bill(self) -> int:
        return self.prompt + self.generated

    async def think(self, tokens: int) -> None:
        """Generate without a word, at most the allowance. Raises GoneError."""
        while tokens > 0 and self.generated < self.allowance:
            step = min(THINKS, tokens, self.allowance - self.generated)
            self.generated += step
            self.reasoned += step
            self.unseen += step
            tokens -= step
            await asyncio.sleep(THINKS_SECONDS)
            if self.gone:
                raise GoneError

    async def write(self, tokens: int, field: str = "content") -> None:
        """Generate and send, at most the allowance, no more than ``ahead`` of what was seen. Raises GoneError."""
        end = min(self.generated + tokens, self.allowance)
        while self.generated < end:
            step = min(PIECE, end - self.generated)
            while not self.gone and self.generated + step - self.unseen - self.reader.seen > self.ahead:
                self.reader.moved.clear()
                await self.reader.moved.wait()
            if self.gone:
                self.generated = min(end, self.unseen + self.reader.seen + self.ahead)
                raise GoneError
            self.generated += step
            self.reasoned += step if field != "content" else 0
            await self.event({"choices": [{"index": 0, "delta": {field: WORD * step}}]})

    async def left(self) -> None:
        """Wait until its reader has gone. Raises GoneError."""
        while not self.gone:
            self.reader.moved.clear()
            await self.reader.moved.wait()
        raise GoneError

    async def head(self) -> None:
        await self._send(HEAD)

    async def event(self, data: Mapping[str, Any] | str) -> None:
        await self._send(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())

    async def finish(self) -> None:
        """An end without a report."""
        await self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})

    async def report(self) -> None:
        """An end with the whole bill, in which reasoning is named."""
        await self.finish()
        usage: dict[str, Any] = {"prompt_tokens": self.prompt, "completion_tokens": self.generated}
        usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoned}
        await self.event({"choices": [], "usage": {**usage, "total_tokens": self.bill}})
        await self.event("[DONE]")

    async def refuse(self, status: int) -> None:
        await self._send(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # on, for no time: closing then sends RST
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()

    async def watch(self, requests: asyncio.StreamReader) -> None:
        with suppress(OSError):
            await requests.read()
        self.gone = True
        self.reader.moved.set()

    async def _send(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            raise GoneError from None


Play = Callable[[Answer], Awaitable[None]]


async def honest(answer: Answer) -> None:
    await answer.head()
    await answer.write(answer.allowance)
    await answer.report()


async def silent(answer: Answer) -> None:
    """Thinks for as long as it may, and sends nothing before it is through."""
    await answer.think(answer.allowance)
    await answer.head()
    await answer.finish()


async def in_the_open(answer: Answer) -> None:
    """Shows what it thinks."""
    await answer.head()
    await answer.write(answer.allowance // 2, "reasoning_content")
    await answer.write(answer.allowance // 4)
    await answer.report()


async def thinking(answer: Answer) -> None:
    """Thinks unseen, and says so in the report."""
    await answer.head()
    await answer.think(answer.allowance // 2)
    await answer.write(answer.allowance // 4)
    await answer.report()


async def finishing(answer: Answer) -> None:
    """Writes to the end of its allowance, whoever reads."""
    answer.ahead = answer.allowance
    try:
        await answer.head()
        for _ in range(20):
            await answer.write(8)
            await asyncio.sleep(0.001)
    finally:
        answer.generated = answer.allowance
    await answer.report()


async def endless(answer: Answer) -> None:
    """Does not know what max_tokens means."""
    answer.allowance *= 5
    await honest(answer)


async def breaking(answer: Answer) -> None:
    """Reads the prompt and breaks; what is asked again is answered."""
    if answer.attempt == 1:
        return answer.reset()
    return await honest(answer)


async def out_of_time(answer: Answer) -> None:
    """Its gateway gives up, before it has begun."""
    await answer.refuse(504)


async def out_of_time_after_the_work(answer: Answer) -> None:
    await answer.think(answer.allowance)
    await answer.refuse(504)


class BillingProvider:
    """``answers``: all that was asked of it, in turn."""

    def __init__(self, play: Play, count: Count, readers: Sequence[Reader]) -> None:
        self._play, self._count = play, count
        self._readers = {reader.number: reader for reader in readers}
        self._attempts: Counter[int] = Counter()
        self.answers: list[Answer] = []

    async def start(self) -> str:
        """The URL to call it by. It answers while this event loop runs."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1000)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    def bills(self) -> Counter[str]:
        """The tokens of each payer."""
        bills: Counter[str] = Counter()
        for answer in self.answers:
            bills[answer.reader.payer] += answer.bill
        return bills

    async def _connected(self, requests: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            head = await requests.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            asked = json.loads(await requests.readexactly(int(length[1]) if length else 0))
            await self._answer(asked, requests, writer)
        writer.close()

    async def _answer(self, asked: Any, requests: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        messages = [Message(turn["role"], turn["content"]) for turn in asked["messages"]]
        number = int(messages[-1].content.split()[0])
        self._attempts[number] += 1
        answer = Answer(
            self._readers[number], self._attempts[number], self._count(messages), asked["max_tokens"], writer
        )
        self.answers.append(answer)
        watching = asyncio.create_task(answer.watch(requests))
        with suppress(GoneError):
            await self._play(answer)
        watching.cancel()

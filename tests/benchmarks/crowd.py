"""Many clients of a chat at once, in one thread: each counts its tokens, and how late they came."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Coroutine
from itertools import count
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

BODY = json.dumps({"messages": [{"id": "1", "role": "user", "content": "Tell me about streaming."}]}).encode()
PATIENCE_SECONDS = 300
MARK = re.compile(rb"~(\d+)~")


def request(number: int, path: str) -> bytes:
    """A chat of a visitor with an address of his own, as a proxy before the site passes it on."""
    address = ".".join(str(number >> shift & 255) for shift in (16, 8, 0))
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(BODY)}",
        f"X-Forwarded-For: 10.{address}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + BODY


class Chat(asyncio.Protocol):
    """One request and what came of it; times are milliseconds.

    ``begun`` is done once the first token is there, ``ended`` once the connection is gone, and ``begun`` too.
    """

    def __init__(self, number: int, path: str) -> None:
        self.number, self.path = number, path
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.done = False  # the answer came to its end
        self.first_token: float | None = None  # from the request on
        self.lateness: list[float] = []  # of each token, from when the upstream sent it
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self._asked = time.monotonic_ns()
        self.transport.write(request(self.number, self.path))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if not self.status:
            self.status = int(data[9:12])
        lines, _, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest
        if marks := MARK.findall(lines):
            if self.first_token is None:
                self.first_token = (now - self._asked) / 1e6
                self.begun.set_result(None)
            self.lateness += [(now - int(mark)) / 1e6 for mark in marks]
        if b"event: done" in lines:
            self.done = True

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.begun, self.ended):
            if not future.done():
                future.set_result(None)


class Crowd:
    """The clients of one server. ``chats`` are all there ever were."""

    def __init__(self, port: int, path: str = "/api/chat") -> None:
        self.port, self.path = port, path
        self.chats: list[Chat] = []
        self._numbers = count(1)

    def __enter__(self) -> Crowd:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, streams: int, rounds: int = 1, ramp: float = 0) -> list[Chat]:
        """``streams`` at once, the next as soon as one ends; the first ones begin ``ramp`` seconds apart."""

        async def one_after_another(start: float) -> list[Chat]:
            await asyncio.sleep(start)
            chats = []
            for _ in range(rounds):
                chats.append(await self._connect())
                await chats[-1].ended
            return chats

        async def everybody() -> list[list[Chat]]:
            return await asyncio.gather(*(one_after_another(n * ramp) for n in range(streams)))

        return [chat for chats in self._do(everybody()) for chat in chats]

    def open(self, streams: int, at_once: int = 100) -> None:
        """``streams`` more that stay; ``at_once`` of them knock at a time, until their first token is there."""

        async def enter(doors: asyncio.Semaphore) -> None:
            async with doors:
                await (await self._connect()).begun

        async def everybody() -> None:
            doors = asyncio.Semaphore(at_once)
            await asyncio.gather(*(enter(doors) for _ in range(streams)))

        self._do(everybody())

    def visit(self) -> Chat:
        """One that leaves at the first token."""

        async def visit() -> Chat:
            chat = await self._connect()
            await chat.begun
            chat.transport.abort()
            await chat.ended
            return chat

        return self._do(visit())

    def leave(self) -> None:
        """All of them close their connection."""

        async def everybody() -> None:
            for chat in self.chats:
                chat.transport.abort()
            await asyncio.gather(*(chat.ended for chat in self.chats))

        self._do(everybody())

    @property
    def tokens(self) -> int:
        return sum(len(chat.lateness) for chat in self.chats)

    async def _connect(self) -> Chat:
        chat = Chat(next(self._numbers), self.path)
        await asyncio.get_running_loop().create_connection(lambda: chat, "127.0.0.1", self.port)
        self.chats.append(chat)
        return chat

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_SECONDS)

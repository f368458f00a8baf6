"""Readers who leave when they please, many of them in one event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

WORD = " word"  # one token, for every tokenizer
AT_ONCE = -1  # for ``Reader.leaves_after``: as soon as it has asked
TO_THE_END = 10**9
PATIENCE_SECONDS = 60.0  # no story takes as long


@dataclass(eq=False)
class Reader:
    """One chat. It leaves after so many tokens (0: at the head), or so many seconds from the head on.

    ``seen``: tokens of the answer, ``code``: of the refusal or the error that it got; ``done``: read to its end.
    """

    number: int
    payer: str
    headers: Mapping[str, str]
    text: str = "Hello!"
    profile: str = "balanced"
    leaves_after: int = TO_THE_END
    seconds: float = PATIENCE_SECONDS
    seen: int = 0
    code: str = ""
    done: bool = False
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # something was seen

    async def read(self, port: int) -> None:
        answer, request = await asyncio.open_connection("127.0.0.1", port)
        try:
            request.write(self._request())
            await request.drain()
            if self.leaves_after != AT_ONCE:
                await answer.readline()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.seconds):
                        await self._read(answer)
        finally:
            request.transport.abort()

    def _request(self) -> bytes:
        # Its number comes first, so that the provider knows whose request it has.
        text = f"{self.number} {self.text}"
        body = json.dumps({"messages": [{"role": "user", "content": text}], "profile": self.profile}).encode()
        headers = {
            "Host": "localhost",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **{name.replace("_", "-"): value for name, value in self.headers.items()},
        }
        lines = ["POST /api/chat HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def _read(self, answer: asyncio.StreamReader) -> None:
        event = b""
        while self.seen < self.leaves_after and (line := await answer.readline()):
            if line.startswith(b"event: "):
                event = line[7:].strip()
                self.done |= event == b"done"
            elif event in (b"token", b"reasoning") and line.startswith(b"data: "):
                self.seen += line.count(WORD.encode())
                self.moved.set()
            elif event == b"error" or line.startswith(b"{"):
                self.code = self.code or json.loads(line.removeprefix(b"data: "))["code"]


async def read_all(readers: Sequence[Reader], port: int, at_once: int) -> None:
    """Each in its turn, ``at_once`` at a time."""
    places = asyncio.Semaphore(at_once)

    async def read(reader: Reader) -> None:
        async with places:
            await reader.read(port)

    async with asyncio.TaskGroup() as tasks:
        for reader in readers:
            tasks.create_task(read(reader))

"""A provider that follows a script: the exact bytes of its answers, in steps that a JSON file can hold.

A script has one list of steps a request; the last list serves all that follow. A step is a list, its name first.
These say something, each in an HTTP chunk of its own:

    ["say", text]                       an event whose delta has this content
    ["delta", delta, finish reason]     an event with this delta; the finish reason may be left out
    ["finish", reason]                  an event with an empty delta
    ["usage", prompt, completion]       an event that reports these
    ["done"]                            data: [DONE]
    ["data", value]                     an event of this JSON value; a string is sent as it is
    ["text", text], ["bytes", hex]      exactly this
    ["together", step, ...]             what these say, in one chunk
    ["dribble", step, ...]              the same, a byte a chunk

and these do something:

    ["head"], ["end"]                   the head of a chunked event stream, and its last chunk
    ["respond", status, body, headers]  a whole response; a body that is no string is sent as JSON
    ["raw", text]                       exactly this, outside any framing
    ["repeat", n, step, ...]            n times; ["endless", step, ...] until nobody listens
    ["sleep", seconds]
    ["leave"]                           the reader of the answer leaves
    ["wait"]                            nothing, until the other side closes the connection
    ["close"], ["reset"]                the connection ends
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Step = list[Any]
Script = list[list[Step]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
# For a side that never closes: the test fails long before.
WAIT_AT_MOST = 20.0  # seconds
SEND_AT_MOST = 100_000_000  # bytes


def said(step: Step) -> bytes:
    """What a step says. Raises ValueError for one that says nothing."""
    match step:
        case ["say", str(text)]:
            return said(["delta", {"content": text}])
        case ["delta", dict(delta), *reason]:
            choice = {"index": 0, "delta": delta, "finish_reason": reason[0] if reason else None}
            return said(["data", {"id": "c1", "object": "chat.completion.chunk", "choices": [choice]}])
        case ["finish", reason]:
            return said(["delta", {}, reason])
        case ["usage", int(prompt), int(completion)]:
            usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
            return said(["data", {"id": "c1", "choices": [], "usage": usage}])
        case ["done"]:
            return said(["data", "[DONE]"])
        case ["data", str(text)]:
            return f"data: {text}\n\n".encode()
        case ["data", value]:
            return said(["data", json.dumps(value, ensure_ascii=False)])
        case ["text", str(text)]:
            return text.encode()
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["together", *steps]:
            return b"".join(map(said, steps))
        case ["repeat", int(n), *steps]:
            return b"".join(map(said, steps)) * n
    raise ValueError(f"no step says {step}")


def response(status: int, body: Any, headers: dict[str, str]) -> bytes:
    """A whole response; its Content-Type is JSON, or HTML for a string, unless a header says otherwise."""
    kind = "text/html" if isinstance(body, str) else "application/json"
    content = (body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)).encode()
    sent = {"content-type": kind, "content-length": len(content), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    return f"HTTP/1.1 {status} Scripted\r\n{head}\r\n".encode() + content


@dataclass(frozen=True)
class Received:
    """A request as it arrived."""

    head: str
    body: dict[str, Any]

    @property
    def path(self) -> str:
        return self.head.split()[1]


class ScriptedProvider:
    """The server on loopback, in a thread, and what it received.

    ``leave``: called from that thread when the script has the reader leave.
    """

    url: str
    requests: list[Received]
    bytes_sent: int

    def __init__(self) -> None:
        self.leave: Callable[[], object] = lambda: None
        self.follow([[]])

    def follow(self, script: Script) -> None:
        """Begin with this script, and forget what was received."""
        self._script = script
        self.requests = []
        self.bytes_sent = 0

    def __enter__(self) -> ScriptedProvider:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        self._loop = asyncio.SelectorEventLoop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=[listener], name="scripted-provider", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self, listener: socket.socket) -> None:
        # Leaving the runner cancels the connections that are left.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen(listener))

    async def _listen(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._connected, sock=listener)
        await self._stopped.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)  # drain() then means: the kernel has it all
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A cancelled handler is one that the server's end cut short; asyncio 3.11 would log it as an error.
        with suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            while True:
                received = await _request(reader)
                self.requests.append(received)
                steps = self._script[min(len(self.requests), len(self._script)) - 1]
                await _Answer(self, reader, writer).play(steps)
        writer.transport.abort()


@dataclass
class _Answer:
    provider: ScriptedProvider
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def play(self, steps: list[Step]) -> None:
        for step in steps:
            await self.do(step)

    async def do(self, step: Step) -> None:
        match step:
            case ["head"]:
                await self.write(HEAD)
            case ["end"]:
                await self.write(b"0\r\n\r\n")
            case ["respond", int(status), body, *headers]:
                await self.write(response(status, body, headers[0] if headers else {}))
            case ["raw", str(text)]:
                await self.write(text.encode())
            case ["repeat", int(n), *steps]:
                for _ in range(n):
                    await self.play(steps)
            case ["endless", *steps]:
                while self.provider.bytes_sent < SEND_AT_MOST:
                    await self.play(steps)
                    await asyncio.sleep(0)
                raise ConnectionAbortedError
            case ["dribble", *steps]:
                for byte in said(["together", *steps]):
                    await self.chunk(bytes([byte]))
                    await asyncio.sleep(0)
            case ["sleep", seconds]:
                await asyncio.sleep(seconds)
            case ["leave"]:
                self.provider.leave()
            case ["wait"]:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.reader.read(), WAIT_AT_MOST)
                raise ConnectionAbortedError
            case ["close"]:
                self.writer.close()
                raise ConnectionAbortedError
            case ["reset"]:
                linger = struct.pack("ii", 1, 0)  # on, for no time: closing then sends RST
                self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                raise ConnectionAbortedError
            case _:
                await self.chunk(said(step))

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        self.provider.bytes_sent += len(data)


async def _request(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
    body = await reader.readexactly(int(fields.get("content-length", 0)))
    return Received(head, json.loads(body) if body else {})

"""A stand-in for the provider in tests: a real HTTP server on loopback that says what a test scripts.

    with FakeUpstream() as upstream:
        upstream.replies(Reply.refuse(429, retry_after=2), Reply("Hello", " world"))
        ...  # point OPENAI_BASE_URL at upstream.url and chat
        assert upstream.requests[0].json["stream"] is True

It speaks raw HTTP/1.1 from a thread with an event loop of its own, so that answers can be held, cut, sliced
and garbled, and so that a client's leaving is seen at once, even while an answer is held.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

# A text (sent as one chunk's delta), an event (sent as its JSON), or bytes (sent as they are).
Piece = str | dict[str, Any] | bytes

# In every refusal's body: a test proves that nothing leaks by not finding it.
SECRET = "sk-upstream-secret"

CHUNK: dict[str, Any] = {
    "id": "chatcmpl-fake",
    "object": "chat.completion.chunk",
    "created": 1763800000,
    "model": "fake-model",
    "choices": [],
    "usage": None,
}
BACKLOG = 4096


@dataclass(frozen=True, kw_only=True)
class Script:
    """How a reply is sent. A point in it is -1 before its head, 0 after its head, n after n pieces."""

    pieces: tuple[Piece, ...] = ()
    repeat: bool = False  # the pieces come over and over until the client leaves
    usage: tuple[int, int] | None = None  # prompt and completion tokens; None: not reported
    finish_reason: str | None = "stop"  # None: no chunk says it
    done: bool = True  # ends with [DONE]

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)  # over the server's own; names in lower case

    pause_before: float = 0  # seconds before its head
    pause: float = 0  # seconds between pieces
    gate_after: int | None = None  # the point where it waits for `upstream.release()`
    cut_after: int | None = None  # the point where it resets the connection

    newline: bytes = b"\n"  # of the events: b"\n", b"\r\n" or b"\r"
    comments: bool = False  # comments, `event:` and `id:` lines around the data
    gzip: bool = False  # compressed, flushed piece by piece
    chunked: bool = True  # False: the body ends where the connection does
    slice: int | None = None  # everything goes out in writes of this many bytes


class Reply(Script):
    """A script in one line: `Reply("Hello", " world", done=False)`. Usage is 12 and the number of texts."""

    def __init__(self, *pieces: Piece, **options: Any) -> None:
        options.setdefault("usage", (12, sum(isinstance(piece, str) for piece in pieces)))
        super().__init__(pieces=pieces, **options)

    @classmethod
    def garbage(cls, *pieces: bytes, **options: Any) -> Reply:
        """A body of exactly these bytes."""
        return cls(*pieces, **{"usage": None, "finish_reason": None, "done": False} | options)

    @classmethod
    def refuse(
        cls,
        status: int,
        *,
        message: str = f"The provider's own words, with a key: {SECRET}",
        retry_after: float | str | None = None,
        **options: Any,
    ) -> Reply:
        """An error in OpenAI's form."""
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        if retry_after is not None:
            headers["retry-after"] = str(retry_after)
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return cls.garbage(json.dumps({"error": error}).encode(), status=status, headers=headers, **options)

    @classmethod
    def endless(cls, piece: str = "x ", interval: float = 0, **options: Any) -> Reply:
        """The same text until the client leaves, no faster than the client reads."""
        return cls(piece, repeat=True, pause=interval, **options)


@dataclass(frozen=True)
class ReceivedRequest:
    """A request as it arrived; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class FakeUpstream:
    """The server, and what it saw. Every method may be called from any thread.

    The waits block: in an async test, `await asyncio.to_thread(upstream.wait_for_request)`.
    """

    url: str
    requests: list[ReceivedRequest]
    disconnects: list[float]  # time.monotonic() at which a client was seen leaving an unfinished reply
    pieces_sent: int  # texts written, over all replies: counted as they are generated, before they are sent
    connections_opened: int
    open_connections: int = 0

    _queue: deque[Reply]
    _last: Reply  # sent again when the queue is empty
    _gate: Future[None]  # done: open

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.reset()

    def __enter__(self) -> FakeUpstream:
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        self._loop = asyncio.SelectorEventLoop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=[listener], name="fake-upstream", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def replies(self, *replies: Reply) -> None:
        """Queue these for the requests to come; the last one repeats. Gates are closed from here on."""
        with self._change():
            self._queue.extend(replies)
            if self._gate.done():
                self._gate = Future()

    def release(self) -> None:
        """Open the gate for every reply scripted so far, waiting or yet to come."""
        with self._change():
            if not self._gate.done():
                self._gate.set_result(None)

    def reset(self) -> None:
        """Forget the script and what was seen. Connections stay open; replies still at a gate stay there."""
        with self._change():
            self._queue = deque()
            self._last = Reply("Hello", " world")
            self._gate = Future()
            self.requests = []
            self.disconnects = []
            self.pieces_sent = 0
            self.connections_opened = 0

    def wait_for(self, condition: Callable[[], bool], timeout: float = 10) -> None:
        """Until the condition, asked at each change here, is true; TimeoutError when it never is."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError(f"not seen by the upstream in {timeout} s")

    def wait_for_request(self, n: int = 1, timeout: float = 10) -> ReceivedRequest:
        """The n-th request, once it is here."""
        self.wait_for(lambda: len(self.requests) >= n, timeout)
        return self.requests[n - 1]

    def wait_for_pieces(self, n: int, timeout: float = 10) -> None:
        """Until n texts were written."""
        self.wait_for(lambda: self.pieces_sent >= n, timeout)

    def wait_for_disconnect(self, n: int = 1, timeout: float = 10) -> float:
        """When, on time.monotonic(), the n-th client was seen leaving an unfinished reply."""
        self.wait_for(lambda: len(self.disconnects) >= n, timeout)
        return self.disconnects[n - 1]

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def _take(self, request: ReceivedRequest) -> tuple[Reply, Future[None]]:
        with self._change():
            self.requests.append(request)
            if self._queue:
                self._last = self._queue.popleft()
            return self._last, self._gate

    def _run(self, listener: socket.socket) -> None:
        # Leaving the runner cancels the connections that are left.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen(listener))

    async def _listen(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._connected, sock=listener, backlog=BACKLOG)
        await self._stopped.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._change():
            self.connections_opened += 1
            self.open_connections += 1
        try:
            await _Connection(self, reader, writer).serve()
        except asyncio.CancelledError:
            pass  # the server stops; asyncio 3.11 would log it as an error
        finally:
            writer.transport.abort()
            with self._change():
                self.open_connections -= 1


@dataclass
class _Connection:
    """Reads requests while it replies: that is how it sees at once that the client left."""

    upstream: FakeUpstream
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    waiting: asyncio.Queue[tuple[Reply, Future[None]]] = field(default_factory=asyncio.Queue)
    unanswered: int = 0

    async def serve(self) -> None:
        self.writer.transport.set_write_buffer_limits(high=0)  # drain() then means: the kernel has it all
        self.option(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio's own does not reach this socket
        async with asyncio.TaskGroup() as tasks:
            answering = tasks.create_task(self.answer())
            await self.read()
            answering.cancel()

    async def read(self) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = await _read_request(self.reader)
                self.unanswered += 1
                self.waiting.put_nowait(self.upstream._take(request))
        if self.unanswered:
            with self.upstream._change():
                self.upstream.disconnects.append(time.monotonic())

    async def answer(self) -> None:
        with suppress(OSError):  # the connection is gone: the reader sees it too
            while True:
                reply, gate = await self.waiting.get()
                await self.send(reply, gate)
                self.unanswered -= 1
                if not reply.chunked:
                    self.writer.close()

    async def send(self, reply: Reply, gate: Future[None]) -> None:
        body = _Body(reply)
        await asyncio.sleep(reply.pause_before)
        await self.reach(-1, reply, gate)
        await self.write(_head(reply), reply.slice)
        await self.reach(0, reply, gate)
        for n, piece in enumerate(cycle(reply.pieces) if reply.repeat else reply.pieces, 1):
            if n > 1:
                await asyncio.sleep(reply.pause)  # even of 0: an endless reply must not starve the reader
            if isinstance(piece, str):
                with self.upstream._change():
                    self.upstream.pieces_sent += 1
            await self.write(body.piece(piece), reply.slice)
            await self.reach(n, reply, gate)
        await self.write(body.end(), reply.slice)

    async def reach(self, point: int, reply: Reply, gate: Future[None]) -> None:
        if point == reply.gate_after:
            await asyncio.shield(asyncio.wrap_future(gate))  # others wait at it too
        if point == reply.cut_after:
            self.cut()

    async def write(self, data: bytes, size: int | None) -> None:
        size = size or len(data) or 1
        for start in range(0, len(data), size):
            if start:
                await asyncio.sleep(0)  # between, not after: a client may leave once it has the last byte
            self.writer.write(data[start : start + size])
            await self.writer.drain()

    def cut(self) -> None:
        self.unanswered = 0  # the end is ours, not the client's
        linger = struct.pack("ii", 1, 0)  # on, for no time: closing then sends RST
        self.option(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()
        raise ConnectionAbortedError

    def option(self, level: int, name: int, value: int | bytes) -> None:
        self.writer.get_extra_info("socket").setsockopt(level, name, value)


class _Body:
    """A reply's body on its way to the wire: events, compressed or not, in chunks or not."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.zip = zlib.compressobj(wbits=31) if reply.gzip else None
        self.started = False

    def piece(self, piece: Piece) -> bytes:
        if isinstance(piece, bytes):
            return self.frame(piece)
        if isinstance(piece, dict):
            return self.frame(self.events(piece))
        # OpenAI names the role in a chunk of its own, ahead of the first text.
        role = [] if self.started else [_delta({"role": "assistant", "content": ""})]
        self.started = True
        return self.frame(self.events(*role, _delta({"content": piece})))

    def end(self) -> bytes:
        finish = [_delta({}, self.reply.finish_reason)] if self.reply.finish_reason else []
        usage = [_usage(*self.reply.usage)] if self.reply.usage else []
        done = self.event("[DONE]") if self.reply.done else b""
        return self.frame(self.events(*finish, *usage) + done, last=True)

    def events(self, *chunks: dict[str, Any]) -> bytes:
        return b"".join(self.event(json.dumps(chunk)) for chunk in chunks)

    def event(self, data: str) -> bytes:
        noise = [b": keep-alive", b"", b"event: message", b"id: 7"] if self.reply.comments else []
        return self.reply.newline.join([*noise, b"data: " + data.encode(), b"", b""])

    def frame(self, data: bytes, last: bool = False) -> bytes:
        if self.zip:
            data = self.zip.compress(data) + self.zip.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
        if not self.reply.chunked:
            return data
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""  # an empty chunk would end the body
        return chunk + b"0\r\n\r\n" if last else chunk


def _delta(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return CHUNK | {"choices": [choice]}


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return CHUNK | {"usage": usage}


def _head(reply: Reply) -> bytes:
    framing = {"transfer-encoding": "chunked"} if reply.chunked else {"connection": "close"}
    encoding = {"content-encoding": "gzip"} if reply.gzip else {}
    headers = {"content-type": "text/event-stream; charset=utf-8", **framing, **encoding, **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def _read_request(reader: asyncio.StreamReader) -> ReceivedRequest:
    head = await reader.readuntil(b"\r\n\r\n")
    line, *rest = head.decode("latin-1").rstrip().split("\r\n")
    method, path, _ = line.split(" ")
    pairs = (header.partition(":") for header in rest)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return ReceivedRequest(method, path, headers, body)

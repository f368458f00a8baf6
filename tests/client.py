"""A client that reads the wire with nothing of ours between: http.client, and a raw socket for leaving early."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}
CHAT = "/api/chat"
Frame = tuple[str, str]


def frames_of(text: str) -> list[Frame]:
    """The (event, data) of each frame; asserts the exact form ``event: NAME\\ndata: DATA\\n\\n``."""
    frames = []
    for block in text.split("\n\n")[:-1]:
        event, data = block.split("\n")
        assert event.startswith("event: ") and data.startswith("data: "), block
        frames.append((event[7:], data[6:]))
    return frames


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json", self.text
        return json.loads(self.text)

    @property
    def frames(self) -> list[Frame]:
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8", self.text
        return frames_of(self.text)

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.frames]

    @property
    def answer(self) -> str:
        """The tokens, joined."""
        return "".join(json.loads(data) for event, data in self.frames if event == "token")

    def data(self, event: str) -> Any:
        """The JSON of the one frame of this kind."""
        (data,) = [data for name, data in self.frames if name == event]
        return json.loads(data)


class Client:
    """Talks to a server on loopback. Headers given here are sent with every request."""

    def __init__(self, port: int, **headers: str) -> None:
        self.port = port
        self.headers = headers

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            sent = {name.replace("_", "-"): value for name, value in {**self.headers, **headers}.items()}
            connection.request(method, path, body or None, sent)
            response = connection.getresponse()
            text = response.read().decode()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, text)
        finally:
            connection.close()

    def chat(self, body: object = HELLO, *, path: str = CHAT, **headers: str) -> Answer:
        """POST /api/chat, read to the end. ``body`` is sent as it is if it is bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, raw, **{"Content_Type": "application/json", **headers})

    def usage(self, **headers: str) -> dict[str, Any]:
        return self.request("GET", "/api/usage", **headers).json

    def stream(self, body: object = HELLO, *, path: str = CHAT, **headers: str) -> RawStream:
        return RawStream(self.port, body, {**self.headers, **headers}, path=path)


class RawStream:
    """One request over a raw socket, read frame by frame; ``leave`` closes it like a closed tab."""

    def __init__(
        self, port: int, body: object = HELLO, headers: dict[str, str] | None = None, *, path: str = CHAT
    ) -> None:
        raw = json.dumps(body).encode()
        headers = {"Host": "localhost", **(headers or {})}
        lines = [
            f"POST {path} HTTP/1.1",
            "Content-Type: application/json",
            f"Content-Length: {len(raw)}",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
        self._file = self.socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        while self._file.readline().strip():
            pass
        self._text = ""

    def next(self) -> Frame:
        """The next frame. Raises EOFError at the end."""
        while "\n\n" not in self._text:
            size = int(self._file.readline().strip() or b"0", 16)
            if not size:
                raise EOFError
            self._text += self._file.read(size).decode()
            self._file.readline()
        block, self._text = self._text.split("\n\n", 1)
        return frames_of(block + "\n\n")[0]

    def until(self, event: str) -> Frame:
        """Read on to the next frame of this kind."""
        while (frame := self.next())[0] != event:
            pass
        return frame

    def rest(self) -> list[Frame]:
        frames = []
        while True:
            try:
                frames.append(self.next())
            except EOFError:
                return frames

    def leave(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> RawStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

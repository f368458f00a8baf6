"""A reader of the chat's wire that never minds what it gets: what came, when, and what it amounts to."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import cached_property
from typing import Any

from .client import HELLO, Frame

PATIENCE = 15.0  # seconds; no story takes as long


class Reader:
    """One request. ``read`` it once, to the end or until ``leave`` is called, from any thread."""

    def __init__(self, port: int, request: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        self.request = request
        self.sent_headers = {"Content-Type": "application/json", **headers, **request.get("headers", {})}
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.raw = b""
        self.left = False
        self.broke = ""
        self.arrivals: list[float] = []
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=request.get("patience", PATIENCE))
        self._connection.connect()
        self._socket = self._connection.sock

    def leave(self) -> None:
        self.left = True
        with suppress(OSError):  # it has left already
            self._socket.shutdown(socket.SHUT_RDWR)

    def read(self) -> None:
        body = self.request.get("body", HELLO)
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        timer = threading.Timer(self.request.get("leave_after", PATIENCE), self.leave)
        timer.start()
        self.arrivals.append(time.monotonic())
        try:
            with closing(self._connection):
                path = self.request.get("path", "/api/chat")
                self._connection.request(self.request.get("method", "POST"), path, raw, self.sent_headers)
                response = self._connection.getresponse()
                self.status = response.status
                self.headers = {name.lower(): value for name, value in response.getheaders()}
                while piece := response.read1():
                    self.raw += piece
                    self.arrivals.append(time.monotonic())
        except (OSError, http.client.HTTPException) as error:
            self.broke = "" if self.left else repr(error)
        timer.cancel()
        self.arrivals.append(time.monotonic())

    @property
    def seconds(self) -> float:
        return self.arrivals[-1] - self.arrivals[0]

    @property
    def silence(self) -> float:
        """The longest time in which nothing came."""
        return max(after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False))

    @cached_property
    def text(self) -> str:
        return self.raw.decode(errors="replace")

    @cached_property
    def frames(self) -> list[Frame]:
        """The (event, data) of each whole frame. What has not the exact form of one is none."""
        if self.status != 200:
            return []
        return re.findall(r"(?:\A|(?<=\n\n))event: (.*)\ndata: (.*)\n\n", self.text)

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.frames if event != "ping"]

    def joined(self, event: str) -> str:
        """The strings that all frames of a kind hold."""
        return "".join(json.loads(data) for name, data in self.frames if name == event)

    def data(self, event: str) -> dict[str, Any]:
        """The object in the frame of a kind; empty where there is none."""
        return next((json.loads(data) for name, data in self.frames if name == event), {})

    @property
    def error(self) -> dict[str, Any]:
        """The ``error`` frame, or the refusal."""
        if self.status == 200:
            return self.data("error")
        with suppress(ValueError):
            return json.loads(self.text)
        return {}


def heard_line_by_line(text: str) -> str | None:
    """The answer as many clients read it, by ``str.splitlines``; None where they break."""
    answer = event = ""
    for line in text.splitlines():
        if line.startswith("event: "):
            event = line[7:]
        elif line.startswith("data: ") and event == "token":
            try:
                answer += json.loads(line[6:])
            except ValueError:
                return None
    return answer

"""Server-Sent Events, the reading half: bytes as they arrive in, the data of whole events out. Pure.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import re
from typing import Final

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")


class EventDecoder:
    """Feed it bytes split anywhere. Lines end in CR, LF or CRLF, and in nothing else that Unicode calls a line end."""

    __slots__ = ("_after_cr", "_carry", "_data", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._after_cr = False  # a CR ended the last line; an LF now belongs to it
        self._carry = b""  # the start of a line
        self._data: list[bytes] = []  # the data lines of the event that has begun

    def feed(self, received: bytes) -> list[bytes]:
        """The data of each event that is now complete. Raises ValueError for an event above the limit in bytes."""
        if not received:
            return []
        if self._after_cr:
            received, self._after_cr = received.removeprefix(b"\n"), False
        text = self._carry + received if self._carry else received
        if self._data or b"\r" in text:
            events = self._feed_lines(text)
        else:
            events = self._feed_plain(text)
        if (self._carry or self._data) and len(self._carry) + sum(map(len, self._data)) > self.limit:
            raise ValueError("an event above the limit of size")
        return events

    def _feed_plain(self, text: bytes) -> list[bytes]:
        """What providers send: one data line an event, LF."""
        *blocks, self._carry = text.split(b"\n\n")
        events = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append(block[6:])
            else:
                events += self._feed_whole_lines([*block.split(b"\n"), b""])
        return events

    def _feed_lines(self, text: bytes) -> list[bytes]:
        self._after_cr = text.endswith(b"\r")
        *lines, self._carry = _LINE_END.split(text)
        return self._feed_whole_lines(lines)

    def _feed_whole_lines(self, lines: list[bytes]) -> list[bytes]:
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line == b"data":
                self._data.append(b"")
        return events

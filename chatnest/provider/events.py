"""Server-Sent Events, the reading half: bytes as they arrive in, the name and data of whole events out. Pure.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation, and two liberties with
it: the last event may lack its blank line, and a field named ``error`` is data of an event named so
(https://github.com/ggml-org/llama.cpp/pull/16109).
"""

from __future__ import annotations

import re
from typing import Final

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_BOM: Final = b"\xef\xbb\xbf"

Event = tuple[bytes, bytes]  # its name, empty for most, and its data


class EventDecoder:
    """Feed it bytes split anywhere. Lines end in CR, LF or CRLF, and in nothing else that Unicode calls a line end.

    ``too_large``: a line or the data of an event was above the limit in bytes; nothing after that is read.
    """

    __slots__ = ("_after_cr", "_begun", "_carry", "_data", "_limit", "_name", "_size", "too_large")

    def __init__(self, limit: int) -> None:
        self.too_large = False
        self._limit = limit
        self._begun = False
        self._after_cr = False  # a CR ended the last line; an LF now belongs to it
        self._carry = b""  # the start of a line
        self._name = b""
        self._data: list[bytes] = []  # the data lines of the event that has begun
        self._size = 0  # of these lines

    def feed(self, received: bytes) -> list[Event]:
        """The events that are now complete."""
        if self.too_large or not received:
            return []
        if self._is_one_event(received):
            return [(b"", received[6:-2])]
        if self._after_cr:
            received, self._after_cr = received.removeprefix(b"\n"), False
        text = self._carry + received if self._carry else received
        if not self._begun:
            if len(text) < len(_BOM) and _BOM.startswith(text):
                self._carry = text
                return []
            text, self._begun = text.removeprefix(_BOM), True
        if self._data or self._name or b"\r" in text or len(text) > self._limit:
            events = self._feed_lines(text)
        else:
            events = self._feed_plain(text)
        self.too_large |= len(self._carry) > self._limit
        return events

    def _is_one_event(self, received: bytes) -> bool:
        """A token that came alone, as most do."""
        return (
            self._begun
            and not (self._carry or self._data or self._name or self._after_cr)
            and received.startswith(b"data: ")
            and received.endswith(b"\n\n")
            and received.find(b"\n") == len(received) - 2 < self._limit
            and b"\r" not in received
        )

    def end(self) -> list[Event]:
        """The last event, where the bytes end without its blank line."""
        text, self._carry = self._carry, b""
        return self._feed_whole_lines([*_LINE_END.split(text), b""])

    def _feed_plain(self, text: bytes) -> list[Event]:
        """What providers send: one data line an event, LF."""
        end = text.rfind(b"\n\n")
        lines = text[6:end].split(b"\n\ndata: ") if end > 0 and text.startswith(b"data: ") else []
        if lines and text.count(b"\n", 0, end) == 2 * (len(lines) - 1):
            self._carry = text[end + 2 :]
            return [(b"", line) for line in lines]
        *blocks, self._carry = text.split(b"\n\n")
        events: list[Event] = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append((b"", block[6:]))
            else:
                events += self._feed_whole_lines([*block.split(b"\n"), b""])
        return events

    def _feed_lines(self, text: bytes) -> list[Event]:
        self._after_cr = text.endswith(b"\r")
        *lines, self._carry = _LINE_END.split(text)
        return self._feed_whole_lines(lines)

    def _feed_whole_lines(self, lines: list[bytes]) -> list[Event]:
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append((self._name, b"\n".join(self._data)))
                self._name, self._data, self._size = b"", [], 0
                continue
            field, _, value = line.partition(b":")
            if field in (b"data", b"error"):
                self._data.append(value.removeprefix(b" "))
                self._size += len(line)
            if field in (b"event", b"error"):
                self._name = value.strip() if field == b"event" else field
            if max(len(line), self._size) > self._limit:
                self.too_large = True
                break
        return events

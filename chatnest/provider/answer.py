"""What a provider says, read: bytes in; text, reasoning, finish reason, usage and error out. Pure.

Lenient where everybody is, and strict where money is: an error is an error in whatever form it comes, and usage
counts wherever it is put.
"""

from __future__ import annotations

from typing import Final, Literal

from .chunks import Choice, Chunk, Piece, Report, Usage, decode, loose, loose_usage
from .events import Event, EventDecoder

MAX_EVENT_BYTES: Final = 2 * 1024 * 1024
MAX_STRANGE_BYTES: Final = 64 * 1024  # of a body that is no event stream: for its usage, and for the log

FinishReason = Literal["stop", "length", "content_filter"]

# As the wire names them; what is not here ended as the model meant it to.
_FINISH_REASONS: Final[dict[str, FinishReason]] = {
    "length": "length",
    "max_tokens": "length",  # Gemini's and Anthropic's, through gateways
    "max_output_tokens": "length",
    "model_length": "length",  # Mistral
    "model_context_window_exceeded": "length",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "sensitive": "content_filter",  # Zhipu
    "recitation": "content_filter",
    "prohibited_content": "content_filter",
    "blocklist": "content_filter",
}
_FAILURES: Final = frozenset(
    {
        "error",  # OpenRouter, Mistral
        "abort",  # vLLM, SGLang
        "aborted",
        "cancelled",
        "canceled",
        "failed",
        "timeout",
        "network_error",  # Zhipu
        "insufficient_system_resource",  # DeepSeek: https://api-docs.deepseek.com/api/create-chat-completion
        "engine_error",
        "malformed_function_call",
    }
)


class Answer:
    """``feed`` it a body split anywhere, then ``end`` it. What it gives is the same for every split.

    ``finish_reason``: ``stop``, ``length`` or ``content_filter``, once the model gave one.
    ``report``: the largest of each field that was reported; ``report_is_whole`` unless output followed it.
    ``error``: what the provider said where it failed: read on for its usage, but nothing is an answer any more.
    ``done``: no more is read. ``ended``: it was not cut before the provider had said all.
    ``heard``: how often the model gave a sign of life.
    """

    __slots__ = (
        "_carry",
        "_events",
        "_last_text_was_finished",
        "_silent",
        "_strange",
        "_text_was_unfinished",
        "done",
        "ended",
        "error",
        "finish_reason",
        "heard",
        "report",
        "report_is_whole",
    )

    def __init__(self) -> None:
        self._events = EventDecoder(limit=MAX_EVENT_BYTES)
        self._carry = ""  # half of a surrogate pair, whose other half the next piece brings
        self._strange: bytearray | None = bytearray()  # all that came, until the first event
        self._silent = True  # nothing was said yet
        self._last_text_was_finished = False  # it came in one chunk with a finish reason
        self._text_was_unfinished = False  # some did not
        self.heard = 0
        self.done = self.ended = False
        self.error: object = None
        self.finish_reason: FinishReason | None = None
        self.report: Report | None = None
        self.report_is_whole = True

    def feed(self, received: bytes) -> list[Piece]:
        """The pieces that ``received`` completes."""
        if self.done:
            return []
        if self._strange is not None:
            self._strange += received[: MAX_STRANGE_BYTES - len(self._strange)]
        return self._take(self._events.feed(received))

    def end(self, *, cut: bool = False) -> list[Piece]:
        """The body is over, or was ``cut``: the last pieces. An answer that had not come to its end has failed."""
        if self.done:
            return []
        pieces = [] if cut else self._take(self._events.end())
        self.ended = self.ended or not cut or self._is_whole(cut)
        if not self.done and self.error is None and not self._is_whole(cut):
            self._fail(self._not_a_stream() or ("the connection was cut" if cut else "it ended before its end"))
        self.done = True
        return pieces

    @property
    def may_end(self) -> bool:
        """Nothing is missing but ``[DONE]``, and perhaps usage."""
        return self.finish_reason is not None and not self._repeats

    @property
    def _repeats(self) -> bool:
        """So far every chunk has said that it was the last: it tells nothing."""
        return self._last_text_was_finished and not self._text_was_unfinished

    def _is_whole(self, cut: bool) -> bool:
        if self.finish_reason is None:
            return False
        return not (cut and self._repeats) or self.report is not None

    def _not_a_stream(self) -> object:
        """What came instead of events. Usage in it is a report all the same."""
        body = loose(bytes(self._strange or b""))
        if isinstance(body, dict):
            self._report(loose_usage(body.get("usage")))
        return body

    def _fail(self, error: object) -> None:
        if self.error is None:
            self.error = error

    def _take(self, events: list[Event]) -> list[Piece]:
        pieces: list[Piece] = []
        for name, data in events:
            if not name and data[:1] == b"{":  # nearly all of them
                for chunk in decode(data):
                    self._take_chunk(chunk, pieces)
            elif name == b"error":
                self._fail(loose(data))
            elif name and name != b"message" and not data.startswith(b"{"):
                pass  # a heartbeat with a name
            elif data[:6] == b"[DONE]" or data.strip() == b"[DONE]":
                self.done = self.ended = True
                break
            else:
                for chunk in decode(data):
                    self._take_chunk(chunk, pieces)
        if events:
            self._strange = None
        if self._events.too_large and not self.done:
            self._fail("an event above the limit of size")
            self.done = True
        return pieces

    def _take_chunk(self, chunk: Chunk, pieces: list[Piece]) -> None:
        if chunk.error:
            self._fail(chunk.error)
        for choice in chunk.choices or ():
            self._take_choice(choice, pieces)
        if chunk.usage:
            self._report(chunk.usage)
        if chunk.x_groq:
            self._report(chunk.x_groq.usage)

    def _take_choice(self, choice: Choice, pieces: list[Piece]) -> None:
        self.heard += 1
        said = choice.pieces(first=self._silent)
        if choice.lenient or self._carry:
            said = self._mended(said)
        if said:
            self._silent = False
            self.report_is_whole = self.report is None
            self._last_text_was_finished = choice.finish_reason is not None
            self._text_was_unfinished |= choice.finish_reason is None
            if self.error is None:
                pieces += said
        if choice.finish_reason:
            reason = choice.finish_reason.lower()
            if reason in _FAILURES:
                self._fail(f"finish reason {reason}")
            self.finish_reason = _FINISH_REASONS.get(reason, "stop")
        if choice.usage:
            self._report(choice.usage)

    def _report(self, usage: Usage | None) -> None:
        if usage and usage.says_something:
            self.report, self.report_is_whole = usage.merged(self.report or Report()), True

    def _mended(self, said: list[Piece]) -> list[Piece]:
        """Halves of surrogate pairs are joined; one that stays alone is U+FFFD."""
        mended = []
        for kind, text in said:
            text = self._carry + text
            self._carry = text[-1] if "\ud800" <= text[-1:] <= "\udbff" else ""
            text = (
                text[: len(text) - len(self._carry)].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            )
            if text:
                mended.append((kind, text))
        return mended

"""What a provider says, read: every form in which answers, errors and usage come, split anywhere. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatnest.provider import answer as room
from chatnest.provider.answer import Answer
from chatnest.provider.chunks import Kind, Piece, Report
from chatnest.provider.events import Event, EventDecoder

from .test_imports import PACKAGE, imported

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reading:
    """All that is known of an answer at its end."""

    pieces: list[Piece]
    error: str | None
    finish_reason: str | None
    report: Report | None
    report_is_whole: bool
    ended: bool
    heard: int

    def of(self, kind: Kind) -> str:
        return "".join(text for its_kind, text in self.pieces if its_kind is kind)

    @property
    def text(self) -> str:
        return self.of(Kind.TEXT)

    @property
    def used(self) -> tuple[int, int, int]:
        report = self.report or Report()
        return report.prompt_tokens, report.completion_tokens, report.total_tokens


def read(*body: bytes, cut: bool = False) -> Reading:
    """``body`` as it arrives, read to its end."""
    answer = Answer()
    pieces = [piece for received in body for piece in answer.feed(received)]
    pieces += answer.end(cut=cut)
    assert answer.done
    joined = [(kind, "".join(text for _, text in same)) for kind, same in groupby(pieces, itemgetter(0))]
    error = None if answer.error is None else str(answer.error)
    return Reading(
        joined, error, answer.finish_reason, answer.report, answer.report_is_whole, answer.ended, answer.heard
    )


def event(data: Any) -> bytes:
    """One event, in raw UTF-8 where that can be."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n\n"


def delta(_finish_reason: str | None = None, _index: int = 0, **fields: Any) -> bytes:
    return event({"id": "c1", "choices": [{"index": _index, "delta": fields, "finish_reason": _finish_reason}]})


def said(content: Any, **beside: Any) -> bytes:
    return event({"id": "c1", "choices": [{"index": 0, "delta": {"content": content}}], **beside})


def finished(reason: str = "stop") -> bytes:
    return delta(_finish_reason=reason)


def used(prompt: Any, completion: Any, **more: Any) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}})


ENDED = (finished(), used(9, 2), DONE)


# The event stream.


def interpreted(stream: bytes) -> list[Event]:
    """The whole text at once, as the specification says, the last event without its blank line too.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    events, name, data = [], b"", []
    for line in [*lines, b""]:
        field, _, value = line.partition(b":")
        if not line:
            events += [(name, b"\n".join(data))] if data else []
            name, data = b"", []
        elif field == b"event":
            name = value.strip()
        elif field in (b"data", b"error"):
            data.append(value.removeprefix(b" "))
            name = name if field == b"data" else b"error"
    return events


LINES = (
    b"data: x|data:x|data|data:|data:  y|datax: 1|: c|event: e|event:error|error: {}|id|retry: 7||\xef\xbb\xbf"
    b"| data: z|data: \xff|data: \xc2\x85\xe2\x80\xa8"
).split(b"|")


@given(
    parts=st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=30),
    tail=st.sampled_from(LINES),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
@example(parts=[(b"data: x", b"\r"), (b"", b"\n")], tail=b"", cuts=[8])
@example(parts=[(b"data: x", b"\r\n"), (b"", b"\r\n"), (b"data: x", b"\n"), (b"", b"\n")], tail=b"", cuts=[8, 9, 10])
@example(parts=[(b"data: x", b"\r\n"), (b"", b"\r"), (b"", b"\r")], tail=b"data", cuts=[8, 9, 10])
@example(parts=[(b"data: x", b"\n"), (b"data", b"\r\n")], tail=b"data: y", cuts=[13, 13])
@example(parts=[(b"\xef\xbb\xbfdata: x", b"\n"), (b"", b"\n")], tail=b"", cuts=[1, 2, 4])
def test_events_are_what_the_specification_says_wherever_the_stream_is_cut(
    parts: list[tuple[bytes, bytes]], tail: bytes, cuts: list[int]
) -> None:
    stream = b"".join(line + end for line, end in parts) + tail
    decoder = EventDecoder(limit=10_000)
    events = [one for received in split(stream, cuts) for one in decoder.feed(received)] + decoder.end()
    assert events == interpreted(stream)


def split(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize(
    "more",
    [b"data: 0123456789\n" * 7, b"data: " + b"x" * 100, b": " + b"x" * 100, b"event: " + b"x" * 100, b"data\n" * 30],
    ids=lambda more: repr(more[:20]),
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_event_above_the_limit_is_not_waited_for(more: bytes, size: int) -> None:
    decoder = EventDecoder(limit=100)
    stream = b"data: 0123456789\n\n" * 50 + more + b"\n\ndata: more\n\n"
    events = []
    for start in range(0, len(stream), size):
        events += decoder.feed(stream[start : start + size])
    assert events == [(b"", b"0123456789")] * 50
    assert decoder.too_large


def test_what_is_too_large_breaks_the_answer_after_what_came_before() -> None:
    for body in ([said("Hi") + b"data: " + b"x" * 3_000_000], [said("Hi"), b"data: " + b"x" * 3_000_000, b"\n\n"]):
        answer = read(*body)
        assert (answer.text, answer.error, answer.ended) == ("Hi", "an event above the limit of size", False)


# Answers.

WORD = {"type": "text", "text": "Hi"}


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("Hello", [said("Hel"), said("lo")]),
        ("Hello", [delta(role="assistant", content=""), delta(content=None), said("Hello")]),
        ("I cannot help with that.", [delta(refusal="I cannot "), delta(refusal="help with that.")]),
        ("Hello", [said([WORD | {"text": "Hel"}]), said([WORD | {"text": "l"}, WORD | {"text": "o"}])]),
        ("Hello", [said(["Hel", "lo"]), said({"type": "text", "text": ""})]),
        ("Hello", [said([{"type": "thinking", "thinking": [WORD]}]), said([WORD | {"text": "Hello"}])]),
        ("Hello", [event({"choices": [{"message": {"content": "Hello"}}]})]),  # a stream in name only
        ("Hello", [event({"choices": [{"delta": {"content": "Hello"}, "message": {"content": "Hello"}}]})]),
        ("Hello", [said("Hel"), b"data:\n\n", b"data: \n\n", b": ping\n\n", b"event: ping\n\n", b"\n\n", said("lo")]),
        ("Hello", [said("Hel"), b"event: message\nid: 7\nretry: 10\n", said("lo")]),
        ("Hello", [b"\xef\xbb\xbf", said("Hello")]),
        ("Hel\ufffdlo", [b'data: {"choices": [{"delta": {"content": "Hel\xfflo"}}]}\n\n']),
        ("Hello", [said("Hello", logprobs=[-float("inf"), float("nan")])]),
        ("Hello", [said("Hel")[:-1], said("lo")]),  # no blank line between them
        ("Hello", [b'data: {"choices": [\ndata: {"delta": {"content": "Hello"}}]}\n\n']),  # one chunk in two lines
        ("é\u2028\u2029\x85\x0b\x1c你", [said("é\u2028\u2029\x85\x0b\x1c你")]),
        ("", [delta(role="assistant")]),
        ("0123456789abcdef" * 65_536, [said("0123456789abcdef" * 65_536)]),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_an_answer_in_any_form_is_an_answer(text: str, body: list[bytes], newline: bytes) -> None:
    answer = read(*(part.replace(b"\n", newline) for part in [*body, *ENDED]))
    assert (answer.text, answer.error, answer.finish_reason, answer.ended) == (text, None, "stop", True)
    assert answer.used == (9, 2, 11)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["\ud83d", "\ude00"], "😀"),
        (["a\ud83d", "\ude00b"], "a😀b"),
        (["\ud83d", "\ude00\ud83d", "\ude01"], "😀😁"),
        (["\ud83d", "x"], "\ufffdx"),
        (["\ude00"], "\ufffd"),
        (["x", "\ud83d"], "x"),
        (["\ud83d", "", "\ude00"], "😀"),
    ],
    ids=ascii,
)
def test_an_emoji_cut_in_two_by_the_model_is_put_together(pieces: list[str], text: str) -> None:
    assert read(*map(said, pieces), *ENDED).text == text


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "hm, so"},  # DeepSeek, llama.cpp
        {"reasoning": "hm, so"},  # OpenRouter, Groq, vLLM
        {"reasoning": "hm, so", "reasoning_details": [{"type": "reasoning.text", "text": "hm, so"}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm, so"}]},
        {"reasoning": {"text": "hm, so"}},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm, so"}]}]},  # Mistral
        {"content": [{"type": "reasoning", "text": "hm, "}, {"type": "redacted_thinking", "thinking": "so"}]},
        {"content": "", "reasoning_content": "hm, so", "refusal": None},
    ],
    ids=str,
)
def test_thoughts_are_no_answer_and_are_heard(fields: dict[str, Any]) -> None:
    answer = read(delta(**fields), said("42"), *ENDED)
    assert (answer.of(Kind.REASONING), answer.text) == ("hm, so", "42")
    assert answer.heard == 3


def test_thoughts_come_before_the_words_of_their_chunk() -> None:
    answer = read(delta(content="42", reasoning="hm", refusal="no", tool_calls=[{"function": {"name": "f"}}]), *ENDED)
    assert answer.pieces == [(Kind.REASONING, "hm"), (Kind.TEXT, "42no"), (Kind.OTHER, "f")]


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [{"index": 0, "id": "t", "function": {"name": "find", "arguments": '{"a":1}'}}]},
        {"tool_calls": [{"function": {"name": "find"}}, {"function": {"arguments": '{"a":1}'}}]},
        {"function_call": {"name": "find", "arguments": '{"a":1}'}},
        {"tool_calls": [{"name": "find", "arguments": '{"a":1}'}]},
        {"tool_calls": [None, 7, {"function": {"name": "find", "arguments": '{"a":1}'}}]},
    ],
    ids=str,
)
def test_calls_of_tools_are_billed_and_so_are_counted(fields: dict[str, Any]) -> None:
    answer = read(delta(**fields), *ENDED)
    assert answer.pieces == [(Kind.OTHER, 'find{"a":1}')]


def test_an_answer_beside_the_one_that_was_asked_for_is_only_counted() -> None:
    answer = read(said("Hi"), delta(_index=1, content="Ho"), delta(_index=1, reasoning="hm"), *ENDED)
    assert answer.pieces == [(Kind.TEXT, "Hi"), (Kind.OTHER, "Hohm")]


SILENT = [
    {},
    {"choices": []},
    {"choices": None},
    {"choices": {}},
    {"choices": 7},
    {"choices": "text"},
    {"error": None, "usage": None, "service_tier": "default", "x_groq": {"id": "r"}},
    {"error": {}},
    {"usage": "many"},
    {"usage": [1, 2]},
    {"usage": {"prompt_tokens": None}},
    {"type": "ping"},
    None,
    0,
    [],
    *(
        {"choices": [choice]}
        for choice in [
            {},
            None,
            7,
            {"delta": None},
            {"delta": {}},
            {"delta": "x"},
            {"text": "x"},
            {"delta": {"role": "assistant"}},
            {"delta": {"content": None}},
            {"delta": {"content": ""}},
            {"delta": {"content": 7}},
            {"delta": {"content": [None, 7, {"type": "image", "url": "x"}]}},
            {"delta": {"reasoning_content": None, "refusal": None, "tool_calls": None, "function_call": None}},
            {"delta": {"reasoning_content": 7, "tool_calls": "x"}},
            {"delta": {}, "finish_reason": 7},
            {"delta": {}, "finish_reason": ""},
        ]
    ),
]


@pytest.mark.parametrize("chunk", SILENT, ids=str)
def test_what_says_nothing_is_passed_over(chunk: Any) -> None:
    answer = read(said("Hel"), event(chunk), said("lo"), *ENDED)
    assert (answer.text, answer.error, answer.used) == ("Hello", None, (9, 2, 11))


# Ends.


@pytest.mark.parametrize(
    ("finish_reason", "reasons"),
    [
        ("stop", ["stop", "eos", "STOP", "end_turn", "tool_calls", "whatever comes next"]),
        ("length", ["length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens"]),
        ("content_filter", ["content_filter", "SAFETY", "sensitive", "recitation"]),
    ],
)
def test_why_it_ended_is_told_in_three_words(finish_reason: str, reasons: list[str]) -> None:
    for reason in reasons:
        answer = read(said("Hi"), finished(reason), DONE)
        assert (answer.finish_reason, answer.error) == (finish_reason, None)


@pytest.mark.parametrize(
    "reason",
    ["error", "abort", "cancelled", "timeout", "network_error", "insufficient_system_resource", "ERROR"],
)
def test_a_failing_finish_reason_is_an_error_and_its_usage_is_heard(reason: str) -> None:
    answer = read(said("The three reasons are: first,"), finished(reason), used(9, 6), DONE)
    assert answer.error == f"finish reason {reason.lower()}"
    assert answer.used == (9, 6, 15)


def test_nothing_is_read_after_done() -> None:
    for end in (DONE, b"data:[DONE]\n\n", b"data:  [DONE] \n\n", b"data: [DONE]\r\n\r\n"):
        answer = read(said("Hi"), end + said("more") + b"garbage\n\n", event({"error": "late"}), b"data: {")
        assert (answer.text, answer.error, answer.ended) == ("Hi", None, True)


def test_done_on_a_line_of_the_last_event_is_no_error() -> None:
    """No blank line anywhere: to the letter of the specification, all is one event."""
    answer = read(b"".join(part.replace(b"\n\n", b"\n") for part in (said("Hi"), *ENDED)))
    assert (answer.text, answer.error, answer.used) == ("Hi", None, (9, 2, 11))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ([said("Hi"), finished(), used(9, 2)], None),  # without [DONE]
        ([said("Hi"), finished(), used(9, 2)[:-1]], None),
        ([said("Hi"), finished(), used(9, 2)[:-2]], None),
        ([said("Hi"), finished()], None),
        ([said("Hi"), delta("stop", content=" there")], None),
        ([delta("stop", content="Hi")], None),
        ([said("Hi")], "it ended before its end"),
        ([said("Hi"), used(9, 2)], "it ended before its end"),
        ([], "it ended before its end"),
        ([b": ping\n\n"] * 10, ": ping"),
        ([said("Hi"), b"data: [DONE"], "[DONE"),
        ([said("Hi"), b'data: {"choi'], '{"choi'),
    ],
    ids=lambda value: repr(value)[-60:],
)
def test_a_body_that_ends_is_whole_if_the_model_had_finished(body: list[bytes], error: str | None) -> None:
    answer = read(*body)
    assert answer.ended
    assert answer.error == error or (error and str(answer.error).startswith(error))


@pytest.mark.parametrize(
    ("body", "is_whole"),
    [
        ([said("Hi"), finished()], True),
        ([said("Hi"), delta("stop", content=" there")], True),
        ([said("Hi"), finished(), used(9, 2)], True),
        ([delta("stop", content="one "), used(9, 2)], True),
        ([said("Hi")], False),
        ([said("Hi"), finished()[:-1]], False),  # the last line may be half of one
        # Each chunk calls itself the last, and one of them is.
        ([delta("stop", content="one ")], False),
        ([delta("stop", content="one "), delta("stop", content="two ")], False),
    ],
    ids=lambda value: repr(value)[-60:],
)
def test_a_connection_that_breaks_leaves_a_whole_answer_only_if_that_is_certain(
    body: list[bytes], is_whole: bool
) -> None:
    answer = read(*body, cut=True)
    assert answer.ended is is_whole
    assert answer.error == (None if is_whole else "the connection was cut")


def test_it_may_end_once_nothing_but_done_is_missing() -> None:
    answer = Answer()
    answer.feed(said("Hi"))
    assert not answer.may_end
    answer.feed(finished())
    assert answer.may_end
    every_chunk = Answer()
    every_chunk.feed(delta("stop", content="Hi"))
    assert not every_chunk.may_end


# Errors.

WORDS = "context shift is disabled"
ERRORS = [
    event({"error": {"message": WORDS, "code": 500}}),
    event({"error": WORDS}),
    event({"error": [WORDS]}),
    event({"id": "c1", "choices": [], "error": {"message": WORDS}}),
    event({"id": "c1", "choices": [{"delta": {"content": "x"}}], "error": {"message": WORDS}}),
    event({"object": "error", "message": WORDS, "code": 400}),
    event({"type": "error", "error": {"message": WORDS}}),
    event({"type": "error", "message": WORDS}),
    event({"code": "DataInspectionFailed", "message": WORDS}),
    event({"detail": WORDS}),
    event({"msg": WORDS, "code": 1301}),
    event(WORDS),
    event([WORDS]),
    b"data: " + WORDS.encode() + b"\n\n",
    b"error: " + json.dumps({"code": 500, "message": WORDS}).encode() + b"\n\n",
    b"event: error\n" + event({"message": WORDS}),
    b"event:error\nid: 3\n" + event({"choices": [], "note": WORDS}),
    b"event: error\ndata: " + WORDS.encode() + b"\n\n",
    b"event: error\ndata: " + WORDS.encode(),
    b'data: {"error": {"message": "' + WORDS.encode() + b'\xff"}}\n\n',
    b'data: {"choices": [{"delta": {"content": "context shift is disabled\n\n',  # half a chunk
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize(
    "after", [b"", DONE, said("no more") + finished() + used(9, 6) + DONE], ids=["end", "done", "more"]
)
def test_an_error_in_any_form_is_an_error(error: bytes, after: bytes) -> None:
    if after and not error.endswith(b"\n\n"):
        error += b"\n\n"
    answer = read(said("The answer is"), error, after)
    assert WORDS in str(answer.error)
    assert answer.text == "The answer is", "nothing of what follows is an answer"
    assert answer.used == ((9, 6, 15) if b"usage" in after else (0, 0, 0)), "its usage is"


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"error": {"message": WORDS}}).encode(),
        json.dumps({"error": {"message": WORDS}}, indent=2).encode(),
        f"<html>\n<title>502 {WORDS}</title></html>".encode(),
        WORDS.encode() + b"\xff" * 100_000,
        json.dumps({"choices": [{"message": {"content": WORDS}}]}).encode(),
    ],
    ids=lambda body: repr(body[:40]),
)
@pytest.mark.parametrize("cut", [False, True])
def test_what_is_no_stream_is_an_error_with_its_words(body: bytes, cut: bool) -> None:
    answer = read(*split(body, range(0, 1000, 7)), cut=cut)
    assert WORDS in str(answer.error)
    assert len(str(answer.error)) <= room.MAX_STRANGE_BYTES
    assert (answer.pieces, answer.finish_reason, answer.ended) == ([], None, not cut)


def test_usage_in_what_is_no_stream_is_a_report() -> None:
    body = {"choices": [{"message": {"content": "whole"}}], "usage": {"prompt_tokens": 9, "completion_tokens": 40}}
    answer = read(json.dumps(body).encode())
    assert answer.error
    assert answer.used == (9, 40, 49)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
@pytest.mark.parametrize(
    "chunk",
    [
        b"%b",
        b'{"choices": %b',
        b'{"choices": [{"delta": {"content": %b}}]}',
        b'{"choices": [{"delta": {"content": [{"type": %b}]}}]}',
        b'{"choices": [{"delta": {"reasoning_details": [%b]}}]}',
        b'{"choices": [{"delta": {"tool_calls": [{"function": {"arguments": %b}}]}}]}',
        b'{"choices": [{"delta": {"function_call": %b}}]}',
        b'{"choices": [], "usage": {"prompt_tokens": %b}}',
    ],
    ids=repr,
)
def test_what_is_nested_too_deeply_is_not_followed(chunk: bytes, depth: int) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"text":', b"}")):
        answer = read(said("Hi"), b"data: " + chunk % (opening * depth + b'"x"' + closing * depth) + b"\n\n")
        assert answer.text == "Hi"
        assert answer.error


# Usage.


def beside(tokens: dict[str, Any]) -> bytes:
    return event({"choices": [], "usage": tokens})


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([used(9, 5, total_tokens=14)], (9, 5, 14)),
        ([used(9, 5)], (9, 5, 14)),
        ([beside({"total_tokens": 14})], (0, 0, 14)),
        ([used(9, 5, total_tokens=90)], (9, 5, 90)),  # reasoning that is counted in the total alone
        ([used(900, 40, total_tokens=40)], (900, 40, 940)),  # a total below its parts
        ([used(300, 10, total_tokens=2)], (300, 10, 310)),
        ([used(0, 40)], (0, 40, 40)),
        ([beside({"input_tokens": 9, "output_tokens": 5})], (9, 5, 14)),
        ([used("9", 5.0)], (9, 5, 14)),
        ([used(8.2, "4.5")], (9, 5, 14)),
        # In the choice, in x_groq, in a chunk with text, in the first chunk, without choices.
        ([event({"choices": [{"usage": {"prompt_tokens": 900, "completion_tokens": 40}}]})], (900, 40, 940)),
        ([event({"choices": [], "x_groq": {"usage": {"prompt_tokens": 9, "completion_tokens": 5}}})], (9, 5, 14)),
        ([said("x", usage={"prompt_tokens": 9, "completion_tokens": 5})], (9, 5, 14)),
        ([event({"usage": {"prompt_tokens": 9, "completion_tokens": 5}})], (9, 5, 14)),
        # In two halves, and more with each chunk.
        ([used(900, 1, total_tokens=901), said("x"), used(0, 40, total_tokens=40)], (900, 40, 940)),
        ([beside({"prompt_tokens": 900}), beside({"completion_tokens": 40})], (900, 40, 940)),
        ([used(9, 1), used(9, 2), used(9, 5)], (9, 5, 14)),
        ([used(9, 5), event({"choices": [], "usage": None}), beside({})], (9, 5, 14)),
        ([used(9, 5), used(0, 0, total_tokens=0)], (9, 5, 14)),
        # What cannot be true is not believed, and the rest is.
        ([used(-5, 5, total_tokens=1)], (0, 5, 5)),
        ([used(9, -5)], (9, 0, 9)),
        ([used(10**30, 5)], (0, 5, 5)),
        ([used(2**63, 2**62)], (0, 0, 0)),
        ([used(float("nan"), float("inf"))], (0, 0, 0)),
        ([used("many", [5])], (0, 0, 0)),
        ([beside({"usage": 7})], (0, 0, 0)),
    ],
    ids=lambda value: repr(value)[:70],
)  # fmt: skip
def test_usage_counts_wherever_it_is_put(reports: list[bytes], expected: tuple[int, int, int]) -> None:
    for body in ([said("Hi"), *reports, finished(), DONE], [*reports, said("Hi"), finished()]):
        answer = read(*body)
        assert answer.used == expected
        assert (answer.report is None) == (expected == (0, 0, 0))


def test_a_report_that_output_followed_is_a_floor() -> None:
    so_far = [said(word, usage={"prompt_tokens": 9, "completion_tokens": n}) for n, word in enumerate("abc", 1)]
    assert read(*so_far, finished(), DONE).report_is_whole
    assert read(used(9, 1), finished(), DONE).report_is_whole
    for more in (said("x"), delta(reasoning="x"), delta(tool_calls=[{"function": {"arguments": "x"}}])):
        assert not read(*so_far, more, finished(), DONE).report_is_whole
    assert read(used(9, 1), said("x"), used(9, 2), DONE).report_is_whole


def test_what_is_known_of_the_tokens_is_kept() -> None:
    details = {"completion_tokens_details": {"reasoning_tokens": 4}, "prompt_tokens_details": {"cached_tokens": 8}}
    for report in (used(9, 5, **details), used("9", 5, **details)):
        answer = read(said("Hi"), report, used(9, 5), DONE)
        assert answer.report == Report(
            prompt_tokens=9, completion_tokens=5, total_tokens=14, reasoning_tokens=4, cached_tokens=8
        )


# Anything at all.

TEXTS = st.text(st.characters() | st.sampled_from('\ud83d\ude00\ud800\n\r\x85\u2028"\\'), max_size=12)
COUNTS = st.none() | st.integers(-3, 2000) | st.sampled_from([10**30, 1.5, "7", "x", float("nan"), []])
USAGES = (
    st.dictionaries(
        st.sampled_from(["prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens"]), COUNTS
    )
    | st.none()
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "thinking", "x"])}, optional={"text": TEXTS})
CONTENTS = TEXTS | st.lists(TEXTS | PARTS, max_size=3) | PARTS | st.none() | st.integers()
CALLS = st.fixed_dictionaries({}, optional={"function": st.fixed_dictionaries({"name": TEXTS, "arguments": TEXTS})})
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"),
        "content": CONTENTS,
        "reasoning_content": CONTENTS,
        "reasoning": CONTENTS,
        "reasoning_details": st.lists(PARTS, max_size=2),
        "refusal": TEXTS,
        "tool_calls": st.lists(CALLS, max_size=2),
        "function_call": CALLS,
    },
)
REASONS = st.sampled_from([None, "stop", "length", "content_filter", "error", "SAFETY", "", 7])
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "index": st.integers(0, 1),
        "delta": DELTAS,
        "message": DELTAS,
        "finish_reason": REASONS,
        "usage": USAGES,
    },
)
CHUNKS = st.fixed_dictionaries(
    {"id": st.just("c1"), "choices": st.lists(CHOICES, max_size=2)},
    optional={"usage": USAGES, "x_groq": st.fixed_dictionaries({"usage": USAGES}), "error": st.none() | TEXTS},
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Whole bodies as providers, gateways and proxies write them, and worse."""
    newline = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    chunks = draw(st.lists(CHUNKS | st.sampled_from(SILENT), max_size=6))
    events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    events += [event(chunk) for chunk in draw(st.lists(CHUNKS, max_size=3))]
    events += draw(st.lists(st.sampled_from([*ERRORS, *map(event, SILENT)]), max_size=2))
    events += draw(
        st.lists(st.sampled_from([b": ping\n\n", b"data:\n\n", b"id: 7\n", b"\n", b"data: [DO"]), max_size=3)
    )
    events += draw(st.lists(st.binary(max_size=12), max_size=2))
    events += draw(st.lists(st.sampled_from([DONE, finished(), used(9, 2)]), max_size=3))
    body = b"".join(part.replace(b"\n", newline) for part in draw(st.permutations(events)))
    missing = draw(st.integers(0, 3))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + body[: len(body) - missing]


@given(body=streams(), cuts=st.lists(st.integers(0, 2000), max_size=12), cut=st.booleans())
@example(body=b"data: [DONE]\r\n\r\n" + said("x"), cuts=[13, 14, 15], cut=False)
@example(body=said("\ud83d") + said("\ude00") + finished(), cuts=[70], cut=True)
def test_any_split_of_any_body_gives_the_same_reading(body: bytes, cuts: list[int], cut: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "MAX_EVENT_BYTES", 250)  # so that some are above it
        patch.setattr(room, "MAX_STRANGE_BYTES", 40)
        whole = read(body, cut=cut)
        assert read(*split(body, cuts), cut=cut) == whole
        assert read(*split(body, range(len(body))), cut=cut) == whole
    for _, text in whole.pieces:
        assert text.encode(), "no half of a surrogate pair is left"


NAMES = [
    "choices",
    "delta",
    "message",
    "content",
    "text",
    "type",
    "reasoning",
    "reasoning_details",
    "refusal",
    "tool_calls",
    "function",
    "arguments",
    "finish_reason",
    "index",
    "usage",
    "prompt_tokens",
    "completion_tokens_details",
    "x_groq",
    "error",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)
DATA = JSON | JSON.map(lambda delta: {"choices": [{"delta": delta}]})


@settings(max_examples=60)
@given(st.lists(st.binary() | DATA.map(event), max_size=4))
def test_garbage_never_raises(body: list[bytes]) -> None:
    read(*body)


def test_the_readers_are_pure() -> None:
    for file, rooms in (("events", set()), ("chunks", {"msgspec"}), ("answer", {"chatnest"})):
        roots = {name.partition(".")[0] for name in imported(PACKAGE / "provider" / f"{file}.py")}
        assert roots <= {"__future__", "enum", "json", "re", "typing", *rooms}

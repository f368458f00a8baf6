"""One event of a provider's stream, decoded: fast where it is OpenAI's, leniently where it is not. Pure."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, Final

import msgspec

MAX_TOKENS: Final = 1_000_000_000  # no answer has more, and no sum of a day's answers overflows its column


class Kind(Enum):
    """What a piece of an answer is. All are counted."""

    TEXT = "text"
    REASONING = "reasoning"
    OTHER = "other"  # a tool's name and arguments, or an answer beside the one that was asked for


Piece = tuple[Kind, str]
_TEXT_KIND: Final = Kind.TEXT  # an enum's attributes are slow to find


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the provider says that it charges, in tokens: the largest of each field over a stream."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion
    cached_tokens: int = 0  # of the prompt


class _Details(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """A report as it came, under OpenAI's names or the newer ones that some gateways put into the older wire."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None  # Moonshot, Together
    prompt_cache_hit_tokens: int | None = None  # DeepSeek
    reasoning_tokens: int | None = None  # Perplexity
    completion_tokens_details: _Details | None = None
    prompt_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None

    @property
    def says_something(self) -> bool:
        return any(
            map(
                _sane,
                (self.prompt_tokens, self.completion_tokens, self.total_tokens, self.input_tokens, self.output_tokens),
            )
        )

    def merged(self, before: Report) -> Report:
        """The largest of each field: some report in two halves, others more with each chunk."""
        prompt = max(before.prompt_tokens, _sane(self.prompt_tokens), _sane(self.input_tokens))
        completion = max(before.completion_tokens, _sane(self.completion_tokens), _sane(self.output_tokens))
        of_completion = (self, self.completion_tokens_details, self.output_tokens_details)
        of_prompt = (self, self.prompt_tokens_details, self.input_tokens_details)
        reasoning = max(_sane(one.reasoning_tokens) for one in of_completion if one)
        cached = max(_sane(self.prompt_cache_hit_tokens), *(_sane(one.cached_tokens) for one in of_prompt if one))
        return Report(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=max(before.total_tokens, _sane(self.total_tokens), prompt + completion),
            reasoning_tokens=max(before.reasoning_tokens, reasoning),
            cached_tokens=max(before.cached_tokens, cached),
        )


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None  # DeepSeek, llama.cpp, older vLLM
    reasoning: str | None = None  # OpenRouter, Groq, newer vLLM
    reasoning_details: list[Any] | None = None  # OpenRouter's too, often beside ``reasoning``
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None

    def pieces(self) -> list[Piece]:
        more = self.reasoning_content or self.reasoning or self.reasoning_details or self.refusal
        if not (more or self.tool_calls or self.function_call):  # what most chunks are, and all must be fast
            return [(_TEXT_KIND, self.content)] if self.content else []
        said = (
            (Kind.REASONING, self.reasoning_content or self.reasoning or _text(self.reasoning_details)),
            (Kind.TEXT, self.content or ""),
            (Kind.TEXT, self.refusal or ""),
            (Kind.OTHER, _called([*(self.tool_calls or ()), self.function_call])),
        )
        return [(kind, text) for kind, text in said if text]


class Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    message: _Delta | None = None  # from who streams in name only; elsewhere a copy of all the deltas
    finish_reason: str | None = None
    usage: Usage | None = None  # Moonshot
    index: int | None = 0
    lenient: bool = msgspec.field(name="_lenient", default=False)

    def pieces(self, first: bool) -> list[Piece]:
        """What it says; ``first``: nothing was said before."""
        delta = self.delta or (self.message if first else None)
        said = delta.pieces() if delta else []
        if self.index:  # one answer was asked for
            return [(Kind.OTHER, text) for _, text in said]
        return said


class _Groq(msgspec.Struct, gc=False):
    usage: Usage | None = None


class Chunk(msgspec.Struct, gc=False):
    """The fields that are read; decoding only these costs half a microsecond."""

    choices: list[Choice] | msgspec.UnsetType | None = msgspec.UNSET
    usage: Usage | None = None
    error: Any = None
    x_groq: _Groq | None = None


_decode: Final = msgspec.json.Decoder(Chunk).decode


def decode(data: bytes) -> list[Chunk]:
    """The chunks in an event's data: one; none in a heartbeat; several where no blank line came between them."""
    try:
        chunk = _decode(data)
        if chunk.choices is not msgspec.UNSET:
            return [chunk]
    except (msgspec.DecodeError, ValueError, RecursionError):
        pass
    if not data.strip():
        return []
    value = loose(data)
    lines = [loose(line) for line in data.split(b"\n") if line.strip() not in (b"", b"[DONE]")]
    if isinstance(value, str) and all(isinstance(line, dict) for line in lines):
        return list(map(_lenient_chunk, lines))
    return [_lenient_chunk(value)]


# For what msgspec refuses: half of a surrogate pair, a bad byte, NaN, and types that are not OpenAI's.


def loose(data: bytes) -> Any:
    """The JSON in ``data``, or its text."""
    text = data.decode(errors="replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def loose_usage(usage: object) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    counts = {name: _whole(value) for name, value in usage.items() if name in _COUNTS}
    details: dict[str, Any] = {name: _loose_details(usage.get(name)) for name in _DETAILS}
    return Usage(**counts, **details)


def _loose_details(value: object) -> _Details:
    return _Details(**{name: _whole(_get(value, name)) for name in _Details.__struct_fields__})


_DETAILS: Final = tuple(name for name in Usage.__struct_fields__ if name.endswith("_details"))
_COUNTS: Final = frozenset(Usage.__struct_fields__) - {*_DETAILS}


def _lenient_chunk(value: object) -> Chunk:
    choices = _get(value, "choices")
    return Chunk(
        choices=list(map(_lenient_choice, choices if isinstance(choices, list) else ())),
        usage=loose_usage(_get(value, "usage")),
        error=_error(value),
        x_groq=_Groq(loose_usage(_get(_get(value, "x_groq"), "usage"))),
    )


def _error(value: Any) -> object:
    """What is said to have failed, in whatever form; None in a chunk that only says nothing."""
    if not isinstance(value, dict):
        return value  # words where a chunk should be
    if error := value.get("error"):
        return error
    # {"object": "error", "message": …}, {"code": …, "message": …}, {"detail": …}
    nameless = "choices" not in value and "id" not in value and value.keys() & {"message", "detail", "code", "msg"}
    return value if nameless or "error" in (value.get("object"), value.get("type")) else None


def _lenient_choice(choice: object) -> Choice:
    delta, message, reason, index = (_get(choice, name) for name in ("delta", "message", "finish_reason", "index"))
    return Choice(
        delta=_lenient_delta(delta) if isinstance(delta, dict) else None,
        message=_lenient_delta(message) if isinstance(message, dict) else None,
        finish_reason=reason if isinstance(reason, str) else None,
        usage=loose_usage(_get(choice, "usage")),
        index=index if isinstance(index, int) else 0,
        lenient=True,
    )


def _lenient_delta(delta: dict[str, Any]) -> _Delta:
    content = delta.get("content")
    parts = content if isinstance(content, list) else [content]
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("reasoning_details")
    calls = delta.get("tool_calls")
    return _Delta(
        content=_text([part for part in parts if not _is_thought(part)]),
        reasoning=_text(reasoning) + _text([part for part in parts if _is_thought(part)]),
        refusal=_text(delta.get("refusal")),
        tool_calls=calls if isinstance(calls, list) else None,
        function_call=delta.get("function_call"),
    )


def _sane(tokens: int | None) -> int:
    """0 for a number that cannot be true: a provider that reports nothing must not make the model free."""
    return tokens if tokens and 0 < tokens <= MAX_TOKENS else 0


def _whole(value: object) -> Any:
    """A count rounded up, from a number or the string of one; None from anything else."""
    if isinstance(value, bool):
        return None
    try:
        return -int(-float(value) // 1)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _get(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _is_thought(part: object) -> bool:
    kind = _text(_get(part, "type"))
    return "think" in kind or "reasoning" in kind


def _text(value: object, depth: int = 8) -> str:
    """All the text in a value of unknown shape: a string, typed parts, a list of either."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value.get(name) for name in ("text", "thinking", "summary", "content", "refusal")]
    if isinstance(value, list) and depth:
        return "".join(_text(part, depth - 1) for part in value)
    return ""


def _called(calls: list[Any]) -> str:
    functions = (_get(call, "function") or call for call in calls)
    return "".join(_text(_get(one, "name")) + _text(_get(one, "arguments")) for one in functions)

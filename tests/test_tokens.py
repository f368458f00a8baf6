"""The tokenizer, held to a second implementation; and the bound that a reservation holds, to both."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatnest import tokens
from chatnest.tokens import answer_count, count, encoding_of, prompt_bound
from chatnest.wires import Message

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it reads its files the old way
    import bpe_openai

    SECOND = {name: bpe_openai.get_encoding(name) for name in ("o200k_base", "cl100k_base")}

MODELS = {"o200k_base": "gpt-4o-mini", "cl100k_base": "gpt-4"}
UNKNOWN = "llama-4-maverick"

# Long runs, odd spaces, scripts without spaces, code and the tokenizers' own marks: where two may differ.
texts = st.one_of(
    st.text(),
    st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z"]), max_size=300),
    st.text(" \t\r\n\u00a0\u2028\u3000ab1'", max_size=100),
    st.lists(
        st.sampled_from(
            ["the", " quick", "I'll", "don't", "12345", "你好", "こんにちは", "สวัสดี", "👩‍👩‍👧", "é",
             "e\u0301", "\r\n\r\n",
             "   ", "<|endoftext|>", "<|im_start|>", "def f(x):", "HTTPServer", "ﷺ", "Ж", "--", "\0", "_"]
        ),
        max_size=60,
    ).map("".join),
    st.builds(str.__mul__, st.sampled_from(["a", " ", "\n", "1", "é", "😀", "ab"]), st.integers(0, 400)),
)  # fmt: skip
surrogates = st.text(st.characters(categories=["Cs", "L"]), max_size=50)


def second_opinion(text: str, encoding: str) -> int:
    return len(SECOND[encoding].encode_ordinary(text))


def bound_of(contents: Sequence[str], model: str) -> int:
    return asyncio.run(prompt_bound([Message("user", content) for content in contents], model))


@pytest.mark.parametrize("encoding", MODELS)
@given(text=texts)
@example(text="")
@example(text="Hello!")
@example(text=" " * 5000)
@example(text="a" * 3000)
@example(text=" word" * 5000)
@settings(max_examples=300)
def test_two_tokenizers_agree_on_every_text(encoding: str, text: str) -> None:
    assert count([text], MODELS[encoding]) == second_opinion(text, encoding)


@given(text=texts, model=st.sampled_from([*MODELS.values(), UNKNOWN, ""]))
def test_no_text_has_more_tokens_than_bytes(text: str, model: str) -> None:
    assert count([text], model) <= len(text.encode())
    if text:
        assert count([text], model) >= 1


@given(contents=st.lists(texts, min_size=1, max_size=8), encoding=st.sampled_from(list(MODELS)))
def test_a_prompts_bound_is_never_below_what_openai_counts(contents: list[str], encoding: str) -> None:
    """Its cookbook: three tokens a message, one for the role, three for the reply."""
    exact = sum(second_opinion(text, encoding) + 3 + 1 for text in contents) + 3
    bound = bound_of(contents, MODELS[encoding])
    assert exact <= bound <= exact + len(contents)
    assert bound <= bound_of(contents, UNKNOWN)


@given(contents=st.lists(texts, min_size=1, max_size=8))
def test_a_model_of_unknown_encoding_is_bounded_by_bytes(contents: list[str]) -> None:
    size = sum(len(text.encode()) for text in contents)
    assert bound_of(contents, UNKNOWN) == size + 5 * len(contents) + 3


@given(contents=st.lists(texts, min_size=1, max_size=4))
def test_without_the_tokenizer_bytes_bound_every_model(contents: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "toktok", None)
        assert bound_of(contents, "gpt-4o") == bound_of(contents, UNKNOWN)
        assert answer_count("".join(contents), len(contents), "gpt-4o", 10) == max(
            len(contents), min(10, len("".join(contents).encode()))
        )


@given(text=surrogates, encoding=st.sampled_from(list(MODELS)))
@example(text="\ud83d" * 1000, encoding="o200k_base")
@example(text="\ud83d\ude00", encoding="o200k_base")
def test_half_a_character_counts_as_its_replacement_and_two_halves_as_one(text: str, encoding: str) -> None:
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert count([text], MODELS[encoding]) == second_opinion(mended, encoding)
    assert count([text], UNKNOWN) == len(mended.encode())


def test_chinese_is_not_guessed_by_its_characters() -> None:
    """The original's estimate, characters / 4, was five times too low for it."""
    text = "今天天气很好我们去公园散步吧" * 20
    assert count([text], "gpt-4o") == second_opinion(text, "o200k_base")
    assert count([text], "gpt-4o") > 2 * len(text) / 4


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
def test_the_encoding_goes_by_the_models_name(model: str, encoding: str | None) -> None:
    assert encoding_of(model) == encoding


@given(
    pieces=st.lists(texts, max_size=20),
    encoding=st.sampled_from(list(MODELS)),
    allowance=st.integers(64, 4096),
)
def test_an_answer_without_a_report_counts_as_its_text_and_at_least_one_a_piece(
    pieces: list[str], encoding: str, allowance: int
) -> None:
    counted = answer_count("".join(pieces), len(pieces), MODELS[encoding], allowance)
    assert counted == max(len(pieces), second_opinion("".join(pieces), encoding))


@given(pieces=st.lists(texts, max_size=20), allowance=st.integers(64, 4096))
def test_an_answer_in_an_unknown_encoding_costs_no_more_than_it_was_allowed(pieces: list[str], allowance: int) -> None:
    size = len("".join(pieces).encode())
    assert answer_count("".join(pieces), len(pieces), UNKNOWN, allowance) == max(len(pieces), min(size, allowance))


def test_a_prompt_that_is_made_to_be_slow_does_not_hold_up_the_others() -> None:
    """A run without spaces costs the tokenizer more than its length; meanwhile the loop goes on."""
    count(["the first count of a process reads the vocabulary"], "gpt-4o")

    async def story() -> float:
        worst, done = 0.0, asyncio.Event()

        async def others() -> None:
            nonlocal worst
            while not done.is_set():
                before = time.monotonic()
                await asyncio.sleep(0.001)
                worst = max(worst, time.monotonic() - before)

        task = asyncio.create_task(others())
        await asyncio.sleep(0)
        assert await prompt_bound([Message("user", "a" * 1_000_000)], "gpt-4o") > 100_000
        done.set()
        await task
        return worst

    assert asyncio.run(story()) < 0.25

"""The window: a conversation goes on whatever its history, and what is sent is what every model takes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatnest import conversation, tokens
from chatnest.conf import Provider
from chatnest.conversation import Window, awindow, window
from chatnest.errors import InvalidMessages, RequestTooLarge
from chatnest.limits import DEFAULT_PROFILES
from chatnest.wires import Message

BALANCED = DEFAULT_PROFILES["balanced"]


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def system(content: str) -> Message:
    return Message("system", content)


def cut(messages: Sequence[Message], max_messages: int = 6, max_tokens: int = 2048, prompt: str = "") -> Window:
    return window(messages, system=prompt, max_messages=max_messages, max_tokens=max_tokens, allowance=400)


def talk(length: int) -> list[Message]:
    """``length`` turns, the user's first."""
    return [assistant(f"answer {i}") if i % 2 else user(f"question {i}") for i in range(length)]


# What users meet.


def test_the_fourth_question_of_a_profile_of_six_begins_with_a_question() -> None:
    """``max_messages`` is even and conversations are odd: Gemma's template refused them for ever."""
    sent, dropped = cut(talk(7))
    assert sent == talk(7)[2:]
    assert dropped == 2


def test_one_long_paste_does_not_end_a_conversation() -> None:
    """One of 1,200 words was answered, then "ok" was "Request too large" for ever."""
    sent, dropped = cut([user("paste of words " * 500), assistant("word " * 390), user("ok")])
    assert sent == [user("ok")]
    assert dropped == 2


def test_three_long_answers_do_not_either() -> None:
    limits = DEFAULT_PROFILES["expanded"]
    messages: list[Message] = []
    for question in range(8):
        messages.append(user(f"Tell me more, {question}."))
        sent, _ = window(
            messages,
            max_messages=limits.max_messages,
            max_tokens=limits.max_tokens_per_request,
            allowance=limits.max_output_tokens,
        )
        assert sent[-1] == messages[-1]
        messages.append(assistant(f"{question} word" * 2900))


def test_six_turns_of_the_originals_conversation_pass_whatever_the_model_is_called() -> None:
    """One answer of 1,700 characters, and a model sized by its bytes was refused from the second turn on."""
    messages = []
    for turn in range(6):
        messages.append(user(f"And what of {turn}?"))
        assert cut(messages).messages[-1] == messages[-1]
        messages.append(assistant("All happy families are alike. " * 57))


def test_a_paste_that_was_refused_and_stays_in_the_history_is_left_out() -> None:
    """It is a user's turn as well, and must not be merged with the question into one that is too long."""
    sent, dropped = cut([user("word " * 4000), user("Shorter: what is it about?")])
    assert sent == [user("Shorter: what is it about?")]
    assert dropped == 1


def test_a_question_that_is_too_long_by_itself_is_refused() -> None:
    with pytest.raises(RequestTooLarge):
        cut([user("Hi"), assistant("Hello!"), user("word " * 4000)])


def test_the_last_token_of_a_request_can_be_used() -> None:
    question = [user("word " * 200)]
    needed = tokens.estimate(question) + 400
    assert cut(question, max_tokens=needed).messages == question
    with pytest.raises(RequestTooLarge):
        cut(question, max_tokens=needed - 1)
    both = [user("before"), *question]
    assert cut(both, max_tokens=needed) == ([question[0]], 1)


def test_an_answer_that_was_stopped_before_its_first_word_is_not_sent() -> None:
    sent, dropped = cut([user("Hello!"), assistant(""), user("Are you there?"), assistant(" \n")])
    assert sent == [user("Hello!\n\nAre you there?")]
    assert dropped == 0


def test_nobody_asks_anything() -> None:
    for nothing in (
        [],
        [user("")],
        [user(" \n\u3000")],
        [user(""), assistant("")],
        [assistant("How can I help?")],
        [system("Be brief.")],
    ):
        with pytest.raises(InvalidMessages) as refused:
            cut(nothing)
        assert refused.value.message == "Invalid messages payload"


def test_the_model_goes_on_with_its_own_answer() -> None:
    """A client that sends the beginning of an answer last asks for the rest of it."""
    messages = [user("Tell me a story."), assistant("Once upon a time")]
    assert cut(messages) == (messages, 0)
    with pytest.raises(RequestTooLarge):  # without the question it is no conversation
        cut([user("word " * 3000), assistant("Once upon a time")])


def test_a_greeting_of_the_page_is_not_sent() -> None:
    assert cut([assistant("How can I help?"), user("Hi")]) == ([user("Hi")], 1)


def test_the_operators_prompt_is_first_takes_no_messages_place_and_is_counted() -> None:
    sent, dropped = cut(talk(7), max_messages=2, prompt="Be kind.")
    assert sent == [system("Be kind."), user("question 6")]
    assert dropped == 6
    needed = tokens.estimate([system("word " * 500), user("question 6")]) + 400
    assert cut(talk(7), max_tokens=needed, prompt="word " * 500).dropped == 6
    with pytest.raises(RequestTooLarge):
        cut(talk(7), max_tokens=needed - 1, prompt="word " * 500)


def test_a_clients_own_instructions_stay_for_the_whole_conversation() -> None:
    """OpenAI's clients send them first, every time; with the operator's they are one message, as templates want it."""
    sent, dropped = cut([system("Answer in verse."), *talk(9)], prompt="Be kind.")
    assert sent == [system("Be kind.\n\nAnswer in verse."), *talk(9)[4:]]
    assert dropped == 4


def test_a_system_message_in_the_middle_is_a_turn_in_its_place() -> None:
    messages = [user("Hi"), assistant("Hello!"), system("The user is now logged in."), user("Who am I?")]
    assert cut(messages).messages == messages
    assert cut(messages, max_messages=2) == ([user("Who am I?")], 3)


def test_a_site_that_lets_the_model_see_no_messages_answers_none() -> None:
    with pytest.raises(RequestTooLarge):
        cut([user("Hi")], max_messages=0)


def test_a_long_history_is_counted_once_and_only_as_far_as_it_may_be_seen() -> None:
    counted: list[str] = []

    def estimate(messages: Sequence[Message]) -> int:
        counted.extend(message.content for message in messages)
        return sum(5 for _ in messages)

    window(talk(999), max_messages=20, max_tokens=2048, allowance=400, estimate=estimate)
    assert sorted(counted) == sorted(message.content for message in talk(999)[-20:])


def test_what_is_far_too_long_is_refused_without_counting_it() -> None:
    def estimate(messages: Sequence[Message]) -> int:
        assert all(len(message.content) < 100 for message in messages)
        return tokens.estimate(messages)

    attack = "-" * (32 * 2048)
    with pytest.raises(RequestTooLarge):
        window([user(attack)], max_messages=6, max_tokens=2048, allowance=400, estimate=estimate)
    with pytest.raises(RequestTooLarge):
        window([user("Hi")], system=attack, max_messages=6, max_tokens=2048, allowance=400, estimate=estimate)
    sent, _ = window([user(attack), user("Hi")], max_messages=6, max_tokens=2048, allowance=400, estimate=estimate)
    assert sent == [user("Hi")]


@pytest.mark.parametrize("size", [10, 100_000])
def test_the_async_window_is_the_window(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one is cut in a thread."""
    in_thread: list[bool] = []

    async def to_thread(call: object) -> object:
        in_thread.append(True)
        return call()  # type: ignore[operator]

    monkeypatch.setattr(conversation.asyncio, "to_thread", to_thread)
    messages = [user("x" * size), *talk(5)]
    answer = asyncio.run(awindow(messages, system="Be kind.", max_messages=6, max_tokens=2048, allowance=400))
    assert answer == cut(messages, prompt="Be kind.")
    assert in_thread == [True] * (size > tokens.LONG_PROMPT)


# What holds for every conversation.

contents = st.one_of(
    st.sampled_from(["", " ", "\n"]),
    st.text(max_size=30),
    st.builds(str.__mul__, st.sampled_from(["word ", "今天天气", "\n", ".  \n", "a", "-", "😀"]), st.integers(0, 600)),
)
turns = st.builds(Message, st.sampled_from(["user", "user", "assistant", "assistant", "system"]), contents)


@given(
    messages=st.lists(turns, max_size=40),
    prompt=st.one_of(st.just(""), contents),
    max_messages=st.integers(0, 20),
    max_tokens=st.integers(0, 3000),
    allowance=st.integers(0, 1000),
)
def test_what_is_sent_begins_with_a_question_alternates_fits_and_keeps_the_newest(
    messages: list[Message], prompt: str, max_messages: int, max_tokens: int, allowance: int
) -> None:
    def looked_through(max_messages: int, max_tokens: int) -> Window:
        return window(messages, system=prompt, max_messages=max_messages, max_tokens=max_tokens, allowance=allowance)

    told = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    spoken = [message for message in messages[told:] if message.content.strip()]
    instructions = [m.content for m in [system(prompt), *messages[:told]] if m.content.strip()]
    try:
        sent, dropped = looked_through(max_messages, max_tokens)
    except InvalidMessages:
        assert "user" not in [message.role for message in spoken[-max_messages:]]
        return
    except RequestTooLarge:
        smallest = [system("\n\n".join(instructions)), *spoken[-1:]]
        if max_messages and spoken[-1].role == "user":
            over = tokens.estimate(smallest) + allowance > max_tokens - 8 * len(messages) - 8
            assert over or tokens.too_many_bytes(smallest, max_tokens)
        return
    kept = spoken[dropped:]
    assert 1 <= len(kept) <= max_messages
    assert kept[0].role == "user"
    assert all(message.content.strip() for message in sent)
    assert all(a.role != b.role for a, b in pairwise(sent))
    assert tokens.estimate(sent) + allowance <= max_tokens
    conversation = [message.content for message in sent if message is not sent[0] or message.role != "system"]
    assert "\n\n".join(conversation) == "\n\n".join(message.content for message in kept)
    assert [m.content for m in sent[:1] if m.role == "system"] == ["\n\n".join(instructions)] * bool(instructions)
    # Nothing was dropped without need: the next older question would have been too much.
    older = next((i for i in range(dropped - 1, -1, -1) if spoken[i].role == "user"), None)
    if older is not None and len(spoken) - older <= max_messages:
        more = [system("\n\n".join(instructions))] * bool(instructions) + spoken[older:]
        one_by_one = any(tokens.too_many_bytes([m], max_tokens // 8) for m in more)
        assert one_by_one or tokens.estimate(more) + 2 * len(messages) + allowance > max_tokens


MODELS = [
    ("gpt-4o-mini", Provider(name="default")),
    ("gpt-4", Provider(name="default")),
    ("llama-3.1-8b-instruct", Provider(name="llama", base_url="http://127.0.0.1:8080/v1")),
]


@pytest.mark.parametrize("profile", DEFAULT_PROFILES)
def test_no_conversation_dies(profile: str) -> None:
    """200 of 40 turns; each question would fit alone, each answer is as long as it may be, some are never given."""
    limits, chance = DEFAULT_PROFILES[profile], random.Random(profile)
    words = ["word ", "weather ", "今天", "天气", "def f(x):\n", "1234 ", "é", "\n\n", "😀", " the", ". "]
    longest = limits.max_tokens_per_request - limits.max_output_tokens

    def texts(most: int) -> list[str]:
        """From one word to the longest that fits."""
        drawn = ["".join(chance.choices(words, k=int(most * chance.random() ** 2))) for _ in range(150)]
        return ["ok", *(text for text in drawn if text.strip() and tokens.estimate([user(text)]) <= most)]

    questions, answers = texts(longest), ["", *texts(limits.max_output_tokens)]
    assert max(tokens.estimate([user(question)]) for question in questions) > 0.8 * longest
    for number in range(200):
        model, provider = MODELS[number % len(MODELS)]
        messages: list[Message] = []
        for _ in range(20):
            messages.append(user(chance.choice(questions)))
            sent, dropped = window(
                messages,
                max_messages=limits.max_messages,
                max_tokens=limits.max_tokens_per_request,
                allowance=limits.max_output_tokens,
            )
            assert sent[-1].content.endswith(messages[-1].content)
            assert tokens.estimate(sent) + limits.max_output_tokens <= limits.max_tokens_per_request
            assert dropped < len(messages)
            messages.append(assistant(chance.choice(answers)))
        if model == "gpt-4o-mini":  # then the guess is what is billed
            assert tokens.bound(sent, model, provider) == tokens.estimate(sent)

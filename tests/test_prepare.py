"""PREPARE: what the site makes of a conversation before anything is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.http import HttpRequest

from chatnest.errors import Forbidden
from chatnest.models import DailyUsage
from chatnest.testing import FakeUpstream, Reply
from chatnest.wires import ChatRequest, Message

from .client import Client
from .conftest import Configure, Settled

pytestmark = pytest.mark.usefixtures("known_model")


def with_instructions(request: HttpRequest, chat: ChatRequest) -> ChatRequest:
    """Looks somebody up, as a site would: it runs in a thread."""
    number = get_user_model().objects.count()
    system = Message("system", f"The site has {number} users. " + "Be brief. " * 20)
    return replace(chat, messages=(system, *chat.messages), label="help desk")


async def without_names(request: HttpRequest, chat: ChatRequest) -> ChatRequest:
    hidden = [Message(one.role, one.content.replace("Alice", "[name]")) for one in chat.messages]
    return replace(chat, messages=tuple(hidden), profile=" Constrained ", label="x" * 300)


def only_with_a_header(request: HttpRequest, chat: ChatRequest) -> ChatRequest:
    if "X-Team" not in request.headers:
        raise Forbidden("The chat is for teams.")
    return chat


def test_instructions_for_this_user_are_sent_and_held(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    upstream.replies(Reply("Hi"), Reply("Hi"))
    client.chat()
    configure(PREPARE=with_instructions)
    assert client.chat().answer == "Hi"
    first, second = upstream.requests[-1].json["messages"]
    assert first["role"] == "system" and first["content"].startswith("The site has 0 users.")
    assert second == {"role": "user", "content": "Hello!"}
    plain, prepared = settled()
    assert prepared.tokens > plain.tokens + 40
    assert (plain.label, prepared.label) == ("", "help desk")


def test_an_async_one_may_take_words_out_and_choose_a_profile(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    configure(PREPARE="tests.test_prepare.without_names")
    upstream.replies(Reply("Hi"))
    assert client.chat({"messages": [{"role": "user", "content": "I am Alice."}]}).answer == "Hi"
    assert upstream.requests[0].json["messages"] == [{"role": "user", "content": "I am [name]."}]
    (row,) = settled()
    assert row.profile == "constrained"
    assert row.label == "x" * 100


def test_it_may_refuse(client: Client, configure: Configure, upstream: FakeUpstream, database: str) -> None:
    configure(PREPARE=only_with_a_header)
    upstream.replies(Reply("Hi"))
    refused = client.chat()
    assert (refused.status, refused.json["error"]) == (403, "The chat is for teams.")
    assert not DailyUsage.objects.using(database).exists()
    assert client.chat(X_Team="blue").answer == "Hi"


@pytest.mark.parametrize("answer", [None, "Hello", {"messages": []}, 1 / 3])
def test_one_that_returns_something_else_answers_nobody(
    client: Client, configure: Configure, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    configure(PREPARE=lambda request, chat: answer)
    assert client.chat().json["code"] == "internal_error"
    assert "must return a ChatRequest" in caplog.text

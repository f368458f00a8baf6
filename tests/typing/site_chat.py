"""What a site writes: no error, and what is wrong is one (an ignore that nothing needs is an error too)."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any, assert_type
from uuid import UUID

import openai
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application
from django.dispatch import receiver
from django.http import HttpRequest
from django.test import TestCase
from django.urls import include, path

import chatnest
from chatnest.asgi import for_streaming
from chatnest.errors import ChatError, DailyBudgetExceeded
from chatnest.models import Account, DailyUsage, Profile, Reservation, ReservationQuerySet
from chatnest.signals import budget_crossed, refused, settled
from chatnest.testing import ChatTestMixin, FakeUpstream, Reply, inline_ledger, real_provider, scripted_chat
from chatnest.wires import ChatRequest, Message

application = for_streaming(get_asgi_application(), grace_seconds=5)
for_streaming(get_asgi_application(), grace_seconds="5")  # type: ignore[arg-type]

urlpatterns = [path("api/", include("chatnest.urls"))]


def prepare(request: HttpRequest, chat: ChatRequest) -> ChatRequest:
    assert_type(chat.messages[0].content, str)
    chat.label = "help desk"  # type: ignore[misc]
    Message("system", 5)  # type: ignore[arg-type]
    Message("root", "Be kind.")  # type: ignore[arg-type]
    return replace(chat, messages=(Message("system", "Be kind."), *chat.messages), label="help desk", metadata=7)


async def aprepare(request: HttpRequest, chat: ChatRequest) -> ChatRequest:
    if isinstance(request.user, User) and not await request.user.groups.aexists():
        raise DailyBudgetExceeded(retry_after=60)
    return chat


def digest(user: User, client: openai.OpenAI) -> str | None:
    messages = [{"role": "user", "content": "Sum up."}]
    try:
        with chatnest.hold(user, messages, profile="balanced", max_output_tokens=100, label="digest") as hold:
            assert_type(hold.model, str)
            assert_type(hold.output_tokens, int)
            assert_type(hold.stopped, bool)
            answer = client.chat.completions.create(
                model=hold.model, messages=[{"role": "user", "content": "Sum up."}], max_tokens=hold.output_tokens
            )
            hold.report(answer.usage)
    except ChatError as error:
        assert_type(error.code, str)
        assert_type(error.status, int)
        assert_type(error.retryable, bool)
        assert_type(error.retry_after, int | None)
        return None
    return answer.choices[0].message.content


async def adigest(accounts: Sequence[str]) -> None:
    async with chatnest.hold(accounts, [{"role": "user", "content": "Hi"}]) as hold:
        hold.release()
    chatnest.hold(accounts, [{"role": "user", "content": "Hi"}], "expanded")  # type: ignore[call-arg]


@receiver(settled)
def keep(
    reservation: UUID, messages: Sequence[Message], text: str, duration: float | None, metadata: Any, **kwargs: Any
) -> None: ...


@receiver(refused)
def count(payer: str, code: str, retry_after: int | None, **kwargs: Any) -> None: ...


@receiver(budget_crossed)
def warn(account: str, day: date, percent: int, used: int, limit: int, **kwargs: Any) -> None: ...


def report() -> int:
    assert_type(Reservation.objects.open(), ReservationQuerySet)
    Profile.objects.filter(name="balanced", max_output_tokens__gt=100).update(enabled=False)
    Account.objects.get(name="user:7").paused = True
    return sum(usage.tokens_used for usage in DailyUsage.objects.filter(account="site"))


class ChatTests(ChatTestMixin, TestCase):
    def test_chat(self) -> None:
        self.upstream.replies(Reply.refuse(429, retry_after=1), Reply("Hello", " world", gate_after=1))
        self.upstream.replies("Hello")  # type: ignore[arg-type]
        assert_type(self.upstream, FakeUpstream)
        with inline_ledger(), scripted_chat() as upstream, real_provider():
            assert_type(upstream.url, str)

"""A site's plain TestCase: the ledger is in its transaction, and rolled back with it."""

from __future__ import annotations

import json
from typing import Any

from django.contrib.auth.models import User
from django.test import TestCase

import chatnest
from chatnest.models import Account, DailyUsage, Profile, Reservation
from chatnest.testing import ChatTestMixin, Reply


class TestSiteWithAChat(ChatTestMixin, TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        cls.user = User.objects.create_user("grace")

    async def chat(self) -> Any:
        await self.async_client.aforce_login(self.user)
        body = json.dumps({"messages": [{"role": "user", "content": "Hello!"}]})
        response = await self.async_client.post(
            "/api/chat", body, "application/json", headers={"origin": "http://testserver"}
        )
        if response.streaming:
            response.text_ = b"".join([part async for part in response]).decode()
        return response

    async def test_an_answer_is_streamed_and_charged(self) -> None:
        self.upstream.replies(Reply("Hi", " there"))
        response = await self.chat()
        assert '"Hi"' in response.text_ and "event: done" in response.text_, response.text_
        row = await Reservation.objects.aget()
        assert (row.payer, row.outcome, row.tokens_charged) == (f"user:{self.user.pk}", "completed", 14)

    async def test_what_an_operator_saves_is_in_force_at_once(self) -> None:
        await Account.objects.acreate(name=f"user:{self.user.pk}", paused=True)
        assert (await self.chat()).status_code == 503

    def test_nothing_is_left_of_the_test_before(self) -> None:
        assert not DailyUsage.objects.exists()
        assert Profile.objects.count() == 3

    def test_the_sites_own_calls(self) -> None:
        with chatnest.hold(self.user, [{"role": "user", "content": "Hello!"}]) as hold:
            hold.report({"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10})
        assert Reservation.objects.get().tokens_charged == 10

    def test_the_usage(self) -> None:
        self.client.force_login(self.user)
        assert self.client.get("/api/usage").json()["usedToday"] == 0

"""A user chats: the wire, from the first frame to the row in the ledger."""

from __future__ import annotations

from collections.abc import Callable

from chatnest.models import Reservation
from chatnest.testing import FakeUpstream, Reply

from .client import Client


def test_an_answer_streams_and_is_charged_as_reported(
    client: Client, upstream: FakeUpstream, settled: Callable[[], list[Reservation]]
) -> None:
    upstream.replies(Reply("Hel", "lo"))
    reply = client.chat()
    assert reply.events == ["start", "token", "token", "usage", "done"]
    assert reply.answer == "Hello"
    (row,) = settled()
    assert (row.outcome, row.usage_source, row.tokens_charged) == ("completed", "reported", 14)

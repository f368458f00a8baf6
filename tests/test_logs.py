"""What the log says in fields: whose chat, which model, how it ended."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from freezegun import freeze_time

from chatnest.errors import InternalError, RateLimited
from chatnest.ledger.batcher import batcher
from chatnest.models import Reservation
from chatnest.refusals import MOST_NAMES, Refusals
from chatnest.testing import SECRET, FakeUpstream, Reply

from .bookkeeping import ask
from .client import Client
from .conftest import Configure, EditProfile, Settled, on_sqlite
from .test_holds import a_task, answer

FIELDS = ("reservation", "payer", "profile", "provider", "model", "outcome")


def fields(record: logging.LogRecord, *more: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in (*FIELDS, *more) if hasattr(record, name)}


def of(row: Reservation) -> dict[str, Any]:
    return {name: getattr(row, name) for name in FIELDS if name != "reservation"} | {"reservation": str(row.pk)}


def lines(caplog: pytest.LogCaptureFixture, logger: str = "chatnest.chat") -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == logger]


@on_sqlite
def test_each_answer_is_a_line(
    client: Client, upstream: FakeUpstream, settled: Settled, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies(Reply("Hello", usage=(12, 7)), answer(12, 3))
    client.chat()
    a_task(upstream)
    chat, task = settled()
    one, other = lines(caplog)
    assert fields(one) == of(chat)
    assert fields(other) == of(task)
    assert (one.levelname, one.getMessage()[:27]) == ("INFO", "Chat completed: 19 tokens i")
    assert (fields(one, "tokens", "code")["tokens"], one.code) == (19, "")  # type: ignore[attr-defined]
    assert 0 < one.seconds < 10  # type: ignore[attr-defined]
    assert "Hello" not in caplog.text


@on_sqlite
def test_what_a_provider_said_is_told_with_whose_chat_it_was(
    client: Client, upstream: FakeUpstream, settled: Settled, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies(Reply.refuse(400))
    client.chat()
    (row,) = settled()
    (said,) = lines(caplog, "chatnest.upstream")
    assert fields(said) == {name: value for name, value in of(row).items() if name != "outcome"}
    assert "own words" in said.getMessage()
    (ended,) = lines(caplog)
    assert (ended.outcome, ended.code) == ("upstream_error", "upstream_rejected")  # type: ignore[attr-defined]
    assert SECRET not in ended.getMessage()


@on_sqlite
def test_the_ledgers_own_lines_say_whose(database: str, caplog: pytest.LogCaptureFixture) -> None:
    poison = ask(prompt_tokens=-5000)
    with pytest.raises(InternalError):
        asyncio.run(batcher.reserve(poison))
    (record,) = lines(caplog, "chatnest.ledger")
    assert (record.levelname, fields(record)["reservation"]) == ("CRITICAL", str(poison.id))
    assert fields(record)["payer"] == poison.payer


@on_sqlite
def test_a_refusal_is_a_line_once_a_minute(
    client: Client, edit_profile: EditProfile, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    edit_profile(rate_max_requests=0)
    for _ in range(5):
        assert client.chat().status == 429
    client.chat(b"{}")
    first, other = lines(caplog)
    assert fields(first, "code") == {"payer": "ip:127.0.0.1", "outcome": "refused", "code": "rate_limited"}
    assert first.getMessage().startswith("Refused ip:127.0.0.1: rate_limited: request 1 in 60 s")
    assert other.getMessage() == "Refused ip:127.0.0.1: invalid_messages"


@on_sqlite
def test_an_attack_of_many_names_does_not_fill_the_log(database: str, caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    with freeze_time("2026-03-02 12:00:00") as clock:
        for number in range(3 * MOST_NAMES):
            refusals.note(f"ip:192.0.2.{number}", RateLimited())
        assert len(lines(caplog)) == MOST_NAMES + 1  # the rest have one name, and one line
        refusals.note("ip:192.0.2.0", RateLimited())
        assert len(lines(caplog)) == MOST_NAMES + 1
        clock.tick(61)
        refusals.note("ip:192.0.2.0", RateLimited())
        assert len(lines(caplog)) == MOST_NAMES + 2
    refusals.clear()

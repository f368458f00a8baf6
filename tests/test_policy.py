"""An operator edits profiles: clamped, switched off, deleted; and in force within seconds, whoever wrote the row."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

import pytest
from django.db import IntegrityError, connections, transaction

from chatnest.ledger.batcher import batcher
from chatnest.limits import DEFAULT_PROFILES, FIELDS
from chatnest.models import Account, Profile
from chatnest.policy import Policy
from chatnest.testing import FakeUpstream, Reply

from .client import HELLO, Client
from .conftest import Configure, EditProfile, Settled, eventually, on_postgres, on_sqlite

PAYER = ("ip:192.0.2.1", "site")
PAUSED = "The chat is paused by its operator. Please try again later."


def in_force(**row: Any) -> dict[str, Any]:
    """What a request gets from a profile row with these fields, as the row's own types cannot hold them all."""
    typed = {name: getattr(DEFAULT_PROFILES["balanced"], name) for name in FIELDS} | row
    terms = Policy({"balanced": Profile(name="balanced", **typed)}, {}).terms(PAYER, "balanced")
    return {name: getattr(terms.limits, name) for name in FIELDS} | {"budget": terms.budgets[PAYER[0]]}


# Clamped.


def test_an_operator_who_types_too_much_gets_the_caps(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, settled: Settled
) -> None:
    edit_profile(
        max_output_tokens=1_000_000,
        max_messages=1_000_000,
        temperature=99,
        daily_token_limit=10**15,
        max_tokens_per_request=1_000_000,
        rate_max_requests=1_000_000,
        rate_window_seconds=1,
        max_concurrent_streams=1_000_000,
    )
    body = {"messages": [{"role": "user", "content": "Hello!"}] * 30}
    assert client.chat(body).status == 200
    sent = upstream.requests[0].json
    assert (sent["max_tokens"], sent["temperature"], len(sent["messages"])) == (4096, 2, 20)
    assert client.usage()["dailyTokenLimit"] == 500_000
    large = {"messages": [{"role": "user", "content": "word " * 12_000}]}
    assert client.chat(large).json["code"] == "request_too_large"
    assert settled()[0].tokens == 20 * 7 + 3 + 4096


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), float("-inf"), -1, "1e9", None, True])
def test_a_row_with_nonsense_is_the_strictest_row(nonsense: Any) -> None:
    limits = in_force(**dict.fromkeys(FIELDS, nonsense))
    assert limits.pop("temperature") == (None if nonsense is None else 0)
    assert limits.pop("rate_window_seconds") == 60
    assert set(limits.values()) == {0}


@on_postgres
@pytest.mark.parametrize(("stored", "sent"), [("NaN", 0), ("Infinity", 0), ("-Infinity", 0), ("1e308", 2)])
def test_postgres_can_store_temperatures_that_no_model_can_have(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, stored: str, sent: float
) -> None:
    edit_profile()
    with connections["postgres"].cursor() as cursor:
        cursor.execute("UPDATE chatnest_profile SET temperature = %s::float8", [stored])
    batcher.forget_policy()
    assert client.chat().status == 200
    assert upstream.requests[0].json["temperature"] == sent


def test_the_database_refuses_limits_below_zero(edit_profile: EditProfile, database: str) -> None:
    for name in FIELDS:
        if name != "temperature":
            with pytest.raises(IntegrityError):
                edit_profile(**{name: -1})


@on_sqlite
def test_a_row_with_the_largest_numbers_serves(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile
) -> None:
    edit_profile(**dict.fromkeys(set(FIELDS) - {"temperature"}, 2**31 - 1))
    assert client.chat().events[-1] == "done"
    assert upstream.requests[0].json["max_tokens"] == 4096


@on_sqlite
def test_a_row_of_zeros_refuses_everything(client: Client, upstream: FakeUpstream, edit_profile: EditProfile) -> None:
    names = set(FIELDS) - {"temperature"}
    edit_profile(**dict.fromkeys(names, 0))
    assert client.chat().status == 429
    for name, code in [
        ("max_tokens_per_request", "request_too_large"),
        ("daily_token_limit", "daily_budget_exceeded"),
        ("rate_max_requests", "rate_limited"),
        ("max_concurrent_streams", "too_many_streams"),
    ]:
        edit_profile(**{name: 0})
        assert client.chat().json["code"] == code
    assert upstream.requests == []


@on_sqlite
def test_lower_caps_in_the_code_win_over_every_row(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, configure: Configure
) -> None:
    edit_profile(max_output_tokens=300)
    configure(HARD_CAPS={"max_output_tokens": 100, "temperature": 0.1})
    client.chat()
    assert upstream.requests[0].json["max_tokens"] == 100
    assert upstream.requests[0].json["temperature"] == 0.1


@on_sqlite
def test_higher_caps_in_the_code_let_operators_go_higher(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, configure: Configure
) -> None:
    configure(HARD_CAPS={"max_output_tokens": 8000})
    edit_profile(max_output_tokens=9000, max_tokens_per_request=16_000)
    client.chat()
    assert upstream.requests[0].json["max_tokens"] == 8000


@on_sqlite
def test_the_model_and_the_prompt_are_the_rows(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile
) -> None:
    edit_profile("constrained", model="llama-4", system_prompt="Sei brav. 🙂")
    client.chat({**HELLO, "profile": "budget"})
    sent = upstream.requests[0].json
    assert sent["model"] == "llama-4"
    assert sent["messages"][0] == {"role": "system", "content": "Sei brav. 🙂"}


# Missing and switched off.


def test_without_any_row_the_codes_defaults_serve(client: Client, upstream: FakeUpstream, database: str) -> None:
    Profile.objects.using(database).all().delete()
    for name, limits in DEFAULT_PROFILES.items():
        assert client.chat({**HELLO, "profile": name}).status == 200
        assert upstream.requests[-1].json["max_tokens"] == limits.max_output_tokens


@on_sqlite
def test_a_profile_that_is_switched_off_is_balanced_for_who_asks_for_it(
    client: Client, edit_profile: EditProfile, settled: Settled
) -> None:
    edit_profile("expanded", enabled=False)
    assert client.chat({**HELLO, "profile": "expanded"}).status == 200
    assert settled()[0].profile == "balanced"


@on_sqlite
def test_with_balanced_off_too_the_chat_is_paused_for_them(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile
) -> None:
    edit_profile("expanded", enabled=False)
    edit_profile("balanced", enabled=False)
    for profile in ("expanded", "balanced", "unknown"):
        answer = client.chat({**HELLO, "profile": profile})
        assert (answer.status, answer.json["code"], answer.json["error"]) == (503, "paused", PAUSED)
    assert upstream.requests == []
    assert client.chat({**HELLO, "profile": "constrained"}).status == 200


@on_sqlite
def test_switching_off_a_forced_profile_pauses_whom_it_is_forced_on(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile
) -> None:
    """They were not to have any other."""
    Account.objects.create(name="ip:127.0.0.1", profile=edit_profile("vip", enabled=False))
    assert client.chat({**HELLO, "profile": "expanded"}).json["code"] == "paused"
    assert upstream.requests == []


# In force.


def test_a_saved_edit_is_in_force_at_once(client: Client, upstream: FakeUpstream, edit_profile: EditProfile) -> None:
    for allowance in (100, 200, 300):
        edit_profile(max_output_tokens=allowance)
        client.chat()
        assert upstream.requests[-1].json["max_tokens"] == allowance


@on_sqlite
def test_a_deleted_row_is_forgotten_at_once(client: Client, upstream: FakeUpstream, edit_profile: EditProfile) -> None:
    row = edit_profile(max_output_tokens=100)
    client.chat()
    row.delete()
    client.chat()
    assert [request.json["max_tokens"] for request in upstream.requests] == [100, 400]


def test_an_edit_that_tells_nobody_is_in_force_within_five_seconds(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, database: str
) -> None:
    """``update`` sends no signal; nor does another process, or a hand in the database's shell."""
    edit_profile(max_output_tokens=100)
    client.chat()
    Profile.objects.using(database).update(max_output_tokens=200, daily_token_limit=12_345)
    eventually(lambda: client.usage()["dailyTokenLimit"] == 12_345, seconds=5)
    client.chat()
    assert [request.json["max_tokens"] for request in upstream.requests] == [100, 200]


@on_sqlite
def test_a_pause_that_tells_nobody_is_in_force_within_five_seconds(client: Client) -> None:
    client.chat()
    with sqlite3.connect(connections["default"].settings_dict["NAME"]) as other_process:
        other_process.execute(
            "INSERT INTO chatnest_account (name, paused, daily_token_limit, profile_id) VALUES ('site', 1, NULL, NULL)"
        )
    other_process.close()
    eventually(lambda: client.request("GET", "/api/usage").status == 503, seconds=5)


@on_sqlite
def test_an_edit_that_is_rolled_back_never_was(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile
) -> None:
    edit_profile(max_output_tokens=100)
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        edit_profile(max_output_tokens=200)
        raise ZeroDivisionError
    client.chat()
    assert upstream.requests[0].json["max_tokens"] == 100


@on_sqlite
def test_an_answer_that_has_begun_keeps_the_terms_that_it_was_asked_under(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, settled: Settled
) -> None:
    edit_profile(system_prompt="Be brief.")
    upstream.replies(Reply("Hi", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
        edit_profile(enabled=False, max_output_tokens=1)
        upstream.release()
        assert dict(stream.rest())["done"] == ""
    assert settled()[0].outcome == "completed"


@on_sqlite
def test_many_requests_at_once_read_the_rows_once(database: str, edit_profile: EditProfile) -> None:
    edit_profile()
    reads = 0
    read = Policy.read.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Policy]) -> Policy:
        nonlocal reads
        reads += 1
        return read(cls)  # type: ignore[no-any-return]

    async def story() -> None:
        await asyncio.gather(*[batcher.policy() for _ in range(100)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "read", classmethod(counted))
        asyncio.run(story())
    assert reads == 1

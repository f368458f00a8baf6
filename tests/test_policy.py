"""An operator edits profiles: clamped, switched off, deleted; and in force within seconds, whoever wrote the row."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from importlib import import_module
from typing import Any

import pytest
from django.apps import apps
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.db import IntegrityError, connections, transaction
from django.db.models import ProtectedError

from chatnest import policy
from chatnest.errors import Forbidden, NotAuthenticated
from chatnest.ledger.batcher import batcher
from chatnest.limits import DEFAULT_PROFILES, FIELDS
from chatnest.models import Account, Profile
from chatnest.policy import FRESH_SECONDS, Policy
from chatnest.testing import FakeUpstream, Reply

from .bookkeeping import busy, waiting
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
    turns = [{"role": role, "content": "Hello!"} for role in ("user", "assistant")]
    body = {"messages": [*turns * 15, turns[0]]}
    assert client.chat(body).status == 200
    sent = upstream.requests[0].json
    assert (sent["max_tokens"], sent["temperature"]) == (4096, 2)
    assert len(sent["messages"]) == 19, "of the last 20, the first is an answer to none"
    assert client.usage()["dailyTokenLimit"] == 500_000
    large = {"messages": [{"role": "user", "content": "word " * 12_000}]}
    assert client.chat(large).json["code"] == "request_too_large"
    assert settled()[0].tokens == 19 * 7 + 3 + 4096


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


# Missing.


def taken_away(database: str, *names: str) -> None:
    """By a hand in the database's shell: chatnest itself does not do it."""
    Profile.objects.using(database).filter(name__in=names)._raw_delete(database)
    batcher.forget_policy()


def test_a_profile_whose_row_is_missing_is_one_that_is_off(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, database: str, settled: Settled
) -> None:
    """No limits of the code stand in for it: its operator had cut it to less."""
    edit_profile("balanced", daily_token_limit=1000)
    taken_away(database, "expanded")
    assert client.chat({**HELLO, "profile": "expanded"}).data("usage")["remainingToday"] == 1000 - 14
    taken_away(database, "balanced")
    for name in ("balanced", "expanded"):
        assert client.chat({**HELLO, "profile": name}).json["code"] == "paused"
    assert client.chat({**HELLO, "profile": "constrained"}).status == 200
    assert [row.profile for row in settled()] == ["balanced", "constrained"]


# As delivered.

DELIVERED = """
                        constrained  balanced  expanded
    max_output_tokens          150       400      3000
    max_messages                 4         6        12
    temperature                0.5       0.7       0.8
    daily_token_limit        30000     70000    200000
    max_tokens_per_request    2048      2048     12000
    rate_max_requests           15        30        60
    rate_window_seconds         60        60        60
    max_concurrent_streams       2         4         8
    enabled                   True      True      True
    audience              everyone  everyone  everyone
    provider               default   default   default
    model              gpt-4o-mini gpt-4o-mini gpt-4o-mini
"""


def delivered(database: str) -> bool:
    names, *lines = map(str.split, DELIVERED.strip().splitlines())
    typed = {name: {field: values[n] for field, *values in lines} for n, name in enumerate(names)}
    rows = {row.name: row for row in Profile.objects.using(database)}
    accounts = set(Account.objects.using(database).values_list("name", "paused", "daily_token_limit", "profile"))
    return accounts == {("site", False, None, None), ("anonymous", False, None, None)} and typed == {
        name: {field: str(getattr(row, field)) for field, *_ in lines} for name, row in rows.items()
    }


@pytest.mark.parametrize("run", [1, 2])
def test_every_test_finds_the_rows_as_delivered(database: str, run: int) -> None:
    """The first by the migrations; those after it, as in a site's own TransactionTestCase, after a flush."""
    assert delivered(database)


def test_the_migration_delivers_the_same(database: str) -> None:
    migration = import_module("chatnest.migrations.0002_delivered_rows")
    taken_away(database, *DEFAULT_PROFILES)
    Account.objects.using(database).all().delete()
    with connections[database].schema_editor() as editor:
        migration.create_profiles(apps, editor)
        migration.create_accounts(apps, editor)
    assert delivered(database)


def test_migrating_again_leaves_what_operators_edited_and_took_away(database: str, edit_profile: EditProfile) -> None:
    edit_profile("balanced", daily_token_limit=1000)
    taken_away(database, "expanded")
    call_command("migrate", database=database, verbosity=0)
    limits = dict(Profile.objects.using(database).values_list("name", "daily_token_limit"))
    assert limits == {"constrained": 30_000, "balanced": 1000}


@pytest.mark.parametrize("name", DEFAULT_PROFILES)
def test_the_three_profiles_cannot_be_deleted(database: str, name: str) -> None:
    rows = Profile.objects.using(database)
    with pytest.raises(ProtectedError, match=f"{name} cannot be deleted; it can be switched off"):
        rows.get(name=name).delete()
    with pytest.raises(ProtectedError), transaction.atomic(using=database):
        rows.all().delete()
    assert delivered(database)


@on_sqlite
def test_the_three_profiles_cannot_be_renamed(database: str, edit_profile: EditProfile) -> None:
    for row in Profile.objects.using(database):
        row.full_clean()
        row.name = "standard"
        with pytest.raises(ValidationError, match="it keeps it"):
            row.full_clean()
    other = edit_profile("other")
    other.name = "another"
    other.full_clean()
    other.delete()


# Who may choose.


@on_sqlite
@pytest.mark.parametrize(
    ("audiences", "strangers", "users"),
    [
        ({}, ["constrained", "balanced", "expanded"], ["constrained", "balanced", "expanded"]),
        ({"expanded": "users"}, ["constrained", "balanced", "balanced"], ["constrained", "balanced", "expanded"]),
        (
            {"expanded": "users", "balanced": "users"},
            ["constrained", "constrained", "constrained"],
            ["constrained", "balanced", "expanded"],
        ),
        (
            {"expanded": "users", "balanced": "forced"},
            ["constrained", "constrained", "constrained"],
            ["constrained", "constrained", "expanded"],
        ),
        # The larger one that everybody may choose is no smaller one's stand-in.
        ({"constrained": "users"}, ["log in", "balanced", "expanded"], ["constrained", "balanced", "expanded"]),
        ({"constrained": "forced"}, ["forbidden", "balanced", "expanded"], ["forbidden", "balanced", "expanded"]),
        (dict.fromkeys(DEFAULT_PROFILES, "users"), ["log in"] * 3, ["constrained", "balanced", "expanded"]),
        (dict.fromkeys(DEFAULT_PROFILES, "forced"), ["forbidden"] * 3, ["forbidden"] * 3),
        ({"balanced": "whoever a hand in the shell meant"}, ["constrained", "constrained", "expanded"], None),
    ],
    ids=str,
)
def test_a_profile_is_for_its_audience_and_others_get_the_next_smaller_one(
    database: str, audiences: dict[str, str], strangers: list[str], users: list[str] | None
) -> None:
    for name, audience in audiences.items():
        Profile.objects.filter(name=name).update(audience=audience)

    def gets(*accounts: str) -> list[str]:
        return [chosen((*accounts, "site"), asked) for asked in DEFAULT_PROFILES]

    def chosen(accounts: tuple[str, ...], asked: str) -> str:
        try:
            return Policy.read(accounts).terms(accounts, asked).profile
        except NotAuthenticated:
            return "log in"
        except Forbidden:
            return "forbidden"

    assert gets("ip:192.0.2.1") == strangers
    for payer in ("user:7", "key:3", "team:blue"):
        assert gets(payer) == (users or strangers)


@on_sqlite
def test_a_stranger_is_asked_to_log_in_where_all_is_for_users(client: Client, upstream: FakeUpstream) -> None:
    Profile.objects.update(audience="users")
    answer = client.chat()
    assert (answer.status, answer.json["code"]) == (401, "not_authenticated")
    assert upstream.requests == []


@on_sqlite
def test_whom_an_account_gives_a_profile_has_it_whoever_may_choose_it(
    client: Client, edit_profile: EditProfile, settled: Settled
) -> None:
    Account.objects.create(name="ip:127.0.0.1", profile=edit_profile("vip", audience="forced"))
    assert client.chat({**HELLO, "profile": "constrained"}).status == 200
    assert settled()[0].profile == "vip"


@on_sqlite
def test_a_profile_that_is_off_is_no_way_into_one_that_is_for_others(
    client: Client, edit_profile: EditProfile, settled: Settled
) -> None:
    edit_profile("constrained", enabled=False)
    edit_profile("balanced", audience="users")
    assert client.chat({**HELLO, "profile": "constrained"}).json["code"] == "paused"


# The provider.


@on_sqlite
def test_a_profile_names_the_provider_that_its_model_is_asked_of(
    database: str, edit_profile: EditProfile, configure: Configure
) -> None:
    configure(PROVIDERS={"local": {"BASE_URL": "http://127.0.0.1:8080/v1"}})
    edit_profile("constrained", provider="local").full_clean()
    assert Policy.read().terms(PAYER, "constrained").provider == "local"
    assert Policy.read().terms(PAYER, "balanced").provider == "default"


@on_sqlite
def test_a_provider_that_the_settings_do_not_have_is_refused(database: str, edit_profile: EditProfile) -> None:
    with pytest.raises(ValidationError, match="no provider of this name"):
        edit_profile("constrained", provider="local").full_clean()


# Switched off.


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
def test_a_deleted_row_is_forgotten_at_once(client: Client) -> None:
    row = Account.objects.create(name="ip:127.0.0.1", paused=True)
    assert client.chat().json["code"] == "paused"
    row.delete()
    assert client.chat().status == 200


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
        other_process.execute("UPDATE chatnest_account SET paused = 1 WHERE name = 'site'")
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


def statements(database: str) -> list[str]:
    """What the ledger's thread asks the database from now on."""
    asked: list[str] = []

    def listen(execute: Any, sql: str, *args: Any) -> Any:
        asked.append(sql)
        return execute(sql, *args)

    asyncio.run(batcher.query(lambda: connections[database].execute_wrappers.append(listen)))
    return asked


def policies(*payers: str) -> list[Policy]:
    """As many requests at once find them, each of another payer."""

    async def story() -> list[Policy]:
        async with busy():  # or the first are read for while the last have yet to ask
            asking = await waiting(*[batcher.policy((payer, "anonymous", "site")) for payer in payers])
        return await asyncio.gather(*asking)

    return asyncio.run(story())


def test_many_requests_at_once_have_their_rows_read_in_one_statement(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "FRESH_SECONDS", 3600)  # however slow the machine
    Account.objects.using(database).bulk_create(
        Account(name=f"ip:192.0.2.{n}", daily_token_limit=n) for n in range(0, 200, 50)
    )
    asked = statements(database)
    found = policies(*(f"ip:192.0.2.{n}" for n in range(200)))
    for n, one in enumerate(found):
        payer = {f"ip:192.0.2.{n}"} if n % 50 == 0 else set()
        assert one.accounts.keys() == {"site", "anonymous", *payer}, "its own and nobody else's"
        assert all(one.accounts[name].daily_token_limit == n for name in payer)
    assert sum('"chatnest_account"' in sql for sql in asked) == 2, "the names, and the rows that there are"
    assert len(asked) == 5, "these, profiles, prices and what is known of models"
    policies(*(f"ip:192.0.2.{n}" for n in range(200)))
    assert len(asked) == 5, "that there is no row is remembered too"


def test_more_names_than_a_statement_should_have_are_read_in_several(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "MOST_NAMES", 20)
    Account.objects.using(database).create(name="ip:192.0.2.7", paused=True)
    found = policies(*(f"ip:192.0.2.{n}" for n in range(100)))
    assert [n for n, one in enumerate(found) if len(one.accounts) == 3] == [7]


@on_sqlite
def test_what_is_remembered_is_bounded_and_no_pause_is_lost_by_it(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "MOST_ACCOUNTS", 5)
    Account.objects.create(name="ip:192.0.2.7", paused=True)
    for _ in range(3):
        for n in range(10):
            (found,) = policies(f"ip:192.0.2.{n}")
            assert ("ip:192.0.2.7" in found.accounts) == (n == 7)
    assert len(batcher._policies._memory._accounts) == 5


@on_sqlite
def test_old_readings_are_let_go(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policies(*(f"ip:192.0.2.{n}" for n in range(100)))
    later = time.monotonic() + FRESH_SECONDS
    monkeypatch.setattr(policy.time, "monotonic", lambda: later)
    policies("ip:192.0.2.1")
    assert batcher._policies._memory._accounts.keys() == {"ip:192.0.2.1", "anonymous", "site"}


@on_sqlite
def test_what_is_read_while_an_operator_saves_is_not_remembered(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows may be those of before; whoever asks next gets those of after."""
    read = policy.read_accounts

    def slow(names: Any) -> Any:
        rows = read(names)
        monkeypatch.setattr(policy, "read_accounts", read)
        Account.objects.create(name="ip:192.0.2.7", paused=True)
        return rows

    monkeypatch.setattr(policy, "read_accounts", slow)
    assert [len(policies("ip:192.0.2.7")[0].accounts) for _ in range(2)] == [2, 3]

"""The record of changes: who did what to whom, by whichever way, with what was there before."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from django.core.management import call_command
from django.db import transaction
from django.db.models import F, ProtectedError
from django.utils import timezone

from chatnest import changes
from chatnest.conf import now
from chatnest.ledger import audit
from chatnest.models import Account, Calibration, Change, DailyUsage, Price, Profile
from chatnest.proofs import prove

from .bookkeeping import ask, do, used
from .conftest import on_sqlite


@pytest.fixture(autouse=True)
def empty(database: str) -> None:
    """Nobody has changed anything yet."""
    assert not Change.objects.using(database).exists(), "what migrations and flushes deliver is nobody's change"


def told(database: str, *fields: str) -> list[tuple[Any, ...]]:
    """The changes, the first one first."""
    fields = fields or ("kind", "subject", "field", "old", "new")
    return list(Change.objects.using(database).order_by("id").values_list(*fields))


def test_a_stop_says_who_and_why(database: str) -> None:
    site = Account.objects.using(database).get(name="site")
    site.paused = True
    before = now()
    with changes.acting("ada", "the model insults people"):
        site.save()
    row = Change.objects.using(database).get()
    assert (row.kind, row.subject, row.field, row.old, row.new) == ("account", "site", "paused", "no", "yes")
    assert (row.actor, row.reason) == ("ada", "the model insults people")
    assert before <= row.at <= now()


def test_each_value_that_differs_is_told_as_people_read_it(database: str) -> None:
    balanced = Profile.objects.using(database).get(name="balanced")
    balanced.daily_token_limit = 1_000_000
    balanced.daily_money_limit = Decimal("2.50")
    balanced.temperature = None
    balanced.fallback = Profile.objects.using(database).get(name="expanded")
    balanced.save()
    assert sorted(told(database, "subject", "field", "old", "new")) == [
        ("balanced", "daily_money_limit", "", "2.5"),
        ("balanced", "daily_token_limit", "70000", "1000000"),
        ("balanced", "fallback", "", "expanded"),
        ("balanced", "temperature", "0.7", ""),
    ]
    balanced.save()
    assert len(told(database)) == 4, "nothing has changed since"


def test_what_was_typed_as_text_or_is_reckoned_by_the_database_is_told_as_stored(database: str) -> None:
    row: Any = Account.objects.using(database).create(name="user:7", daily_token_limit="500")
    row.daily_token_limit = F("daily_token_limit") + 1
    row.save()
    row.refresh_from_db()
    row.daily_token_limit = "501"
    row.save()
    assert told(database, "old", "new") == [("", "500"), ("500", "501")]


def test_only_the_fields_that_are_saved_count(database: str) -> None:
    site = Account.objects.using(database).get(name="site")
    site.paused, site.daily_token_limit = True, 5
    site.save(update_fields=["paused"])
    loaded = Account.objects.using(database).only("name").get(name="site")
    loaded.save()
    assert told(database, "field") == [("paused",)]


def test_a_new_row_changes_what_none_meant(database: str) -> None:
    Account.objects.using(database).create(name="user:1")
    assert told(database) == [], "an account without decisions is as one without a row"
    balanced = Profile.objects.using(database).get(name="balanced")
    day = date(2026, 11, 22)
    Account.objects.using(database).create(name="user:2", profile=balanced, extra_tokens=5, extra_day=day)
    Price.objects.using(database).create(model="gpt-4o", input=Decimal("2.5"), output=Decimal(10))
    assert told(database) == [
        ("account", "user:2", "profile", "", "balanced"),
        ("account", "user:2", "extra_tokens", "", "5"),
        ("account", "user:2", "extra_day", "", "2026-11-22"),
        ("price", "default: gpt-4o", "input", "", "2.5"),
        ("price", "default: gpt-4o", "output", "", "10"),
    ]


def test_a_new_profile_was_off_before(database: str) -> None:
    delivered = Profile.objects.using(database).get(name="balanced")
    Profile.objects.using(database).create(name="team", **{name: getattr(delivered, name) for name in _LIMITS})
    assert ("profile", "team", "enabled", "no", "yes") in told(database)
    assert ("profile", "team", "max_messages", "", "6") in told(database)


_LIMITS = (
    *("max_output_tokens", "max_messages", "max_tokens_per_request", "daily_token_limit"),
    *("rate_max_requests", "rate_window_seconds", "max_concurrent_streams"),
)


def test_what_is_deleted_is_told_with_what_it_said(database: str) -> None:
    Account.objects.using(database).create(name="user:2", paused=True, daily_token_limit=5)
    Calibration.objects.using(database).create(model="m", provider="p", reports=3, updated_at=timezone.now())
    Change.objects.using(database).all().delete()
    with changes.acting("ada"):
        Account.objects.using(database).filter(name="user:2").delete()
        Calibration.objects.using(database).get().delete()
    first, second = told(database, "actor", "kind", "subject", "field", "old", "new")
    assert first == ("ada", "account", "user:2", "deleted", "daily_token_limit: 5, paused: yes", "")
    assert second[:4] == ("ada", "calibration", "p: m", "deleted")
    assert second[4].startswith("reports: 3, ")


def test_what_could_not_be_deleted_was_not(database: str) -> None:
    with pytest.raises(ProtectedError):
        Profile.objects.using(database).get(name="balanced").delete()
    assert told(database) == []


def test_what_is_rolled_back_did_not_happen(database: str) -> None:
    with suppress(ZeroDivisionError), transaction.atomic(using=database):
        Account.objects.using(database).update_or_create(name="site", defaults={"paused": True})
        assert told(database, "field") == [("paused",)]
        raise ZeroDivisionError
    assert told(database) == []


def test_of_a_long_prompt_the_difference_is_told(database: str) -> None:
    balanced = Profile.objects.using(database).get(name="balanced")
    balanced.system_prompt = "Be kind. " * 100 + "Answer in English."
    balanced.save()
    balanced.system_prompt = "Be kind. " * 100 + "Answer in Latin."
    balanced.save()
    (_, first), (old, new) = told(database, "old", "new")
    assert first == ("Be kind. " * 100)[:199] + "…"
    assert old == "… Be kind. Answer in English."
    assert new == "… Be kind. Answer in Latin."


def test_a_renamed_profile_is_found_by_the_name_it_had(database: str) -> None:
    delivered = Profile.objects.using(database).get(name="balanced")
    team = Profile(name="team", **{name: getattr(delivered, name) for name in _LIMITS})
    team.save(using=database)
    team.name = "crew"
    team.save()
    assert told(database)[-1] == ("profile", "team", "name", "team", "crew")


def test_what_is_no_save_can_be_told(database: str) -> None:
    with changes.acting("x" * 300, "y" * 300):
        changes.record("answer", "user:7", "stopped", None, datetime(2026, 11, 22, 12, 30))
    assert told(database) == [("answer", "user:7", "stopped", "", "2026-11-22T12:30:00")]
    assert told(database, "actor", "reason") == [("x" * 200, "y" * 200)]


def test_who_acts_is_nobody_else_and_nobody_afterwards(database: str) -> None:
    seen = []
    with changes.acting("ada"):
        with changes.acting("bob", "for her"):
            seen.append(changes.actor())
        thread = Thread(target=lambda: seen.append(changes.actor()))
        thread.start()
        thread.join()
        seen.append(changes.actor())
    seen.append(changes.actor())
    assert seen == [("bob", "for her"), ("", ""), ("ada", ""), ("", "")]


@on_sqlite
def test_a_fixture_brings_the_record_that_it_has(database: str, tmp_path: Path) -> None:
    with changes.acting("ada"):
        Account.objects.update_or_create(name="site", defaults={"paused": True})
    dump = tmp_path / "dump.json"
    call_command("dumpdata", "chatnest", output=str(dump))
    Account.objects.all().update(paused=False)
    call_command("loaddata", str(dump), verbosity=0)
    assert Account.objects.get(name="site").paused
    assert told(database, "actor", "field") == [("ada", "paused")]


# Proofs


def test_a_proof_is_recorded_with_what_it_found(database: str) -> None:
    do(used(do(ask()), 50))
    usage = DailyUsage.objects.using(database)
    usage.filter(account="site").update(tokens_used=2000)
    heard: list[str] = []
    with changes.acting("ada"):
        found = prove(progress=heard.append)
    assert [str(one.field) for one in found] == ["tokens_used"]
    assert len(heard) == 1
    proofs = Change.objects.using(database).filter(kind="proof").order_by("pk")
    stored = proofs.get()
    assert (stored.subject, stored.old, stored.new, stored.actor) == ("ledger", "1", "1", "ada")
    assert re.fullmatch(r"1 days in \d\.\d s", stored.reason)
    assert [one.repaired for one in prove(repair=True)] == [True]
    assert prove() == []
    assert [(one.old, one.new) for one in proofs] == [("1", "1"), ("1", "0"), ("0", "0")]
    assert audit.verify() == []
    assert proofs.count() == 3, "verify by itself records nothing"

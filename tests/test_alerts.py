"""What operators are mailed: a budget runs out, a provider refuses the key. No stream waits for it, or breaks by it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import django
import openai
import pytest
from django.core import mail
from django.core.management import get_commands
from django.db import OperationalError, connections
from django.urls import clear_url_caches
from freezegun import freeze_time

from chatnest import alerts
from chatnest.alerts import tell_if_misconfigured
from chatnest.errors import DailyBudgetExceeded, UpstreamMisconfigured, UpstreamRejected
from chatnest.ledger.batcher import batcher
from chatnest.models import Calibration
from chatnest.signals import announcer, provider_refused, refused
from chatnest.testing import SECRET, FakeUpstream, Reply

from .bookkeeping import ask, do, used
from .client import Client
from .conftest import OPERATORS, Configure, eventually, on_sqlite
from .test_fallback import second, two  # noqa: F401 - fixtures
from .test_holds import a_task
from .test_signals import Hear, hear  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def _operators(settings: Any) -> Iterator[None]:
    settings.ADMINS = OPERATORS
    alerts._look_at.clear()
    mail.outbox.clear()
    yield
    announcer.close()


def use(tokens: int, **limits: int) -> None:
    """An answer of so many tokens under budgets of these limits, the payer's among them."""
    do(used(do(ask(budgets={"user:1": 10**6, **limits})), tokens))


def mailed() -> list[str]:
    """The subjects of all mails, once no more is to come."""
    batcher.close()
    announcer.close()
    return [message.subject.removeprefix("[Django] ") for message in mail.outbox]


def commands(text: str) -> list[str]:
    return re.findall(r"python manage\.py (\w+)", text)


# Budgets.


def test_the_site_is_mailed_about_at_80_and_100_percent(database: str) -> None:
    with freeze_time("2026-03-02 12:00:00"):
        use(5_000, site=10_000)
        assert mailed() == []  # half is no alarm
        use(3_100, site=10_000)
        assert mailed() == ["Chat: 80 % of the budget of site is used"]
        use(1_000, site=10_000)
        with pytest.raises(DailyBudgetExceeded):  # 900 are left
            do(ask(budgets={"site": 10_000}, prompt_tokens=900))
        assert mailed()[1:] == ["Chat: 100 % of the budget of site is used"]
    nearly, full = mail.outbox
    assert nearly.to == full.to == ["grace@example.com"]
    assert "The whole site has used 8,100 of 10,000 tokens of today." in nearly.body
    assert "When all is used, they are refused until the next day begins, at 2026-03-03 00:00 UTC." in nearly.body
    assert "It is full: they are refused until the next day begins, at 2026-03-03 00:00 UTC." in full.body
    assert "up to SITE_DAILY_TOKEN_LIMIT of the settings" in full.body
    assert commands(full.body) == ["chatnest_grant", "chatnest_usage", "chatnest_stop"]
    assert get_commands().keys() >= set(commands(full.body))
    assert full.body.endswith("In the admin: /admin/chatnest/usage/\n")


def test_strangers_are_and_a_single_user_is_not(database: str) -> None:
    use(900, site=10**6, anonymous=1_000)
    do(used(do(ask(budgets={"user:2": 1_000, "site": 10**6})), 950))
    assert mailed() == ["Chat: 80 % of the budget of anonymous is used"]
    (told,) = mail.outbox
    assert "All visitors without an account together have used 900 of 1,000 tokens of today." in told.body
    assert "python manage.py chatnest_pause anonymous" in told.body


def test_a_day_is_told_to_end_where_the_budget_does(database: str, configure: Configure) -> None:
    configure(TIME_ZONE="Asia/Tokyo")
    with freeze_time("2026-03-02 12:00:00"):
        use(900, site=1_000)
        mailed()
    assert "at 2026-03-03 00:00 JST." in mail.outbox[0].body


@pytest.mark.parametrize("how", ["ALERTS", "ADMINS"])
def test_nobody_is_mailed_who_does_not_want_to_be(database: str, configure: Configure, settings: Any, how: str) -> None:
    if how == "ALERTS":
        configure(ALERTS=False)
    else:
        settings.ADMINS = []
    use(900, site=1_000)
    misconfigured()
    assert mailed() == []


def test_a_site_without_an_admin_is_mailed_without_its_address(database: str, settings: Any) -> None:
    settings.ROOT_URLCONF = "chatnest.urls"
    clear_url_caches()
    use(900, site=1_000)
    mailed()
    assert "admin" not in mail.outbox[0].body


# The provider.


def misconfigured(model: str = "gpt-4o-mini", detail: str = "wrong key") -> None:
    tell_if_misconfigured(ask(model=model).held(), UpstreamMisconfigured(detail=detail))


def test_a_wrong_key_is_mailed_at_once_and_without_it(client: Client, upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(401, message=f"Incorrect API key provided: {SECRET}"), Reply.refuse(401))
    for _ in range(2):
        assert client.chat().data("error")["code"] == "upstream_misconfigured"
    assert mailed() == ["Chat: the provider default refuses requests (wrong key)"]
    body = mail.outbox[0].body
    assert "The provider default does not answer for the model gpt-4o-mini: wrong key." in body
    assert SECRET not in body and "sk-" not in body and "Incorrect" not in body
    assert commands(body) == ["chatnest_doctor"]


def test_credit_that_is_used_up_in_the_middle_of_an_answer(client: Client, upstream: FakeUpstream) -> None:
    upstream.replies(Reply("He", {"error": {"code": "insufficient_quota", "message": "Pay."}}))
    assert client.chat().events[-1] == "error"
    assert mailed() == ["Chat: the provider default refuses requests (quota used up)"]


@pytest.mark.usefixtures("two")
def test_a_key_that_a_fallback_hides_from_readers(client: Client, upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(401))
    assert client.chat().events[-1] == "done"
    assert mailed() == ["Chat: the provider default refuses requests (wrong key)"]


def test_the_sites_own_call_is_refused(upstream: FakeUpstream, database: str) -> None:
    upstream.replies(Reply.refuse(404))
    with pytest.raises(openai.NotFoundError):
        a_task(upstream)
    assert mailed() == ["Chat: the provider default refuses requests (unknown model)"]


@on_sqlite
def test_what_no_operator_can_mend_is_not_mailed(client: Client, upstream: FakeUpstream) -> None:
    upstream.replies(Reply.refuse(400), Reply.refuse(429), Reply.refuse(503))
    for _ in range(3):
        client.chat()
    tell_if_misconfigured(ask().held(), UpstreamRejected())
    assert mailed() == []


def test_many_processes_tell_once_an_hour_for_each_model(database: str, hear: Hear) -> None:  # noqa: F811
    heard = hear(provider_refused)
    problem = UpstreamMisconfigured(detail="wrong key")
    start = threading.Barrier(8)

    def a_process(model: str) -> None:
        start.wait()
        alerts._tell_once_an_hour("default", model, problem)

    with freeze_time("2026-03-02 12:00:00") as clock:
        threads = [threading.Thread(target=with_own_connection, args=(database, a_process, m)) for m in "ab" * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = [heard.get(timeout=5) for _ in range(2)]
        assert {one["model"] for one in told} == {"a", "b"}
        assert {(one["provider"], one["code"], one["detail"]) for one in told} == {
            ("default", "upstream_misconfigured", "wrong key")
        }
        clock.tick(timedelta(minutes=59))
        alerts._tell_once_an_hour("default", "a", problem)
        clock.tick(timedelta(minutes=2))
        alerts._tell_once_an_hour("default", "a", problem)
        assert heard.get(timeout=5)["model"] == "a"
        assert heard.empty()
    assert len(mailed()) == 3


def with_own_connection(database: str, work: Any, *arguments: Any) -> None:
    try:
        work(*arguments)
    finally:
        connections[database].close()


def test_what_a_model_has_taught_stays(database: str, known_model: Calibration) -> None:
    misconfigured()
    mailed()
    known_model.refresh_from_db()
    assert known_model.reports == 1 and known_model.refused_at


@on_sqlite
def test_a_process_looks_once_a_minute(database: str) -> None:
    with (
        freeze_time("2026-03-02 12:00:00") as clock,
        mock.patch.object(alerts.batcher, "later") as later,
    ):
        for _ in range(100):
            misconfigured()
        assert later.call_count == 1
        misconfigured("another model")
        clock.tick(61)
        misconfigured()
        assert later.call_count == 3


# Failures.


@on_sqlite
def test_a_mail_server_that_is_down_is_a_line_in_the_log(
    client: Client,
    upstream: FakeUpstream,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    hear: Hear,  # noqa: F811
) -> None:
    backend = "django.core.mail.backends.smtp.EmailBackend"
    if django.VERSION >= (6, 1):
        settings.MAILERS = {"default": {"BACKEND": backend, "OPTIONS": {"host": "127.0.0.1", "port": 1}}}
    else:
        settings.EMAIL_BACKEND, settings.EMAIL_HOST, settings.EMAIL_PORT = backend, "127.0.0.1", 1
    heard = hear(refused)
    upstream.replies(Reply.refuse(401), Reply("Hello"))
    assert client.chat().data("error")["code"] == "upstream_misconfigured"
    eventually(lambda: "mail_refusal" in caplog.text)
    assert client.chat().events[-1] == "done"
    client.chat(b"{}")
    assert heard.get(timeout=5)["code"] == "invalid_messages"  # who else listens is told


@on_sqlite
def test_a_database_that_is_away_is_asked_again_a_minute_later(
    client: Client, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies(Reply.refuse(401), Reply.refuse(401))
    with mock.patch.object(alerts, "Calibration", **{"objects.using.side_effect": OperationalError("away")}):
        assert client.chat().data("error")["code"] == "upstream_misconfigured"
        eventually(lambda: "The database does not answer" in caplog.text)
    alerts._look_at.clear()  # a minute later
    client.chat()
    assert mailed() == ["Chat: the provider default refuses requests (wrong key)"]

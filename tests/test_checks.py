"""System checks: what a developer mistyped is told by name before anything is served."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib import metadata
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.checks import CheckMessage, run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections, router
from django.db.backends.postgresql import psycopg_any
from django.db.models import Model
from django.test import override_settings

from chatnest import checks, tokens
from chatnest.conf import NAMES, Settings
from chatnest.conf import settings as chatnest_settings
from chatnest.ledger.batcher import batcher
from chatnest.models import Profile

from .conftest import OPERATORS, Configure, EditProfile
from .test_accounts import by_tenant


def found(databases: list[str] | None = None) -> list[CheckMessage]:
    messages = run_checks(databases=databases)
    ours = [message for message in messages if (message.id or "").startswith("chatnest.")]
    return sorted(ours, key=lambda message: str(message.id))


def ids() -> list[str | None]:
    return [message.id for message in found()]


def test_the_tests_own_settings_have_nothing_wrong() -> None:
    assert found() == []


def test_the_defaults_have_nothing_wrong_but_a_missing_key(settings: Any) -> None:
    del settings.CHATNEST
    (message,) = found()
    assert message.id == "chatnest.W002"
    assert message.msg == "CHATNEST has no OPENAI_API_KEY: OpenAI will refuse every chat."


def test_another_provider_may_need_no_key(configure: Configure) -> None:
    configure(OPENAI_API_KEY="", OPENAI_BASE_URL="http://127.0.0.1:11434/v1")
    assert found() == []


@pytest.mark.parametrize("typed", [None, 5, "SITE_DAILY_TOKEN_LIMIT", ["SITE_DAILY_TOKEN_LIMIT"], ()], ids=repr)
def test_the_settings_must_be_a_dict(settings: Any, typed: Any) -> None:
    settings.CHATNEST = typed
    assert ids() == ["chatnest.E001"]


@pytest.mark.parametrize("name", ["SITE_DAILY_LIMIT", "site_daily_token_limit", "OPENAI_KEY", "", 7, None])
def test_a_key_that_is_no_setting_is_named(configure: Configure, settings: Any, name: Any) -> None:
    settings.CHATNEST = {**settings.CHATNEST, name: 1000}
    (message,) = found()
    assert (message.id, message.msg) == ("chatnest.E002", f"CHATNEST[{name!r}] is not a setting.")
    assert "SITE_DAILY_TOKEN_LIMIT" in (message.hint or "")


COUNTS = ["SITE_DAILY_TOKEN_LIMIT", "TRUSTED_PROXIES", "UPSTREAM_MAX_RETRIES"]
POSITIVE_COUNTS = ["MAX_STREAMS_PER_PROCESS", "MAX_BODY_BYTES", "MIN_OUTPUT_TOKENS"]
MONEY = ["SITE_DAILY_MONEY_LIMIT", "SITE_MONTHLY_MONEY_LIMIT"]
SECONDS = ["HEARTBEAT_SECONDS", "MAX_STREAM_SECONDS", "FIRST_TOKEN_SECONDS", "GAP_SECONDS", "LEASE_SECONDS"]
FLAGS = ["ALERTS", "ALLOW_ANONYMOUS", "CLIENT_SYSTEM_MESSAGES", "SHOW_REASONING"]
TEXTS = ["OPENAI_API_KEY", "DATABASE_ALIAS"]
NO_TEXT = [None, 5, b"bytes", ["a"]]
NO_ADDRESS = [*NO_TEXT, "", "api.openai.com/v1", "ftp://example.com", "https://", "http://a:b", "http://[::1"]
NO_COUNT = [None, -1, 1.0, 1.5, "1", "", True, math.nan, math.inf, [1], b"1"]
WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in COUNTS for value in NO_COUNT),
    *((name, value) for name in POSITIVE_COUNTS for value in [0, *NO_COUNT]),
    *((name, value) for name in SECONDS for value in [None, 0, -1, "15", True, math.nan, math.inf, -math.inf, [15]]),
    *((name, value) for name in FLAGS for value in [None, 0, 1, "on", "False", ""]),
    *((name, value) for name in TEXTS for value in NO_TEXT),
    *(("OPENAI_BASE_URL", value) for value in NO_ADDRESS),
    *(("ANONYMOUS_DAILY_TOKEN_LIMIT", value) for value in NO_COUNT[1:]),
    *((name, value) for name in MONEY for value in [0.5, "five", "-1", "NaN", "Infinity", True, -1, "", [1], 10**12]),
    *(("CURRENCY", value) for value in [None, "usd", "€", "US", "DOLLARS", 5]),
    *(("PRICES", value) for value in [None, 5, "gpt-4o-mini", [{}]]),
    *(("PROVIDERS", value) for value in [None, 5, "azure", [{}]]),
    *((name, value) for name in ("PAYER", "PREPARE") for value in [5, ["path"], True]),
    *(("TIME_ZONE", value) for value in ["", "Mars/Olympus", "CET+1 or so", "/etc/passwd", "../UTC", "a\0b", 5]),
    *(("HARD_CAPS", value) for value in [None, 5, "max_messages", ["max_messages"], [("max_messages", 5)]]),
    *(("ON_DISCONNECT", value) for value in [None, "", "Abort", "close", 5, ["abort"]]),
    *(("MAX_TOKENS_PARAMETER", value) for value in [None, "", "max_output_tokens", 5]),
]


def test_every_setting_is_tried_with_wrong_values() -> None:
    assert {name for name, _ in WRONG} == NAMES


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda part: repr(part))
def test_a_wrong_value_is_named_and_never_served(configure: Configure, name: str, value: Any) -> None:
    configure(**{name: value})
    (message,) = found()
    assert message.id == "chatnest.E003"
    assert message.msg.startswith(f"CHATNEST[{name!r}] must be ")
    with pytest.raises(ImproperlyConfigured, match="must be"):
        getattr(chatnest_settings, name)


def test_a_wrong_key_is_not_shown(configure: Configure) -> None:
    """The provider's key, that is: a list of two of them is a mistake, and a secret."""
    configure(OPENAI_API_KEY=["sk-one", "sk-two"])
    (message,) = found()
    assert "sk-" not in message.msg


def test_several_mistakes_are_told_at_once(configure: Configure) -> None:
    configure(SITE_LIMIT=5, GAP_SECONDS="30", ON_DISCONNECT="stop")
    assert ids() == ["chatnest.E002", "chatnest.E003", "chatnest.E003"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SITE_DAILY_TOKEN_LIMIT", 0),
        ("ANONYMOUS_DAILY_TOKEN_LIMIT", 0),
        ("ANONYMOUS_DAILY_TOKEN_LIMIT", None),
        ("TRUSTED_PROXIES", 2),
        ("MAX_STREAMS_PER_PROCESS", 1),
        ("GAP_SECONDS", 0.5),
        ("PAYER", "tests.test_accounts.by_tenant"),
        ("PAYER", by_tenant),
        ("TIME_ZONE", "America/Argentina/Buenos_Aires"),
        ("HARD_CAPS", {}),
        ("HARD_CAPS", {"max_messages": 0, "temperature": 1.5, "max_output_tokens": 100}),
        ("ON_DISCONNECT", "drain"),
        ("MAX_TOKENS_PARAMETER", "max_completion_tokens"),
        ("DATABASE_ALIAS", "postgres"),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),  # no function's address, which differs by process
)
def test_a_right_value_is_in_force(configure: Configure, name: str, value: Any) -> None:
    configure(**{name: value})
    assert found() == []
    assert getattr(chatnest_settings, name) == value


def test_a_rule_for_payers_that_cannot_be_imported_is_named(configure: Configure) -> None:
    configure(PAYER="shop.billing.no_such_function")
    assert any("shop.billing.no_such_function" in message.msg for message in found())


@pytest.mark.parametrize("name", ["max_token", "MAX_MESSAGES", "model", ""])
def test_a_cap_that_is_no_limit_is_named(configure: Configure, name: str) -> None:
    configure(HARD_CAPS={name: 5})
    (message,) = found()
    assert (message.id, message.msg) == ("chatnest.E004", f"HARD_CAPS[{name!r}] is not a limit.")
    assert "max_output_tokens" in (message.hint or "")


@pytest.mark.parametrize("cap", [None, -1, "1000", 10.5, True, math.nan, math.inf, [5]], ids=repr)
def test_a_cap_that_is_no_number_is_named(configure: Configure, cap: Any) -> None:
    configure(HARD_CAPS={"max_messages": cap})
    (message,) = found()
    assert message.id == "chatnest.E005"
    assert "max_messages" in message.msg


def test_caps_under_which_nothing_could_be_answered_are_named(configure: Configure) -> None:
    configure(HARD_CAPS={"max_output_tokens": 16_000})
    assert ids() == ["chatnest.W001"]
    configure(HARD_CAPS={"max_output_tokens": 15_999})
    assert ids() == []


def test_a_platform_without_the_tokenizer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "EXACT", False)
    assert ids() == ["chatnest.W003"]


def test_a_lease_that_a_busy_process_may_lose_is_told(configure: Configure) -> None:
    configure(LEASE_SECONDS=5)
    assert ids() == ["chatnest.W004"]


@pytest.mark.parametrize("alias", ["", "replica", "Default"])
def test_a_database_that_there_is_not_is_told(configure: Configure, alias: str) -> None:
    configure(DATABASE_ALIAS=alias)
    (message,) = found()
    assert message.id == "chatnest.E006"
    assert repr(alias) in message.msg


@pytest.mark.parametrize(
    ("routers", "expected"),
    [
        ([], ["chatnest.E012"]),
        (["tests.test_checks.ReadsAReplica", "chatnest.routers.LedgerRouter"], ["chatnest.E012"]),
        (["chatnest.routers.LedgerRouter"], []),
        (["chatnest.routers.LedgerRouter", "tests.test_checks.ReadsAReplica"], []),
    ],
)
def test_an_admin_that_would_edit_another_database_is_told(
    configure: Configure, settings: Any, routers: list[str], expected: list[str]
) -> None:
    configure(DATABASE_ALIAS="postgres")
    settings.DATABASE_ROUTERS = routers
    assert ids() == expected


class ReadsAReplica:
    """As sites have it in front of one database."""

    def db_for_read(self, model: type[Model], **hints: Any) -> str:
        return "default"


def test_the_ledgers_tables_are_made_where_it_lives(configure: Configure, settings: Any) -> None:
    configure(DATABASE_ALIAS="postgres")
    settings.DATABASE_ROUTERS = ["chatnest.routers.LedgerRouter"]
    assert router.allow_migrate_model("postgres", Profile)
    assert not router.allow_migrate_model("default", Profile)
    assert router.allow_migrate("default", "auth")


def test_a_database_that_the_ledger_cannot_use_is_told(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "VENDORS", ("postgresql",))
    configure(DATABASE_ALIAS="default")
    (message,) = found()
    assert (message.id, message.msg) == ("chatnest.E007", "chatnest's ledger does not work on sqlite.")


def test_the_command_line_tells_it_too(configure: Configure) -> None:
    configure(GAP_SECONDS=0)
    with pytest.raises(SystemCheckError, match=r"chatnest\.E003.*GAP_SECONDS.*a number of seconds above 0, not 0"):
        call_command("check", stdout=StringIO(), stderr=StringIO())


# Providers.


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ({"azure": None}, "CHATNEST['PROVIDERS']['azure'] must be a dict, under a name that is a string."),
        ({7: {}}, "CHATNEST['PROVIDERS'][7] must be a dict, under a name that is a string."),
        ({"azure": {}}, "CHATNEST['PROVIDERS']['azure'] needs a BASE_URL, or a CLIENT."),
        ({"azure": {"API_KEY": "sk-secret"}}, "CHATNEST['PROVIDERS']['azure'] needs a BASE_URL, or a CLIENT."),
        (
            {"azure": {"BASE_URL": "azure.example/v1"}},
            "CHATNEST['PROVIDERS']['azure']['BASE_URL'] must be an address that begins with http:// or https://.",
        ),
        (
            {"default": {"BASE_URL": ""}},
            "CHATNEST['PROVIDERS']['default']['BASE_URL'] must be an address that begins with http:// or https://.",
        ),
    ],
    ids=str,
)
def test_a_provider_that_cannot_be_right_is_named(configure: Configure, typed: Any, problem: str) -> None:
    configure(PROVIDERS=typed)
    (message,) = found()
    assert (message.id, message.msg) == ("chatnest.E003", problem)


@pytest.mark.parametrize("path", ["nowhere.client", "tests.test_checks.no_such_client"])
def test_a_client_that_cannot_be_imported_is_named(configure: Configure, path: str) -> None:
    configure(PROVIDERS={"azure": {"CLIENT": path}})
    (message,) = found()
    assert message.id == "chatnest.E010"
    assert path in message.msg and "'azure'" in message.msg
    configure(PROVIDERS={"azure": {"CLIENT": "tests.test_accounts.by_tenant"}, "other": {"CLIENT": by_tenant}})
    assert found() == []


@pytest.mark.parametrize(
    ("installed", "warned"), [("0.22.1", True), ("0.23.0", False), ("0.23.0rc1", False), ("1.0.0", False)]
)
def test_a_loop_that_leaves_connections_open_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: str, warned: bool
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: installed if name == "uvloop" else real(name))
    assert ids() == (["chatnest.W009"] if warned else [])


@pytest.mark.parametrize(
    ("installed", "on", "refused"), [("2.64.0", True, True), ("2.64.0", False, False), ("2.65.0", True, False)]
)
def test_a_sentry_that_breaks_every_page_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: str, on: bool, refused: bool
) -> None:
    client = SimpleNamespace(get_integration=lambda name: on and name == "django")
    monkeypatch.setitem(sys.modules, "sentry_sdk", SimpleNamespace(get_client=lambda: client))
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: installed if name == "sentry-sdk" else real(name))
    assert ids() == (["chatnest.E031"] if refused else [])


def test_the_default_provider_may_have_its_key_in_providers(configure: Configure) -> None:
    configure(OPENAI_API_KEY="")
    assert ids() == ["chatnest.W002"]
    for typed in ({"API_KEY": "sk-1"}, {"BASE_URL": "http://127.0.0.1:11434/v1"}, {"CLIENT": by_tenant}):
        configure(PROVIDERS={"default": typed})
        assert ids() == []


def test_a_profile_whose_provider_is_missing_is_told(edit_profile: EditProfile, database: str) -> None:
    edit_profile("expanded", provider="azure")
    edit_profile("off", provider="azure", enabled=False)
    (message,) = found([database])
    assert (message.id, message.obj.name) == ("chatnest.E009", "expanded")
    assert message.msg == "Profile 'expanded' asks the provider 'azure', which the settings do not have."
    assert message.hint == "CHATNEST['PROVIDERS'] has default."
    with pytest.raises(SystemCheckError, match="azure"):
        call_command("check", databases=[database], stdout=StringIO(), stderr=StringIO())


# The database's driver.


@pytest.mark.parametrize("is_psycopg3", [True, False])
def test_psycopg2_is_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch, is_psycopg3: bool) -> None:
    """Django takes it where it is installed, and the ledger's statements in one round trip are not its own."""
    monkeypatch.setattr(psycopg_any, "is_psycopg3", is_psycopg3)
    configure(DATABASE_ALIAS="default")
    assert ids() == []
    configure(DATABASE_ALIAS="postgres")
    assert ids() == ([] if is_psycopg3 else ["chatnest.E011"])


# Before it is deployed, where strangers may chat.


class SessionsInPostgres:
    """A router."""

    def db_for_read(self, model: type, **hints: Any) -> str | None:
        return "postgres" if model.__name__ == "Session" else None


def before_deploying(operators: Sequence[Any] = OPERATORS) -> list[str | None]:
    with override_settings(ADMINS=list(operators)):
        messages = run_checks(include_deployment_checks=True)
    return [message.id for message in messages if (message.id or "").startswith("chatnest.")]


@pytest.mark.parametrize(
    ("trusted", "proxies", "anonymous", "told"),
    [
        ("*", 0, True, ["chatnest.W006"]),
        ("10.0.0.1, *", 0, True, ["chatnest.W006"]),
        ("*", 1, True, []),  # chatnest counts hops itself
        ("*", 0, False, []),  # nobody pays by address
        ("10.0.0.1", 0, True, []),
        ("", 0, True, []),
    ],
)
def test_a_server_that_believes_every_client_is_told(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    trusted: str,
    proxies: int,
    anonymous: bool,
    told: list[str],
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    configure(TRUSTED_PROXIES=proxies, ALLOW_ANONYMOUS=anonymous)
    assert before_deploying() == told
    assert ids() == []


def test_a_site_that_would_alert_nobody_is_told(configure: Configure) -> None:
    assert before_deploying(operators=[]) == ["chatnest.I001"]
    assert ids() == []
    configure(ALERTS=False)
    assert before_deploying(operators=[]) == []


@pytest.mark.parametrize(
    ("engine", "pool", "anonymous", "told"),
    [
        ("db", None, True, ["chatnest.W007"]),
        ("cached_db", None, True, ["chatnest.W007"]),
        ("db", {"max_size": 8}, True, []),
        ("db", True, True, []),
        ("db", None, False, []),
        ("signed_cookies", None, True, []),
        ("cache", None, True, []),
    ],
)
def test_sessions_in_postgres_without_a_pool_are_told(
    configure: Configure,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    pool: Any,
    anonymous: bool,
    told: list[str],
) -> None:
    """150 sockets with made-up cookies emptied PostgreSQL's 100 places; with a pool of four nobody was refused."""
    configure(ALLOW_ANONYMOUS=anonymous)
    settings.SESSION_ENGINE = f"django.contrib.sessions.backends.{engine}"
    assert before_deploying() == [], "the tests' sessions are in SQLite"
    settings.DATABASE_ROUTERS = [SessionsInPostgres()]
    monkeypatch.setitem(connections["postgres"].settings_dict, "OPTIONS", {"pool": pool})
    assert before_deploying() == told


# Profiles, where the database may be read.


def test_profiles_that_could_never_answer_are_told(edit_profile: EditProfile, database: str) -> None:
    """As the original's expanded one could not: 3,000 tokens of answer against 2,048 a request."""
    edit_profile("expanded", max_tokens_per_request=2048)
    edit_profile("constrained")
    edit_profile("balanced", max_output_tokens=9000, max_tokens_per_request=9000)
    edit_profile("off", max_output_tokens=9000, max_tokens_per_request=9000, enabled=False)
    messages = found([database])
    assert [(message.id, message.obj.name) for message in messages] == [("chatnest.W005", "expanded")]
    assert "'expanded' could never answer" in messages[0].msg
    # Balanced is clamped to 4,096 of 9,000; the profile that is off answers nobody.


def test_a_profile_that_only_the_caps_keep_from_answering_is_told(
    edit_profile: EditProfile, database: str, configure: Configure
) -> None:
    edit_profile("expanded")
    configure(HARD_CAPS={"max_tokens_per_request": 3000, "max_output_tokens": 2999})
    assert found([database]) == []
    configure(HARD_CAPS={"max_tokens_per_request": 3000, "max_output_tokens": 3000})
    assert [message.id for message in found([database])] == ["chatnest.W001", "chatnest.W005"]


def test_no_database_is_read_unasked(edit_profile: EditProfile, database: str) -> None:
    edit_profile("expanded", max_tokens_per_request=2048)
    assert found() == []
    other = "postgres" if database == "default" else "default"
    assert found([other]) == []


@pytest.mark.parametrize("name", ["max_output_tokens", "max_tokens_per_request"])
def test_the_form_refuses_such_a_profile(name: str) -> None:
    profile = Profile(
        name="x",
        max_output_tokens=100,
        max_messages=5,
        max_tokens_per_request=100,
        daily_token_limit=1000,
        rate_max_requests=5,
        rate_window_seconds=60,
        max_concurrent_streams=1,
    )
    with pytest.raises(Exception, match="could never answer"):
        profile.clean()
    setattr(profile, name, 99 if name == "max_output_tokens" else 101)
    profile.clean()


def test_all_settings_have_a_default_and_all_defaults_are_right(settings: Any) -> None:
    del settings.CHATNEST
    for name in NAMES:
        assert getattr(chatnest_settings, name) == getattr(Settings, name, {})
    batcher.forget_policy()

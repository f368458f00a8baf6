"""System checks: settings that cannot be right, and settings that weaken the protection."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any

from django.apps import AppConfig, apps
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Info, Tags, Warning, register
from django.db import DatabaseError, connections, router
from django.utils.version import get_version_tuple

from . import hooks, tokens
from .conf import DEFAULT_PROVIDER, NAMES, complaint, provider, provider_names, settings
from .ledger.bulk import VENDORS
from .limits import FIELDS, clamp, hard_caps, is_cap
from .models import Account, Profile
from .policy import Policy
from .prices import money_limits


@register()
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    typed = getattr(django_settings, "CHATNEST", {})
    if not isinstance(typed, dict):
        return [Error("CHATNEST must be a dict.", id="chatnest.E001")]
    unknown = [
        Error(
            f"CHATNEST[{name!r}] is not a setting.",
            hint=f"Known are {', '.join(sorted(NAMES))}.",
            id="chatnest.E002",
        )
        for name in typed
        if name not in NAMES
    ]
    wrong = [
        Error(problem, id="chatnest.E003")
        for name, value in typed.items()
        if name in NAMES and (problem := complaint(name, value))
    ]
    return [*unknown, *wrong] or [*_check_hooks(), *_check_clients(), *_check_caps(), *_check_protection()]


def _settings_are_wrong() -> bool:
    """Then they cannot be read, and the other checks have nothing to say."""
    return any(message.is_serious() for message in check_settings())


def _check_hooks() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    for name in hooks.NAMES:
        problem = f"CHATNEST[{name!r}] is {getattr(settings, name)!r}, which is no callable that can be imported"
        try:
            if getattr(settings, name) is None or callable(hooks.hook(name)):
                continue
        except ImportError as error:
            problem += f": {error}"
        messages.append(Error(problem, id="chatnest.E008"))
    return messages


def _check_clients() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    for name, typed in settings.PROVIDERS.items():
        client = typed.get("CLIENT")
        try:
            if client is not None:
                hooks.imported(client)
        except ImportError as error:
            problem = f"CHATNEST['PROVIDERS'][{name!r}]['CLIENT'] is {client!r}, which cannot be imported: {error}"
            messages.append(Error(problem, id="chatnest.E010"))
    return messages


def _check_caps() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    for name, cap in settings.HARD_CAPS.items():
        if name not in FIELDS:
            messages.append(
                Error(
                    f"HARD_CAPS[{name!r}] is not a limit.",
                    hint=f"Known are {', '.join(FIELDS)}.",
                    id="chatnest.E004",
                )
            )
        elif not is_cap(name, cap):
            messages.append(Error(f"HARD_CAPS[{name!r}] must be a number, 0 or more, not {cap!r}.", id="chatnest.E005"))
    if not hard_caps().can_answer():
        messages.append(
            Warning(
                "HARD_CAPS let a request hold no more than the longest answer alone.",
                hint="Raise max_tokens_per_request above max_output_tokens.",
                id="chatnest.W001",
            )
        )
    return messages


def _check_protection() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    default = provider(DEFAULT_PROVIDER)
    if default.is_openai and not default.api_key:
        messages.append(Warning("CHATNEST has no OPENAI_API_KEY: OpenAI will refuse every chat.", id="chatnest.W002"))
    if not tokens.EXACT:
        messages.append(
            Warning(
                "toktok is not installed: prompts are bounded by their bytes, about four times their tokens.",
                hint="pip install toktok-rs, where there is a wheel for this platform.",
                id="chatnest.W003",
            )
        )
    if settings.LEASE_SECONDS < 3 * settings.HEARTBEAT_SECONDS / 5:
        messages.append(
            Warning(
                "LEASE_SECONDS is short: a busy process may lose the lease of a stream that is alive.",
                hint="30 is the default.",
                id="chatnest.W004",
            )
        )
    if _is_older("uvloop", (0, 23)):
        messages.append(
            Warning(
                "uvloop before 0.23 may leave a connection open that is given up while it is made: the provider's too.",
                hint="Upgrade uvloop, or serve with asyncio's own loop.",
                id="chatnest.W009",
            )
        )
    return messages


@register()
def check_middleware(**kwargs: Any) -> list[CheckMessage]:
    """Sentry wrapped an async ``process_view`` in a sync function, so that nobody awaited it."""
    sentry_sdk = sys.modules.get("sentry_sdk")
    if (
        sentry_sdk is None
        or "chatnest.asgi.middleware.CsrfViewMiddleware" not in django_settings.MIDDLEWARE
        or not _is_older("sentry-sdk", (2, 65))
        or not sentry_sdk.get_client().get_integration("django")
    ):
        return []
    return [
        Error(
            "sentry-sdk before 2.65 makes every page a 500 under chatnest.asgi.middleware.CsrfViewMiddleware.",
            hint='Upgrade sentry-sdk, or name "django.middleware.csrf.CsrfViewMiddleware" in MIDDLEWARE.',
            id="chatnest.E031",
        )
    ]


def _is_older(package: str, version: tuple[int, int]) -> bool:
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return get_version_tuple(installed)[:2] < version


@register()
def check_database(**kwargs: Any) -> list[CheckMessage]:
    if _settings_are_wrong():
        return []
    alias = settings.DATABASE_ALIAS
    if alias not in connections:
        return [Error(f"CHATNEST['DATABASE_ALIAS'] is {alias!r}, which is not in DATABASES.", id="chatnest.E006")]
    vendor = connections[alias].vendor
    if vendor not in VENDORS:
        return [
            Error(
                f"chatnest's ledger does not work on {vendor}.",
                hint=f"Set CHATNEST['DATABASE_ALIAS'] to a database that is one of {', '.join(VENDORS)}.",
                id="chatnest.E007",
            )
        ]
    if vendor == "postgresql" and not _is_psycopg3():
        return [
            Error(
                "chatnest's ledger does not work with psycopg2.",
                hint='Uninstall psycopg2 and install "psycopg[binary,pool]": Django takes it where it finds it.',
                id="chatnest.E011",
            )
        ]
    return _check_tenants() or _check_routers(alias)


def _check_tenants() -> list[CheckMessage]:
    """The ledger's connection is in the public schema: of a tenant's own tables it would know nothing."""
    if not apps.is_installed("django_tenants"):
        return []
    types = getattr(django_settings, "TENANT_TYPES", {})  # TENANT_APPS for sites with tenants of several kinds
    entries = [
        *getattr(django_settings, "TENANT_APPS", ()),
        *(entry for name, kind in types.items() if name != _public_schema() for entry in kind["APPS"]),
    ]
    if not any(AppConfig.create(entry).name == "chatnest" for entry in entries):
        return []
    return [
        Error(
            "chatnest is a tenant app of django-tenants: its ledger, which is in the public schema, would not see it.",
            hint="Move it from TENANT_APPS to SHARED_APPS: one ledger for all tenants, told apart by PAYER.",
            id="chatnest.E030",
        )
    ]


def _public_schema() -> str:
    return getattr(django_settings, "PUBLIC_SCHEMA_NAME", "public")


def _check_routers(alias: str) -> list[CheckMessage]:
    """The admin writes, ``migrate`` makes and the ledger reads one and the same row, or a pause would stop nothing."""
    astray = [
        f"{model.__name__} is {what} {found!r}"
        for model in apps.get_app_config("chatnest").get_models()
        for what, found in [("read from", router.db_for_read(model)), ("written to", router.db_for_write(model))]
        if found != alias
    ]
    if not (astray or router.allow_migrate_model(alias, Profile)):
        astray = ["migrate makes no tables of chatnest there"]
    if not astray:
        return []
    return [
        Error(
            f"CHATNEST['DATABASE_ALIAS'] is {alias!r}, but {astray[0]}: what operators edit would not be in force.",
            hint="Put 'chatnest.routers.LedgerRouter' first in DATABASE_ROUTERS.",
            id="chatnest.E012",
        )
    ]


def _is_psycopg3() -> bool:
    from django.db.backends.postgresql.psycopg_any import is_psycopg3  # where there is no driver, there is no module

    return is_psycopg3


@register(Tags.security, deploy=True)
def check_strangers(**kwargs: Any) -> list[CheckMessage]:
    """What anybody on the internet could do to a site that lets anybody chat."""
    if _settings_are_wrong() or not settings.ALLOW_ANONYMOUS:
        return []
    messages: list[CheckMessage] = []
    trusted = [name.strip() for name in os.environ.get("FORWARDED_ALLOW_IPS", "").split(",")]
    if "*" in trusted and not settings.TRUSTED_PROXIES:
        messages.append(
            Warning(
                "FORWARDED_ALLOW_IPS is *: each client names its own address, and has as many budgets as it likes.",
                hint="Name your proxies there, or set CHATNEST['TRUSTED_PROXIES'] and give uvicorn --no-proxy-headers.",
                id="chatnest.W006",
            )
        )
    if _sessions_take_a_connection_each():
        messages.append(
            Warning(
                "Each request with a made-up session cookie takes a connection to PostgreSQL, without a bound.",
                hint="Give that database OPTIONS['pool'] (Django's own). Silence this where PgBouncer does it.",
                id="chatnest.W007",
            )
        )
    return messages


@register(deploy=True)
def check_alerts(**kwargs: Any) -> list[CheckMessage]:
    if _settings_are_wrong() or not settings.ALERTS or django_settings.ADMINS:
        return []
    return [
        Info(
            "ADMINS is empty: nobody is mailed when the chat's budget runs out, or its provider refuses the key.",
            hint="Name operators in ADMINS, or set CHATNEST['ALERTS'] to False.",
            id="chatnest.I001",
        )
    ]


def _sessions_take_a_connection_each() -> bool:
    store = import_module(django_settings.SESSION_ENGINE).SessionStore
    if not (apps.is_installed("django.contrib.sessions") and hasattr(store, "get_model_class")):
        return False  # not in a database
    connection = connections[router.db_for_read(store.get_model_class())]
    return connection.vendor == "postgresql" and not connection.settings_dict["OPTIONS"].get("pool")


@register(Tags.database)
def check_profiles(databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Profiles that ask nobody, or could never answer. For ``check --database`` and ``migrate``."""
    if _settings_are_wrong():
        return []
    alias = settings.DATABASE_ALIAS
    if alias not in (databases or ()):
        return []
    try:
        if Profile._meta.db_table not in connections[alias].introspection.table_names():
            return []
        profiles = list(Profile.objects.using(alias).filter(enabled=True).select_related("fallback"))
    except DatabaseError:
        return []  # not migrated yet, or away: other checks say so
    return [
        *_check_providers(profiles),
        *_check_fallbacks(profiles),
        *_check_answers(profiles),
        *_check_prices(profiles),
    ]


def _check_providers(profiles: Sequence[Profile]) -> list[CheckMessage]:
    return [
        Error(
            f"Profile {profile.name!r} asks the provider {profile.provider!r}, which the settings do not have.",
            hint=f"CHATNEST['PROVIDERS'] has {', '.join(sorted(provider_names()))}.",
            obj=profile,
            id="chatnest.E009",
        )
        for profile in profiles
        if profile.provider not in provider_names()
    ]


def _check_fallbacks(profiles: Sequence[Profile]) -> list[CheckMessage]:
    return [
        Warning(
            f"Profile {profile.name!r} falls back to {profile.fallback.name!r}, which is off: it has no fallback.",
            obj=profile,
            id="chatnest.W008",
        )
        for profile in profiles
        if profile.fallback and not profile.fallback.enabled
    ]


def _check_prices(profiles: Sequence[Profile]) -> list[CheckMessage]:
    """Where money is limited, whatever may be asked has a price, or is refused."""
    known, accounts = Policy.read().prices, Account.objects.using(settings.DATABASE_ALIAS)
    for_all = money_limits(settings.SITE_DAILY_MONEY_LIMIT, settings.SITE_MONTHLY_MONEY_LIMIT) or (
        accounts.exclude(daily_money_limit=None, monthly_money_limit=None).exists()
    )
    return [
        Error(
            f"Profile {profile.name!r} asks {model!r} of {provider!r}, whose price is not known, and money is limited: "
            "such a chat is refused.",
            hint=f"Say in CHATNEST['PRICES'], as {{{model!r}: {{'input': '0.15', 'output': '0.60'}}}}, or in the admin "
            "what a million tokens cost; or pip install 'chatnest[prices]'.",
            obj=profile,
            id="chatnest.E032",
        )
        for profile in profiles
        if for_all or money_limits(profile.daily_money_limit, profile.monthly_money_limit)
        for provider, model in _asked(profile)
        if (provider, model) not in known
    ]


def _asked(profile: Profile) -> list[tuple[str, str]]:
    """The providers and models that may answer it."""
    fallback = profile.fallback
    return [(one.provider, one.model) for one in (profile, fallback) if one and one.enabled]


def _check_answers(profiles: Sequence[Profile]) -> list[CheckMessage]:
    return [
        Warning(
            f"Profile {profile.name!r} could never answer: its longest answer leaves a request no room for a prompt.",
            hint="Lower max_output_tokens or raise max_tokens_per_request, and HARD_CAPS if they clamp it.",
            obj=profile,
            id="chatnest.W005",
        )
        for profile in profiles
        if not clamp(profile.limits, hard_caps()).can_answer()
    ]

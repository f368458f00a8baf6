"""The environment as typed values. It wins over ``.env``; an empty variable counts as unset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import environ  # type: ignore[import-untyped]
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent

environ.Env.read_env(BASE_DIR / ".env")


def presume(**variables: str) -> None:
    """Defaults for what neither the environment nor ``.env`` sets."""
    os.environ.update({name: value for name, value in variables.items() if not text(name)})


def text(name: str, default: str = "") -> str:
    # Not environ's own str: it takes a leading "$", which a secret may have, for another variable's name.
    return os.environ.get(name, "").strip() or default


def flag(name: str) -> bool:
    return bool(environ.Env().bool(name, default=False))


def number(name: str) -> int:
    try:
        return int(text(name))
    except ValueError:
        raise ImproperlyConfigured(f"{name} must be a whole number, not {text(name)!r}.") from None


def items(name: str, default: str) -> list[str]:
    return [item.strip() for item in text(name, default).split(",") if item.strip()]


def database() -> dict[str, Any]:
    """``DATABASE_URL`` as an entry of ``DATABASES``."""
    url = text("DATABASE_URL", "sqlite:///db.sqlite3")
    if "://" not in url:
        # Without the value: it may hold a password.
        raise ImproperlyConfigured("DATABASE_URL must be a URL such as postgres://user:password@host:5432/name.")
    config: dict[str, Any] = environ.Env.db_url_config(url)
    if config["ENGINE"] == "django.db.backends.sqlite3":
        return _sqlite(config)
    if config["ENGINE"] == "django.db.backends.postgresql":
        return _postgres(config, dict(parse_qsl(urlsplit(url).query)))
    return config


def _sqlite(config: dict[str, Any]) -> dict[str, Any]:
    if config["NAME"] == ":memory:":
        raise ImproperlyConfigured(
            "DATABASE_URL must name a file: chatnest's ledger has a thread of its own, "
            "which cannot see an in-memory SQLite database."
        )
    options = {
        # A transaction that will write says so at once: it waits its turn instead of failing half-way.
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        # Readers go on while one writes.
        "init_command": "PRAGMA journal_mode=WAL;",
    }
    return {
        **config,
        "NAME": str(BASE_DIR / config["NAME"]),
        "OPTIONS": {**options, **config.get("OPTIONS", {})},
        # A file for tests too, for the ledger's thread.
        "TEST": {"NAME": str(BASE_DIR / "test.sqlite3")},
    }


def _postgres(config: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
    """libpq also takes parts of the address from the query (a socket's directory has no other place)."""
    parts = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD", "dbname": "NAME"}
    named = {parts[name]: value for name, value in query.items() if name in parts}
    options = {name: value for name, value in config.get("OPTIONS", {}).items() if name not in parts}
    return {**config, "HOST": unquote(config["HOST"]), **named, "OPTIONS": options}

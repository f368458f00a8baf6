"""Who is behind an account: the name and the e-mail of its user, in one query for a page."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from django.contrib.auth import get_user_model
from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.db.models import Q

MOST_FOUND: Final = 100


def names(accounts: Iterable[str]) -> dict[str, str]:
    """The person of each account ``user:<pk>`` whose user exists. One query, or none."""
    keys = [key for account in accounts if (key := _primary_key(account)) is not None]
    users: Any = get_user_model()
    found = users._base_manager.filter(pk__in=keys) if keys else ()
    return {f"user:{user.pk}": person(user) for user in found}


def person(user: Any) -> str:
    """``Ada Lovelace, ada@example.org``, as far as it is known."""
    full_name = user.get_full_name() if hasattr(user, "get_full_name") else ""
    name = str(full_name or user.get_username())
    email = getattr(user, user.get_email_field_name(), "")
    return f"{name}, {email}" if email and email != name else name


def found(text: str) -> list[str]:
    """The accounts of users whose name or e-mail has ``text`` in it; the first hundred."""
    users: Any = get_user_model()
    chosen = Q(pk__in=())
    for field in {users.USERNAME_FIELD, users.get_email_field_name(), "first_name", "last_name"}:
        with suppress(FieldDoesNotExist):
            if users._meta.get_field(field).get_internal_type() in ("CharField", "EmailField"):
                chosen |= Q(**{f"{field}__icontains": text})
    return [f"user:{pk}" for pk in users._base_manager.filter(chosen).values_list("pk", flat=True)[:MOST_FOUND]]


def _primary_key(account: str) -> object | None:
    """What the users' table could have as a key; None for any other account."""
    kind, _, rest = account.partition(":")
    if kind != "user":
        return None
    field: Any = get_user_model()._meta.pk
    while field.remote_field:  # a user that is a row of two tables
        field = field.target_field
    try:
        key: object = field.clean(rest, None)  # with its range: SQLite raises for a number that is too long
    except (ValueError, ValidationError):
        return None
    return key

"""Whose an account is, in words that people know, whatever the site's user model; and whom a search means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Final
from uuid import UUID

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db.models import Case, CharField, Q, TextField, Value, When

from ..accounts import SHARED, canonical, normal_address
from ..conf import settings, today
from ..models import Account, DailyUsage, Reservation

MOST_FOUND: Final = 20
LATELY: Final = timedelta(days=30)  # who used anything since is searched by account
NAMES: Final = ("first_name", "last_name", "full_name", "name")  # where user models keep them
AT_ONCE: Final = 10_000  # databases take no more than some ten thousand values in a statement


@dataclass(frozen=True, slots=True)
class Person:
    """``email`` may be empty; where there is no full name, ``name`` is what they log in with."""

    name: str
    email: str
    username: str

    def __str__(self) -> str:
        return f"{self.name} ({self.email})" if self.email and self.email != self.name else self.name


def people(accounts: Iterable[str]) -> dict[str, Person]:
    """Of the ``user:`` accounts whose user is there. One query (for ten thousand)."""
    users: Any = get_user_model()
    field = _key(users)
    pks = iter([pk for account in accounts if (pk := _pk(field, account)) is not None])
    found: dict[str, Person] = {}
    while some := list(islice(pks, AT_ONCE)):
        found |= {f"user:{user.pk}": _person(user) for user in users._base_manager.filter(pk__in=some)}
    return found


def find(text: str) -> list[str]:
    """The accounts that a search may mean, at most 20, likelier ones first; one alone if it is exactly its name.

    ``text``: an account, a user's primary key, name, user name or e-mail, an address, or the id of a reservation.
    """
    text = text.strip()
    if not text or "\0" in text:
        return []
    name = canonical(text)
    if name in SHARED or people([name]) or _is_account(name):
        return [name]
    found = dict.fromkeys([*_by_id(text), *_users(text), *_accounts(text)])
    return list(islice(found, MOST_FOUND))


def _is_account(name: str) -> bool:
    alias = settings.DATABASE_ALIAS
    return any(model.objects.using(alias).filter(**{field: name}).exists() for model, field in _NAMED)


_NAMED: Final[tuple[tuple[Any, str], ...]] = ((Account, "name"), (DailyUsage, "account"))


def _by_id(text: str) -> Iterator[str]:
    if address := normal_address(text):
        yield f"ip:{address}"
    yield from people([f"user:{text}"])
    with suppress(ValueError):
        rows = Reservation.objects.using(settings.DATABASE_ALIAS).filter(id=UUID(text))
        yield from rows.values_list("payer", flat=True)


def _users(text: str) -> list[str]:
    """Those in whose names is every word."""
    users: Any = get_user_model()
    fields = _text_fields(users)
    if not fields:
        return []
    chosen = Q()
    for word in text.split():
        chosen &= _any(fields, "icontains", word)
    likely = [
        When(_any(fields, lookup, text), then=Value(rank)) for rank, lookup in enumerate(("iexact", "istartswith"))
    ]
    rows = users._base_manager.filter(chosen).order_by(Case(*likely, default=Value(2)), fields[0])
    return [f"user:{pk}" for pk in rows.values_list("pk", flat=True)[:MOST_FOUND]]


def _accounts(text: str) -> Iterator[str]:
    """Those that have a row, or were charged lately, by a part of their name."""
    alias = settings.DATABASE_ALIAS
    yield from Account.objects.using(alias).filter(name__icontains=text).values_list("name", flat=True)[:MOST_FOUND]
    lately = DailyUsage.objects.using(alias).filter(day__gt=today() - LATELY, account__icontains=text)
    yield from lately.order_by("account").values_list("account", flat=True).distinct()[:MOST_FOUND]


def _any(fields: Iterable[str], lookup: str, value: str) -> Q:
    chosen = Q()
    for field in fields:
        chosen |= Q(**{f"{field}__{lookup}": value})
    return chosen


def _text_fields(users: Any) -> list[str]:
    """By which a user is known, the one to log in with first."""
    text = {field.name for field in users._meta.concrete_fields if isinstance(field, CharField | TextField)}
    return [name for name in dict.fromkeys([users.USERNAME_FIELD, _email_field(users), *NAMES]) if name in text]


def _email_field(users: Any) -> str:
    return str(users.get_email_field_name()) if hasattr(users, "get_email_field_name") else "email"


def _person(user: Any) -> Person:
    username = str(getattr(user, user.USERNAME_FIELD))
    name = user.get_full_name().strip() if hasattr(user, "get_full_name") else ""
    return Person(name or username, getattr(user, _email_field(type(user)), "") or "", username)


def _key(users: Any) -> Any:
    """The primary key; of a model that inherits another's, that."""
    field: Any = users._meta.pk
    while field.remote_field:
        field = field.target_field
    return field


def _pk(field: Any, account: str) -> Any:
    """None where no primary key could be that."""
    kind, _, pk = account.partition(":")
    if kind != "user":
        return None
    with suppress(ValueError, ValidationError):
        return field.clean(pk, None)
    return None

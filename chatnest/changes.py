"""Who changed what: whoever saves an account, a profile or a price leaves a row for each value that differs.

    with changes.acting("ada", "complaints about the new model"):
        account.save()

Saves and deletes are recorded, by the admin, commands and the site's code alike, in the transaction that they are in;
``QuerySet.update`` and ``bulk_create`` are not, as Django's signals are not sent for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date
from decimal import Decimal
from typing import Final, NamedTuple

from django.db import models

from .conf import now, settings
from .models import Change
from .models.change import ACTOR_LENGTH, VALUE_LENGTH

KEPT: Final = 20  # of what is the same before a difference in a long text
Values = Mapping[str, str]  # of each field, as text


class Actor(NamedTuple):
    name: str = ""
    reason: str = ""


NOBODY: Final = Actor()
_actor: ContextVar[Actor] = ContextVar("chatnest_actor", default=NOBODY)


@contextmanager
def acting(actor: str, reason: str = "") -> Iterator[None]:
    """What changes within was done by ``actor``, and why."""
    token = _actor.set(Actor(actor[:ACTOR_LENGTH], reason[:VALUE_LENGTH]))
    try:
        yield
    finally:
        _actor.reset(token)


def actor() -> Actor:
    """Who acts now; without a name where nobody said so."""
    return _actor.get()


def record(kind: str, subject: str, field: str, old: object, new: object) -> None:
    """A change that is no save: an operator stopped one answer. Raises what the database raises."""
    _write(settings.DATABASE_ALIAS, kind, subject, [(field, text(old), text(new))])


def stored(row: models.Model, using: str) -> Values:
    """What the database has of it; of a row that is not there, what that means: no, and nothing."""
    fields = {field.name: field for field in row._meta.concrete_fields if not field.primary_key}
    # A profile is known by its name.
    columns = [f"{name}__name" if field.is_relation else name for name, field in fields.items()]
    found = type(row)._base_manager.using(using).filter(pk=row.pk).values_list(*columns).first()
    if found is None:
        return {name: text(False if isinstance(field, models.BooleanField) else None) for name, field in fields.items()}
    return {name: text(value) for name, value in zip(fields, found, strict=True)}


def record_save(row: models.Model, using: str, before: Values, *, created: bool) -> None:
    """``before``: what ``stored`` said then."""
    after = stored(row, using)
    # What a new row is about is its subject, and no change.
    about = _identity(row) if created else ()
    differences = [
        (name, *_excerpts(before[name], value))
        for name, value in after.items()
        if value != before[name] and name not in about
    ]
    _write(using, _kind(row), _subject(row, after if created else before), differences)


def record_delete(row: models.Model, using: str) -> None:
    """While it is there yet."""
    was, nothing = stored(row, using), stored(type(row)(), using)
    about = _identity(row)
    told = ", ".join(f"{name}: {was[name]}" for name in was if was[name] != nothing[name] and name not in about)
    _write(using, _kind(row), _subject(row, was), [("deleted", told[:VALUE_LENGTH], "")])


def text(value: object) -> str:
    """As people read it: numbers plainly, yes and no, nothing as nothing."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float() | Decimal():
            return f"{Decimal(str(value)).normalize():f}"
        case date():
            return value.isoformat()
        case _:
            return str(value)


def _kind(row: models.Model) -> str:
    return row._meta.model_name or ""


def _identity(row: models.Model) -> tuple[str, ...]:
    """The fields that say which one it is."""
    return ("name",) if hasattr(row, "name") else ("provider", "model")


def _subject(row: models.Model, values: Values) -> str:
    return ": ".join(values[name] for name in _identity(row))


def _excerpts(old: str, new: str) -> tuple[str, str]:
    """Both, or what of long texts shows how they differ."""
    if max(len(old), len(new)) <= VALUE_LENGTH:
        return old, new
    same = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, same - KEPT)
    return _excerpt(old, start), _excerpt(new, start)


def _excerpt(whole: str, start: int) -> str:
    shown = "…" * bool(start) + whole[start:]
    return shown if len(shown) <= VALUE_LENGTH else f"{shown[: VALUE_LENGTH - 1]}…"


def _write(using: str, kind: str, subject: str, differences: Iterable[tuple[str, str, str]]) -> None:
    who, at = actor(), now()
    Change.objects.using(using).bulk_create(
        Change(
            at=at,
            actor=who.name,
            kind=kind,
            subject=subject,
            field=field,
            old=old[:VALUE_LENGTH],
            new=new[:VALUE_LENGTH],
            reason=who.reason,
        )
        for field, old, new in differences
    )

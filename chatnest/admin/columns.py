"""How a value is shown, in lists and on pages that are only read: separators, units, zones, and people's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from django.contrib import admin
from django.db import models
from django.utils import timezone
from django.utils.formats import date_format, number_format
from django.utils.html import format_html, format_html_join
from django.utils.text import format_lazy
from django.utils.translation import gettext as _

from . import people
from .money import amount, currency_lazy, micro

Column = str | Callable[[Any], Any]  # as Django takes them
ACCOUNTS: Final = ("account", "payer", "accounts")
EMPTY: Final = "-"


def number(value: float) -> str:
    """As the reader's language writes it, its thousands told apart."""
    return number_format(value, force_grouping=True)


def moment(value: datetime) -> str:
    """To the second, with the zone's name."""
    aware = value.replace(tzinfo=UTC) if timezone.is_naive(value) else value  # USE_TZ is off: kept in UTC
    return date_format(timezone.localtime(aware), "Y-m-d H:i:s T")


def account(name: str, known: dict[str, str]) -> str:
    """The account, and who it is."""
    return format_html('{} <span class="chatnest-who">{}</span>', name, known[name]) if name in known else name


def columns(model: type[models.Model], *names: str) -> list[Column]:
    """Those of these fields, or of all but the primary key that nobody has seen."""
    fields = model._meta.concrete_fields
    return [column(model, name) for name in names or (f.name for f in fields if not isinstance(f, models.AutoField))]


@cache
def column(model: type[models.Model], name: str) -> Column:
    """One field's. Django takes a function in its place; of this name, so that the field's help text stays with it."""
    field: Any = model._meta.get_field(name)
    is_cost = name.startswith("cost")
    label = field.verbose_name
    if is_cost or isinstance(field, models.DecimalField):
        label = format_lazy("{} ({})", label, currency_lazy())

    @admin.display(description=label, ordering=name)
    def shown(row: Any) -> Any:
        value = getattr(row, name)
        if is_cost:
            return _cost(row, value, field.null)
        if value is None or value in ("", []):
            return EMPTY
        if name in ACCOUNTS:
            return _accounts(row, [value] if isinstance(value, str) else value)
        return _text(field, value)

    shown.__name__ = f"{name}_in_currency" if is_cost else name  # whose help text says how the database keeps it
    return shown


def with_people(rows: Iterable[Any], field: str) -> None:
    """Read who is behind the accounts of these rows, at once."""
    known = people.names({getattr(row, field) for row in rows})
    for row in rows:
        row.people = known


def _accounts(row: Any, names: list[str]) -> str:
    known = getattr(row, "people", None)
    if known is None or len(names) > 1:
        known = people.names(names)
    return format_html_join("\n", "{}", ((account(name, known),) for name in names))


def _cost(row: Any, value: int | None, may_be_unknown: bool) -> str:
    """Where no price was known there is a word, and never a nought."""
    unpriced = getattr(row, "unpriced", 0)
    if getattr(row, "settled_at", True) is None:
        return EMPTY
    if value is None or (unpriced and not value):
        return _("unpriced")
    if unpriced:
        return _("%(amount)s, and %(count)s unpriced") % {"amount": micro(value), "count": number(unpriced)}
    return micro(value) if value or may_be_unknown or hasattr(row, "unpriced") else EMPTY


def _text(field: Any, value: Any) -> str:
    if field.choices:
        return str(dict(field.flatchoices).get(value, value))
    if isinstance(value, bool):
        return _("Yes") if value else _("No")
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(field, models.DateField):
        return date_format(value)
    if isinstance(field, models.DecimalField):
        return amount(value)
    if isinstance(value, int | float):
        return number(value)
    return str(value)

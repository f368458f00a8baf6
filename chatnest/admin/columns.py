"""How a value is shown, in lists and on pages that are only read: separators, units, zones, and people's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from functools import cache
from typing import Any, Final

from django.contrib import admin
from django.db import models
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.functional import lazy
from django.utils.html import format_html, format_html_join
from django.utils.text import format_lazy
from django.utils.translation import gettext as _

from ..conf import aware, time_zone
from ..operators.words import amount, number
from ..reports import Person, currency, people

Column = str | Callable[[Any], Any]  # as Django takes them
ACCOUNTS: Final = ("account", "payer", "accounts")
EMPTY: Final = "-"

currency_lazy = lazy(currency, str)


def moment(value: datetime) -> str:
    """To the second, with the zone's name."""
    return date_format(timezone.localtime(aware(value), time_zone()), "Y-m-d H:i:s T")


def account(name: str, known: Mapping[str, Person]) -> str:
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
    known = people({getattr(row, field) for row in rows})
    for row in rows:
        row.people = known


def _accounts(row: Any, names: list[str]) -> str:
    known = getattr(row, "people", None)
    if known is None or len(names) > 1:
        known = people(names)
    return format_html_join("\n", "{}", ((account(name, known),) for name in names))


def _cost(row: Any, value: int | None, may_be_unknown: bool) -> str:
    """Where no price was known there is a word, and never a nought."""
    unpriced = getattr(row, "unpriced", 0)
    if getattr(row, "settled_at", True) is None:
        return EMPTY
    if value is None or (unpriced and not value):
        return _("unpriced")
    if unpriced:
        return _("%(amount)s, and %(count)s unpriced") % {"amount": _millionths(value), "count": number(unpriced)}
    return _millionths(value) if value or may_be_unknown or hasattr(row, "unpriced") else EMPTY


def _millionths(value: int) -> str:
    return amount(Decimal(value).scaleb(-6))


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

"""Prices that operators set: of a million tokens, before those of the settings and of the price list."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.http import HttpRequest
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy as _

from ..models import Change, Price
from .columns import EMPTY, columns, currency_lazy, moment
from .pages import List, Page
from .profiles import choose_provider


class PriceForm(forms.ModelForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        choose_provider(self)


def last_changes(prices: Any) -> dict[str, Change]:
    """Who set each last, by the price's name. One query."""
    rows = Change.objects.filter(kind="price", subject__in=[str(price) for price in prices]).order_by("at", "id")
    return {row.subject: row for row in rows}


class PriceList(List):
    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        known = last_changes(self.result_list)
        for row in self.result_list:
            row.last_change = known.get(str(row))


@admin.register(Price)
class PriceAdmin(Page):
    form = PriceForm
    fieldsets = (
        (None, {"fields": ("provider", "model")}),
        (
            format_lazy(_("{currency} for a million tokens"), currency=currency_lazy()),
            {"fields": ("input", "cached_input", "output")},
        ),
    )
    list_display = (*columns(Price, "model", "input", "output", "cached_input", "provider"), "set_by")
    search_fields = ("provider", "model")

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return PriceList

    @admin.display(description=_("set by"))
    def set_by(self, row: Any) -> str:
        change: Change | None = row.last_change
        return f"{change.actor or EMPTY}, {moment(change.at)}" if change else EMPTY

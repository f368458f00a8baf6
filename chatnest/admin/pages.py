"""What every page here does: its values as columns show them, exact search, and the ledger told who is acting."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db import models
from django.http import HttpRequest, HttpResponse

from .. import changes
from ..accounts import KINDS, canonical, misnamed
from ..reports import find
from .columns import Column, column, columns, with_people


def acting(request: HttpRequest, reason: str = "") -> AbstractContextManager[None]:
    """What is changed within is recorded as this person's."""
    return changes.acting(request.user.get_username(), reason)


class List(ChangeList):
    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        page: Any = self.model_admin
        if field := page.account_field:
            with_people(self.result_list, field)


class Page(admin.ModelAdmin):
    """``account_field``: the one that names an account, if any: searched whole, its person shown."""

    account_field = ""

    class Media:
        css = {"all": ["chatnest/admin.css"]}

    def locked(self, request: HttpRequest, obj: Any = None) -> Collection[str]:
        """The fields that this person may read and not write."""
        return ()

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        return [*self.readonly_fields, *(self.column(name) for name in self.locked(request, obj))]

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """With what is only read as columns show it: Django has neither separators, nor seconds, nor zones."""
        locked = {*self.locked(request, obj)}
        if obj is not None and not self.has_change_permission(request, obj):
            locked = {field.name for field in self.opts.concrete_fields}

        def shown(name: Any) -> Any:
            if isinstance(name, list | tuple):
                return tuple(map(shown, name))
            return self.column(name) if name in locked else name

        fieldsets = super().get_fieldsets(request, obj)
        return [(title, {**options, "fields": shown(options["fields"])}) for title, options in fieldsets]

    def column(self, name: str) -> Column:
        model: Any = self.model
        return column(model, name)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return List

    def get_search_results(
        self, request: HttpRequest, queryset: models.QuerySet[Any], search_term: str
    ) -> tuple[models.QuerySet[Any], bool]:
        """``user:35`` finds it, and not ``user:3500`` beside it; a person's name finds the account."""
        named, term = self.account_field, search_term.strip()
        if not (named and term):
            return super().get_search_results(request, queryset, search_term)
        name = canonical(term)
        exact = queryset.filter(**{named: name})
        if _is_whole(name) or exact.exists():
            return exact, False
        containing, duplicates = super().get_search_results(request, queryset, search_term)
        return containing | queryset.filter(**{f"{named}__in": find(term)}), duplicates

    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        with acting(request):
            return super().changeform_view(request, *args, **kwargs)

    def changelist_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        with acting(request):
            return super().changelist_view(request, *args, **kwargs)

    def delete_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        with acting(request):
            return super().delete_view(request, *args, **kwargs)


def _is_whole(name: str) -> bool:
    """All of an account's name, whether or not anything is stored of it."""
    return name.partition(":")[0] in KINDS and ":" in name and misnamed(name) is None


class Record(Page):
    """Rows that only chatnest writes: a hand that edits them breaks the sums."""

    show_full_result_count = False  # of a million rows, a second count

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        return columns(self.model)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

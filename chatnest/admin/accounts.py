"""Accounts: who it is, what an operator decided, and what is in force today."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.contrib.auth import get_user_model
from django.db import models
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, pgettext

from ..accounts import SHARED, SITE
from ..models import Account
from ..operators.standing import daily_limit
from ..policy import Policy
from ..reports import people
from .columns import EMPTY, Column, columns
from .naming import AccountForm, in_force
from .pages import List, Page
from .pausing import confirmed

GRANT: Final = ("extra_tokens", "extra_day")


def with_limits(rows: Iterable[Any]) -> None:
    policy = Policy.read(SHARED)
    for row in rows:
        row.limit = daily_limit(row, policy=policy)


class AccountList(List):
    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        with_limits(self.result_list)


@admin.register(Account)
class AccountAdmin(Page):
    form = AccountForm
    fieldsets = (
        (None, {"fields": ("name", "paused", "profile")}),
        (gettext_lazy("Tokens"), {"fields": (("daily_token_limit", "in_force_today"), GRANT)}),
        (gettext_lazy("Money"), {"fields": ("daily_money_limit", "monthly_money_limit")}),
    )
    readonly_fields = ("who", "in_force_today")
    list_display = ("name", "who", "state", "in_force_today", *columns(Account, "profile"))
    list_filter = ("paused", "profile")
    list_select_related = ("profile",)
    account_field = "name"
    search_fields = ("name",)
    actions = ("pause", "resume")

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return AccountList

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        form: Any = super().get_form(request, obj, change, **kwargs)
        form.choose_from = None if change or not self.may_choose_users(request) else self.admin_site
        return form

    def may_choose_users(self, request: HttpRequest) -> bool:
        """Where the site's admin has a page of users that can be searched, and this person may see it."""
        users = get_user_model()
        if not self.admin_site.is_registered(users):
            return False
        page = self.admin_site.get_model_admin(users)
        return bool(page.get_search_fields(request)) and page.has_view_permission(request)

    def get_fieldsets(self, request: HttpRequest, obj: Account | None = None) -> Any:
        (title, options), *others = super().get_fieldsets(request, obj)
        name, *rest = options["fields"]
        first: list[Any] = [name, "who"] if obj else ["user", name] if self.may_choose_users(request) else [name]
        return [(title, {**options, "fields": (*first, *rest)}), *others]

    def locked(self, request: HttpRequest, obj: Account | None = None) -> Collection[str]:
        # A decision about one account is not moved to another: its name is what it is about.
        name = ("name",) if obj else ()
        paused = () if self.may_pause(request, obj) else ("paused",)
        return (*name, *paused, *(() if request.user.has_perm("chatnest.grant_tokens") else GRANT))

    def column(self, name: str) -> Column:
        """A tick that says "paused" reads as "all is well"."""
        return "state" if name == "paused" else super().column(name)

    def may_pause(self, request: HttpRequest, row: Account | None = None) -> bool:
        """Pausing the site stops the chat for everybody, which is a permission of its own."""
        is_site = row is not None and row.name == SITE
        return request.user.has_perm("chatnest.stop_chat" if is_site else "chatnest.pause_account")

    def has_pause_permission(self, request: HttpRequest) -> bool:
        return self.may_pause(request) or request.user.has_perm("chatnest.stop_chat")

    def has_delete_permission(self, request: HttpRequest, obj: Account | None = None) -> bool:
        return super().has_delete_permission(request, obj) and not (obj and obj.is_shared)

    def save_model(self, request: HttpRequest, obj: Account, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if not change and (person := people([obj.name]).get(obj.name)):
            self.message_user(request, _("This is %(person)s: %(account)s.") % {"account": obj, "person": person})

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        """Says what the deleted decisions leave."""
        row = self.get_object(request, object_id)
        left = Account(name=row.name) if row else None
        then = {"account": row, "then": in_force(left, daily_limit(left)) if left else ""}
        return super().delete_view(request, object_id, {**then, **(extra_context or {})})

    @admin.action(permissions=["pause"], description=gettext_lazy("Pause selected accounts"))
    def pause(self, request: HttpRequest, queryset: models.QuerySet[Account]) -> HttpResponse | None:
        return confirmed(self, request, queryset, paused=True)

    @admin.action(permissions=["pause"], description=gettext_lazy("Let selected accounts chat again"))
    def resume(self, request: HttpRequest, queryset: models.QuerySet[Account]) -> HttpResponse | None:
        return confirmed(self, request, queryset, paused=False)

    @admin.display(description=gettext_lazy("who"))
    def who(self, row: Account) -> str:
        known = getattr(row, "people", None)
        return str((people([row.name]) if known is None else known).get(row.name, EMPTY))

    @admin.display(description=gettext_lazy("state"), ordering="paused")
    def state(self, row: Account) -> SafeString:
        if row.paused:
            return format_html("<strong>{}</strong>", pgettext("account", "Paused"))
        return format_html("{}", pgettext("account", "Running"))

    @admin.display(description=gettext_lazy("in force today"))
    def in_force_today(self, row: Account) -> str:
        if row._state.adding:
            return EMPTY
        return in_force(row, getattr(row, "limit", None) or daily_limit(row))

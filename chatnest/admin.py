"""The admin: what operators set, beside what is in force after the clamp; what the ledger wrote, to read."""

from __future__ import annotations

from datetime import date
from typing import Any, cast

from django import forms
from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db import models
from django.http import HttpRequest
from django.utils.formats import number_format
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext

from .accounts import SHARED, canonical
from .conf import provider_names, today
from .limits import FIELDS, clamp, hard_caps
from .models import Account, Adjustment, Calibration, DailyUsage, Profile, RateWindow, Refusal, Reservation
from .operators import pages  # noqa: F401 - registers the Usage page
from .policy import DailyLimit, Policy


def number(value: float) -> str:
    """As the operator's language writes it, its thousands told apart."""
    return number_format(value, force_grouping=True)


class ProfileForm(forms.ModelForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What is stored is shown, even where the settings have it no more: saving then says so.
        names = sorted(provider_names() | {self.instance.provider})
        self.fields["provider"].widget = forms.Select(choices=[(name, name) for name in names])
        fallback = cast("forms.ModelChoiceField", self.fields["fallback"])
        fallback.queryset = Profile.objects.exclude(pk=self.instance.pk)


@admin.register(Profile)
class ProfileAdmin(admin.ModelAdmin):
    form = ProfileForm
    list_display = (
        *("name", "enabled", "audience", "provider", "model", "daily_token_limit_in_force"),
        *("max_output_tokens_in_force", "rate_max_requests_in_force", "max_concurrent_streams_in_force"),
    )
    fieldsets = (
        (None, {"fields": ("name", "enabled", "audience", "provider", "model", "fallback", "system_prompt")}),
        (
            _("Limits"),
            {
                "fields": tuple((name, f"{name}_in_force") for name in FIELDS),
                "description": _("Whatever is typed here, the code's HARD_CAPS still apply: see what is in force."),
            },
        ),
    )

    def get_readonly_fields(self, request: HttpRequest, obj: Profile | None = None) -> list[str]:
        in_force = [f"{name}_in_force" for name in FIELDS]
        return ["name", *in_force] if obj and obj.is_delivered else in_force

    def has_delete_permission(self, request: HttpRequest, obj: Profile | None = None) -> bool:
        return super().has_delete_permission(request, obj) and not (obj and obj.is_delivered)


def _in_force(name: str) -> Any:
    field: Any = Profile._meta.get_field(name)

    @admin.display(description=format_lazy(_("{limit} in force"), limit=field.verbose_name))
    def in_force(self: ProfileAdmin, profile: Profile) -> SafeString | str:
        typed = getattr(profile, name)
        if profile._state.adding:
            return "-"
        value = getattr(clamp(profile.limits, hard_caps()), name)
        shown = _("not sent") if value is None else number(value)
        if value == typed:
            return str(shown)
        return format_html(
            '<strong title="{}">{}</strong>', _("%s was typed, HARD_CAPS allow this") % number(typed), shown
        )

    return in_force


for _name in FIELDS:
    setattr(ProfileAdmin, f"{_name}_in_force", _in_force(_name))


class AccountForm(forms.ModelForm):
    """Refuses what would be saved with success and change nothing."""

    def clean(self) -> dict[str, Any] | None:
        typed = super().clean() or {}
        row = Account(**{"name": self.instance.name, **typed, "id": None})
        row.name = canonical(row.name)
        limit = daily_limit(row)
        lowered, extra, day = row.daily_token_limit, row.extra_tokens, row.extra_day or today()
        if "daily_token_limit" in self.changed_data and lowered is not None and lowered > limit.given:
            self.add_error("daily_token_limit", _("This would change nothing: %s.") % given(limit))
        if {"extra_tokens", "extra_day"}.isdisjoint(self.changed_data) or not extra:
            return typed
        if day < today():
            self.add_error("extra_day", _("This day is over."))
        row.extra_day = day
        if daily_limit(row, day) == daily_limit(Account(name=row.name, profile=row.profile, daily_token_limit=lowered)):
            self.add_error("extra_tokens", _("This would change nothing: %s, and no more may be.") % given(limit))
        return typed


def daily_limit(row: Account, day: date | None = None, policy: Policy | None = None) -> DailyLimit:
    """What is in force with this row, saved or not."""
    return (policy or Policy.read(SHARED)).with_row(row).daily_limit(row.name, day)


def given(limit: DailyLimit) -> str:
    return _("%(tokens)s by %(source)s") % {"tokens": number(limit.given), "source": limit.source or _("no profile")}


class AccountList(ChangeList):
    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        policy = Policy.read(SHARED)
        for row in self.result_list:
            row.limit = daily_limit(row, policy=policy)


@admin.register(Account)
class AccountAdmin(admin.ModelAdmin):
    form = AccountForm
    fields = (
        "name",
        "paused",
        "profile",
        ("daily_token_limit", "in_force_today"),
        ("extra_tokens", "extra_day"),
    )
    list_display = ("name", "state", "in_force_today", "profile", "daily_token_limit", "extra_tokens", "extra_day")
    list_filter = ("paused", "profile")
    list_select_related = ("profile",)
    search_fields = ("name",)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return AccountList

    def get_search_results(
        self, request: HttpRequest, queryset: models.QuerySet[Account], search_term: str
    ) -> tuple[models.QuerySet[Account], bool]:
        """``user:35`` finds it, and not ``user:3500`` beside it."""
        exact = queryset.filter(name=canonical(search_term.strip()))
        return (exact, False) if exact.exists() else super().get_search_results(request, queryset, search_term)

    def get_readonly_fields(self, request: HttpRequest, obj: Account | None = None) -> list[str]:
        # A decision about one account is not moved to another: its name is what it is about.
        return ["name", "in_force_today"] if obj else ["in_force_today"]

    def has_delete_permission(self, request: HttpRequest, obj: Account | None = None) -> bool:
        return super().has_delete_permission(request, obj) and not (obj and obj.is_shared)

    @admin.display(description=_("state"), ordering="paused")
    def state(self, row: Account) -> SafeString:
        if row.paused:
            return format_html("<strong>{}</strong>", pgettext("account", "Paused"))
        return format_html("{}", pgettext("account", "Running"))

    @admin.display(description=_("in force today"))
    def in_force_today(self, row: Account) -> str:
        """How many tokens, and why."""
        if row._state.adding:
            return "-"
        limit: DailyLimit = getattr(row, "limit", None) or daily_limit(row)
        if limit.paused:
            return str(_("none: %s is paused") % limit.paused)
        reasons = [given(limit)]
        if row.daily_token_limit is not None and row.daily_token_limit < limit.given:
            reasons.append(_("lowered to %s") % number(row.daily_token_limit))
        if extra := row.extra_on(today()):
            reasons.append(_("%s more today") % number(extra))
        return f"{number(limit.in_force)} ({', '.join(map(str, reasons))})"


class LedgerAdmin(admin.ModelAdmin):
    """Rows that only the ledger writes: a hand that edits them breaks the sums."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


@admin.register(DailyUsage)
class DailyUsageAdmin(LedgerAdmin):
    list_display = (
        "day",
        "account",
        "tokens_used",
        "tokens_reserved",
        "prompt_tokens",
        "completion_tokens",
        "requests",
    )
    date_hierarchy = "day"
    search_fields = ("account",)


@admin.register(Reservation)
class ReservationAdmin(LedgerAdmin):
    list_display = (
        "created_at",
        "payer",
        "profile",
        "state",
        "outcome",
        "tokens",
        "tokens_charged",
        "usage_source",
    )
    list_filter = ("state", "outcome", "usage_source", "profile")
    search_fields = ("payer", "id")


@admin.register(Refusal)
class RefusalAdmin(LedgerAdmin):
    list_display = ("day", "account", "code", "count", "last_at", "last_detail")
    list_filter = ("code",)
    date_hierarchy = "day"
    search_fields = ("account",)


@admin.register(Calibration)
class CalibrationAdmin(LedgerAdmin):
    list_display = (
        "provider",
        "model",
        "reports",
        "prompt_excess",
        "completion_excess",
        "reasons_unseen",
        "ignores_max_tokens",
        "updated_at",
    )
    search_fields = ("model",)

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return admin.ModelAdmin.has_delete_permission(self, request, obj)


@admin.register(Adjustment)
class AdjustmentAdmin(LedgerAdmin):
    list_display = ("created_at", "day", "account", "tokens", "kind", "reason", "actor")
    list_filter = ("kind",)
    search_fields = ("account", "reason", "actor")


@admin.register(RateWindow)
class RateWindowAdmin(LedgerAdmin):
    list_display = ("window_start", "window_seconds", "account", "count")
    search_fields = ("account",)

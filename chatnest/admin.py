"""The admin: what operators set, beside what is in force after the clamp; what the ledger wrote, to read."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.db import models
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy as _

from .conf import provider_names
from .limits import FIELDS, clamp, hard_caps
from .models import Account, Adjustment, Calibration, DailyUsage, Profile, RateWindow, Reservation


class ProfileForm(forms.ModelForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What is stored is shown, even where the settings have it no more: saving then says so.
        names = sorted(provider_names() | {self.instance.provider})
        self.fields["provider"].widget = forms.Select(choices=[(name, name) for name in names])


@admin.register(Profile)
class ProfileAdmin(admin.ModelAdmin):
    form = ProfileForm
    list_display = ("name", "enabled", "audience", "provider", "model", *(f"{name}_in_force" for name in FIELDS))
    fieldsets = (
        (None, {"fields": ("name", "enabled", "audience", "provider", "model", "system_prompt")}),
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
    @admin.display(description=format_lazy(_("{limit} in force"), limit=name.replace("_", " ")))
    def in_force(self: ProfileAdmin, profile: Profile) -> SafeString | str:
        typed = getattr(profile, name)
        if profile._state.adding:
            return "-"
        value = getattr(clamp(profile.limits, hard_caps()), name)
        shown = _("not sent") if value is None else f"{value:,}"
        if value == typed:
            return str(shown)
        return format_html('<strong title="{}">{}</strong>', _("%s was typed, HARD_CAPS allow this") % typed, shown)

    return in_force


for _name in FIELDS:
    setattr(ProfileAdmin, f"{_name}_in_force", _in_force(_name))


@admin.register(Account)
class AccountAdmin(admin.ModelAdmin):
    list_display = ("name", "profile", "daily_token_limit", "paused")
    list_filter = ("paused", "profile")
    search_fields = ("name",)


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

"""What only chatnest writes: to read, and to find by account."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from ..models import Adjustment, Calibration, Change, DailyUsage, Refusal, Reservation, UsageLine
from .columns import columns
from .pages import Record


@admin.register(DailyUsage)
class DailyUsageAdmin(Record):
    list_display = columns(DailyUsage, "day", "account", "tokens_used", "tokens_reserved", "requests")
    date_hierarchy = "day"
    account_field = "account"
    search_fields = ("account",)


@admin.register(UsageLine)
class UsageLineAdmin(Record):
    list_display = columns(UsageLine, "day", "account", "model", "cost", "profile", "requests")
    list_filter = ("provider", "model", "profile")
    date_hierarchy = "day"
    account_field = "account"
    search_fields = ("account",)


@admin.register(Reservation)
class ReservationAdmin(Record):
    list_display = columns(Reservation, "created_at", "payer", "tokens_charged", "outcome", "cost", "profile")
    list_filter = ("state", "outcome", "usage_source", "profile")
    account_field = "payer"
    search_fields = ("payer", "id")


@admin.register(Refusal)
class RefusalAdmin(Record):
    list_display = columns(Refusal, "last_at", "account", "code", "count", "last_detail")
    list_filter = ("code",)
    date_hierarchy = "day"
    account_field = "account"
    search_fields = ("account",)


@admin.register(Adjustment)
class AdjustmentAdmin(Record):
    list_display = columns(Adjustment, "created_at", "account", "kind", "tokens", "actor", "reason")
    list_filter = ("kind",)
    account_field = "account"
    search_fields = ("account", "reason", "actor")


@admin.register(Change)
class ChangeAdmin(Record):
    list_display = columns(Change, "at", "subject", "field", "new", "old", "actor", "reason")
    list_filter = ("kind",)
    account_field = "subject"
    search_fields = ("subject", "actor", "reason")


@admin.register(Calibration)
class CalibrationAdmin(Record):
    """Read, and cleared: to forget what reports have taught, its row is deleted."""

    list_display = columns(Calibration, "model", "provider", "reports", "prompt_excess", "completion_excess")
    search_fields = ("model",)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return admin.ModelAdmin.has_delete_permission(self, request, obj)

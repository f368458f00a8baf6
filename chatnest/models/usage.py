"""What was used: counters of a day, and of a rate window."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Final, Self

from django.db import models
from django.db.models import F, Q
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy as _

from ..accounts import ACCOUNT_LENGTH
from ..conf import DEFAULT_PROVIDER
from .reservation import LABEL_LENGTH


class DailyUsageQuerySet(models.QuerySet["DailyUsage"]):
    def on(self, day: date) -> Self:
        return self.filter(day=day)

    def named(self, keys: Iterable[tuple[date, str]]) -> Self:
        """The rows of these (day, account) pairs."""
        accounts_of: dict[date, list[str]] = {}
        for day, account in keys:
            accounts_of.setdefault(day, []).append(account)
        chosen = Q(pk__in=())
        for day, accounts in accounts_of.items():
            chosen |= Q(day=day, account__in=accounts)
        return self.filter(chosen)


class DailyUsage(models.Model):
    """One account's tokens on one day, and their cost in millionths. What is used = charges + adjustments."""

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    tokens_used = models.BigIntegerField(_("tokens used"), default=0)
    tokens_reserved = models.BigIntegerField(_("tokens reserved"), default=0)
    prompt_tokens = models.BigIntegerField(_("prompt tokens"), default=0)
    completion_tokens = models.BigIntegerField(_("completion tokens"), default=0)
    requests = models.BigIntegerField(_("requests"), default=0)
    cost_used = models.BigIntegerField(_("cost used"), default=0, help_text=_("In millionths of the currency."))
    cost_reserved = models.BigIntegerField(_("cost reserved"), default=0)
    crossed = models.PositiveSmallIntegerField(
        _("crossed"), default=0, help_text=_("The percentage of the limit whose crossing was told: 50, 80 or 100.")
    )

    objects = DailyUsageQuerySet.as_manager()

    class Meta:
        verbose_name = _("daily usage")
        verbose_name_plural = _("daily usage")
        ordering = ["-day", "account"]
        constraints = [
            models.UniqueConstraint(fields=["day", "account"], name="chatnest_one_usage_a_day"),
            models.CheckConstraint(
                condition=Q(
                    tokens_used__gte=0,
                    tokens_reserved__gte=0,
                    prompt_tokens__gte=0,
                    completion_tokens__gte=0,
                    requests__gte=0,
                    cost_used__gte=0,
                    cost_reserved__gte=0,
                ),
                name="chatnest_usage_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.account}, {self.day}"


class RateWindow(models.Model):
    """How many requests of an account were admitted in one window, which starts at a multiple of its length."""

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    window_start = models.DateTimeField(_("window start"))
    window_seconds = models.PositiveIntegerField(_("window seconds"))
    count = models.PositiveIntegerField(_("count"), default=0)

    class Meta:
        verbose_name = _("rate window")
        verbose_name_plural = _("rate windows")
        constraints = [
            models.UniqueConstraint(
                # The day is in the key because the day's usage row is the lock that guards the count.
                fields=["account", "window_start", "window_seconds", "day"],
                name="chatnest_one_count_a_window",
            ),
            models.CheckConstraint(condition=Q(window_seconds__gte=1), name="chatnest_window_has_length"),
        ]
        indexes = [models.Index(fields=["day"], name="chatnest_window_day")]

    def __str__(self) -> str:
        return f"{self.account}, {self.window_start:%H:%M:%S}"


BILLED: Final = F("tokens_reported") + F("tokens_counted") + F("tokens_held")


class UsageLine(models.Model):
    """One line of an account's bill for a day: what one model was paid for one profile and label. Kept for ever.

    What was billed is BILLED; what was forgiven is in it too.
    """

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    profile = models.CharField(_("profile"), max_length=50, blank=True)
    provider = models.CharField(_("provider"), max_length=100, default=DEFAULT_PROVIDER)
    model = models.CharField(_("model"), max_length=100)
    label = models.CharField(_("label"), max_length=LABEL_LENGTH, blank=True, default="")
    requests = models.BigIntegerField(_("requests"), default=0)
    prompt_tokens = models.BigIntegerField(_("prompt tokens"), default=0)
    cached_tokens = models.BigIntegerField(_("cached tokens"), default=0)
    completion_tokens = models.BigIntegerField(_("completion tokens"), default=0)
    reasoning_tokens = models.BigIntegerField(_("reasoning tokens"), default=0)
    tokens_reported = models.BigIntegerField(_("tokens reported"), default=0)
    tokens_counted = models.BigIntegerField(_("tokens counted"), default=0)
    tokens_held = models.BigIntegerField(_("tokens held"), default=0)
    cost = models.BigIntegerField(
        _("cost"), default=0, help_text=_("In millionths of the currency, of what had a price.")
    )
    unpriced = models.BigIntegerField(_("unpriced"), default=0, help_text=_("Requests whose price was unknown."))

    class Meta:
        verbose_name = _("usage line")
        verbose_name_plural = _("usage lines")
        ordering = ["-day", "account"]
        constraints = [
            models.UniqueConstraint(
                fields=["account", "day", "profile", "provider", "model", "label"], name="chatnest_one_line_a_day"
            )
        ]
        indexes = [models.Index(fields=["day"], name="chatnest_line_day")]

    def __str__(self) -> str:
        return f"{self.account}, {self.day}: {self.model}"


class Usage(DailyUsage):
    """The page of that name in the admin, and what may be done there."""

    class Meta:
        proxy = True
        # Django lists an app's models by name: a space, which no page shows, puts this one first.
        verbose_name = _("usage")
        verbose_name_plural = format_lazy(" {}", _("Usage"))
        default_permissions = ("view",)
        permissions = [
            ("stop_chat", _("Can stop the chat for everybody, and single answers")),
            ("pause_account", _("Can pause accounts")),
            ("forgive_usage", _("Can forgive what was used")),
            ("grant_tokens", _("Can give accounts more, and less, tokens")),
        ]

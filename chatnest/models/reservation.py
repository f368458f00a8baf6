"""One request's tokens, from hold to charge."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from datetime import datetime
from typing import Final, Self

from django.db import models
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from ..accounts import ACCOUNT_LENGTH
from ..conf import DEFAULT_PROVIDER

LABEL_LENGTH: Final = 100


class ReservationQuerySet(models.QuerySet["Reservation"]):
    def open(self) -> Self:
        return self.filter(state=Reservation.State.OPEN)

    def charging(self, accounts: Collection[str]) -> list[Reservation]:
        """Those that any of these accounts pays for. Few are open; SQLite cannot look into JSON by an index."""
        return [row for row in self if not set(row.accounts).isdisjoint(accounts)]

    def failed(self) -> Self:
        """Whose reader got no whole answer, and did not leave."""
        return self.filter(outcome__in=Reservation.FAILURES)

    def overdue(self, now: datetime) -> Self:
        """Open, but its process has stopped renewing it."""
        return self.open().filter(expires_at__lte=now)


class Reservation(models.Model):
    """A hold on the tokens of one request, and what became of it. It resolves once."""

    class State(models.TextChoices):
        OPEN = "open", pgettext_lazy("reservation", "Open")
        SETTLED = "settled", pgettext_lazy("reservation", "Settled")
        EXPIRED = "expired", pgettext_lazy("reservation", "Expired")

    class Outcome(models.TextChoices):
        COMPLETED = "completed", pgettext_lazy("reservation", "Completed")
        CANCELLED = "cancelled", pgettext_lazy("reservation", "Cancelled")
        TIMED_OUT = "timed_out", pgettext_lazy("reservation", "Timed out")
        UPSTREAM_ERROR = "upstream_error", pgettext_lazy("reservation", "Upstream error")
        STOPPED = "stopped", pgettext_lazy("reservation", "Stopped")
        EXPIRED = "expired", pgettext_lazy("reservation", "Expired")

    FAILURES = (Outcome.UPSTREAM_ERROR, Outcome.TIMED_OUT, Outcome.EXPIRED)

    class UsageSource(models.TextChoices):
        REPORTED = "reported", pgettext_lazy("usage", "Reported")
        COUNTED = "counted", pgettext_lazy("usage", "Counted")
        HELD = "held", pgettext_lazy("usage", "Held")
        NONE = "none", pgettext_lazy("usage", "None")

    id = models.UUIDField("ID", primary_key=True, default=uuid.uuid4, editable=False)
    day = models.DateField(_("day"))
    payer = models.CharField(_("payer"), max_length=ACCOUNT_LENGTH)
    accounts: models.JSONField[list[str], list[str]] = models.JSONField(
        _("accounts"), help_text=_("Every account that is charged, the payer first.")
    )
    profile = models.CharField(_("profile"), max_length=50)
    provider = models.CharField(_("provider"), max_length=100, default=DEFAULT_PROVIDER)
    model = models.CharField(_("model"), max_length=100)
    label = models.CharField(
        _("label"), max_length=LABEL_LENGTH, blank=True, default="", help_text=_("Which feature of the site asked.")
    )
    tokens = models.PositiveBigIntegerField(
        _("tokens"), help_text=_("The hold: the prompt's bound and the answer's allowance.")
    )
    state = models.CharField(_("state"), max_length=10, choices=State.choices, default=State.OPEN)
    outcome = models.CharField(_("outcome"), max_length=20, choices=Outcome.choices, blank=True, default="")
    usage_source = models.CharField(
        _("usage source"), max_length=10, choices=UsageSource.choices, default=UsageSource.NONE
    )
    prompt_tokens = models.PositiveBigIntegerField(_("prompt tokens"), default=0)
    completion_tokens = models.PositiveBigIntegerField(_("completion tokens"), default=0)
    cached_tokens = models.PositiveBigIntegerField(
        _("cached tokens"), default=0, help_text=_("Of the prompt's, where reported.")
    )
    reasoning_tokens = models.PositiveBigIntegerField(
        _("reasoning tokens"), default=0, help_text=_("Of the answer's, where reported.")
    )
    tokens_charged = models.PositiveBigIntegerField(_("tokens charged"), default=0)
    cost_reserved = models.PositiveBigIntegerField(
        _("cost reserved"),
        null=True,
        blank=True,
        help_text=_("The hold, in millionths of the currency. Empty: no price was known."),
    )
    cost = models.PositiveBigIntegerField(
        _("cost"),
        null=True,
        blank=True,
        help_text=_("In millionths of the currency, at the prices of its hold. Empty: no price was known."),
    )
    error = models.CharField(
        _("error"), max_length=50, blank=True, default="", help_text=_("The code of what ended it.")
    )
    first_token_ms = models.PositiveIntegerField(_("first token, ms"), null=True, blank=True)
    created_at = models.DateTimeField(_("created at"))
    expires_at = models.DateTimeField(_("expires at"))
    settled_at = models.DateTimeField(_("settled at"), null=True, blank=True)

    objects = ReservationQuerySet.as_manager()

    class Meta:
        verbose_name = _("reservation")
        verbose_name_plural = _("reservations")
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(condition=Q(state__in=["open", "settled", "expired"]), name="chatnest_known_state"),
            models.CheckConstraint(
                condition=Q(state="open", settled_at=None, tokens_charged=0, outcome="")
                | (~Q(state="open") & Q(settled_at__isnull=False) & ~Q(outcome="")),
                name="chatnest_resolved_once",
            ),
            models.CheckConstraint(condition=Q(expires_at__gte=F("created_at")), name="chatnest_lease_has_length"),
        ]
        indexes = [
            models.Index(fields=["expires_at"], condition=Q(state="open"), name="chatnest_open_lease"),
            # By lease too, so that counting a payer's streams passes by all that closed since the last vacuum.
            models.Index(fields=["payer", "expires_at"], condition=Q(state="open"), name="chatnest_open_payer"),
            models.Index(fields=["day", "payer"], name="chatnest_reservation_day"),
            models.Index(fields=["-created_at"], name="chatnest_reservation_latest"),
            models.Index(
                fields=["-created_at"],
                condition=Q(outcome__in=["upstream_error", "timed_out", "expired"]),
                name="chatnest_failed",
            ),
        ]

    def __str__(self) -> str:
        return str(self.pk)

    def is_overdue(self, now: datetime) -> bool:
        return self.state == self.State.OPEN and self.expires_at <= now

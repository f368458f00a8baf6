"""A correction of a day."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from ..accounts import ACCOUNT_LENGTH


class Adjustment(models.Model):
    """A correction of one account's day, beside the charges. What it means is its kind; the reason is for people."""

    class Kind(models.TextChoices):
        FORGIVEN = "forgiven", pgettext_lazy("adjustment", "Forgiven")  # an operator's reset
        LATE = "late", pgettext_lazy("adjustment", "Late")  # a settlement after its hold was charged
        PRUNED = "pruned", pgettext_lazy("adjustment", "Pruned")  # stands for the account's deleted rows of the day
        GRANTED = "granted", pgettext_lazy("adjustment", "Granted")  # an operator's gift for the day

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    tokens = models.BigIntegerField(_("tokens"))
    cost = models.BigIntegerField(_("cost"), default=0, help_text=_("In millionths of the currency."))
    kind = models.CharField(_("kind"), max_length=10, choices=Kind.choices)
    reason = models.CharField(_("reason"), max_length=200, blank=True)
    actor = models.CharField(
        _("actor"), max_length=200, blank=True, help_text=_("Who did it; empty for chatnest itself.")
    )
    created_at = models.DateTimeField(_("created at"))

    class Meta:
        verbose_name = _("adjustment")
        verbose_name_plural = _("adjustments")
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(
                condition=Q(kind__in=["forgiven", "late", "pruned", "granted"]), name="chatnest_known_kind"
            )
        ]
        indexes = [models.Index(fields=["day", "account"], name="chatnest_adjustment_day")]

    def __str__(self) -> str:
        return f"{self.account}, {self.day}: {self.tokens:+}"

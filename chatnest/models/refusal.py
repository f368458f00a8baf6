"""Who was refused, and why."""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _

from ..accounts import ACCOUNT_LENGTH


class Refusal(models.Model):
    """How often an account was refused in an hour, and why. Summed in memory and written now and then: not exact."""

    day = models.DateField(_("day"))
    hour = models.DateTimeField(_("hour"), help_text=_("When it began."))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    code = models.CharField(_("code"), max_length=50)
    count = models.PositiveBigIntegerField(_("count"), default=0)
    last_at = models.DateTimeField(_("last at"))
    last_detail = models.CharField(_("last detail"), max_length=200, blank=True, default="")

    class Meta:
        verbose_name = _("refusal")
        verbose_name_plural = _("refusals")
        ordering = ["-last_at"]
        indexes = [
            models.Index(fields=["-last_at"], name="chatnest_refusal_latest"),
            models.Index(fields=["account", "-last_at"], name="chatnest_refusal_account"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["hour", "account", "code"], name="chatnest_one_refusal_an_hour_and_code")
        ]

    def __str__(self) -> str:
        return f"{self.account}, {self.hour:%Y-%m-%d %H:%M}: {self.code}"

"""What people did."""

from __future__ import annotations

from typing import Final

from django.db import models
from django.utils.translation import gettext_lazy as _

ACTOR_LENGTH: Final = 200
VALUE_LENGTH: Final = 200


class Change(models.Model):
    """One value that somebody changed, by the admin, a command or the site's code. Only chatnest writes it."""

    at = models.DateTimeField(_("at"))
    actor = models.CharField(
        _("actor"), max_length=ACTOR_LENGTH, blank=True, help_text=_("Who did it; empty where that is not known.")
    )
    kind = models.CharField(_("kind"), max_length=20, help_text=_("account, profile, price, calibration, or proof"))
    subject = models.CharField(_("subject"), max_length=250, help_text=_("Its name."))
    field = models.CharField(_("field"), max_length=50)
    old = models.CharField(_("old"), max_length=VALUE_LENGTH, blank=True)
    new = models.CharField(_("new"), max_length=VALUE_LENGTH, blank=True)
    reason = models.CharField(_("reason"), max_length=200, blank=True)

    class Meta:
        verbose_name = _("change")
        verbose_name_plural = _("changes")
        ordering = ["-at", "-id"]
        indexes = [
            models.Index(fields=["-at"], name="chatnest_change_latest"),
            models.Index(fields=["kind", "subject", "-at"], name="chatnest_change_subject"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: {self.field}"

"""What reports have taught about a model."""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _


class Calibration(models.Model):
    """What the reports and refusals of one model have taught about it. To forget it, delete the row."""

    provider = models.CharField(_("provider"), max_length=100)
    model = models.CharField(_("model"), max_length=100)
    reports = models.PositiveBigIntegerField(
        _("reports"), default=0, help_text=_("Answers, read to their end, whose usage was reported.")
    )
    prompt_excess = models.PositiveBigIntegerField(
        _("prompt excess"),
        default=0,
        help_text=_("The most tokens by which a reported prompt exceeded its bound: later holds add them."),
    )
    completion_excess = models.PositiveBigIntegerField(
        _("completion excess"),
        default=0,
        help_text=_("The most tokens by which a reported answer exceeded what was counted of it."),
    )
    reasons_unseen = models.BooleanField(
        _("reasons unseen"),
        default=False,
        help_text=_("A report named reasoning that was not received: without a report, the whole hold is charged."),
    )
    ignores_max_tokens = models.BooleanField(
        _("ignores max tokens"), default=False, help_text=_("An answer was longer than it was allowed to be.")
    )
    refused_at = models.DateTimeField(
        _("refused at"),
        null=True,
        blank=True,
        help_text=_("When operators were last told that its provider refuses the site's key, or the model."),
    )
    updated_at = models.DateTimeField(_("updated at"))

    class Meta:
        verbose_name = _("calibration")
        verbose_name_plural = _("calibrations")
        ordering = ["provider", "model"]
        constraints = [models.UniqueConstraint(fields=["provider", "model"], name="chatnest_one_calibration_a_model")]

    def __str__(self) -> str:
        return f"{self.provider}: {self.model}"

    @property
    def bills_what_it_shows(self) -> bool:
        """So that an answer without a report can be counted."""
        return self.reports > 0 and not self.reasons_unseen

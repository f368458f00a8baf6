"""What an operator decided about one account."""

from __future__ import annotations

from datetime import date
from typing import Any

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from ..accounts import ACCOUNT_LENGTH, SHARED, canonical, is_name, misnamed
from ..conf import settings, today
from .price import MONEY
from .profile import Profile
from .usage import DailyUsage


def _validate_account_name(name: str) -> None:
    if not is_name(name):
        raise ValidationError(_("Use text of 1 to 200 characters, without control characters or space at an end."))


class Account(models.Model):
    """What an operator decided about one account. Accounts need no row; most have none.

    What is in force is for ``policy`` to say.
    """

    name = models.CharField(
        _("name"),
        max_length=ACCOUNT_LENGTH,
        unique=True,
        validators=[_validate_account_name],
        help_text=_(
            "site, anonymous, user:7 (its primary key), ip:192.0.2.1 or key:3, or what the site's PAYER charges. "
            "Pausing site stops every chat; pausing anonymous, those of visitors who are not logged in."
        ),
    )
    profile = models.ForeignKey(
        Profile,
        verbose_name=_("profile"),
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        help_text=_("Used whatever the client asks for."),
    )
    daily_token_limit = models.PositiveBigIntegerField(
        _("daily token limit"), null=True, blank=True, help_text=_("Lowers the limit that is in force without it.")
    )
    daily_money_limit = models.DecimalField(
        _("daily money limit"), **MONEY, help_text=_("In the currency of the settings, beside tokens.")
    )
    monthly_money_limit = models.DecimalField(_("monthly money limit"), **MONEY, help_text=_("Of a calendar month."))
    extra_tokens = models.PositiveBigIntegerField(
        _("extra tokens"),
        null=True,
        blank=True,
        help_text=_("More than the limit, for one day. The code's hard caps still apply."),
    )
    extra_day = models.DateField(
        _("extra day"), null=True, blank=True, help_text=_("The day of the extra tokens. Empty: today.")
    )
    paused = models.BooleanField(_("paused"), default=False)

    class Meta:
        verbose_name = _("account")
        verbose_name_plural = _("accounts")
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(extra_tokens__isnull=True, extra_day__isnull=True)
                | Q(extra_tokens__isnull=False, extra_day__isnull=False),
                name="chatnest_extra_has_its_day",
            )
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.name = canonical(self.name)
        super().save(*args, **kwargs)

    @property
    def is_shared(self) -> bool:
        """``site`` and ``anonymous``, which everybody or every stranger pays from: always there."""
        return self.name in SHARED

    def extra_on(self, day: date) -> int:
        """The tokens granted for that day."""
        return self.extra_tokens if self.extra_tokens and self.extra_day == day else 0

    def clean(self) -> None:
        self.name = canonical(self.name)
        self._clean_name()
        if not self.extra_tokens:
            self.extra_tokens = self.extra_day = None
        elif self.extra_day is None:
            self.extra_day = today()

    def _clean_name(self) -> None:
        """Whatever can pay can be paused, and what cannot is refused: it would look like a success."""
        stored = None if self._state.adding else type(self)._base_manager.using(self._state.db).get(pk=self.pk)
        if not is_name(self.name) or (stored and stored.name == self.name):
            return
        if stored and stored.is_shared:
            raise ValidationError({"name": _("Everybody pays from this account by its name, so it keeps it.")})
        problem = misnamed(self.name)
        if problem and not self._has_been_charged():
            raise ValidationError({"name": problem})

    def _has_been_charged(self) -> bool:
        return DailyUsage.objects.using(settings.DATABASE_ALIAS).filter(account=self.name).exists()

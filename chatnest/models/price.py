"""What a model's tokens cost, where an operator says so."""

from __future__ import annotations

from typing import Any, Final

from django.core.validators import MinValueValidator
from django.db import models
from django.utils.translation import gettext_lazy as _

from ..conf import DEFAULT_PROVIDER

MONEY: Final[dict[str, Any]] = {
    "max_digits": 14,
    "decimal_places": 2,
    "null": True,
    "blank": True,
    "validators": [MinValueValidator(0)],
}
_PRICE: Final[dict[str, Any]] = {**MONEY, "decimal_places": 6}


class Price(models.Model):
    """The price of a million tokens of one model. It comes before that of ``PRICES`` and of the price list."""

    provider = models.CharField(_("provider"), max_length=100, default=DEFAULT_PROVIDER)
    model = models.CharField(_("model"), max_length=100)
    input = models.DecimalField(
        _("input"), **{**_PRICE, "null": False, "blank": False}, help_text=_("Of a million tokens of the prompt.")
    )
    cached_input = models.DecimalField(
        _("cached input"), **_PRICE, help_text=_("Of those that the provider had cached. Empty: as any other.")
    )
    output = models.DecimalField(
        _("output"), **{**_PRICE, "null": False, "blank": False}, help_text=_("Of a million tokens of the answer.")
    )

    class Meta:
        verbose_name = _("price")
        verbose_name_plural = _("prices")
        ordering = ["provider", "model"]
        constraints = [models.UniqueConstraint(fields=["provider", "model"], name="chatnest_one_price_a_model")]

    def __str__(self) -> str:
        return f"{self.provider}: {self.model}"

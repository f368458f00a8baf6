"""Amounts of money as people read them."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

from django.utils.formats import number_format
from django.utils.functional import lazy

from ..conf import settings

_LEAST, _MOST = 2, 6  # decimals
MICRO: Final = Decimal(10) ** -_MOST


def currency() -> str:
    return str(getattr(settings, "CURRENCY", "USD"))


currency_lazy = lazy(currency, str)


def amount(value: Decimal) -> str:
    """With two decimals, or as many as it has, up to six."""
    digits = f"{value:.{_MOST}f}".rstrip("0").partition(".")[2]
    return number_format(value, decimal_pos=max(_LEAST, len(digits)), force_grouping=True)


def micro(value: int) -> str:
    """Of millionths."""
    return amount(value * MICRO)

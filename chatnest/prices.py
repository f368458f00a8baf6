"""What a million tokens of a model cost, and what that makes of an answer. In whole millionths of the currency.

The price of a model is an operator's row, or else that of ``CHATNEST["PRICES"]``, or else that of the price list that
the package ``genai-prices`` carries, if it is installed, the currency is its own and it knows the provider's address: a
server that nobody else has may call its model as it likes. The list is the installed package's, and asks no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import lru_cache
from importlib import metadata
from typing import Any, Final, Protocol

from django.core.exceptions import ImproperlyConfigured

from . import conf
from .conf import settings

MILLION: Final = 1_000_000
LIST: Final = "genai-prices"
LIST_CURRENCY: Final = "USD"
# Of the list's prices: those that a chat's tokens do not pay. One that charges them in another way is not taken.
_OTHER: Final = ("cache_write", "audio", "image", "video", "searches")

Key = tuple[str, str]  # a provider and a model


class _Typed(Protocol):
    """A row, as an operator typed it."""

    @property
    def input(self) -> Decimal: ...
    @property
    def cached_input(self) -> Decimal | None: ...
    @property
    def output(self) -> Decimal: ...


@dataclass(frozen=True, slots=True)
class UnitPrice:
    """Of a million tokens, in millionths of the currency. ``source``: who says so."""

    input: int
    cached_input: int
    output: int
    source: str = ""

    def cost(self, prompt: int, completion: int, cached: int = 0) -> int:
        """Of so many tokens, ``cached`` of the prompt's; what is begun is paid."""
        parts = (prompt - cached) * self.input + cached * self.cached_input + completion * self.output
        return -(-parts // MILLION)

    def most(self, prompt: int, completion: int) -> int:
        """That they can cost, cached or not."""
        return max(self.cost(prompt, completion), self.cost(prompt, completion, prompt))

    def affords(self, money: int, prompt: int, most: int) -> int:
        """How many tokens of an answer, up to ``most``, can be paid beside the prompt; below 0 if not even that."""
        left = money * MILLION - prompt * max(self.input, self.cached_input)
        if left < 0:
            return -1
        return min(most, left // self.output) if self.output else most

    def or_dearer(self, other: UnitPrice) -> UnitPrice:
        """A price that is at least either."""
        return UnitPrice(
            max(self.input, other.input), max(self.cached_input, other.cached_input), max(self.output, other.output)
        )


@dataclass(frozen=True, slots=True)
class MoneyLimits:
    """What an account may spend in a day and in a calendar month, in millionths; None: as much as its tokens cost."""

    daily: int | None = None
    monthly: int | None = None

    def __bool__(self) -> bool:
        return (self.daily, self.monthly) != (None, None)

    def lowered(self, daily: object, monthly: object) -> MoneyLimits:
        """With other limits, as people type them, where these are lower."""
        return MoneyLimits(_lower(self.daily, daily), _lower(self.monthly, monthly))


def money_limits(daily: object, monthly: object) -> MoneyLimits:
    """Of amounts as people type them, or None."""
    return MoneyLimits().lowered(daily, monthly)


def _lower(limit: int | None, typed: object) -> int | None:
    if typed is None:
        return limit
    amount = _millionths(typed, ROUND_FLOOR)
    return amount if limit is None else min(limit, amount)


def price(provider: str, model: str, rows: Mapping[Key, _Typed]) -> UnitPrice | None:
    """What is known to be the price of a model; ``rows``: what operators typed. None is not free: nobody knows."""
    if row := rows.get((provider, model)):
        return _unit_price(row.input, row.cached_input, row.output, "admin")
    typed = settings.PRICES
    if found := typed.get(f"{provider}/{model}") or typed.get(model):
        return _unit_price(found["input"], found.get("cached_input"), found["output"], "PRICES")
    if settings.CURRENCY != LIST_CURRENCY:
        return None
    try:
        server = conf.provider(provider)
    except ImproperlyConfigured:
        return None
    # What a client of the site's own making asks, nobody knows.
    return None if server.client else _listed(server.base_url, model, datetime.now(UTC).date().toordinal())


def shown(amount: int) -> str:
    """Millionths as people read them: ``1,234.50 USD``, and smaller parts where there are any."""
    whole, parts = divmod(abs(amount), MILLION)
    fraction = f"{parts:06}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount < 0 else ''}{whole:,}.{fraction} {settings.CURRENCY}"


def _unit_price(prompt: object, cached: object, completion: object, source: str) -> UnitPrice:
    whole = _millionths(prompt, ROUND_CEILING)
    cheap = whole if cached is None else _millionths(cached, ROUND_CEILING)
    return UnitPrice(whole, cheap, _millionths(completion, ROUND_CEILING), source)


def _millionths(amount: object, rounding: str) -> int:
    return int((Decimal(str(amount)) * MILLION).to_integral_value(rounding))


def warm_up() -> None:
    """Load the list, if it is installed: a fifth of a second, so not once there are requests."""
    with suppress(ImportError):
        from genai_prices import data_snapshot

        data_snapshot.get_snapshot()


@lru_cache(maxsize=1000)
def _listed(base_url: str, model: str, day: int) -> UnitPrice | None:
    """By the list, whose prices may begin on a ``day``. Only what is one price for all: no tiers, no hours, no fees."""
    try:
        from genai_prices import data_snapshot, types
    except ImportError:
        return None
    try:
        _, found = data_snapshot.get_snapshot().find_provider_model(model, None, None, base_url)
    except LookupError:
        return None
    conditions = found.prices if isinstance(found.prices, list) else []
    if any(isinstance(one.constraint, types.TimeOfDateConstraint) for one in conditions):
        return None
    prices: dict[str, Any] = {
        name: value
        for name, value in vars(found.get_prices(datetime.now(UTC))).items()
        if value is not None and not any(other in name for other in _OTHER)
    }
    prompt, cached, completion = (prices.pop(f"{name}_mtok", None) for name in ("input", "cache_read", "output"))
    is_flat = isinstance(prompt, Decimal) and isinstance(cached, Decimal | None) and isinstance(completion, Decimal)
    if prices or not is_flat:
        return None
    return _unit_price(prompt, cached, completion, f"{LIST} {metadata.version(LIST)}")

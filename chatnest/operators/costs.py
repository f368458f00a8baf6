"""All about one period, for finance: what is owed, to whom, how sure that is; and the provider's invoice beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from functools import cached_property
from typing import Final

from django import forms
from django.utils.translation import gettext_lazy as _

from ..prices import MILLION
from ..reports import Figures, Period, Person, by, by_day_and_model, estimate, people, totals
from .charts import Chart, stacked
from .words import money, number

MOST_ACCOUNTS: Final = 50
MOST_ROWS: Final = 20


class CompareForm(forms.Form):
    """What the provider's invoice says, in the currency of the settings."""

    invoice = forms.DecimalField(
        label=_("Total of the provider's invoice"), min_value=0, max_digits=14, decimal_places=6, required=False
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """In millionths."""

    invoice: int
    ours: int

    @property
    def difference(self) -> int:
        return self.invoice - self.ours

    @property
    def share(self) -> float | None:
        return abs(self.difference) / self.ours if self.ours else None


class Bill:
    """Read in nine queries, of a month that is not over three more."""

    def __init__(self, period: Period) -> None:
        self.period = period
        self.total = totals(period)
        self._lines = by_day_and_model(period)
        self.accounts = by("account", period, top=MOST_ACCOUNTS)
        self.profiles = by("profile", period, top=MOST_ROWS)
        self.labels = by("label", period, top=MOST_ROWS)
        self.estimate = estimate(period.last) if period.name == "month" else None
        self.people: Mapping[str, Person] = people([str(row.key) for row in self.accounts])

    @cached_property
    def has_prices(self) -> bool:
        return any(line.cost for line in self._lines)

    @cached_property
    def days(self) -> Sequence[date]:
        return [self.period.first + timedelta(days=ahead) for ahead in range(self.period.days)]

    @cached_property
    def chart(self) -> Chart:
        """A bar a day by model: of money, where anything had a price."""
        series: defaultdict[str, dict[date, int]] = defaultdict(dict)
        for line in self._lines:
            day, model = line.key
            series[model][day] = line.priced if self.has_prices else line.billed
        return stacked(self.days, series, money if self.has_prices else number)

    @cached_property
    def models(self) -> Sequence[Figures]:
        """The dearest first."""
        return by("model", self.period, top=MOST_ROWS)

    @property
    def surenesses(self) -> list[tuple[str, int, float]]:
        """How sure the bill is: tokens, and their share of it."""
        parts = {
            _("reported by the provider"): self.total.tokens_reported,
            _("counted by us, at least what is owed"): self.total.tokens_counted,
            _("held: the most that it can be"): self.total.tokens_held,
        }
        return [(str(name), tokens, tokens / (self.total.billed or 1)) for name, tokens in parts.items()]

    def compared(self, invoice: Decimal) -> Comparison:
        return Comparison(int(invoice * MILLION), self.total.priced)

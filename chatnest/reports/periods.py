"""Which days are asked about, by the budget's calendar."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final, Self

from django.utils.formats import date_format
from django.utils.functional import Promise
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ..conf import today

CUSTOM: Final = "custom"
PERIODS: Final[Mapping[str, str | Promise]] = {
    "today": gettext_lazy("Today"),
    "yesterday": gettext_lazy("Yesterday"),
    "7days": gettext_lazy("7 days"),
    "month": gettext_lazy("This month"),
    "last_month": gettext_lazy("Last month"),
    CUSTOM: gettext_lazy("Custom"),
}


@dataclass(frozen=True, slots=True)
class Period:
    """From the ``first`` day to the ``last``, both included. ``name``: a key of PERIODS."""

    first: date
    last: date
    name: str = CUSTOM

    @classmethod
    def parse(cls, name: str = "", first: str = "", last: str = "") -> Self:
        """As an address or a form has it; nothing is today, days alone are custom. Raises ValueError, for people."""
        name = name or (CUSTOM if first or last else "today")
        if name == CUSTOM:
            return cls._custom(first, last)
        now = today()
        match name:
            case "today":
                return cls(now, now, name)
            case "yesterday":
                return cls(_earlier(now, 1), _earlier(now, 1), name)
            case "7days":
                return cls(_earlier(now, 6), now, name)
            case "month":
                return cls(now.replace(day=1), now, name)
            case "last_month":
                last_day = _earlier(now.replace(day=1), 1)
                return cls(last_day.replace(day=1), last_day, name)
        raise ValueError(_("There is no period %s.") % name)

    @classmethod
    def of_month(cls, text: str) -> Self:
        """``2026-11``, all of it. Raises ValueError, for people."""
        try:
            first = date.fromisoformat(f"{text}-01")
        except ValueError:
            raise ValueError(_("%s is not a month such as 2026-11.") % text) from None
        return cls(first, month_end(first))

    @classmethod
    def _custom(cls, first: str, last: str) -> Self:
        """Until today, if no last day is named."""
        if not first:
            raise ValueError(_("Which is the first day?"))
        days = cls(_day(first), _day(last) if last else today())
        if days.first > days.last:
            raise ValueError(_("The first day is after the last."))
        return days

    @property
    def label(self) -> str:
        """``Last month``, or a custom one's days."""
        return self.dates if self.name == CUSTOM else str(PERIODS[self.name])

    @property
    def dates(self) -> str:
        """As the reader's language writes days."""
        first, last = (date_format(day, "DATE_FORMAT") for day in (self.first, self.last))
        return first if self.first == self.last else _("%(first)s to %(last)s") % {"first": first, "last": last}

    @property
    def days(self) -> int:
        return (self.last - self.first).days + 1


def month_end(day: date) -> date:
    """The last day of its month."""
    return day.replace(day=monthrange(day.year, day.month)[1])


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(_("%s is not a day such as 2026-11-22.") % text) from None


def _earlier(day: date, days: int) -> date:
    return day - timedelta(days=days)

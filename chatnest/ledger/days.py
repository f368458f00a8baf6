"""The budget's day: the local date of CHATNEST["TIME_ZONE"]."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from ..conf import time_zone
from ..conf import today as today


def month_of(day: date) -> date:
    """Its first day, by which a month is named."""
    return day.replace(day=1)


def days_of(month: date) -> list[date]:
    return [day for number in range(31) if (day := month + timedelta(number)).month == month.month]


def month_ends(day: date) -> datetime:
    """The instant at which the budget of the month of ``day`` is renewed."""
    return day_ends(days_of(month_of(day))[-1])


def day_ends(day: date) -> datetime:
    """The instant at which the budget of ``day`` is renewed."""
    return datetime.combine(day + timedelta(days=1), time(), time_zone()).astimezone(UTC)

"""The budget's day: the local date of CHATNEST["TIME_ZONE"], so it has 23 or 25 hours where clocks change."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from django.utils import timezone

from ..conf import time_zone


def today(now: datetime | None = None) -> date:
    """The day of ``now``, which is an aware datetime; of this moment if it is None."""
    return timezone.localdate(now, time_zone())


def day_ends(day: date) -> datetime:
    """The instant at which the budget of ``day`` is renewed."""
    return datetime.combine(day + timedelta(days=1), time(), time_zone()).astimezone(UTC)

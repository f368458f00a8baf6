"""The budget's day: the local date of CHATNEST["TIME_ZONE"]."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from ..conf import time_zone
from ..conf import today as today


def day_ends(day: date) -> datetime:
    """The instant at which the budget of ``day`` is renewed."""
    return datetime.combine(day + timedelta(days=1), time(), time_zone()).astimezone(UTC)

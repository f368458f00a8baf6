"""What the month may cost."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Final

from django.db.models import Min

from ..accounts import SITE
from ..conf import settings, today
from ..models import UsageLine
from .figures import totals
from .periods import Period, month_end

DAYS: Final = timedelta(days=7)


def estimate(month: date) -> int | None:
    """What the site's month that has this day will have cost, in millionths; None where nothing had a price.

    What it has cost so far, and for each day that is left the mean of the last 7 full days (of fewer, since the site
    began).
    """
    now, first, last = today(), month.replace(day=1), month_end(month)
    so_far = totals(Period(first, last))
    left = max(0, (last - max(now, first - timedelta(days=1))).days)
    full = Period(max(now - DAYS, _first_day(now)), now - timedelta(days=1))
    if not left or full.days < 1:
        return so_far.cost if so_far.requests else None
    lately = totals(full)
    if not any(one.requests and one.cost is not None for one in (so_far, lately)):
        return None
    return so_far.priced + lately.priced * left // full.days


def _first_day(now: date) -> date:
    """When the site began to be used."""
    lines = UsageLine.objects.using(settings.DATABASE_ALIAS).filter(account=SITE).order_by()
    return lines.aggregate(first=Min("day"))["first"] or now

"""Numbers, times and reasons as operators read them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from django.utils import formats, timezone
from django.utils.functional import Promise
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ..conf import aware, time_zone
from ..reports import currency

LEAST, MOST = 2, 6  # decimals of an amount of money
NOTHING: Final = "\N{EN DASH}"  # where there is no figure
REASONS: Final[Mapping[str, str | Promise]] = MappingProxyType(
    {
        "rate_limited": gettext_lazy("too many requests in a short time"),
        "daily_budget_exceeded": gettext_lazy("the day's budget is used up"),
        "monthly_budget_exceeded": gettext_lazy("the month's budget is used up"),
        "too_many_streams": gettext_lazy("too many answers at once"),
        "request_too_large": gettext_lazy("the question is longer than the profile allows"),
        "paused": gettext_lazy("paused by an operator"),
        "not_authenticated": gettext_lazy("not logged in"),
        "forbidden": gettext_lazy("not allowed, or an old page"),
        "overloaded": gettext_lazy("this process has no room for more, or is restarting"),
        "ledger_unavailable": gettext_lazy("the database did not answer"),
        "price_unknown": gettext_lazy("the model has no price, and there is a money limit"),
        "invalid_messages": gettext_lazy("not a conversation"),
        "invalid_request": gettext_lazy("not a request that chatnest knows"),
        "body_too_large": gettext_lazy("the request's body is too large"),
        "internal_error": gettext_lazy("a fault of the site's: see its log"),
        "upstream_timeout": gettext_lazy("the provider took too long"),
        "upstream_rate_limited": gettext_lazy("the provider is busy, or limits us"),
        "upstream_unavailable": gettext_lazy("the provider cannot be reached"),
        "upstream_rejected": gettext_lazy("the provider did not accept the request"),
        "context_length_exceeded": gettext_lazy("longer than the model can read"),
        "upstream_misconfigured": gettext_lazy("the provider refuses our key, model or credit"),
        "upstream_broken": gettext_lazy("the provider broke off"),
        # Where nothing more is known than how it ended.
        "upstream_error": gettext_lazy("the provider failed"),
        "timed_out": gettext_lazy("it took too long"),
        "expired": gettext_lazy("its process died, and the hold was charged in full"),
    }
)


def reason(code: str) -> str:
    return str(REASONS.get(code, code))


def number(value: float) -> str:
    """As the operator's language writes it, its thousands told apart."""
    return formats.number_format(value, force_grouping=True)


def percent(share: float | None) -> str:
    """Of a share of 1; nothing of nothing."""
    if share is None:
        return NOTHING
    return f"{formats.number_format(100 * share, 1 if share < 0.1 else 0)} %"


def seconds(value: float | None) -> str:
    return NOTHING if value is None else _("%s s") % formats.number_format(value, 1)


def when(at: datetime, *, with_zone: bool = False) -> str:
    """A stored time in the zone of the budgets, to the second."""
    local = timezone.localtime(aware(at), time_zone())
    shown = formats.date_format(local, "SHORT_DATE_FORMAT") + f" {local:%H:%M:%S}"
    return f"{shown} {local.tzname()}" if with_zone else shown


def when_zoned(at: datetime) -> str:
    return when(at, with_zone=True)


def clock(at: datetime) -> str:
    """The time of day, to the minute."""
    return f"{timezone.localtime(aware(at), time_zone()):%H:%M}"


def lasting(span: timedelta) -> str:
    """How long, in one unit or two."""
    total = max(0, int(span.total_seconds()))
    minutes, rest = divmod(total, 60)
    hours, rest_minutes = divmod(minutes, 60)
    if hours >= 48:
        return ngettext("%d day", "%d days", hours // 24) % (hours // 24)
    if hours:
        return _("%(hours)d h %(minutes)d min") % {"hours": hours, "minutes": rest_minutes}
    return _("%(minutes)d min %(seconds)d s") % {"minutes": minutes, "seconds": rest} if minutes else _("%d s") % rest


def amount(value: Decimal) -> str:
    """With two decimals, or as many as it has, up to six."""
    digits = f"{value:.{MOST}f}".rstrip("0").partition(".")[2]
    return formats.number_format(value, decimal_pos=max(LEAST, len(digits)), force_grouping=True)


def money(millionths: int | None) -> str:
    """In the site's currency, exactly; nothing where no price was known."""
    if millionths is None:
        return ""
    return f"{amount(Decimal(millionths).scaleb(-MOST))} {currency()}"

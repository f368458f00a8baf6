"""Each figure of *Now* with a word for whether it is well, and yesterday's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from django.utils.translation import gettext as _
from django.utils.translation import pgettext

from ..conf import settings
from .now import Snapshot
from .traffic import SOON, Traffic
from .words import NOTHING, lasting, number, percent, seconds

# From here on a share or a number of seconds is high, and bad.
FAILED: Final = 0.02, 0.1
REFUSED: Final = 0.1, 0.3
FIRST_TOKEN: Final = 3.0, 10.0
TIMES: Final = 3  # yesterday's requests: much more than usual
FEW: Final = 20  # too few of yesterday to compare with


@dataclass(frozen=True, slots=True)
class Fact:
    """``level``: ok, high, bad, or empty where nothing can be said."""

    name: str
    figure: str
    level: str
    before: str
    more: str = ""

    @property
    def word(self) -> str:
        words = {"ok": pgettext("figure", "ok"), "high": pgettext("figure", "high"), "bad": pgettext("figure", "bad")}
        return words.get(self.level, "")


def facts(snapshot: Snapshot) -> list[Fact]:
    now, before = snapshot.traffic.now, snapshot.traffic.before
    return [
        _running(snapshot),
        _started(snapshot),
        _share(_("Failed"), now.failed_share, before.failed_share, FAILED),
        _share(_("Refused"), now.refused_share, before.refused_share, REFUSED),
        _first_token(_("First token, half of them within"), now, before, 0.5),
        _first_token(_("First token, 95 % of them within"), now, before, 0.95),
    ]  # fmt: skip


def _level(value: float | None, bounds: tuple[float, float]) -> str:
    if value is None:
        return ""
    high, bad = bounds
    return "bad" if value >= bad else "high" if value >= high else "ok"


def _share(name: str, now: float | None, before: float | None, bounds: tuple[float, float]) -> Fact:
    return Fact(name, percent(now), _level(now, bounds), percent(before))


def _running(snapshot: Snapshot) -> Fact:
    oldest: datetime | None = min((row.created_at for row in snapshot.running), default=None)
    age = snapshot.at - oldest if oldest else timedelta()
    longest = timedelta(seconds=settings.MAX_STREAM_SECONDS + settings.LEASE_SECONDS)
    return Fact(
        _("Running answers"),
        number(len(snapshot.running)),
        "bad" if age > longest else "ok",
        NOTHING,
        _("the oldest since %s") % lasting(age) if oldest else "",
    )


def _started(snapshot: Snapshot) -> Fact:
    """Of the last minutes, beside as many of yesterday's."""
    start, end = snapshot.hours.before
    usual = snapshot.traffic.before.started * SOON / (end - start)
    recent = snapshot.traffic.recent
    level = "ok"
    if usual >= FEW and recent == 0:
        level = "bad"
    elif usual >= FEW and recent > TIMES * usual:
        level = "high"
    return Fact(_("Started in 5 minutes"), number(recent), level, number(round(usual)))


def _first_token(name: str, now: Traffic, before: Traffic, share: float) -> Fact:
    value = now.first_token(share)
    return Fact(name, seconds(value), _level(value, FIRST_TOKEN), seconds(before.first_token(share)))


def refused_by_reason(traffic: Traffic) -> list[tuple[str, float]]:
    """Codes and their shares of all that was asked, the most frequent first."""
    return [(code, count / traffic.asked) for code, count in traffic.refused.most_common()]

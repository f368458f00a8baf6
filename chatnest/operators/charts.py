"""Bars as numbers: what an inline SVG needs, so that no page needs JavaScript to be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final

from django.utils.formats import date_format
from django.utils.translation import gettext as _

from .standing import Standing

WIDTH: Final = 720
HEIGHT: Final = 140
COLOURS: Final = 6  # told apart by eye; the rest is one more


@dataclass(frozen=True, slots=True)
class Meter:
    """A bar of 100: what is used, and what is reserved beside it."""

    used: float
    reserved: float
    level: str


def meter(one: Standing) -> Meter:
    limit = max(one.limit.in_force, one.used + one.reserved, 1)
    return Meter(round(100 * one.used / limit, 2), round(100 * one.reserved / limit, 2), one.level)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a day's bar, from the bottom up. ``colour``: 0 to COLOURS."""

    x: float
    y: float
    width: float
    height: float
    colour: int
    told: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Of days. ``labels``: some days' places and names; ``names``: what each colour stands for; ``top``: the scale's
    end."""

    parts: Sequence[Part]
    labels: Sequence[tuple[float, str]]
    names: Sequence[tuple[int, str]]
    top: str
    told: str
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def has_legend(self) -> bool:
        return any(name for _, name in self.names)


def stacked(days: Sequence[date], series: Mapping[str, Mapping[date, int]], write: Callable[[int], str]) -> Chart:
    """A bar a day, each of ``series`` (by name, a value a day) a part of it; ``write``: how a value is written."""
    shown = _largest(series)
    top = max((sum(one.get(day, 0) for one in shown.values()) for day in days), default=0) or 1
    step = WIDTH / max(1, len(days))
    parts = []
    for number, day in enumerate(days):
        y = float(HEIGHT)
        for colour, (name, values) in enumerate(shown.items()):
            if value := values.get(day, 0):
                height = HEIGHT * value / top
                y -= height
                told = f"{date_format(day)}, {name}: {write(value)}" if name else f"{date_format(day)}: {write(value)}"
                place = round(number * step + step / 10, 2), round(y, 2), round(step * 0.8, 2), round(height, 2)
                parts.append(Part(*place, colour, told))
    every = max(1, len(days) // 6)
    labels = [
        (round((number + 0.5) * step, 2), date_format(day, "MONTH_DAY_FORMAT"))
        for number, day in enumerate(days)
        if number % every == every // 2
    ]
    return Chart(parts, labels, [*enumerate(shown)], write(top), _told(days, shown, write))


def _told(days: Sequence[date], shown: Mapping[str, Mapping[date, int]], write: Callable[[int], str]) -> str:
    """For those who do not see it."""
    sums = {name: sum(values.get(day, 0) for day in days) for name, values in shown.items()}
    span = _("%(first)s to %(last)s") % {"first": date_format(days[0]), "last": date_format(days[-1])}
    return f"{span}: " + ", ".join(f"{name} {write(total)}".strip() for name, total in sums.items())


def _largest(series: Mapping[str, Mapping[date, int]]) -> dict[str, Mapping[date, int]]:
    """As many as there are colours, the largest first, and the sum of all others."""
    ordered = sorted(series, key=lambda name: -sum(series[name].values()))
    shown = {name: series[name] for name in ordered[:COLOURS]}
    if rest := ordered[COLOURS:]:
        others: Counter[date] = Counter()
        for name in rest:
            others.update(series[name])
        shown[_("%d others") % len(rest)] = others
    return shown

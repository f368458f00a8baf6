"""How much is asked, how much of it fails and is refused, and how fast answers begin: now, and a day ago.

Of whole hours, for refusals are counted by the hour: of this one so far and of the one before, beside the same two of
yesterday.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Self

from django.db.models import Case, Count, F, Max, Q, Sum, Value, When

from ..conf import moment, settings, stored
from ..models import Refusal, Reservation

SOON: Final = timedelta(minutes=5)
DAY: Final = timedelta(days=1)
BUCKET: Final = 50  # milliseconds: a percentile is exact to that


@dataclass(frozen=True, slots=True)
class Hours:
    """This hour so far and the one before, and the same two of yesterday, whole. Times as stored."""

    now: datetime
    since: datetime
    before: tuple[datetime, datetime]

    @classmethod
    def current(cls) -> Self:
        at = moment()
        began = at.replace(minute=0, second=0, microsecond=0)
        since = began - timedelta(hours=1)
        yesterday = stored(since - DAY), stored(began - DAY + timedelta(hours=1))
        return cls(stored(at), stored(since), yesterday)


@dataclass(slots=True)
class Traffic:
    """Of a span of time. ``first_tokens``: answers by BUCKETs of milliseconds until their first token."""

    started: int = 0
    failed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first_tokens: Counter[int] = field(default_factory=Counter)

    @property
    def asked(self) -> int:
        return self.started + self.refused.total()

    @property
    def failed_share(self) -> float | None:
        return self.failed / self.started if self.started else None

    @property
    def refused_share(self) -> float | None:
        return self.refused.total() / self.asked if self.asked else None

    def first_token(self, share: float) -> float | None:
        """Seconds within which that share of the answers had begun; None if none had."""
        wanted = share * self.first_tokens.total()
        seen = 0
        for bucket in sorted(self.first_tokens):
            seen += self.first_tokens[bucket]
            if seen >= wanted:
                return (bucket + 1) * BUCKET / 1000
        return None


@dataclass(slots=True)
class Comparison:
    """``recent``: started within SOON. ``pace``: tokens a second, of all and of strangers. ``answered``: when a model
    last did, by provider and model."""

    hours: Hours
    now: Traffic = field(default_factory=Traffic)
    before: Traffic = field(default_factory=Traffic)
    recent: int = 0
    tokens: int = 0
    tokens_of_strangers: int = 0
    answered: dict[tuple[str, str], datetime] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return (self.hours.now - self.hours.since).total_seconds()


def read(hours: Hours) -> Comparison:
    """All but the refusals, in one query."""
    found = Comparison(hours)
    for row in _started(hours):
        traffic = found.now if row["current"] else found.before
        traffic.started += row["number"]
        if row["outcome"] in Reservation.FAILURES:
            traffic.failed += row["number"]
        if row["bucket"] is not None:
            traffic.first_tokens[row["bucket"]] += row["number"]
        if row["current"]:
            _add_current(found, row)
    return found


def _add_current(found: Comparison, row: Mapping[str, Any]) -> None:
    found.recent += row["number"] if row["recent"] else 0
    found.tokens += row["tokens"]
    found.tokens_of_strangers += row["tokens"] if row["stranger"] else 0
    if row["outcome"] == Reservation.Outcome.COMPLETED:
        key = row["provider"], row["model"]
        found.answered[key] = max(row["latest"], found.answered.get(key, row["latest"]))


def _started(hours: Hours) -> Iterable[Mapping[str, Any]]:
    current = Q(created_at__gte=hours.since)
    start, end = hours.before
    return (
        Reservation.objects.using(settings.DATABASE_ALIAS)
        .filter(current | Q(created_at__gte=start, created_at__lt=end))
        .order_by()
        .annotate(
            current=_is(current),
            recent=_is(Q(created_at__gte=hours.now - SOON)),
            stranger=_is(Q(payer__startswith="ip:")),
            bucket=F("first_token_ms") / Value(BUCKET),
        )
        .values("current", "recent", "stranger", "outcome", "provider", "model", "bucket")
        .annotate(number=Count("pk"), tokens=Sum("tokens_charged"), latest=Max("created_at"))
    )


def _is(condition: Q) -> Case:
    return Case(When(condition, then=Value(True)), default=Value(False))


def add_refusals(found: Comparison, rows: Iterable[Refusal]) -> None:
    start, end = found.hours.before
    for row in rows:
        if row.hour >= found.hours.since:
            found.now.refused[row.code] += row.count
        elif start <= row.hour < end:
            found.before.refused[row.code] += row.count

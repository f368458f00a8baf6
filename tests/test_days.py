"""The budget's day: the local date of the reservation, over midnight, through days of 23 and 25 hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import pytest
from django.test import override_settings
from freezegun import freeze_time
from hypothesis import example, given
from hypothesis import strategies as st

from chatnest import ledger
from chatnest.models import DailyUsage
from chatnest.testing import FakeUpstream, Reply

from .client import HELLO, Client
from .conftest import Configure, EditProfile, Settled, on_sqlite

PAYER = "ip:127.0.0.1"

Clock = Callable[[str], AbstractContextManager[Any]]


@pytest.fixture
def clock() -> Clock:
    """The whole process's clock, in UTC, ticking on from there; event loops keep the real one."""

    @contextmanager
    def clock(at: str) -> Iterator[Any]:
        with freeze_time(at, tick=True, real_asyncio=True) as frozen:
            yield frozen

    return clock


def used(database: str, account: str = PAYER) -> dict[str, tuple[int, int]]:
    """What the account has used and reserved, by day."""
    rows = DailyUsage.objects.using(database).filter(account=account)
    return {row.day.isoformat(): (row.tokens_used, row.tokens_reserved) for row in rows}


@pytest.mark.parametrize(
    ("zone", "at", "day"),
    [
        (None, "2026-03-01 23:59:00", "2026-03-01"),
        ("UTC", "2026-03-01 00:00:00", "2026-03-01"),
        ("Pacific/Kiritimati", "2026-03-01 09:59:00", "2026-03-01"),
        ("Pacific/Kiritimati", "2026-03-01 10:00:00", "2026-03-02"),
        ("America/Los_Angeles", "2026-03-01 07:59:00", "2026-02-28"),
        ("America/Los_Angeles", "2026-03-01 08:00:00", "2026-03-01"),
        ("Asia/Kathmandu", "2026-12-31 18:15:00", "2027-01-01"),
        ("Asia/Kathmandu", "2026-12-31 18:14:00", "2026-12-31"),
        ("Europe/Berlin", "2028-02-28 23:00:00", "2028-02-29"),
    ],
)
@on_sqlite
def test_the_day_is_the_local_date(
    client: Client, configure: Configure, settled: Settled, database: str, clock: Clock, zone: Any, at: str, day: str
) -> None:
    configure(TIME_ZONE=zone)
    with clock(at):
        assert client.chat().events[-1] == "done"
        assert settled()[0].day.isoformat() == day
    assert used(database) == {day: (14, 0)}


@on_sqlite
def test_without_a_zone_of_its_own_the_sites_is_the_budgets(
    client: Client, settings: Any, database: str, clock: Clock
) -> None:
    settings.TIME_ZONE = "Asia/Tokyo"
    with clock("2026-03-01 15:00:00"):
        client.chat()
        assert client.usage()["resetsAt"] == "2026-03-02T15:00:00+00:00"
    assert used(database) == {"2026-03-02": (14, 0)}


@pytest.mark.parametrize(
    ("zone", "at", "seconds"),
    [
        ("UTC", "2026-05-01 22:00:00", 2 * 3600),
        ("UTC", "2026-05-01 00:00:00", 24 * 3600),
        ("UTC", "2026-05-01 23:59:50", 10),
        ("Asia/Kolkata", "2026-05-01 18:00:00", 1800),
        # Clocks change: a day of 23 hours, half an hour into it; and one of 25.
        ("America/New_York", "2026-03-08 05:30:00", 22.5 * 3600),
        ("America/New_York", "2026-11-01 04:30:00", 24.5 * 3600),
        # They change at midnight, which there is not then, or twice.
        ("America/Santiago", "2026-09-06 03:30:00", 1800),
        ("America/Santiago", "2026-04-05 02:30:00", 1.5 * 3600),
        ("America/Havana", "2026-11-01 03:30:00", 1800),
        ("America/Havana", "2026-11-01 04:30:00", 24.5 * 3600),
    ],
)
@on_sqlite
def test_a_spent_budget_is_told_to_come_back_at_local_midnight(
    client: Client, configure: Configure, clock: Clock, zone: str, at: str, seconds: float
) -> None:
    configure(TIME_ZONE=zone, SITE_DAILY_TOKEN_LIMIT=50)
    with clock(at):
        answer = client.chat()
        assert answer.json["code"] == "daily_budget_exceeded"
        assert seconds - 5 <= answer.json["retryAfter"] <= seconds
        assert answer.headers["retry-after"] == str(answer.json["retryAfter"])
        resets = datetime.fromisoformat(client.usage()["resetsAt"])
    assert resets == datetime.fromisoformat(at + "+00:00") + timedelta(seconds=seconds)


def test_at_midnight_there_is_a_new_budget(client: Client, upstream: FakeUpstream, database: str, clock: Clock) -> None:
    small = {**HELLO, "dailyTokenLimit": 80}
    with clock("2026-05-01 23:59:30") as frozen:
        assert client.chat(small).status == 200
        assert client.chat(small).json["code"] == "daily_budget_exceeded"
        frozen.move_to("2026-05-02 00:00:01")
        assert client.usage()["usedToday"] == 0
        assert client.chat(small).data("usage")["remainingToday"] == 66
    assert used(database) == {"2026-05-01": (14, 0), "2026-05-02": (14, 0)}


def test_an_answer_over_midnight_is_charged_to_the_day_that_reserved_it(
    client: Client, upstream: FakeUpstream, settled: Settled, database: str, clock: Clock
) -> None:
    upstream.replies(Reply("one", "two", usage=(10, 90), gate_after=1))
    with clock("2026-05-01 23:59:55") as frozen, client.stream() as stream:
        stream.until("token")
        frozen.move_to("2026-05-02 00:00:05")
        # It takes nothing of the new day, neither now nor in the end.
        standing = client.usage()
        assert (standing["usedToday"], standing["reservedToday"], standing["remainingToday"]) == (0, 0, 70_000)
        assert used(database) == {"2026-05-01": (0, 410)}
        upstream.release()
        assert [event for event, _ in stream.rest()][-2:] == ["usage", "done"]
        (row,) = settled()
        assert client.usage()["remainingToday"] == 70_000
    assert row.day == date(2026, 5, 1)
    assert used(database) == {"2026-05-01": (100, 0)}
    assert used(database, "site") == {"2026-05-01": (100, 0)}


@on_sqlite
def test_a_reader_who_leaves_after_midnight_is_charged_yesterday(
    client: Client, upstream: FakeUpstream, settled: Settled, database: str, clock: Clock
) -> None:
    upstream.replies(Reply("one", gate_after=1))
    with clock("2026-05-01 23:59:55") as frozen:
        with client.stream() as stream:
            stream.until("token")
            frozen.move_to("2026-05-02 00:00:05")
        upstream.wait_for_disconnect()
        settled()
    assert used(database) == {"2026-05-01": (19, 0)}


@on_sqlite
def test_midnight_is_no_fresh_rate_window(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, clock: Clock
) -> None:
    edit_profile(rate_max_requests=2)
    with clock("2026-05-01 23:59:50") as frozen:
        assert [client.chat().status for _ in range(3)] == [200, 200, 429]
        frozen.move_to("2026-05-02 00:00:05")
        assert client.chat().json["code"] == "rate_limited"
        frozen.move_to("2026-05-02 00:02:00")
        assert client.chat().status == 200


@on_sqlite
def test_local_midnight_within_a_rate_window_is_none_either(
    client: Client, configure: Configure, edit_profile: EditProfile, clock: Clock
) -> None:
    """Windows begin with the hours of UTC, days here at half past: a window has rows of two days, and both count."""
    configure(TIME_ZONE="Asia/Kolkata")
    edit_profile(rate_max_requests=4, rate_window_seconds=3600)

    with clock("2026-05-01 18:29:50") as frozen:
        assert [client.chat().status for _ in range(2)] == [200, 200]
        frozen.move_to("2026-05-01 18:30:05")
        assert [client.chat().status for _ in range(3)] == [200, 200, 429]


@on_sqlite
def test_an_answer_over_midnight_is_still_one_of_the_payers_streams(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, clock: Clock
) -> None:
    edit_profile(max_concurrent_streams=1)
    upstream.replies(Reply("one", gate_after=1))
    with clock("2026-05-01 23:59:55") as frozen, client.stream() as stream:
        stream.until("token")
        frozen.move_to("2026-05-02 00:00:05")
        assert client.chat().json["code"] == "too_many_streams"
        upstream.release()
        stream.rest()
        assert client.chat().status == 200


# The day's end, held to the day itself, wherever and whenever.

zones = st.sampled_from(sorted(available_timezones()))


@given(zone=zones, day=st.dates(date(1990, 1, 1), date(2037, 12, 31)))
@example(zone="America/Santiago", day=date(2026, 9, 5))
@example(zone="America/Santiago", day=date(2026, 4, 4))
@example(zone="America/Havana", day=date(2026, 10, 31))
@example(zone="Asia/Beirut", day=date(2026, 3, 28))
@example(zone="Pacific/Apia", day=date(2011, 12, 29))
@example(zone="Antarctica/Troll", day=date(2026, 3, 29))
def test_a_day_ends_at_the_very_moment_at_which_the_next_one_begins(zone: str, day: date) -> None:
    with override_settings(CHATNEST={"TIME_ZONE": zone}):
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=ZoneInfo(zone)).astimezone(UTC)
        if ledger.today(noon) != day:  # a day that an island left out when it changed sides
            return
        ends = ledger.day_ends(day)
        assert ledger.today(ends - timedelta(microseconds=1)) == day
        assert ledger.today(ends) > day
        assert ends > noon


def test_days_of_23_24_and_25_hours() -> None:
    with override_settings(CHATNEST={"TIME_ZONE": "Europe/Berlin"}):
        hours = {
            day: (ledger.day_ends(day) - ledger.day_ends(day - timedelta(days=1))) / timedelta(hours=1)
            for day in (date(2026, 3, 28), date(2026, 3, 29), date(2026, 10, 25), date(2026, 10, 26))
        }
    assert list(hours.values()) == [24, 23, 25, 24]

"""What operators and bookkeepers are told: who used what, and what it cost. The lines are those of a bill."""

from __future__ import annotations

import csv
import io
import re
from datetime import date
from typing import Any
from uuid import UUID

import pytest
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import User
from django.db import connections, models
from django.test.utils import CaptureQueriesContext, isolate_apps
from django.utils import timezone
from django.utils.translation import override

from chatnest import reports
from chatnest.models import Account, DailyUsage, UsageLine
from chatnest.reports import Period, Person

from .bookkeeping import Clock, ask, do, row_of
from .conftest import Configure, on_sqlite

TODAY = date(2026, 11, 22)
NOVEMBER = Period.of_month("2026-11")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock("2026-11-22T12:00:00+00:00")
    monkeypatch.setattr(timezone, "now", clock)
    return clock


def billed(alias: str, payer: str = "user:1", day: date = TODAY, **line: Any) -> None:
    """One request's line in the bill of its payer and of the site, and what it took of their budgets.

    2 tokens were reported, 3 counted and 5 held, for 1,000 millionths of a dollar.
    """
    which = {"profile": "balanced", "provider": "default", "model": "gpt-4o-mini", "label": ""}
    which = {name: line.pop(name, usual) for name, usual in which.items()}
    numbers = {
        "requests": 1,
        "prompt_tokens": 4,
        "cached_tokens": 1,
        "completion_tokens": 6,
        "reasoning_tokens": 2,
        "tokens_reported": 2,
        "tokens_counted": 3,
        "tokens_held": 5,
        "cost": 1000,
        "unpriced": 0,
        **line,
    }
    tokens = numbers["tokens_reported"] + numbers["tokens_counted"] + numbers["tokens_held"]
    for account in (payer, "site"):
        bill, _ = UsageLine.objects.using(alias).get_or_create(day=day, account=account, **which)
        usage, _ = DailyUsage.objects.using(alias).get_or_create(day=day, account=account)
        add(bill, **numbers)
        add(usage, tokens_used=tokens, cost_used=numbers["cost"], requests=numbers["requests"])


def add(row: UsageLine | DailyUsage, **numbers: int) -> None:
    for name, number in numbers.items():
        setattr(row, name, getattr(row, name) + number)
    row.save()


def forgiven(alias: str, account: str, tokens: int, cost: int, day: date = TODAY) -> None:
    add(DailyUsage.objects.using(alias).get(day=day, account=account), tokens_used=-tokens, cost_used=-cost)


# Periods


@pytest.mark.parametrize(
    ("name", "first", "last", "label"),
    [
        ("", "2026-11-22", "2026-11-22", "Today"),
        ("yesterday", "2026-11-21", "2026-11-21", "Yesterday"),
        ("7days", "2026-11-16", "2026-11-22", "7 days"),
        ("month", "2026-11-01", "2026-11-22", "This month"),
        ("last_month", "2026-10-01", "2026-10-31", "Last month"),
    ],
)
def test_a_period_ends_with_today(name: str, first: str, last: str, label: str) -> None:
    period = Period.parse(name)
    assert (str(period.first), str(period.last), period.label) == (first, last, label)
    assert period.name == (name or "today")


def test_today_is_the_budgets(clock: Clock, configure: Configure) -> None:
    clock.set("2026-11-22T20:00:00+00:00")
    configure(TIME_ZONE="Asia/Tokyo")
    assert Period.parse("today").last == date(2026, 11, 23)
    assert Period.parse("yesterday").last == date(2026, 11, 22)


def test_days_of_ones_own() -> None:
    period = Period.parse("", "2026-11-03", "2026-11-05")
    assert (period.name, period.days, period.label) == ("custom", 3, "Nov. 3, 2026 to Nov. 5, 2026")
    assert Period.parse("custom", "2026-11-03").last == TODAY
    with override("de"):
        assert Period(TODAY, TODAY).label == "22. November 2026"
    assert Period.of_month("2028-02").last == date(2028, 2, 29)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("decade",), "There is no period decade."),
        (("custom",), "Which is the first day?"),
        (("", "", "2026-11-05"), "Which is the first day?"),
        (("", "2026-11-05", "2026-11-03"), "The first day is after the last."),
        (("", "2026-11-31"), "2026-11-31 is not a day such as 2026-11-22."),
    ],
)
def test_a_period_that_is_none(words: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        Period.parse(*words)
    for month in ("2026-13", "2026", "", "2026-11-01"):
        with pytest.raises(ValueError, match="is not a month such as 2026-11"):
            Period.of_month(month)


# Sums


def test_billed_forgiven_and_used_are_three_figures(database: str) -> None:
    billed(database, "user:1")
    billed(database, "user:2", cost=0, unpriced=1)
    billed(database, "user:2", day=date(2026, 10, 31))
    forgiven(database, "site", 12, 400)
    total = reports.totals(NOVEMBER)
    assert (total.billed, total.forgiven, total.used) == (20, 12, 8)
    assert (total.cost, total.cost_forgiven, total.cost_used) == (1000, 400, 600)
    assert (total.requests, total.unpriced) == (2, 1)
    assert (total.tokens_reported, total.tokens_counted, total.tokens_held) == (4, 6, 10)
    assert (total.prompt_tokens, total.cached_tokens, total.completion_tokens, total.reasoning_tokens) == (8, 2, 12, 4)
    ours = reports.totals(NOVEMBER, ["user:1"])
    assert (ours.billed, ours.forgiven, ours.cost) == (10, 0, 1000)


def test_an_unknown_price_is_not_nothing(database: str) -> None:
    assert reports.totals(NOVEMBER).cost == 0, "nobody asked for anything"
    billed(database, cost=0, unpriced=1)
    assert reports.totals(NOVEMBER).cost is None
    billed(database, "user:2", model="free", cost=0)
    assert reports.totals(NOVEMBER).cost == 0, "one of them has a price, which is 0"


def test_who_costs_most_comes_first(database: str) -> None:
    billed(database, "user:1")
    billed(database, "user:2", cost=5000)
    billed(database, "ip:192.0.2.1", cost=0, unpriced=1, tokens_held=500)
    billed(database, "ip:192.0.2.2", cost=0, unpriced=1)
    DailyUsage.objects.using(database).create(day=TODAY, account="anonymous", tokens_used=5)
    UsageLine.objects.using(database).create(day=TODAY, account="anonymous", model="gpt-4o-mini", tokens_held=5)
    forgiven(database, "user:1", 10, 1000)
    rows = reports.by("account", NOVEMBER)
    assert [(row.key, row.billed, row.used, row.cost) for row in rows] == [
        ("user:2", 10, 10, 5000),
        ("user:1", 10, 0, 1000),
        ("ip:192.0.2.1", 505, 505, None),
        ("ip:192.0.2.2", 10, 10, None),
    ]
    assert reports.by("account", NOVEMBER, top=2) == rows[:2]
    assert [row.key for row in reports.by("account", NOVEMBER, accounts=["site", "user:1"])] == ["site", "user:1"]
    assert reports.by("account", Period.of_month("2026-12")) == []


def test_each_charge_counts_once_whatever_it_is_summed_by(database: str) -> None:
    billed(database, "user:1", label="digest")
    billed(database, "user:2", model="gpt-4o", cost=9000)
    billed(database, "user:2", model="gpt-4o", provider="azure", profile="expanded", cost=500, day=date(2026, 11, 20))
    sums = {
        dimension: [(row.key, row.billed, row.cost, row.requests, row.used) for row in reports.by(dimension, NOVEMBER)]
        for dimension in reports.DIMENSIONS
        if dimension != "account"
    }
    assert sums == {
        "profile": [("balanced", 20, 10_000, 2, None), ("expanded", 10, 500, 1, None)],
        "model": [("gpt-4o", 20, 9500, 2, None), ("gpt-4o-mini", 10, 1000, 1, None)],
        "provider": [("default", 20, 10_000, 2, None), ("azure", 10, 500, 1, None)],
        "label": [("", 20, 9500, 2, None), ("digest", 10, 1000, 1, None)],
        "day": [(TODAY, 20, 10_000, 2, 20), (date(2026, 11, 20), 10, 500, 1, 10)],
    }
    of_one = reports.by("model", NOVEMBER, accounts=["user:1"])
    assert [(row.key, row.cost) for row in of_one] == [("gpt-4o-mini", 1000)]
    assert [(row.key, row.cost) for row in reports.by_day_and_model(NOVEMBER)] == [
        ((date(2026, 11, 20), "gpt-4o"), 500),
        ((TODAY, "gpt-4o"), 9000),
        ((TODAY, "gpt-4o-mini"), 1000),
    ]
    assert reports.by_day_and_account(NOVEMBER, ["user:2"])[TODAY, "user:2"].cost == 9000


def test_sums_are_exact_and_whole_whatever_the_database(database: str) -> None:
    much = 2**62
    billed(database, cost=much, tokens_held=much)
    row = reports.by("model", NOVEMBER)[0]
    assert (row.cost, type(row.cost), row.billed) == (much, int, much + 5)
    assert reports.money(much) == "4611686018427.387904"


def test_few_queries_answer_for_thousands(database: str) -> None:
    rows = [
        UsageLine(day=date(2026, 11, 1 + n % 20), account=f"user:{n % 1500}", model="m", requests=1, cost=n)
        for n in range(3000)
    ]
    for n, row in enumerate(rows):
        row.profile = f"p{n}"
    UsageLine.objects.using(database).bulk_create(rows)
    with CaptureQueriesContext(connections[database]) as queries:
        reports.totals(NOVEMBER)
        assert len(reports.by("account", NOVEMBER)) == 1500
        assert len(reports.by("account", NOVEMBER, top=3)) == 3
        reports.by("model", NOVEMBER)
        reports.by_day_and_model(NOVEMBER)
    assert len(queries) == 2 + 2 + 2 + 1 + 1


# The estimate


def test_the_month_goes_on_as_the_last_week_went(database: str, clock: Clock) -> None:
    for day in range(1, 22):
        billed(database, f"user:{day}", day=date(2026, 11, day), cost=700)
    billed(database, "user:99", cost=5)
    # 21 days, today so far, and for each of the 8 days after it as much as a day of the last week.
    assert reports.estimate(TODAY) == 21 * 700 + 5 + 8 * 700
    assert reports.estimate(date(2026, 12, 24)) == 31 * 700
    clock.set("2026-12-05T12:00:00+00:00")
    assert reports.estimate(TODAY) == 21 * 700 + 5, "a month that is over costs what it cost"
    assert reports.estimate(date(2026, 10, 1)) is None


def test_a_young_site_has_no_week_yet(database: str) -> None:
    billed(database, day=date(2026, 11, 20), cost=10)
    billed(database, day=date(2026, 11, 21), cost=20)
    assert reports.estimate(TODAY) == 30 + 15 * 8


def test_without_prices_there_is_no_estimate(database: str) -> None:
    assert reports.estimate(TODAY) is None
    billed(database, cost=0, unpriced=1)
    assert reports.estimate(TODAY) is None
    billed(database, day=date(2026, 11, 21), cost=0, unpriced=1)
    assert reports.estimate(TODAY) is None
    billed(database, "user:2", cost=7)
    assert reports.estimate(TODAY) == 7


# People


@pytest.fixture
def ada(database: str) -> str:
    user = User.objects.create_user("ada", "ada@example.org", first_name="Ada", last_name="Lovelace")
    return f"user:{user.pk}"


def test_people_are_called_by_their_names(database: str, ada: str) -> None:
    bob = f"user:{User.objects.create_user('bob').pk}"
    odd = [f"user:0{ada[5:]}", "user:x", "user:", f"user:{10**30}", "user:99999", "ip:::1", "site", f"key:{ada[5:]}"]
    with CaptureQueriesContext(connections["default"]) as queries:
        found = reports.people([ada, bob, *odd])
    assert found == {ada: Person("Ada Lovelace", "ada@example.org", "ada"), bob: Person("bob", "", "bob")}
    assert [str(person) for person in found.values()] == ["Ada Lovelace (ada@example.org)", "bob"]
    assert len(queries) == 1
    assert reports.people(["site", "ip:192.0.2.1"]) == {}


@on_sqlite
def test_users_of_any_kind_are_known(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolate_apps("tests"):

        class Member(AbstractBaseUser):
            id = models.UUIDField(primary_key=True)
            address = models.EmailField(unique=True)
            full_name = models.CharField(max_length=50)
            USERNAME_FIELD = EMAIL_FIELD = "address"
            objects = models.Manager()

            class Meta:
                app_label = "tests"

    pk = UUID(int=7)
    with connections["default"].schema_editor() as editor:
        editor.create_model(Member)
    try:
        monkeypatch.setattr("chatnest.reports.users.get_user_model", lambda: Member)
        Member.objects.create(id=pk, address="ada@example.org", full_name="Ada Lovelace")
        assert reports.people([f"user:{pk}", "user:7"]) == {
            f"user:{pk}": Person("ada@example.org", "ada@example.org", "ada@example.org")
        }
        assert str(reports.people([f"user:{pk}"])[f"user:{pk}"]) == "ada@example.org"
        for text in ("lovelace ada", str(pk), "ADA@example.org", f"user:{pk}"):
            assert reports.find(text) == [f"user:{pk}"]
    finally:
        with connections["default"].schema_editor() as editor:
            editor.delete_model(Member)


def test_a_search_finds_whom_it_means(database: str, ada: str) -> None:
    adam = f"user:{User.objects.create_user('adam', 'adam@example.org').pk}"
    cada = f"user:{User.objects.create_user('cada', 'x@example.net', first_name='Zoe', last_name='100%').pk}"
    hold = do(ask("team:acme"))
    Account.objects.using(database).create(name="ip:192.0.2.1")
    assert reports.find("ada") == [ada, adam, cada], "the one of that name, then those that begin with it"
    assert reports.find(" Lovelace ADA ") == [ada]
    assert reports.find("ADA@example.org") == [ada]
    assert reports.find("example.org") == [ada, adam]
    assert reports.find(ada) == [ada]
    assert reports.find(ada.removeprefix("user:"))[0] == ada
    assert reports.find("site") == ["site"]
    assert reports.find("acme") == ["team:acme"]
    assert reports.find(str(row_of(hold).id)) == ["team:acme"]
    assert reports.find("192.0.2.1:8080") == ["ip:192.0.2.1"]
    assert reports.find("192.0.2") == ["ip:192.0.2.1"]
    assert reports.find("100%") == [cada]
    assert reports.find("%") == [cada]
    for nobody in ("", "  ", "nobody", "user:99999", "a\0b", "_"):
        assert reports.find(nobody) == []


def test_an_account_by_its_whole_name_is_no_other(database: str) -> None:
    do(ask("user:35"))
    do(ask("user:3500"))
    assert reports.find("user:35") == ["user:35"]
    assert reports.find("user:350") == ["user:3500"]


def test_a_search_for_everybody_ends_soon(database: str) -> None:
    User.objects.bulk_create(User(username=f"user{n:03}") for n in range(50))
    assert len(reports.find("user")) == 20


# For the bookkeeper


def sheet(*args: Any, **options: Any) -> list[dict[str, str]]:
    """As a spreadsheet reads it."""
    file = io.StringIO()
    csv.writer(file).writerows(reports.csv_rows(*args, **options))
    return list(csv.DictReader(io.StringIO(file.getvalue())))


def test_a_bookkeeper_gets_each_line_once(database: str, ada: str) -> None:
    billed(database, ada, label="digest", cost=1234567)
    billed(database, ada, day=date(2026, 11, 3), label="digest", cost=0, unpriced=1)
    billed(database, "user:99999", provider="azure")
    first, second, third = sheet(NOVEMBER)
    assert second == {
        "period": "2026-11-22",
        "account": ada,
        "name": "Ada Lovelace",
        "email": "ada@example.org",
        "profile": "balanced",
        "provider": "default",
        "model": "gpt-4o-mini",
        "label": "digest",
        "requests": "1",
        "prompt_tokens": "4",
        "cached_tokens": "1",
        "completion_tokens": "6",
        "reasoning_tokens": "2",
        "tokens_reported": "2",
        "tokens_counted": "3",
        "tokens_held": "5",
        "tokens_billed": "10",
        "cost": "1.234567",
        "currency": "USD",
        "unpriced_requests": "0",
    }
    assert (first["period"], first["cost"], first["unpriced_requests"]) == ("2026-11-03", "", "1")
    assert (third["account"], third["name"], third["provider"], third["cost"]) == (
        *("user:99999", "", "azure"),
        "0.001000",
    )
    whole = sheet(NOVEMBER, daily=False)
    assert [(row["period"], row["account"], row["requests"], row["cost"]) for row in whole] == [
        ("2026-11-01 to 2026-11-30", ada, "2", "1.234567"),
        ("2026-11-01 to 2026-11-30", "user:99999", "1", "0.001000"),
    ]
    assert [row["account"] for row in sheet(NOVEMBER, ["site"])] == ["site"] * 3
    assert sheet(Period.of_month("2026-12")) == []


def test_a_long_sheet_comes_in_pieces(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatnest.reports.sheets.CHUNK", 2)
    for n in range(5):
        billed(database, f"user:{n}", profile=f"p{n}")
    assert [row["account"] for row in sheet(NOVEMBER)] == [f"user:{n}" for n in range(5)]


def test_no_cell_is_a_formula(database: str) -> None:
    user = User.objects.create_user("x", first_name='=HYPERLINK("http://evil.example")')
    billed(database, f"user:{user.pk}", label="@SUM(1)", model="+1")
    (row,) = sheet(NOVEMBER)
    assert (row["name"][:3], row["label"], row["model"]) == ("'=H", "'@SUM(1)", "'+1")

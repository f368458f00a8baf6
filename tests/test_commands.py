"""The operators' commands, as somebody on call meets them: what they print, and their exit codes."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import ManagementUtility
from django.db import OperationalError
from django.utils import timezone

from chatnest import ledger
from chatnest.ledger import Hold, Reset, audit, pruning
from chatnest.management import base
from chatnest.management.commands import chatnest_reset_budgets
from chatnest.models import Account, Adjustment, Change, DailyUsage, Refusal, Reservation, UsageLine

from .bookkeeping import Clock, ask, counters, discrepancies, do, row_of, used
from .conftest import Configure, on_sqlite

TODAY = date(2026, 11, 22)


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Manage = Callable[..., Ran]


@pytest.fixture
def manage(capsys: pytest.CaptureFixture[str]) -> Manage:
    """``manage("chatnest_verify", "--repair")``, as typed into a shell."""

    def manage(*words: str) -> Ran:
        code = 0
        capsys.readouterr()
        try:
            ManagementUtility(["manage.py", *words]).execute()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return manage


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock("2026-11-22T12:00:00+00:00")
    monkeypatch.setattr(timezone, "now", clock)
    return clock


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Somebody types this when asked. Gives what they were asked."""

    def answered(answer: str) -> list[str]:
        asked: list[str] = []

        def input(question: str) -> str:
            asked.append(question)
            return answer

        monkeypatch.setattr("builtins.input", input)
        return asked

    return answered


@pytest.fixture
def chats(database: str) -> Hold:
    """Three users have chatted today: 1,500 tokens, 300 and none. The second one's last answer is being written."""
    for payer, tokens in (("user:1", 1500), ("user:2", 300), ("user:3", 0)):
        do(used(do(ask(payer, limit=10**6)), tokens))
    hold: Hold = do(ask("user:2"))
    return hold


# chatnest_verify


def test_a_proven_ledger_is_said_to_be(chats: Hold, manage: Manage) -> None:
    assert manage("chatnest_verify") == Ran(0, "Every counter is proven by its rows.\n", "")
    assert manage("chatnest_verify", "--verbosity", "0") == Ran(0, "", "")


def test_differences_are_told_and_then_repaired(chats: Hold, manage: Manage, database: str) -> None:
    rows = DailyUsage.objects.using(database)
    rows.filter(account="site").update(tokens_used=2000)
    rows.filter(account="user:2").update(tokens_reserved=0)
    told = manage("chatnest_verify")
    assert told == Ran(
        1,
        "2026-11-22 site tokens_used: 2,000 stored, 1,800 by its rows\n"
        "2026-11-22 user:2 tokens_reserved: 0 stored, 110 by its rows\n",
        "CommandError: 2 differences. To set the counters to the sums: chatnest_verify --repair\n",
    )
    assert manage("chatnest_verify", "--repair") == Ran(
        0,
        "2026-11-22 site tokens_used: 2,000 stored, 1,800 by its rows (repaired)\n"
        "2026-11-22 user:2 tokens_reserved: 0 stored, 110 by its rows (repaired)\n"
        "2 differences repaired. Every counter is proven by its rows.\n",
        "",
    )
    assert manage("chatnest_verify").code == 0


def test_what_cannot_be_repaired_stays_a_failure(chats: Hold, manage: Manage, database: str) -> None:
    Adjustment.objects.using(database).create(
        day=TODAY, account="user:3", tokens=-5, kind="forgiven", reason="by hand", created_at=timezone.now()
    )
    told = manage("chatnest_verify", "--repair")
    assert told.code == 1
    assert told.lines == [
        "2026-11-22 user:3 tokens_used: 0 stored, -5 by its rows (not repairable: a charge or an adjustment is missing)"
    ]
    assert told.err.startswith("CommandError: 1 difference not repaired: ")
    assert "Traceback" not in told.err


def test_a_log_hears_how_far_it_is_only_if_it_asks(
    chats: Hold, manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PROGRESS_SECONDS", 0)
    assert manage("chatnest_verify").err == ""
    assert manage("chatnest_verify", "--verbosity", "2").err == "2026-11-22 checked, 1 of 1 days\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "2026-11-22 checked, 1 of 1 days" in manage("chatnest_verify", "--no-color").err
    assert manage("chatnest_verify", "--no-color", "--verbosity", "0").err == ""


# chatnest_reset_budgets


def test_one_account_is_forgiven_and_no_other(chats: Hold, manage: Manage, answered: Any, database: str) -> None:
    asked = answered("yes")
    ran = manage("chatnest_reset_budgets", "--account", "user:1")
    assert asked == ["This forgives what user:1 used on 2026-11-22. Type 'yes' to go on: "]
    assert ran == Ran(0, "user:1: forgave 1,500 tokens\n1 account reset for 2026-11-22.\n", "")
    assert [counters(name)[0] for name in ("user:1", "user:2", "site")] == [0, 300, 1800]
    adjustment = Adjustment.objects.using(database).get()
    assert (adjustment.account, adjustment.tokens) == ("user:1", -1500)
    assert (adjustment.reason, adjustment.actor) == ("chatnest_reset_budgets", base.operator())


def test_open_streams_keep_what_they_reserved(chats: Hold, manage: Manage) -> None:
    ran = manage("chatnest_reset_budgets", "--all", "--noinput")
    assert ran.code == 0
    assert ran.lines == [
        "site: forgave 1,800 tokens",
        "user:1: forgave 1,500 tokens",
        "user:2: forgave 300 tokens",
        "3 accounts reset for 2026-11-22.",
        "Still reserved by 1 open stream: 110 tokens. What they use will count.",
    ]
    assert counters("user:2") == (0, 110, 2)
    assert audit.verify() == []
    assert row_of(chats).state == "open"
    do(used(chats, 70))
    assert counters("user:2") == (70, 0, 2)
    assert audit.verify() == []
    assert discrepancies() == []


def test_a_lease_that_ran_out_is_charged_after_the_reset(chats: Hold, manage: Manage, clock: Clock) -> None:
    clock.move(31)
    manage("chatnest_reset_budgets", "--all", "--noinput")
    ledger.expire_overdue()
    assert discrepancies() == []
    assert row_of(chats).state == "expired"


def test_whoever_says_anything_but_yes_changes_nothing(chats: Hold, manage: Manage, answered: Any) -> None:
    answered("y")
    assert manage("chatnest_reset_budgets", "--all") == Ran(1, "", "CommandError: Nothing was reset.\n")
    assert counters("site")[0] == 1800


def test_nobody_there_to_say_yes_changes_nothing(chats: Hold, manage: Manage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    ran = manage("chatnest_reset_budgets", "--all")
    assert ran.code == 1
    assert ran.err == "CommandError: Nobody is there to say yes, so nothing was reset. Use --noinput.\n"
    assert counters("site")[0] == 1800


def test_a_dry_run_changes_nothing_and_asks_nothing(chats: Hold, manage: Manage, answered: Any) -> None:
    asked = answered("yes")
    ran = manage("chatnest_reset_budgets", "--account", "user:1", "user:2", "--dry-run")
    assert ran.code == 0
    assert ran.lines == [
        "user:1: would forgive 1,500 tokens",
        "user:2: would forgive 300 tokens",
        "Nothing was reset: without --dry-run, 2 accounts would be, for 2026-11-22.",
    ]
    assert (asked, counters("user:1")[0]) == ([], 1500)


def test_it_asks_whose_budget(chats: Hold, manage: Manage) -> None:
    ran = manage("chatnest_reset_budgets", "--noinput")
    assert ran == Ran(
        1,
        "",
        "CommandError: Whose budget? Name accounts (--account user:7), or reset every account of the day (--all).\n",
    )
    both = manage("chatnest_reset_budgets", "--all", "--account", "site", "--noinput")
    assert both.code == 2
    assert "not allowed with argument" in both.err


def test_a_misspelt_account_resets_nobody(chats: Hold, manage: Manage) -> None:
    ran = manage("chatnest_reset_budgets", "--account", "user:1", "user1", "7", "--noinput")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("CommandError: No such account: user1, 7. Nothing was reset.")
    assert counters("user:1")[0] == 1500


def test_an_account_that_used_nothing_is_no_mistake(chats: Hold, manage: Manage, database: str) -> None:
    Account.objects.using(database).create(name="user:9")
    ran = manage("chatnest_reset_budgets", "--account", "user:9", "--account", "user:3", "--noinput")
    assert ran == Ran(
        0,
        "user:9: nothing to forgive\nuser:3: nothing to forgive\n"
        "Nothing was reset: no tokens were used on 2026-11-22.\n",
        "",
    )
    assert not Adjustment.objects.using(database).exists()


def test_another_day_can_be_reset(chats: Hold, manage: Manage, clock: Clock) -> None:
    clock.set("2026-11-23T12:00:00+00:00")
    do(used(do(ask("user:1")), 40))
    assert manage("chatnest_reset_budgets", "--account", "user:1", "--day", "2026-11-22", "--noinput").code == 0
    assert (counters("user:1", TODAY)[0], counters("user:1")[0]) == (0, 40)
    ran = manage("chatnest_reset_budgets", "--all", "--day", "yesterday", "--noinput")
    assert ran.code == 2
    assert "argument --day: 'yesterday' is not a day such as 2026-11-22" in ran.err


def test_many_accounts_go_in_batches(
    database: str, manage: Manage, answered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatnest_reset_budgets, "BATCH", 3)
    for hold in ledger.apply([ask(f"user:{number}") for number in range(9)]):
        do(used(hold, 10))  # type: ignore[arg-type]
    batches: list[int] = []
    decide = ledger.apply

    def apply(resets: list[Reset]) -> Any:
        batches.append(len(resets))
        return decide(resets)

    monkeypatch.setattr(ledger, "apply", apply)
    asked = answered("yes")
    assert manage("chatnest_reset_budgets", "--all").lines[-1] == "10 accounts reset for 2026-11-22."
    assert asked[0].startswith("This forgives what site, user:0, user:1, user:2, user:3 and 5 more accounts used on")
    assert batches == [3, 3, 3, 1]
    assert audit.verify() == []


def test_a_user_without_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def getuser() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", getuser)
    assert base.operator() == "unknown"


def test_all_has_the_site_in_it_and_says_so(chats: Hold, manage: Manage, answered: Any) -> None:
    told = "The budget of site, from which everybody pays, is among them."
    assert manage("chatnest_reset_budgets", "--all", "--dry-run").lines[-1] == (
        f"Nothing was reset: without --dry-run, 3 accounts would be, for 2026-11-22. {told}"
    )
    asked = answered("no")
    manage("chatnest_reset_budgets", "--all")
    assert asked == [f"This forgives what site, user:1, user:2 used on 2026-11-22. {told} Type 'yes' to go on: "]
    assert "site, from which everybody pays, is one of them" in " ".join(
        manage("chatnest_reset_budgets", "--help").out.split()
    )
    manage("chatnest_reset_budgets", "--account", "site")
    assert told not in asked[1], "whoever names it knows"


def test_a_long_reset_says_how_far_it_is(chats: Hold, manage: Manage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(chatnest_reset_budgets, "BATCH", 2)
    ran = manage("chatnest_reset_budgets", "--all", "--noinput", "--verbosity", "2")
    assert ran.err == "2 of 3 accounts\n3 of 3 accounts\n"


# chatnest_prune


def test_old_days_are_pruned_and_stay_proven(chats: Hold, manage: Manage, clock: Clock, database: str) -> None:
    do(used(chats, 50))
    clock.set("2026-11-24T12:00:00+00:00")
    do(used(do(ask()), 20))
    kept = manage("chatnest_prune", "--days", "3")
    assert kept.out == "Deleted 0 reservations, 0 adjustments, 0 rate windows and 0 refusals from before 2026-11-22.\n"
    told = manage("chatnest_prune", "--days", "2", "--dry-run")
    assert (
        told.out
        == "Would delete 4 reservations, 0 adjustments, 3 rate windows and 0 refusals from before 2026-11-23.\n"
    )
    assert Reservation.objects.using(database).count() == 5
    ran = manage("chatnest_prune", "--days", "2")
    assert ran == Ran(
        0, "Deleted 4 reservations, 0 adjustments, 3 rate windows and 0 refusals from before 2026-11-23.\n", ""
    )
    assert Reservation.objects.using(database).count() == 1
    assert counters("site", TODAY) == (1850, 0, 4)
    assert manage("chatnest_verify").code == 0
    assert manage("chatnest_prune", "--days", "2", "--verbosity", "0") == Ran(0, "", "")


def test_old_refusals_go_and_what_people_did_stays(
    database: str, manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(pruning, "BATCH", 2)
    for day in (19, 20, 21, 22):
        at = timezone.now().replace(day=day)
        Refusal.objects.using(database).create(
            day=at.date(), hour=at, account="user:1", code="rate_limited", count=3, last_at=at
        )
        Change.objects.using(database).create(at=at, kind="account", subject="site", field="paused", new="yes")
    bill(database, "user:1", date(2026, 11, 19))
    words = ("chatnest_prune", "--days", "1")
    assert "and 3 refusals from before 2026-11-22." in manage(*words, "--dry-run").out
    assert Refusal.objects.using(database).count() == 4
    ran = manage(*words, "--verbosity", "2")
    assert ran.out == "Deleted 0 reservations, 0 adjustments, 0 rate windows and 3 refusals from before 2026-11-22.\n"
    assert ran.err.splitlines()[-2:] == ["2 refusals", "3 refusals"]
    assert [row.day for row in Refusal.objects.using(database).all()] == [TODAY]
    assert Change.objects.using(database).count() == 4
    assert UsageLine.objects.using(database).count() == 2


def test_a_day_that_is_not_over_is_left(chats: Hold, manage: Manage, clock: Clock, database: str) -> None:
    clock.set("2026-11-23T00:00:05+00:00")
    Reservation.objects.using(database).open().update(expires_at=clock.now)
    assert manage("chatnest_prune", "--days", "1").lines == [
        "Deleted 0 reservations, 0 adjustments, 3 rate windows and 0 refusals from before 2026-11-23.",
        "Left 2026-11-22 for another time: reservations of that day may still be settled.",
    ]


@pytest.mark.parametrize("days", ["0", "-1", "many", "1.5", ""])
@on_sqlite
def test_today_is_never_pruned(database: str, manage: Manage, days: str) -> None:
    ran = manage("chatnest_prune", f"--days={days}")
    assert ran.code == 2
    assert f"argument --days: {days!r} is not a whole number of 1 or more" in ran.err


@on_sqlite
def test_prune_must_be_told_how_much_to_keep(database: str, manage: Manage) -> None:
    assert manage("chatnest_prune").code == 2
    assert manage("chatnest_prune", "--days", "99999999").code == 0


# chatnest_usage


def test_usage_is_a_table_with_the_site_first(chats: Hold, manage: Manage) -> None:
    ran = manage("chatnest_usage")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (
        "Day         Account   Used  Reserved  Prompt  Completion  Requests\n"
        "2026-11-22  site     1,800       110      20       1,780         4\n"
        "2026-11-22  user:1   1,500         0      10       1,490         1\n"
        "2026-11-22  user:2     300       110      10         290         2\n"
        "2026-11-22  user:3       0         0       0           0         1\n"
    )


def test_the_top_accounts_come_with_the_site(chats: Hold, manage: Manage) -> None:
    assert [line.split()[1] for line in manage("chatnest_usage", "--top", "1").lines] == ["Account", "site", "user:1"]


def test_several_days_the_last_one_first(chats: Hold, manage: Manage, clock: Clock) -> None:
    clock.set("2026-11-23T12:00:00+00:00")
    do(used(do(ask("user:2")), 40))
    ledger.expire_overdue()
    ran = manage("chatnest_usage", "--days", "2", "--top", "1")
    assert [tuple(line.split()[:3]) for line in ran.lines[1:]] == [
        ("2026-11-23", "site", "40"),
        ("2026-11-23", "user:2", "40"),
        ("2026-11-22", "site", "1,910"),  # the open stream's lease has run out meanwhile
        ("2026-11-22", "user:1", "1,500"),
    ]
    ran = manage("chatnest_usage", "--day", "2026-11-22", "--account", "user:2", "site")
    assert [line.split()[1] for line in ran.lines[1:]] == ["site", "user:2"]


def test_usage_as_json(chats: Hold, manage: Manage) -> None:
    rows = json.loads(manage("chatnest_usage", "--json").out)
    assert [row["account"] for row in rows] == ["site", "user:1", "user:2", "user:3"]
    assert rows[0] == {
        "day": "2026-11-22",
        "account": "site",
        "tokens_used": 1800,
        "tokens_reserved": 110,
        "prompt_tokens": 20,
        "completion_tokens": 1780,
        "requests": 4,
    }


def test_usage_as_csv(chats: Hold, manage: Manage) -> None:
    rows = list(csv.DictReader(io.StringIO(manage("chatnest_usage", "--csv").out)))
    assert [(row["day"], row["account"], row["tokens_used"]) for row in rows] == [
        ("2026-11-22", "site", "1800"),
        ("2026-11-22", "user:1", "1500"),
        ("2026-11-22", "user:2", "300"),
        ("2026-11-22", "user:3", "0"),
    ]


def test_no_usage_is_said_in_each_form(database: str, manage: Manage) -> None:
    assert manage("chatnest_usage").out == "No usage on 2026-11-22.\n"
    assert manage("chatnest_usage", "--days", "7").out == "No usage from 2026-11-16 to 2026-11-22.\n"
    assert manage("chatnest_usage", "--json").out == "[]\n"
    assert manage("chatnest_usage", "--csv").out.splitlines() == [
        "day,account,tokens_used,tokens_reserved,prompt_tokens,completion_tokens,requests"
    ]
    assert manage("chatnest_usage", "--json", "--csv").code == 2


def test_a_misspelt_account_has_no_usage_and_no_success(chats: Hold, manage: Manage) -> None:
    ran = manage("chatnest_usage", "--account", "user:1", "user1")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "CommandError: No such account: user1. Accounts are named like site or user:7.\n"


def test_no_cell_is_a_formula(database: str, manage: Manage) -> None:
    do(used(do(ask("=1+1")), 10))
    rows = list(csv.reader(io.StringIO(manage("chatnest_usage", "--csv").out)))
    assert [row[1] for row in rows] == ["account", "site", "'=1+1"]


# chatnest_usage: periods, sums and money


@pytest.fixture
def bills(database: str) -> str:
    """What ada and a stranger cost in November; the stranger's model has no price. Gives ada's account."""
    ada = f"user:{User.objects.create_user('ada').pk}"
    bill(database, ada, date(2026, 11, 3), cost=1_500_000)
    bill(database, ada, TODAY, cost=250_000, model="gpt-4o", label="digest")
    bill(database, "ip:192.0.2.1", TODAY, unpriced=1, model="local")
    return ada


def bill(alias: str, payer: str, day: date, model: str = "gpt-4o-mini", label: str = "", **money: int) -> None:
    for account in (payer, "site"):
        UsageLine.objects.using(alias).create(
            day=day,
            account=account,
            model=model,
            label=label,
            requests=1,
            tokens_reported=1000,
            tokens_held=50,
            **money,
        )
        row, _ = DailyUsage.objects.using(alias).get_or_create(day=day, account=account)
        row.tokens_used, row.requests = row.tokens_used + 1050, row.requests + 1
        row.save()


def test_a_period_is_summed_by_account_with_names_and_a_total(bills: str, manage: Manage) -> None:
    ran = manage("chatnest_usage", "--month", "2026-11", "--by", "account", "--cost")
    assert (ran.code, ran.err) == (0, "")
    assert [re.split(r"  +", line.strip()) for line in ran.lines] == [
        [
            *("Account", "Billed", "Reported", "Counted", "Held", "Used"),
            *("Prompt", "Completion", "Requests", "Cost (USD)"),
        ],
        [f"{bills} (ada)", "2,100", "2,000", "0", "100", "2,100", "0", "0", "2", "1.750000"],
        ["ip:192.0.2.1", "1,050", "1,000", "0", "50", "1,050", "0", "0", "1", "unpriced: 1"],
        ["Total", "3,150", "3,000", "0", "150", "0", "0", "3", "1.750000, unpriced: 1"],
    ]
    assert len({len(line) for line in ran.lines}) == 1, "columns are straight"
    top = manage("chatnest_usage", "--from", "2026-11-01", "--by", "account", "--top", "1").lines
    assert [line.split()[0] for line in top] == ["Account", bills, "Total"]
    assert top[-1].split()[1] == "3,150", "of all, not of those that are shown"


@pytest.mark.parametrize(
    ("by", "rows"),
    [
        ("day", [("2026-11-22", "2,100"), ("2026-11-03", "1,050")]),
        ("model", [("gpt-4o-mini", "1,050"), ("gpt-4o", "1,050"), ("local", "1,050")]),
        ("label", [("(none)", "2,100"), ("digest", "1,050")]),
        ("provider", [("default", "3,150")]),
    ],
)
def test_a_period_is_summed_by_what_one_likes(bills: str, manage: Manage, by: str, rows: list[tuple[str, str]]) -> None:
    lines = manage("chatnest_usage", "--from", "2026-11-01", "--to", "2026-11-22", "--by", by).lines[1:]
    assert [tuple(line.split()[:2]) for line in lines] == [*rows, ("Total", "3,150")]
    assert manage("chatnest_usage", "--by", by, "--day", "2026-11-05").out == "No usage on 2026-11-05.\n"


def test_of_one_account_by_model(bills: str, manage: Manage) -> None:
    lines = manage("chatnest_usage", "--month", "2026-11", "--account", "ada", "--by", "model").lines[1:]
    assert [tuple(line.split()[:2]) for line in lines] == [
        *(("gpt-4o-mini", "1,050"), ("gpt-4o", "1,050")),
        ("Total", "2,100"),
    ]


def test_each_days_cost_is_beside_what_was_used(bills: str, manage: Manage) -> None:
    lines = manage("chatnest_usage", "--cost", "--days", "20").lines
    assert lines[0].split()[-3:] == ["Requests", "Cost", "(USD)"]
    assert [re.split(r"  +", line)[:2] + re.split(r"  +", line)[-1:] for line in lines[1:]] == [
        ["2026-11-22", "site", "0.250000, unpriced: 1"],
        ["2026-11-22", "ip:192.0.2.1", "unpriced: 1"],
        ["2026-11-22", f"{bills} (ada)", "0.250000"],
        ["2026-11-03", "site", "1.500000"],
        ["2026-11-03", f"{bills} (ada)", "1.500000"],
    ]


def test_programs_read_exact_money_and_no_money_where_it_is_unknown(bills: str, manage: Manage) -> None:
    words = ("chatnest_usage", "--month", "2026-11", "--by", "account", "--cost")
    first, second = json.loads(manage(*words, "--json").out)
    assert first == {
        "account": bills,
        "name": "ada",
        "tokens_billed": 2100,
        "tokens_reported": 2000,
        "tokens_counted": 0,
        "tokens_held": 100,
        "tokens_used": 2100,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "requests": 2,
        "cost": "1.750000",
        "currency": "USD",
        "unpriced": 0,
    }
    assert (second["name"], second["cost"], second["unpriced"]) == ("", None, 1)
    rows = list(csv.DictReader(io.StringIO(manage(*words, "--csv").out)))
    assert [(row["account"], row["name"], row["cost"], row["currency"]) for row in rows] == [
        (bills, "ada", "1.750000", "USD"),
        ("ip:192.0.2.1", "", "", "USD"),
    ]
    daily = json.loads(manage("chatnest_usage", "--cost", "--json").out)
    assert [(row["account"], row["cost"], row["unpriced"]) for row in daily[:2]] == [
        ("site", "0.250000", 1),
        ("ip:192.0.2.1", None, 1),
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--month 2026-11 --day 2026-11-22", "Which days? Name a --month, or --from and --to, or --day and --days."),
        ("--from 2026-11-01 --days 3", "Which days? Name a --month, or --from and --to, or --day and --days."),
        ("--month 2026-11 --to 2026-11-22", "Which days? Name a --month, or --from and --to, or --day and --days."),
        ("--to 2026-11-22", "Which is the first day? --to needs --from."),
        ("--from 2026-11-22 --to 2026-11-01", "The first day, 2026-11-22, is after the last, 2026-11-01."),
        ("--from 2026-11-23", "The first day, 2026-11-23, is after the last, 2026-11-22."),
        ("--by day --top 3", "Days are shown in their order: --top needs another --by."),
        ("--by model --account site ada", "What the others used is in site: sum it up alone, or them without it."),
    ],
)
def test_what_contradicts_itself_is_refused(bills: str, manage: Manage, words: str, problem: str) -> None:
    assert manage("chatnest_usage", *words.split()) == Ran(1, "", f"CommandError: {problem}\n")


@on_sqlite
def test_a_month_is_written_as_one(database: str, manage: Manage) -> None:
    ran = manage("chatnest_usage", "--month", "November")
    assert ran.code == 2
    assert "argument --month: 'November' is not a month such as 2026-11" in ran.err
    assert manage("chatnest_usage", "--by", "colour").code == 2


# chatnest_stop, chatnest_pause, chatnest_grant


@pytest.fixture
def ada(database: str) -> str:
    """The account of a user, whom people know by name."""
    return f"user:{User.objects.create_user('ada', 'ada@example.com').pk}"


def paused(database: str) -> list[str]:
    return list(Account.objects.using(database).filter(paused=True).values_list("name", flat=True))


def test_the_chat_is_stopped_and_started_again(chats: Hold, manage: Manage, database: str) -> None:
    assert manage("chatnest_stop") == Ran(
        0, "The chat is stopped for everybody. 1 running answer ends within 15 seconds.\n", ""
    )
    assert paused(database) == ["site"]
    assert manage("chatnest_stop").out == "The chat was stopped already.\n"
    assert manage("chatnest_stop", "--resume").lines == [
        "The chat is answered again, in every process within 5 seconds."
    ]
    assert paused(database) == []
    assert manage("chatnest_stop", "--resume").out == "The chat was not stopped.\n"


def test_the_record_says_who_ran_what_and_why(manage: Manage, ada: str, database: str) -> None:
    manage("chatnest_stop", "--reason", "the model insults people")
    manage("chatnest_stop")
    manage("chatnest_stop", "--resume")
    manage("chatnest_pause", "ada", "--reason", "spam")
    manage("chatnest_grant", "anonymous", "5,000")
    manage("chatnest_verify")
    who = base.operator()
    rows = Change.objects.using(database).exclude(kind="proof").order_by("id")
    assert list(rows.values_list("actor", "subject", "field", "old", "new", "reason")) == [
        (f"{who} (chatnest_stop)", "site", "paused", "no", "yes", "the model insults people"),
        (f"{who} (chatnest_stop)", "site", "paused", "yes", "no", ""),
        (f"{who} (chatnest_pause)", ada, "paused", "no", "yes", "spam"),
        (f"{who} (chatnest_grant)", "anonymous", "extra_tokens", "", "5000", ""),
        (f"{who} (chatnest_grant)", "anonymous", "extra_day", "", "2026-11-22", ""),
    ]
    proof = Change.objects.using(database).get(kind="proof")
    assert (proof.actor, proof.new, proof.at) == (f"{who} (chatnest_verify)", "0", timezone.now())


def test_people_are_paused_by_the_names_they_have(manage: Manage, ada: str, database: str) -> None:
    hold = do(ask(ada))
    ran = manage("chatnest_pause", "ADA@example.com", "ada", ada, "ip:192.0.2.1:8080")
    assert ran.lines == [
        f"{ada} (ada) is paused. 1 running answer ends within 15 seconds.",
        "ip:192.0.2.1 is paused. 0 running answers end within 15 seconds.",
    ]
    assert paused(database) == ["ip:192.0.2.1", ada]
    assert manage("chatnest_pause", "ada", "--resume").lines == [
        f"{ada} (ada) is answered again, in every process within 5 seconds."
    ]
    do(used(hold, 10))
    assert f"{ada} " in manage("chatnest_usage", "--account", "ada").out
    assert manage("chatnest_reset_budgets", "--account", "ada", "--noinput").lines[0] == f"{ada}: forgave 10 tokens"


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("adda", "No request is charged to adda. Accounts are named like site, user:7 or ip:192.0.2.1."),
        ("Site", "No request is charged to Site. Did you mean site?"),
        ("user:ada", "There is no user with the primary key ada. Did you mean user:{pk}?"),
        ("ip:192.0.2", "192.0.2 is no IP address."),
        ("nobody@example.com", "No request is charged to nobody@example.com."),
        ("", "An account's name is text of 1 to 200 characters"),
    ],
)
def test_who_cannot_be_meant_is_not_paused(manage: Manage, ada: str, database: str, typed: str, problem: str) -> None:
    ran = manage("chatnest_pause", "ada", typed)
    assert (ran.code, ran.out, paused(database)) == (1, "", [])
    assert ran.err.startswith("CommandError: " + problem.format(pk=ada.removeprefix("user:")))
    assert ran.err.endswith(" Nothing was changed.\n")


def test_an_address_of_two_users_is_nobodys(manage: Manage, ada: str, database: str) -> None:
    User.objects.create_user("ada2", "ada@example.com")
    assert manage("chatnest_pause", "ada@example.com").code == 1
    assert paused(database) == []


def test_more_for_today_is_granted_and_taken_back(manage: Manage, ada: str, database: str) -> None:
    do(used(do(ask(ada)), 10))
    ran = manage("chatnest_grant", "ada", "5,000")
    assert ran == Ran(0, f"{ada} (ada): 205,000 tokens for 2026-11-22, of which 10 are used.\n", "")
    row = Account.objects.using(database).get(name=ada)
    assert (row.extra_tokens, row.extra_day) == (5000, TODAY)
    assert manage("chatnest_grant", "ada", "0").lines == [
        f"{ada} (ada): 200,000 tokens for 2026-11-22, of which 10 are used."
    ]
    row.refresh_from_db(using=database)
    assert (row.extra_tokens, row.extra_day) == (None, None)
    assert manage("chatnest_grant", ada, "7", "--day", "2026-11-23").code == 0
    row.refresh_from_db(using=database)
    assert (row.extra_tokens, row.extra_day) == (7, date(2026, 11, 23))


def test_a_grant_that_cannot_be_is_refused(manage: Manage, ada: str, database: str) -> None:
    assert manage("chatnest_grant", "ada", "many").code == 2
    assert manage("chatnest_grant", "ada", "5", "--day", "2026-11-21").err == (
        "CommandError: 2026-11-21 is over. Nothing was granted.\n"
    )
    assert manage("chatnest_grant", "site", "5").err == (
        "CommandError: This would change nothing: site has 500,000 tokens a day, and no more may be.\n"
    )
    assert not Account.objects.using(database).exclude(extra_tokens=None).exists()


@on_sqlite
def test_in_an_emergency_nobody_is_asked_for_a_key(database: str, manage: Manage, configure: Configure) -> None:
    configure(OPENAI_BASE_URL="api.example")
    assert manage("migrate", "--plan").code == 1, "the settings are wrong"
    for command in COMMANDS:
        assert manage(*command).code == 0


# All of them


COMMANDS = (
    ("chatnest_stop",),
    ("chatnest_pause", "anonymous"),
    ("chatnest_grant", "anonymous", "5"),
    ("chatnest_verify",),
    ("chatnest_reset_budgets", "--all", "--noinput"),
    ("chatnest_prune", "--days", "1"),
    ("chatnest_usage",),
)


@pytest.mark.parametrize("command", COMMANDS)
@on_sqlite
def test_a_database_that_does_not_answer_is_a_sentence(
    database: str, manage: Manage, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    def away(*args: Any) -> None:
        raise OperationalError("connection refused")

    monkeypatch.setattr("django.db.backends.utils.CursorWrapper.execute", away)
    ran = manage(*command)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(
        "CommandError: The database 'default' refused (is it up, and migrated?): connection refused"
    )


@on_sqlite
def test_an_impatient_operator_is_told_what_holds(
    database: str, manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(**options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "verify", interrupted)
    ran = manage("chatnest_verify", "--repair")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.startswith("CommandError: Interrupted. What was done so far is complete in itself")


@on_sqlite
def test_counters_that_refuse_lead_to_the_repair(chats: Hold, manage: Manage, clock: Clock) -> None:
    DailyUsage.objects.update(tokens_reserved=0)
    clock.set("2026-11-25T12:00:00+00:00")
    ran = manage("chatnest_prune", "--days", "1")
    assert ran.code == 1
    assert ran.err.endswith("Run chatnest_verify --repair, then this again.\n")
    assert manage("chatnest_verify", "--repair").code == 0
    assert manage("chatnest_prune", "--days", "1").code == 0


@pytest.mark.parametrize("command", [command[0] for command in COMMANDS])
def test_each_explains_itself(manage: Manage, command: str) -> None:
    ran = manage(command, "--help")
    assert ran.code == 0
    assert "usage: manage.py" in ran.out

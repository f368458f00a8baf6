"""Money: what models cost, what an answer cost, and limits that nobody can overspend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils import timezone

from chatnest import ledger, signals
from chatnest.conf import settings as chatnest_settings
from chatnest.errors import DailyBudgetExceeded, MonthlyBudgetExceeded, PriceUnknown
from chatnest.ledger import Hold, Reserve, Reset, Stop
from chatnest.ledger.audit import verify
from chatnest.ledger.pruning import prune
from chatnest.models import Account, Adjustment, DailyUsage, Price, Reservation, UsageLine
from chatnest.policy import Policy
from chatnest.prices import MoneyLimits, UnitPrice, price, shown
from chatnest.provider.chunks import Report, loose_usage
from chatnest.signals import announcer
from chatnest.testing import FakeUpstream, Reply

from .bookkeeping import Clock, UsageSource, ask, discrepancies, do, row_of, used
from .client import Client
from .conftest import Configure, EditProfile, Settled, eventually, on_postgres

NOON = "2026-11-22T12:00:00+00:00"
LATER = "2027-02-01T12:00:00+00:00"
# A token of the prompt costs 2 millionths, a cached one 1, one of the answer 10.
CHEAP = UnitPrice(2_000_000, 1_000_000, 10_000_000)
PRICES = {"gpt-4o-mini": {"input": "2", "cached_input": "1", "output": "10"}}
MOST = 10 * 2 + 100 * 10  # that the usual question can cost


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(NOON)
    monkeypatch.setattr(timezone, "now", clock)
    return clock


@pytest.fixture(autouse=True)
def proof(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a story does, at its end every counter and every bill is what its rows add up to."""
    if "database" not in request.fixturenames:
        yield
        return
    alias = request.getfixturevalue("database")  # so it is still there at the end
    yield
    assert verify() == []
    if not Adjustment.objects.using(alias).filter(kind="pruned").exists():
        assert discrepancies() == []


def asked(payer: str = "user:1", money: dict[str, MoneyLimits] | None = None, **changes: Any) -> Reserve:
    question = ask(payer, **{"price": CHEAP, "hold_price": CHEAP, **changes})
    limits = money or {}
    return replace(question, budgets=[replace(one, money=limits.get(one.account)) for one in question.budgets])


def costs(account: str = "user:1", day: Any = None) -> tuple[int, int]:
    """Used and reserved."""
    rows = DailyUsage.objects.using(chatnest_settings.DATABASE_ALIAS).filter(account=account)
    return rows.filter(day=day or ledger.today()).values_list("cost_used", "cost_reserved").first() or (0, 0)


def line(account: str = "user:1", **chosen: Any) -> UsageLine:
    return UsageLine.objects.using(chatnest_settings.DATABASE_ALIAS).get(account=account, **chosen)


# What a model costs.


def test_an_operators_row_comes_before_the_setting_and_that_before_the_list(
    database: str, configure: Configure
) -> None:
    def known() -> UnitPrice | None:
        return Policy.read().prices.get(("default", "gpt-4o-mini"))

    listed = known()
    assert listed
    assert listed.source.startswith("genai-prices ")
    assert 0 < listed.cached_input < listed.input < listed.output
    configure(PRICES=PRICES)
    assert known() == replace(CHEAP, source="PRICES")
    configure(PRICES={**PRICES, "default/gpt-4o-mini": {"input": 3, "output": Decimal("0.0000001")}})
    assert known() == UnitPrice(3_000_000, 3_000_000, 1, "PRICES")
    Price.objects.using(database).create(provider="default", model="gpt-4o-mini", input=0, output="1.5")
    assert known() == UnitPrice(0, 0, 1_500_000, "admin")


@pytest.mark.parametrize(
    ("changes", "provider", "model"),
    [
        ({"CURRENCY": "EUR"}, "default", "gpt-4o-mini"),
        ({"PROVIDERS": {"here": {"BASE_URL": "http://127.0.0.1:8080/v1"}}}, "here", "gpt-4o-mini"),
        ({"PROVIDERS": {"default": {"CLIENT": "mysite.client"}}}, "default", "gpt-4o-mini"),
        ({}, "default", "a-model-of-our-own"),
        ({}, "nobody", "gpt-4o-mini"),
        # Dearer above so many tokens, at some hours, or for each request.
        ({"PROVIDERS": {"other": {"BASE_URL": "https://api.perplexity.ai"}}}, "other", "sonar"),
    ],
)
def test_what_the_list_may_not_mean_has_no_price(
    configure: Configure, changes: dict[str, Any], provider: str, model: str
) -> None:
    configure(OPENAI_BASE_URL="https://api.openai.com/v1")
    assert price("default", "gpt-4o-mini", {})
    configure(**changes)
    assert price(provider, model, {}) is None


def test_a_part_of_a_millionth_is_a_whole_one() -> None:
    dear = UnitPrice(150_000, 75_000, 600_000)
    assert [dear.cost(1, 0), dear.cost(0, 1), dear.cost(20, 0), dear.cost(20, 0, cached=20), dear.cost(0, 0)] == [
        1,
        1,
        3,
        2,
        0,
    ]
    assert [dear.affords(3, 20, 100), dear.affords(4, 20, 100), dear.affords(2, 20, 100)] == [0, 1, -1]
    assert UnitPrice(0, 0, 0).affords(0, 10**9, 100) == 100
    assert (shown(1_234_500_000), shown(-1), shown(0)) == ("1,234.50 USD", "-0.000001 USD", "0.00 USD")


@pytest.mark.parametrize(
    "typed",
    [
        "0.15",
        {"input": "0.15"},
        {"input": "0.15", "output": 0.6},
        {"input": "0.15", "output": "-1"},
        {"input": "0.15", "output": "100000000"},
        {"input": "0.15", "output": "1", "cache": "1"},
    ],
    ids=repr,
)
def test_a_wrong_price_is_no_price_but_a_mistake(configure: Configure, typed: Any) -> None:
    configure(PRICES={"ours": typed})
    with pytest.raises(ImproperlyConfigured, match=r"CHATNEST\['PRICES'\]\['ours'\]"):
        price("default", "ours", {})
    assert [message.id for message in run_checks() if "PRICES" in message.msg] == ["chatnest.E003"]


# What an answer cost.


def test_a_hold_is_paid_for_and_then_what_was_used(database: str, clock: Clock) -> None:
    hold = do(asked())
    assert [costs(), costs("site")] == [(0, MOST)] * 2
    assert (row_of(hold).cost_reserved, row_of(hold).cost) == (MOST, None)
    do(used(hold, 60, cached_tokens=4, reasoning_tokens=30))
    paid = 6 * 2 + 4 * 1 + 50 * 10
    assert [costs(), costs("site")] == [(paid, 0)] * 2
    row = row_of(hold)
    assert (row.cost, row.cached_tokens, row.reasoning_tokens) == (paid, 4, 30)
    for account in ("user:1", "site"):
        its = line(account)
        assert (its.profile, its.provider, its.model, its.label) == ("balanced", "default", "gpt-4o-mini", "")
        assert (its.requests, its.tokens_reported, its.tokens_counted, its.tokens_held) == (1, 60, 0, 0)
        assert (its.prompt_tokens, its.cached_tokens, its.completion_tokens, its.reasoning_tokens) == (10, 4, 50, 30)
        assert (its.cost, its.unpriced) == (paid, 0)


def test_what_is_charged_beyond_its_parts_is_paid_as_an_answer(database: str, clock: Clock) -> None:
    hold = do(asked())
    do(used(hold, 60, total_tokens=75))
    assert costs() == (10 * 2 + 65 * 10, 0)


def test_an_unknown_price_is_no_cost_and_counted(database: str, clock: Clock) -> None:
    priced, unpriced, nothing = (do(one) for one in (asked(), ask(), ask()))
    do(used(priced, 60))
    do(used(unpriced, 60))
    do(used(nothing, 0, source=UsageSource.NONE))
    assert [row_of(hold).cost for hold in (priced, unpriced, nothing)] == [520, None, 0]
    assert (costs(), line().cost, line().unpriced, line().requests) == ((520, 0), 520, 1, 3)


def test_lines_are_told_apart_by_model_profile_and_label(database: str, clock: Clock) -> None:
    for changes in ({}, {"label": "help"}, {"model": "other"}, {"profile": "expanded"}, {}):
        do(used(do(asked(**changes)), 60))
    assert line(model="gpt-4o-mini", profile="balanced", label="").requests == 2
    assert line(label="help").cost == line(model="other").cost == line(profile="expanded").cost == 520
    assert costs()[0] == 5 * 520


@pytest.mark.parametrize("how", ["expired", "stopped"])
def test_a_late_settlement_replaces_what_was_held(database: str, clock: Clock, how: str) -> None:
    hold = do(asked())
    resolve(hold, clock, how)
    assert (costs(), line().tokens_held, row_of(hold).cost) == ((MOST, 0), 110, MOST)
    do(used(hold, 60, error="paused", first_token_ms=700))
    assert (costs(), costs("site"), row_of(hold).cost) == ((520, 0), (520, 0), 520)
    assert (line().tokens_held, line().tokens_reported, line().cost, line().requests) == (0, 60, 520, 1)
    assert (row_of(hold).error, row_of(hold).first_token_ms) == ("paused", 700)


def resolve(hold: Hold, clock: Clock, how: str) -> None:
    if how == "stopped":
        do(Stop(id=hold.id, day=hold.day, accounts=hold.accounts))
    else:
        clock.move(31)
        ledger.expire_overdue()


def test_what_was_forgiven_meanwhile_is_given_back_once(database: str, clock: Clock) -> None:
    """And billed, forgiven and what counts stay three right figures."""
    hold = do(asked())
    resolve(hold, clock, "expired")
    do(Reset(day=hold.day, account="user:1", reason="sorry"))
    assert costs() == (0, 0)
    do(used(hold, 60))
    assert (costs(), costs("site")) == ((0, 0), (520, 0))
    assert (line().cost, line().tokens_reported) == (520, 60)
    do(used(do(asked()), 60))
    assert costs() == (520, 0)


def test_a_fallback_is_held_for_the_dearer_and_paid_for_what_answered(database: str, clock: Clock) -> None:
    dear = UnitPrice(1_000_000, 1_000_000, 40_000_000)
    ours, its = asked().or_else(asked(model="dear", price=dear, hold_price=dear))
    hold = do(ours)
    assert row_of(hold).cost_reserved == 10 * 2 + 100 * 40
    do(used(its.held(hold.output_tokens), 60))
    assert (costs(), line().model) == ((10 + 50 * 40, 0), "dear")


def test_a_pruned_day_keeps_what_it_cost(database: str, clock: Clock) -> None:
    do(used(do(asked()), 60))
    do(used(do(ask("user:2")), 60))
    do(Reset(day=ledger.today(), account="user:1", reason="sorry"))
    day, lines = ledger.today(), list(UsageLine.objects.using(database).order_by("id").values())
    clock.set(LATER)
    assert prune(ledger.today()).reservations == 2
    assert list(UsageLine.objects.using(database).order_by("id").values()) == lines
    assert (costs("user:1", day), costs("site", day)) == ((0, 0), (520, 0))
    UsageLine.objects.using(database).filter(account="site").update(cost=7, tokens_reported=0)
    assert {(one.account, one.field, one.stored, one.computed) for one in verify(repair=True)} == {
        ("site", "billed_tokens", 0, 120),
        ("site", "billed_cost", 7, 520),
    }


@pytest.mark.parametrize("damage", [{"cost": 7}, {"tokens_held": 5}, {"requests": 9}, {"cached_tokens": 1}, None])
def test_broken_lines_are_found_and_made_anew(database: str, clock: Clock, damage: dict[str, int] | None) -> None:
    late = do(asked(label="late"))
    resolve(late, clock, "expired")
    do(used(late, 60))
    for _ in range(2):
        do(used(do(asked()), 60))
    rows = UsageLine.objects.using(database).filter(account="user:1")
    before = sorted(rows.values_list("label", "tokens_reported", "tokens_held", "cost", "requests", "cached_tokens"))
    if damage:
        rows.filter(label="").update(**damage)
    else:
        rows.delete()
    assert {one.account for one in verify()} == {"user:1"}
    assert all(one.repaired for one in verify(repair=True))
    after = rows.values_list("label", "tokens_reported", "tokens_held", "cost", "requests", "cached_tokens")
    assert sorted(after) == before


@pytest.mark.parametrize(
    "said",
    [
        {"prompt_tokens_details": {"cached_tokens": 64}, "completion_tokens_details": {"reasoning_tokens": 7}},
        {"input_tokens_details": {"cached_tokens": 64}, "output_tokens_details": {"reasoning_tokens": "7"}},
        {"cached_tokens": 64, "reasoning_tokens": 7},  # Moonshot; Perplexity
        {"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36, "reasoning_tokens": 7},  # DeepSeek
    ],
)
def test_cached_and_reasoning_tokens_are_read_wherever_they_are(said: dict[str, Any]) -> None:
    usage = loose_usage({"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120, **said})
    assert usage
    assert usage.merged(Report()) == Report(
        prompt_tokens=100, completion_tokens=20, total_tokens=120, cached_tokens=64, reasoning_tokens=7
    )


# Limits.

DAY = MoneyLimits(daily=2000)
MONTH = MoneyLimits(monthly=2000)


@pytest.mark.parametrize("who", ["user:1", "site"])
@pytest.mark.parametrize(
    ("limits", "error", "wait"),
    [(DAY, DailyBudgetExceeded, 12 * 3600), (MONTH, MonthlyBudgetExceeded, 8 * 86_400 + 12 * 3600)],
)
def test_the_last_of_it_can_be_spent_and_never_overspent(
    database: str, clock: Clock, who: str, limits: MoneyLimits, error: type[Exception], wait: int
) -> None:
    first, second = do(asked(money={who: limits})), do(asked(money={who: limits}))
    assert (first.output_tokens, second.output_tokens) == (100, (2000 - MOST - 20) // 10)
    assert sum(costs(who)) == 2000
    with pytest.raises(error) as raised:
        do(asked(money={who: limits}))
    refusal: Any = raised.value
    period = "day" if limits is DAY else "month"
    assert refusal.retry_after == wait
    assert refusal.detail == f"{who} has 0.00 USD of 0.002 USD left of the {period}; 0.00066 USD needed"
    do(used(first, 20))
    assert do(asked(money={who: limits})).output_tokens > 64


def test_what_one_transaction_settles_and_reserves_adds_up(database: str, clock: Clock) -> None:
    hold = do(asked(money={"user:1": MONTH}))
    _, second, third = ledger.apply([used(hold, 110), *(asked(money={"user:1": MONTH}) for _ in range(2))])
    assert (second.output_tokens, type(third)) == ((2000 - MOST - 20) // 10, MonthlyBudgetExceeded)


def test_a_month_is_all_of_its_days_and_no_other(database: str, clock: Clock) -> None:
    clock.set("2026-10-31T12:00:00+00:00")
    do(used(do(asked()), 110))
    clock.set("2026-11-01T12:00:00+00:00")
    do(used(do(asked()), 60))
    clock.set("2026-11-29T12:00:00+00:00")
    assert do(asked(money={"user:1": MONTH})).output_tokens == 100
    with pytest.raises(MonthlyBudgetExceeded):
        do(asked(money={"user:1": MONTH}))
    clock.set("2026-12-01T00:00:01+00:00")
    do(asked(money={"user:1": MONTH}))


@on_postgres
def test_two_on_two_days_of_a_month_do_not_both_pass(database: str, clock: Clock) -> None:
    """One begins before midnight and commits after another of the next day has asked."""
    before = asked(money={"user:1": MoneyLimits(monthly=MOST)})
    clock.set("2026-11-23T00:00:01+00:00")
    after = asked(money={"user:1": MoneyLimits(monthly=MOST)})
    answers: list[Any] = []
    threads: list[threading.Thread] = []

    def meanwhile(execute: Any, sql: str, *args: Any) -> Any:
        if "INSERT" in sql and not threads:
            threads.append(threading.Thread(target=ask_the_other))
            threads[0].start()
            threads[0].join(0.5)  # it waits for a row that is not there yet, or has read before it
        return execute(sql, *args)

    def ask_the_other() -> None:
        answers.extend(ledger.apply([after]))
        connections.close_all()

    with connections[database].execute_wrapper(meanwhile):
        answers.extend(ledger.apply([before]))
    threads[0].join(10)
    assert sorted(type(answer).__name__ for answer in answers) == ["Hold", "MonthlyBudgetExceeded"]


def test_what_a_provider_bills_beyond_the_hold_closes_the_budget(database: str, clock: Clock) -> None:
    limits = {"user:1": MoneyLimits(daily=3000)}
    do(used(do(asked(money=limits)), 500))
    assert costs() == (10 * 2 + 490 * 10, 0)
    with pytest.raises(DailyBudgetExceeded, match="Daily"):
        do(asked(money=limits))


def test_a_price_that_nobody_knows_is_refused_under_a_limit(database: str, clock: Clock) -> None:
    with pytest.raises(PriceUnknown) as raised:
        do(asked(price=None, hold_price=None, money={"site": DAY}))
    assert raised.value.detail == "no price is known of 'gpt-4o-mini' of 'default'; site has a limit in money"
    ours, _ = asked(money={"site": DAY}).or_else(asked(price=None, hold_price=None))
    with pytest.raises(PriceUnknown) as raised:
        do(ours)
    assert "the fallback of balanced" in raised.value.detail
    do(asked(price=None, hold_price=None))


def test_the_lowest_limit_of_setting_profile_and_account_is_in_force(
    database: str, configure: Configure, edit_profile: EditProfile
) -> None:
    edit_profile(daily_money_limit="5", monthly_money_limit=None)
    configure(SITE_DAILY_MONEY_LIMIT="100", SITE_MONTHLY_MONEY_LIMIT=Decimal(2000))
    Account.objects.using(database).create(name="user:1", daily_money_limit="7", monthly_money_limit="50")
    Account.objects.using(database).filter(name="site").update(daily_money_limit="99.99")
    terms = Policy.read(["user:1", "site"]).terms(["user:1", "team:1", "site"], "balanced")
    assert terms.money == {
        "user:1": MoneyLimits(5_000_000, 50_000_000),
        "site": MoneyLimits(99_990_000, 2_000_000_000),
    }


def test_check_names_what_would_be_refused(database: str, configure: Configure, edit_profile: EditProfile) -> None:
    def found() -> list[tuple[str | None, Any]]:
        return [(one.id, one.obj.name) for one in run_checks(databases=[database]) if one.id == "chatnest.E032"]

    spare = edit_profile("spare", model="nobody-knows", audience="forced")
    edit_profile("off", model="nobody-knows", enabled=False)
    edit_profile(fallback=spare)
    assert found() == []
    edit_profile(fallback=spare, monthly_money_limit=5)
    assert found() == [("chatnest.E032", "balanced")]
    configure(SITE_DAILY_MONEY_LIMIT="5")
    assert found() == [("chatnest.E032", "balanced"), ("chatnest.E032", "spare")]
    configure(PRICES={"nobody-knows": {"input": 0, "output": 0}})
    assert found() == []


# The whole way.


def test_a_chat_is_paid_for(
    client: Client, upstream: FakeUpstream, configure: Configure, settled: Settled, database: str
) -> None:
    heard: list[dict[str, Any]] = []

    def hear(sender: type, **facts: Any) -> None:
        heard.append(facts)

    signals.settled.connect(hear)
    try:
        configure(PRICES=PRICES, SITE_MONTHLY_MONEY_LIMIT="0.01")
        upstream.replies(Reply("Hello", usage=(100, 20)))
        assert client.chat().events[-1] == "done"
        (row,) = settled()
        assert (row.cost, row.tokens_charged, row.error) == (100 * 2 + 20 * 10, 120, "")
        assert row.first_token_ms is not None
        eventually(lambda: heard)
        assert (heard[0]["cost"], heard[0]["currency"]) == (400, "USD")
    finally:
        signals.settled.disconnect(hear)
        announcer.close()
    upstream.replies(Reply.refuse(401))
    assert client.chat().events[-1] == "error"
    assert settled()[-1].error == "upstream_misconfigured"
    configure(SITE_MONTHLY_MONEY_LIMIT="0.0005")
    refusal = client.chat()
    assert (refusal.status, refusal.json["code"]) == (429, "monthly_budget_exceeded")
    configure(PRICES={}, SITE_MONTHLY_MONEY_LIMIT="1")
    refusal = client.chat()
    assert (refusal.status, refusal.json["code"], refusal.json["retryable"]) == (503, "price_unknown", False)
    assert not Reservation.objects.using(database).open().exists()

"""The real ledger, driven at random, beside a model of it that keeps everything in a list and adds it up anew.

Thousands of steps on each database: reserve, settle, retry, cancel, expire, renew, stop, reset, pause, edit limits,
and a clock that crosses midnight and the nights on which it is changed. Two models answer, report or are left, and
teach; what they bill is never more than what is charged, but for a chat template that nobody has met. Every answer
must be the model's, and after every step the rows must add up.

``LEDGER_EXAMPLES=2000 pytest tests/test_ledger_machine.py`` looks for longer.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from fractions import Fraction
from math import ceil
from typing import Any, Final
from unittest import mock
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from django.db.models import Sum
from django.utils import timezone
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from chatnest import conf, ledger
from chatnest.errors import (
    ChatError,
    DailyBudgetExceeded,
    InternalError,
    MonthlyBudgetExceeded,
    Paused,
    RateLimited,
    TooManyStreams,
)
from chatnest.ledger import Budget, Hold, Lesson, Reserve, Reset, Settle, Stop, new_id, todays_budgets
from chatnest.ledger.charges import IN_FLIGHT, Billed, Received, settlement
from chatnest.limits import Limits
from chatnest.models import Account, Adjustment, Calibration, DailyUsage, Profile, RateWindow, Reservation, UsageLine
from chatnest.policy import Policy, Terms
from chatnest.prices import MoneyLimits, UnitPrice
from chatnest.provider.chunks import Report

from .bookkeeping import Clock, Outcome, UsageSource, hold_of
from .conftest import Configure

EXAMPLES: Final = int(os.environ.get("LEDGER_EXAMPLES", "60"))
STEPS: Final = 50

BERLIN: Final = ZoneInfo("Europe/Berlin")
LEASE: Final = 30
SITE_LIMIT: Final = 1500
SITE_MONEY: Final = {"SITE_DAILY_MONEY_LIMIT": "60", "SITE_MONTHLY_MONEY_LIMIT": "75.000001"}
LIMITS: Final = {
    "max_output_tokens": 120,
    "max_messages": 6,
    "daily_token_limit": 700,
    "max_tokens_per_request": 2048,
    "rate_max_requests": 9,
    "rate_window_seconds": 60,
    "max_concurrent_streams": 5,
    "daily_money_limit": "25",
    "monthly_money_limit": "32.50",
}
PAYERS: Final = (("user:1", "site"), ("user:2", "site"), ("user:2", "team:1", "site"))
FIELDS: Final = {  # the model's names for the rows'
    "state": "state",
    "outcome": "outcome",
    "source": "usage_source",
    "charged": "tokens_charged",
    "cost_reserved": "cost_reserved",
    "cost": "cost",
    "prompt": "prompt_tokens",
    "completion": "completion_tokens",
}
MONEY: Final = ("daily_money_limit", "monthly_money_limit")
Key = tuple[date, str]


@dataclass(frozen=True)
class Provider:
    """Bills its prompt with a template that no bound of ours has, and what it wrote until it saw its reader leave.

    ``template``: the most tokens of it. An answer that ends has some more than those of its text.
    """

    name: str
    model: str
    template: int
    shows_reasoning: bool
    price: UnitPrice

    def answer(
        self, hold: Hold, text: int, reasoning: int, leaves_after: int | None, more: int
    ) -> tuple[int, Received]:
        """Its bill, and what was received. ``more``: how large the template is, and what is in flight or at the end."""
        prompt = hold.prompt_tokens - hold.prompt_excess + more % (self.template + 1)
        reasoning = min(reasoning if self.shows_reasoning else 40, hold.output_tokens)
        text = min(text, hold.output_tokens - reasoning)
        shown = reasoning if self.shows_reasoning else 0
        if leaves_after is None or leaves_after > shown + text:
            completion = reasoning + text + more % 3
            report = Report(
                prompt_tokens=prompt,
                completion_tokens=completion,
                total_tokens=prompt + completion,
                reasoning_tokens=reasoning,
                cached_tokens=more * 10,  # of the prompt, or so it says
            )
            return prompt + completion, Received(
                billed=Billed.ANSWER, tokens=shown + text, reasoning_tokens=shown, ended=True, report=report
            )
        written = min(reasoning - shown + leaves_after + more, reasoning + text)
        return prompt + written, Received(billed=Billed.ANSWER, tokens=leaves_after)


# One that shows what it bills, and one of which nobody knows when it reasons but by its reports: it always does.
PROVIDERS: Final = (
    Provider("default", "gpt-4o-mini", 7, True, UnitPrice(3_300_000_001, 1_100_000_000, 17_000_000_003)),
    Provider("azure", "o-something", 0, False, UnitPrice(25_000_000_000, 12_500_000_000, 100_000_000_000)),
)


# The model.


def cost_of(price: UnitPrice | None, prompt: int, answer: int, cached: int = 0) -> int:
    """In whole millionths, by fractions of them."""
    assert price
    parts = (prompt - cached, price.input), (cached, price.cached_input), (answer, price.output)
    return ceil(sum(Fraction(tokens * its, 1_000_000) for tokens, its in parts))


@dataclass
class Held:
    day: date
    accounts: Sequence[str]
    tokens: int
    cost_reserved: int
    expires: datetime
    line: tuple[str, str]
    cost: int | None = None
    charged_cost: int = 0
    corrected_cost: dict[str, int] = field(default_factory=dict)
    billed: int = 0  # in tokens, at last
    state: str = "open"
    outcome: str = ""
    source: str = "none"
    charged: int = 0
    corrected: dict[str, int] = field(default_factory=dict)  # by late settlements, for each account
    prompt: int = 0
    completion: int = 0
    resolved: datetime | None = None
    awaited: bool = False  # charged, but not by its settlement, which may yet come

    @property
    def payer(self) -> str:
        return self.accounts[0]


@dataclass
class Model:
    """What the ledger should be: no counters, only what happened."""

    holds: dict[UUID, Held] = field(default_factory=dict)
    forgiven: list[tuple[Key, int, int, datetime]] = field(default_factory=list)
    admitted: list[tuple[str, int, datetime]] = field(default_factory=list)  # who, by which window, when
    # Up to where each budget may be filled: the limit of the last admission, and what providers overran since.
    filled_to: dict[Key, int] = field(default_factory=dict)
    # The same of money, in a day and in a month, named by its first day; where there is no limit, there is nothing.
    paid_to: dict[tuple[str, date, str], int] = field(default_factory=dict)
    # What each answer taught that is not forgotten.
    lessons: dict[tuple[str, str], list[Lesson]] = field(default_factory=dict)

    def of(self, key: Key) -> list[Held]:
        return [held for held in self.holds.values() if held.day == key[0] and key[1] in held.accounts]

    def used(self, key: Key) -> int:
        charges = sum(held.charged + held.corrected.get(key[1], 0) for held in self.of(key))
        return charges - sum(tokens for reset, tokens, _, _ in self.forgiven if reset == key)

    def used_cost(self, key: Key) -> int:
        charges = sum(held.charged_cost + held.corrected_cost.get(key[1], 0) for held in self.of(key))
        return charges - sum(cost for reset, _, cost, _ in self.forgiven if reset == key)

    def reserved_cost(self, key: Key) -> int:
        return sum(held.cost_reserved for held in self.of(key) if held.state == "open")

    def paid(self, key: Key) -> int:
        return self.used_cost(key) + self.reserved_cost(key)

    def paid_in_month(self, key: Key) -> int:
        day = key[0].replace(day=1)
        days = {held.day for held in self.holds.values()} | {reset[0] for reset, *_ in self.forgiven}
        return sum(self.paid((one, key[1])) for one in days if one.replace(day=1) == day)

    def purses(self, budgets: Sequence[Budget]) -> list[tuple[str, int]]:
        """What is left of money, of a day or a month."""
        left = []
        for budget in budgets:
            key = budget.period, budget.account
            if budget.money and budget.money.daily is not None:
                left.append(("day", budget.money.daily - self.paid(key)))
            if budget.money and budget.money.monthly is not None:
                left.append(("month", budget.money.monthly - self.paid_in_month(key)))
        return left

    def reserved(self, key: Key) -> int:
        return sum(held.tokens for held in self.of(key) if held.state == "open")

    def room(self, budgets: Sequence[Budget]) -> int:
        keys = [((budget.period, budget.account), budget.limit) for budget in budgets]
        return min(limit - self.used(key) - self.reserved(key) for key, limit in keys)

    def remaining(self, budgets: Sequence[Budget]) -> int:
        return max(0, self.room(budgets))

    def reserve(self, ask: Reserve, now: datetime) -> Any:
        if ask.id not in self.holds:
            if refusal := self.refusal(ask, now):
                return refusal
            room = self.room(ask.budgets)
            output = min(room - ask.prompt_tokens, ask.max_output_tokens)
            while any(cost_of(ask.price, ask.prompt_tokens, output) > left for _, left in self.purses(ask.budgets)):
                output -= 1
            expires, cost = now + timedelta(seconds=LEASE), cost_of(ask.price, ask.prompt_tokens, output)
            tokens, line = ask.prompt_tokens + output, (ask.provider, ask.model)
            self.holds[ask.id] = Held(ask.day, tuple(ask.accounts), tokens, cost, expires, line)
            self.limit_money(ask.budgets)
            self.admitted.append((ask.payer, ask.rate_window_seconds, now))
            self.filled_to |= {(budget.period, budget.account): budget.limit for budget in ask.budgets}
        held = self.holds[ask.id]
        if held.state != "open" or held.expires <= now:
            return InternalError, None
        remaining = self.remaining(ask.budgets)
        return Hold, (held.day, ask.prompt_tokens, held.tokens - ask.prompt_tokens, remaining)

    def refusal(self, ask: Reserve, now: datetime) -> Any:
        if wait := self.rate_wait(ask, now):
            return RateLimited, wait
        live = [
            held
            for held in self.holds.values()
            if held.payer == ask.payer and held.state == "open" and held.expires > now
        ]
        if len(live) >= ask.max_concurrent_streams:
            return TooManyStreams, 5
        wanted = ask.prompt_tokens + min(ask.max_output_tokens, ask.min_output_tokens)
        if wanted > self.room(ask.budgets):
            return DailyBudgetExceeded, seconds_of(ask.day, now)
        least = cost_of(ask.price, ask.prompt_tokens, min(ask.max_output_tokens, ask.min_output_tokens))
        short = {period for period, left in self.purses(ask.budgets) if left < least}
        if "month" in short:
            return MonthlyBudgetExceeded, seconds_of(last_of_month(ask.day), now)
        if short:
            return DailyBudgetExceeded, seconds_of(ask.day, now)
        return None

    def limit_money(self, budgets: Sequence[Budget]) -> None:
        for budget in budgets:
            money = budget.money or MoneyLimits()
            for period, day, limit in (
                ("day", budget.period, money.daily),
                ("month", budget.period.replace(day=1), money.monthly),
            ):
                self.paid_to.pop((period, day, budget.account), None)
                if limit is not None:
                    self.paid_to[period, day, budget.account] = limit

    def overpay(self, day: date, account: str, cost: int) -> None:
        for key in (("day", day, account), ("month", day.replace(day=1), account)):
            if key in self.paid_to:
                self.paid_to[key] += cost

    def rate_wait(self, ask: Reserve, now: datetime) -> int:
        """Whole seconds until it fits, found by trying each."""
        window = timedelta(seconds=ask.rate_window_seconds)
        epoch = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
        starts = [
            (at - epoch) // window
            for payer, seconds, at in self.admitted
            if (payer, seconds) == (ask.payer, ask.rate_window_seconds)
        ]
        for wait in range(2 * ask.rate_window_seconds + 1):
            at = now + timedelta(seconds=wait)
            start, into = divmod(at - epoch, window)
            this, last = starts.count(start), starts.count(start - 1)
            if this * window + last * (window - into) <= (ask.rate_max_requests - 1) * window:
                return wait
        # Nothing ever fits where the limit is none: told to look again when all that counts has passed.
        return -(((now - epoch) % window - 2 * window) // timedelta(seconds=1))

    def settle(self, ask: Settle, now: datetime) -> Any:
        held = self.holds.get(ask.hold.id)
        if held and (held.state == "open" or held.awaited):
            late = held.state != "open"
            held.awaited = False
            answer = ask.total_tokens - ask.prompt_tokens
            cost = cost_of(ask.hold.price, ask.prompt_tokens, answer, ask.cached_tokens) if ask.total_tokens else 0
            if ask.lesson:
                self.lessons.setdefault((ask.lesson.provider, ask.lesson.model), []).append(ask.lesson)
            if late:
                for account in held.accounts:
                    correction, refund = ask.total_tokens - held.charged, cost - held.charged_cost
                    forgiven = self.was_forgiven((held.day, account), held)
                    if correction > 0 or not forgiven:
                        held.corrected[account] = correction
                    if refund > 0 or not forgiven:
                        held.corrected_cost[account] = refund
            else:
                self.resolve(held, "settled", ask.outcome.value, ask.total_tokens, cost, now)
            held.source, held.cost, held.billed = ask.source.value, cost, ask.total_tokens
            held.prompt, held.completion = ask.prompt_tokens, ask.completion_tokens
            for account in held.accounts:
                self.filled_to[held.day, account] += max(0, ask.total_tokens - held.tokens)
                self.overpay(held.day, account, max(0, cost - held.cost_reserved))
        return int, self.remaining(ask.hold.budgets)

    def was_forgiven(self, key: Key, held: Held) -> bool:
        return any(reset == key and at >= (held.resolved or at) for reset, _, _, at in self.forgiven)

    def resolve(self, held: Held, state: str, outcome: str, charge: int, cost: int, now: datetime) -> None:
        held.state, held.outcome, held.charged, held.resolved = state, outcome, charge, now
        held.cost, held.charged_cost, held.billed = cost, cost, charge

    def stop(self, ask: Stop, now: datetime) -> Any:
        held = self.holds.get(ask.id)
        if not held or held.state != "open":
            return bool, False
        self.resolve(held, "settled", "stopped", held.tokens, held.cost_reserved, now)
        held.source, held.awaited = "held", True
        return bool, True

    def reset(self, ask: Reset, now: datetime) -> Any:
        key = ask.day, ask.account
        tokens, cost = self.used(key), self.used_cost(key)
        if tokens or cost:
            self.forgiven.append((key, tokens, cost, now))
        return int, tokens

    def expire(self, now: datetime) -> None:
        for held in self.holds.values():
            if held.state == "open" and held.expires <= now:
                self.resolve(held, "expired", "expired", held.tokens, held.cost_reserved, now)
                held.source, held.awaited = "held", True

    def known(self, of: tuple[str, str]) -> Calibration | None:
        if not (lessons := self.lessons.get(of)):
            return None
        return Calibration(
            provider=of[0],
            model=of[1],
            reports=sum(lesson.reported for lesson in lessons),
            prompt_excess=max(lesson.prompt_excess for lesson in lessons),
            completion_excess=max(lesson.completion_excess for lesson in lessons),
            reasons_unseen=any(lesson.reasons_unseen for lesson in lessons),
            ignores_max_tokens=any(lesson.ignores_max_tokens for lesson in lessons),
        )

    def renew(self, ids: Sequence[UUID], now: datetime) -> set[UUID]:
        stop = set()
        for held_id in ids:
            held = self.holds.get(held_id)
            if held and held.state == "open":
                held.expires = now + timedelta(seconds=LEASE)
            elif not held or held.state == "settled":
                stop.add(held_id)
        return stop


def seconds_of(day: date, now: datetime) -> int:
    """Until ``day`` is over in Berlin, found by walking; at least one."""
    at = now.replace(second=0, microsecond=0)
    while at.astimezone(BERLIN).date() <= day:
        at += timedelta(minutes=1)
    return max(1, -((now - at) // timedelta(seconds=1)))


def last_of_month(day: date) -> date:
    while (day + timedelta(1)).month == day.month:
        day += timedelta(1)
    return day


# The machine.

# Each strategy draws (what happens, *how); the first of a list is the plainest, to which Hypothesis shrinks.


def happens(name: str, *how: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(name), *how)


one_of_them = st.integers(0, 1000)  # counted from the last
payers = st.sampled_from(PAYERS)
accounts = st.sampled_from(["user:1", "user:2", "team:1", "site"])

reserve = happens("reserve", payers, st.integers(1, 80), st.sampled_from([1, 10, 64]), st.sampled_from(PROVIDERS))
answer = happens(
    "answer",
    one_of_them,
    st.integers(0, 150),  # tokens of text that the model would write
    st.sampled_from([0, 0, 40]),  # and of reasoning
    st.none() | st.integers(0, 150),  # after how many that are seen its reader leaves
    st.integers(0, IN_FLIGHT),
)
settle = happens("settle", one_of_them, st.sampled_from([0, -1, -50, -999, 1, 400]), st.booleans())
operation = st.one_of(
    reserve,
    reserve,
    reserve,
    settle,
    answer,
    answer,
    happens("again", one_of_them),
    happens("retry", one_of_them),
    happens("give back", one_of_them),
    happens("stop", one_of_them),
    happens("reset", accounts, st.booleans()),
    # A request that is in the queue, and gets its turn later, or never.
    happens("wait", payers, st.integers(1, 80)),
)
edit = st.one_of(
    happens("pause", accounts, st.sampled_from([False, False, True])),
    happens("limit account", accounts, st.sampled_from([None, 5000, 500, 250, 0])),
    happens("limit money", accounts, st.sampled_from(MONEY), st.sampled_from([None, None, "25", "8", "0.02"])),
    happens("limit profile", st.sampled_from(MONEY), st.sampled_from(["25", "9", "40", None])),
    happens("limit profile", st.just("rate_max_requests"), st.sampled_from([9, 5, 1, 0])),
    happens("clear", st.sampled_from(PROVIDERS)),
    happens("limit profile", st.just("max_concurrent_streams"), st.sampled_from([5, 3, 1, 0])),
    happens("limit profile", st.just("max_output_tokens"), st.sampled_from([120, 80, 20, 1])),
)
moment = st.sampled_from([1, 31, 9.999, 10, 29.999_999, 30, 59, 61, 0.5, 600, 3600, 7200, 86_400])


class LedgerMachine(RuleBasedStateMachine):
    alias: str

    @initialize(
        start=st.sampled_from(
            [
                "2026-11-22T12:00:00+00:00",
                "2026-06-15T21:59:30+00:00",  # before midnight
                "2026-03-28T22:30:00+00:00",  # before the day of 23 hours
                "2026-10-24T21:30:00+00:00",  # before the day of 25 hours
                "2026-11-30T22:50:00+00:00",  # before another month
            ]
        )
    )
    def begin(self, start: str) -> None:
        for model in (Reservation, Adjustment, Calibration, DailyUsage, UsageLine, RateWindow, Account, Profile):
            rows = model._default_manager.using(self.alias)
            rows._raw_delete(self.alias)  # type: ignore[attr-defined]
        self.edit_limit_profile()
        self.model = Model()
        self.clock = Clock(start)
        self.patch = mock.patch.object(timezone, "now", self.clock)
        self.patch.start()
        self.asked: list[Reserve] = []
        self.sent: list[Reserve] = []

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.stop()

    # What happens.

    @rule(operation=operation)
    def one_operation(self, operation: Any) -> None:
        self.operate([operation])

    @rule(operations=st.lists(operation, min_size=2, max_size=8))
    def many_in_one_transaction(self, operations: list[Any]) -> None:
        self.operate(operations)

    def operate(self, operations: list[Any]) -> None:
        self.clock.move(0.000_001)
        asks = [ask for name, *how in operations for ask in self.asks(self.named("to", name)(*how))]
        answers = ledger.apply(asks)
        expected = [self.expected(ask) for ask in asks]
        assert [shown(answer) for answer in answers] == expected, asks

    @staticmethod
    def asks(asked: Any) -> list[Any]:
        """An operation may be asked for by one, by none, or by two."""
        return asked if isinstance(asked, list) else [asked] if asked else []

    @rule(seconds=moment, looks=st.booleans())
    def time_passes(self, seconds: float, looks: bool) -> None:
        self.clock.move(seconds)
        if looks:
            ledger.expire_overdue()
            self.model.expire(self.clock.now)

    @rule(seconds=st.sampled_from([0, 10, 25]), which=st.lists(one_of_them, max_size=5), stranger=st.booleans())
    def renew(self, seconds: float, which: list[int], stranger: bool) -> None:
        self.clock.move(seconds)
        ids = {self.sent[-1 - n % len(self.sent)].id for n in which if self.sent}
        chosen = [*ids, *([uuid4()] if stranger else [])]
        everyone = {account for payer in PAYERS for account in payer}
        stopped, paused = ledger.renew(chosen, everyone)
        assert stopped == self.model.renew(chosen, self.clock.now)
        assert paused == {row.name for row in Account.objects.using(self.alias) if row.paused}

    @rule(edit=edit)
    def an_operator_edits(self, edit: Any) -> None:
        name, *how = edit
        self.named("edit", name)(*how)

    def edit_pause(self, account: str, paused: bool) -> None:
        Account.objects.using(self.alias).update_or_create(name=account, defaults={"paused": paused})

    def edit_limit_account(self, account: str, limit: int | None) -> None:
        Account.objects.using(self.alias).update_or_create(name=account, defaults={"daily_token_limit": limit})

    def edit_limit_money(self, account: str, name: str, limit: str | None) -> None:
        Account.objects.using(self.alias).update_or_create(name=account, defaults={name: limit})

    def edit_clear(self, provider: Provider) -> None:
        """What reports have taught of a model."""
        Calibration.objects.using(self.alias).filter(provider=provider.name, model=provider.model).delete()
        self.model.lessons.pop((provider.name, provider.model), None)

    def edit_limit_profile(self, name: str = "max_output_tokens", value: int | str | None = 120) -> None:
        rows = Profile.objects.using(self.alias)
        profile = rows.filter(name="balanced").first() or Profile(name="balanced", **LIMITS)
        setattr(profile, name, value)
        profile.save(using=self.alias)

    def named(self, verb: str, name: str) -> Any:
        return getattr(self, f"{verb}_{name.replace(' ', '_')}")

    # How it is asked for.

    def to_reserve(self, payer: Sequence[str], bound: int, least: int, provider: Provider) -> Reserve | None:
        terms = self.terms(payer)
        if terms is None:
            return None
        limits: Limits = terms.limits
        known = Policy.read().calibrations.get((provider.name, provider.model))
        excess = known.prompt_excess if known else 0
        ask = Reserve(
            id=new_id(),
            budgets=todays_budgets(terms.budgets, money=terms.money),
            profile=terms.profile,
            provider=provider.name,
            model=provider.model,
            prompt_tokens=bound + excess,
            prompt_excess=excess,
            max_output_tokens=limits.max_output_tokens,
            min_output_tokens=least,
            rate_max_requests=limits.rate_max_requests,
            rate_window_seconds=limits.rate_window_seconds,
            max_concurrent_streams=limits.max_concurrent_streams,
            price=provider.price,
            hold_price=provider.price,
        )
        self.asked.append(ask)
        return ask

    def to_wait(self, payer: Sequence[str], bound: int) -> None:
        self.to_reserve(payer, bound, 64, PROVIDERS[0])

    def terms(self, payer: Sequence[str]) -> Terms | None:
        """What the operators' rows give; None if they paused one who pays."""
        rows = {row.name: row for row in Account.objects.using(self.alias)}
        if any(rows[name].paused for name in payer if name in rows):
            with pytest.raises(Paused):
                Policy.read(payer).terms(payer, "balanced")
            return None
        return Policy.read(payer).terms(payer, "balanced")

    def to_again(self, which: int) -> Reserve | None:
        return self.asked[-1 - which % len(self.asked)] if self.asked else None

    def to_settle(self, which: int, over: int, counted: bool) -> Settle | None:
        known = [ask for ask in self.sent if ask.id in self.model.holds]
        if not known:
            return None
        ask = known[-1 - which % len(known)]
        tokens = max(0, self.model.holds[ask.id].tokens + over)
        return Settle(
            hold=hold_of(ask),
            outcome=Outcome.COMPLETED if over else Outcome.TIMED_OUT,
            source=UsageSource.COUNTED if counted else UsageSource.REPORTED,
            prompt_tokens=min(tokens, ask.prompt_tokens),
            completion_tokens=tokens - min(tokens, ask.prompt_tokens),
            total_tokens=tokens,
        )

    def to_answer(self, which: int, text: int, reasoning: int, leaves_after: int | None, more: int) -> Settle | None:
        """The provider answers, or is left; it is settled as the rule says."""
        known = [ask for ask in self.sent if ask.id in self.model.holds]
        if not known:
            return None
        ask = known[-1 - which % len(known)]
        hold = ask.held(self.model.holds[ask.id].tokens - ask.prompt_tokens)
        provider = next(one for one in PROVIDERS if one.name == ask.provider)
        bill, received = provider.answer(hold, text, reasoning, leaves_after, more)
        learned = self.model.known((ask.provider, ask.model))
        settle = settlement(hold, Outcome.COMPLETED, received, learned)
        assert settle.total_tokens >= bill - max(0, provider.template - hold.prompt_excess)
        return settle

    def to_retry(self, which: int) -> list[Any] | None:
        """Its provider failed late: it may have read the prompt. The next attempt has a reservation of its own."""
        known = [ask for ask in self.sent if ask.id in self.model.holds]
        if not known:
            return None
        ask = known[-1 - which % len(known)]
        hold = ask.held(self.model.holds[ask.id].tokens - ask.prompt_tokens)
        again = ask.again()
        self.asked.append(again)
        return [settlement(hold, Outcome.UPSTREAM_ERROR, Received(billed=Billed.PROMPT)), again]

    def to_give_back(self, which: int) -> Settle | None:
        """By who never heard the answer: there may be no hold at all."""
        ask = self.to_again(which)
        return Settle(hold=hold_of(ask), outcome=Outcome.CANCELLED) if ask else None

    def to_stop(self, which: int) -> Stop | None:
        ask = self.to_again(which)
        return Stop(id=ask.id, day=ask.day, accounts=ask.accounts) if ask else None

    def to_reset(self, account: str, yesterday: bool) -> Reset:
        day = self.clock.now.astimezone(BERLIN).date() - timedelta(days=yesterday)
        return Reset(day=day, account=account, reason="the operator is kind", actor="admin")

    def expected(self, ask: Any) -> Any:
        now = self.clock.now
        match ask:
            case Reserve():
                self.sent.append(ask)
                return self.model.reserve(ask, now)
            case Settle():
                return self.model.settle(ask, now)
            case Stop():
                return self.model.stop(ask, now)
            case Reset():
                return self.model.reset(ask, now)

    # What is true after each step.

    @invariant()
    def the_rows_are_the_models(self) -> None:
        if not hasattr(self, "model"):
            return
        rows = Reservation.objects.using(self.alias)
        stored = rows.values_list("id", "day", "tokens", "expires_at", "settled_at", *FIELDS.values())
        assert {row[0]: row[1:] for row in stored} == {
            held_id: (held.day, held.tokens, held.expires, held.resolved, *(getattr(held, name) for name in FIELDS))
            for held_id, held in self.model.holds.items()
        }

    @invariant()
    def what_was_taught_is_known(self) -> None:
        if not hasattr(self, "model"):
            return
        columns = ("reports", "prompt_excess", "completion_excess", "reasons_unseen", "ignores_max_tokens")
        rows = {(row.provider, row.model): row for row in Calibration.objects.using(self.alias)}
        assert rows.keys() == self.model.lessons.keys()
        for of, row in rows.items():
            known = self.model.known(of)
            assert [getattr(row, name) for name in columns] == [getattr(known, name) for name in columns]

    @invariant()
    def the_counters_add_up_and_no_budget_is_overspent(self) -> None:
        if not hasattr(self, "model"):
            return
        counters = {(row.day, row.account): row for row in DailyUsage.objects.using(self.alias)}
        adjusted, lines = dict(self.adjustments()), self.lines()
        for key in {(h.day, name) for h in self.model.holds.values() for name in h.accounts} | counters.keys():
            held, row = self.model.of(key), counters.get(key, DailyUsage())
            assert row.tokens_reserved == sum(h.tokens for h in held if h.state == "open")
            tokens, cost = adjusted.get(key, (0, 0))
            assert row.tokens_used == sum(h.charged for h in held) + tokens == self.model.used(key)
            assert row.cost_used == sum(h.cost or 0 for h in held) + cost == self.model.used_cost(key)
            assert row.cost_reserved == self.model.reserved_cost(key)
            assert row.prompt_tokens == sum(h.prompt for h in held)
            assert row.completion_tokens == sum(h.completion for h in held)
            assert row.requests == len(held)
            if key in self.model.filled_to:
                assert row.tokens_used + row.tokens_reserved <= self.model.filled_to[key]
            charged = [h for h in held if h.state != "open"]
            assert lines[key] == Counter(
                {
                    **{
                        (source, *line): sum(h.billed for h in charged if (h.source, h.line) == (source, line))
                        for source, line in {(h.source, h.line) for h in charged if h.source != "none"}
                    },
                    "requests": len(charged),
                    "cost": sum(h.cost or 0 for h in charged),
                    "prompt": sum(h.prompt for h in charged),
                    "completion": sum(h.completion for h in charged),
                }
            )

    @invariant()
    def no_limit_in_money_is_overspent(self) -> None:
        if not hasattr(self, "model"):
            return
        paid: Counter[tuple[str, date, str]] = Counter()
        for row in DailyUsage.objects.using(self.alias):
            paid["day", row.day, row.account] += row.cost_used + row.cost_reserved
            paid["month", row.day.replace(day=1), row.account] += row.cost_used + row.cost_reserved
        for key, most in self.model.paid_to.items():
            assert paid[key] <= most

    def adjustments(self) -> Iterator[tuple[Key, tuple[int, int]]]:
        rows = Adjustment.objects.using(self.alias).order_by()
        for row in rows.values("day", "account").annotate(tokens=Sum("tokens"), cost=Sum("cost")):
            yield (row["day"], row["account"]), (row["tokens"], row["cost"])

    def lines(self) -> dict[Key, Counter[Any]]:
        found: dict[Key, Counter[Any]] = defaultdict(Counter)
        for row in UsageLine.objects.using(self.alias):
            for source in ("reported", "counted", "held"):
                found[row.day, row.account][source, row.provider, row.model] += getattr(row, f"tokens_{source}")
            found[row.day, row.account].update(
                requests=row.requests, cost=row.cost, prompt=row.prompt_tokens, completion=row.completion_tokens
            )
        return found


def shown(answer: Any) -> tuple[type, Any]:
    """An answer as the model words it."""
    if isinstance(answer, Hold):
        return Hold, (answer.day, answer.prompt_tokens, answer.output_tokens, answer.remaining)
    return type(answer), answer.retry_after if isinstance(answer, ChatError) else answer


def test_the_ledger_answers_as_the_model_does_and_always_adds_up(database: str, configure: Configure) -> None:
    configure(TIME_ZONE="Europe/Berlin", SITE_DAILY_TOKEN_LIMIT=SITE_LIMIT, **SITE_MONEY)
    assert conf.settings.LEASE_SECONDS == LEASE
    machine = type("LedgerMachine", (LedgerMachine,), {"alias": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

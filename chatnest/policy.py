"""What operators decided: the Profile rows, and the Account rows of those who pay.

Each process remembers what it read for two seconds, and reads only what a request needs: a site may have a hundred
thousand account rows, and a request names three.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Final

from django.db import connections

from .accounts import ANONYMOUS, KINDS, SHARED, SITE, is_stranger
from .conf import settings, today
from .errors import ChatError, Forbidden, NotAuthenticated, Paused
from .limits import DEFAULT_PROFILES, Limits, Tightening, clamp, hard_caps, tighten, up_to
from .models import Account, Calibration, Price, Profile
from .prices import MoneyLimits, UnitPrice, money_limits, price

FRESH_SECONDS: Final = 2.0
MOST_ACCOUNTS: Final = 10_000  # remembered at once
MOST_NAMES: Final = 1000  # read in one statement
Audience = Profile.Audience
Calibrations = Mapping[tuple[str, str], Calibration]  # by provider and model
Prices = Mapping[tuple[str, str], UnitPrice]  # those that are known


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one request gets: limits in force, and each account's daily limit, the payer's first.

    ``fallback``: the provider and the model to ask where the first fail. ``whole``: the daily limit of an account
    for which the request asked less. ``money``: of the accounts that have one. ``prices``: of whatever may be asked.
    """

    profile: str
    provider: str
    model: str
    fallback: tuple[str, str] | None = None
    system_prompt: str
    limits: Limits
    budgets: Mapping[str, int]
    whole: Mapping[str, int] = field(default_factory=dict)
    money: Mapping[str, MoneyLimits] = field(default_factory=dict)
    prices: Prices = field(default_factory=dict)

    @property
    def price(self) -> UnitPrice | None:
        """The model's, if it is known."""
        return self.prices.get((self.provider, self.model))


@dataclass(frozen=True, slots=True)
class DailyLimit:
    """An account's limit in tokens: what its ``source`` gives, a setting or a profile, and what is in force.

    ``paused``: the account, its own or one shared, whose pause stops it; empty if none.
    """

    given: int
    source: str
    in_force: int
    paused: str


@dataclass(frozen=True, slots=True)
class Policy:
    """All profiles by name, those of some accounts that have a row, and what is known of (provider, model)."""

    profiles: Mapping[str, Profile]
    accounts: Mapping[str, Account]
    calibrations: Calibrations = field(default_factory=dict)
    prices: Prices = field(default_factory=dict)

    @classmethod
    def read(cls, accounts: Collection[str] = ()) -> Policy:
        """As the database has it. Raises what the database raises."""
        alias = settings.DATABASE_ALIAS
        profiles = read_profiles()
        calibrations = {(row.provider, row.model): row for row in Calibration.objects.using(alias)}
        rows = read_accounts(accounts) if accounts else {}
        return cls(profiles, rows, calibrations, _read_prices(profiles.values()))

    def terms(self, accounts: Sequence[str], asked: str, request: Tightening | None = None) -> Terms:
        """The terms for a request of ``accounts`` (the payer first) that asked for a profile.

        Raises Paused, NotAuthenticated and Forbidden.
        """
        rows = [row for name in accounts if (row := self.accounts.get(name))]
        if any(row.paused for row in rows):
            raise Paused(retry_after=60)
        payer = accounts[0]
        profile = self._profile(payer, asked)
        limits = clamp(profile.limits, hard_caps())
        budgets = {payer: self._decided(payer, limits.daily_token_limit)}
        budgets |= {name: self._decided(name, self._limit(name)) for name in accounts if name != payer}
        limits = replace(limits, daily_token_limit=budgets[payer])
        if request:
            limits = tighten(limits, request)
        whole = {payer: budgets[payer]} if limits.daily_token_limit < budgets[payer] else {}
        budgets[payer] = limits.daily_token_limit
        return Terms(
            profile=profile.name,
            provider=profile.provider,
            model=profile.model,
            fallback=self._fallback(profile),
            system_prompt=profile.system_prompt,
            limits=limits,
            budgets=budgets,
            whole=whole,
            money=self._money_limits(accounts, profile),
            prices=self.prices,
        )

    def _money_limits(self, accounts: Sequence[str], profile: Profile) -> dict[str, MoneyLimits]:
        limits = {name: self.money(name, None if index else profile) for index, name in enumerate(accounts)}
        return {name: its for name, its in limits.items() if its}

    def money(self, account: str, profile: Profile | None = None) -> MoneyLimits:
        """What is in force for an account in a day and in a month; of a payer, by its ``profile``."""
        limits = MoneyLimits()
        if account == SITE:
            limits = money_limits(settings.SITE_DAILY_MONEY_LIMIT, settings.SITE_MONTHLY_MONEY_LIMIT)
        if profile:
            limits = limits.lowered(profile.daily_money_limit, profile.monthly_money_limit)
        if row := self.accounts.get(account):
            limits = limits.lowered(row.daily_money_limit, row.monthly_money_limit)
        return limits

    def daily_limit(self, account: str, day: date | None = None) -> DailyLimit:
        """What is in force for ``account`` on a day, today if it is None; for a payer, by the largest profile."""
        limit, source = self._limit(account), "HARD_CAPS"
        if account in SHARED:
            source = f"{account.upper()}_DAILY_TOKEN_LIMIT"
        elif account.partition(":")[0] in KINDS:
            limit, source = self._largest_profile(account)
        pays_from = (account, *([ANONYMOUS] if is_stranger(account) else []), SITE)
        paused = [name for name in pays_from if (row := self.accounts.get(name)) and row.paused]
        return DailyLimit(limit, source, self._decided(account, limit, day), paused[0] if paused else "")

    def with_row(self, row: Account) -> Policy:
        """As it would be if that were saved."""
        return replace(self, accounts={**self.accounts, row.name: row})

    def _largest_profile(self, payer: str) -> tuple[int, str]:
        """The daily limit of the largest profile that the payer may have, and its name; none if it may have none."""
        limits = {"": 0}
        for asked in DEFAULT_PROFILES:
            with suppress(ChatError):
                profile = self._profile(payer, asked)
                limits[profile.name] = clamp(profile.limits, hard_caps()).daily_token_limit
        largest = max(limits, key=lambda name: (limits[name], name))
        return limits[largest], largest

    def _profile(self, payer: str, asked: str) -> Profile:
        row = self.accounts.get(payer)
        profile = row.profile if row else None
        if profile is None:
            profile = self._choice(payer, asked)
            if not profile.enabled:
                profile = self._choice(payer, "balanced")
        if not profile.enabled:
            raise Paused(retry_after=60)
        return profile

    def _fallback(self, profile: Profile) -> tuple[str, str] | None:
        """Of a profile that is switched off, nobody is asked."""
        rows = self.profiles.values()
        return next(((row.provider, row.model) for row in rows if row.enabled and row.pk == profile.fallback_id), None)

    def _choice(self, payer: str, asked: str) -> Profile:
        """The largest profile up to ``asked`` that the payer may choose. Raises NotAuthenticated and Forbidden."""
        may_choose = {Audience.EVERYONE} if is_stranger(payer) else {Audience.EVERYONE, Audience.USERS}
        refusal: ChatError = Forbidden()
        for name in up_to(asked):
            profile = self.profiles[name]
            if profile.audience in may_choose:
                return profile
            if profile.audience == Audience.USERS:
                refusal = NotAuthenticated()
        raise refusal

    def _limit(self, account: str) -> int:
        """The daily limit of an account that pays beside the payer, before what its operator decided."""
        site: int = settings.SITE_DAILY_TOKEN_LIMIT
        if account == SITE:
            return site
        if account == ANONYMOUS:
            share: int | None = settings.ANONYMOUS_DAILY_TOKEN_LIMIT
            return self._decided(SITE, site) // 5 if share is None else share
        # One that PAYER added (a team's) has no profile of its own.
        return hard_caps().daily_token_limit

    def _decided(self, account: str, limit: int, day: date | None = None) -> int:
        """``limit``, lowered by the account's row, and raised by what that grants for the day."""
        row = self.accounts.get(account)
        if row is None:
            return limit
        if row.daily_token_limit is not None:
            limit = min(limit, row.daily_token_limit)
        if row.extra_day and (extra := row.extra_on(day or today())):
            # What is the code's to say, no grant lifts: the site's limit for what many share, the caps for others.
            most = settings.SITE_DAILY_TOKEN_LIMIT if account in SHARED else hard_caps().daily_token_limit
            limit = max(limit, min(limit + extra, most))
        return limit


def read_profiles() -> dict[str, Profile]:
    """All rows. Raises what the database raises."""
    profiles = {row.name: row for row in Profile.objects.using(settings.DATABASE_ALIAS)}
    for name in DEFAULT_PROFILES:
        # Its operator may have tightened it, so no other limits stand for it: a missing row is one that is off.
        profiles.setdefault(name, Profile(name=name, enabled=False))
    return profiles


def _read_prices(profiles: Iterable[Profile]) -> Prices:
    """Of what profiles ask, as rows, settings and the list have it by now."""
    rows = {(row.provider, row.model): row for row in Price.objects.using(settings.DATABASE_ALIAS)}
    asked = {(profile.provider, profile.model) for profile in profiles}
    return {key: found for key in asked if (found := price(*key, rows))}


def read_accounts(names: Collection[str]) -> dict[str, Account]:
    """The rows of these accounts. Raises what the database raises."""
    connection = connections[settings.DATABASE_ALIAS]
    with connection.cursor() as cursor:
        # Most have none: the ORM would take a millisecond to say so, this takes a tenth.
        sql = f'SELECT "name" FROM "{Account._meta.db_table}" WHERE "name" IN ({", ".join(["%s"] * len(names))})'  # noqa: S608
        cursor.execute(sql, list(names))
        found = [name for (name,) in cursor.fetchall()]
    rows = Account.objects.using(connection.alias).filter(name__in=found).select_related("profile") if found else ()
    return {row.name: row for row in rows}


NEVER: Final = (0.0, None)


class PolicyCache:
    """What was read within the last two seconds: of accounts, those asked for, and that most of them have no row.

    Anybody may ask; one thread reads, for all who wait in one statement.
    """

    def __init__(self) -> None:
        self._wanted: deque[str] = deque(maxlen=MOST_ACCOUNTS)
        self._memory = _Memory({})

    def forget(self, *, calibrations: bool = False) -> None:
        """Read anew what is asked for next. What is known of models is kept till then, unless told otherwise.

        (An answer that ends meanwhile would be charged its whole hold.)
        """
        # What is being read now may be old already: it goes into the memory of before, which nobody asks.
        self._memory = _Memory({} if calibrations else self._memory.policy[1].calibrations)

    def recall(self, accounts: Sequence[str]) -> Policy | None:
        """The policy for these accounts, or None: then they are wanted, and ``read`` has it."""
        memory, now = self._memory, time.monotonic()
        rows, missing = memory.known(accounts, now)
        until, policy = memory.policy
        if now < until and not missing:
            return replace(policy, accounts=rows)
        self._wanted.extend(missing)
        return None

    def read(self, accounts: Sequence[str]) -> Policy:
        """The policy for these accounts. Raises what the database raises."""
        memory, now = self._memory, time.monotonic()
        if now >= memory.policy[0]:
            memory.policy = now + FRESH_SECONDS, Policy.read()
        rows, missing = memory.known(accounts, now)
        if missing:  # else somebody who waited too has had it read
            while self._wanted and len(missing) < MOST_NAMES:
                missing.add(self._wanted.popleft())
            found = read_accounts(missing)
            memory.remember(missing, found, now)
            rows |= {name: found[name] for name in accounts if name in found}
        return replace(memory.policy[1], accounts=rows)

    def calibration(self, provider: str, model: str) -> Calibration | None:
        """What was known of a model when profiles were last read."""
        return self._memory.policy[1].calibrations.get((provider, model))


class _Memory:
    """Readings, each with the time until which it is in force: the profiles', and those of accounts, oldest first."""

    def __init__(self, calibrations: Calibrations) -> None:
        self.policy: tuple[float, Policy] = 0.0, Policy({}, {}, calibrations)
        self._accounts: dict[str, tuple[float, Account | None]] = {}

    def known(self, accounts: Sequence[str], now: float) -> tuple[dict[str, Account], set[str]]:
        """The rows of these accounts, and the names of which nothing is known."""
        rows, missing = {}, set()
        for name in accounts:
            until, row = self._accounts.get(name, NEVER)
            if now >= until:
                missing.add(name)
            elif row:
                rows[name] = row
        return rows, missing

    def remember(self, names: Collection[str], rows: Mapping[str, Account], now: float) -> None:
        for name in names:
            self._accounts.pop(name, None)
            self._accounts[name] = now + FRESH_SECONDS, rows.get(name)
        while self._accounts:
            oldest, (until, _) = next(iter(self._accounts.items()))
            if now < until and len(self._accounts) <= MOST_ACCOUNTS:
                break
            del self._accounts[oldest]

"""What operators decided, as one frozen reading of the Profile and Account rows.

Each process reads it anew at most every two seconds, and only when a request needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from .accounts import ANONYMOUS, SITE, is_stranger
from .conf import settings
from .errors import ChatError, Forbidden, NotAuthenticated, Paused
from .limits import DEFAULT_PROFILES, Limits, Tightening, clamp, hard_caps, tighten, up_to
from .models import Account, Calibration, Profile

FRESH_SECONDS: Final = 2.0
Audience = Profile.Audience


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one request gets: limits in force, and each account's daily limit, the payer's first."""

    profile: str
    provider: str
    model: str
    system_prompt: str
    limits: Limits
    budgets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Policy:
    """All profiles by name, the accounts that have a row, and what is known of (provider, model)."""

    profiles: Mapping[str, Profile]
    accounts: Mapping[str, Account]
    calibrations: Mapping[tuple[str, str], Calibration] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Policy:
        alias = settings.DATABASE_ALIAS
        profiles = {row.name: row for row in Profile.objects.using(alias)}
        for name in DEFAULT_PROFILES:
            # Its operator may have tightened it, so no other limits stand for it: a missing row is one that is off.
            profiles.setdefault(name, Profile(name=name, enabled=False))
        accounts = Account.objects.using(alias).select_related("profile")
        calibrations = {(row.provider, row.model): row for row in Calibration.objects.using(alias)}
        return cls(profiles, {row.name: row for row in accounts}, calibrations)

    def terms(self, accounts: Sequence[str], asked: str, request: Tightening | None = None) -> Terms:
        """The terms for a request of ``accounts`` (the payer first) that asked for a profile.

        Raises Paused, NotAuthenticated and Forbidden.
        """
        rows = [row for name in accounts if (row := self.accounts.get(name))]
        if any(row.paused for row in rows):
            raise Paused(retry_after=60)
        profile = self._profile(accounts[0], asked)
        limits = clamp(profile.limits, hard_caps())
        if request:
            limits = tighten(limits, request)
        return Terms(
            profile=profile.name,
            provider=profile.provider,
            model=profile.model,
            system_prompt=profile.system_prompt,
            limits=limits,
            budgets={name: self._budget(name, limits, payer=name == accounts[0]) for name in accounts},
        )

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

    def _budget(self, account: str, limits: Limits, *, payer: bool) -> int:
        if account == SITE:
            limit: int = settings.SITE_DAILY_TOKEN_LIMIT
        elif account == ANONYMOUS:
            limit = self._strangers_share(limits)
        else:
            # An account that PAYER added (a team's) has no profile of its own: the cap is its limit.
            limit = limits.daily_token_limit if payer else hard_caps().daily_token_limit
        row = self.accounts.get(account)
        return limit if row is None or row.daily_token_limit is None else min(limit, row.daily_token_limit)

    def _strangers_share(self, limits: Limits) -> int:
        share: int | None = settings.ANONYMOUS_DAILY_TOKEN_LIMIT
        return self._budget(SITE, limits, payer=False) // 5 if share is None else share

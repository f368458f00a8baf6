"""Limits, pure: what a profile allows, what the code caps, what a request may tighten.

For every input (a row, a setting, a client) the result is within the caps: a value that is no
finite number becomes the strictest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Final, Protocol

from .conf import is_number, is_whole, settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may use. Tokens, counts and seconds; ``temperature`` None is not sent."""

    max_output_tokens: int
    max_messages: int
    temperature: float | None
    daily_token_limit: int
    max_tokens_per_request: int
    rate_max_requests: int
    rate_window_seconds: int
    max_concurrent_streams: int

    def can_answer(self) -> bool:
        """False where the output allowance alone fills a request, so that every one is refused."""
        return self.max_output_tokens < self.max_tokens_per_request


FIELDS: Final = tuple(f.name for f in fields(Limits))

DEFAULT_MODEL: Final = "gpt-4o-mini"

DEFAULT_HARD_CAPS: Final = Limits(
    max_output_tokens=4096,
    max_messages=20,
    temperature=2,
    daily_token_limit=500_000,
    max_tokens_per_request=16_000,
    rate_max_requests=60,
    rate_window_seconds=60,
    max_concurrent_streams=16,
)

DEFAULT_PROFILES: Final[Mapping[str, Limits]] = MappingProxyType(
    {
        "constrained": Limits(
            max_output_tokens=150,
            max_messages=4,
            temperature=0.5,
            daily_token_limit=30_000,
            max_tokens_per_request=2048,
            rate_max_requests=15,
            rate_window_seconds=60,
            max_concurrent_streams=2,
        ),
        "balanced": Limits(
            max_output_tokens=400,
            max_messages=6,
            temperature=0.7,
            daily_token_limit=70_000,
            max_tokens_per_request=2048,
            rate_max_requests=30,
            rate_window_seconds=60,
            max_concurrent_streams=4,
        ),
        "expanded": Limits(
            max_output_tokens=3000,
            max_messages=12,
            temperature=0.8,
            daily_token_limit=200_000,
            max_tokens_per_request=12_000,
            rate_max_requests=60,
            rate_window_seconds=60,
            max_concurrent_streams=8,
        ),
    }
)

_LEGACY_NAMES: Final = {"budget": "constrained", "moderate": "balanced", "free": "expanded"}


def profile_name(asked: object) -> str:
    """The profile a client asks for: case and surrounding space ignored, anything unknown is balanced."""
    name = asked.strip().lower() if isinstance(asked, str) else ""
    name = _LEGACY_NAMES.get(name, name)
    return name if name in DEFAULT_PROFILES else "balanced"


def up_to(profile: str) -> list[str]:
    """``profile``, one of the three, and those smaller than it, the largest first."""
    smallest_first = list(DEFAULT_PROFILES)
    return smallest_first[smallest_first.index(profile) :: -1]


def hard_caps() -> Limits:
    """``CHATNEST["HARD_CAPS"]`` over the defaults; a cap that is no number leaves the default."""
    caps: dict[str, Any] = {
        name: cap for name, cap in settings.HARD_CAPS.items() if name in FIELDS and is_cap(name, cap)
    }
    return replace(DEFAULT_HARD_CAPS, **caps)


def is_cap(name: str, cap: Any) -> bool:
    """Whether ``cap`` can cap the limit ``name``."""
    return bool((is_number(cap) if name == "temperature" else is_whole(cap)) and cap >= 0)


def clamp(limits: Limits, caps: Limits) -> Limits:
    """``limits`` within ``caps``: at most, but for the rate window, whose shortening would loosen it."""
    return Limits(
        max_output_tokens=min(_whole(limits.max_output_tokens), caps.max_output_tokens),
        max_messages=min(_whole(limits.max_messages), caps.max_messages),
        temperature=_temperature(limits.temperature, caps.temperature),
        daily_token_limit=min(_whole(limits.daily_token_limit), caps.daily_token_limit),
        max_tokens_per_request=min(_whole(limits.max_tokens_per_request), caps.max_tokens_per_request),
        rate_max_requests=min(_whole(limits.rate_max_requests), caps.rate_max_requests),
        rate_window_seconds=max(_whole(limits.rate_window_seconds), caps.rate_window_seconds, 1),
        max_concurrent_streams=min(_whole(limits.max_concurrent_streams), caps.max_concurrent_streams),
    )


def _whole(value: object) -> int:
    return max(0, int(value)) if is_number(value) else 0  # type: ignore[call-overload]


def _temperature(value: Any, cap: float | None) -> float | None:
    if value is None:
        return None
    return min(max(0.0, value), cap or 0.0) if is_number(value) else 0.0


class Tightening(Protocol):
    """A request's own limits; None leaves the profile's."""

    @property
    def daily_token_limit(self) -> int | None: ...
    @property
    def max_tokens_per_request(self) -> int | None: ...


def tighten(limits: Limits, request: Tightening) -> Limits:
    """``limits`` with what the client asked for, where that is lower."""
    return replace(
        limits,
        daily_token_limit=_lower(limits.daily_token_limit, request.daily_token_limit),
        max_tokens_per_request=_lower(limits.max_tokens_per_request, request.max_tokens_per_request),
    )


def _lower(limit: int, asked: object) -> int:
    return limit if asked is None else min(limit, _whole(asked))


def rate_wait(limit: int, current: int, previous: int, elapsed: float) -> float:
    """How long until one more request fits, in windows; 0 or less if it does now.

    A sliding window counter: this window's count and the previous one's, weighted by how much of it a window
    that ends now still covers (https://blog.cloudflare.com/counting-things-a-lot-of-different-things).
    """
    room = limit - 1
    if current + previous * (1 - elapsed) <= room:
        return 0
    if room < 0:
        return 2 - elapsed
    if current <= room:
        return 1 - (room - current) / previous - elapsed
    return 2 - room / current - elapsed

"""The settings: one dict, ``CHATNEST``, read at every use, so that ``override_settings`` works.

>>> from chatnest.conf import settings
>>> settings.SITE_DAILY_TOKEN_LIMIT
500000
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, tzinfo
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone


@dataclass(frozen=True)
class Settings:
    """Every key of ``CHATNEST`` with its default. Times are seconds, limits are tokens unless named."""

    HARD_CAPS: Mapping[str, float] = field(default_factory=dict)
    SITE_DAILY_TOKEN_LIMIT: int = 500_000
    ANONYMOUS_DAILY_TOKEN_LIMIT: int | None = None  # None: a fifth of the site's
    SITE_DAILY_MONEY_LIMIT: Decimal | str | int | None = None  # this and the next: in the currency
    SITE_MONTHLY_MONEY_LIMIT: Decimal | str | int | None = None
    CURRENCY: str = "USD"
    PRICES: Mapping[str, Mapping[str, Decimal | str | int]] = field(default_factory=dict)
    ALLOW_ANONYMOUS: bool = False
    PAYER: str | Callable[..., Any] | None = None
    PREPARE: str | Callable[..., Any] | None = None
    TRUSTED_PROXIES: int = 0
    TIME_ZONE: str | None = None
    OPENAI_API_KEY: str = ""
    OPENAI_BASE_URL: str = "https://api.openai.com/v1"
    PROVIDERS: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    HEARTBEAT_SECONDS: float = 15
    MAX_STREAM_SECONDS: float = 300
    FIRST_TOKEN_SECONDS: float = 60
    GAP_SECONDS: float = 30
    MAX_STREAMS_PER_PROCESS: int = 2000
    MAX_BODY_BYTES: int = 1024 * 1024
    ON_DISCONNECT: Literal["abort", "drain"] = "abort"
    MIN_OUTPUT_TOKENS: int = 64
    DATABASE_ALIAS: str = "default"
    LEASE_SECONDS: float = 30
    UPSTREAM_MAX_RETRIES: int = 2
    CLIENT_SYSTEM_MESSAGES: bool = False
    SHOW_REASONING: bool = False
    ALERTS: bool = True
    MAX_TOKENS_PARAMETER: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def __repr__(self) -> str:
        return "<the settings in CHATNEST>"  # keys are among them

    def __getattribute__(self, name: str) -> Any:
        if not name.isupper():
            return object.__getattribute__(self, name)
        typed: Mapping[str, Any] = getattr(django_settings, "CHATNEST", {})
        if name not in typed:
            return object.__getattribute__(self, name)
        if problem := complaint(name, typed[name]):
            # A wrong limit must never mean no limit: nothing is served until it is mended.
            raise ImproperlyConfigured(problem)
        return typed[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One entry of ``PROVIDERS``: an OpenAI-compatible server, and how its models are asked.

    ``client``: a callable, or its dotted path, that returns the AsyncOpenAI to use instead of one made from these.
    ``unreported``: "held" for a provider that finishes, and bills, an answer that nobody reads any more.
    """

    name: str
    api_key: str | Callable[[], Any] = field(default="", repr=False)
    base_url: str = "https://api.openai.com/v1"
    organization: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    stream_options: bool = True
    tokenizer: str | None = None
    unreported: Literal["learned", "held"] = "learned"
    client: str | Callable[[], Any] | None = None

    @property
    def is_openai(self) -> bool:
        """OpenAI's own servers, which count as its published tokenizers do."""
        return self.client is None and urlsplit(self.base_url).hostname == "api.openai.com"


settings: Final = Settings()
DEFAULT_PROVIDER: Final = "default"
MOST_MONEY: Final = 10**12  # in millionths, it fits its columns
MOST_PRICE: Final = 10**8  # and so does what an answer costs
NAMES: Final = frozenset(f.name for f in fields(Settings))


def complaint(name: str, value: object) -> str | None:
    """What is wrong with ``CHATNEST[name] = value``, or None."""
    is_right, must_be = _RULES[name]
    if name in _COMPLAINTS and isinstance(value, Mapping):
        return next(filter(None, map(_COMPLAINTS[name], value, value.values())), None)
    if is_right(value):
        return None
    shown = "what it is" if name in ("OPENAI_API_KEY", "PROVIDERS") else repr(value)
    return f"CHATNEST[{name!r}] must be {must_be}, not {shown}."


def is_whole(value: object) -> Any:
    """True for an int that is not a bool (Python calls True an int)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> Any:
    """True for a finite int or float: NaN compares false with every limit, so it is no number here."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_amount(value: object, most: int = MOST_MONEY) -> bool:
    """True for an amount of money, 0 or more; not for a float, which is not what was typed."""
    try:
        amount = Decimal(value) if isinstance(value, str | Decimal) or is_whole(value) else None  # type: ignore[arg-type]
    except InvalidOperation:
        return False
    return amount is not None and amount.is_finite() and 0 <= amount < most


def _is_zone(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(ZoneInfo(value))
    except (ValueError, OSError, KeyError):
        return False


Rule = tuple[Callable[[Any], bool], str]

_COUNT: Rule = (lambda value: is_whole(value) and value >= 0, "a whole number, 0 or more")
_POSITIVE_COUNT: Rule = (lambda value: is_whole(value) and value >= 1, "a whole number, 1 or more")
_SECONDS: Rule = (lambda value: is_number(value) and value > 0, "a number of seconds above 0")
_FLAG: Rule = (lambda value: isinstance(value, bool), "True or False")
_TEXT: Rule = (lambda value: isinstance(value, str), "a string")

_AMOUNT: Rule = (
    lambda value: value is None or is_amount(value),
    "an amount of the currency, 0 or more, as text, Decimal or whole number, or None",
)
_ADDRESS: Rule = (lambda value: _is_address(value), "an address that begins with http:// or https://")
_CALLABLE: Rule = (
    lambda value: value is None or isinstance(value, str) or callable(value),
    "a callable, its dotted path, or None",
)
_STRINGS: Rule = (
    lambda value: _is_dict(value) and all(isinstance(one, str) for one in value.values()),
    "a dict of strings",
)
_CHOICE_OF_PARAMETER: Rule = (
    lambda value: value in ("max_tokens", "max_completion_tokens"),
    "'max_tokens' or 'max_completion_tokens'",
)

_RULES: Final[Mapping[str, Rule]] = {
    "HARD_CAPS": (lambda value: isinstance(value, Mapping), "a dict of limits"),
    "SITE_DAILY_TOKEN_LIMIT": _COUNT,
    "ANONYMOUS_DAILY_TOKEN_LIMIT": (
        lambda value: value is None or (is_whole(value) and value >= 0),
        "a whole number, 0 or more, or None",
    ),
    "SITE_DAILY_MONEY_LIMIT": _AMOUNT,
    "SITE_MONTHLY_MONEY_LIMIT": _AMOUNT,
    "CURRENCY": (
        lambda value: (
            isinstance(value, str) and len(value) == 3 and value.isascii() and value.isalpha() and value.isupper()
        ),
        "the three letters of a currency, such as 'USD'",
    ),
    "PRICES": (lambda value: isinstance(value, Mapping), "a dict of dicts, each a model's prices"),
    "ALLOW_ANONYMOUS": _FLAG,
    "PAYER": _CALLABLE,
    "PREPARE": _CALLABLE,
    "TRUSTED_PROXIES": _COUNT,
    "TIME_ZONE": (lambda value: value is None or _is_zone(value), "the name of a time zone, or None"),
    "OPENAI_API_KEY": _TEXT,
    "OPENAI_BASE_URL": _ADDRESS,
    "PROVIDERS": (lambda value: isinstance(value, Mapping), "a dict of dicts, each a provider"),
    "HEARTBEAT_SECONDS": _SECONDS,
    "MAX_STREAM_SECONDS": _SECONDS,
    "FIRST_TOKEN_SECONDS": _SECONDS,
    "GAP_SECONDS": _SECONDS,
    "MAX_STREAMS_PER_PROCESS": _POSITIVE_COUNT,
    "MAX_BODY_BYTES": _POSITIVE_COUNT,
    "ON_DISCONNECT": (lambda value: value in ("abort", "drain"), "'abort' or 'drain'"),
    "MIN_OUTPUT_TOKENS": _POSITIVE_COUNT,
    "DATABASE_ALIAS": _TEXT,
    "LEASE_SECONDS": _SECONDS,
    "UPSTREAM_MAX_RETRIES": _COUNT,
    "CLIENT_SYSTEM_MESSAGES": _FLAG,
    "SHOW_REASONING": _FLAG,
    "ALERTS": _FLAG,
    "MAX_TOKENS_PARAMETER": _CHOICE_OF_PARAMETER,
}
_OURS: Final = frozenset(
    {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "best_of"}
)
_PROVIDER_RULES: Final[Mapping[str, Rule]] = {
    "API_KEY": (lambda value: isinstance(value, str) or callable(value), "a string, or a callable that returns one"),
    "BASE_URL": _ADDRESS,
    "ORGANIZATION": (lambda value: value is None or isinstance(value, str), "a string, or None"),
    "HEADERS": _STRINGS,
    "QUERY": _STRINGS,
    "EXTRA_BODY": (
        lambda value: _is_dict(value) and not _OURS & value.keys(),
        "a dict, without what chatnest says itself (the model, messages, how many tokens and answers)",
    ),
    "MAX_TOKENS_PARAMETER": _CHOICE_OF_PARAMETER,
    "STREAM_OPTIONS": _FLAG,
    "TOKENIZER": (lambda value: value is None or isinstance(value, str), "the name of a tokenizer, or None"),
    "UNREPORTED": (lambda value: value in ("learned", "held"), "'learned' or 'held'"),
    "CLIENT": _CALLABLE,
}


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_address(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _provider_complaint(name: object, typed: object) -> str | None:
    where = f"CHATNEST['PROVIDERS'][{name!r}]"
    if not isinstance(name, str) or not isinstance(typed, Mapping):
        return f"{where} must be a dict, under a name that is a string."
    for key, value in typed.items():
        if key not in _PROVIDER_RULES:
            return f"{where}[{key!r}] is not a setting of a provider. Known are {', '.join(_PROVIDER_RULES)}."
        is_right, must_be = _PROVIDER_RULES[key]
        if not is_right(value):
            return f"{where}[{key!r}] must be {must_be}."
    if name != DEFAULT_PROVIDER and not {"BASE_URL", "CLIENT"} & typed.keys():
        return f"{where} needs a BASE_URL, or a CLIENT."
    return None


def _price_complaint(model: object, typed: object) -> str | None:
    where = f"CHATNEST['PRICES'][{model!r}]"
    if not isinstance(model, str) or not isinstance(typed, Mapping):
        return f"{where} must be a dict, under a model's name, or provider/model."
    if not {"input", "output"} <= typed.keys() <= {"input", "cached_input", "output"}:
        return f"{where} must have the keys 'input' and 'output', and may have 'cached_input'."
    for key, value in typed.items():
        if not is_amount(value, MOST_PRICE):
            return (
                f"{where}[{key!r}] must be the price of a million tokens, 0 or more, as text, Decimal or whole number, "
                f"not {value!r}."
            )
    return None


_COMPLAINTS: Final = {"PROVIDERS": _provider_complaint, "PRICES": _price_complaint}


def provider_names() -> frozenset[str]:
    """What ``Profile.provider`` may be."""
    return frozenset({DEFAULT_PROVIDER, *settings.PROVIDERS})


def provider(name: str) -> Provider:
    """The provider of that name. Raises ImproperlyConfigured."""
    typed = settings.PROVIDERS.get(name)
    if name == DEFAULT_PROVIDER:
        short = {"API_KEY": settings.OPENAI_API_KEY, "BASE_URL": settings.OPENAI_BASE_URL}
        typed = {**short, "MAX_TOKENS_PARAMETER": settings.MAX_TOKENS_PARAMETER, **(typed or {})}
    if typed is None:
        raise ImproperlyConfigured(f"CHATNEST['PROVIDERS'] has no {name!r}.")
    return Provider(name=name, **{key.lower(): value for key, value in typed.items()})


def time_zone() -> tzinfo:
    """The zone whose midnight ends a budget's day."""
    return ZoneInfo(settings.TIME_ZONE) if settings.TIME_ZONE else timezone.get_default_timezone()


def today(now: datetime | None = None) -> date:
    """The budget's day at ``now``, an aware datetime, or at this moment: 23 or 25 hours where clocks change."""
    return timezone.localdate(now or moment(), time_zone())


def moment() -> datetime:
    """This moment, aware with ``USE_TZ`` off too."""
    return timezone.now() if django_settings.USE_TZ else datetime.now(UTC)


def stored(aware: datetime) -> datetime:
    """As the site's database keeps it: with ``USE_TZ`` off naive, in UTC, whose clocks never change."""
    return aware if django_settings.USE_TZ else aware.astimezone(UTC).replace(tzinfo=None)


def aware(stored: datetime) -> datetime:
    """What ``stored`` has made of it, with its zone again."""
    return stored if timezone.is_aware(stored) else stored.replace(tzinfo=UTC)


def now() -> datetime:
    """This moment, as ``stored``."""
    return stored(moment())

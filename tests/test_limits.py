"""Limits: whatever a row, a setting or a client says, what is in force is within HARD_CAPS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from django.test import override_settings
from hypothesis import example, given
from hypothesis import strategies as st

from chatnest.limits import (
    DEFAULT_HARD_CAPS,
    DEFAULT_PROFILES,
    FIELDS,
    Limits,
    clamp,
    hard_caps,
    profile_name,
    rate_wait,
    tighten,
)

AT_MOST = [name for name in FIELDS if name not in ("temperature", "rate_window_seconds")]

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**63, -(2**63), 1e308, -1e308, 5e-324, -0.0, 0, 1, True, False]),
)
anything = st.one_of(
    numbers,
    st.none(),
    st.text(),
    st.sampled_from(["NaN", "Infinity", "-1", "1e999", "2048"]),
    st.binary(),
    st.lists(numbers),
    st.dictionaries(st.text(), numbers),
    st.complex_numbers(),
    st.builds(object),
    st.just(math.nan),
)
rows = st.dictionaries(st.sampled_from(FIELDS), anything)
sane_caps = st.builds(
    Limits,
    temperature=st.floats(0, 1e9) | st.integers(0),
    **{name: st.integers(0) for name in FIELDS if name != "temperature"},
)


@dataclass(frozen=True)
class Asked:
    daily_token_limit: Any = None
    max_tokens_per_request: Any = None


requests = st.builds(Asked, anything, anything)


def as_typed(typed: dict[str, Any]) -> Limits:
    """Limits as a row or a setting may hold them, sense or nonsense; what is missing is None."""
    return Limits(**{name: typed.get(name) for name in FIELDS})


def assert_within(limits: Limits, caps: Limits) -> None:
    for name in AT_MOST:
        value = getattr(limits, name)
        assert type(value) is int, name
        assert 0 <= value <= getattr(caps, name), name
    assert type(limits.rate_window_seconds) is int
    assert limits.rate_window_seconds >= max(1, caps.rate_window_seconds)
    assert limits.temperature is None or 0 <= limits.temperature <= (caps.temperature or 0)


@given(typed=rows)
@example(typed=dict.fromkeys(FIELDS, math.nan))
@example(typed=dict.fromkeys(FIELDS, math.inf))
@example(typed=dict.fromkeys(FIELDS, -math.inf))
@example(typed=dict.fromkeys(FIELDS, -1))
@example(typed=dict.fromkeys(FIELDS, True))
@example(typed=dict.fromkeys(FIELDS, 10**400))
@example(typed=dict.fromkeys(FIELDS, "9999999"))
@example(typed=dict.fromkeys(FIELDS, None))
@example(typed={})
def test_whatever_a_row_holds_is_clamped(typed: Mapping[str, Any]) -> None:
    assert_within(clamp(as_typed(typed), DEFAULT_HARD_CAPS), DEFAULT_HARD_CAPS)


@given(typed=rows, caps=sane_caps)
def test_whatever_the_caps_are_they_hold(typed: Mapping[str, Any], caps: Limits) -> None:
    assert_within(clamp(as_typed(typed), caps), caps)


@given(typed=rows, request=requests)
@example(typed=asdict(DEFAULT_PROFILES["balanced"]), request=Asked(math.nan, math.nan))
@example(typed=asdict(DEFAULT_PROFILES["balanced"]), request=Asked(math.inf, 10**400))
@example(typed=asdict(DEFAULT_PROFILES["balanced"]), request=Asked("x", "x"))
def test_whatever_a_client_asks_only_tightens(typed: Mapping[str, Any], request: Asked) -> None:
    before = clamp(as_typed(typed), DEFAULT_HARD_CAPS)
    after = tighten(before, request)
    assert_within(after, DEFAULT_HARD_CAPS)
    assert after.daily_token_limit <= before.daily_token_limit
    assert after.max_tokens_per_request <= before.max_tokens_per_request
    untouched = {"daily_token_limit": 0, "max_tokens_per_request": 0}
    assert replace(after, **untouched) == replace(before, **untouched)


@given(typed=rows, caps=st.dictionaries(st.sampled_from(FIELDS) | st.text(), anything), request=requests)
@example(typed=dict.fromkeys(FIELDS, 10**9), caps=dict.fromkeys(FIELDS, math.nan), request=Asked())
@example(typed=dict.fromkeys(FIELDS, 10**9), caps=dict.fromkeys(FIELDS, math.inf), request=Asked())
@example(typed=dict.fromkeys(FIELDS, 10**9), caps=dict.fromkeys(FIELDS, -1), request=Asked())
@example(typed=dict.fromkeys(FIELDS, 10**9), caps=dict.fromkeys(FIELDS, "1"), request=Asked())
@example(typed=dict.fromkeys(FIELDS, 10**9), caps=dict.fromkeys(FIELDS, None), request=Asked())
def test_whatever_the_settings_say_a_cap_that_is_no_number_caps_nothing_away(
    typed: Mapping[str, Any], caps: dict[str, Any], request: Asked
) -> None:
    with override_settings(CHATNEST={"HARD_CAPS": caps}):
        in_force = hard_caps()
    for name in FIELDS:
        number = in_force.temperature if name == "temperature" else getattr(in_force, name)
        assert number in (caps.get(name), getattr(DEFAULT_HARD_CAPS, name))
        assert 0 <= number < math.inf
    assert_within(tighten(clamp(as_typed(typed), in_force), request), in_force)


def test_the_profiles_as_delivered_are_within_the_caps_and_can_answer() -> None:
    for limits in DEFAULT_PROFILES.values():
        assert clamp(limits, DEFAULT_HARD_CAPS) == limits
        assert limits.can_answer()
    assert DEFAULT_HARD_CAPS.can_answer()


def test_the_profiles_and_caps_are_the_published_ones() -> None:
    table = """
        max_output_tokens          150     400     3000    4096
        max_messages                 4       6       12      20
        temperature                0.5     0.7      0.8       2
        daily_token_limit        30000   70000   200000  500000
        max_tokens_per_request    2048    2048    12000   16000
        rate_max_requests           15      30       60      60
        rate_window_seconds         60      60       60      60
        max_concurrent_streams       2       4        8      16
    """
    columns = [
        *(DEFAULT_PROFILES[name] for name in ("constrained", "balanced", "expanded")),
        DEFAULT_HARD_CAPS,
    ]
    for name, *values in map(str.split, table.strip().splitlines()):
        assert [getattr(column, name) for column in columns] == [float(value) for value in values]


def test_a_profile_that_could_never_answer_is_known_as_such() -> None:
    """The original's expanded profile held 3,000 output tokens against 2,048 a request."""
    limits = DEFAULT_PROFILES["expanded"]
    assert not replace(limits, max_tokens_per_request=2048).can_answer()
    assert not replace(limits, max_tokens_per_request=3000).can_answer()
    assert replace(limits, max_tokens_per_request=3001).can_answer()


def test_a_shorter_rate_window_would_loosen_the_cap() -> None:
    limits = DEFAULT_PROFILES["balanced"]
    assert clamp(replace(limits, rate_window_seconds=1), DEFAULT_HARD_CAPS).rate_window_seconds == 60
    assert clamp(replace(limits, rate_window_seconds=3600), DEFAULT_HARD_CAPS).rate_window_seconds == 3600


def test_a_temperature_that_is_empty_stays_empty_and_one_that_is_nonsense_becomes_the_coldest() -> None:
    limits = DEFAULT_PROFILES["balanced"]

    def in_force(temperature: Any) -> float | None:
        return clamp(replace(limits, temperature=temperature), DEFAULT_HARD_CAPS).temperature

    assert in_force(None) is None
    assert [in_force(value) for value in (-1, 0, 1.5, 2, 3, 10**400)] == [0, 0, 1.5, 2, 2, 2]
    assert [in_force(value) for value in (math.nan, math.inf, "1", True)] == [0, 0, 0, 0]


@given(st.one_of(anything, st.text()))
def test_any_profile_that_is_asked_for_is_one_of_three(asked: object) -> None:
    assert profile_name(asked) in DEFAULT_PROFILES


@pytest.mark.parametrize("name", ["constrained", "budget", " Constrained ", "BUDGET\n", "\tconstraineD"])
def test_case_and_surrounding_space_of_a_profile_are_ignored(name: str) -> None:
    assert profile_name(name) == "constrained"


# The sliding window, held to a plain simulation.


@given(
    limit=st.integers(0, 20),
    current=st.integers(0, 40),
    previous=st.integers(0, 40),
    elapsed=st.floats(0, 1, exclude_max=True),
)
def test_after_the_wait_that_a_refusal_names_one_more_request_fits(
    limit: int, current: int, previous: int, elapsed: float
) -> None:
    wait = rate_wait(limit, current, previous, elapsed)
    fits = current + previous * (1 - elapsed) + 1 <= limit
    assert (wait <= 0) == fits
    if fits or limit == 0:
        return
    assert 0 < wait <= 2
    at = elapsed + wait
    if at < 1:
        weighted = current + previous * (1 - at)
    else:  # by then this window is the one before, and the one after that empties it
        weighted = current * max(0.0, 2 - at)
    assert weighted + 1 <= limit + 1e-6
    # Nobody is kept waiting for longer than it takes.
    assert weighted + 1 >= limit - 1e-6


@given(st.integers(1, 30), st.lists(st.floats(0, 10), max_size=150))
def test_a_window_never_lets_through_twice_its_limit(limit: int, times: list[float]) -> None:
    """The estimate may be off, as any that keeps two counters is; a burst is bounded all the same."""
    admitted: list[float] = []
    for now in sorted(times):
        start = math.floor(now)
        current = sum(start <= at < start + 1 for at in admitted)
        previous = sum(start - 1 <= at < start for at in admitted)
        if rate_wait(limit, current, previous, now - start) <= 0:
            admitted.append(now)
            assert current + 1 <= limit
            assert sum(now - 1 < at for at in admitted) < 2 * limit
    if times:
        assert admitted

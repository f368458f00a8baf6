"""The places of a process: strangers hold at most half, and what is given back is there for the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from django.contrib.auth.models import User
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st

from chatnest.errors import Overloaded
from chatnest.models import Reservation
from chatnest.slots import StreamSlot
from chatnest.testing import FakeUpstream, Reply

from .client import Client
from .conftest import Configure, on_sqlite
from .test_accounts import log_in


@pytest.fixture
def places(configure: Configure) -> Iterator[Configure]:
    yield lambda number: configure(MAX_STREAMS_PER_PROCESS=number)
    assert StreamSlot._taken == StreamSlot._strangers == set()


def acquired(stranger: bool, tries: int) -> list[StreamSlot]:
    slots = []
    for _ in range(tries):
        with suppress(Overloaded):
            slots.append(StreamSlot.acquire(stranger=stranger))
    return slots


@pytest.mark.parametrize(("number", "for_strangers"), [(1, 1), (2, 1), (3, 2), (4, 2), (2000, 1000)])
def test_strangers_hold_at_most_half_and_users_the_rest(places: Configure, number: int, for_strangers: int) -> None:
    places(number)
    strangers = acquired(stranger=True, tries=number + 1)
    users = acquired(stranger=False, tries=number + 1)
    assert (len(strangers), len(users)) == (for_strangers, number - for_strangers)
    for slot in strangers + users:
        slot.release()


def test_users_may_hold_all_of_them(places: Configure) -> None:
    places(4)
    users = acquired(stranger=False, tries=5)
    assert len(users) == 4
    assert acquired(stranger=True, tries=1) == []
    for slot in users:
        slot.release()


def test_a_place_that_is_given_back_twice_is_one_place(places: Configure) -> None:
    places(4)
    first, second = acquired(stranger=True, tries=3)
    first.release()
    first.release()
    (third,) = acquired(stranger=True, tries=2)
    for slot in (second, third):
        slot.release()


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60), number=st.integers(1, 9))
def test_no_order_of_coming_and_going_holds_more(steps: list[tuple[bool, int]], number: int) -> None:
    held: list[tuple[bool, StreamSlot]] = []
    with override_settings(CHATNEST={"MAX_STREAMS_PER_PROCESS": number}):
        for stranger, which in steps:
            room = len(held) < number and (not stranger or sum(s for s, _ in held) < (number + 1) // 2)
            try:
                held.append((stranger, StreamSlot.acquire(stranger=stranger)))
                assert room
            except Overloaded:
                assert not room
            if which < len(held):
                held.pop(which)[1].release()
    for _, slot in held:
        slot.release()


@on_sqlite
def test_a_thousand_addresses_leave_users_their_half(
    client: Client, upstream: FakeUpstream, configure: Configure
) -> None:
    """As three do here, of four places. Who is refused has reserved nothing."""
    configure(MAX_STREAMS_PER_PROCESS=4, TRUSTED_PROXIES=1)
    upstream.replies(Reply("Hi", gate_after=1))
    user = log_in(User.objects.create_user("ada"))
    with (
        client.stream(x_forwarded_for="192.0.2.1") as one,
        client.stream(x_forwarded_for="192.0.2.2") as two,
    ):
        one.until("token"), two.until("token")
        refused = client.chat(x_forwarded_for="192.0.2.3")
        assert (refused.status, refused.json["code"], refused.headers["retry-after"]) == (503, "overloaded", "1")
        with client.stream(**user) as three, client.stream(**user) as four:
            three.until("token"), four.until("token")
            assert client.chat(**user).json["code"] == "overloaded"
            assert Reservation.objects.count() == 4
            upstream.release()
            assert all(stream.until("done") for stream in (one, two, three, four))
    assert client.chat(x_forwarded_for="192.0.2.3").status == 200

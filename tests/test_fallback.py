"""A profile's fallback: where its own provider has no answer, another's is asked, and one hold pays."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from django.core.checks import run_checks
from django.core.exceptions import ValidationError
from django.db.models import ProtectedError

from chatnest.models import Calibration, Profile
from chatnest.testing import SECRET, FakeUpstream, Reply

from .client import Client
from .conftest import Configure, EditProfile, Settled

KNOWN = {"TOKENIZER": "o200k_base"}


@pytest.fixture
def second() -> Iterator[FakeUpstream]:
    with FakeUpstream() as second:
        second.replies(Reply("From the second", usage=(200, 4)))
        yield second


@pytest.fixture
def two(
    client: Client, upstream: FakeUpstream, second: FakeUpstream, configure: Configure, edit_profile: EditProfile
) -> Profile:
    """Balanced asks the first provider, and where that fails what ``spare`` asks: a local model of the second."""
    configure(PROVIDERS={"default": KNOWN, "second": {"BASE_URL": second.url}})
    spare = edit_profile("spare", provider="second", model="llama-3.1-8b", audience="forced")
    return edit_profile(fallback=spare)


REFUSALS = {
    "a wrong key": Reply.refuse(401),
    "an unknown model": Reply.refuse(404),
    "too many requests": Reply.refuse(429, retry_after=20),
    "a quota that is used up": Reply.refuse(402),
    "a server that is down": Reply.refuse(503),
}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_the_second_answers_at_once_and_one_hold_pays(
    client: Client, upstream: FakeUpstream, second: FakeUpstream, settled: Settled, refusal: Reply
) -> None:
    upstream.replies(refusal)
    answer = client.chat()
    assert (answer.answer, answer.events[-1]) == ("From the second", "done")
    assert len(upstream.requests) == len(second.requests) == 1
    first, other = upstream.requests[0].json, second.requests[0].json
    assert (first["model"], other["model"]) == ("gpt-4o-mini", "llama-3.1-8b")
    assert first["messages"] == other["messages"]
    assert first["max_tokens"] == other["max_tokens"] == 400
    (row,) = settled()
    assert (row.profile, row.provider, row.model) == ("balanced", "second", "llama-3.1-8b")
    assert (row.outcome, row.tokens_charged) == ("completed", 204)
    assert row.tokens == 78 + 400  # the larger bound of the two: nobody knows llama's tokenizer


@pytest.mark.usefixtures("two")
def test_a_first_that_cannot_be_reached(
    client: Client, second: FakeUpstream, configure: Configure, settled: Settled
) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        configure(OPENAI_BASE_URL=f"http://127.0.0.1:{nobody.getsockname()[1]}/v1")
        assert client.chat().answer == "From the second"
    assert [row.provider for row in settled()] == ["second"]


@pytest.mark.usefixtures("two")
def test_a_first_that_may_have_billed_is_charged_beside_the_second(
    client: Client, upstream: FakeUpstream, second: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply(cut_after=-1))
    assert client.chat().answer == "From the second"
    first, other = settled()
    assert (first.provider, first.outcome, first.tokens_charged) == ("default", "upstream_error", 78)  # the prompt
    assert (other.provider, other.outcome, other.tokens_charged) == ("second", "completed", 204)


@pytest.mark.usefixtures("two")
def test_while_the_first_answers_nobody_else_is_asked(
    client: Client, upstream: FakeUpstream, second: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply("From the first"), Reply("One", "two", cut_after=1))
    assert client.chat().answer == "From the first"
    assert client.chat().data("error")["code"] == "upstream_broken"  # its first word was read
    assert not second.requests
    assert [row.provider for row in settled()] == ["default", "default"]


@pytest.mark.usefixtures("two")
def test_where_both_fail_the_second_one_is_what_is_told(
    client: Client, upstream: FakeUpstream, second: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply.refuse(401))
    second.reset()
    second.replies(Reply.refuse(429), Reply.refuse(503), Reply.refuse(400))
    answer = client.chat()
    assert answer.data("error")["code"] == "upstream_rejected" and SECRET not in answer.text
    assert (len(upstream.requests), len(second.requests)) == (1, 3)  # it has the retries
    assert [(row.provider, row.outcome, row.tokens_charged) for row in settled()] == [("second", "upstream_error", 0)]


@pytest.mark.usefixtures("two")
def test_each_model_is_taught_by_its_own_reports(
    client: Client, upstream: FakeUpstream, database: str, settled: Settled
) -> None:
    """The hold was for the larger bound of the two; what a report exceeds is its own model's."""
    upstream.replies(Reply.refuse(503), Reply("Hi", usage=(30, 1)))
    client.chat()
    client.chat()
    settled()
    rows = Calibration.objects.using(database).order_by("provider")
    assert [(row.provider, row.prompt_excess) for row in rows] == [("default", 30 - 10), ("second", 200 - 78)]


@pytest.mark.usefixtures("two")
def test_a_long_answer_of_the_second_is_cut_at_its_allowance(
    client: Client, upstream: FakeUpstream, second: FakeUpstream, settled: Settled
) -> None:
    upstream.replies(Reply.refuse(503))
    second.reset()
    second.replies(Reply.endless("word "))
    assert client.chat().data("usage")["finishReason"] == "length"
    assert settled()[0].provider == "second"


def test_one_that_is_switched_off_is_not_asked_and_check_says_so(
    two: Profile, client: Client, upstream: FakeUpstream, second: FakeUpstream, database: str, edit_profile: EditProfile
) -> None:
    edit_profile("spare", enabled=False)
    upstream.replies(Reply.refuse(401))
    assert client.chat().data("error")["code"] == "upstream_misconfigured"
    assert not second.requests
    assert "chatnest.W008" in [problem.id for problem in run_checks(databases=[database])]


def test_an_operator_cannot_choose_the_same_model_nor_delete_a_fallback(two: Profile) -> None:
    two.fallback = two
    with pytest.raises(ValidationError, match="same model"):
        two.full_clean()
    with pytest.raises(ProtectedError):
        Profile.objects.using(two._state.db).get(name="spare").delete()

"""``chatnest_doctor``: is the key right, is usage reported, what did it cost?"""

from __future__ import annotations

from io import StringIO

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from chatnest.models import Calibration, Reservation
from chatnest.slots import StreamSlot
from chatnest.testing import FakeUpstream, Reply

from .conftest import Configure, EditProfile


def doctor(*arguments: str) -> str:
    out = StringIO()
    try:
        call_command("chatnest_doctor", *arguments, stdout=out, stderr=out, no_color=True)
    except CommandError as error:
        return f"{out.getvalue()}{error}"
    return out.getvalue()


def test_a_model_that_answers_is_asked_once_for_three_profiles(upstream: FakeUpstream, database: str) -> None:
    upstream.replies(Reply("Ready"))
    said = doctor()
    assert "balanced: gpt-4o-mini of default\n  It answered after 0." in said
    assert "It cost 13 tokens (12 of the prompt, 1 of the answer), as reported." in said
    assert "It reports usage" in said
    assert ("Clock: 0.0 s from the database's." in said) == (database == "postgres")
    assert len(upstream.requests) == 1
    row = Reservation.objects.using(database).get()
    assert (row.payer, row.accounts, row.label) == ("doctor", ["doctor", "site"], "doctor")
    assert Calibration.objects.using(database).get().reports == 1, "it is the model's first report"


def test_a_wrong_key_is_told_in_the_providers_words(upstream: FakeUpstream, database: str) -> None:
    upstream.replies(Reply.refuse(401, message="Incorrect API key provided."))
    said = doctor("--profile", "expanded")
    assert "expanded: gpt-4o-mini of default\n  The chat is not set up correctly." in said
    assert "Incorrect API key provided." in said
    assert said.endswith("No answer from expanded.")


def test_a_parameter_that_the_model_does_not_take_is_told(
    upstream: FakeUpstream, database: str, configure: Configure
) -> None:
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    upstream.replies(Reply.refuse(400, message=message))
    configure(PROVIDERS={"default": {"BASE_URL": upstream.url + "/"}})  # another than the wrong key's, told already
    assert "Set this provider's MAX_TOKENS_PARAMETER to 'max_completion_tokens'." in doctor("--profile", "balanced")


def test_a_model_that_reports_nothing_is_told(upstream: FakeUpstream, database: str, edit_profile: EditProfile) -> None:
    edit_profile(model="silent")
    upstream.replies(Reply("Ready", usage=None))
    said = doctor("--profile", "balanced")
    assert "for nothing was reported" in said
    assert "answers that are left cost the whole hold" in said


def test_no_budget_no_answer(upstream: FakeUpstream, database: str, configure: Configure) -> None:
    configure(SITE_DAILY_TOKEN_LIMIT=5)
    said = doctor("--profile", "balanced")
    assert "Daily AI budget exceeded." in said
    assert "site has 5 of 5 tokens left" in said
    assert not upstream.requests
    assert not StreamSlot._taken


@pytest.mark.django_db(transaction=True)
def test_an_unknown_profile_is_an_error() -> None:
    assert "There is no profile 'large'. There are balanced, constrained, expanded." in doctor("--profile", "large")

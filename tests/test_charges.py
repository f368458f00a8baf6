"""What an answer costs: never less than the provider may have billed, and what a report teaches for the next ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatnest.ledger import Hold
from chatnest.ledger.charges import (
    IN_FLIGHT,
    Billed,
    Charge,
    Received,
    Report,
    charge,
    lesson,
    most_received,
    settlement,
)
from chatnest.ledger.operations import Lesson
from chatnest.models import Calibration

from .bookkeeping import Outcome, UsageSource, ask, hold_of, known

PROMPT, ALLOWANCE = 20, 400
HOLD = replace(hold_of(ask(prompt_tokens=PROMPT)), output_tokens=ALLOWANCE)


def answered(tokens: int, report: Report | None = None, **changes: Any) -> Received:
    """Read to its end."""
    return Received(billed=Billed.ANSWER, tokens=tokens, ended=True, report=report, **changes)


def left(tokens: int, report: Report | None = None, **changes: Any) -> Received:
    """Left in its middle."""
    return replace(answered(tokens, report, **changes), ended=False)


def usage(prompt: int, completion: int, total: int | None = None, reasoning: int = 0) -> Report:
    total = prompt + completion if total is None else total
    return Report(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total, reasoning_tokens=reasoning)


def parts(charge: Charge) -> tuple[str, int, int, int]:
    return charge.source.value, charge.prompt_tokens, charge.completion_tokens, charge.total_tokens


# Reported.


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        (usage(12, 30), (12, 30, 42)),
        (usage(12, 30, total=2), (12, 30, 42)),  # a total below its parts
        (usage(12, 30, total=50), (12, 30, 50)),
        (usage(0, 30), (PROMPT, 30, PROMPT + 30)),  # nobody reads for nothing
        (usage(12, 0), (12, 25, 37)),  # nor writes
        (usage(0, 0), (PROMPT, 25, PROMPT + 25)),
        (usage(5000, 9000), (5000, 9000, 14_000)),  # more than was held
    ],
)
def test_what_is_reported_is_charged(reported: Report, expected: tuple[int, int, int]) -> None:
    assert parts(charge(HOLD, answered(25, reported))) == ("reported", *expected)


def test_a_report_in_the_first_chunk_is_a_floor() -> None:
    """308 tokens were charged as 9, because the count ended where the report came."""
    early = answered(300, usage(8, 1), report_is_last=False)
    assert parts(charge(HOLD, early)) == ("held", PROMPT, ALLOWANCE, PROMPT + ALLOWANCE)
    assert parts(charge(HOLD, early, known())) == ("counted", PROMPT, 300, PROMPT + 300)
    assert parts(charge(HOLD, replace(early, report=usage(30, 500)), known())) == ("reported", 30, 500, 530)


def test_a_report_before_the_reader_left_is_a_floor() -> None:
    assert charge(HOLD, left(3, usage(10, 90)), known()).total_tokens == PROMPT + 90
    assert charge(HOLD, left(100, usage(1000, 1)), known()).total_tokens == 1000 + 100 + IN_FLIGHT
    assert charge(HOLD, left(3, usage(0, 0, total=9000))).total_tokens == 9000


# Not reported.


def test_a_model_that_nobody_has_met_is_charged_the_hold() -> None:
    for received in (left(0), left(100), answered(100), answered(0)):
        assert parts(charge(HOLD, received)) == ("held", PROMPT, ALLOWANCE, PROMPT + ALLOWANCE)


def test_a_model_whose_reports_hide_nothing_is_charged_what_was_received() -> None:
    assert parts(charge(HOLD, left(100), known())) == ("counted", PROMPT, 108, 128)
    assert parts(charge(HOLD, answered(100), known())) == ("counted", PROMPT, 100, 120)
    assert parts(charge(HOLD, left(100), known(completion_excess=30))) == ("counted", PROMPT, 138, 158)
    assert parts(charge(HOLD, left(0), known())) == ("counted", PROMPT, IN_FLIGHT, PROMPT + IN_FLIGHT)


def test_what_may_be_in_flight_is_within_the_hold_and_what_was_received_need_not_be() -> None:
    assert charge(HOLD, left(395), known()).total_tokens == HOLD.tokens
    assert charge(HOLD, left(400), known(completion_excess=99)).total_tokens == HOLD.tokens
    assert charge(HOLD, left(450), known()).total_tokens == PROMPT + 458, "the allowance is no bound for this one"
    assert charge(HOLD, left(395), known(ignores_max_tokens=True)).total_tokens == PROMPT + 403
    assert parts(charge(HOLD, left(450))) == ("counted", PROMPT, 458, PROMPT + 458)


def test_an_answer_whose_reader_held_it_back_is_charged_the_hold_for_more_may_be_on_the_way() -> None:
    assert parts(charge(HOLD, left(100, behind=True), known())) == ("held", PROMPT, ALLOWANCE, PROMPT + ALLOWANCE)
    assert charge(HOLD, left(450, behind=True), known()).total_tokens == PROMPT + 458


@pytest.mark.parametrize("calibration", [None, known(reports=0), known(reasons_unseen=True)])
def test_reports_that_do_not_show_everything_leave_the_hold(calibration: Calibration | None) -> None:
    assert parts(charge(HOLD, left(100), calibration)) == ("held", PROMPT, ALLOWANCE, PROMPT + ALLOWANCE)


def test_a_provider_that_finishes_what_nobody_reads_is_charged_the_hold_whatever_its_model_has_shown() -> None:
    assert parts(charge(HOLD, left(100), known(), "held")) == ("held", PROMPT, ALLOWANCE, PROMPT + ALLOWANCE)
    timeout = Received(billed=Billed.PROMPT)
    assert parts(charge(HOLD, timeout, known(), "held")) == ("held", PROMPT, ALLOWANCE, PROMPT + ALLOWANCE)
    assert charge(HOLD, answered(100, usage(12, 30)), known(), "held").total_tokens == 42


def test_a_call_that_failed_before_its_answer_may_have_been_billed_for_its_prompt_or_not_at_all() -> None:
    assert parts(charge(HOLD, Received(billed=Billed.PROMPT))) == ("counted", PROMPT, 0, PROMPT)
    assert charge(HOLD, Received(billed=Billed.NOTHING)) == Charge()
    assert lesson(HOLD, Received(billed=Billed.NOTHING)) is None


# Lessons.


def taught(received: Received, hold: Hold = HOLD) -> dict[str, Any]:
    """What differs from a lesson that says no more than that there was a whole report."""
    answer = lesson(hold, received)
    assert answer
    plain = Lesson(provider=hold.provider, model=hold.model)
    return {name: value for name in Lesson.__slots__ if (value := getattr(answer, name)) != getattr(plain, name)}


def test_a_report_teaches_by_how_much_it_exceeds_what_was_thought() -> None:
    assert taught(answered(30, usage(12, 30))) == {}
    assert taught(answered(30, usage(31, 30))) == {"prompt_excess": 11}
    assert taught(answered(30, usage(12, 37))) == {"completion_excess": 7}


def test_the_excess_is_of_the_bound_and_not_of_a_hold_that_has_it_already() -> None:
    corrected = replace(HOLD, prompt_tokens=PROMPT + 11, prompt_excess=11)
    assert taught(answered(30, usage(31, 30)), corrected) == {"prompt_excess": 11}
    assert taught(answered(30, usage(33, 30)), corrected) == {"prompt_excess": 13}


def test_reasoning_that_was_not_received_is_unseen_and_what_was_shown_is_not() -> None:
    assert taught(answered(30, usage(12, 330, reasoning=300))) == {"completion_excess": 300, "reasons_unseen": True}
    assert taught(answered(330, usage(12, 330, reasoning=300), reasoning_tokens=290)) == {}
    summary = answered(80, usage(12, 330, reasoning=300), reasoning_tokens=50)
    assert taught(summary) == {"completion_excess": 250, "reasons_unseen": True}


def test_a_report_that_is_not_of_the_whole_answer_proves_nothing_and_may_teach_of_the_prompt() -> None:
    assert taught(left(30, usage(31, 90))) == {"prompt_excess": 11, "reported": False}
    early = answered(300, usage(31, 1, reasoning=1), report_is_last=False)
    assert taught(early) == {"prompt_excess": 11, "reasons_unseen": True, "reported": False}


@pytest.mark.parametrize("empty", [answered(0, usage(12, 0)), answered(5, usage(12, 0)), answered(0, usage(12, 5))])
def test_an_empty_answer_does_not_prove_that_nothing_is_hidden(empty: Received) -> None:
    assert taught(empty)["reported"] is False


def test_an_answer_far_above_its_allowance_teaches_that_there_is_none() -> None:
    limit = most_received(ALLOWANCE)
    assert limit == 516
    assert lesson(HOLD, left(limit + 1)) is None, "tokenizers differ: who reads it decides when it is cut"
    assert taught(replace(left(limit + 1), cut=True)) == {"ignores_max_tokens": True, "reported": False}
    assert taught(answered(limit + 1, usage(12, limit + 1))) == {"ignores_max_tokens": True}


def test_a_settlement_has_all_of_it() -> None:
    ask = settlement(HOLD, Outcome.COMPLETED, answered(30, usage(31, 30)))
    assert (ask.hold, ask.outcome, ask.source) == (HOLD, Outcome.COMPLETED, UsageSource.REPORTED)
    assert (ask.prompt_tokens, ask.completion_tokens, ask.total_tokens) == (31, 30, 61)
    assert ask.lesson == lesson(HOLD, answered(30, usage(31, 30)))


# For anything.

few = st.integers(0, 2000)
reports = st.builds(Report, prompt_tokens=few, completion_tokens=few, total_tokens=few, reasoning_tokens=few)
calls = st.builds(
    Received,
    billed=st.sampled_from([Billed.ANSWER, Billed.ANSWER, Billed.PROMPT]),
    tokens=few,
    ended=st.booleans(),
    behind=st.booleans(),
    report=st.none() | reports,
    report_is_last=st.booleans(),
)
holds = st.builds(lambda prompt, output: replace(HOLD, prompt_tokens=prompt, output_tokens=output), few, few)
calibrations = st.none() | st.builds(
    known,
    reports=st.integers(0, 2),
    completion_excess=few,
    reasons_unseen=st.booleans(),
    ignores_max_tokens=st.booleans(),
)
unreported = st.sampled_from(["learned", "held"])


@given(hold=holds, call=calls, calibration=calibrations, unreported=unreported)
def test_a_charge_is_never_below_what_was_received_or_reported(
    hold: Hold, call: Received, calibration: Any, unreported: Any
) -> None:
    cost = charge(hold, call, calibration, unreported)
    assert cost.total_tokens >= cost.prompt_tokens + cost.completion_tokens
    if call.report:
        reported = call.report
        assert cost.prompt_tokens >= reported.prompt_tokens
        assert cost.completion_tokens >= reported.completion_tokens
        assert cost.total_tokens >= reported.total_tokens
    if call.billed == Billed.ANSWER and not call.report_is_whole:
        assert cost.prompt_tokens >= hold.prompt_tokens
        assert cost.completion_tokens >= call.tokens
    if cost.source == UsageSource.HELD:
        assert cost.total_tokens >= hold.tokens


@given(hold=holds, call=calls, calibration=calibrations, unreported=unreported)
def test_without_a_report_a_model_that_keeps_to_its_allowance_is_charged_at_most_the_hold(
    hold: Hold, call: Received, calibration: Any, unreported: Any
) -> None:
    call = replace(call, report=None)
    keeps = call.tokens <= hold.output_tokens and not (calibration and calibration.ignores_max_tokens)
    assert not keeps or charge(hold, call, calibration, unreported).total_tokens <= hold.tokens


@given(hold=holds, call=calls, more=few, calibration=calibrations, unreported=unreported)
def test_more_is_never_charged_less(hold: Hold, call: Received, more: int, calibration: Any, unreported: Any) -> None:
    """More received, more reported, less proven, more that reports have taught, a larger hold."""
    usual = charge(hold, call, calibration, unreported).total_tokens
    if not call.report_is_whole:
        assert charge(hold, replace(call, tokens=call.tokens + more), calibration, unreported).total_tokens >= usual
        larger = replace(hold, output_tokens=max(hold.output_tokens, call.tokens) + more)
        assert call.tokens > hold.output_tokens or charge(larger, call, calibration, unreported).total_tokens >= usual
        assert charge(hold, call, calibration, "held").total_tokens >= usual
        assert charge(hold, replace(call, ended=False), calibration, unreported).total_tokens >= usual
        if calibration:
            taught = known(
                reports=calibration.reports,
                completion_excess=calibration.completion_excess + more,
                reasons_unseen=True,
                ignores_max_tokens=True,
            )
            assert charge(hold, call, taught, unreported).total_tokens >= usual
    if report := call.report:
        fuller = msgspec.structs.replace(
            report,
            prompt_tokens=report.prompt_tokens and report.prompt_tokens + more,
            completion_tokens=report.completion_tokens and report.completion_tokens + more,
            total_tokens=report.total_tokens + more,
        )
        assert charge(hold, replace(call, report=fuller), calibration, unreported).total_tokens >= usual


# The attack: a day of answers that are left early, on a provider that keeps its own bill.


@dataclass(frozen=True)
class Answer:
    """What a model would write, all of it within ``max_tokens``, and when its reader leaves."""

    reasoning: int
    text: int
    leaves_after: int | None  # tokens that were seen; None stays


@dataclass(frozen=True)
class Provider:
    """Bills its tokens of the prompt, and what it has written when it sees that the reader has left."""

    template: int = 0  # tokens of the prompt above our bound
    shows_reasoning: bool = False
    finishes: bool = False  # what nobody reads any more

    def answer(self, hold: Hold, wanted: Answer, in_flight: int) -> tuple[int, Received]:
        """Its bill, and what was received."""
        prompt = hold.prompt_tokens - hold.prompt_excess + self.template
        reasoning = min(wanted.reasoning, hold.output_tokens)
        text = min(wanted.text, hold.output_tokens - reasoning)
        seen = text + reasoning * self.shows_reasoning
        whole = wanted.leaves_after is None or wanted.leaves_after > seen
        if whole:
            report = usage(prompt, reasoning + text, reasoning=reasoning)
            shown = reasoning * self.shows_reasoning
            return report.total_tokens, answered(seen, report, reasoning_tokens=shown)
        assert wanted.leaves_after is not None
        hidden = 0 if self.shows_reasoning else reasoning
        written = min(hidden + wanted.leaves_after + in_flight, reasoning + text)
        written = reasoning + text if self.finishes else written
        return prompt + written, left(wanted.leaves_after)


def day(provider: Provider, answers: list[tuple[Answer, int]], unreported: Any) -> list[tuple[int, int]]:
    """The provider's bill and our charge for each, as the calibration learns from one to the next."""
    learned: Calibration | None = None
    sums = []
    for wanted, in_flight in answers:
        excess = learned.prompt_excess if learned else 0
        hold = replace(HOLD, prompt_tokens=PROMPT + excess, prompt_excess=excess)
        bill, received = provider.answer(hold, wanted, in_flight)
        sums.append((bill, charge(hold, received, learned, unreported).total_tokens))
        if new := lesson(hold, received):
            learned = learned or known(reports=0)
            learned.reports += new.reported
            learned.prompt_excess = max(learned.prompt_excess, new.prompt_excess)
            learned.completion_excess = max(learned.completion_excess, new.completion_excess)
            learned.reasons_unseen = learned.reasons_unseen or new.reasons_unseen
    return sums


def answers(reasoning: st.SearchStrategy[int]) -> Any:
    one = st.builds(Answer, reasoning, st.integers(1, 500), st.none() | st.integers(0, 500))
    return st.lists(st.tuples(one, st.integers(0, IN_FLIGHT)), max_size=80)


@given(answers=answers(st.integers(1, 400)), template=st.integers(0, 60))
def test_who_leaves_a_model_that_reasons_unseen_pays_for_its_thoughts(answers: Any, template: int) -> None:
    """240,640 tokens were billed, and 1,120 charged. Now the first answers may miss its chat template, and no more."""
    for bill, charged in day(Provider(template), answers, "learned"):
        assert charged >= bill - template


@given(answers=answers(st.integers(0, 400)))
def test_visible_reasoning_is_received_like_any_text(answers: Any) -> None:
    assert all(charged >= bill for bill, charged in day(Provider(shows_reasoning=True), answers, "learned"))


@given(answers=answers(st.integers(0, 400)))
def test_a_provider_that_finishes_is_paid_if_it_is_configured_as_such(answers: Any) -> None:
    assert all(charged >= bill for bill, charged in day(Provider(finishes=True), answers, "held"))


@given(answers=answers(st.just(0)), template=st.integers(0, 60))
def test_once_it_was_met_a_models_template_is_in_every_charge(answers: Any, template: int) -> None:
    sums = day(Provider(template), answers, "learned")
    met = next((n for n, (wanted, _) in enumerate(answers) if wanted.leaves_after is None), len(sums))
    assert all(charged >= bill for bill, charged in sums[met:])


def test_an_honest_stop_on_a_model_with_history_pays_what_was_received() -> None:
    hello = Answer(0, 150, None), 0
    stopped = Answer(0, 400, 250), 4
    (*_, (bill, charged)) = day(Provider(template=11), [hello, hello, stopped], "learned")
    assert bill <= charged <= 1.05 * bill

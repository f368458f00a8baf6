"""What an answer costs: the rule of the charge, pure. A charge is at least what the provider may have billed.

    reported to the end   what is reported
    not reported          the hold, unless the model's own reports have shown that it bills no more than it shows:
                          then the prompt's bound, all that was received, and what reports have taught to add
    reported, and then    at least what is reported, for more was billed
    more came

And what a report teaches about its model, for the next ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from ..models import Calibration, Reservation
from ..provider.chunks import Report
from .operations import Hold, Lesson, Settle

Unreported = Literal["learned", "held"]
UsageSource = Reservation.UsageSource

# What the provider may have written, and billed, before it sees that the connection is closed.
IN_FLIGHT: Final = 8


class Billed(Enum):
    """How far a call came."""

    NOTHING = "not sent, or refused by a status that says so"
    PROMPT = "failed before it answered, and after it may have read the prompt"
    ANSWER = "it answered, or may be at it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What became of one call, in tokens by ``tokens.estimate`` (the best guess, not the bound).

    ``tokens``: everything that came, as text, reasoning, refusal or arguments of tools; ``reasoning_tokens``: of
    these, the visible reasoning. ``ended``: it was read to the end that the provider gave it;
    ``cut``: not to its end, for it went on past its allowance. ``behind``: its reader held it back, so that any number
    of tokens may be on the way. ``report_is_last``: no output followed the report.
    """

    billed: Billed
    tokens: int = 0
    reasoning_tokens: int = 0
    ended: bool = False
    cut: bool = False
    behind: bool = False
    report: Report | None = None
    report_is_last: bool = True

    @property
    def report_is_whole(self) -> bool:
        return self.report is not None and self.ended and self.report_is_last


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What is charged. ``total_tokens`` is at least the sum of prompt and completion.

    ``cached_tokens`` and ``reasoning_tokens``: of these, as reported; of what is not, all is at full price.
    """

    source: Reservation.UsageSource = UsageSource.NONE
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


def most_received(allowance: int) -> int:
    """Tokens: an answer that is longer does not keep to ``max_tokens``, and is cut. Tokenizers differ by less."""
    return allowance + allowance // 4 + 16


def settlement(
    hold: Hold,
    outcome: Reservation.Outcome,
    received: Received,
    calibration: Calibration | None = None,
    unreported: Unreported = "learned",
) -> Settle:
    """How to settle ``hold``. ``calibration``: what is known of its model by now; ``unreported``: its provider's."""
    cost = charge(hold, received, calibration, unreported)
    return Settle(
        hold=hold,
        outcome=outcome,
        source=cost.source,
        prompt_tokens=cost.prompt_tokens,
        completion_tokens=cost.completion_tokens,
        total_tokens=cost.total_tokens,
        cached_tokens=cost.cached_tokens,
        reasoning_tokens=cost.reasoning_tokens,
        lesson=lesson(hold, received),
    )


def charge(
    hold: Hold, received: Received, calibration: Calibration | None = None, unreported: Unreported = "learned"
) -> Charge:
    if received.billed == Billed.NOTHING:
        return Charge()
    if received.report and received.report_is_whole:
        return _reported(hold, received, received.report)
    cost = _unreported(hold, received, calibration, unreported)
    return _at_least(cost, received.report) if received.report else cost


def _reported(hold: Hold, received: Received, report: Report) -> Charge:
    """As reported; but a zero is no report of what was sent, or was received: that counts as counted."""
    if report.total_tokens and not (report.prompt_tokens or report.completion_tokens):
        # The total alone: its parts are a guess.
        total = max(report.total_tokens, received.tokens)
        prompt = total - received.tokens
        return Charge(
            source=UsageSource.REPORTED, prompt_tokens=prompt, completion_tokens=received.tokens, total_tokens=total
        )
    prompt = report.prompt_tokens or hold.prompt_tokens
    completion = report.completion_tokens or received.tokens
    return Charge(
        source=UsageSource.REPORTED,
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=max(report.total_tokens, prompt + completion),
        cached_tokens=min(report.cached_tokens, report.prompt_tokens),
        reasoning_tokens=min(report.reasoning_tokens, completion),
    )


def _unreported(hold: Hold, received: Received, calibration: Calibration | None, unreported: Unreported) -> Charge:
    allowance, learned = hold.output_tokens, unreported == "learned"
    if received.billed == Billed.PROMPT and learned:
        return _sum(UsageSource.COUNTED, hold.prompt_tokens, 0)
    shown = received.tokens + (0 if received.ended else IN_FLIGHT)
    shown += calibration.completion_excess if calibration else 0
    # The allowance bounds what is billed by a model that keeps to it, and by no other.
    if received.tokens <= allowance and not (calibration and calibration.ignores_max_tokens):
        shown = min(shown, allowance)
    if learned and not received.behind and calibration and calibration.bills_what_it_shows:
        return _sum(UsageSource.COUNTED, hold.prompt_tokens, shown)
    return _sum(
        UsageSource.COUNTED if shown > allowance else UsageSource.HELD, hold.prompt_tokens, max(shown, allowance)
    )


def _at_least(cost: Charge, report: Report) -> Charge:
    """More was billed than is reported, and what is reported was billed."""
    prompt = max(cost.prompt_tokens, report.prompt_tokens)
    completion = max(cost.completion_tokens, report.completion_tokens)
    covers = max(report.total_tokens, report.prompt_tokens + report.completion_tokens) >= cost.total_tokens
    return Charge(
        source=UsageSource.REPORTED if covers else cost.source,
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=max(report.total_tokens, prompt + completion),
    )


def _sum(source: Reservation.UsageSource, prompt: int, completion: int) -> Charge:
    return Charge(source=source, prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def lesson(hold: Hold, received: Received) -> Lesson | None:
    """What this answer teaches; None if nothing. A report of an answer that broke off says little of its length."""
    report = received.report or Report()
    overlong = received.cut or report.completion_tokens > most_received(hold.output_tokens)
    if received.billed == Billed.NOTHING or not (received.report or overlong):
        return None
    whole = received.report_is_whole
    bound = hold.prompt_tokens - hold.prompt_excess
    return Lesson(
        provider=hold.provider,
        model=hold.model,
        prompt_excess=max(0, report.prompt_tokens - bound),
        completion_excess=max(0, report.completion_tokens - received.tokens) if whole else 0,
        # Another tokenizer counts visible reasoning otherwise than we do, but not twice as much.
        reasons_unseen=report.reasoning_tokens > 2 * received.reasoning_tokens,
        ignores_max_tokens=overlong,
        # An empty answer shows nothing of what a longer one is billed.
        reported=whole and received.tokens > 0 and report.completion_tokens > 0,
    )

"""``chatnest.hold``: any code of the site pays from the chat's budgets, with the same refusals, leases and charges.

    async with chatnest.hold(user, messages, profile="balanced") as hold:
        answer = await client.with_options(max_retries=0).chat.completions.create(
            model=hold.model, messages=messages, max_tokens=hold.output_tokens
        )
        hold.report(answer.usage)

One hold pays for one call: a client that retries by itself may be billed for each. ``with`` instead of ``async with``
where no event loop runs: a Celery task, a command, a WSGI view.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

import openai
from asgiref.sync import async_to_sync

from . import ledger
from .accounts import paying
from .alerts import tell_if_misconfigured
from .conf import provider, settings
from .errors import ChatError, Paused, RequestTooLarge
from .ledger import Hold, Reserve, Settle
from .ledger.batcher import batcher
from .ledger.charges import Billed, Received, settlement
from .ledger.worker import give_back
from .limits import profile_name
from .logs import log_settled
from .metrics import Operation, refused
from .models import LABEL_LENGTH, Reservation
from .policy import Terms
from .provider import failures
from .provider.chunks import Report, loose_usage
from .refusals import refusals
from .signals import Exchange
from .tokens import abound, aestimate
from .wires import Message

Outcome = Reservation.Outcome
NOTHING: Final = Received(billed=Billed.NOTHING)


class hold:  # noqa: N801 - used as a statement is, like contextlib's
    """What one call of a model may cost, held while the block runs.

    ``payer``: a user, or names of accounts, the payer first (``["user:7", "team:3"]``); ``site`` pays too.
    ``messages``: the prompt, ``{"role", "content"}`` each; all of it is held, and nothing of the profile's is added.
    ``profile``: as a client names it. ``max_output_tokens`` may only tighten the profile's.

    Entering raises what the chat is refused with: RateLimited, DailyBudgetExceeded, RequestTooLarge, Paused and others
    of ``chatnest.errors``. Leaving settles: for what was reported; nothing if ``release`` was called or the openai
    package's error says that nothing was billed; else for all that was held.
    """

    def __init__(
        self,
        payer: Any,
        messages: Sequence[Mapping[str, str]],
        *,
        profile: str = "balanced",
        max_output_tokens: int | None = None,
        label: str = "",
    ) -> None:
        self._accounts = paying(payer)
        self._messages = [Message(one["role"], one["content"]) for one in messages]  # type: ignore[arg-type]
        self._profile = profile_name(profile)
        self._max_output_tokens = max_output_tokens
        self._label = label[:LABEL_LENGTH]
        self._report: Report | None = None
        self._released = False
        self._abandoned = False
        self._began = 0.0
        self._task: asyncio.Task[Any] | None = None
        self.stopped = False  # by an operator; under ``async with`` the block is interrupted
        self.hold: Hold  # the ledger's, for its leases

    # In the block.

    @property
    def model(self) -> str:
        """The profile's."""
        return self.hold.model

    @property
    def output_tokens(self) -> int:
        """The answer's allowance, to be sent to the provider: less than the profile's near the end of a budget."""
        return self.hold.output_tokens

    def report(self, usage: Any) -> None:
        """What the provider said that it charges: the openai package's ``usage``, or its dict; None says nothing."""
        told = loose_usage(usage.model_dump() if hasattr(usage, "model_dump") else usage)
        if told and told.says_something:
            self._report = told.merged(self._report or Report())

    def release(self) -> None:
        """Nothing was sent: nothing is charged."""
        self._released = True

    # Around it.

    async def __aenter__(self) -> Self:
        await self._reserve()
        self._task = asyncio.current_task()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        task, self._task = self._task, None
        await self._settle(error)
        if self.stopped and isinstance(error, asyncio.CancelledError) and task and not task.uncancel():
            raise Paused(retry_after=60) from None

    def __enter__(self) -> Self:
        try:
            async_to_sync(self._reserve)()
        except BaseException:  # a task's time limit, for one: the block never begins
            self._abandoned = True
            if hasattr(self, "hold"):
                self._give_back()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        async_to_sync(self._settle)(error)

    def stop(self) -> None:
        """By an operator, from the ledger's thread."""
        self.stopped = True
        if task := self._task:
            with suppress(RuntimeError):  # its loop is closed
                task.get_loop().call_soon_threadsafe(self._interrupt)

    def _interrupt(self) -> None:
        if self._task:
            self._task.cancel()

    async def _reserve(self) -> None:
        try:
            self.hold = await self._held()
        except ChatError as refusal:
            refused(refusal.code)
            refusals.note(self._accounts[0], refusal)
            raise
        self._began = time.monotonic()
        batcher.watch(self)
        if self._abandoned:
            self._give_back()

    def _give_back(self) -> None:
        batcher.unwatch(self)
        batcher.settle(settle := give_back(self.hold))
        self._operation.end(settle)

    async def _held(self) -> Hold:
        terms = (await batcher.policy(self._accounts)).terms(self._accounts, self._profile)
        limits = terms.limits
        if self._max_output_tokens is not None:
            limits = replace(limits, max_output_tokens=min(limits.max_output_tokens, self._max_output_tokens))
            terms = replace(terms, limits=limits)
        if await aestimate(self._messages) + limits.max_output_tokens > limits.max_tokens_per_request:
            raise RequestTooLarge()
        bound = await abound(self._messages, terms.model, provider(terms.provider))
        hold = await batcher.reserve(reservation(terms, bound, self._label))
        self._operation = Operation(hold)
        return hold

    async def _settle(self, error: BaseException | None) -> None:
        batcher.unwatch(self)
        settle = self._settlement(error)
        if isinstance(error, openai.APIStatusError):
            tell_if_misconfigured(self.hold, self._refused(error).error)
        log_settled(settle, time.monotonic() - self._began, settle.error)
        self._operation.end(settle, error=type(error).__name__ if error else "")
        await batcher.settled(settle)

    def _settlement(self, error: BaseException | None) -> Settle:
        received = self._received(error)
        outcome = Outcome.COMPLETED
        if self.stopped:
            outcome = Outcome.STOPPED
        elif error is not None:
            outcome = Outcome.UPSTREAM_ERROR if isinstance(error, openai.APIError) else Outcome.CANCELLED
        # What was sent besides the messages, and shown, nobody knows: so it teaches nothing about the model.
        told = Exchange(messages=self._messages, duration=time.monotonic() - self._began)
        settle = settlement(self.hold, outcome, received, unreported="held")
        return replace(settle, lesson=None, error=self._code(error), exchange=told)

    def _code(self, error: BaseException | None) -> str:
        """Of what ended the block, as the chat names it; empty where that is the site's own."""
        if self.stopped:
            return Paused.code
        if isinstance(error, openai.APIStatusError):
            return self._refused(error).error.code
        return error.code if isinstance(error, ChatError) else ""

    def _refused(self, error: openai.APIStatusError) -> failures.Failure:
        refusal, seconds = error.response, time.monotonic() - self._began
        return failures.refused(refusal.status_code, refusal.headers, refusal.content, seconds=seconds)

    def _received(self, error: BaseException | None) -> Received:
        if self._report:
            return Received(
                billed=Billed.ANSWER, tokens=self._report.completion_tokens, ended=True, report=self._report
            )
        if self._released:
            return NOTHING
        if isinstance(error, openai.APIStatusError):
            # The package counts its own retries: what was refused last may have been billed before.
            retried = error.response.request.headers.get("x-stainless-retry-count", "0") != "0"
            return Received(billed=Billed.ANSWER) if self._refused(error).error.billed or retried else NOTHING
        return Received(billed=Billed.ANSWER)


def reservation(terms: Terms, bound: int, label: str) -> Reserve:
    """What a prompt of so many tokens asks of the ledger under these terms."""
    limits = terms.limits
    calibration = batcher.calibration(terms.provider, terms.model)
    excess = calibration.prompt_excess if calibration else 0
    return Reserve(
        budgets=ledger.todays_budgets(terms.budgets, whole=terms.whole, money=terms.money),
        profile=terms.profile,
        provider=terms.provider,
        model=terms.model,
        label=label,
        prompt_tokens=bound + excess,
        prompt_excess=excess,
        max_output_tokens=limits.max_output_tokens,
        min_output_tokens=settings.MIN_OUTPUT_TOKENS,
        rate_max_requests=limits.rate_max_requests,
        rate_window_seconds=limits.rate_window_seconds,
        max_concurrent_streams=limits.max_concurrent_streams,
        price=terms.price,
        hold_price=terms.price,
    )

"""The calls of one chat, until a model answers: its hold, what has come, and what that is charged.

Before the first byte a call may be tried again, or another model asked. What may have been billed is settled first,
and the next call has a hold of its own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from .alerts import tell_if_misconfigured
from .conf import provider, settings
from .deadlines import Deadlines
from .errors import ChatError, UpstreamError
from .frames import Frames
from .ledger import Hold, Reserve, Settle
from .ledger.batcher import batcher
from .ledger.charges import Billed, Received, most_received, settlement
from .ledger.worker import LiveStream
from .logs import fields
from .metrics import tokens_used
from .models import Reservation
from .provider.answer import FinishReason
from .provider.call import Call
from .provider.chunks import Piece
from .tokens import TokenCounter
from .wires import Message, chatnest

PING_SECONDS: Final = 1  # a longer wait before a retry is told the reader
RETRY_SECONDS: Final = 0.5

Outcome = Reservation.Outcome


class Attempts:
    """``ask``: what ``hold`` was reserved with; ``fallback``: the same with another model, asked where the first fails.

    ``chat``: whose lease is that of the hold.
    """

    def __init__(
        self,
        chat: LiveStream,
        ask: Reserve,
        hold: Hold,
        messages: Sequence[Message],
        *,
        fallback: Reserve | None,
        temperature: float | None,
    ) -> None:
        self._chat = chat
        self._ask = ask
        self._fallback = fallback
        self._messages = messages
        self._temperature = temperature
        self.call: Call | None = None
        self.behind = False  # the reader is waited for, while the provider may write on
        self._cut = False  # at its allowance, which the provider ignored
        self._count_for(hold)

    def _count_for(self, hold: Hold) -> None:
        self.hold = hold
        self._provider = provider(hold.provider)
        self._most = most_received(hold.output_tokens)
        self._received = TokenCounter(hold.model, self._provider)
        self.reasoning = TokenCounter(hold.model, self._provider)  # the part of it that was shown

    # Calls.

    async def open(self, deadlines: Deadlines, frames: Frames) -> Call:
        """The call, opened. Raises UpstreamError where none is."""
        if self._fallback:  # sooner than the same again
            call = self._new_call()
            try:
                await call.open()
                return call
            except UpstreamError as error:
                await self._fall_back(self._fallback, call, error)
        for attempt in range(settings.UPSTREAM_MAX_RETRIES + 1):
            call = self._new_call()
            try:
                await call.open()
                return call
            except UpstreamError as error:
                wait = max(RETRY_SECONDS * 2**attempt * random.uniform(0.75, 1.25), call.retry_in or 0)
                last = attempt == settings.UPSTREAM_MAX_RETRIES or deadlines.is_too_late(wait)
                if call.retry_in is None or last:
                    raise
                if call.billed:
                    await self._reserve_again(self._ask, error)
            if wait > PING_SECONDS:
                frames.write(chatnest.PING)
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _new_call(self) -> Call:
        self.call = Call(
            self._provider,
            self.hold.model,
            self._messages,
            max_tokens=self.hold.output_tokens,
            temperature=self._temperature,
            log_fields=fields(self.hold),
        )
        return self.call

    async def _fall_back(self, fallback: Reserve, call: Call, error: UpstreamError) -> None:
        tell_if_misconfigured(self.hold, error)
        if call.billed:
            await self._reserve_again(fallback, error)
        else:  # the same hold pays
            self._ask, self.call = fallback, None
            self._count_for(fallback.held(self.hold.output_tokens, self.hold.remaining))

    async def _reserve_again(self, ask: Reserve, error: UpstreamError) -> None:
        batcher.settle(settle := replace(self.settlement(Outcome.UPSTREAM_ERROR), error=error.code))
        tokens_used(settle)
        batcher.unwatch(self._chat)
        self._ask, self.call = ask.again(), None
        try:
            self._count_for(await batcher.reserve(self._ask))
        except ChatError:
            raise error from None
        batcher.watch(self._chat)

    async def close(self) -> None:
        if self.call:
            await self.call.close()

    async def cut(self) -> None:
        """The answer is too long."""
        self._cut = True
        await self.close()

    # What has come of it.

    def count(self, pieces: Sequence[Piece]) -> None:
        self._received.add("".join([text for _, text in pieces]), len(pieces))

    @property
    def is_too_long(self) -> bool:
        return self._received.exceeds(self._most)

    @property
    def billed(self) -> bool:
        """The provider may have begun to charge."""
        return bool(self.call and self.call.billed)

    @property
    def finish_reason(self) -> FinishReason | None:
        if self._cut:
            return "length"
        return self.call.answer.finish_reason if self.call else None

    def settlement(self, outcome: Reservation.Outcome) -> Settle:
        received = self._what_came()
        # Who drains has a provider that bills an answer to its end: so where this end was not read.
        unfinished = settings.ON_DISCONNECT == "drain" and not received.ended
        unreported = "held" if unfinished else self._provider.unreported
        calibration = batcher.calibration(self.hold.provider, self.hold.model)
        return settlement(self.hold, outcome, received, calibration, unreported)

    def _what_came(self) -> Received:
        call = self.call
        if not (call and call.billed):
            return Received(billed=Billed.NOTHING)
        return Received(
            billed=Billed.PROMPT if call.refused else Billed.ANSWER,
            tokens=self._received.total(),
            reasoning_tokens=self.reasoning.total(),
            ended=call.answer.ended,
            cut=self._cut,
            behind=self.behind,
            report=call.answer.report,
            report_is_last=call.answer.report_is_whole,
        )

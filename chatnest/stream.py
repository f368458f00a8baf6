"""One chat: from a committed hold to the upstream, to frames, to settlement. However it ends, it settles once.

A task of its own, the pump, has the call made, reads it to its end and settles; the response takes the frames that
the pump has made. No read is interrupted but to end it.

How it may end, and where that is noticed:
    the answer is complete, broken, too long or too late    in the pump
    the client leaves, or the server cancels                ``aclose``, or ``close`` where Django skips that
    nobody ever reads it, or forgets to close it            ``__del__``, or after a third of its lease
    an operator stops it                                    ``stop``
    the process is told to end                              ``end_streams``, or at its exit
    the process dies                                        the lease: another process charges the hold
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Self
from weakref import WeakSet

from django.utils.translation import get_language, override

from .alerts import tell_if_misconfigured
from .attempts import Attempts
from .conf import settings
from .deadlines import GRACE_SECONDS, Deadlines, Enough
from .errors import ChatError, InternalError, Paused, Restarting
from .frames import STUCK, Frames
from .ledger import Hold, Reserve, Settle
from .ledger.batcher import batcher
from .logs import fields, log_settled
from .metrics import Operation
from .models import Reservation
from .provider.chunks import Kind, Piece
from .signals import Exchange, settled
from .slots import StreamSlot
from .wires import Message, Usage, chatnest

logger = logging.getLogger("chatnest.stream")

Outcome = Reservation.Outcome


class ChatStream:
    """The reader's end of a chat: its frames as bytes, each for one write."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[bytes]:
        return self._chat.next_frames()

    async def aclose(self) -> None:
        self._chat.leave()

    def close(self) -> None:
        """From any thread: Django calls it in the request's, where ``aclose`` may have been skipped."""
        self._chat.call_soon(self._chat.leave)

    def __del__(self) -> None:
        self.close()


class Chat:
    """Owns its attempts, frames and slot. It begins when the first frame is asked for, and lives as its pump does."""

    def __init__(
        self,
        ask: Reserve,
        hold: Hold,
        messages: Sequence[Message],
        *,
        fallback: Reserve | None,
        temperature: float | None,
        dropped: int,
        metadata: Any,
        slot: StreamSlot,
    ) -> None:
        self._attempts = Attempts(self, ask, hold, messages, fallback=fallback, temperature=temperature)
        self._messages = messages
        self._dropped = dropped
        self._metadata = metadata
        self._slot = slot
        self._operation = Operation(hold)
        self._loop = asyncio.get_running_loop()
        self._frames = Frames(self._loop)
        self._deadlines = Deadlines(self._loop, self._frames)
        self._language = get_language()  # a middleware may take it back before the end
        self._pump: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[object] | None = None
        self._text: list[str] | None = [] if settled.has_listeners() else None
        self._first_token_at: float | None = None
        self._why: Exception | None = None  # the pump was interrupted
        self._settled = False
        self._patience: asyncio.TimerHandle | None = None  # with a reader who does not come for the end
        # Django 6.1 drops a response, unclosed, whose request is cancelled; and whoever keeps it keeps the hold.
        self._unread = self._loop.call_later(settings.LEASE_SECONDS / 3, self.interrupt, Restarting(retry_after=1))
        _chats.add(self)
        if self._loop in _ending:
            self.interrupt(Restarting(retry_after=1))

    @property
    def hold(self) -> Hold:
        """Whose lease is renewed."""
        return self._attempts.hold

    # For the reader, and for operators.

    def next_frames(self) -> Awaitable[bytes]:
        """What there is to write. Raises StopAsyncIteration after the end."""
        if not (self._pump or self._settled):
            self._begin()
        return self._frames.take()

    def leave(self) -> None:
        """Nobody reads any more."""
        if self._frames.left:
            return
        self._frames.leave()
        if self._settled:
            if self._patience:
                self._patience.cancel()
        elif self._pump is None:
            batcher.settle(self._conclude(Outcome.CANCELLED))
        elif settings.ON_DISCONNECT != "drain" or not self._attempts.billed:
            self._pump.cancel()
        # Else it is read on unseen, for a provider that bills all of it anyway.

    def stop(self) -> None:
        """An operator's stop, from any thread: the stream ends with an ``error`` frame ``paused``."""
        self.call_soon(self.interrupt, Paused(retry_after=60))

    def call_soon(self, what: Callable[..., None], *arguments: object) -> None:
        """In the loop's thread. Without a loop there is no pump either: what it held is settled here."""
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:
            self.settle_now()

    def settle_now(self) -> None:
        """For what has come, without the pump."""
        if not self._settled:
            batcher.settle(self._conclude(Outcome.CANCELLED))

    def interrupt(self, why: Exception) -> None:
        """The stream ends with an ``error`` frame that says why. In the loop's thread."""
        if self._settled or self._why:
            return
        self._why = why
        if self._pump:
            self._pump.cancel()
        elif isinstance(why, ChatError):  # nobody has asked for it yet
            batcher.settle(self._conclude(self._outcome(why), why.code))
            self._frames.write(chatnest.START)
            self._write_error(why)
            self._frames.end()

    # The pump.

    def _begin(self) -> None:
        self._unread.cancel()
        batcher.watch(self)
        self._reading = asyncio.current_task()
        self._frames.write(chatnest.START)
        with self._operation.current():
            self._pump = self._loop.create_task(self._run())
        self._pump.add_done_callback(self._pump_has_ended)
        self._deadlines.begin(self.interrupt)

    async def _run(self) -> None:
        try:
            await self._relay()
            await self._complete()
        except asyncio.CancelledError:
            await self._fail(None)
        except ChatError as problem:
            await self._fail(problem)
        except Exception:
            logger.exception("A stream broke", extra=fields(self.hold))
            await self._fail(InternalError())
        finally:
            self._frames.end()
            if self._frames.is_stuck:
                when = max(self._deadlines.began + settings.MAX_STREAM_SECONDS, self._loop.time() + GRACE_SECONDS)
                self._patience = self._loop.call_at(when, self._give_up_reader)
            await self._attempts.close()

    def _pump_has_ended(self, pump: asyncio.Task[None]) -> None:
        _chats.discard(self)
        self.settle_now()  # if it was cancelled before its first step
        self._frames.end()

    async def _relay(self) -> None:
        """The answer, to its end. Raises ChatError where it has none, and CancelledError if nobody reads it."""
        try:
            call = await self._attempts.open(self._deadlines, self._frames)
            self._deadlines.answer = call.answer
            self._deadlines.heard()
            while (pieces := await call.read()) is not None:
                self._take(pieces)
                if self._attempts.is_too_long:
                    return await self._attempts.cut()
                if self._frames.are_enough:
                    self._attempts.behind = True
                    await self._frames.room()
                    self._attempts.behind = False
                    self._deadlines.heard()
        except asyncio.CancelledError:
            if self._why is None:
                raise
            assert self._pump
            self._pump.uncancel()
            unfinished = self._attempts.call
            if not (isinstance(self._why, Enough) and unfinished):
                raise self._why from None
            unfinished.answer.end()
            unfinished.check()

    def _take(self, pieces: list[Piece]) -> None:
        frames = []
        self._attempts.count(pieces)
        if self._first_token_at is None and pieces:
            self._first_token_at = self._loop.time()
        for kind, text in pieces:
            if kind is Kind.TEXT:
                frames.append(chatnest.token(text))
                if self._text is not None:
                    self._text.append(text)
            elif kind is Kind.REASONING:
                self._attempts.reasoning.add(text)
                if settings.SHOW_REASONING:
                    frames.append(chatnest.reasoning(text))
        self._frames.write(b"".join(frames))
        self._deadlines.heard()

    # Ending: whatever happens, one settlement.

    async def _complete(self) -> None:
        if self._frames.left:
            batcher.settle(self._conclude(Outcome.CANCELLED))
            return
        settle = self._conclude(Outcome.COMPLETED)
        remaining = await batcher.settled(settle)
        if remaining is None:  # the database is away: what the hold said, put right by what was used
            remaining = max(0, self.hold.remaining + self.hold.tokens - settle.total_tokens)
        usage = Usage(
            prompt_tokens=settle.prompt_tokens,
            completion_tokens=settle.completion_tokens,
            total_tokens=settle.total_tokens,
            remaining=remaining,
            finish_reason=self._attempts.finish_reason or "stop",
            dropped_messages=self._dropped,
        )
        self._frames.write(chatnest.done(usage))

    async def _fail(self, problem: ChatError | None) -> None:
        """``problem`` is None where the pump was cancelled."""
        await self._attempts.close()
        if self._settled:
            return
        if problem is None or self._frames.left:
            batcher.settle(self._conclude(Outcome.CANCELLED))
        else:
            tell_if_misconfigured(self.hold, problem)
            await batcher.settled(self._conclude(self._outcome(problem), problem.code))
            self._write_error(problem)

    def _write_error(self, problem: ChatError) -> None:
        with override(self._language):
            self._frames.write(chatnest.error(problem))

    def _outcome(self, problem: ChatError) -> Reservation.Outcome:
        if problem is not self._why:
            return Outcome.UPSTREAM_ERROR
        if isinstance(problem, Restarting):
            return Outcome.CANCELLED
        return Outcome.STOPPED if isinstance(problem, Paused) else Outcome.TIMED_OUT

    def _conclude(self, outcome: Reservation.Outcome, error: str = "") -> Settle:
        """The settlement, and all that the chat has is given back. ``error``: the code that the reader is told."""
        self._settled = True
        if self._pump is None:
            self._unread.cancel()
            _chats.discard(self)
        self._deadlines.end()
        self._slot.release()
        batcher.unwatch(self)
        first, reason = self._time_to_first_token, self._attempts.finish_reason
        settle = replace(
            self._attempts.settlement(outcome),
            error=error,
            first_token_ms=None if first is None else round(1000 * first),
            exchange=None if self._text is None else self._exchange(self._text),
        )
        log_settled(settle, self._duration, error)
        self._operation.end(settle, error=error, finish_reason=reason, first_token=first)
        return settle

    @property
    def _time_to_first_token(self) -> float | None:
        """In seconds, with retries."""
        return None if self._first_token_at is None else self._first_token_at - self._deadlines.began

    @property
    def _duration(self) -> float:
        """In seconds, so far."""
        return self._loop.time() - self._deadlines.began if self._deadlines.began else 0.0

    def _exchange(self, text: list[str]) -> Exchange:
        return Exchange(
            messages=self._messages,
            text="".join(text),
            finish_reason=self._attempts.finish_reason,
            time_to_first_token=self._time_to_first_token,
            duration=self._duration,
            metadata=self._metadata,
        )

    def _give_up_reader(self) -> None:
        """Its last frames are not read: it would keep its task, and what the server has for it, for ever."""
        if self._reading and not self._reading.done():
            self._reading.cancel(STUCK)


_chats: Final[set[Chat]] = set()  # that have a hold: of their pumps, a loop's own references are weak
_ending: Final[WeakSet[asyncio.AbstractEventLoop]] = WeakSet()
os.register_at_fork(after_in_child=_chats.clear)


async def end_streams() -> None:
    """The process ends: so do this loop's streams. When this returns, they are settled for what was received.

    A stream that is made later, for its reservation was on the way, ends as it begins.
    """
    loop = asyncio.get_running_loop()
    _ending.add(loop)
    while chats := [chat for chat in _chats if chat._loop is loop]:
        for chat in chats:
            chat.interrupt(Restarting(retry_after=1))
        if pumps := [chat._pump for chat in chats if chat._pump]:
            await asyncio.wait(pumps)


@atexit.register  # after the batcher, so called before it
def settle_streams() -> None:
    """What no loop has ended: some servers leave theirs in the middle of a turn."""
    for chat in list(_chats):
        chat.settle_now()

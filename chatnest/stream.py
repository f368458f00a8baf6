"""One chat: from a committed hold to the upstream, to frames, to settlement. However it ends, it settles once.

How it may end, and where that is noticed:
    the answer is complete, broken or too late     in ``_frames``
    the client leaves, or the server cancels       ``aclose``, or ``close`` where Django skips that
    nobody ever reads it, or forgets to close it   ``__del__``
    an operator stops it                           ``stop``
    the process dies                               the lease: another process charges the hold
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from enum import Enum
from typing import Final, Literal, Self
from weakref import ref

from .conf import settings
from .errors import ChatError, InternalError, Overloaded, Paused, UpstreamTimeout
from .ledger import Hold, Settle
from .ledger.batcher import batcher
from .models import Reservation
from .provider.call import Call
from .tokens import answer_count
from .wires import Usage, chatnest

logger = logging.getLogger("chatnest.stream")

Outcome, UsageSource = Reservation.Outcome, Reservation.UsageSource


class Place:
    """One of the process's MAX_STREAMS_PER_PROCESS. Raises Overloaded when all are taken."""

    _taken = 0

    def __init__(self) -> None:
        if Place._taken >= settings.MAX_STREAMS_PER_PROCESS:
            raise Overloaded(retry_after=1)
        Place._taken += 1
        self._left = False

    def leave(self) -> None:
        if not self._left:
            self._left = True
            Place._taken -= 1


class Signal(Enum):
    PING = "nothing was sent for a while"


PING: Final = Signal.PING


class ChatStream:
    """The frames of one answer as bytes, each for one write. Owns its hold, its call and its place.

    There is no task and no timeout per token: the reader's own task is interrupted, as ``asyncio.timeout`` does
    it, by one timer that is re-armed only when it fires.
    """

    def __init__(self, hold: Hold, call: Call, place: Place) -> None:
        self.hold = hold
        self._call = call
        self._place = place
        self._loop = asyncio.get_running_loop()
        self._iterator = self._frames()
        self._opening: asyncio.Task[None] | None = None
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = False  # for the upstream, and not for the client to read
        self._alarm: ChatError | Literal[Signal.PING] | None = None  # why the wait was interrupted
        self._stopped = False
        self._settled = False
        self._started = self._sent = self._heard = 0.0

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[bytes]:
        return self._iterator.__anext__()

    async def aclose(self) -> None:
        await self._iterator.aclose()
        self._leave()

    def close(self) -> None:
        """From any thread: Django calls it in the request's, where ``aclose`` may have been skipped."""
        if not self._settled:
            try:
                self._loop.call_soon_threadsafe(self._leave)
            except RuntimeError:  # the loop is closed
                self._conclude(Outcome.CANCELLED)

    def __del__(self) -> None:
        self.close()

    def stop(self) -> None:
        """An operator's stop, from any thread: the stream ends with an ``error`` frame ``paused``."""
        try:
            self._loop.call_soon_threadsafe(self._stop)
        except RuntimeError:
            pass

    def _stop(self) -> None:
        self._stopped = True
        if self._timer and not self._settled:
            self._timer.cancel()
            self._tick()

    async def _frames(self) -> AsyncGenerator[bytes]:
        yield chatnest.START
        try:
            opening, opened = self._begin(), False
            while True:
                self._task = asyncio.current_task()
                self._waiting = True
                try:
                    if not opened:
                        await asyncio.shield(opening)
                        opened = True
                    pieces = await self._call.read()
                except asyncio.CancelledError:
                    if not self._only_a_ping():
                        raise  # the client has left, or the server ends
                    frames = chatnest.PING
                else:
                    if pieces is None:
                        break
                    frames = self._heard_frames(pieces)
                finally:
                    self._waiting = False
                if frames:
                    yield frames
            yield chatnest.done(await self._complete())
        except ChatError as problem:
            yield await self._fail(problem)
        except Exception:
            logger.exception("A stream broke")
            yield await self._fail(InternalError())
        finally:
            self._leave()

    def _begin(self) -> asyncio.Task[None]:
        """Call the upstream. A task of its own, for a connection that is being made cannot be interrupted."""
        batcher.watch(self)
        self._started = self._sent = self._heard = self._loop.time()
        self._timer = self._loop.call_at(self._next_tick(), _tick, ref(self))
        self._opening = self._loop.create_task(self._call.open(settings.FIRST_TOKEN_SECONDS))
        return self._opening

    def _heard_frames(self, pieces: list[str]) -> bytes:
        self._heard = self._loop.time()
        if not pieces:
            return b""
        self._sent = self._heard
        return chatnest.tokens(pieces)

    # Waiting: one timer for the heartbeat and all deadlines.

    def _only_a_ping(self) -> bool:
        """Why the wait was cancelled: for a ping, or by somebody else. Raises what else the timer decided."""
        alarm, self._alarm = self._alarm, None
        if alarm is None or (self._task and self._task.uncancel()):
            return False
        if isinstance(alarm, ChatError):
            raise alarm from None
        self._sent = self._loop.time()
        return True

    def _tick(self) -> None:
        now = self._loop.time()
        alarm = self._due(now)
        if alarm and self._task:
            self._alarm = alarm
            self._task.cancel()
        self._timer = self._loop.call_at(self._next_tick(), _tick, ref(self))

    def _due(self, now: float) -> ChatError | Literal[Signal.PING] | None:
        if self._stopped:
            return Paused(retry_after=60)
        if now >= self._started + settings.MAX_STREAM_SECONDS:
            return UpstreamTimeout()
        if not self._waiting:  # the client is slow to read, which is no fault of the upstream
            self._sent = self._heard = now
        elif now >= self._patience_ends():
            return UpstreamTimeout()
        return PING if now >= self._sent + settings.HEARTBEAT_SECONDS else None

    def _patience_ends(self) -> float:
        if self._call.pieces:
            return self._heard + settings.GAP_SECONDS
        return self._started + settings.FIRST_TOKEN_SECONDS

    def _next_tick(self) -> float:
        # At least a little later: what is due now was dealt with, or waits until the client reads on.
        now = self._loop.time()
        due = (
            now + settings.GAP_SECONDS,  # the first piece begins a gap, and re-arms nothing
            self._sent + settings.HEARTBEAT_SECONDS,
            self._started + settings.MAX_STREAM_SECONDS,
            self._patience_ends(),
        )
        return max(now + 0.01, min(due))

    # Ending: whatever happens, one settlement.

    async def _complete(self) -> Usage:
        ask = self._settlement(Outcome.COMPLETED)
        remaining = await self._settled_or_none(ask)
        if remaining is None:  # the database is away: what the hold said, put right by what was used
            held = self.hold.prompt_tokens + self.hold.output_tokens
            remaining = max(0, self.hold.remaining + held - ask.total_tokens)
        return Usage(
            prompt_tokens=ask.prompt_tokens,
            completion_tokens=ask.completion_tokens,
            total_tokens=ask.total_tokens,
            remaining=remaining,
        )

    async def _fail(self, problem: ChatError) -> bytes:
        await self._settled_or_none(self._settlement(_outcome(problem)))
        return chatnest.error(problem)

    async def _settled_or_none(self, ask: Settle) -> int | None:
        self._settled = True
        self._let_go()
        return await batcher.settled(ask)

    def _leave(self) -> None:
        """The end that no frame tells of: nobody is there to read it."""
        if self._settled:
            return
        outcome = _outcome(self._alarm) if isinstance(self._alarm, ChatError) else Outcome.CANCELLED
        if outcome == Outcome.CANCELLED and self._opening and settings.ON_DISCONNECT == "drain":
            self._settled = True
            if self._timer:
                self._timer.cancel()
            task = self._loop.create_task(self._drain())
            _draining.add(task)
            task.add_done_callback(_draining.discard)
        else:
            self._conclude(outcome)

    async def _drain(self) -> None:
        """Read the answer to its end, unseen, for a provider that bills all of it anyway."""
        assert self._opening
        deadline = self._started + settings.MAX_STREAM_SECONDS
        try:
            async with asyncio.timeout_at(deadline):
                await self._opening
            while (now := self._loop.time()) < deadline:
                async with asyncio.timeout_at(min(deadline, now + settings.GAP_SECONDS)):
                    if await self._call.read() is None:
                        break
        except (ChatError, TimeoutError):
            pass
        finally:
            self._conclude(Outcome.CANCELLED)

    def _conclude(self, outcome: Reservation.Outcome) -> None:
        self._settled = True
        self._let_go()
        batcher.settle(self._settlement(outcome))

    def _let_go(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._opening:
            self._opening.cancel()
        self._call.close()
        self._place.leave()
        batcher.unwatch(self)

    def _settlement(self, outcome: Reservation.Outcome) -> Settle:
        call, hold = self._call, self.hold
        source, prompt, completion, total = UsageSource.NONE, 0, 0, 0
        if call.billed and not (call.usage and call.ended):
            prompt = hold.prompt_tokens
            completion = answer_count(call.text, call.pieces, hold.model, hold.output_tokens)
            source, total = UsageSource.COUNTED, prompt + completion
        # What is reported before the end need not be the whole.
        if (usage := call.usage) and (call.ended or usage.total_tokens >= total):
            source, total = UsageSource.REPORTED, usage.total_tokens
            prompt, completion = usage.prompt_tokens, usage.completion_tokens
        return Settle(
            hold=hold,
            outcome=outcome,
            source=source,
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=total,
        )


def _tick(stream: ref[ChatStream]) -> None:
    """A timer that held its stream would keep a forgotten one, and its lease, alive."""
    if alive := stream():
        alive._tick()


_draining: Final[set[asyncio.Task[None]]] = set()


def _outcome(problem: ChatError) -> Reservation.Outcome:
    if isinstance(problem, Paused):
        return Outcome.STOPPED
    return Outcome.TIMED_OUT if isinstance(problem, UpstreamTimeout) else Outcome.UPSTREAM_ERROR

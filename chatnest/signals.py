"""What a site's code can hear, as Django's signals: ``settled``, ``refused``, ``budget_crossed``, ``provider_refused``.

    @receiver(settled)
    def keep(payer, messages, text, outcome, **kwargs): ...

They are sent after the commit, in a thread of their own: a receiver may use the ORM, and be slow or broken, without
any stream's noticing. Of one that is too slow for longer, some are not sent, which the log says; and so it is for those
that wait while a process dies. What must be right is in the rows.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any, Final
from uuid import UUID

from django.db import Error, close_old_connections, connections
from django.dispatch import Signal

from .conf import settings
from .errors import ChatError
from .models import Calibration, DailyUsage, Refusal, Reservation
from .wires import Message

logger = logging.getLogger("chatnest.signals")

MOST_WAITING: Final = 1000
CLOSE_SECONDS: Final = 5.0

# A reservation is charged. Sent again, with what is right by then, if its lease or an operator had it charged before
# its stream said what it used, or the commit's answer was lost. Arguments:
#     reservation          the row; of it also payer, accounts, profile, provider, model, label, outcome
#     tokens               charged; source: how sure that is. prompt_tokens, completion_tokens: the provider's count
#     cost                 in millionths of currency, which is CHATNEST["CURRENCY"]; None where no price was known
#     finish_reason        "stop", "length", "content_filter"; None where the answer broke off
#     time_to_first_token  in seconds; None where none came. duration: in seconds, with retries
#     messages             what the model was sent, its instructions too: Messages with a role and a content
#     text                 the answer, as far as it came
#     metadata             what PREPARE left in the ChatRequest
# Those that only the stream knows are None, and messages and text empty, where it is gone: its process died.
settled: Final = Signal()

# A request is refused. Arguments: payer, code (of chatnest.errors), detail (for operators), retry_after (in seconds,
# or None).
refused: Final = Signal()

# A budget's day has crossed 50, 80 or 100 % of its limit, told once each a day and account; of several at once, the
# highest. 100: all is used, or a request was refused for what is used. Arguments: account, day, percent, used, limit.
budget_crossed: Final = Signal()

# A provider refuses the site: its key, its credit, a model's name, a parameter, which only an operator can mend. Told
# at once, and once an hour for as long as it goes on, for each provider and model, by one of all processes. Arguments:
# provider (its name in the settings), model, code (of chatnest.errors), detail (fixed words, such as "wrong key").
provider_refused: Final = Signal()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What only the stream knows of an answer, for the receivers of ``settled``. Times in seconds."""

    messages: Sequence[Message] = ()
    text: str = ""
    finish_reason: str | None = None
    time_to_first_token: float | None = None
    duration: float | None = None
    metadata: Any = None


class Announcer:
    """The thread in which receivers are called, one signal after the other. ``put`` never waits."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._dropped = 0

    def put(self, send: Callable[[], bool], *, spare: int = 0) -> None:
        """Have ``send`` called, which says whether all went well; or not, where there is no room but so much."""
        if self._queue.qsize() >= MOST_WAITING - spare:
            if not self._dropped:
                logger.error("Receivers of chatnest's signals are too slow: some are not sent from now on")
            self._dropped += 1
            return
        self._queue.put(send)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="chatnest-signals", daemon=True)
                # What traces requests would take all that receivers do for this one's.
                Context().run(self._thread.start)

    def _run(self) -> None:
        while send := self._queue.get():
            went_well = send()
            if self._queue.empty():
                if self._dropped:
                    logger.error("%d signals were not sent", self._dropped)
                    self._dropped = 0
                close_old_connections()
            elif not went_well:
                close_old_connections()  # perhaps it was the database
        connections.close_all()

    def close(self) -> None:
        """Send what waits, for a few seconds, and end the thread. A later signal starts another."""
        if thread := self._thread:
            self._queue.put(None)
            thread.join(CLOSE_SECONDS)
            self._thread = None


announcer: Final = Announcer()
atexit.register(announcer.close)  # before the ledger's, so called after it
os.register_at_fork(after_in_child=announcer._begin)


def tell_settled(id: UUID, exchange: Exchange | None = None) -> None:
    if settled.has_listeners():
        announcer.put(partial(_send_settled, id, exchange or Exchange()))


def tell_refused(payer: str, refusal: ChatError) -> None:
    """They may be many, so that they leave room for the others."""
    if refused.has_listeners():
        facts = {"code": refusal.code, "detail": refusal.detail, "retry_after": refusal.retry_after}
        announcer.put(partial(_send, refused, Refusal, payer=payer, **facts), spare=MOST_WAITING // 2)


def tell_crossed(account: str, day: date, *, percent: int, used: int, limit: int) -> None:
    if budget_crossed.has_listeners():
        facts = {"account": account, "day": day, "percent": percent, "used": used, "limit": limit}
        announcer.put(partial(_send, budget_crossed, DailyUsage, **facts))


def tell_provider_refused(provider: str, model: str, *, code: str, detail: str) -> None:
    if provider_refused.has_listeners():
        facts = {"provider": provider, "model": model, "code": code, "detail": detail}
        announcer.put(partial(_send, provider_refused, Calibration, **facts))


def _send(signal: Signal, sender: type, **facts: Any) -> bool:
    """Django logs what a receiver raises."""
    answers = signal.send_robust(sender, **facts)
    return not any(isinstance(answer, Exception) for _, answer in answers)


def _send_settled(id: UUID, exchange: Exchange) -> bool:
    row = _read(id)
    return row is not None and _send(
        settled,
        Reservation,
        reservation=row,
        payer=row.payer,
        accounts=row.accounts,
        profile=row.profile,
        provider=row.provider,
        model=row.model,
        label=row.label,
        outcome=row.outcome,
        source=row.usage_source,
        tokens=row.tokens_charged,
        cost=row.cost,
        currency=settings.CURRENCY,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        finish_reason=exchange.finish_reason,
        time_to_first_token=exchange.time_to_first_token,
        duration=exchange.duration,
        messages=exchange.messages,
        text=exchange.text,
        metadata=exchange.metadata,
    )


def _read(id: UUID) -> Reservation | None:
    """The row; a connection that has died since the last one is made anew. None if it was deleted."""
    rows = Reservation.objects.using(settings.DATABASE_ALIAS).filter(pk=id)
    try:
        return rows.first()
    except Error:
        connections[settings.DATABASE_ALIAS].close()
    try:
        return rows.first()
    except Error as error:
        about = {"reservation": str(id)}
        logger.error("Nobody is told that reservation %s is settled, for it cannot be read: %s", id, error, extra=about)
        return None

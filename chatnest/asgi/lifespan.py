"""How a worker begins and ends: as ASGI's lifespan says, or SIGTERM.

At its end open answers are ended and settled for what was received. Who tells of it:

    lifespan.shutdown   uvicorn, gunicorn's uvicorn workers, granian, hypercorn: after their graceful timeout
    SIGTERM             uvicorn has no such timeout unless it is given one, and its workers under gunicorn can be given
                        none: they wait for the last answer until somebody kills them. And where lifespan is off
    nobody              daphne: its loop is gone by then (``stream`` settles at the interpreter's exit)
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured

from ..accounts import SITE
from ..conf import provider
from ..errors import ChatError
from ..ledger.batcher import batcher
from ..signals import announcer
from ..stream import end_streams
from ..tokens import load_vocabulary
from .application import ASGI

# Where nobody tells of the end but SIGTERM: until then a server takes requests, and may be gone a second after it.
AT_ONCE: Final = 0.5

logger = logging.getLogger("chatnest")


async def lifespan(application: ASGI, receive: Any, send: Any, *, scope: Any, grace_seconds: float) -> None:
    """Begin and end as the server says. ``application`` answers too if it does at all: Django's own refuses."""
    heard: set[str] = set()
    answered: set[str] = set()

    async def hear() -> Any:
        message = await receive()
        heard.add(message["type"])
        if message["type"] == "lifespan.startup":
            batcher.start()
            await load_vocabularies()
            hear_sigterm(grace_seconds)
        else:
            await end_streams()
            await asyncio.to_thread(batcher.close)
            await asyncio.to_thread(batcher.close)  # for those whose reservation was answered meanwhile
            await asyncio.to_thread(announcer.close)
        return message

    async def answer(message: Any) -> None:
        answered.add(message["type"])
        await send(message)

    try:
        await application(scope, hear, answer)
    except Exception:
        if answered:
            logger.exception("The application's own lifespan broke")
    for event in ("lifespan.startup", "lifespan.shutdown"):
        if f"{event}.failed" in answered:
            return
        if event not in heard:
            await hear()
        if f"{event}.complete" not in answered:
            await send({"type": f"{event}.complete"})


async def load_vocabularies() -> None:
    """Those that the profiles' models count with: a third of a second each, in which nothing else runs."""
    with suppress(ChatError, ImproperlyConfigured):  # the database is away, or a provider is missing: others say so
        for profile in (await batcher.policy([SITE])).profiles.values():
            load_vocabulary(profile.model, provider(profile.provider))


def hear_sigterm(seconds: float = AT_ONCE) -> None:
    """Have this loop's streams end so many seconds after a SIGTERM, besides what the server does then.

    Again changes nothing, so that whoever begins a stream may call this: the server has its handler by then.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _Terminated):
        handler.loop = asyncio.get_running_loop()
    elif callable(handler):  # else the process just dies
        signal.signal(signal.SIGTERM, _Terminated(handler, asyncio.get_running_loop(), seconds))


class _Terminated:
    """Handles SIGTERM for ``loop``, and then as the server does."""

    def __init__(self, server: Callable[..., Any], loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self.server = server
        self.loop = loop
        self.seconds = seconds
        self._end: asyncio.Task[None] | None = None

    def __call__(self, *signal_and_frame: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._begin_the_end, context=Context())
        self.server(*signal_and_frame)

    def _begin_the_end(self) -> None:
        if self._end is None or self._end.done():
            self._end = self.loop.create_task(self._end_streams())

    async def _end_streams(self) -> None:
        await asyncio.sleep(self.seconds)
        await end_streams()

"""What a process does before its first request and after its last, as ASGI servers tell it.

https://asgi.readthedocs.io/en/latest/specs/lifespan.html
"""

from __future__ import annotations

import asyncio
from typing import Any

from ..ledger.batcher import batcher
from ..stream import end_streams
from .application import ASGI


async def lifespan(application: ASGI, scope: Any, receive: Any, send: Any) -> None:
    """Begin and end, whether ``application`` knows of lifespans (as Starlette does) or not (as Django)."""
    heard = False

    async def hear() -> Any:
        nonlocal heard
        event = await receive()
        heard = True
        await (_begin() if event["type"] == "lifespan.startup" else _end())
        return event

    try:
        await application(scope, hear, send)
    except Exception:
        if heard:
            raise
    if not heard:
        for _ in ("startup", "shutdown"):
            event = await hear()
            await send({"type": f"{event['type']}.complete"})


async def _begin() -> None:
    """The ledger's thread is born outside any request, of which it would keep what it has to do with."""
    batcher.start()


async def _end() -> None:
    """Whatever was said so far is settled before the process ends; what is not is charged in full by its lease."""
    await end_streams()
    await asyncio.to_thread(batcher.close)

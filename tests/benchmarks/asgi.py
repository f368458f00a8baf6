"""The demo site with a window: ``GET /debug`` tells what the process holds, past Django, so looking costs little.

``GET /debug?collect`` has the garbage collected first.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from typing import Any

from project.asgi import application as site

LOADED_AT_START = frozenset(sys.modules)


_pauses: list[float] = []
import time
def _cb(phase, info):
    if phase == "start": _cb.t = time.perf_counter()
    elif info["generation"] == 2: _pauses.append(round((time.perf_counter()-_cb.t)*1000,1))
gc.callbacks.append(_cb)

async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and scope["path"] == "/debug":
        if scope["query_string"] == b"collect":
            gc.collect()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(inside()).encode()})
    else:
        await site(scope, receive, send)


def inside() -> dict[str, Any]:
    loaded = sorted(set(sys.modules) - LOADED_AT_START)
    from chatnest.batcher import batcher
    from chatnest.stream import Place

    return {
        "loaded": loaded, "pauses": _pauses,
        "tasks": len(asyncio.all_tasks()) - 1,  # this one
        "streams": Place._taken,
        "leases": len(batcher._live),
    }

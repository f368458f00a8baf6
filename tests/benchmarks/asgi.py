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


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and scope["path"] == "/debug":
        if scope["query_string"] == b"collect":
            gc.collect()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(inside()).encode()})
    else:
        await site(scope, receive, send)


def inside() -> dict[str, Any]:
    slots, batcher = sys.modules.get("chatnest.slots"), sys.modules.get("chatnest.ledger.batcher")
    return {
        "modules": sorted(sys.modules),
        "tasks": len(asyncio.all_tasks()),
        "streams": len(slots.StreamSlot._taken) if slots else 0,
        "leases": len(batcher.batcher._live) if batcher else 0,
    }

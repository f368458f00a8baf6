"""For a site's ``asgi.py``, optional: requests cost less, and a worker begins and ends well.

application = for_streaming(get_asgi_application())
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any, Final

from django.urls import get_resolver

from ..frames import STUCK
from ..provider.http import tls
from ..tokens import warm_up
from .threads import share_threads

ASGI = Callable[[Any, Any, Any], Awaitable[None]]

GRACE_SECONDS: Final = 3.0  # less than any platform gives a process before it kills it


def for_streaming(application: ASGI, *, grace_seconds: float = GRACE_SECONDS) -> ASGI:
    """Django's ``application`` (or one around it), with its threads shared by the process's requests.

    It answers ASGI's lifespan. Answers may go on for ``grace_seconds`` after a SIGTERM, or until ``lifespan.shutdown``
    if that comes first.
    """
    from .lifespan import lifespan  # models: a site's asgi.py imports this file before Django is set up

    warm_up()
    tls()  # reads the system's certificates
    assert get_resolver().url_patterns  # the site's views, which would be imported by the first request
    # The collector need not look through every module again and again: a seventh of a request's CPU.
    gc.collect()
    gc.freeze()
    serve = share_threads(application)

    async def worker(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(application, receive, send, scope=scope, grace_seconds=grace_seconds)
        try:
            await serve(scope, receive, send)
        except asyncio.CancelledError as cancelled:
            # From Django 6.1 on the task that reads is the server's, which would log a traceback.
            if cancelled.args != (STUCK,):
                raise

    return worker

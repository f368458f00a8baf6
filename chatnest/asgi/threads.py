"""The threads of requests: let go before a stream, borrowed from the process's own under ``chatnest.asgi``.

asgiref makes a thread for each request that runs sync code, and another to wait for its end; and Django runs
some for every request, if only to look after database connections that an async view never opened. A borrowed
thread goes back when it is not needed, and its connections are looked after then.

What it touches: asgiref's ``ThreadSensitiveContext``, which takes an executor since 3.13 (before, Django's own threads
serve), and ``SyncToAsync.context_to_thread_executor``; Django's receivers that look after connections.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from inspect import signature
from typing import Any, Final, TypeVar

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.core import signals
from django.db import close_old_connections, connections, reset_queries

T = TypeVar("T")

IDLE_THREADS: Final = 4


ENDS: Final = ThreadPoolExecutor(1, "chatnest-ends")


class BorrowedThread(Executor):
    """One request's thread, as asgiref wants it: one call at a time, always in the same thread.

    ``shutdown`` hands the thread back, to be used once its calls are done; a later call borrows again.
    """

    _idle: Final[list[ThreadPoolExecutor]] = []

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        if self._thread is None:
            self._thread = self._idle.pop() if self._idle else ThreadPoolExecutor(1, "chatnest-request")
        if self._thread is ENDS:
            return ENDS.submit(_at_the_end, fn, *args, **kwargs)
        return self._thread.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        thread, self._thread = self._thread, None
        if thread is None or thread is ENDS:
            return
        thread.submit(_look_after_connections)
        if len(self._idle) < IDLE_THREADS:
            self._idle.append(thread)
        else:
            thread.shutdown(wait=False)

    def leave_the_end(self) -> None:
        """Hand the thread back now: only the response's end is to come, and one thread serves those of all."""
        if self._thread:
            self._thread.submit(_close_connections)
            self.shutdown()
        self._thread = ENDS


def share_threads(application: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """``application`` with a borrowed thread for each request.

    Django's own receivers that look after connections are disconnected, since a borrowed thread's are looked
    after when it goes back: for them, every request would go to a thread twice more.
    """
    if "executor" not in signature(ThreadSensitiveContext).parameters:
        return application
    signals.request_started.disconnect(reset_queries)
    signals.request_started.disconnect(close_old_connections)
    signals.request_finished.disconnect(close_old_connections)

    async def shared(scope: Any, receive: Any, send: Any) -> None:
        thread = BorrowedThread()
        try:
            async with ThreadSensitiveContext(executor=thread):
                await application(scope, receive, send)
        finally:
            thread.shutdown()

    return shared


def let_request_thread_go() -> None:
    """Be without the request's thread and its database connections through minutes of streaming.

    asgiref keeps it until the response is done (https://code.djangoproject.com/ticket/32889).
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    executor = SyncToAsync.context_to_thread_executor.get(context) if context else None
    if isinstance(executor, BorrowedThread):
        executor.leave_the_end()
    elif context and executor:
        del SyncToAsync.context_to_thread_executor[context]  # asgiref makes another when it needs one
        executor.submit(_close_connections)
        executor.shutdown(wait=False)


def _at_the_end(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return fn(*args, **kwargs)
    finally:
        _look_after_connections()


def _close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close()


def _look_after_connections() -> None:
    reset_queries()
    close_old_connections()

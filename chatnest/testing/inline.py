"""The ledger in the test's own thread, over its own connection: a plain ``TestCase`` sees it, and rolls it back."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

from asgiref.sync import sync_to_async
from django.conf import settings
from django.test import TestCase, override_settings

from ..conf import settings as ledgers
from ..ledger.batcher import batcher
from ..ledger.jobs import Job, LaterJob
from ..ledger.outage import Outage
from ..ledger.worker import Worker
from ..policy import Policy, PolicyCache
from ..refusals import refusals
from ..signals import announcer
from .upstream import FakeUpstream


class _AsItIs(PolicyCache):
    """Remembers nothing: what a test saved is in force, though nothing is ever committed."""

    def recall(self, accounts: Sequence[str]) -> Policy | None:
        return None

    def read(self, accounts: Sequence[str]) -> Policy:
        policy = Policy.read(accounts)
        self._memory.policy = 0.0, policy
        return policy


@contextmanager
def inline_ledger() -> Iterator[None]:
    """What the ledger is asked is done at once, where the test's own queries run. Not for streams beside each other."""
    worker = Worker(queue.SimpleQueue(), WeakValueDictionary(), Outage(), lambda hold: None)
    doing: set[asyncio.Task[Any]] = set()

    def do(what: Callable[[], object]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            what()
            return
        doing.add(task := loop.create_task(sync_to_async(what)()))
        task.add_done_callback(doing.discard)

    def work(job: Job) -> None:
        # Nothing is ever committed, but signals are sent.
        with TestCase.captureOnCommitCallbacks(using=ledgers.DATABASE_ALIAS, execute=True):
            worker.work([job])

    def put(job: Job | None) -> None:
        if job and not isinstance(job, LaterJob):
            do(partial(work, job))

    def tell(send: Callable[[], object], **kwargs: Any) -> None:
        do(send)

    batcher.close()  # a thread of before would renew what only the test can see
    refusals.clear()
    with (
        mock.patch.multiple(batcher, _put=put, start=lambda: None, _policies=_AsItIs()),
        mock.patch.object(announcer, "put", tell),
    ):
        try:
            yield
        finally:
            refusals.clear()


@contextmanager
def scripted_chat() -> Iterator[FakeUpstream]:
    """``inline_ledger``, and a scripted provider in the place of each that the settings have."""
    with FakeUpstream() as upstream, override_settings(CHATNEST=_asking(upstream.url)), inline_ledger():
        yield upstream


def _asking(url: str) -> dict[str, Any]:
    """The site's CHATNEST with every provider at ``url``."""
    typed = getattr(settings, "CHATNEST", {})
    where = {"BASE_URL": url, "API_KEY": "sk-test"}
    providers = {
        name: {**{key: value for key, value in entry.items() if key != "CLIENT"}, **where}
        for name, entry in typed.get("PROVIDERS", {}).items()
    }
    return {**typed, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-test", "PROVIDERS": providers}


class ChatTestMixin:
    """For ``TestCase`` and ``TransactionTestCase``: a scripted provider in ``self.upstream``, and the ledger inline.

    class ChatTests(ChatTestMixin, TestCase):
        async def test_chat(self):
            self.upstream.replies(Reply("Hello"))
            response = await self.async_client.post("/api/chat", {"messages": ...}, "application/json")
    """

    upstream: FakeUpstream

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        self.upstream = self.enterContext(scripted_chat())  # type: ignore[attr-defined]

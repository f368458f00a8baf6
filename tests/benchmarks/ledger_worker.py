"""One process that reserves as fast as it can, for ``tests.benchmarks.ledger``, on the database of DATABASE_URL.

    python -m tests.benchmarks.ledger_worker group|alone|view WAITING SECONDS

``group``: WAITING tasks of one event loop reserve through the batcher, each again as soon as it is answered.
``alone``: WAITING threads, each with a connection of its own, and a transaction for each reservation.
``view``: WAITING tasks of one event loop, a transaction for each reservation in a thread, as an async view has it.

Says "ready", waits for a line, and prints what it measured after a warm-up as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import threading
import time
from itertools import count
from statistics import median

import django
from asgiref.sync import sync_to_async

django.setup()

from django.db import DatabaseError, connections

from chatnest import ledger
from chatnest.ledger import Reserve
from chatnest.ledger.batcher import batcher
from tests.bookkeeping import ask

WARM_UP_SECONDS = 0.5
PAYERS = 10_000
UNLIMITED = 10**12


class Measure:
    """What was answered, and how fast, once everybody is there and warm."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.latencies: list[float] = []
        self.failed = 0
        self._payers = count(random.randrange(PAYERS))

    def begin(self) -> None:
        self.begins = time.perf_counter() + WARM_UP_SECONDS
        self.ends = self.begins + self.seconds

    def next(self) -> Reserve | None:
        """The next one of many payers, until the time is over."""
        if time.perf_counter() > self.ends:
            return None
        payer = f"user:{next(self._payers) % PAYERS}"
        return ask(payer, limit=UNLIMITED, site=UNLIMITED, rate_max_requests=10**6, max_concurrent_streams=10**6)

    def note(self, asked: float) -> None:
        answered = time.perf_counter()
        if self.begins < answered < self.ends:
            self.latencies.append(answered - asked)

    def report(self) -> dict[str, float]:
        return {
            "per_second": len(self.latencies) / self.seconds,
            "p50_ms": median(self.latencies) * 1000 if self.latencies else 0,
            "failed": self.failed,
        }


async def group(measure: Measure, waiting: int) -> None:
    async def reserve_on() -> None:
        while operation := measure.next():
            asked = time.perf_counter()
            await batcher.reserve(operation)
            measure.note(asked)

    measure.begin()
    await asyncio.gather(*(reserve_on() for _ in range(waiting)))


async def view(measure: Measure, waiting: int) -> None:
    async def reserve_on() -> None:
        while operation := measure.next():
            asked = time.perf_counter()
            await sync_to_async(ledger.apply)([operation])
            measure.note(asked)

    measure.begin()
    await asyncio.gather(*(reserve_on() for _ in range(waiting)))


def alone(measure: Measure, waiting: int) -> None:
    all_connected = threading.Barrier(waiting, action=measure.begin)

    def reserve_on() -> None:
        connections["default"].ensure_connection()
        all_connected.wait()
        while operation := measure.next():
            asked = time.perf_counter()
            try:
                ledger.apply([operation])
            except DatabaseError:  # SQLite gives a writer up who has waited for too long
                measure.failed += 1
            else:
                measure.note(asked)
        connections.close_all()

    threads = [threading.Thread(target=reserve_on) for _ in range(waiting)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    method, waiting, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    os.write(1, b"ready\n")
    sys.stdin.readline()
    measure = Measure(seconds)
    if method == "group":
        asyncio.run(group(measure, waiting))
        batcher.close()
    elif method == "view":
        asyncio.run(view(measure, waiting))
    else:
        alone(measure, waiting)
    print(json.dumps(measure.report()))

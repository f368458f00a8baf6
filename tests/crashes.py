"""Processes that are killed at each point of an operation, one after another: run by tests/test_faults.py.

    python -m tests.crashes reserve|settle FILE

FILE has the ids of the holds to settle, one a line. A child process is forked for each point; it dies there as
a power cut would have it. Prints the number of points, which is reached by the first child that lives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from itertools import count
from pathlib import Path
from uuid import UUID

import django


def main(operation: str, file: str) -> None:
    ids = [UUID(line) for line in Path(file).read_text().split()]
    for point in count(1):
        child = os.fork()
        if not child:
            asyncio.run(live_until(point, operation, ids[point - 1]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            print(point - 1)
            return


async def live_until(point: int, operation: str, hold_id: UUID) -> None:
    from chatnest.ledger.batcher import batcher

    from .bookkeeping import ask, hold_of, used
    from .faults import Faults

    faults = Faults("default")
    await batcher.query(faults.install)
    faults.at(point, lambda: os.kill(os.getpid(), signal.SIGKILL))
    question = ask(f"user:{operation}-{point}", id=hold_id)
    if operation == "reserve":
        await batcher.reserve(question)
    else:
        await batcher.settled(used(hold_of(question), 50))


if __name__ == "__main__":
    django.setup()
    main(*sys.argv[1:])

"""A proof of the sums, and the record of it: for the command, and for the admin's button."""

from __future__ import annotations

import time

from .changes import acting, actor, record
from .ledger import audit


def prove(*, repair: bool = False, progress: audit.Progress | None = None) -> list[audit.Discrepancy]:
    """Prove every counter, as ``audit.verify``, and record who did (``changes.acting``), and what differs now."""
    began, days = time.perf_counter(), 0

    def told(of_a_day: str) -> None:
        nonlocal days
        days += 1
        if progress:
            progress(of_a_day)

    found = audit.verify(repair=repair, progress=told)
    remaining = sum(not difference.repaired for difference in found)
    with acting(actor().name, f"{days:,} days in {time.perf_counter() - began:.1f} s"):
        record("proof", "ledger", "differences", len(found), remaining)
    return found

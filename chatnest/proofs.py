"""A proof of the sums, and the record of it: for the command, and for the admin's button."""

from __future__ import annotations

import time

from .changes import actor
from .conf import now, settings
from .ledger import audit
from .models import Proof


def prove(*, repair: bool = False, progress: audit.Progress | None = None) -> tuple[Proof, list[audit.Discrepancy]]:
    """Prove every counter, as ``audit.verify``, and record who did (``changes.acting``), when, and what differed."""
    at, began, days = now(), time.perf_counter(), 0

    def told(of_a_day: str) -> None:
        nonlocal days
        days += 1
        if progress:
            progress(of_a_day)

    found = audit.verify(repair=repair, progress=told)
    proof = Proof(
        at=at,
        seconds=time.perf_counter() - began,
        days=days,
        differences=len(found),
        repaired=sum(difference.repaired for difference in found),
        actor=actor().name,
    )
    proof.save(using=settings.DATABASE_ALIAS)
    return proof, found

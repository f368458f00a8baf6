"""The ledger: the only writer of what is spent, and its async door (``batcher``).

Reserve before the upstream is called, settle when it ends. ``operations`` decides, ``book`` has the rows of one
transaction, ``bulk`` writes many in few statements, ``audit`` proves, mends and prunes.
"""

from .operations import (
    Hold,
    Operation,
    Reserve,
    Reset,
    Settle,
    Stop,
    apply,
    day_ends,
    expire,
    expire_overdue,
    new_id,
    renew,
    standing,
    today,
)

__all__ = [
    "Hold",
    "Operation",
    "Reserve",
    "Reset",
    "Settle",
    "Stop",
    "apply",
    "day_ends",
    "expire",
    "expire_overdue",
    "new_id",
    "renew",
    "standing",
    "today",
]

"""The ledger: the only writer of what is spent, and its async door (``batcher``).

Reserve before the upstream is called, settle when it ends. ``operations`` can be asked, ``decisions`` answers them
in one transaction, whose rows are in ``book``; ``bulk`` writes many in few statements. ``charges`` says what an answer
costs, ``leases`` what a crash does, ``days`` when a budget is renewed. ``audit`` proves, mends and prunes.
"""

from .days import day_ends, today
from .decisions import apply, standing
from .leases import expire, expire_overdue, renew
from .operations import Budget, Hold, Lesson, Operation, Reserve, Reset, Settle, Stop, new_id, todays_budgets

__all__ = [
    "Budget",
    "Hold",
    "Lesson",
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
    "todays_budgets",
]

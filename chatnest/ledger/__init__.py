"""The ledger: the only writer of what is spent. Reserve before the upstream is called, settle when it ends.

Its files:

    operations, charges      what it can be asked; what an answer costs
    decisions, leases        how it decides; what a crash does. ``days``: when a budget is renewed
    money, lines             limits in money; the lines of a bill
    transactions             all or nothing, again where another was in the way
    book, rows, statements   one transaction's rows. ``bulk``: many in few statements
    batcher                  its async door; ``worker`` the thread behind it, ``jobs`` what waits, ``outage`` the log's
    audit, mending, pruning  proving, mending, forgetting old days
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

"""Who used what, and what it cost: what commands and the admin's pages show. It reads, and writes nothing.

Its files:

    periods      which days
    figures      sums of the usage lines, and what of them counts against budgets
    forecast     what the month may cost
    users        whose an account is; whom a search means
    sheets       CSV, and money as text
"""

from .figures import COUNTED, DIMENSIONS, Dimension, Figures, by, by_day_and_account, by_day_and_model, totals
from .forecast import estimate
from .periods import PERIODS, Period
from .sheets import COLUMNS, csv_rows, currency, money, safe
from .users import Person, find, people

__all__ = [
    "COLUMNS",
    "COUNTED",
    "DIMENSIONS",
    "PERIODS",
    "Dimension",
    "Figures",
    "Period",
    "Person",
    "by",
    "by_day_and_account",
    "by_day_and_model",
    "csv_rows",
    "currency",
    "estimate",
    "find",
    "money",
    "people",
    "safe",
    "totals",
]

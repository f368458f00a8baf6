"""The admin: what operators set, beside what is in force; what the ledger wrote, to read.

columns       how a value is shown: separators, units, zones, names
pages         what every page here does: its columns, exact search, and who is acting
profiles prices accounts   what operators set
naming        an account's form: its name completed, a limit without effect refused
pausing       the action, and the page that says what it will change
records       what only chatnest writes

The Usage page is a room of its own: operators.
"""

from ..operators import pages as usage
from . import accounts, prices, profiles, records

__all__ = ["accounts", "prices", "profiles", "records", "usage"]

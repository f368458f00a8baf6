"""The admin: what operators set, beside what is in force; what the ledger wrote, to read.

money         the currency, and amounts in it
people        who is behind an account
columns       how a value is shown: separators, units, zones, names
pages         what every page here does: its columns, exact search, and who is acting
profiles prices accounts   what operators set
naming        an account's form: its name completed, a limit without effect refused
pausing       the action, and the page that says what it will change
records       what only chatnest writes
"""

from . import accounts, prices, profiles, records

__all__ = ["accounts", "prices", "profiles", "records"]

"""The rows: what operators set (Profile, Account, Price), what chatnest alone writes (all the others).

An account is a name that usage is charged to: ``site``, ``anonymous``, ``user:<pk>``, ``ip:<address>``, ``key:<id>``.
Money is in whole millionths of the currency, but where people type it.
"""

from .account import Account
from .adjustment import Adjustment
from .calibration import Calibration
from .change import Change
from .price import Price
from .profile import Profile
from .refusal import Refusal
from .reservation import LABEL_LENGTH, Reservation, ReservationQuerySet
from .usage import DailyUsage, DailyUsageQuerySet, RateWindow, Usage, UsageLine

__all__ = [
    "LABEL_LENGTH",
    "Account",
    "Adjustment",
    "Calibration",
    "Change",
    "DailyUsage",
    "DailyUsageQuerySet",
    "Price",
    "Profile",
    "RateWindow",
    "Refusal",
    "Reservation",
    "ReservationQuerySet",
    "Usage",
    "UsageLine",
]

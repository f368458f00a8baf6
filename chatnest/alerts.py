"""What operators are told at once, by mail to ADMINS and by signals: a budget runs out, a provider refuses the site.

Mails are sent where signals are received: in a thread of their own. A mail server that fails is a line in the log.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import date, timedelta
from functools import partial
from typing import Any, Final

from django.core.mail import mail_admins
from django.db.models import Q
from django.dispatch import receiver
from django.urls import NoReverseMatch, reverse
from django.utils.formats import number_format
from django.utils.translation import gettext as _

from . import ledger
from .accounts import ANONYMOUS, SHARED
from .conf import now, settings, time_zone
from .errors import ChatError, UpstreamMisconfigured
from .ledger import Hold
from .ledger.batcher import batcher
from .models import Calibration
from .signals import budget_crossed, provider_refused, tell_provider_refused

MAILED_PERCENT: Final = 80  # and above
REFUSED_AGAIN: Final = timedelta(hours=1)
LOOK_SECONDS: Final = 60.0  # between two looks of a process whether it is time to tell again

_look_at: Final[dict[tuple[str, str], float]] = {}  # by provider and model


# A provider refuses the site.


def tell_if_misconfigured(hold: Hold, problem: ChatError) -> None:
    """That the provider of ``hold`` refuses its model or the site's key, if that is the problem: once an hour.

    From any thread; nothing is waited for.
    """
    key = hold.provider, hold.model
    if isinstance(problem, UpstreamMisconfigured) and time.monotonic() >= _look_at.get(key, 0.0):
        _look_at[key] = time.monotonic() + LOOK_SECONDS
        batcher.later(0, partial(_tell_once_an_hour, *key, problem))


def _tell_once_an_hour(provider: str, model: str, problem: ChatError) -> None:
    """In the ledger's thread: of all processes, one finds that it is time."""
    rows = Calibration.objects.using(settings.DATABASE_ALIAS)
    rows.bulk_create([Calibration(provider=provider, model=model, updated_at=now())], ignore_conflicts=True)
    is_due = Q(refused_at=None) | Q(refused_at__lte=now() - REFUSED_AGAIN)
    if rows.filter(is_due, provider=provider, model=model).update(refused_at=now()):
        tell_provider_refused(provider, model, code=problem.code, detail=problem.detail)


# Mails.


@receiver(provider_refused)
def mail_refusal(provider: str, model: str, detail: str, **kwargs: Any) -> None:
    if settings.ALERTS:
        names = {"provider": provider, "model": model, "cause": detail}
        _mail(
            _("Chat: the provider %(provider)s refuses requests (%(cause)s)") % names,
            [
                _("The provider %(provider)s does not answer for the model %(model)s: %(cause)s.") % names,
                _(
                    "Whoever asks for it gets no answer until this is mended, unless the profile has a fallback. "
                    "If it goes on, you are told again in an hour."
                ),
                _("What the provider said is in the log chatnest.upstream."),
                _("To see whether it works again:") + "\n    python manage.py chatnest_doctor",
            ],
        )


@receiver(budget_crossed)
def mail_budget(account: str, day: date, percent: int, used: int, limit: int, **kwargs: Any) -> None:
    if settings.ALERTS and account in SHARED and percent >= MAILED_PERCENT:
        facts = {
            "account": account,
            "percent": percent,
            "used": number_format(used, force_grouping=True),
            "limit": number_format(limit, force_grouping=True),
            "until": f"{ledger.day_ends(day).astimezone(time_zone()):%Y-%m-%d %H:%M %Z}",
            "setting": f"{account.upper()}_DAILY_TOKEN_LIMIT",
        }
        _mail(_("Chat: %(percent)d %% of the budget of %(account)s is used") % facts, _about(facts))


def _about(facts: dict[str, Any]) -> list[str]:
    account = facts["account"]
    if account == ANONYMOUS:
        what = _("All visitors without an account together have used %(used)s of %(limit)s tokens of today.")
        stop = f"chatnest_pause {account}"
    else:
        what = _("The whole site has used %(used)s of %(limit)s tokens of today.")
        stop = "chatnest_stop"
    then = _("It is full: they are refused until the next day begins, at %(until)s.")
    if facts["percent"] < 100:
        then = _("When all is used, they are refused until the next day begins, at %(until)s.")
    return [
        what % facts,
        then % facts,
        _("To give more for today, up to %(setting)s of the settings:") % facts
        + f"\n    python manage.py chatnest_grant {account} 100000",
        _("To see who used it:") + "\n    python manage.py chatnest_usage",
        _("To shut them out:") + f"\n    python manage.py {stop}",
    ]


def _mail(subject: str, paragraphs: Sequence[str]) -> None:
    """To ADMINS; to nobody where there are none."""
    try:
        where = [_("In the admin: %s") % reverse("admin:chatnest_usage_changelist")]
    except NoReverseMatch:  # the site has none
        where = []
    mail_admins(subject, "\n\n".join([*paragraphs, *where]) + "\n")

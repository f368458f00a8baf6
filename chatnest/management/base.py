"""What the operators' commands share: failures in a sentence, progress that does not drown a log."""

from __future__ import annotations

import argparse
import getpass
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, no_translations
from django.db import Error, IntegrityError
from django.db.models import Case, QuerySet, When

from ..accounts import NAME_RULE, SHARED, SITE, canonical, is_name, misnamed, user_named
from ..changes import acting
from ..conf import settings
from ..models import Account, DailyUsage
from ..reports import Period, Person, people

PROGRESS_SECONDS: Final = 1.0
WHY: Final = "Why, for the record of changes."
WHO: Final = "Such as user:7, ip:192.0.2.1, or a user's name or e-mail."


class OperatorCommand(BaseCommand):
    """Works on the database that CHATNEST["DATABASE_ALIAS"] names, and fails without a traceback.

    What it changes was changed by who runs it.
    """

    # None of them calls a provider, but the doctor, who runs the checks as a part of what it tells: a key or a setting
    # that is wrong must not keep anybody from stopping the chat, or from reading what it has cost.
    requires_system_checks = ()
    verbosity = 1

    def run(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    @no_translations
    def handle(self, *args: Any, **options: Any) -> None:
        self.verbosity = options["verbosity"]
        command = type(self).__module__.rpartition(".")[2]
        try:
            with acting(f"{operator()} ({command})", options.get("reason", "")):
                self.run(**options)
        except IntegrityError as error:
            raise CommandError(
                f"The counters do not allow it: {error}\nRun chatnest_verify --repair, then this again."
            ) from error
        except Error as error:
            alias = settings.DATABASE_ALIAS
            raise CommandError(f"The database {alias!r} refused (is it up, and migrated?): {error}") from error
        except KeyboardInterrupt:
            raise CommandError(
                "Interrupted. What was done so far is complete in itself; run this again for the rest.",
                returncode=130,
            ) from None

    def say(self, text: str) -> None:
        if self.verbosity:
            self.stdout.write(text)

    @property
    def progress(self) -> Callable[[str], object] | None:
        """Says how far it is, now and then: on a terminal, or in a log with ``--verbosity 2``."""
        if not (self.verbosity > 1 or (self.verbosity and self.stderr.isatty())):
            return None
        said_at = time.monotonic()

        def progress(text: str) -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= PROGRESS_SECONDS:
                said_at = time.monotonic()
                self.stderr.write(text, str)

        return progress


def meant(typed: str) -> str:
    """The account of this name, or of the user who logs in with it or has this e-mail."""
    name = canonical(typed.strip())
    if ":" in name or is_known(name):
        return name
    user = user_named(name)
    return f"user:{user.pk}" if user else name


def charged(typed: Iterable[str], hint: str) -> list[str]:
    """The same of several. Raises CommandError, with the hint, where one has no row and was never charged."""
    accounts = list(map(meant, typed))
    if unknown := [name for name in accounts if not is_known(name)]:
        raise CommandError(f"No such account: {', '.join(unknown)}. {hint}")
    return accounts


def chargeable(typed: str) -> str:
    """The same of one. Raises CommandError where no request is charged to it: a slip must not look like a success."""
    name = meant(typed)
    if not is_name(name):
        raise CommandError(f"An account's name is {NAME_RULE}. Nothing was changed.")
    if not is_known(name) and (problem := misnamed(name)):
        raise CommandError(f"{problem} Nothing was changed.")
    return name


def is_known(account: str) -> bool:
    """It has a row, or has been charged."""
    rows = Account.objects.using(settings.DATABASE_ALIAS).filter(name=account)
    return account in SHARED or rows.exists() or usage([account]).exists()


def described(account: str) -> str:
    """``user:7 (ada)``"""
    return named(account, people([account]))


def named(account: str, who: Mapping[str, Person]) -> str:
    """The same, where it is known who it is."""
    return f"{account} ({who[account].username})" if account in who else account


def operator() -> str:
    """The user of the operating system who runs this."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user may have no name
        return "unknown"


def usage(accounts: Collection[str] | None = None, **lookups: Any) -> QuerySet[DailyUsage]:
    """The usage of these accounts, or of all: the last day first, and in it the site, then who used most."""
    rows = DailyUsage.objects.using(settings.DATABASE_ALIAS).filter(**lookups)
    if accounts:
        rows = rows.filter(account__in=accounts)
    return rows.order_by("-day", Case(When(account=SITE, then=0), default=1), "-tokens_used", "account")


def day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day such as 2026-11-22") from None


def month(text: str) -> Period:
    try:
        return Period.of_month(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a month such as 2026-11") from None


def positive(text: str) -> int:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")


def days_earlier(day: date, days: int) -> date:
    """That many days before ``day``, or the first day there is."""
    return date.fromordinal(max(1, day.toordinal() - days))


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

"""The ledger's transaction: everything or nothing, and again where another was in its way.

Every writer locks usage rows by (day, account), then reservations by id, then calibrations by (provider, model), so
two transactions cannot deadlock. A usage row that does not exist yet cannot be locked: of two that make the same one,
the second is in conflict, and is tried again.
"""

from __future__ import annotations

import functools
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, ParamSpec, TypeVar
from uuid import UUID

from django.db import (
    DatabaseError,
    DataError,
    Error,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
    connections,
    transaction,
)

from ..conf import settings
from .book import Book, Key, Month, Rate

P = ParamSpec("P")
T = TypeVar("T")

CONFLICT_SECONDS: Final = 4.0  # for so long a transaction is tried again; who waits for it waits for five
LONGEST_PAUSE: Final = 0.1

# https://www.postgresql.org/docs/current/errcodes-appendix.html: serialization_failure, deadlock_detected
_CONFLICTS: Final = ("40001", "40P01")
_LOCKED: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class CommitUnknown(DatabaseError):
    """The connection was lost at COMMIT. Asking again is safe: the ids tell what was done."""


@contextmanager
def ledger_transaction(
    *,
    keys: Iterable[Key] = (),
    ids: Iterable[UUID] = (),
    rates: Iterable[Rate] = (),
    months: Iterable[Month] = (),
) -> Iterator[Book]:
    """The book of what will be touched, locked; it is written at the end, and committed.

    Raises what the database raises, and then nothing was written; or CommitUnknown.
    """
    committing = False
    try:
        with transaction.atomic(using=settings.DATABASE_ALIAS):
            book = Book(keys=keys, ids=ids, rates=rates, months=months)
            yield book
            book.write()
            committing = True
    except DatabaseError as error:
        if committing and not is_conflict(error):
            raise CommitUnknown(*error.args) from error
        raise


def retried(work: Callable[P, T]) -> Callable[P, T]:
    """``work``, done again in a fresh transaction for as long as others are in its way, within reason."""

    @functools.wraps(work)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        tries, ends = 0, time.monotonic() + CONFLICT_SECONDS
        while True:
            try:
                return work(*args, **kwargs)
            except DatabaseError as error:
                # Within somebody else's transaction there is no fresh one.
                nested = connections[settings.DATABASE_ALIAS].in_atomic_block
                if nested or not is_conflict(error) or time.monotonic() > ends:
                    raise
            tries += 1
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.001 * 2**tries)))

    return again


def is_conflict(error: Exception) -> bool:
    """Another transaction was in the way of this one, which was undone, and may be tried again at once."""
    if getattr(error.__cause__, "sqlstate", None) in _CONFLICTS or _sqlite_code(error) in _LOCKED:
        return True
    # Two made an account's first row of a day.
    return isinstance(error, IntegrityError) and "chatnest_one_usage_a_day" in str(error)


def is_outage(error: Exception) -> bool:
    """The database's fault, not the operation's: it may take the same operation later."""
    return isinstance(error, Error) and not isinstance(error, IntegrityError | DataError) and not is_bug(error)


def is_bug(error: Exception) -> bool:
    """The database does not understand what it is told: it is not migrated, or chatnest is wrong."""
    return isinstance(error, ProgrammingError | NotSupportedError) or _sqlite_code(error) == sqlite3.SQLITE_ERROR


def _sqlite_code(error: Exception) -> int | None:
    """The primary result code: https://www.sqlite.org/rescode.html."""
    code = getattr(error.__cause__, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF

"""The SQL of a ledger's transaction, for PostgreSQL and SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, Final
from uuid import UUID

from django.db.backends.base.base import BaseDatabaseWrapper

from ..models import Calibration, DailyUsage, RateWindow, Reservation
from .bulk import Statement, names, statement, table
from .rows import COUNTERS, RESERVATION

# Whatever the site's default: the ledger locks what it reads, and must then see it as it is.
READ_COMMITTED: Final = statement("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")

# What follows an INSERT.
ADD_TO_WINDOW: Final = (
    'ON CONFLICT ("account", "window_start", "window_seconds", "day") '
    f'DO UPDATE SET "count" = {table(RateWindow)}."count" + excluded."count"'
)
_ADD_TO_CALIBRATION: Final = """ON CONFLICT ("provider", "model") DO UPDATE SET
    "reports" = {row}."reports" + excluded."reports",
    "prompt_excess" = {greatest}({row}."prompt_excess", excluded."prompt_excess"),
    "completion_excess" = {greatest}({row}."completion_excess", excluded."completion_excess"),
    "reasons_unseen" = {row}."reasons_unseen" OR excluded."reasons_unseen",
    "ignores_max_tokens" = {row}."ignores_max_tokens" OR excluded."ignores_max_tokens",
    "updated_at" = excluded."updated_at"
"""


def add_to_calibration(connection: BaseDatabaseWrapper) -> str:
    greatest = "GREATEST" if connection.vendor == "postgresql" else "max"
    return _ADD_TO_CALIBRATION.format(row=table(Calibration), greatest=greatest)


def lock_usage(connection: BaseDatabaseWrapper, day: date, accounts: Sequence[str]) -> Statement:
    """Rows of COUNTERS and the account."""
    sql = (
        f'SELECT {names(COUNTERS)}, "account" FROM {table(DailyUsage)} '  # noqa: S608
        f'WHERE "day" = %s AND "account" IN %s ORDER BY "account"{_for_update(connection)}'
    )
    return statement(sql, connection.ops.adapt_datefield_value(day), list(accounts))


def lock_reservations(connection: BaseDatabaseWrapper, ids: Sequence[UUID], now: datetime) -> Statement:
    """Rows of RESERVATION, and whether the lease had run out by ``now``."""
    sql = (
        f'SELECT {names(RESERVATION)}, "expires_at" <= %s FROM {table(Reservation)} '  # noqa: S608
        f'WHERE "id" IN %s ORDER BY "id"{_for_update(connection)}'
    )
    native = connection.features.has_native_uuid_field
    return statement(sql, _time(connection, now), [id if native else id.hex for id in ids])


def add_up_month(connection: BaseDatabaseWrapper, days: Sequence[date], accounts: Sequence[str]) -> Statement:
    """Rows of an account, and the cost of these days: what is used and what is reserved."""
    sql = (
        f'SELECT "account", SUM("cost_used" + "cost_reserved") FROM {table(DailyUsage)} '  # noqa: S608
        'WHERE "day" IN %s AND "account" IN %s GROUP BY "account"'  # the days one by one: as the index has them
    )
    return statement(sql, [connection.ops.adapt_datefield_value(day) for day in days], list(accounts))


def count_requests(
    connection: BaseDatabaseWrapper, seconds: int, this: datetime, last: datetime, payers: Sequence[str]
) -> Statement:
    """Rows of a payer, whether it is of ``this`` window of so many ``seconds`` or of the ``last``, and its requests."""
    sql = (
        f'SELECT "account", "window_start" = %s, "count" FROM {table(RateWindow)} '  # noqa: S608
        f'WHERE "window_seconds" = %s AND "window_start" IN (%s, %s) AND "account" IN %s'
    )
    start = _time(connection, this)
    return statement(sql, start, seconds, start, _time(connection, last), list(payers))


def count_streams(connection: BaseDatabaseWrapper, payers: Sequence[str], now: datetime) -> Statement:
    """Rows of a payer and its open reservations, if it has any."""
    sql = (
        f'SELECT "payer", COUNT(*) FROM {table(Reservation)} '  # noqa: S608
        'WHERE "state" = \'open\' AND "expires_at" > %s AND "payer" IN %s GROUP BY "payer"'
    )
    return statement(sql, _time(connection, now), list(payers))


def _for_update(connection: BaseDatabaseWrapper) -> str:
    # SQLite has one writer at a time, and a transaction there begins as one (transaction_mode IMMEDIATE).
    return " FOR UPDATE" if connection.features.has_select_for_update else ""


def _time(connection: BaseDatabaseWrapper, at: datetime) -> Any:
    return connection.ops.adapt_datetimefield_value(at)

"""Many rows in few statements, and few statements in one round trip: what makes a ledger's transaction cheap.

Rows travel as one JSON parameter, encoded in C, which the database unpacks; the ORM spends half a millisecond on
a statement and ten microseconds on a row, this a tenth of that. The SQL is made from the models, so it follows
their migrations. PostgreSQL and SQLite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from django.db import connections, models

Row = Mapping[str, Any]
Rows = list[tuple[Any, ...]]
Statement = tuple[str, list[Any]]

VENDORS: Final = ("postgresql", "sqlite")


def statement(sql: str, *parameters: Any) -> Statement:
    """``sql`` with its parameters; it may say ``IN %s`` for a list, which gets a placeholder for each member."""
    flat: list[Any] = []
    for parameter in parameters:
        if isinstance(parameter, list):
            flat += parameter
            sql = sql.replace("IN %s", f"IN ({', '.join(['%s'] * len(parameter))})", 1)
        else:
            flat.append(parameter)
    return sql, flat


def insert(alias: str, model: type[models.Model], rows: Sequence[Row], on_conflict: str = "") -> list[Statement]:
    """Insert ``rows``, which all have the same columns; ``on_conflict`` is the SQL of an upsert's rest."""
    if not rows:
        return []
    columns = tuple(rows[0])
    sql = (
        f"INSERT INTO {table(model)} ({names(columns)}) SELECT {names(columns)} "  # noqa: S608 - our own names
        f"FROM {_given(alias, model, columns)} WHERE true {on_conflict}"
    )
    return [(sql, [_encoder(connections[alias].vendor).encode(rows).decode()])]


def update(alias: str, model: type[models.Model], rows: Sequence[Row], by: Sequence[str]) -> list[Statement]:
    """Set every other column of ``rows`` where the columns ``by`` are equal."""
    if not rows:
        return []
    columns = tuple(rows[0])
    changes = ", ".join(f'"{name}" = given."{name}"' for name in columns if name not in by)
    matches = " AND ".join(f'{table(model)}."{name}" = given."{name}"' for name in by)
    sql = f"UPDATE {table(model)} SET {changes} FROM {_given(alias, model, columns)} WHERE {matches}"  # noqa: S608
    return [(sql, [_encoder(connections[alias].vendor).encode(rows).decode()])]


def run(alias: str, statements: Sequence[Statement]) -> list[Rows]:
    """Run ``statements`` in order and return the rows of each. PostgreSQL gets all of them in one round trip.

    But not with parameters that the server binds: those travel with one statement each.
    """
    connection: Any = connections[alias]
    results = []
    together = connection.vendor == "postgresql" and not connection.features.uses_server_side_binding
    with connection.cursor() as cursor:
        if together and statements:
            parameters = [parameter for _, its_own in statements for parameter in its_own]
            cursor.execute(";".join(sql for sql, _ in statements), parameters)
        for one in statements:
            if not together:
                cursor.execute(*one)
            results.append(_rows(cursor, one))
            if together:
                cursor.nextset()
    return results


def _rows(cursor: Any, one: Statement) -> Rows:
    return cursor.fetchall() if one[0].startswith("SELECT") else []  # asking the cursor is dear


def table(model: type[models.Model]) -> str:
    return f'"{model._meta.db_table}"'


def names(columns: Sequence[str]) -> str:
    """As SQL lists them."""
    return ", ".join(f'"{name}"' for name in columns)


@cache
def _encoder(vendor: str) -> msgspec.json.Encoder:
    # SQLite has no type for UUIDs; Django keeps their 32 digits. The hook is for subclasses of date and datetime.
    return msgspec.json.Encoder(
        uuid_format="canonical" if vendor == "postgresql" else "hex",
        enc_hook=lambda value: value.isoformat().replace("+00:00", "Z"),
    )


@cache
def _given(alias: str, model: type[models.Model], columns: tuple[str, ...]) -> str:
    """The JSON parameter as a table named ``given`` with typed columns."""
    fields: list[Any] = [model._meta.get_field(name) for name in columns]
    if connections[alias].vendor == "postgresql":
        types = ", ".join(f'"{field.column}" {field.db_type(connections[alias])}' for field in fields)
        return f"jsonb_to_recordset(%s::jsonb) AS given({types})"
    values = ", ".join(f'{_sqlite_value(field)} AS "{field.column}"' for field in fields)
    return f"(SELECT {values} FROM json_each(%s)) AS given"  # noqa: S608


def _sqlite_value(field: Any) -> str:
    value = f"json_extract(value, '$.{field.column}')"
    if isinstance(field, models.DateTimeField):
        return f"rtrim(replace({value}, 'T', ' '), 'Z')"  # as Django writes a datetime into SQLite
    return value

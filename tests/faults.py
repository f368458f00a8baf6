"""Every point at which the batcher's connection can fail: before and after each statement and each COMMIT.

``Faults.at`` counts points as the connection passes them, and does something at the nth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db import OperationalError, connections


class Faults:
    """Installed in the batcher's thread, and told there what to do: ``batcher.query(faults.install)``."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.happened = False
        self._passed = self._point = 0
        self._act: Callable[[], object] = lambda: None
        self._down = False

    def install(self) -> None:
        connection: Any = connections[self.alias]
        connection.execute_wrappers.append(self._execute)
        self._commit, connection._commit = connection._commit, self._committing
        self._connect, connection.connect = connection.connect, self._connecting

    def at(self, point: int, act: Callable[[], object]) -> None:
        """Do this at that point, counted from 1 and from now."""
        self._passed, self._point, self._act = 0, point, act
        self.happened = False

    def off(self) -> None:
        """Nothing happens any more, and the database is up."""
        self._point = 0
        self._down = False

    def lose(self) -> None:
        """The connection is gone. Whoever connects anew finds the database as it is."""
        if connections[self.alias].vendor == "postgresql":
            connections[self.alias].connection.close()
        raise OperationalError("the connection is lost, or the disk")

    def go_down(self) -> None:
        """The connection is gone, and so is the database, until this is ``off``."""
        self._down = True
        self.lose()

    @property
    def is_down(self) -> bool:
        return self._down

    def _pass(self) -> None:
        self._passed += 1
        if self._passed == self._point:
            self.happened = True
            self._act()

    def _execute(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        self._pass()
        result = execute(sql, params, many, context)
        if not sql.startswith("BEGIN"):  # SQLite's: one that fails has not begun
            self._pass()
        return result

    def _committing(self) -> None:
        self._pass()
        self._commit()
        self._pass()

    def _connecting(self) -> None:
        if self._down:
            raise OperationalError("the database is down")
        self._connect()

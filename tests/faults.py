"""Every point at which the batcher's connection can fail: before and after each statement and each COMMIT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db import OperationalError, connections


class Faults:
    """Counts the points that are passed, and does something at one of them. Installed in the batcher's thread."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.passed = 0
        self._point = 0
        self._act: Callable[[], object] = lambda: None
        self._down = False

    def install(self) -> None:
        connection: Any = connections[self.alias]
        connection.execute_wrappers.append(self._execute)
        self._commit, connection._commit = connection._commit, self._committing
        self._connect, connection.connect = connection.connect, self._connecting

    def uninstall(self) -> None:
        connection: Any = connections[self.alias]
        connection.execute_wrappers.remove(self._execute)
        del connection._commit, connection.connect

    def at(self, point: int, act: Callable[[], object] = lambda: None) -> None:
        """From now on, do this at that point, counted from 1."""
        self.passed, self._point, self._act = 0, point, act

    def lose(self) -> None:
        """The connection is gone. Whoever connects anew finds the database as it is."""
        if connections[self.alias].vendor == "postgresql":
            connections[self.alias].connection.close()
        raise OperationalError("the connection is lost, or the disk")

    def go_down(self) -> None:
        """The connection is gone, and so is the database, until it comes up."""
        self._down = True
        self.lose()

    def come_up(self) -> None:
        self._down = False

    def _pass(self) -> None:
        self.passed += 1
        if self.passed == self._point:
            self._act()

    def _execute(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        self._pass()
        result = execute(sql, params, many, context)
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

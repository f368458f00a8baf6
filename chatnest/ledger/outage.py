"""An outage of the database is two lines in the log, however many requests it refuses: away, and back."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger("chatnest.ledger")


class Outage:
    """Whether the database is away. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._writing = False  # it failed where it should have written: that it can be read does not end it
        self._refused = self._kept = 0

    def begins(self, why: object, *, writing: bool, refused: int = 0, kept: int = 0) -> None:
        """Or goes on. ``refused``: so many more requests; ``kept``: so many more settlements, to be tried again."""
        with self._lock:
            is_new = self._since is None
            self._since = self._since or time.monotonic()
            self._writing |= writing
            self._refused += refused
            self._kept += kept
        if is_new:
            logger.error("The database does not answer; until it does, the chat is refused: %s", _one_line(why))

    def ends(self, *, writing: bool) -> None:
        """If there was one, and what failed works again."""
        if self._since is None or (self._writing and not writing):
            return
        with self._lock:
            since, refused, kept = self._since, self._refused, self._kept
            self._since, self._writing, self._refused, self._kept = None, False, 0, 0
        if since is not None:
            logger.warning(
                "The database answers again, after %.1f s: %d requests were refused, %d settlements kept",
                time.monotonic() - since, refused, kept,
            )  # fmt: skip


def _one_line(why: object) -> str:
    return " ".join(str(why).split()) or type(why).__name__

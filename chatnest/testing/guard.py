"""No test of a site asks, and pays, the real provider by accident."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..provider import clients


@contextmanager
def real_provider() -> Iterator[None]:
    """Under Django's test runner and pytest-django only a provider on loopback is asked, but for within this."""
    clients.guard.lifted += 1
    try:
        yield
    finally:
        clients.guard.lifted -= 1

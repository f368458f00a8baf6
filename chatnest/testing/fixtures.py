"""For pytest-django: ``pytest_plugins = ["chatnest.testing.fixtures"]`` in the site's outermost conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .inline import scripted_chat
from .upstream import FakeUpstream


@pytest.fixture
def chat_upstream(db: None) -> Iterator[FakeUpstream]:
    """The provider, scripted, and the ledger in the test's own transaction."""
    with scripted_chat() as upstream:
        yield upstream

"""The database of the ledger: chatnest's tables live where ``CHATNEST["DATABASE_ALIAS"]`` says, and nowhere else.

So the admin edits, ``migrate`` makes and the ledger reads the same rows. A site whose ledger is not in ``default``
adds the router to its settings: ``DATABASE_ROUTERS = ["chatnest.routers.LedgerRouter"]``.
"""

from __future__ import annotations

from typing import Any

from django.db.models import Model

from .conf import settings

LABEL = "chatnest"


class LedgerRouter:
    """As Django asks routers: None where it is another app's matter."""

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        # Never a replica: an operator's edit and a budget are what they are now.
        return str(settings.DATABASE_ALIAS) if model._meta.app_label == LABEL else None

    db_for_write = db_for_read

    def allow_relation(self, one: Model, other: Model, **hints: Any) -> bool | None:
        return True if one._meta.app_label == other._meta.app_label == LABEL else None

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return db == settings.DATABASE_ALIAS if app_label == LABEL else None

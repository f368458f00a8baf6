"""Both databases of the tests have chatnest's tables, and each story says in which its ledger lives."""

from __future__ import annotations

from typing import Any

from chatnest.routers import LedgerRouter


class InEither(LedgerRouter):
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return None

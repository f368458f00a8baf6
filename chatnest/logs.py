"""What a log record says in fields, beside its words: ``reservation``, ``payer``, ``profile``, ``provider``, ``model``
and ``outcome``, which a JSON formatter picks up.

``chatnest.chat`` has a line for each answer and for refusals, at INFO.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol
from uuid import UUID

from .errors import ChatError

chat_logger = logging.getLogger("chatnest.chat")


class Held(Protocol):
    """The ledger's Hold, or its Reserve."""

    @property
    def id(self) -> UUID: ...
    @property
    def accounts(self) -> Sequence[str]: ...
    @property
    def profile(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def model(self) -> str: ...


class Settled(Protocol):
    """The ledger's Settle."""

    @property
    def hold(self) -> Held: ...
    @property
    def outcome(self) -> str: ...
    @property
    def total_tokens(self) -> int: ...


def fields(hold: Held, **more: Any) -> dict[str, Any]:
    """For ``extra=`` of a record about it."""
    return {
        "reservation": str(hold.id),
        "payer": hold.accounts[0],
        "profile": hold.profile,
        "provider": hold.provider,
        "model": hold.model,
        **more,
    }


def log_settled(settle: Settled, seconds: float, error: str = "") -> None:
    """``error``: the code of what ended it."""
    if chat_logger.isEnabledFor(logging.INFO):
        outcome, tokens = str(settle.outcome), settle.total_tokens
        more = {"outcome": outcome, "tokens": tokens, "seconds": round(seconds, 3), "code": error}
        chat_logger.info("Chat %s: %d tokens in %.1f s", outcome, tokens, seconds, extra=fields(settle.hold, **more))


def log_refused(payer: str, refusal: ChatError) -> None:
    why = f"{refusal.code}: {refusal.detail}" if refusal.detail else refusal.code
    extra = {"payer": payer, "outcome": "refused", "code": refusal.code}
    chat_logger.info("Refused %s: %s", payer, why, extra=extra)

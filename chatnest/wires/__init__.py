"""One file per wire format: how a request is read, how frames and refusals are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation, as the provider gets it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What a client asked for, whatever wire it came by. Limits are None where it named none.

    ``label``: which feature of the site asks, as CHATNEST["PREPARE"] says; no client does. ``metadata``: whatever it
    wants to have in ``chatnest.signals.settled``.
    """

    messages: tuple[Message, ...]
    profile: str
    daily_token_limit: int | None = None
    max_tokens_per_request: int | None = None
    label: str = ""
    metadata: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer cost, in tokens; ``remaining`` is what is left of the payer's day.

    ``dropped_messages``: how many of the request's messages the model did not see.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    remaining: int
    finish_reason: Literal["stop", "length", "content_filter"]
    dropped_messages: int

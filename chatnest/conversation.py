"""The window, pure: what of a conversation the model gets to see.

A conversation never dead-ends: whatever its history, only a last message that is too long by itself is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, takewhile
from typing import NamedTuple

from . import tokens
from .errors import InvalidMessages, RequestTooLarge
from .wires import Message


class Window(NamedTuple):
    """``messages`` as the provider gets them; ``dropped``: how many of the client's it does not see."""

    messages: list[Message]
    dropped: int


def window(
    messages: Sequence[Message],
    *,
    system: str = "",
    max_messages: int,
    max_tokens: int,
    allowance: int,
    estimate: Callable[[Sequence[Message]], int] = tokens.estimate,
) -> Window:
    """The newest turns that fit: instructions first, then ``user`` and ``assistant`` in turn, beginning with ``user``.

    ``system`` is the operator's prompt; a client's own system messages at the beginning (CLIENT_SYSTEM_MESSAGES)
    follow it. Both are always sent, and no part of ``max_messages``; a later system message is a turn like another.
    An empty turn says nothing, so that it is neither sent nor called dropped. The last turn may be the assistant's:
    the model is to go on with it. ``estimate`` and the answer's ``allowance`` are within ``max_tokens``.

    Raises InvalidMessages where nobody asks anything, RequestTooLarge where the last message alone does not fit.
    """
    told = list(takewhile(lambda message: message.role == "system", messages))
    turns = _spoken(messages[len(told) :])
    looked_at = turns[-max_messages:] if max_messages > 0 else []
    if not any(message.role == "user" for message in looked_at or turns):
        raise InvalidMessages()
    instructions = _spoken([Message("system", system), *told])
    sent = _from_a_question(_newest(looked_at, max_tokens - allowance, instructions, estimate))
    if not sent:
        raise RequestTooLarge()
    return Window(_merged([*instructions, *sent]), len(turns) - len(sent))


async def awindow(
    messages: Sequence[Message], *, system: str = "", max_messages: int, max_tokens: int, allowance: int
) -> Window:
    """``window``, in a thread where it takes long."""
    cut = partial(
        window, messages, system=system, max_messages=max_messages, max_tokens=max_tokens, allowance=allowance
    )
    return await asyncio.to_thread(cut) if tokens.is_long(messages) else cut()


def _spoken(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.content and not message.content.isspace()]


def _newest(
    turns: Sequence[Message],
    max_tokens: int,
    instructions: Sequence[Message],
    estimate: Callable[[Sequence[Message]], int],
) -> list[Message]:
    """The longest end of ``turns`` that fits beside the instructions. What is far too long is not even counted."""
    if tokens.too_many_bytes(instructions, max_tokens):
        return []
    room = max_tokens - estimate(instructions)
    once = estimate(())  # what every prompt has, counted with the instructions
    kept = 0
    for message in reversed(turns):
        if tokens.too_many_bytes([message], room):
            break
        room -= estimate([message]) - once
        if room < 0:
            break
        kept += 1
    return list(turns[len(turns) - kept :])


def _from_a_question(turns: Sequence[Message]) -> list[Message]:
    first = next((i for i, message in enumerate(turns) if message.role == "user"), len(turns))
    return list(turns[first:])


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one message: strict chat templates refuse two."""
    return [
        Message(role, "\n\n".join(message.content for message in neighbours))
        for role, neighbours in groupby(messages, key=lambda message: message.role)
    ]

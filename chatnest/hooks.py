"""The site's own callables in the settings: found, and called, whether they are sync or async."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isawaitable, iscoroutinefunction
from typing import Any, Final, Literal, get_args

from asgiref.sync import sync_to_async
from django.utils.module_loading import import_string

from .conf import settings

Name = Literal["PAYER", "PREPARE"]
NAMES: Final[tuple[Name, ...]] = get_args(Name)


def imported(typed: str | Callable[..., Any]) -> Any:
    """What a setting means that is a callable or its dotted path. Raises ImportError."""
    return import_string(typed) if isinstance(typed, str) else typed


def hook(name: Name) -> Callable[..., Any] | None:
    """The callable in ``CHATNEST[name]``, or None if the site has none. Raises ImportError."""
    typed = getattr(settings, name)
    return None if typed is None else imported(typed)


async def ask(hook: Callable[..., Any], *arguments: Any) -> Any:
    """What it answers. A sync one runs in a thread, where it may use the ORM."""
    if iscoroutinefunction(hook):
        return await hook(*arguments)
    answer = await sync_to_async(hook)(*arguments)
    return await answer if isawaitable(answer) else answer

"""A streaming AI chat endpoint for Django that cannot overspend.

The path of a request, in the order of the files to read:

    views         POST /api/chat: the body read, every failure answered in the wire's words
    accounts      who pays: user, address, all strangers, site
    wires         what the client asked for
    prices        what its model costs: an operator's row, a setting, or the price list
    policy        the operators' profile and account rows, in force
    refusals      who was refused is so again without work, and counted
    limits        clamped by the code's HARD_CAPS, tightened by the request
    slots         a place in this process, of which strangers hold at most half
    conversation  the newest turns that fit, as every model takes them
    tokens        the most that the prompt can count, and the best guess
    ledger        reserve: all budgets or none; later settle, once. One transaction for many requests
    provider      one call of the model through the openai package, and what it really said
    holds         the same for a call that the site's own code makes: ``chatnest.hold``
    attempts      the calls until one answers, each held and counted
    alerts        operators are mailed: a budget runs out, a provider refuses the key
    stream        its pieces to frames, and one settlement however it ends
    deadlines     when waiting for the model ends, and when the reader hears a ping
    frames        what is made and not taken yet: bounded, so that a slow reader holds the provider back

Folders are rooms of several files; their docstrings name them. Beside the path: models, conf, errors, hooks, logs,
metrics (OpenTelemetry), asgi, admin, checks, receivers, routers, signals, testing, management/ and templatetags/; for
operators: reports, who used what and what it cost; changes, who changed what; proofs, that the sums are right; alerts;
operators, the Usage page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .holds import hold

__all__ = ["hold"]


def __getattr__(name: str) -> Any:
    """``hold`` needs models, which are there only once Django has begun."""
    if name == "hold":
        from .holds import hold

        return hold
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

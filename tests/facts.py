"""What can be known of one request: what its reader got, what the ledger wrote, what the provider received.

What is right of it is said by a fact's name, alone or with a relation: ``charged``, ``charged_at_most``, ``log_lacks``.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from django.db.models import Sum

from chatnest.conf import settings
from chatnest.models import DailyUsage, Reservation

from .provider_script import ScriptedProvider
from .reader import Reader, heard_line_by_line

RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "_at_least": lambda got, right: got is not None and got >= right,
    "_at_most": lambda got, right: got is not None and got <= right,
    "_contains": operator.contains,
    "_lacks": lambda got, right: right not in got,
    "_not": operator.ne,
}


def facts(
    reader: Reader,
    rows: list[Reservation],
    provider: ScriptedProvider,
    elsewhere: ScriptedProvider,
    records: Sequence[logging.LogRecord],
) -> dict[str, Any]:
    """All that a case may expect something of. ``charged`` is the sum of what the request's reservations cost."""
    row = rows[-1] if rows else Reservation()
    payer = (
        DailyUsage.objects.using(settings.DATABASE_ALIAS)
        .filter(account=row.payer)
        .aggregate(used=Sum("tokens_used", default=0))
    )
    asked = provider.requests[-1] if provider.requests else None
    sent = asked.body if asked else {}
    turns = [turn for turn in sent.get("messages", []) if turn["role"] != "system"]
    usage, error = reader.data("usage"), reader.error
    latin_1 = "utf-8" not in reader.headers.get("content-type", "")  # what requests takes it for
    formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
    return {
        # what the client got
        "status": reader.status,
        "header": list(reader.headers),
        "content_type": reader.headers.get("content-type"),
        "location": reader.headers.get("location"),
        "wire": reader.text,
        "broke": reader.broke,
        "left": reader.left,
        "seconds": round(reader.seconds, 2),
        "silence": round(reader.silence, 2),
        # what that says
        "events": reader.events,
        "last_event": reader.events[-1] if reader.events else None,
        "pings": [event for event, _ in reader.frames].count("ping"),
        "answer": reader.joined("token"),
        "reasoning": reader.joined("reasoning"),
        "answer_for_requests": heard_line_by_line(reader.raw.decode("latin-1" if latin_1 else "utf-8")),
        "answer_for_httpx": heard_line_by_line(reader.text),
        "usage": usage,
        "finish_reason": usage.get("finishReason"),
        "remaining": usage.get("remainingToday"),
        "error_code": error.get("code"),
        "error_message": error.get("message") or error.get("error"),
        "retryable": error.get("retryable"),
        # what the ledger wrote
        "reservations": len(rows),
        "payer": row.payer,
        "outcome": row.outcome,
        "usage_source": row.usage_source,
        "charged": sum(one.tokens_charged for one in rows),
        "used": payer["used"],
        # what the providers received
        "upstream_requests": len(provider.requests),
        "upstream_bytes": provider.bytes_sent,
        "path_sent": asked and asked.path,
        "head_sent": asked.head.lower() if asked else "",
        "sent": sent,
        "sent_max_tokens": sent.get("max_tokens", sent.get("max_completion_tokens")),
        "first_role_sent": turns[0]["role"] if turns else None,
        "roles_alternate": all(one["role"] != other["role"] for one, other in pairwise(turns)),
        "no_empty_message_sent": bool(turns) and all(turn["content"] for turn in turns),
        "last_content_sent": turns[-1]["content"] if turns else None,
        "heads_elsewhere": "".join(request.head for request in elsewhere.requests),
        # what the operator can read
        "log": "\n".join(formatter.format(record) for record in records),
        "log_levels": [record.levelname for record in records if record.name.startswith("chatnest")],
    }


def compared(expected: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """A line for each thing that is expected: whether it is so, and what is."""
    for what, right in expected.items():
        suffix = next((suffix for suffix in RELATIONS if what.endswith(suffix) and what not in known), "")
        got = known[what.removesuffix(suffix)]
        is_right = RELATIONS.get(suffix, operator.eq)(got, right)
        yield f"{'right' if is_right else 'WRONG'} {what}: {right!r}" + ("" if is_right else f", but got {got!r}")


def summary(known: dict[str, Any]) -> str:
    shown = ("status", "events", "answer", "error_code", "usage", "seconds", "outcome", "usage_source", "charged")
    told = [f"{name} {known[name]!r:.200}" for name in (*shown, "upstream_requests", "broke", "log")]
    return ", ".join(told)

"""Pausing accounts from their list, and letting them chat again: first a page that says what will change."""

from __future__ import annotations

from typing import Any, Final

from django.contrib import messages
from django.contrib.admin import ModelAdmin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db import models, transaction
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ..conf import settings
from ..errors import Paused
from ..models import Account, Reservation
from ..operators.words import number
from ..reports import people
from .columns import account
from .pages import acting

MOST_LISTED: Final = 100
REASON_LENGTH: Final = 200


def confirmed(
    page: Any, request: HttpRequest, queryset: models.QuerySet[Account], *, paused: bool
) -> HttpResponse | None:
    """The page that asks, or None once it was answered and done."""
    rows = list(queryset.exclude(paused=paused).select_related("profile"))
    if forbidden := [row.name for row in rows if not page.may_pause(request, row)]:
        page.message_user(request, _("You may not do that to %s.") % ", ".join(forbidden), messages.ERROR)
        return None
    if not rows:
        page.message_user(request, _("Nothing to do: they are so already."), messages.WARNING)
        return None
    if "confirmed" not in request.POST:
        return TemplateResponse(request, "admin/chatnest/account/pause.html", asked(page, request, rows, paused=paused))
    save(page, request, rows, paused=paused, reason=request.POST.get("reason", "").strip()[:REASON_LENGTH])
    return None


def save(page: ModelAdmin, request: HttpRequest, rows: list[Account], *, paused: bool, reason: str) -> None:
    """Each row by itself, so that who listens to it hears: the process that serves this page obeys at once."""
    with acting(request, reason), transaction.atomic(using=rows[0]._state.db):
        for row in rows:
            row.paused = paused
            row.save(update_fields=["paused"])
            done = _("Paused.") if paused else _("Let chat again.")
            page.log_change(request, row, f"{done} {reason}".strip())
    count = number(len(rows))
    if paused:
        text = ngettext("%s account is paused.", "%s accounts are paused.", len(rows)) % count
    else:
        text = ngettext("%s account may chat again.", "%s accounts may chat again.", len(rows)) % count
    page.message_user(request, text, messages.SUCCESS)


def asked(page: ModelAdmin, request: HttpRequest, rows: list[Account], *, paused: bool) -> dict[str, Any]:
    """What the page says."""
    listed = rows[:MOST_LISTED]
    known = people(row.name for row in listed)
    ending = number(answers_ending(rows)) if paused else ""
    return {
        **page.admin_site.each_context(request),
        "title": _("Pause accounts") if paused else _("Let accounts chat again"),
        "opts": page.opts,
        "media": page.media,
        "listed": [account(row.name, known) for row in listed],
        "more": number(len(rows) - len(listed)) if len(rows) > len(listed) else "",
        "paused": paused,
        "ending": ending,
        "read": Paused.message,
        "action": "pause" if paused else "resume",
        "checkbox": ACTION_CHECKBOX_NAME,
        "chosen": [] if request.POST.get("select_across") == "1" else request.POST.getlist(ACTION_CHECKBOX_NAME),
        "reason_length": REASON_LENGTH,
    }


def answers_ending(rows: list[Account]) -> int:
    """How many answers that are written now are paid from one of these accounts."""
    open_now = Reservation.objects.using(settings.DATABASE_ALIAS).open()
    return len(open_now.charging([row.name for row in rows]))

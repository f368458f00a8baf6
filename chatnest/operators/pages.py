"""The Usage page and those that it leads to, in the admin of any site."""

from __future__ import annotations

import csv
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any, Final
from urllib.parse import urlencode

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import connections, transaction
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.http.response import HttpResponseBase
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.decorators import method_decorator
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from .. import ledger
from ..accounts import SITE, canonical, is_name, misnamed
from ..changes import acting
from ..conf import moment, settings, today
from ..models import Reservation, Usage
from ..proofs import prove
from ..reports import PERIODS, Period, csv_rows, find, people
from . import account
from .actions import ACTIONS, Action, Target, meant
from .charts import stacked
from .costs import Bill, CompareForm
from .facts import facts, refused_by_reason
from .now import Snapshot
from .standing import Standing
from .words import number

TEMPLATES: Final = "admin/chatnest/usage"

View = Callable[..., HttpResponseBase]


@admin.register(Usage)
class UsageAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """No list of rows: pages of its own. Each sees them who may view usage; each action has its own permission."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_urls(self) -> list[URLPattern]:
        pages: dict[str, tuple[str, View]] = {
            "changelist": ("", self.now),
            "account": ("account/", self.account),
            "costs": ("costs/", self.costs),
            "csv": ("usage.csv", self.csv),
            "find": ("find/", self.find),
            "do": ("do/<str:action>/", self.do),
            "prove": ("prove/", self.prove),
        }
        return [
            path(
                route, _outside_transactions(self.admin_site.admin_view(self.seen(view))), name=f"chatnest_usage_{name}"
            )
            for name, (route, view) in pages.items()
        ]

    def seen(self, view: View) -> View:
        """By those who may, before anything is read."""

        @wraps(view)
        def checked(request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
            if not self.has_view_permission(request):
                raise PermissionDenied
            return view(request, **kwargs)

        return checked

    def page(self, request: HttpRequest, template: str, **context: Any) -> TemplateResponse:
        may = {name for name, action in ACTIONS.items() if _may(request, action)}
        shared = {
            "opts": Usage._meta,
            "may": may,
            "moment": moment(),
            "day_ends": ledger.day_ends(today()),
            "periods": {name: label for name, label in PERIODS.items() if name != "custom"},
        }
        return TemplateResponse(
            request, f"{TEMPLATES}/{template}.html", {**self.admin_site.each_context(request), **shared, **context}
        )

    @method_decorator(require_GET)
    def now(self, request: HttpRequest) -> HttpResponse:
        who = request.GET.get("who", "")
        snapshot = Snapshot(who)
        return self.page(
            request,
            "now",
            title=_("Usage"),
            tab="now",
            who=who,
            snapshot=snapshot,
            facts=facts(snapshot),
            reasons=refused_by_reason(snapshot.traffic.now),
            budgets=_budgets(snapshot),
            high=sum(one.is_high for one in snapshot.others),
            shut=sum(one.is_shut_out for one in snapshot.others),
        )

    @method_decorator(require_GET)
    def account(self, request: HttpRequest) -> HttpResponse:
        name = canonical(request.GET.get("name", "").strip())
        if not is_name(name):
            raise Http404
        history = account.read(name)
        month = history.month
        person = people([name, *(row.payer for row in history.answers)])
        return self.page(
            request,
            "account",
            title=person[name].name if name in person else name,
            name=name,
            history=history,
            problem=None if history.is_known else misnamed(name),
            chart=stacked(month.days, {"": month.used}, number),
            people=person,
        )

    @method_decorator(require_GET)
    def costs(self, request: HttpRequest) -> HttpResponse:
        period, problem = _period(request)
        bill, compare = Bill(period), CompareForm(request.GET if "invoice" in request.GET else None)
        invoice = compare.cleaned_data["invoice"] if compare.is_valid() else None
        asked = _asked(period)
        return self.page(
            request,
            "costs",
            title=_("Costs"),
            period=period,
            problem=problem,
            bill=bill,
            compare=compare,
            compared=None if invoice is None else bill.compared(invoice),
            asked=asked.items(),
            query=urlencode(asked),
        )

    @method_decorator(require_GET)
    def csv(self, request: HttpRequest) -> HttpResponse:
        """For a bookkeeper: a line for each bill's line and day, or, with ``whole``, for the period."""
        period, _problem = _period(request)
        response = HttpResponse(content_type="text/csv; charset=utf-8")  # under ASGI Django would stream no sooner
        response["Content-Disposition"] = f'attachment; filename="chatnest-{period.first}-{period.last}.csv"'
        csv.writer(response).writerows(csv_rows(period, daily="whole" not in request.GET))
        return response

    @method_decorator(require_GET)
    def find(self, request: HttpRequest) -> HttpResponse:
        """An account's page, where one is meant; else those that may be."""
        typed = request.GET.get("q", "").strip()
        found = find(typed) if typed else []
        if len(found) == 1:
            return HttpResponseRedirect(_account_page(found[0]))
        return self.page(request, "find", title=_("Search: %s") % typed, typed=typed, found=found, people=people(found))

    def do(self, request: HttpRequest, action: str) -> HttpResponse:
        """What it will change, and whether to; then it is done."""
        if action not in ACTIONS:
            raise Http404
        target = _target(request)
        asked = ACTIONS[meant(action, target.account)]
        if not _may(request, asked):
            raise PermissionDenied
        form = asked.form(target, request.POST if request.method == "POST" else None)
        back = request.GET.get("next", "")
        if not url_has_allowed_host_and_scheme(back, {request.get_host()}, request.is_secure()):
            back = reverse("admin:chatnest_usage_changelist")
        if request.method == "POST" and form.is_valid():
            try:
                self.message_user(request, _do(request, asked, target, form.cleaned_data), messages.SUCCESS)
                return HttpResponseRedirect(back)
            except ValidationError as error:
                form.add_error(None, error.messages)
        title = str(asked.title)
        return self.page(
            request,
            "do",
            title=title % target.name if "%s" in title else title,
            action=asked,
            target=target,
            will=asked.will(target),
            form=form,
            back=back,
        )

    @method_decorator(require_POST)
    def prove(self, request: HttpRequest) -> HttpResponse:
        """All sums, now."""
        with acting(request.user.get_username()):
            found = prove()
        if found:
            text = _("%d sums differ from their rows. Run manage.py chatnest_verify to see them.") % len(found)
            self.message_user(request, text, messages.ERROR)
        else:
            self.message_user(request, _("Every counter is proven by its rows."), messages.SUCCESS)
        return HttpResponseRedirect(reverse("admin:chatnest_usage_changelist"))


def _outside_transactions(view: View) -> View:
    """The ledger has its own, tried again where another is in the way; within ATOMIC_REQUESTS' it could not be."""
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view


def _budgets(snapshot: Snapshot) -> list[tuple[Standing, str, datetime | None]]:
    """The shared budgets, each with when it is used up at the pace of these hours."""
    site, strangers = snapshot.budgets
    traffic = snapshot.traffic
    return [
        (site, _("The site"), site.used_up_at(traffic.tokens, traffic.seconds)),
        (strangers, _("Strangers"), strangers.used_up_at(traffic.tokens_of_strangers, traffic.seconds)),
    ]


def _period(request: HttpRequest) -> tuple[Period, str]:
    """What was asked for, or this month and what is wrong with it."""
    typed = request.GET
    try:
        return Period.parse(typed.get("period", ""), typed.get("from", ""), typed.get("to", "")), ""
    except ValueError as error:
        return Period.parse("month"), str(error)


def _asked(period: Period) -> dict[str, str]:
    """The address of that period."""
    if period.name == "custom":
        return {"from": str(period.first), "to": str(period.last)}
    return {"period": period.name}


def _may(request: HttpRequest, action: Action) -> bool:
    return request.user.has_perm(f"chatnest.{action.permission}")


def _do(request: HttpRequest, action: Action, target: Target, typed: dict[str, Any]) -> str:
    """What was changed. Raises ValidationError."""
    actor = request.user.get_username()
    with acting(actor, typed["reason"]):
        return action.do(target, typed, actor)


def _target(request: HttpRequest) -> Target:
    """Raises Http404."""
    account, answer = canonical(request.GET.get("name", SITE)), None
    if pk := request.GET.get("answer"):
        try:
            answer = Reservation.objects.using(settings.DATABASE_ALIAS).get(pk=pk)
        except (Reservation.DoesNotExist, ValidationError) as error:
            raise Http404 from error
        account = answer.payer
    if not is_name(account):
        raise Http404
    person = people([account]).get(account)
    return Target(account, person.name if person else account, answer)


def _account_page(name: str) -> str:
    return f"{reverse('admin:chatnest_usage_account')}?{urlencode({'name': name})}"

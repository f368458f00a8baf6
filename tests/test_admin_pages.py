"""The admin's pages in a real browser: read by axe-core, in light and dark, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client as Session
from django.urls import reverse
from django.utils import timezone
from playwright.sync_api import Browser, Locator, Page, expect

from chatnest.conf import today
from chatnest.models import (
    Account,
    Adjustment,
    Calibration,
    Change,
    DailyUsage,
    Price,
    Profile,
    Refusal,
    Reservation,
    UsageLine,
)

from .client import Client
from .conftest import close, on_sqlite

pytestmark = on_sqlite

Visit = Callable[..., Page]
DESK: Any = {"width": 1280, "height": 800}
PHONE: Any = {"width": 390, "height": 844}

# Django's own: the box that select2 draws in a select's place has no name, and links in the breadcrumbs no underline.
DJANGOS = [".select2-container", ".breadcrumbs"]


@pytest.fixture
def a_day(database: str) -> None:
    """What a site has after a day: people, decisions, answers, refusals, money."""
    ada = User.objects.create_user("ada", "ada@example.org", pk=35, first_name="Ada", last_name="Lovelace")
    now, day = timezone.now(), today()
    vip = Profile.objects.get(name="expanded")
    vip.pk, vip.name, vip.daily_token_limit, vip.enabled = None, "vip", 900_000, False
    vip.save()
    Account.objects.create(name=f"user:{ada.pk}", paused=True, daily_token_limit=50_000, daily_money_limit="2.50")
    Account.objects.create(name="ip:2001:db8:1234:5678::", profile=Profile.objects.get(name="constrained"))
    for account, used in [("site", 1_234_567), (f"user:{ada.pk}", 1_204_000), ("user:3500", 30_567)]:
        DailyUsage.objects.create(
            day=day, account=account, tokens_used=used, tokens_reserved=12_000, requests=1234, cost_used=5_600_000
        )
        UsageLine.objects.create(
            day=day, account=account, profile="balanced", model="gpt-4o-mini", requests=1234, cost=1_230_450, unpriced=3
        )
        UsageLine.objects.create(day=day, account=account, profile="vip", model="llama", requests=1, unpriced=1)
        Refusal.objects.create(
            day=day,
            hour=now,
            account=account,
            code="daily_budget_exceeded",
            count=12_345,
            last_at=now,
            last_detail="31st request in 60 s; 30 allowed by balanced",
        )
    for number, cost in enumerate([None, 0, 1_234, 12_345_678_900]):
        Reservation.objects.create(
            day=day,
            payer=f"user:{ada.pk}",
            accounts=[f"user:{ada.pk}", "site"],
            profile="balanced",
            model="gpt-4o-mini",
            tokens=3000,
            state="settled",
            outcome="completed",
            usage_source="reported",
            tokens_charged=1234 + number,
            cost=cost,
            created_at=now - timedelta(minutes=number),
            expires_at=now,
            settled_at=now,
        )
    Reservation.objects.create(
        day=day,
        payer=f"user:{ada.pk}",
        accounts=[f"user:{ada.pk}", "site"],
        profile="balanced",
        model="gpt-4o-mini",
        tokens=3000,
        created_at=now,
        expires_at=now + timedelta(seconds=30),
    )
    Adjustment.objects.create(
        day=day, account="user:35", tokens=-1000, kind="forgiven", reason="the demo", actor="grace", created_at=now
    )
    Calibration.objects.create(provider="default", model="llama", reports=1234, reasons_unseen=True, updated_at=now)
    Price.objects.create(provider="default", model="gpt-4o-mini", input="0.15", output="0.6", cached_input="0.075")
    Change.objects.create(
        at=now, actor="grace", kind="price", subject="default: gpt-4o-mini", field="input", old="0.2", new="0.15"
    )
    Change.objects.create(
        at=now, actor="grace", kind="account", subject="user:35", field="paused", old="False", new="True", reason="spam"
    )


@pytest.fixture
def visit(browser: Browser, client: Client, a_day: None) -> Iterator[Visit]:
    """A page of the admin, as somebody sees it: ``visit(user, "account_changelist")``."""
    contexts: list[Any] = []

    def visit(user: User, name: str, *args: Any) -> Page:
        session = Session()
        session.force_login(user)
        context = browser.new_context(viewport=DESK)
        context.set_default_timeout(10_000)
        contexts.append(context)
        cookie = session.cookies[settings.SESSION_COOKIE_NAME].value
        origin = f"http://127.0.0.1:{client.port}"
        context.add_cookies([{"name": settings.SESSION_COOKIE_NAME, "value": cookie, "url": origin}])
        page = context.new_page()
        page.goto(origin + reverse(f"admin:{name}", args=args))
        return page

    yield visit
    for context in contexts:
        close(context)


@pytest.fixture
def grace(database: str) -> User:
    return User.objects.create_superuser("grace")


LISTED = [
    *(Account, Adjustment, Calibration, Change, DailyUsage, Price, Profile, Refusal, Reservation, UsageLine),
]
PLACES = [
    *((model, "changelist") for model in LISTED),
    *((model, "change") for model in LISTED),
    *((model, "add") for model in (Account, Price, Profile)),
    *((model, "delete") for model in (Account, Price, Profile, Calibration)),
    (Account, "pause"),
]


def go(visit: Visit, user: User, model: Any, place: str) -> Page:
    name = f"chatnest_{model._meta.model_name}"
    if place == "pause":
        page = visit(user, f"{name}_changelist")
        choose(page, "anonymous", "site", action="Pause selected accounts")
        return page
    row = model.objects.filter(name__in=["user:35", "vip"]).first() if model in (Account, Profile) else None
    row = row or model.objects.first()
    return visit(user, f"{name}_{place}", *([row.pk] if place in ("change", "delete") else []))


def row_of(page: Page, account: str) -> Locator:
    return page.locator("tr", has=page.get_by_role("link", name=account, exact=True))


def choose(page: Page, *accounts: str, action: str) -> None:
    for name in accounts:
        row_of(page, name).get_by_role("checkbox").check()
    page.get_by_label("Action:").select_option(action)
    page.locator("button[name=index]").click()  # "Go", and since Django 6.1 "Run"


@pytest.mark.parametrize(("model", "place"), PLACES, ids=lambda part: getattr(part, "__name__", part))
def test_every_page_is_read_without_seeing_it_all_or_well(visit: Visit, grace: User, model: Any, place: str) -> None:
    page = go(visit, grace, model, place)
    page.add_style_tag(content="* { transition: none !important }")  # else colours are seen on their way
    for size in (DESK, PHONE):
        page.set_viewport_size(size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "the page scrolls sideways"
        cut = "[...document.querySelectorAll('.results')].some(box => box.scrollWidth > box.clientWidth)"
        assert not page.evaluate(cut), "the list has columns that are not seen"
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = Axe().run(page, context={"exclude": DJANGOS}).response["violations"]
            assert [(one["id"], node["html"], node["failureSummary"]) for one in found for node in one["nodes"]] == []


def test_an_operator_pauses_somebody_and_a_colleague_reads_why(visit: Visit, grace: User) -> None:
    page = visit(grace, "chatnest_account_changelist")
    choose(page, "anonymous", action="Pause selected accounts")
    expect(page.get_by_role("heading", level=1)).to_have_text("Pause accounts")
    page.get_by_label("Reason:").fill("they repeat themselves")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".messagelist")).to_contain_text("1 account is paused.")
    expect(row_of(page, "anonymous").locator(".field-state")).to_have_text("Paused")
    page.get_by_role("link", name="anonymous", exact=True).click()
    page.get_by_role("link", name="History").click()
    expect(page.locator("#change-history")).to_contain_text("Paused. they repeat themselves")


def test_an_operator_finds_a_user_by_name_and_pauses_her(visit: Visit, grace: User) -> None:
    User.objects.create_user("marie", first_name="Marie", last_name="Curie", pk=1867)
    page = visit(grace, "chatnest_account_add")
    page.locator(".select2-selection").first.click()
    page.locator(".select2-search__field").fill("curie")
    page.get_by_role("option", name="marie").click()
    page.get_by_label("Paused").check()
    page.get_by_role("button", name="Save", exact=True).click()
    row = row_of(page, "user:1867")
    expect(row.locator(".field-who")).to_have_text("Marie Curie")
    expect(row.locator(".field-state")).to_have_text("Paused")

"""The thirteen jobs of a person on call, in a real browser against the real server, with the clicks counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta

import pytest
from axe_playwright_python.sync_playwright import Axe
from django.contrib.auth.models import User
from playwright.sync_api import Browser, Page, expect

from chatnest.conf import now, today
from chatnest.models import Account, DailyUsage, Refusal, Reservation, UsageLine
from chatnest.testing import FakeUpstream, Reply

from .client import Client
from .conftest import Configure, close, on_sqlite
from .test_operators import hold

pytestmark = on_sqlite

MOST_CLICKS = 4
PASSWORD = "correct horse"


class OnCall:
    """Somebody on call, on the Usage page; each click counts."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.clicks = 0

    def start(self) -> None:
        """A new job: the Usage page, which is bookmarked."""
        self.page.wait_for_load_state("networkidle")
        self.page.goto(self.address)
        self.clicks = 0

    def click(self, name: str, *, within: str = "main", role: str = "link", first: bool = False) -> None:
        self.page.wait_for_load_state("load")
        found = self.page.locator(within).get_by_role(role, name=name, exact=True)  # type: ignore[arg-type]
        (found.first if first else found).click()
        self.clicks += 1
        assert self.clicks <= MOST_CLICKS

    def press(self, name: str) -> None:
        self.click(name, role="button")

    def row(self, text: str) -> str:
        return f'tr:has-text("{text}")'

    def sees(self, text: str) -> None:
        expect(self.page.locator("main")).to_contain_text(text)


@pytest.fixture
def ada(database: str) -> User:
    return User.objects.create_user("ada", "ada@example.org", first_name="Ada", last_name="Lovelace")


@pytest.fixture
def site(database: str, ada: User) -> None:
    """A day on which something happened."""
    account, day, at = f"user:{ada.pk}", today(), now()
    for name in (account, "site"):
        DailyUsage.objects.create(day=day, account=name, tokens_used=150_000, requests=12)
        line = {"profile": "balanced", "model": "gpt-4o-mini", "requests": 12, "tokens_reported": 150_000}
        UsageLine.objects.create(day=day, account=name, cost=45_000, **line)
    hour = at.replace(minute=0, second=0, microsecond=0)
    detail = "request 31 in 60 s; balanced allows 30"
    Refusal.objects.create(
        day=day, hour=hour, account=account, code="rate_limited", count=7, last_at=at, last_detail=detail
    )
    failed = {"outcome": "upstream_error", "error": "upstream_timeout", "state": "settled", "settled_at": at}
    Reservation.objects.create(
        day=day, payer=account, accounts=[account, "site"], profile="balanced", model="gpt-4o-mini", tokens=900,
        created_at=at - timedelta(minutes=2), expires_at=at, **failed,
    )  # fmt: skip


@pytest.fixture
def page(browser: Browser, client: Client, site: None) -> Iterator[Page]:
    User.objects.create_superuser("operator", password=PASSWORD)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{client.port}/admin/login/?next=/admin/")
    page.get_by_label("Username").fill("operator")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/admin/")
    yield page
    close(context)


@pytest.fixture
def on_call(page: Page, client: Client) -> OnCall:
    return OnCall(page, f"http://127.0.0.1:{client.port}/admin/chatnest/usage/")


def test_the_thirteen_jobs_in_four_clicks_at_most(
    on_call: OnCall, client: Client, upstream: FakeUpstream, ada: User, configure: Configure
) -> None:
    configure(LEASE_SECONDS=3)  # a third of it, and whoever writes an answer knows that it was stopped
    account = f"user:{ada.pk}"

    # 1. Is something wrong now? It is the page itself.
    on_call.start()
    on_call.sees("100 % bad")  # the one answer of these hours failed
    on_call.sees("the provider took too long")

    # 2. Who uses the most, and how much of their limit? So is that.
    on_call.sees("Ada Lovelace")
    on_call.sees("150,000 / 200,000")

    # 3. Why was somebody refused?
    on_call.start()
    on_call.page.get_by_role("searchbox", name="Find").fill("ada@example.org")
    on_call.press("Find")
    on_call.sees("too many requests in a short time")
    on_call.sees("request 31 in 60 s; balanced allows 30")
    assert on_call.clicks == 1

    # 4. Find a user by name: what is in force for them, and why?
    on_call.start()
    on_call.page.get_by_role("searchbox", name="Find").fill("lovelace")
    on_call.press("Find")
    on_call.sees("of 200,000 tokens (200,000 by expanded)")

    # 5. Stop the chat for everybody.
    on_call.start()
    on_call.click("Stop the chat for everybody")
    on_call.page.get_by_label("Reason").fill("the model swears")
    on_call.press("Stop the chat")
    on_call.sees("The chat is stopped. By operator, since")
    assert on_call.clicks == 2
    assert client.chat().status == 503

    # 6. Start it again.
    on_call.start()
    on_call.click("Start again")
    on_call.press("Start the chat")
    upstream.replies(Reply("Well."))
    assert client.chat().status == 200

    # 7. Forgive what somebody has used today.
    on_call.start()
    on_call.click("Forgive today", within=on_call.row("Ada Lovelace"), first=True)
    on_call.press("Forgive")
    on_call.sees("Forgiven: 150,000 tokens of Ada Lovelace.")

    # 8. Give somebody more today.
    on_call.start()
    on_call.click("Give more", within=on_call.row("Ada Lovelace"), first=True)
    on_call.page.get_by_label("More tokens today").fill("20000")
    on_call.press("Give")
    on_call.sees("Today's limit of Ada Lovelace is 220,000 tokens now.")

    # 9. Lower somebody's limit.
    on_call.start()
    on_call.click("Lower", within=on_call.row("Ada Lovelace"), first=True)
    on_call.page.get_by_label("Tokens a day").fill("5000")
    on_call.press("Set the limit")
    assert Account.objects.get(name=account).daily_token_limit == 5000

    # 10. Pause somebody, and let them chat again.
    on_call.start()
    on_call.click("Pause", within=on_call.row("Ada Lovelace"), first=True)
    on_call.press("Pause")
    on_call.sees("Paused: Ada Lovelace.")
    on_call.click("Let chat again", within=on_call.row("Ada Lovelace"), first=True)
    on_call.press("Let it chat again")
    assert not Account.objects.get(name=account).paused

    # 11. End one answer that runs on and on.
    upstream.replies(Reply("Once", " upon", gate_after=1))
    with client.stream() as story:
        story.until("token")
        on_call.start()
        on_call.click("Stop this one")
        on_call.press("End it")
        on_call.sees("The answer ends within 15 seconds.")
        assert Reservation.objects.latest("created_at").outcome == "stopped"
        assert json.loads(story.until("error")[1])["code"] == "paused"

    # 12. What do we owe this month, by model and by whom; and a CSV of it.
    on_call.start()
    on_call.click("This month")
    on_call.sees("0.045 USD")
    on_call.sees("Ada Lovelace")
    with on_call.page.expect_download() as download:
        on_call.click("CSV, a line a day")
    assert "Ada Lovelace,ada@example.org" in download.value.path().read_text()
    assert on_call.clicks == 2

    # 13. Who changed what, and are the sums right?
    on_call.start()
    on_call.sees("the model swears")
    on_call.press("Prove now")
    on_call.sees("Proven")


LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}},
    "tablet": {"viewport": {"width": 800, "height": 1100}},
    "forced colours": {"viewport": {"width": 1280, "height": 900}, "forced_colors": "active"},
}
PAGES = {
    "now": "",
    "nobody": "?who=shut",
    "account": "account/?name={account}",
    "costs": "costs/?period=month&invoice=1",
    "wrong period": "costs/?from=x",
    "search": "find/?q=o",
    "stop": "do/stop/",
    "pause": "do/pause/?name={account}",
    "grant": "do/grant/?name={account}",
}
OURS = ".cn"  # the rest is Django's


@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_read_every_page(browser: Browser, page: Page, client: Client, ada: User, look: str) -> None:
    hold(f"user:{ada.pk}")
    Account.objects.filter(name="site").update(paused=True)  # so that there is an alarm
    context = browser.new_context(**LOOKS[look], storage_state=page.context.storage_state())
    looked = context.new_page()
    for name, path in PAGES.items():
        looked.goto(f"http://127.0.0.1:{client.port}/admin/chatnest/usage/{path.format(account=f'user:{ada.pk}')}")
        found = Axe().run(looked, context=OURS)
        assert found.violations_count == 0, f"{name}: {found.generate_report()}"
        width = looked.evaluate("document.documentElement.scrollWidth")
        assert width <= looked.viewport_size["width"], f"{name} is {width} px wide"
        looked.wait_for_load_state("networkidle")
    context.close()

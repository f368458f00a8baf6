"""The Usage page and its actions: what an operator reads there is so, and what they do there works and is recorded."""

from __future__ import annotations

import csv
import io
import re
from datetime import datetime, timedelta
from html import unescape
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection, connections
from django.test import Client as Browser
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from freezegun import freeze_time

from chatnest.accounts import ANONYMOUS, SITE
from chatnest.conf import now, today
from chatnest.ledger import Reserve, apply, todays_budgets
from chatnest.ledger.operations import Hold
from chatnest.models import Account, Adjustment, Change, DailyUsage, Refusal, Reservation, UsageLine
from chatnest.operators.now import Snapshot
from chatnest.operators.traffic import Hours
from chatnest.testing import FakeUpstream, Reply

from .client import Client
from .conftest import Configure, EditProfile, on_sqlite


@pytest.fixture
def ada(database: str) -> User:
    return User.objects.create_user("ada", "ada@example.org", first_name="Ada", last_name="Lovelace")


@pytest.fixture
def operator(database: str) -> Browser:
    User.objects.create_user("one", pk=1)
    User.objects.create_user("two", pk=2)
    browser = Browser()
    browser.force_login(User.objects.create_superuser("operator"))
    return browser


def staff(*permissions: str) -> Browser:
    user = User.objects.create_user("grace", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    browser = Browser()
    browser.force_login(user)
    return browser


def address(page: str, **query: str) -> str:
    return reverse(f"admin:chatnest_usage_{page}", query=query or None)


def text_of(browser: Browser, page: str = "changelist", **query: str) -> str:
    """What stands on the page, in one line."""
    response = browser.get(address(page, **query))
    assert response.status_code == 200
    return told(response)


def told(response: Any) -> str:
    main = response.content.decode().partition('<main id="content-start"')[2].partition("</main>")[0]
    words = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", main))).strip()
    return re.sub(r" (?=[.,:)])", "", words)


def do(browser: Browser, action: str, account: str = SITE, **typed: Any) -> Any:
    path = f"{reverse('admin:chatnest_usage_do', args=[action])}?name={account}"
    return browser.post(path, typed, follow=True)


def hold(account: str, tokens: int = 1000) -> Hold:
    """An answer that is being written, of the ledger's own making."""
    accounts = dict.fromkeys([account, *([ANONYMOUS] if account.startswith("ip:") else []), SITE], 500_000)
    ask = Reserve(
        budgets=todays_budgets(accounts),
        profile="balanced",
        model="gpt-4o-mini",
        prompt_tokens=tokens - 400,
        max_output_tokens=400,
        min_output_tokens=64,
        rate_max_requests=1000,
        rate_window_seconds=60,
        max_concurrent_streams=100,
    )
    (held,) = apply([ask])
    assert isinstance(held, Hold)
    return held


def answer(database: str, account: str, at: datetime, **facts: Any) -> Reservation:
    """One that is over."""
    usual = {
        "day": today(),
        "payer": account,
        "accounts": [account, SITE],
        "profile": "balanced",
        "model": "gpt-4o-mini",
        "tokens": 900,
        "created_at": at,
        "expires_at": at,
        "settled_at": at,
        "state": "settled",
        "outcome": "completed",
        "usage_source": "reported",
        "tokens_charged": 400,
    }
    return Reservation.objects.using(database).create(**{**usual, **facts})


def refuse(database: str, account: str, code: str, count: int, at: datetime, detail: str = "") -> None:
    hour = at.replace(minute=0, second=0, microsecond=0)
    facts = {"day": today(), "hour": hour, "last_at": at, "last_detail": detail}
    Refusal.objects.using(database).create(account=account, code=code, count=count, **facts)


def use(database: str, account: str, tokens: int, **more: Any) -> None:
    DailyUsage.objects.using(database).create(day=today(), account=account, tokens_used=tokens, requests=1, **more)


# What it says.


def test_a_new_site_has_a_page_too(operator: Browser, database: str) -> None:
    page = text_of(operator)
    assert "Stop the chat for everybody" in page
    assert "0 used, 0 reserved, of 500,000 tokens (500,000 by SITE_DAILY_TOKEN_LIMIT)" in page
    assert "0 used, 0 reserved, of 100,000 tokens (100,000 by ANONYMOUS_DAILY_TOKEN_LIMIT)" in page
    assert "Running answers (0)" in page and "Nobody." in page and "Not yet." in page


def test_it_stands_first_under_the_app(operator: Browser, database: str) -> None:
    listed = re.findall(r'<a href="/admin/chatnest/(\w+)/"', operator.get("/admin/chatnest/").content.decode())
    assert listed[0] == "usage"


def test_who_uses_how_much_by_name(operator: Browser, database: str, ada: User) -> None:
    use(database, f"user:{ada.pk}", 150_000)
    use(database, "ip:192.0.2.7", 1200)
    held = hold("ip:192.0.2.7")
    page = text_of(operator)
    assert f"Ada Lovelace ada@example.org · user:{ada.pk}" in page
    assert "150,000 / 200,000" in page
    assert "ip:192.0.2.7 1,200 + 1,000 / 200,000 ok" in page
    assert "Running answers (1)" in page and str(held.id) in operator.get(address("changelist")).content.decode()


def test_who_is_high_and_who_is_shut_out(operator: Browser, database: str, edit_profile: EditProfile) -> None:
    edit_profile("vip", daily_token_limit=1000)
    for name, used in (("user:1", 1000), ("user:2", 850), ("user:3", 10)):
        Account.objects.using(database).create(name=name, profile_id=_profile(database, "vip"))
        use(database, name, used)
    Account.objects.using(database).create(name="user:4", paused=True)  # and has used nothing

    def who(asked: str) -> set[str]:
        return {one.account for one in Snapshot(asked).who}

    assert who("") == {"user:1", "user:2", "user:3", "user:4"}
    assert who("high") == {"user:1", "user:2"}
    assert who("shut") == {"user:1", "user:4"}
    page = text_of(operator)
    assert "Above 80 % (2)" in page and "Shut out (2)" in page


def _profile(database: str, name: str) -> int:
    from chatnest.models import Profile

    return Profile.objects.using(database).get(name=name).pk


def test_somebody_refused_for_a_small_budget_is_listed_beside_many_who_used_more(database: str) -> None:
    for number in range(120):
        use(database, f"user:{number}", 10_000 + number)
    Account.objects.using(database).create(name="user:999", daily_token_limit=50)
    use(database, "user:999", 50)
    refuse(database, "user:999", "daily_budget_exceeded", 3, now())
    listed = {one.account: one for one in Snapshot().who}
    assert "user:119" in listed and "user:0" not in listed
    assert listed["user:999"].is_shut_out and listed["user:999"].refused == 3


def test_figures_stand_beside_yesterdays_with_a_word(operator: Browser, database: str) -> None:
    hours = Hours.current()
    before = hours.before[0] + timedelta(minutes=90)
    for number in range(20):
        answer(database, "user:1", hours.now, first_token_ms=100 * number + 70)
        answer(database, "user:1", before, first_token_ms=270)
    for _ in range(5):
        answer(database, "user:2", hours.now, outcome="upstream_error", error="upstream_timeout")
    refuse(database, "user:3", "rate_limited", 75, hours.now, "request 31 in 60 s; balanced allows 30")
    refuse(database, "user:3", "rate_limited", 5, before)
    page = text_of(operator)
    assert "Failed 20 % bad yesterday 0.0 %" in page
    assert "Refused 75 % bad yesterday 20 %" in page
    assert "half of them within 1.0 s ok yesterday 0.3 s" in page
    assert "95 % of them within 1.9 s ok yesterday 0.3 s" in page
    assert "75 % too many requests in a short time" in page
    assert "request 31 in 60 s; balanced allows 30" in page
    assert "the provider took too long" in page


def test_yesterdays_other_hours_and_older_ones_are_in_no_figure(database: str) -> None:
    hours = Hours.current()
    start, end = hours.before
    for at in (start - timedelta(seconds=1), end, hours.since - timedelta(seconds=1)):
        answer(database, "user:1", at)
    assert Snapshot().traffic.before.started == Snapshot().traffic.now.started == 0


def test_when_the_day_is_used_up_at_this_pace(operator: Browser, database: str) -> None:
    with freeze_time("2026-11-25 12:30:00+00:00"):
        hours = Hours.current()
        assert (hours.now - hours.since).total_seconds() == 90 * 60
        answer(database, "user:1", hours.now, tokens_charged=90_000)  # a thousand a minute
        use(database, SITE, 400_000)
        assert "At this pace it is used up at 14:10." in text_of(operator)
    with freeze_time("2026-11-25 23:30:00+00:00"):
        assert "At this pace" not in text_of(operator)  # nothing was asked, and the day is nearly over


def test_who_stopped_the_chat_since_when_and_why(operator: Browser, database: str) -> None:
    assert "The chat is stopped" not in text_of(operator)
    shown = text_of(operator, "changelist")
    assert "Start again" not in shown
    page = told(do(operator, "stop", reason="the model swears"))
    assert "The chat is stopped. By operator, since" in page
    assert "“the model swears”" in page
    assert "Start again" in page
    assert "The chat is stopped" not in told(do(operator, "start"))


def test_processes_died(operator: Browser, database: str) -> None:
    at = now() - timedelta(hours=3)
    answer(database, "user:1", at, state="expired", outcome="expired", usage_source="held")
    answer(database, "user:1", at - timedelta(days=2), state="expired", outcome="expired", usage_source="held")
    assert "A process died: 1 answer was charged in full." in text_of(operator)


def test_the_provider_refuses_our_key_until_it_answers_again(operator: Browser, database: str) -> None:
    at = now() - timedelta(minutes=20)
    answer(database, "user:1", at, outcome="upstream_error", error="upstream_misconfigured")
    told = "The provider default refuses us for gpt-4o-mini:"
    assert told in text_of(operator)
    answer(database, "user:1", at - timedelta(minutes=1))
    assert told in text_of(operator)
    answer(database, "user:1", at + timedelta(minutes=1))
    assert told not in text_of(operator)


def test_ten_queries_whatever_the_site_has(operator: Browser, database: str, ada: User) -> None:
    for number in range(30):
        use(database, f"user:{number + 100}", number)
        hold(f"user:{number + 100}")
        answer(database, f"user:{number + 100}", now(), outcome="timed_out")
        refuse(database, f"user:{number + 100}", "daily_budget_exceeded", 3, now())
    do(operator, "pause", f"user:{ada.pk}")
    operator.post(address("prove"))
    with CaptureQueriesContext(connection) as ours, CaptureQueriesContext(connections[database]) as ledgers:
        text_of(operator)
    seen = {query["sql"] for query in [*ours.captured_queries, *ledgers.captured_queries]}
    assert len(seen) <= 10, "\n".join(sorted(seen))


# What can be done.


def test_the_chat_is_stopped_and_started_for_a_real_visitor(
    operator: Browser, client: Client, upstream: FakeUpstream, database: str
) -> None:
    upstream.replies(Reply("Once", " upon", gate_after=1), Reply("Well."))
    with client.stream() as story:
        story.until("token")
        assert "Running answers (1)" in text_of(operator)
        asked = told(operator.get(reverse("admin:chatnest_usage_do", args=["stop"])))
        assert "1 answer that is being written ends within 15 seconds." in asked
        assert "The chat is paused by its operator. Please try again later." in asked
    do(operator, "stop", reason="drill")
    assert client.chat().status == 503
    do(operator, "start")
    assert client.chat().status == 200


def test_one_answer_is_ended_and_others_go_on(operator: Browser, database: str) -> None:
    one, other = hold("user:1"), hold("user:2")
    path = f"{reverse('admin:chatnest_usage_do', args=['end'])}?answer={one.id}"
    asked = told(operator.get(path))
    assert "is written by gpt-4o-mini and holds 1,000 tokens" in asked
    operator.post(path, {"reason": "a loop"})
    rows = {row.pk: row for row in Reservation.objects.using(database).all()}
    assert (rows[one.id].outcome, rows[other.id].state) == ("stopped", "open")
    change = Change.objects.using(database).get(field="answer")
    assert (change.subject, change.actor, change.reason) == ("user:1", "operator", "a loop")
    assert "It had ended already." in told(operator.post(path, follow=True))


def test_a_day_is_forgiven_and_what_is_owed_stays(operator: Browser, database: str) -> None:
    use(database, "user:1", 5000)
    UsageLine.objects.using(database).create(day=today(), account="user:1", model="m", requests=1, tokens_reported=5000)
    asked = told(operator.get(f"{reverse('admin:chatnest_usage_do', args=['forgive'])}?name=user:1"))
    assert "5,000 tokens no longer count against its day" in asked
    assert "The day's budget of site stays as it is." in asked
    assert "Forgiven: 5,000 tokens of one." in told(do(operator, "forgive", "user:1", reason="sorry"))
    row = Adjustment.objects.using(database).get()
    assert (row.tokens, row.reason, row.actor) == (-5000, "sorry", "operator")
    assert "(5,000 forgiven)" in text_of(operator)
    assert "billed 5,000 \N{MINUS SIGN} forgiven 5,000 = 0 tokens" in text_of(operator, "account", name="user:1")


def test_more_is_given_for_today_and_never_above_the_caps(
    operator: Browser, database: str, configure: Configure
) -> None:
    configure(HARD_CAPS={"daily_token_limit": 250_000})
    assert "Today's limit of one is 250,000 tokens now." in told(do(operator, "grant", "user:1", tokens=90_000))
    assert "(200,000 by expanded, 90,000 more today, capped by the code)" in text_of(operator, "account", name="user:1")
    page = told(do(operator, "grant", "user:1", tokens=0))
    assert "greater than or equal to 1" in page
    configure(HARD_CAPS={"daily_token_limit": 200_000})
    page = told(do(operator, "grant", "user:2", tokens=5))
    assert "This would change nothing: the limit is 200,000 tokens, and no more may be." in page
    assert not Account.objects.using(database).filter(name="user:2").exists()


def test_a_limit_is_lowered_and_taken_back(operator: Browser, database: str) -> None:
    assert "The daily limit of one is 500 tokens now." in told(do(operator, "lower", "user:1", tokens=500))
    assert "(200,000 by expanded, lowered to 500)" in text_of(operator, "account", name="user:1")
    page = told(do(operator, "lower", "user:1", tokens=200_000))
    assert "This would change nothing: the limit is 200,000 tokens without it." in page
    assert "The daily limit of one is 200,000 tokens now." in told(do(operator, "lower", "user:1"))


def test_everything_done_is_recorded_with_old_and_new_values(operator: Browser, database: str) -> None:
    do(operator, "pause", "user:1", reason="spam")
    do(operator, "grant", "user:1", tokens=10)
    found = {
        (row.subject, row.field, row.old, row.new, row.actor, row.reason)
        for row in Change.objects.using(database).filter(kind="account")
    }
    assert ("user:1", "paused", "no", "yes", "operator", "spam") in found
    assert ("user:1", "extra_tokens", "", "10", "operator", "") in found
    page = text_of(operator, "account", name="user:1")
    assert "paused no yes spam" in page.replace("user:1: ", "")


def test_the_page_leads_back_to_where_one_came_from_and_nowhere_else(operator: Browser, database: str) -> None:
    back = address("account", name="user:1")
    path = reverse("admin:chatnest_usage_do", args=["pause"])
    given = operator.post(f"{path}?{urlencode({'name': 'user:1', 'next': back})}", {})
    assert given["Location"] == back
    assert operator.post(f"{path}?name=user:1&next=https://evil.example/", {})["Location"] == address("changelist")


def test_all_sums_are_proven_and_a_broken_one_is_shown_in_red(operator: Browser, database: str) -> None:
    hold("user:1")
    assert "Every counter is proven" in told(operator.post(address("prove"), follow=True))
    assert "every counter is the sum of its rows" in text_of(operator)
    DailyUsage.objects.using(database).filter(account="user:1").update(tokens_used=7)
    assert "1 sums differ" in told(operator.post(address("prove"), follow=True))
    assert "1 sums differ from their rows." in text_of(operator)


# Who may.


@pytest.mark.parametrize("page", ["changelist", "account", "costs", "csv", "find"])
def test_who_may_not_view_usage_sees_nothing(database: str, page: str) -> None:
    browser = staff("view_account")
    assert browser.get(address(page, name="user:1", q="ada")).status_code == 403
    assert browser.post(address("prove")).status_code == 403


def test_who_may_only_view_has_no_buttons_and_cannot_act(database: str) -> None:
    use(database, "user:1", 10)
    hold("user:1")
    browser = staff("view_usage")
    page = browser.get(address("changelist")).content.decode()
    assert 'class="act' not in page
    for action in ("stop", "start", "pause", "resume", "forgive", "grant", "lower", "end"):
        assert do(browser, action, "user:1", tokens=5).status_code == 403
    assert not Account.objects.using(database).filter(name="user:1").exists()


@pytest.mark.parametrize(
    ("permission", "may"),
    [
        ("stop_chat", {"stop", "end"}),
        ("pause_account", {"pause", "resume"}),
        ("forgive_usage", {"forgive"}),
        ("grant_tokens", {"grant", "lower"}),
    ],
)
def test_each_permission_is_for_its_own_actions(database: str, permission: str, may: set[str]) -> None:
    use(database, "user:1", 10)
    hold("user:1")
    Account.objects.using(database).create(name="user:2", paused=True)
    page = staff("view_usage", permission).get(address("changelist")).content.decode()
    assert set(re.findall(r'class="act act-(\w+)"', page)) == may


def test_who_may_pause_accounts_cannot_stop_the_chat_by_pausing_the_site(database: str, operator: Browser) -> None:
    browser = staff("view_usage", "pause_account")
    assert do(browser, "pause", SITE).status_code == 403
    assert do(browser, "resume", SITE).status_code == 403
    assert 'class="act' not in browser.get(address("account", name=SITE)).content.decode()
    page = operator.get(address("account", name=SITE)).content.decode()
    assert 'class="act act-stop"' in page and "act-pause" not in page
    assert not Account.objects.using(database).get(name=SITE).paused
    assert "The chat is stopped for everybody." in told(do(operator, "pause", SITE))


@pytest.mark.parametrize("query", [{"answer": "7"}, {"answer": str(uuid4())}, {"name": "user:1\0"}, {"name": ""}])
def test_an_address_that_names_nothing_is_not_found(operator: Browser, database: str, query: dict[str, str]) -> None:
    path = reverse("admin:chatnest_usage_do", args=["end"])
    assert operator.get(path, query).status_code == 404
    assert operator.get(address("account"), query).status_code == 404


# One account, and the search.


def test_a_search_finds_by_name_mail_id_and_address(operator: Browser, database: str, ada: User) -> None:
    use(database, "ip:192.0.2.7", 10)
    account = f"user:{ada.pk}"
    for typed in ("ada@example.org", "Ada Lovelace", "ada", account):
        assert operator.get(address("find", q=typed))["Location"] == address("account", name=account)
    assert operator.get(address("find", q="192.0.2.7"))["Location"] == address("account", name="ip:192.0.2.7")
    User.objects.create_user("adam")
    both = text_of(operator, "find", q="ad")
    assert "Ada Lovelace" in both and "adam" in both
    assert "Nobody is found by that." in text_of(operator, "find", q="charles")


def test_one_accounts_page_says_what_is_in_force_and_why(operator: Browser, database: str, ada: User) -> None:
    name = f"user:{ada.pk}"
    Account.objects.using(database).create(name=name, daily_token_limit=20_000, extra_tokens=500, extra_day=today())
    use(database, name, 300)
    answer(database, name, now(), tokens_charged=300, cost=None)
    refuse(database, name, "too_many_streams", 2, now(), "streams open: 8; expanded allows 8")
    page = text_of(operator, "account", name=name)
    assert "300 used, 0 reserved, of 20,500 tokens (200,000 by expanded, lowered to 20,000, 500 more today)" in page
    assert "It pays from site too: 0 of 500,000 tokens (ok)." in page
    assert "too many answers at once streams open: 8; expanded allows 8" in page
    assert "Completed 300 Reported" in page


def test_a_slip_in_a_name_is_said_and_pauses_nobody(operator: Browser, database: str) -> None:
    page = text_of(operator, "account", name="sites")
    assert "Nothing was decided about it by hand." in page
    problem = "No request is charged to sites. Did you mean site?"
    assert problem in page
    assert problem in told(do(operator, "pause", "sites"))
    assert not Account.objects.using(database).filter(name="sites").exists()
    use(database, "sites", 10)  # a tenant of that name
    assert problem not in text_of(operator, "account", name="sites")
    assert "Paused: sites." in told(do(operator, "pause", "sites"))


def test_money_limits_stand_beside_tokens(operator: Browser, database: str, configure: Configure) -> None:
    configure(SITE_DAILY_MONEY_LIMIT="2.00", SITE_MONTHLY_MONEY_LIMIT="30")
    use(database, SITE, 10, cost_used=1_700_000, cost_reserved=100_000)
    if (first := today().replace(day=1)) != today():
        DailyUsage.objects.using(database).create(day=first, account=SITE, cost_used=5_000_000)
    month = "6.80" if first != today() else "1.80"
    page = text_of(operator)
    assert "1.80 USD of 2.00 USD today" in page
    assert f"{month} USD of 30.00 USD this month" in page
    (site, _strangers) = Snapshot().budgets
    assert site.share == 0.9 and site.is_high


# Costs.


def bill(database: str, account: str, model: str, tokens: int, cost: int | None, **more: Any) -> None:
    facts = {"day": today(), "profile": "balanced", "requests": 1, "tokens_reported": tokens, **more}
    money = {"unpriced": 1} if cost is None else {"cost": cost}
    for name in (account, SITE):
        UsageLine.objects.using(database).create(account=name, model=model, **facts, **money)


def test_what_is_owed_by_model_and_by_whom(operator: Browser, database: str, ada: User) -> None:
    bill(database, f"user:{ada.pk}", "gpt-4o-mini", 1_000_000, 150_000)
    bill(database, "user:9999", "local", 500, None)
    use(database, SITE, 900_500, cost_used=140_000)
    page = text_of(operator, "costs", period="today")
    assert "Money 0.15 USD 0.01 USD 0.14 USD" in page
    assert "Tokens 1,000,500 100,000 900,500" in page
    assert "1 of 2 requests have no price" in page
    assert f"Ada Lovelace ada@example.org · user:{ada.pk} 1 0 0 1,000,000 0.15 USD" in page
    assert "local 1 0 0 500 1 unpriced" in page


def test_an_unknown_price_is_empty_and_never_nought(operator: Browser, database: str) -> None:
    bill(database, "user:1", "local", 500, None)
    page = text_of(operator, "costs", period="today")
    assert "0.00 USD" not in page.partition("By account")[2]


def test_the_providers_invoice_is_compared(operator: Browser, database: str) -> None:
    bill(database, "user:1", "gpt-4o-mini", 1_000_000, 1_500_000)
    page = text_of(operator, "costs", period="today", invoice="1.65")
    assert "The invoice says 1.65 USD, chatnest 1.50 USD: a difference of 0.15 USD (10 %)." in page
    assert "More than we know of" in page
    assert "Less than we reckon" in text_of(operator, "costs", period="today", invoice="1")
    assert "Enter a number." in text_of(operator, "costs", period="today", invoice="much")


def test_a_bookkeeper_gets_a_csv(operator: Browser, database: str, ada: User) -> None:
    bill(database, f"user:{ada.pk}", "gpt-4o-mini", 1_000_000, 150_001, label="=help")
    response = operator.get(address("csv", period="today"))
    assert response["Content-Disposition"] == f'attachment; filename="chatnest-{today()}-{today()}.csv"'
    (row,) = csv.DictReader(io.StringIO(response.content.decode()))
    assert (row["name"], row["email"], row["label"]) == ("Ada Lovelace", "ada@example.org", "'=help")
    assert (row["tokens_billed"], row["cost"], row["currency"]) == ("1000000", "0.150001", "USD")


def test_a_wrong_period_is_said_and_loses_nothing(operator: Browser, database: str) -> None:
    assert "2026-13-01 is not a day such as 2026-11-22." in text_of(operator, "costs", **{"from": "2026-13-01"})


@on_sqlite
def test_every_page_is_served_without_a_word_of_javascript_of_its_own(operator: Browser, database: str) -> None:
    hold("user:1")
    for path in (address("changelist"), address("costs"), address("account", name="user:1")):
        main = operator.get(path).content.decode().partition('<div class="cn">')[2].partition("<footer")[0]
        assert "<script" not in main and "onclick" not in main and "style=" not in main


def test_nothing_typed_becomes_markup(operator: Browser, database: str) -> None:
    User.objects.create_user("<b>x</b>", first_name="<script>alert(1)</script>")
    user = User.objects.get(username="<b>x</b>")
    use(database, f"user:{user.pk}", 10)
    refuse(database, f"user:{user.pk}", "rate_limited", 1, now(), "<img src=x>")
    page = operator.get(address("changelist")).content.decode()
    assert "<script>alert" not in page and "<img src=x>" not in page
    name = f"<i>{uuid4()}"
    assert name not in operator.get(address("account", name=name)).content.decode()

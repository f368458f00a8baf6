"""Who pays: users, addresses, teams and the site; and what an operator decided about them."""

from __future__ import annotations

import asyncio
import http.cookies
import json
import re
import time
from typing import Any
from urllib.parse import urlencode

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import PermissionDenied
from django.db import connections
from django.test import Client as DjangoClient
from freezegun import freeze_time

from chatnest import conf
from chatnest.models import Account, DailyUsage, Reservation
from chatnest.testing import FakeUpstream, Reply

from .client import HELLO, Answer, Client
from .conftest import Configure, EditProfile, Settled, on_postgres, on_sqlite

LOGIN = "Please log in to use the chat."
STALE = "The page is out of date (CSRF check failed). Reload it and try again."
PAUSED = "The chat is paused by its operator. Please try again later."
TOKEN = "a" * 32


def refused(answer: Answer, status: int, code: str, message: str) -> None:
    said = answer.json
    assert (answer.status, said["code"], said["error"]) == (status, code, message)


def log_in(user: User) -> dict[str, str]:
    """The headers of a browser in which this user is logged in, on a page that is up to date."""
    browser = DjangoClient()
    browser.force_login(user)
    session = browser.cookies["sessionid"].value
    return {"cookie": f"sessionid={session}; csrftoken={TOKEN}", "x_csrftoken": TOKEN}


def edit_account(name: str, database: str = "default", **changes: Any) -> Account:
    """An operator saves what was decided about an account."""
    row, _ = Account.objects.using(database).update_or_create(name=name, defaults=changes)
    return row


def pause(database: str, name: str) -> Account:
    return edit_account(name, database, paused=True)


def payers(rows: list[Reservation]) -> list[list[str]]:
    return [row.accounts for row in rows]


@pytest.fixture
def ada(database: str) -> User:
    return User.objects.create_user("ada")


# Users.


def test_a_user_pays_and_so_does_the_site(
    client: Client, ada: User, database: str, settled: Settled, configure: Configure
) -> None:
    configure(ALLOW_ANONYMOUS=False)
    assert client.chat(**log_in(ada)).events[-1] == "done"
    assert payers(settled()) == [[f"user:{ada.pk}", "site"]]
    used = DailyUsage.objects.using(database).values_list("account", "tokens_used")
    assert dict(used) == {f"user:{ada.pk}": 14, "site": 14}


@on_sqlite
def test_a_browser_that_logged_in_by_the_form_chats_with_its_cookies(
    client: Client, settled: Settled, configure: Configure
) -> None:
    """All of it over HTTP: the form, the session's cookie, the token from the page."""
    configure(ALLOW_ANONYMOUS=False)
    grace = User.objects.create_superuser("grace", password="hopper")
    page = client.request("GET", "/admin/login/")
    (token,) = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)
    jar = http.cookies.SimpleCookie(page.headers["set-cookie"])
    form = {"username": "grace", "password": "hopper", "csrfmiddlewaretoken": token, "next": "/"}
    with_cookies = {"cookie": f"csrftoken={jar['csrftoken'].value}"}
    answer = client.request(
        "POST",
        "/admin/login/",
        urlencode(form).encode(),
        content_type="application/x-www-form-urlencoded",
        **with_cookies,
    )
    assert (answer.status, answer.headers["location"]) == (302, "/")
    (session,) = re.findall(r"sessionid=(\w+)", answer.headers["set-cookie"])
    with_cookies["cookie"] = f"sessionid={session}; {with_cookies['cookie']}"
    page = client.request("GET", "/", **with_cookies)
    (token,) = re.findall(r'data-csrf-token="(\w+)"', page.text)
    refused(client.chat(**with_cookies), 403, "forbidden", STALE)
    assert client.chat(x_csrftoken=token, **with_cookies).events[-1] == "done"
    assert payers(settled()) == [[f"user:{grace.pk}", "site"]]


@on_sqlite
@pytest.mark.parametrize(
    "headers",
    [
        {"x_csrftoken": ""},
        {"x_csrftoken": "b" * 32},
        {"x_csrftoken": "too short"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
    ids=str,
)
def test_a_foreign_page_cannot_spend_a_users_budget(
    client: Client, ada: User, upstream: FakeUpstream, headers: dict[str, str]
) -> None:
    refused(client.chat(**{**log_in(ada), **headers}), 403, "forbidden", STALE)
    assert upstream.requests == []
    assert not Reservation.objects.exists()


@on_sqlite
def test_a_page_without_its_csrf_cookie_cannot_either(client: Client, ada: User) -> None:
    headers = log_in(ada)
    session = headers["cookie"].partition(";")[0]
    refused(client.chat(**{**headers, "cookie": session}), 403, "forbidden", STALE)


@on_sqlite
def test_the_sites_own_page_may_name_its_origin(client: Client, ada: User, settled: Settled) -> None:
    assert client.chat(origin=f"http://127.0.0.1:{client.port}", **log_in(ada)).status == 200
    assert payers(settled()) == [[f"user:{ada.pk}", "site"]]


@on_sqlite
def test_a_page_of_the_sites_own_origin_needs_no_token(client: Client, ada: User, settled: Settled) -> None:
    """As the original's React hook asks: JSON with a cookie, and nothing else."""
    session = log_in(ada)["cookie"].partition(";")[0]
    assert client.chat(cookie=session, origin=f"http://127.0.0.1:{client.port}").status == 200
    assert payers(settled()) == [[f"user:{ada.pk}", "site"]]


@on_sqlite
def test_a_page_of_an_origin_that_the_site_trusts_needs_none_either(client: Client, ada: User, settings: Any) -> None:
    settings.CSRF_TRUSTED_ORIGINS = ["https://app.example.com"]
    session = log_in(ada)["cookie"].partition(";")[0]
    assert client.chat(cookie=session, origin="https://app.example.com").status == 200
    refused(client.chat(cookie=session, origin="https://example.com"), 403, "forbidden", STALE)


@on_sqlite
def test_why_a_page_was_refused_is_said_where_django_says_it(
    client: Client, ada: User, caplog: pytest.LogCaptureFixture
) -> None:
    client.chat(**{**log_in(ada), "origin": "https://evil.example"})
    assert [record.getMessage() for record in caplog.records if record.name == "django.security.csrf"] == [
        "Forbidden (Origin checking failed - https://evil.example does not match any trusted origins.): /api/chat"
    ]


@on_sqlite
def test_reading_what_is_left_needs_no_csrf_token(client: Client, ada: User) -> None:
    cookie = log_in(ada)["cookie"]
    assert client.usage(cookie=cookie)["remainingToday"] == 70_000


@on_sqlite
def test_an_anonymous_request_has_no_cookie_to_forge_with(client: Client, settled: Settled) -> None:
    assert client.chat(cookie="csrftoken=other", origin="https://elsewhere.example").status == 200
    assert payers(settled()) == [["ip:127.0.0.1", "anonymous", "site"]]


@on_sqlite
@pytest.mark.parametrize("cookie", ["", "sessionid=", "sessionid=made-up", "sessionid=" + "x" * 3000])
def test_who_is_not_logged_in_is_asked_to(
    client: Client, upstream: FakeUpstream, configure: Configure, cookie: str
) -> None:
    configure(ALLOW_ANONYMOUS=False)
    answer = client.chat(cookie=cookie)
    refused(answer, 401, "not_authenticated", LOGIN)
    assert answer.json["retryable"] is False
    refused(client.request("GET", "/api/usage", cookie=cookie), 401, "not_authenticated", LOGIN)
    assert upstream.requests == []


@on_sqlite
def test_a_user_who_was_deactivated_is_nobody(client: Client, ada: User, configure: Configure) -> None:
    configure(ALLOW_ANONYMOUS=False)
    headers = log_in(ada)
    User.objects.update(is_active=False)
    refused(client.chat(**headers), 401, "not_authenticated", LOGIN)


@on_sqlite
def test_when_the_database_cannot_say_who_it_is_nothing_is_asked_of_the_model(
    client: Client, ada: User, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage of the one database of a small site is met here first, for whoever is logged in."""
    headers = log_in(ada)
    with connections["default"].cursor() as cursor:
        cursor.execute("ALTER TABLE django_session RENAME TO elsewhere")
        try:
            answer = client.chat(**headers)
        finally:
            cursor.execute("ALTER TABLE elsewhere RENAME TO django_session")
    message = "The chat cannot check its budget right now. Please try again shortly."
    refused(answer, 503, "ledger_unavailable", message)
    assert "no such table" in caplog.text
    assert upstream.requests == []


@on_sqlite
def test_two_users_have_a_budget_each_and_share_the_sites(
    client: Client, ada: User, settled: Settled, configure: Configure
) -> None:
    grace = User.objects.create_user("grace")
    small = {**HELLO, "dailyTokenLimit": 76}  # the model's first report was 2 above the bound
    assert client.chat(small, **log_in(ada)).status == 200
    assert client.chat(small, **log_in(ada)).json["code"] == "daily_budget_exceeded"
    assert client.chat(small, **log_in(grace)).status == 200
    configure(SITE_DAILY_TOKEN_LIMIT=28 + 73)
    assert client.chat(HELLO, **log_in(grace)).json["code"] == "daily_budget_exceeded"


# Addresses.


@on_sqlite
@pytest.mark.parametrize(
    ("trusted", "forwarded", "payer"),
    [
        # Nobody is trusted: the header is whatever the client wrote.
        (0, "192.0.2.7", "127.0.0.1"),
        (1, "", "127.0.0.1"),
        (1, "192.0.2.7", "192.0.2.7"),
        # A client behind one proxy writes a header of its own: the proxy adds to it.
        (1, "198.51.100.1, 192.0.2.7", "192.0.2.7"),
        (2, "198.51.100.1, 192.0.2.7", "198.51.100.1"),
        (2, "203.0.113.9, 198.51.100.1, 192.0.2.7", "198.51.100.1"),
        # Somebody went round a proxy.
        (2, "192.0.2.7", "127.0.0.1"),
        (3, "198.51.100.1, 192.0.2.7", "127.0.0.1"),
        (1, "nonsense", "127.0.0.1"),
        # With a port, which is another for each connection, as Azure's gateways write it; and as RFC 7239 does.
        (1, "192.0.2.7:8080", "192.0.2.7"),
        (1, "192.0.2.7:51234, 198.51.100.1:40001", "198.51.100.1"),
        (2, "192.0.2.7:51234, 198.51.100.1:40001", "192.0.2.7"),
        (1, "[2606:4700:1:2::9]:443", "2606:4700:1:2::"),
        (1, "[2606:4700:1:2::9]", "2606:4700:1:2::"),
        (1, "2606:4700:1:2:3:4:5:6:443", "2606:4700:1:2::"),
        (1, '"[2606:4700:1:2::9]:443"', "2606:4700:1:2::"),
        (1, '"192.0.2.7"', "192.0.2.7"),
        (1, '"192.0.2.7:8080" ', "192.0.2.7"),
        (1, "[::ffff:192.0.2.7]:80", "192.0.2.7"),
        (1, "192.0.2.7:http", "127.0.0.1"),
        (1, "192.0.2.7:1:2", "127.0.0.1"),
        (1, ":8080", "127.0.0.1"),
        (1, "[]:8080", "127.0.0.1"),
        (1, "_hidden:8080", "127.0.0.1"),
        (1, "999.1.1.1", "127.0.0.1"),
        (1, "192.0.2.7,", "192.0.2.7"),
        (1, " , 192.0.2.7 , ", "192.0.2.7"),
        (1, "user:1", "127.0.0.1"),
        (1, "site", "127.0.0.1"),
        (1, "192.0.2.7\t", "192.0.2.7"),
        # One IPv4 address is one payer, however it is written.
        (1, "::ffff:192.0.2.7", "192.0.2.7"),
        # A subscriber has 2^64 IPv6 addresses, and one budget.
        (1, "2a00:1450:4001:81b:1:2:3:4", "2a00:1450:4001:81b::"),
        (1, "2A00:1450:4001:081B:FFFF::1", "2a00:1450:4001:81b::"),
        (1, "2a00:1450:4001:81c::1", "2a00:1450:4001:81c::"),
        (1, "fe80::1", "fe80::1"),
        (1, "[FE80::1%eth0]:80", "fe80::1"),
        (1, "::1", "::1"),
    ],
)
def test_an_anonymous_client_pays_by_its_address(
    client: Client, configure: Configure, settled: Settled, trusted: int, forwarded: str, payer: str
) -> None:
    configure(TRUSTED_PROXIES=trusted)
    headers = {"x_forwarded_for": forwarded} if forwarded else {}
    assert client.chat(**headers).status == 200
    assert payers(settled()) == [[f"ip:{payer}", "anonymous", "site"]]


@on_sqlite
def test_a_port_is_no_fresh_budget(client: Client, configure: Configure) -> None:
    configure(TRUSTED_PROXIES=1)
    small = {**HELLO, "dailyTokenLimit": 74}
    codes = [client.chat(small, x_forwarded_for=f"203.0.113.70:{port}").status for port in (51234, 51235, 51236)]
    assert codes == [200, 429, 429]


@on_sqlite
def test_a_site_that_names_addresses_itself_writes_them_as_it_likes(
    client: Client, configure: Configure, settled: Settled
) -> None:
    configure(PAYER=lambda request, accounts: ["ip:2A00:1450:4001:081B:FFFF::1"])
    client.chat()
    assert payers(settled()) == [["ip:2a00:1450:4001:81b::", "anonymous", "site"]]


@on_sqlite
def test_a_made_up_address_is_no_fresh_budget(client: Client, configure: Configure) -> None:
    configure(TRUSTED_PROXIES=1)
    small = {**HELLO, "dailyTokenLimit": 74}
    codes = [client.chat(small, x_forwarded_for=f"198.51.100.{n}, 192.0.2.7").status for n in range(3)]
    assert codes == [200, 429, 429]


# Strangers, who share a part of the site's day.


def test_a_stranger_is_charged_to_the_address_and_to_all_strangers(
    client: Client, ada: User, database: str, settled: Settled
) -> None:
    assert client.chat().status == client.chat(**log_in(ada)).status == 200
    settled()
    used = dict(DailyUsage.objects.using(database).values_list("account", "tokens_used"))
    assert used == {"ip:127.0.0.1": 14, "anonymous": 14, f"user:{ada.pk}": 14, "site": 28}


@on_sqlite
@pytest.mark.parametrize(
    ("site", "edited", "setting", "share"),
    [
        (500, None, None, 100),
        (504, None, None, 100),
        (5000, 500, None, 100),  # the site's in force
        (500, 10**9, None, 100),
        (500, None, 80, 80),
        (500, None, 0, 0),
        (500, None, 10_000, 500),  # all of them spend no more than the site
    ],
)
def test_strangers_spend_a_fifth_of_the_sites_day_or_what_the_settings_say(
    client: Client, configure: Configure, site: int, edited: int | None, setting: int | None, share: int
) -> None:
    configure(SITE_DAILY_TOKEN_LIMIT=site, ANONYMOUS_DAILY_TOKEN_LIMIT=setting)
    edit_account("site", daily_token_limit=edited)
    assert client.usage()["remainingToday"] == share


@on_sqlite
def test_many_strangers_close_the_chat_for_strangers_and_for_no_user(
    client: Client, ada: User, configure: Configure, settled: Settled
) -> None:
    """Each with a budget of its own that is nowhere near spent: addresses are easily had."""
    configure(SITE_DAILY_TOKEN_LIMIT=1000, TRUSTED_PROXIES=1, MIN_OUTPUT_TOKENS=180)
    ends = [client.chat(x_forwarded_for=f"192.0.2.{n}") for n in range(5)]
    assert [answer.status for answer in ends] == [200, 429, 429, 429, 429]
    assert {answer.json["code"] for answer in ends[1:]} == {"daily_budget_exceeded"}
    assert client.chat(**log_in(ada)).data("usage")["remainingToday"] == 1000 - 28


@on_sqlite
def test_an_operator_may_lower_the_strangers_share(client: Client) -> None:
    edit_account("anonymous", daily_token_limit=500)
    assert client.usage()["remainingToday"] == 500
    edit_account("anonymous", daily_token_limit=10**9)
    assert client.usage()["remainingToday"] == 70_000


def test_pausing_strangers_stops_them_and_no_user(
    client: Client, ada: User, upstream: FakeUpstream, database: str
) -> None:
    pause(database, "anonymous")
    refused(client.chat(), 503, "paused", PAUSED)
    assert upstream.requests == []
    assert client.chat(**log_in(ada)).status == 200


@on_sqlite
def test_who_is_known_by_more_than_an_address_is_no_stranger(
    client: Client, configure: Configure, settled: Settled
) -> None:
    configure(PAYER=lambda request, accounts: ["visitor:7", *accounts])
    client.chat()
    configure(PAYER=lambda request, accounts: [*accounts, "team:blue"])
    client.chat()
    assert payers(settled()) == [
        ["visitor:7", "ip:127.0.0.1", "site"],
        ["ip:127.0.0.1", "team:blue", "anonymous", "site"],
    ]


# A site's own rule.


@on_sqlite
def test_a_site_may_charge_a_team_too(client: Client, ada: User, configure: Configure, settled: Settled) -> None:
    def payer(request: Any, accounts: list[str]) -> list[str]:
        assert accounts == [f"user:{ada.pk}"]
        assert request.path == "/api/chat"
        return [*accounts, "team:blue"]

    configure(PAYER=payer, ALLOW_ANONYMOUS=False)
    assert client.chat(**log_in(ada)).status == 200
    assert payers(settled()) == [[f"user:{ada.pk}", "team:blue", "site"]]
    used = dict(DailyUsage.objects.values_list("account", "tokens_used"))
    assert used == {f"user:{ada.pk}": 14, "team:blue": 14, "site": 14}


@on_sqlite
def test_a_teams_budget_closes_for_all_its_members(
    client: Client, configure: Configure, upstream: FakeUpstream
) -> None:
    configure(PAYER=lambda request, accounts: [*accounts, "team:blue"], TRUSTED_PROXIES=1)
    Account.objects.create(name="team:blue", daily_token_limit=74)
    assert client.chat(x_forwarded_for="192.0.2.1").data("usage")["remainingToday"] == 60
    assert client.chat(x_forwarded_for="192.0.2.2").json["code"] == "daily_budget_exceeded"


async def by_tenant(request: Any, accounts: list[str]) -> tuple[str, ...]:
    """Named by its dotted path in the settings, as sites do."""
    await asyncio.sleep(0)
    if tenant := request.headers.get("X-Tenant"):
        return (f"tenant:{tenant}",)
    raise PermissionDenied("no tenant")


@on_sqlite
def test_a_site_may_charge_somebody_else_and_ask_its_database_who(
    client: Client, configure: Configure, settled: Settled
) -> None:
    configure(PAYER="tests.test_accounts.by_tenant", ALLOW_ANONYMOUS=False)
    assert client.chat(x_tenant="acme").status == 200
    assert payers(settled()) == [["tenant:acme", "site"]]
    refused(client.chat(), 403, "forbidden", "You may not use the chat.")


def by_key(request: Any, accounts: list[str]) -> list[str]:
    """Sync, and asks the database, as most are written."""
    key = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return [f"user:{user.pk}" for user in User.objects.filter(username=key)] or accounts


@on_sqlite
def test_a_rule_that_is_sync_may_use_the_orm_and_is_asked_before_any_cookie(
    client: Client, ada: User, configure: Configure, settled: Settled
) -> None:
    """A browser sends its session's cookie along with the token of a program that runs in it."""
    grace = User.objects.create_user("grace")
    configure(PAYER=by_key, ALLOW_ANONYMOUS=False)
    session = log_in(grace)["cookie"].partition(";")[0]
    assert client.chat(authorization="Bearer ada", cookie=session).status == 200
    assert payers(settled()) == [[f"user:{ada.pk}", "site"]]
    refused(client.chat(authorization="Bearer nobody", cookie=session), 403, "forbidden", STALE)
    refused(client.chat(authorization="Bearer nobody"), 401, "not_authenticated", LOGIN)


@on_sqlite
def test_a_foreign_page_cannot_spend_what_a_rule_says_its_visitor_pays_with(
    client: Client, ada: User, configure: Configure, upstream: FakeUpstream
) -> None:
    configure(PAYER=lambda request, accounts: ["team:blue"])
    session = log_in(ada)["cookie"].partition(";")[0]
    refused(client.chat(cookie=session, origin="https://evil.example"), 403, "forbidden", STALE)
    assert upstream.requests == []


@on_sqlite
def test_a_rule_sees_nobody_where_anonymous_use_is_off_and_may_leave_it_at_that(
    client: Client, configure: Configure
) -> None:
    seen: list[list[str]] = []

    def payer(request: Any, accounts: list[str]) -> list[str]:
        seen.append(list(accounts))
        return accounts

    configure(PAYER=payer, ALLOW_ANONYMOUS=False)
    refused(client.chat(), 401, "not_authenticated", LOGIN)
    assert seen == [[]]


@on_sqlite
def test_a_rule_may_name_one_account_without_a_list(client: Client, configure: Configure, settled: Settled) -> None:
    """Else each of its letters would be an account, with a budget of its own."""
    configure(PAYER=lambda request, accounts: "team:blue")
    assert client.chat().events[-1] == "done"
    assert payers(settled()) == [["team:blue", "site"]]


@on_sqlite
def test_an_account_that_is_named_twice_is_charged_once(client: Client, configure: Configure, settled: Settled) -> None:
    configure(PAYER=lambda request, accounts: ["team:a", "team:b", "team:a"])
    client.chat()
    assert payers(settled()) == [["team:a", "team:b", "site"]]
    assert DailyUsage.objects.get(account="team:a").tokens_used == 14


@on_sqlite
@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        "",
        "site",
        "anonymous",
        [None],
        [""],
        [7],
        ["x" * 201],
        ["team\nblue"],
        ["\0"],
        ["\x9b"],
        ["\u2028"],
        ["half \ud83d"],
        [" team"],
        ["team "],
        ["team\u00a0"],
        ["site"],
        ["user:1", "site"],
        ["user:1", "anonymous"],
        [["team:blue"]],
        [b"team"],
    ],
    ids=repr,
)
def test_a_rule_that_names_no_accounts_fails_before_anything_is_spent(
    client: Client,
    configure: Configure,
    upstream: FakeUpstream,
    answer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure(PAYER=lambda request, accounts: answer)
    refused(client.chat(), 500, "internal_error", "AI request failed")
    assert upstream.requests == []
    assert not Reservation.objects.exists()
    assert "payer" in caplog.text.lower() or "account" in caplog.text.lower()


NAMES = [
    "x" * 200,
    'équipe "bleue" 😀\'; --',
    "a,b",
    "{a}",
    "\\",
    "two words",
    "क्\u200dष",
    "👩\u200d🚒",
    "user:a b",
]


@on_sqlite
def test_an_account_may_have_any_name_of_200_characters(client: Client, configure: Configure, settled: Settled) -> None:
    configure(PAYER=lambda request, accounts: NAMES)
    assert client.chat().events[-1] == "done"
    assert payers(settled()) == [[*NAMES, "site"]]


@on_postgres
def test_postgres_keeps_any_name_too(client: Client, configure: Configure, settled: Settled) -> None:
    configure(PAYER=lambda request, accounts: NAMES)
    assert client.chat().events[-1] == "done"
    assert payers(settled()) == [[*NAMES, "site"]]


# What an operator decided.


def test_pausing_the_site_stops_every_chat(client: Client, upstream: FakeUpstream, database: str) -> None:
    row = pause(database, "site")
    for _ in range(2):
        answer = client.chat()
        refused(answer, 503, "paused", PAUSED)
        assert (answer.json["retryable"], answer.headers["retry-after"]) == (True, "60")
    assert upstream.requests == []
    row.paused = False
    row.save()
    assert client.chat().status == 200


@on_sqlite
def test_pausing_one_payer_stops_only_that_one(client: Client, configure: Configure) -> None:
    configure(TRUSTED_PROXIES=1)
    Account.objects.create(name="ip:192.0.2.1", paused=True)
    refused(client.chat(x_forwarded_for="192.0.2.1"), 503, "paused", PAUSED)
    assert client.chat(x_forwarded_for="192.0.2.2").status == 200


@on_sqlite
def test_pausing_a_team_stops_its_members(client: Client, configure: Configure) -> None:
    configure(PAYER=lambda request, accounts: [*accounts, "team:blue"])
    Account.objects.create(name="team:blue", paused=True)
    refused(client.chat(), 503, "paused", PAUSED)


@on_sqlite
def test_an_operator_may_force_a_profile_whatever_is_asked_for(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, settled: Settled
) -> None:
    vip = edit_profile("vip", model="gpt-4o", max_output_tokens=77, max_tokens_per_request=4096)
    Account.objects.create(name="ip:127.0.0.1", profile=vip)
    assert client.chat({**HELLO, "profile": "expanded"}).status == 200
    sent = upstream.requests[0].json
    assert (sent["model"], sent["max_tokens"]) == ("gpt-4o", 77)
    assert settled()[0].profile == "vip"
    assert client.usage()["profile"] == "vip"


@on_sqlite
def test_a_profile_that_clients_cannot_name_serves_whom_it_is_forced_on(
    client: Client, upstream: FakeUpstream, edit_profile: EditProfile, settled: Settled
) -> None:
    vip = edit_profile("vip", max_output_tokens=77)
    assert client.chat({**HELLO, "profile": "vip"}).status == 200
    assert settled()[0].profile == "balanced"
    Account.objects.create(name="ip:127.0.0.1", profile=vip)
    assert client.chat().status == 200
    assert settled()[1].profile == "vip"


@on_sqlite
@pytest.mark.parametrize(("typed", "limit"), [(1000, 1000), (70_000, 70_000), (10**12, 70_000), (0, 0)])
def test_an_operator_may_lower_a_payers_daily_limit_and_not_raise_it(
    client: Client, upstream: FakeUpstream, typed: int, limit: int
) -> None:
    Account.objects.create(name="ip:127.0.0.1", daily_token_limit=typed)
    assert client.usage()["dailyTokenLimit"] == limit
    answer = client.chat()
    if limit:
        assert answer.data("usage")["remainingToday"] == limit - 14
    else:
        assert answer.json["code"] == "daily_budget_exceeded"
        assert upstream.requests == []


@on_sqlite
def test_an_operator_may_lower_the_sites_limit_and_not_raise_it(
    client: Client, configure: Configure, ada: User
) -> None:
    configure(SITE_DAILY_TOKEN_LIMIT=1000)
    user = log_in(ada)
    edit_account("site", daily_token_limit=10**9)
    assert client.chat(**user).data("usage")["remainingToday"] == 986
    edit_account("site", daily_token_limit=500)
    assert client.chat(**user).data("usage")["remainingToday"] == 472


@on_sqlite
def test_the_lowest_of_profile_account_and_request_is_in_force(client: Client) -> None:
    Account.objects.create(name="ip:127.0.0.1", daily_token_limit=5000)
    assert client.chat({**HELLO, "dailyTokenLimit": 6000}).data("usage")["remainingToday"] == 5000 - 14
    assert client.chat({**HELLO, "dailyTokenLimit": 4000}).data("usage")["remainingToday"] == 4000 - 28


@on_sqlite
@pytest.mark.parametrize(
    ("row", "asked", "limit"),
    [
        ({}, {}, 70_000 + 1000),
        ({"daily_token_limit": 500}, {}, 1500),
        ({"daily_token_limit": 0}, {}, 1000),
        ({"extra_tokens": 10**12}, {}, 500_000),  # HARD_CAPS
        ({}, {"dailyTokenLimit": 70_500}, 70_500),  # a client may only tighten, the granted too
        ({}, {"dailyTokenLimit": 80_000}, 71_000),
        ({"extra_day": "2026-11-24"}, {}, 70_000),
        ({"extra_day": "2026-11-26"}, {}, 70_000),
    ],
    ids=str,
)
def test_an_operator_may_grant_more_for_one_day(
    client: Client, ada: User, configure: Configure, row: dict[str, Any], asked: dict[str, Any], limit: int
) -> None:
    configure(SITE_DAILY_TOKEN_LIMIT=10**9)
    with freeze_time("2026-11-25 12:00:00", tick=True):
        edit_account(f"user:{ada.pk}", **{"extra_tokens": 1000, "extra_day": "2026-11-25", **row})
        answer = client.chat({**HELLO, **asked}, **log_in(ada))
    assert answer.data("usage")["remainingToday"] == limit - 14


@on_sqlite
def test_a_grant_is_over_at_midnight(client: Client, configure: Configure) -> None:
    configure(TIME_ZONE="Europe/Berlin")
    with freeze_time("2026-11-25 22:59:50", tick=True) as clock:
        edit_account("ip:127.0.0.1", daily_token_limit=0, extra_tokens=1000, extra_day="2026-11-25")
        assert client.chat().status == 200
        clock.move_to("2026-11-25 23:00:00")
        assert client.chat().json["code"] == "daily_budget_exceeded"


@on_sqlite
def test_what_many_share_is_granted_no_more_than_the_site_has(client: Client, configure: Configure) -> None:
    configure(SITE_DAILY_TOKEN_LIMIT=1000)
    today = conf.today()
    edit_account("site", daily_token_limit=500, extra_tokens=10**9, extra_day=today)
    assert client.usage()["remainingToday"] == 200, "a fifth of 1,000"
    edit_account("anonymous", daily_token_limit=100, extra_tokens=50, extra_day=today)
    assert client.usage()["remainingToday"] == 150
    edit_account("anonymous", extra_tokens=10**9)
    assert client.usage()["remainingToday"] == 1000


def test_pausing_ends_the_answers_that_are_being_written(
    client: Client, upstream: FakeUpstream, configure: Configure, database: str, settled: Settled
) -> None:
    """With every renewal of the leases, so here within a third of three seconds."""
    configure(LEASE_SECONDS=3)
    upstream.replies(Reply("one", "two", gate_after=1))
    with client.stream() as stream:
        stream.until("token")
        paused_at = time.monotonic()
        Account.objects.using(database).create(name="ip:127.0.0.1", paused=True)
        (event, data), *rest = stream.rest()
    assert time.monotonic() - paused_at < 3
    assert (event, rest) == ("error", [])
    assert json.loads(data) == {"message": PAUSED, "code": "paused", "retryable": True, "retryAfter": 60}
    upstream.wait_for_disconnect()
    (row,) = settled()
    assert (row.outcome, row.usage_source) == ("stopped", "counted")
    assert row.tokens_charged == 10 + 1 + 8  # what may have been on its way

"""The admin: what an operator sees is what is in force, and what is saved there works."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.admin import site
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.test import Client as Browser
from django.urls import reverse

from chatnest.conf import today
from chatnest.limits import DEFAULT_PROFILES
from chatnest.models import (
    Account,
    Adjustment,
    Change,
    DailyUsage,
    Price,
    Profile,
    Refusal,
    Reservation,
    UsageLine,
)

from .client import Client
from .conftest import Configure, EditProfile, on_sqlite

pytestmark = on_sqlite

NOW = datetime(2026, 11, 29, 10, tzinfo=UTC)
HELD: dict[str, Any] = {
    "day": date(2026, 11, 29),
    "accounts": ["site"],
    "profile": "balanced",
    "model": "m",
    "tokens": 1234,
    "created_at": NOW,
    "expires_at": NOW + timedelta(seconds=30),
}
CLOSED: dict[str, Any] = {**HELD, "state": "settled", "outcome": "completed", "settled_at": NOW}


@pytest.fixture
def admin(database: str) -> Browser:
    browser = Browser()
    browser.force_login(User.objects.create_superuser("operator"))
    return browser


def page(admin: Browser, name: str, *args: Any, **query: str) -> str:
    response = admin.get(reverse(f"admin:chatnest_{name}", args=args), query)
    assert response.status_code == 200
    return response.content.decode()


def form_of(row: Any, **changes: Any) -> dict[str, Any]:
    """What a browser sends from the row's page, after these changes."""
    typed = {field.name: field.value_from_object(row) for field in row._meta.fields} | changes
    sent = {name: value for name, value in typed.items() if value is not None and value is not False}
    return {name: "on" if value is True else value for name, value in sent.items()}


def save(admin: Browser, row: Any, **changes: Any) -> dict[str, list[str]]:
    """Save the row's page. Returns its errors by field; none if it was saved."""
    model = row._meta.model_name
    path = (
        reverse(f"admin:chatnest_{model}_change", args=[row.pk]) if row.pk else reverse(f"admin:chatnest_{model}_add")
    )
    response = admin.post(path, form_of(row, **changes))
    if response.status_code == 302:
        return {}
    assert response.context is not None
    return dict(response.context["adminform"].form.errors)


# Profiles.


@pytest.mark.parametrize("name", DEFAULT_PROFILES)
def test_the_three_profiles_are_edited_and_neither_renamed_nor_deleted(
    admin: Browser, edit_profile: EditProfile, name: str
) -> None:
    row = Profile.objects.get(name=name)
    assert save(admin, row, name="standard", daily_token_limit=1234) == {}
    row.refresh_from_db()
    assert (row.name, row.daily_token_limit) == (name, 1234)
    assert 'class="deletelink"' not in page(admin, "profile_change", row.pk)
    assert admin.post(reverse("admin:chatnest_profile_delete", args=[row.pk]), {"post": "yes"}).status_code == 403
    both = [row.pk, edit_profile("vip").pk]
    many = {"action": "delete_selected", "_selected_action": both, "post": "yes"}
    assert admin.post(reverse("admin:chatnest_profile_changelist"), many).status_code == 403
    assert Profile.objects.count() == 4


def test_a_profile_of_the_operators_own_is_renamed_and_deleted(admin: Browser, edit_profile: EditProfile) -> None:
    row = edit_profile("vip")
    assert save(admin, row, name="important") == {}
    assert Profile.objects.get(pk=row.pk).name == "important"
    assert admin.post(reverse("admin:chatnest_profile_delete", args=[row.pk]), {"post": "yes"}).status_code == 302
    assert not Profile.objects.filter(pk=row.pk).exists()


def test_the_providers_of_the_settings_are_a_choice(
    admin: Browser, configure: Configure, edit_profile: EditProfile
) -> None:
    configure(PROVIDERS={"local": {"BASE_URL": "http://127.0.0.1:8080/v1"}})
    row = edit_profile("vip")
    choices = page(admin, "profile_change", row.pk)
    assert '<option value="default" selected>' in choices
    assert '<option value="local">' in choices
    assert save(admin, row, provider="local") == {}
    assert Profile.objects.get(pk=row.pk).provider == "local"


def test_a_provider_that_the_settings_have_no_more_is_shown_and_not_saved(
    admin: Browser, edit_profile: EditProfile
) -> None:
    row = edit_profile("vip", provider="gone")
    assert '<option value="gone" selected>' in page(admin, "profile_change", row.pk)
    assert save(admin, row) == {"provider": ["The settings have no provider of this name."]}


# Accounts: their names.


@pytest.fixture
def ada(database: str) -> User:
    return User.objects.create_user("ada", "ada@example.org", pk=35, first_name="Ada", last_name="Lovelace")


def add(admin: Browser, name: str, **typed: Any) -> dict[str, list[str]]:
    return save(admin, Account(name=name), **typed)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("user:35", "user:35"),
        (" user:35 ", "user:35"),
        ("ip:192.0.2.1", "ip:192.0.2.1"),
        ("ip:192.0.2.1:8080", "ip:192.0.2.1"),
        ("ip:2001:DB8::1", "ip:2001:db8::1"),
        ("ip:2A00:1450:4001:081B::1", "ip:2a00:1450:4001:81b::"),
        ("ip:::ffff:192.0.2.1", "ip:192.0.2.1"),
        ("ip:unknown", "ip:unknown"),
        ("192.0.2.1:80", "ip:192.0.2.1"),
        ("2001:DB8::1", "ip:2001:db8::1"),
        ("ada", "user:35"),
        ("Ada@Example.org", "user:35"),
        ("key:3", "key:3"),
    ],
)
def test_an_account_is_saved_under_the_name_that_requests_are_charged_to(
    admin: Browser, ada: User, typed: str, name: str
) -> None:
    assert add(admin, typed, paused=True) == {}
    assert Account.objects.exclude(name__in=["site", "anonymous"]).get().name == name


NO_REQUEST = "No request is charged to {}. Did you mean {}?"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Site", NO_REQUEST.format("Site", "site")),
        ("sites", NO_REQUEST.format("sites", "site")),
        ("Anonymous", NO_REQUEST.format("Anonymous", "anonymous")),
        ("User:35", NO_REQUEST.format("User:35", "user:35")),
        ("users: 35", NO_REQUEST.format("users: 35", "user:35")),
        ("IP:192.0.2.1", NO_REQUEST.format("IP:192.0.2.1", "ip:192.0.2.1")),
        ("team", "No request is charged to team. Accounts are named like site, user:7 or ip:192.0.2.1."),
        ("team:blue", "No request is charged to team:blue. Accounts are named like site, user:7 or ip:192.0.2.1."),
        ("user:ada", "There is no user with the primary key ada. Did you mean user:35?"),
        ("user:36", "There is no user with the primary key 36."),
        ("user:", "There is no user with the primary key ."),
        ("user:99999999999999999999", "There is no user with the primary key 99999999999999999999."),
        ("user:035", "Did you mean user:35?"),
        ("ip:192.0.2", "192.0.2 is no IP address."),
        ("ip:192.0.2.0/24", "192.0.2.0/24 is no IP address."),
        ("key:", "Which key?"),
        ("", "This field is required."),
        ("a\tb", "Use text of 1 to 200 characters, without control characters or space at an end."),
    ],
)
def test_a_name_that_nothing_is_charged_to_is_refused_with_a_hint(
    admin: Browser, ada: User, name: str, problem: str
) -> None:
    assert add(admin, name, paused=True) == {"name": [problem]}
    assert Account.objects.count() == 2


def test_what_a_sites_own_rule_charges_can_be_paused_and_a_slip_is_none_of_it(
    admin: Browser, ada: User, configure: Configure
) -> None:
    configure(PAYER=lambda request, accounts: accounts)
    for name in ["team:blue", "ada", "acme", 'équipe "bleue" 😀', "user:two words"]:
        if name.startswith("user:"):
            DailyUsage.objects.create(day=date(2026, 11, 1), account=name)
        assert add(admin, name, paused=True) == {}
        assert Account.objects.get(name=name).paused
    assert add(admin, "Site") == {"name": [NO_REQUEST.format("Site", "site")]}
    assert add(admin, "user:999") == {"name": ["There is no user with the primary key 999."]}


def test_what_has_been_charged_can_be_paused_whatever_it_is_called(admin: Browser) -> None:
    """A tenant called Site pays; a user who was deleted did, and may be looked at."""
    for name in ["sites", "user:36", "tenant:acme"]:
        DailyUsage.objects.create(day=date(2026, 11, 1), account=name)
        assert add(admin, name, paused=True) == {}


def test_users_whose_primary_key_has_a_space_can_be_paused(client: Client, configure: Configure) -> None:
    configure(PAYER=lambda request, accounts: ["user:two words"])
    assert client.chat().status == 200
    Account(name="user:two words", paused=True).full_clean()
    Account.objects.create(name="user:two words", paused=True)
    assert client.chat().json["code"] == "paused"


def test_an_address_is_one_account_however_code_writes_it(database: str) -> None:
    assert Account.objects.create(name="ip:2001:DB8::1").name == "ip:2001:db8::1"
    with pytest.raises(ValidationError, match="already exists"):
        Account(name="ip:2001:0db8::1").full_clean()


# Accounts: what is in force.


def in_force(admin: Browser, name: str) -> str:
    """What the list says of the account."""
    rows = re.findall(r'<th class="field-name">.*?</tr>', page(admin, "account_changelist"), re.DOTALL)
    (row,) = [row for row in rows if f">{name}</a>" in row]
    (cell,) = re.findall(r'<td class="field-in_force_today">(.*?)</td>', row)
    (state,) = re.findall(r'<td class="field-state">(.*?)</td>', row)
    text = re.sub("<.*?>", "", state) + ": " + cell
    assert cell in page(admin, "account_change", Account.objects.get(name=name).pk)
    return html.unescape(text)


def test_the_list_says_what_is_in_force_and_why(admin: Browser, ada: User, edit_profile: EditProfile) -> None:
    assert in_force(admin, "site") == "Running: 500,000 (500,000 by SITE_DAILY_TOKEN_LIMIT)"
    assert in_force(admin, "anonymous") == "Running: 100,000 (100,000 by ANONYMOUS_DAILY_TOKEN_LIMIT)"
    row = Account.objects.create(name="user:35")
    assert in_force(admin, "user:35") == "Running: 200,000 (200,000 by expanded)"
    assert save(admin, row, daily_token_limit=5000) == {}
    assert in_force(admin, "user:35") == "Running: 5,000 (200,000 by expanded, lowered to 5,000)"
    assert save(admin, row, daily_token_limit=5000, extra_tokens=700) == {}
    told = "Running: 5,700 (200,000 by expanded, lowered to 5,000, 700 more today)"
    assert in_force(admin, "user:35") == told
    assert save(admin, row, profile=edit_profile("vip", daily_token_limit=10**9).pk) == {}
    assert in_force(admin, "user:35") == "Running: 500,000 (500,000 by vip)"
    assert save(admin, row, paused=True) == {}
    assert in_force(admin, "user:35") == "Paused: none: user:35 is paused"
    edit_profile("vip", enabled=False)
    assert save(admin, row, profile=Profile.objects.get(name="vip").pk) == {}
    assert in_force(admin, "user:35") == "Running: 0 (0 by no profile)"


def test_the_list_says_that_everybody_is_stopped(admin: Browser) -> None:
    Account.objects.create(name="ip:192.0.2.1")
    Account.objects.create(name="key:3")
    Account.objects.filter(name="anonymous").update(paused=True)
    assert in_force(admin, "ip:192.0.2.1") == "Running: none: anonymous is paused"
    assert in_force(admin, "key:3").startswith("Running: 200,000")
    Account.objects.filter(name="site").update(paused=True)
    assert in_force(admin, "key:3") == "Running: none: site is paused"


def test_paused_is_a_word_and_no_green_tick(admin: Browser) -> None:
    Account.objects.filter(name="site").update(paused=True)
    listed = page(admin, "account_changelist")
    assert "<strong>Paused</strong>" in listed
    assert "icon-yes" not in listed and "icon-no" not in listed


def test_what_operators_are_told_is_not_eaten_as_html(admin: Browser) -> None:
    """Django shows a help text as HTML, and nothing of it is meant as a tag."""
    for model in (Profile, Account):
        for field in model._meta.fields:
            assert not set("<>&") & set(field.help_text), field
    assert "user:7 (its primary key), ip:192.0.2.1 or key:3" in page(admin, "account_add")


@pytest.mark.parametrize(
    ("name", "limit", "problem"),
    [
        ("site", 500_001, "500,000 by SITE_DAILY_TOKEN_LIMIT"),
        ("anonymous", 100_001, "100,000 by ANONYMOUS_DAILY_TOKEN_LIMIT"),
        ("ip:192.0.2.1", 200_001, "200,000 by expanded"),
        ("team:blue", 500_001, "500,000 by HARD_CAPS"),
    ],
)
def test_a_limit_that_would_change_nothing_is_refused(
    admin: Browser, configure: Configure, name: str, limit: int, problem: str
) -> None:
    configure(PAYER=lambda request, accounts: accounts)
    row = Account.objects.filter(name=name).first() or Account(name=name)
    assert save(admin, row, daily_token_limit=limit) == {
        "daily_token_limit": [f"This would change nothing: {problem}."]
    }
    assert save(admin, row, daily_token_limit=limit - 1) == {}


def test_a_limit_is_measured_by_the_profile_that_is_forced_with_it(admin: Browser, edit_profile: EditProfile) -> None:
    small = edit_profile("small", daily_token_limit=1000)
    problem = {"daily_token_limit": ["This would change nothing: 1,000 by small."]}
    assert add(admin, "key:3", profile=small.pk, daily_token_limit=1001) == problem
    assert add(admin, "key:3", profile=small.pk, daily_token_limit=999) == {}


def test_an_old_limit_that_changes_nothing_any_more_keeps_nobody_from_pausing(
    admin: Browser, edit_profile: EditProfile
) -> None:
    row = Account.objects.create(
        name="ip:192.0.2.1", daily_token_limit=150_000, extra_tokens=5, extra_day=date(2020, 1, 1)
    )
    for name in DEFAULT_PROFILES:
        edit_profile(name, daily_token_limit=1000)
    assert save(admin, row, paused=True) == {}
    assert Account.objects.get(pk=row.pk).paused


def test_the_shared_accounts_stay(admin: Browser) -> None:
    for name in ("site", "anonymous"):
        row = Account.objects.get(name=name)
        assert save(admin, row, name="other", paused=True) == {}
        row.refresh_from_db()
        assert (row.name, row.paused) == (name, True)
        assert 'class="deletelink"' not in page(admin, "account_change", row.pk)
        assert admin.post(reverse("admin:chatnest_account_delete", args=[row.pk]), {"post": "yes"}).status_code == 403
        row.name = "ip:192.0.2.1"
        with pytest.raises(ValidationError, match="it keeps it"):
            row.full_clean()
    everything = {"action": "delete_selected", "_selected_action": list(Account.objects.values_list("pk", flat=True))}
    assert admin.post(reverse("admin:chatnest_account_changelist"), everything | {"post": "yes"}).status_code == 403
    assert Account.objects.count() == 2


def test_another_account_is_deleted(admin: Browser) -> None:
    row = Account.objects.create(name="ip:192.0.2.1", paused=True)
    assert admin.post(reverse("admin:chatnest_account_delete", args=[row.pk]), {"post": "yes"}).status_code == 302
    assert Account.objects.count() == 2


def test_a_search_for_a_whole_name_finds_it_alone(admin: Browser) -> None:
    for name in ["user:35", "user:3500", "ip:2001:db8::1"]:
        Account.objects.create(name=name)

    def found(text: str) -> list[str]:
        return re.findall(r'field-name"><a [^>]*>([^<]*)</a>', page(admin, "account_changelist", q=text))

    assert found("user:35") == ["user:35"]
    assert found("user:3") == ["user:35", "user:3500"]
    assert found("IP:2001:DB8::1") == found("ip:2001:DB8::1") == ["ip:2001:db8::1"]
    assert found("35") == ["user:35", "user:3500"]


# More for one day.


def test_more_for_today_is_granted_and_in_force_at_once(admin: Browser, client: Client) -> None:
    row = Account.objects.create(name="ip:127.0.0.1", daily_token_limit=50)
    assert client.chat().json["code"] == "daily_budget_exceeded"
    assert save(admin, row, extra_tokens=1000) == {}
    row.refresh_from_db()
    assert (row.extra_tokens, row.extra_day) == (1000, today())
    assert client.chat().data("usage")["remainingToday"] == 1050 - 14


def test_a_grant_that_is_taken_back_leaves_no_day(admin: Browser) -> None:
    row = Account.objects.create(name="ip:192.0.2.1", extra_tokens=1000, extra_day=today())
    assert save(admin, row, extra_tokens="") == {}
    row.refresh_from_db()
    assert (row.extra_tokens, row.extra_day) == (None, None)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ({"extra_tokens": 5, "extra_day": "2020-01-01"}, {"extra_day": ["This day is over."]}),
        ({"extra_tokens": -5}, {"extra_tokens": ["Ensure this value is greater than or equal to 0."]}),
    ],
)
def test_a_grant_that_cannot_be_meant_is_refused(
    admin: Browser, typed: dict[str, Any], problem: dict[str, list[str]]
) -> None:
    assert add(admin, "ip:192.0.2.1", **typed) == problem


def test_a_grant_above_what_the_code_allows_is_refused(admin: Browser, edit_profile: EditProfile) -> None:
    site = Account.objects.get(name="site")
    problem = ["This would change nothing: 500,000 by SITE_DAILY_TOKEN_LIMIT, and no more may be."]
    assert save(admin, site, extra_tokens=5) == {"extra_tokens": problem}
    large = edit_profile("large", daily_token_limit=10**9)
    problem = ["This would change nothing: 500,000 by large, and no more may be."]
    assert add(admin, "ip:192.0.2.1", profile=large.pk, extra_tokens=5) == {"extra_tokens": problem}


def test_a_number_of_tokens_has_its_day_in_the_database_too(database: str) -> None:
    for half in ({"extra_tokens": 5}, {"extra_day": date(2026, 11, 25)}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Account.objects.create(name="ip:192.0.2.1", **half)


# Whom it is about.


def test_a_user_is_chosen_and_not_typed(admin: Browser, ada: User) -> None:
    """By Django's own search of users, which lists those that match and not a hundred thousand."""
    form = page(admin, "account_add")
    assert 'name="user"' in form and 'data-model-name="logentry" data-field-name="user"' in form
    assert "Lovelace" not in form
    asked = {"app_label": "admin", "model_name": "logentry", "field_name": "user", "term": "lovelace"}
    assert admin.get(reverse("admin:autocomplete"), asked).json()["results"] == [{"id": "35", "text": "ada"}]
    assert add(admin, "", user=35, paused=True) == {}
    assert Account.objects.get(name="user:35").paused
    assert "This is Ada Lovelace (ada@example.org): user:35." in html.unescape(page(admin, "account_changelist"))


def test_a_choice_and_another_name_are_not_both_meant(admin: Browser, ada: User) -> None:
    problem = {"name": ["This is another account: choose a user, or type a name."]}
    assert add(admin, "ip:192.0.2.1", user=35) == problem
    assert add(admin, "ada", user=35) == {}


def test_users_are_typed_where_the_admin_has_no_page_of_them(
    admin: Browser, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(site._registry, User)
    assert 'name="user"' not in page(admin, "account_add")
    assert add(admin, "ada@example.org") == {}
    assert Account.objects.filter(name="user:35").exists()


def test_whoever_may_not_see_users_types_them(staff: Staff, ada: User) -> None:
    browser = staff("add_account", "view_account")
    assert 'name="user"' not in page(browser, "account_add")
    assert add(browser, "ada") == {}


def test_people_stand_beside_their_accounts_in_one_query(
    admin: Browser, ada: User, django_assert_max_num_queries: Any
) -> None:
    for number in range(40):
        user = User.objects.create_user(f"user{number}", pk=1000 + number)
        DailyUsage.objects.create(day=today(), account=f"user:{user.pk}", tokens_used=1_234_567)
    DailyUsage.objects.create(day=today(), account="user:35")
    DailyUsage.objects.create(day=today(), account="user:nobody")
    DailyUsage.objects.create(day=today(), account=f"user:{10**30}")
    with django_assert_max_num_queries(9):  # with the session, the user, the hierarchy of days
        listed = html.unescape(page(admin, "dailyusage_changelist"))
    assert 'user:35 <span class="chatnest-who">Ada Lovelace (ada@example.org)</span>' in listed
    assert 'user:1039 <span class="chatnest-who">user39</span>' in listed
    assert "1,234,567" in listed


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("dailyusage", lambda account: DailyUsage(account=account, day=today())),
        ("usageline", lambda account: UsageLine(account=account, day=today(), model="m")),
        ("refusal", lambda account: Refusal(account=account, day=today(), hour=NOW, last_at=NOW, code="paused")),
        ("adjustment", lambda account: Adjustment(account=account, day=today(), tokens=1, kind="late", created_at=NOW)),
        ("change", lambda account: Change(subject=account, at=NOW, kind="account", field="paused")),
        ("reservation", lambda account: Reservation(payer=account, **HELD)),
    ],
)
def test_every_list_finds_an_account_by_its_whole_name_or_its_person(
    admin: Browser, ada: User, name: str, make: Callable[[str], Any]
) -> None:
    for account in ["user:35", "user:3500", "ip:2001:db8::1"]:
        make(account).save()

    def found(text: str) -> list[str]:
        cells = re.findall(
            r'field-(?:account|payer|subject)[^"]*">(?:<a [^>]*>)?([^< ]*)', page(admin, f"{name}_changelist", q=text)
        )
        return sorted(cells)

    assert found("user:35") == ["user:35"]
    assert found("lovelace") == found("ada@example.org") == ["user:35"]
    assert found("ip:2001:DB8::1") == ["ip:2001:db8::1"]
    assert found("350") == ["user:3500"]
    # What is a whole name is not a part of another, also where nothing is stored of it.
    User.objects.create_user("eve", pk=3)
    assert found("user:3") == []


# What a value is.


def test_money_is_in_the_currency_and_what_has_no_price_is_a_word(admin: Browser, configure: Configure) -> None:
    costs = [None, 0, 1_234, 1_500_000, 12_345_678_900_000]
    for cost in costs:
        Reservation.objects.create(payer="ip:192.0.2.1", cost=cost, **CLOSED)
    open_now = Reservation.objects.create(payer="ip:192.0.2.1", **HELD)
    listed = page(admin, "reservation_changelist")
    cells = re.findall(r'field-cost_in_currency[^"]*">([^<]*)', listed)
    assert sorted(cells) == sorted(["unpriced", "0.00", "0.001234", "1.50", "12,345,678.90", "-"])
    assert "cost (USD)" in listed.lower().replace("(usd)", "(USD)")
    assert "millionths" not in page(admin, "reservation_change", open_now.pk)


def test_a_bill_says_what_had_no_price(admin: Browser) -> None:
    for model, cost, unpriced in [("a", 1_500_000, 0), ("b", 1_500_000, 1200), ("c", 0, 3), ("d", 0, 0)]:
        UsageLine.objects.create(account="site", day=today(), model=model, cost=cost, unpriced=unpriced)
    cells = re.findall(r'field-cost_in_currency[^"]*">([^<]*)', page(admin, "usageline_changelist"))
    assert sorted(cells) == sorted(["1.50", "1.50, and 1,200 unpriced", "unpriced", "0.00"])


def test_a_time_has_seconds_and_the_name_of_its_zone(admin: Browser, settings: Any) -> None:
    at = datetime(2026, 7, 1, 10, 11, 12, tzinfo=UTC)
    row = Adjustment.objects.create(day=at.date(), account="user:1", tokens=1234, kind="late", created_at=at)
    settings.TIME_ZONE = "Europe/Berlin"
    for shown in (page(admin, "adjustment_changelist"), page(admin, "adjustment_change", row.pk)):
        assert "2026-07-01 12:11:12 CEST" in shown
        assert "1,234" in shown


def test_a_price_is_set_and_says_by_whom(admin: Browser, configure: Configure) -> None:
    configure(PROVIDERS={"local": {"BASE_URL": "http://127.0.0.1:8080/v1"}})
    price = Price(provider="local", model="llama", input=Decimal("0.000125"), output=Decimal(1234))
    assert save(admin, price) == {}
    listed = page(admin, "price_changelist")
    assert "0.000125" in listed and "1,234.00" in listed
    assert re.search(r"operator, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", listed)
    assert "USD for a million tokens" in page(admin, "price_add")
    negative = save(admin, Price(model="m", input=Decimal(-1), output=Decimal(1)))
    assert negative == {"input": ["Ensure this value is greater than or equal to 0."]}


# A profile's limits.


def test_a_limit_above_the_caps_is_said_to_be_so(admin: Browser, edit_profile: EditProfile) -> None:
    row = edit_profile("vip", daily_token_limit=70_000)
    assert save(admin, row, daily_token_limit=900_000) == {}
    listed = html.unescape(page(admin, "profile_changelist"))
    assert "Daily token limit: 900,000 was typed, HARD_CAPS allow 500,000." in listed
    assert "<strong>500,000</strong> (HARD_CAPS; 900,000 was typed)" in listed


def test_a_profiles_limit_that_would_change_nothing_is_refused(admin: Browser, edit_profile: EditProfile) -> None:
    row = edit_profile("vip", daily_token_limit=500_000)
    nothing = "This would change nothing: HARD_CAPS allow {}."
    assert save(admin, row, daily_token_limit=900_000) == {"daily_token_limit": [nothing.format("500,000")]}
    assert save(admin, row, rate_window_seconds=30) == {"rate_window_seconds": [nothing.format("60")]}
    assert save(admin, row, daily_token_limit=400_000) == {}


def test_a_profile_above_caps_that_were_lowered_later_can_still_be_edited(
    admin: Browser, configure: Configure, edit_profile: EditProfile
) -> None:
    row = edit_profile("vip")
    configure(HARD_CAPS={"daily_token_limit": 1000})
    assert save(admin, row, model="another") == {}
    assert Profile.objects.get(pk=row.pk).model == "another"


def test_a_days_money_above_the_months_is_refused(admin: Browser, edit_profile: EditProfile) -> None:
    problem = {"daily_money_limit": ["This would change nothing: the month's limit is lower."]}
    for row in (edit_profile("vip"), Account.objects.get(name="site")):
        assert save(admin, row, daily_money_limit="10.01", monthly_money_limit="10") == problem
        assert save(admin, row, daily_money_limit="2.50", monthly_money_limit="10") == {}
        row.refresh_from_db()
        assert (row.daily_money_limit, row.monthly_money_limit) == (Decimal("2.50"), Decimal(10))
        assert "Daily money limit (USD)" in page(admin, f"{row._meta.model_name}_change", row.pk)


# Pausing from the list.


def act(browser: Browser, action: str, *names: str, **typed: str) -> Any:
    rows = list(Account.objects.filter(name__in=names).values_list("pk", flat=True))
    sent = {"action": action, "_selected_action": rows, **typed}
    return browser.post(reverse("admin:chatnest_account_changelist"), sent, follow=True)


def test_a_page_says_what_pausing_will_change_before_it_does(admin: Browser, ada: User) -> None:
    Account.objects.create(name="user:35")
    for accounts in (["user:35", "site"], ["ip:192.0.2.1", "anonymous", "site"], ["key:3", "site"]):
        Reservation.objects.create(payer=accounts[0], **HELD | {"accounts": accounts})
    asked = html.unescape(act(admin, "pause", "user:35", "anonymous").content.decode())
    assert 'user:35 <span class="chatnest-who">Ada Lovelace (ada@example.org)</span>' in asked
    assert "Answers being written for them now: <strong>2</strong>. They end within 15 seconds." in asked
    assert "The chat is paused by its operator. Please try again later." in asked
    assert not Account.objects.filter(paused=True).exists()
    assert "Answers being written for them now: <strong>3</strong>" in act(admin, "pause", "site").content.decode()


def test_pausing_is_done_at_once_and_undone(admin: Browser, client: Client) -> None:
    """In the process that serves the page too: it hears of each row."""
    assert client.chat().status == 200
    done = act(admin, "pause", "site", "anonymous", confirmed="yes", reason="spam")
    assert "2 accounts are paused." in done.content.decode()
    assert client.chat().json["code"] == "paused"
    told = LogEntry.objects.values_list("object_repr", "change_message")
    assert sorted(told) == [("anonymous", "Paused. spam"), ("site", "Paused. spam")]
    assert "so already" in act(admin, "pause", "site").content.decode()
    assert "may chat again" in act(admin, "resume", "site", "anonymous").content.decode()
    assert "2 accounts may chat again." in act(admin, "resume", "site", "anonymous", confirmed="yes").content.decode()
    assert client.chat().status == 200


def test_all_of_a_long_list_are_paused_at_once(admin: Browser) -> None:
    Account.objects.bulk_create([Account(name=f"key:{number}") for number in range(1200)])
    asked = act(admin, "pause", "site", select_across="1", index="0").content.decode()
    assert "and 1,102 more" in asked and 'name="select_across" value="1"' in asked
    act(admin, "pause", "site", select_across="1", confirmed="yes")
    assert not Account.objects.filter(paused=False).exists()


def test_deleting_says_what_it_leaves(admin: Browser) -> None:
    row = Account.objects.create(name="ip:192.0.2.1", paused=True, daily_token_limit=5)
    asked = page(admin, "account_delete", row.pk)
    assert "ip:192.0.2.1 is paused, and will not be." in asked
    assert "In force today without this row: 200,000 (200,000 by expanded)." in asked
    assert "Those that are paused here will not be." in act(admin, "delete_selected", row.name).content.decode()


def test_an_account_whose_row_somebody_deleted_is_added_again(admin: Browser) -> None:
    Account.objects.filter(name="site").delete()
    assert add(admin, "site", paused=True) == {}
    assert in_force(admin, "site") == "Paused: none: site is paused"


# Who may do what.

Staff = Callable[..., Browser]


@pytest.fixture
def staff(database: str) -> Staff:
    """Somebody with these permissions only: ``staff("view_account")``."""

    def staff(*permissions: str) -> Browser:
        user = User.objects.create_user(f"staff{User.objects.count()}", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        browser = Browser()
        browser.force_login(user)
        return browser

    return staff


SHOWN = [model for model in site._registry if model._meta.app_label == "chatnest" and not model._meta.proxy]


def test_whoever_may_only_look_sees_every_page_and_no_button(staff: Staff, admin: Browser) -> None:
    look = staff(*(f"view_{model._meta.model_name}" for model in SHOWN))
    Reservation.objects.create(payer="ip:192.0.2.1", **HELD)
    Change.objects.create(at=NOW, kind="account", subject="site", field="paused")
    Price.objects.create(model="m", input=1, output=2)
    Account.objects.filter(name="site").update(paused=True, daily_token_limit=12_345)
    for model in SHOWN:
        name = model._meta.model_name
        listed = page(look, f"{name}_changelist")
        assert "addlink" not in listed and 'name="action"' not in listed, name
        if row := model._default_manager.first():
            shown = page(look, f"{name}_change", row.pk)
            assert 'name="_save"' not in shown and "deletelink" not in shown, name
            assert "icon-yes" not in shown and "icon-no" not in shown, name
    shown = page(look, "account_change", Account.objects.get(name="site").pk)
    assert "<strong>Paused</strong>" in shown and "12,345" in shown
    refused = act(look, "pause", "anonymous", confirmed="yes")
    assert not Account.objects.get(name="anonymous").paused, refused.content


def test_whoever_may_nothing_sees_nothing(staff: Staff) -> None:
    nobody = staff()
    for model in SHOWN:
        assert nobody.get(reverse(f"admin:chatnest_{model._meta.model_name}_changelist")).status_code == 403


def test_limits_pauses_and_grants_are_permissions_of_their_own(staff: Staff) -> None:
    row = Account.objects.create(name="ip:192.0.2.1")
    typed = {"daily_token_limit": 1000, "extra_tokens": 5, "paused": True}
    change = staff("change_account", "view_account")
    assert 'name="paused"' not in page(change, "account_change", row.pk)
    assert save(change, row, **typed) == {}
    row.refresh_from_db()
    assert (row.daily_token_limit, row.extra_tokens, row.paused) == (1000, None, False)
    assert save(staff("change_account", "grant_tokens"), row, **typed) == {}
    row.refresh_from_db()
    assert (row.extra_tokens, row.paused) == (5, False)
    assert save(staff("change_account", "pause_account"), row, **typed) == {}
    row.refresh_from_db()
    assert row.paused


def test_stopping_everybody_is_a_permission_of_its_own(staff: Staff) -> None:
    pauses = staff("view_account", "change_account", "pause_account")
    site_row = Account.objects.get(name="site")
    assert 'name="paused"' not in page(pauses, "account_change", site_row.pk)
    assert "You may not do that to site." in act(pauses, "pause", "site", "anonymous").content.decode()
    act(pauses, "pause", "site", "anonymous", confirmed="yes")
    assert not Account.objects.filter(paused=True).exists()
    act(pauses, "pause", "anonymous", confirmed="yes")
    assert Account.objects.get(name="anonymous").paused
    act(staff("view_account", "stop_chat"), "pause", "site", confirmed="yes")
    assert Account.objects.get(name="site").paused


def test_a_page_that_nobody_can_act_on_is_not_there(admin: Browser) -> None:
    assert "ratewindow" not in admin.get(reverse("admin:app_list", args=["chatnest"])).content.decode()


def test_an_accounts_money_limit_that_would_change_nothing_is_refused(
    admin: Browser, ada: User, configure: Configure
) -> None:
    configure(SITE_DAILY_MONEY_LIMIT="5")
    site = Account.objects.get(name="site")
    nothing = ["This would change nothing: the limit is 5.00 USD without it."]
    assert save(admin, site, daily_money_limit="5.00") == {"daily_money_limit": nothing}
    assert save(admin, site, daily_money_limit="4.99") == {}
    assert save(admin, Account(name="user:35"), monthly_money_limit="100") == {}, "nothing else limits its month"


def test_a_profile_says_what_its_model_costs_and_who_says_so(admin: Browser, configure: Configure) -> None:
    row = Profile.objects.get(name="balanced")
    configure(CURRENCY="EUR")
    assert "not known: its answers are unpriced" in page(admin, "profile_change", row.pk)
    configure(PRICES={"gpt-4o-mini": {"input": "0.15", "output": "0.60"}})
    told = "a million tokens of the prompt 0.15 EUR, cached 0.15 EUR, of the answer 0.60 EUR (by PRICES)"
    assert told in page(admin, "profile_change", row.pk)
    Price.objects.create(model="gpt-4o-mini", input=1, cached_input="0.1", output=2)
    assert "1.00 EUR, cached 0.10 EUR, of the answer 2.00 EUR (by admin)" in page(admin, "profile_change", row.pk)

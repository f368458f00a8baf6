"""The admin: what an operator sees is what is in force, and what is saved there works."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client as Browser
from django.urls import reverse

from chatnest.limits import DEFAULT_PROFILES
from chatnest.models import Profile

from .conftest import Configure, EditProfile, on_sqlite

pytestmark = on_sqlite


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
    assert "deletelink" not in page(admin, "profile_change", row.pk)
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

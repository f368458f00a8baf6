"""An account's form: a user is chosen, or a name completed; what would be saved and change nothing is refused."""

from __future__ import annotations

from typing import Any, cast

from django import forms
from django.contrib.admin.models import LogEntry
from django.contrib.admin.sites import AdminSite
from django.contrib.admin.widgets import AutocompleteSelect
from django.contrib.auth import get_user_model
from django.utils.text import format_lazy
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ..accounts import SHARED, canonical, misnamed, normal_address, user_named
from ..conf import today
from ..models import Account
from ..operators.standing import daily_limit, decided, given, money_of
from ..operators.words import money, number
from ..policy import DailyLimit, Policy
from ..prices import MILLION
from .profiles import name_the_currency, refuse_a_longer_day


class AccountForm(forms.ModelForm):
    """``choose_from``: the site whose own page of users they are chosen from; None where that cannot be."""

    choose_from: AdminSite | None = None

    user: forms.ModelChoiceField[Any] = forms.ModelChoiceField(None, label=gettext_lazy("User"), required=False)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name_the_currency(self)
        if name := self.fields.get("name"):
            hint = gettext_lazy("A user's name or e-mail, an address, or the account's own name:")
            name.help_text = format_lazy("{} {}", hint, name.help_text)
        if self.choose_from is None:
            del self.fields["user"]
            return
        user = cast("forms.ModelChoiceField", self.fields["user"])
        # Django completes what a foreign key points to: that of its own log does, whatever the site's users are.
        user.widget = AutocompleteSelect(LogEntry._meta.get_field("user"), self.choose_from)
        user.widget.is_required = False
        user.queryset = get_user_model()._default_manager.all()
        self.fields["name"].required = False

    def clean(self) -> dict[str, Any] | None:
        typed = super().clean() or {}
        self._clean_who(typed)
        refuse_a_longer_day(self)
        row = Account(**{"name": self.instance.name, **typed, "id": None})
        row.name = canonical(row.name)
        policy = Policy.read(SHARED)
        self._refuse_money_without_effect(row, policy)
        limit = daily_limit(row, policy=policy)
        lowered, extra, day = row.daily_token_limit, row.extra_tokens, row.extra_day or today()
        if "daily_token_limit" in self.changed_data and lowered is not None and lowered > limit.given:
            self.add_error("daily_token_limit", _("This would change nothing: %s.") % given(limit))
        if {"extra_tokens", "extra_day"}.isdisjoint(self.changed_data) or not extra:
            return typed
        if day < today():
            self.add_error("extra_day", _("This day is over."))
        row.extra_day = day
        without = Account(name=row.name, profile=row.profile, daily_token_limit=lowered)
        if daily_limit(row, day, policy) == daily_limit(without, policy=policy):
            self.add_error("extra_tokens", _("This would change nothing: %s, and no more may be.") % given(limit))
        return typed

    def _refuse_money_without_effect(self, row: Account, policy: Policy) -> None:
        for name, period in (("daily_money_limit", "daily"), ("monthly_money_limit", "monthly")):
            typed = getattr(row, name)
            if name not in self.changed_data or typed is None:
                continue
            without = Account(name=row.name, profile=row.profile)
            limit = getattr(money_of(policy.with_row(without), row.name), period)
            if limit is not None and typed * MILLION >= limit:
                self.add_error(name, _("This would change nothing: the limit is %s without it.") % money(limit))

    def _clean_who(self, typed: dict[str, Any]) -> None:
        user = typed.pop("user", None)
        if name := typed.get("name"):
            typed["name"] = completed(name)
        if user is None:
            if "name" in typed and not typed["name"]:
                self.add_error("name", self.fields["name"].error_messages["required"])
        elif name and typed["name"] != f"user:{user.pk}":
            self.add_error("name", _("This is another account: choose a user, or type a name."))
        else:
            typed["name"] = f"user:{user.pk}"


def completed(text: str) -> str:
    """The account of the user, or of the address, that is called so; else the text, for the model to judge."""
    name = canonical(text.strip())
    if not misnamed(name):
        return name
    if address := normal_address(name):
        return f"ip:{address}"
    # With a colon it was meant as an account's own name: whoever mistypes that is asked.
    user = None if ":" in name else user_named(name)
    return f"user:{user.pk}" if user else name


def in_force(row: Account, limit: DailyLimit) -> str:
    """How many tokens today, and why."""
    if limit.paused:
        return _("none: %s is paused") % limit.paused
    return f"{number(limit.in_force)} ({', '.join([given(limit), *decided(limit, row)])})"

"""Profiles: what was typed, beside what the code's hard caps leave in force."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import format_lazy
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, pgettext

from ..conf import provider_names
from ..limits import FIELDS, clamp, hard_caps
from ..models import Profile
from ..operators.words import money, number
from ..policy import Policy
from ..reports import currency
from .columns import columns
from .pages import Page

MONEY = ("daily_money_limit", "monthly_money_limit")


def choose_provider(form: forms.ModelForm) -> None:
    """What is stored is shown, even where the settings have it no more: saving then says so."""
    if "provider" in form.fields:
        names = sorted(provider_names() | {form.instance.provider})
        form.fields["provider"].widget = forms.Select(choices=[(name, name) for name in names])


def name_the_currency(form: forms.ModelForm) -> None:
    for name in {*MONEY} & form.fields.keys():
        form.fields[name].label = f"{form.fields[name].label} ({currency()})"


def refuse_a_longer_day(form: forms.ModelForm) -> None:
    """A day's limit above the month's is never reached."""
    day, month = (form.cleaned_data.get(name) for name in MONEY)
    if day is not None and month is not None and day > month and {*MONEY} & {*form.changed_data}:
        form.add_error("daily_money_limit", _("This would change nothing: the month's limit is lower."))


class ProfileForm(forms.ModelForm):
    """Refuses a limit that would be saved with success and change nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        choose_provider(self)
        name_the_currency(self)
        if "fallback" in self.fields:
            fallback = cast("forms.ModelChoiceField", self.fields["fallback"])
            fallback.queryset = Profile.objects.exclude(pk=self.instance.pk)
        self.before = None if self.instance._state.adding else clamp(self.instance.limits, hard_caps())

    def clean(self) -> dict[str, Any] | None:
        typed = super().clean() or {}
        refuse_a_longer_day(self)
        for name in self.capped() if self.before else ():
            allowed = getattr(hard_caps(), name)
            if getattr(self.before, name) == allowed:
                self.add_error(name, _("This would change nothing: HARD_CAPS allow %s.") % number(allowed))
        return typed

    def capped(self) -> list[str]:
        """Of what was changed, that which HARD_CAPS do not allow."""
        typed = {name: self.cleaned_data[name] for name in FIELDS if name in self.cleaned_data}
        if len(typed) < len(FIELDS):
            return []  # it has other errors
        in_force = clamp(Profile(**typed).limits, hard_caps())
        return [name for name in FIELDS if name in self.changed_data and getattr(in_force, name) != typed[name]]


@admin.register(Profile)
class ProfileAdmin(Page):
    form = ProfileForm
    list_display = (
        *("name", "state", "daily_token_limit_in_force", "max_output_tokens_in_force"),
        *columns(Profile, "model", "provider", "audience"),
    )
    fieldsets = (
        (None, {"fields": ("name", "enabled", "audience", "provider", "model", "fallback", "system_prompt")}),
        (
            gettext_lazy("Limits"),
            {
                "fields": tuple((name, f"{name}_in_force") for name in FIELDS),
                "description": gettext_lazy(
                    "Whatever is typed here, the code's HARD_CAPS still apply: see what is in force."
                ),
            },
        ),
        (gettext_lazy("Money"), {"fields": ("price", *MONEY)}),
    )
    readonly_fields = ("price", *(f"{name}_in_force" for name in FIELDS))

    def locked(self, request: HttpRequest, obj: Profile | None = None) -> Collection[str]:
        return ("name",) if obj and obj.is_delivered else ()

    def has_delete_permission(self, request: HttpRequest, obj: Profile | None = None) -> bool:
        return super().has_delete_permission(request, obj) and not (obj and obj.is_delivered)

    def save_model(self, request: HttpRequest, obj: Profile, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        for name in form.capped():
            text = _("%(limit)s: %(typed)s was typed, HARD_CAPS allow %(allowed)s.") % {
                "limit": form.fields[name].label,
                "typed": number(getattr(obj, name)),
                "allowed": number(getattr(hard_caps(), name)),
            }
            self.message_user(request, text, messages.WARNING)

    @admin.display(description=gettext_lazy("price"))
    def price(self, profile: Profile) -> str:
        """Of its model, and who says so."""
        if profile._state.adding:
            return "-"
        known = Policy.read().prices.get((profile.provider, profile.model))
        if known is None:
            return _("not known: its answers are unpriced")
        facts = {
            "input": money(known.input),
            "cached": money(known.cached_input),
            "output": money(known.output),
            "source": known.source,
        }
        return (
            _("a million tokens of the prompt %(input)s, cached %(cached)s, of the answer %(output)s (by %(source)s)")
            % facts
        )

    @admin.display(description=gettext_lazy("state"), ordering="enabled")
    def state(self, profile: Profile) -> SafeString:
        if profile.enabled:
            return format_html("{}", pgettext("profile", "On"))
        return format_html("<strong>{}</strong>", pgettext("profile", "Off"))


def _in_force(name: str) -> Any:
    field: Any = Profile._meta.get_field(name)

    @admin.display(description=format_lazy(gettext_lazy("{limit} in force"), limit=field.verbose_name), ordering=name)
    def in_force(self: ProfileAdmin, profile: Profile) -> SafeString | str:
        typed = getattr(profile, name)
        if profile._state.adding:
            return "-"
        value = getattr(clamp(profile.limits, hard_caps()), name)
        shown = _("not sent") if value is None else number(value)
        if value == typed:
            return str(shown)
        return format_html("<strong>{}</strong> ({})", shown, _("HARD_CAPS; %s was typed") % number(typed))

    return in_force


for _name in FIELDS:
    setattr(ProfileAdmin, f"{_name}_in_force", _in_force(_name))

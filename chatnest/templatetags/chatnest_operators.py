"""For the operators' pages: numbers, times and people in words."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from django import template
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from ..conf import aware
from ..operators import actions, charts, words
from ..reports import Person

register = template.Library()

for name in ("number", "percent", "seconds", "when", "when_zoned", "clock", "lasting", "reason", "money"):
    register.filter(name, getattr(words, name))
register.filter("meter", charts.meter)


@register.filter
def ago(at: datetime, now: datetime) -> str:
    return words.lasting(aware(now) - aware(at))


@register.simple_tag
def person(people: Mapping[str, Person], name: str) -> str:
    """Whose account it is, if anybody's."""
    known = people.get(name)
    return " · ".join(filter(None, [name, known.email if known else ""]))


@register.simple_tag
def account(people: Mapping[str, Person], name: str) -> SafeString:
    """A link to its page, by the person's name."""
    address = f"{reverse('admin:chatnest_usage_account')}?{urlencode({'name': name})}"
    if person := people.get(name):
        quiet = f"{person.email} · {name}" if person.email else name
        return format_html('<a href="{}">{}</a> <span class="quiet">{}</span>', address, person.name, quiet)
    return format_html('<a href="{}">{}</a>', address, name)


@register.simple_tag(takes_context=True)
def action(context: Mapping[str, Any], what: str, label: str, name: str, answer: object = "") -> SafeString:
    """A link to the page that asks whether to do it; nothing for who may not."""
    what = actions.meant(what, name)
    if what not in context["may"]:
        return SafeString("")
    request: HttpRequest = context["request"]
    asked = {"name": name, "next": request.get_full_path()} | ({"answer": str(answer)} if answer else {})
    address = f"{reverse('admin:chatnest_usage_do', args=[what])}?{urlencode(asked)}"
    return format_html('<a class="act act-{}" href="{}">{}</a>', what, address, label)

"""Who pays: the accounts that a request is charged to, the payer first, ``site`` last.

Strangers, who are known by an address only, share the budget of ``anonymous`` too: it is a part of the site's day,
so that they cannot close the site for its users.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from inspect import isawaitable
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured, PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse, QueryDict
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.translation import gettext as _

from .conf import payer_callable, settings
from .errors import Forbidden, NotAuthenticated

SITE: Final = "site"
ANONYMOUS: Final = "anonymous"
KINDS: Final = ("user", "ip", "key")
SHARED: Final = (SITE, ANONYMOUS)  # by many payers; they are nobody's own
UNKNOWN: Final = "unknown"
# All but what nobody can see or type: control characters (no database keeps all of them), line breaks, halves of
# surrogate pairs, space at an end.
_NAME: Final = re.compile(r"(?!\s)[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,200}(?<!\s)")
NAME_RULE: Final = "text of 1 to 200 characters, without control characters or space at an end"


async def charged(request: HttpRequest) -> tuple[str, ...]:
    """The accounts of ``request``. Raises NotAuthenticated and Forbidden.

    ``CHATNEST["PAYER"]`` is called with the request and the list of accounts (``["user:7"]``; empty for an
    anonymous request where those are refused) and returns the list to charge, the payer first: more accounts
    (a team's), or others. It may be async. ``site`` always pays too, and for a stranger ``anonymous``.
    """
    accounts = await _default(request)
    if payer := payer_callable():
        try:
            answer = payer(request, accounts)
            answer = await answer if isawaitable(answer) else answer
            accounts = [answer] if isinstance(answer, str) else list(answer)
        except PermissionDenied:
            raise Forbidden() from None
    if not accounts:
        raise NotAuthenticated()
    named = list(map(_checked, accounts))
    return tuple(dict.fromkeys([*named, *([ANONYMOUS] if is_stranger(named[0]) else []), SITE]))


def is_name(text: str) -> bool:
    """Whether an account can be called that, by PAYER and by the operator who pauses it."""
    return bool(_NAME.fullmatch(text))


def canonical(name: str) -> str:
    """The name of the account that is charged; it is another only where an address has several forms."""
    kind, _, rest = name.partition(":")
    return f"ip:{normal_address(rest) or rest}" if kind == "ip" else name


def misnamed(name: str) -> str | None:
    """Why no request is charged to an account of this name, as far as can be known; or None."""
    if name in SHARED:
        return None
    kind, colon, rest = name.partition(":")
    match kind, colon:
        case "user", ":":
            return _unknown_user(rest)
        case "ip", ":":
            return None if normal_address(rest) or rest == UNKNOWN else _("%s is no IP address.") % rest
        case "key", ":":
            return None if rest else _("Which key?")
    meant = _meant(name)
    if settings.PAYER is None and not (meant or colon) and (user := _user_named(name)):
        meant = f"user:{user.pk}"
    if meant:
        return _("No request is charged to %(name)s. Did you mean %(meant)s?") % {"name": name, "meant": meant}
    if settings.PAYER is None:
        return _("No request is charged to %s. Accounts are named like site, user:7 or ip:192.0.2.1.") % name
    return None


def _meant(name: str) -> str | None:
    """What is nearly that name, and no team's or tenant's."""
    kind, colon, rest = name.partition(":")
    if close := get_close_matches(kind.strip().lower(), KINDS if colon else SHARED, 1, 0.8):
        return f"{close[0]}{colon}{rest.strip()}"
    address = normal_address(name)
    return f"ip:{address}" if address else None


def _unknown_user(pk: str) -> str | None:
    users = get_user_model()._base_manager
    with suppress(ValueError, ValidationError):  # no primary key could be that
        if user := users.filter(pk=pk).first():
            if str(user.pk) == pk:
                return None
            return _("Did you mean user:%s?") % user.pk
    problem = _("There is no user with the primary key %s.") % pk
    user = _user_named(pk)
    return f"{problem} {_('Did you mean user:%s?') % user.pk}" if user else problem


def _user_named(name: str) -> Any:
    users = get_user_model()
    return users._base_manager.filter(**{users.USERNAME_FIELD: name}).first()


def is_stranger(payer: str) -> bool:
    """Whoever is known by an address only."""
    return payer.startswith("ip:")


async def _default(request: HttpRequest) -> list[str]:
    user = await request.auser() if hasattr(request, "auser") else None
    if user is not None and user.is_authenticated:
        if refused := await _csrf_failure(request):
            raise Forbidden("The page is out of date (CSRF check failed). Reload it and try again.") from refused
        return [f"user:{user.pk}"]
    return [f"ip:{address(request)}"] if settings.ALLOW_ANONYMOUS else []


def _checked(account: object) -> str:
    """As whoever pauses it will write it."""
    if isinstance(account, str) and is_name(account) and account not in SHARED:
        return canonical(account)
    raise ImproperlyConfigured(f"An account must be {NAME_RULE}, and not site or anonymous. {account!r} is not.")


def _no_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


class _CsrfCheck(CsrfViewMiddleware):
    def _reject(self, request: HttpRequest, reason: str) -> HttpResponse:
        raise PermissionDenied(reason)


async def _csrf_failure(request: HttpRequest) -> PermissionDenied | None:
    """The view is exempt from the middleware, because only a cookie makes a request forgeable: checked here.

    In a thread, because with CSRF_USE_SESSIONS it reads the session.
    """

    def check() -> PermissionDenied | None:
        middleware = _CsrfCheck(_no_view)
        # A JSON request has its token in a header: a form, which may be broken or large, is not looked into.
        request.POST = QueryDict()
        try:
            middleware.process_request(request)
            middleware.process_view(request, _no_view, (), {})
        except PermissionDenied as refused:
            return refused
        return None

    if request.method in ("GET", "HEAD"):
        return None
    return await sync_to_async(check)()


def address(request: HttpRequest) -> str:
    """The client's address: REMOTE_ADDR, or what the outermost of TRUSTED_PROXIES hops saw.

    A public IPv6 address counts by its /64, the least that a subscriber is given: else each has 2^64 budgets.
    """
    hops: Iterable[str] = request.META.get("HTTP_X_FORWARDED_FOR", "").split(",")
    seen = [hop for hop in hops if hop.strip()]
    trusted = settings.TRUSTED_PROXIES
    direct = request.META.get("REMOTE_ADDR") or UNKNOWN
    # Fewer hops than proxies: somebody went round them, and wrote the header.
    claimed = seen[-trusted] if trusted and len(seen) >= trusted else direct
    return normal_address(claimed) or normal_address(direct) or UNKNOWN


def normal_address(text: str) -> str | None:
    """The address that ``text`` means, as accounts are named by it; None if it is none.

    With or without quotes and a port, which is another for each connection: ``203.0.113.7:51234`` is how Azure's
    gateways write a client (https://learn.microsoft.com/azure/application-gateway/how-application-gateway-works),
    and ``"[2001:db8::1]:443"`` how RFC 7239 does.
    """
    text = text.strip(" \t\"'")
    host, _, port = text.rpartition(":")
    ip = _parsed(text) or (_parsed(host) if port.isdecimal() else None)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        if ip.is_global:
            return str(ipaddress.ip_network((int(ip), 64), strict=False).network_address)
        return str(ipaddress.IPv6Address(int(ip)))  # without a zone, which is the proxy's own matter
    return str(ip) if ip else None


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None

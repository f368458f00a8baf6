"""Who pays: the accounts that a request is charged to, the payer first, ``site`` last.

Strangers, who are known by an address only, share the budget of ``anonymous`` too: it is a part of the site's day,
so that they cannot close the site for its users.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from inspect import isawaitable
from typing import Final

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.http import HttpRequest, HttpResponse, QueryDict
from django.middleware.csrf import CsrfViewMiddleware

from .conf import payer_callable, settings
from .errors import Forbidden, NotAuthenticated

SITE: Final = "site"
ANONYMOUS: Final = "anonymous"
SHARED: Final = (SITE, ANONYMOUS)  # by many payers; they are nobody's own
MAX_LENGTH: Final = 200


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
    if isinstance(account, str) and 0 < len(account) <= MAX_LENGTH and account not in SHARED:
        return account
    raise ImproperlyConfigured(f"An account must be a string of 1 to {MAX_LENGTH} characters, not {account!r}.")


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
    seen = [hop.strip() for hop in hops if hop.strip()]
    trusted = settings.TRUSTED_PROXIES
    direct = request.META.get("REMOTE_ADDR") or "unknown"
    # Fewer hops than proxies: somebody went round them, and wrote the header.
    claimed = seen[-trusted] if trusted and len(seen) >= trusted else direct
    return _normal(claimed) or _normal(direct) or "unknown"


def _normal(text: str) -> str | None:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        if ip.is_global:
            return str(ipaddress.ip_network((int(ip), 64), strict=False).network_address)
    return str(ip)

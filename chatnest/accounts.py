"""Who pays: the accounts that a request is charged to, the payer first, ``site`` last.

Strangers, who are known by an address only, share the budget of ``anonymous`` too: it is a part of the site's day,
so that they cannot close the site for its users.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.contrib.auth import SESSION_KEY, get_user_model
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.core.exceptions import ImproperlyConfigured, PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse, QueryDict
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.functional import SimpleLazyObject
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from .conf import settings
from .errors import Forbidden, NotAuthenticated
from .hooks import ask, hook

csrf_logger = logging.getLogger("django.security.csrf")  # where Django's own check says it

SITE: Final = "site"
ANONYMOUS: Final = "anonymous"
KINDS: Final = ("user", "ip", "key")
SHARED: Final = (SITE, ANONYMOUS)  # by many payers; they are nobody's own
UNKNOWN: Final = "unknown"
ACCOUNT_LENGTH: Final = 200
# All but what nobody can see or type: control characters (no database keeps all of them), line breaks, halves of
# surrogate pairs, space at an end.
_NAME: Final = re.compile(r"(?!\s)[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,200}(?<!\s)")
NAME_RULE: Final = "text of 1 to 200 characters, without control characters or space at an end"


async def charged(request: HttpRequest) -> tuple[str, ...]:
    """The accounts of ``request``. Raises NotAuthenticated and Forbidden.

    ``CHATNEST["PAYER"]`` is asked first. It is called with the request and the accounts that would pay else
    (``["user:7"]``; empty for an anonymous request where those are refused) and returns those to charge, the payer
    first: more accounts (a team's), or others (``"key:7"``). A sync one runs in a thread, where it may use the ORM.
    ``site`` always pays too, and for a stranger ``anonymous``.
    """
    user = await _user(request)
    accounts: list[object] = [*_of_user_or_address(request, user)]
    if payer := hook("PAYER"):
        accounts = await _asked(payer, request, accounts)
    if not accounts:
        raise NotAuthenticated()
    named = list(map(_checked, accounts))
    if user and await _may_be_forged(request, user, named[0]):
        raise Forbidden(gettext_lazy("The page is out of date (CSRF check failed). Reload it and try again."))
    return _with_shared(named)


def paying(payer: Any) -> tuple[str, ...]:
    """The accounts of a call that the site's own code makes, of a user or of names, the payer's first.

    Raises NotAuthenticated for an AnonymousUser and for nobody, ImproperlyConfigured for what is no name.
    """
    if isinstance(payer, str):
        payer = [payer]
    elif hasattr(payer, "pk"):
        payer = [] if payer.pk is None else [f"user:{payer.pk}"]
    named = list(map(_checked, payer))
    if not named:
        raise NotAuthenticated()
    return _with_shared(named)


def _with_shared(named: list[str]) -> tuple[str, ...]:
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
    if settings.PAYER is None and not (meant or colon) and (user := user_named(name)):
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
    user = user_named(pk)
    return f"{problem} {_('Did you mean user:%s?') % user.pk}" if user else problem


def user_named(name: str) -> Any:
    """The user who logs in with that name, or whose e-mail it is if it is nobody else's; or None."""
    users: Any = get_user_model()
    if user := users._base_manager.filter(**{users.USERNAME_FIELD: name}).first():
        return user
    if "@" not in name:
        return None
    having = list(users._base_manager.filter(**{f"{users.get_email_field_name()}__iexact": name})[:2])
    return having[0] if len(having) == 1 else None


def is_stranger(payer: str) -> bool:
    """Whoever is known by an address only."""
    return payer.startswith("ip:")


async def _user(request: HttpRequest) -> Any:
    """Who is logged in, by the session or by any middleware that set ``request.user``; or None."""
    user: Any = vars(request).get("user")
    if isinstance(user, SimpleLazyObject):
        if _is_djangos(user):  # it has an async twin, which needs no thread
            user = await request.auser()
        else:
            await sync_to_async(bool)(user)  # looks the user up, perhaps in the database
    return user if user is not None and user.is_authenticated and getattr(user, "is_active", True) else None


def _is_djangos(user: Any) -> bool:
    looks_up = vars(user).get("_setupfunc")
    return getattr(looks_up, "__module__", None) == AuthenticationMiddleware.__module__


def _of_user_or_address(request: HttpRequest, user: Any) -> list[str]:
    if user:
        return [f"user:{user.pk}"]
    return [f"ip:{address(request)}"] if settings.ALLOW_ANONYMOUS else []


async def _asked(payer: Callable[..., Any], request: HttpRequest, accounts: list[object]) -> list[object]:
    try:
        answer = await ask(payer, request, accounts)
    except PermissionDenied:
        raise Forbidden() from None
    return [answer] if isinstance(answer, str) else list(answer)


def _checked(account: object) -> str:
    """As whoever pauses it will write it."""
    if isinstance(account, str) and is_name(account) and account not in SHARED:
        return canonical(account)
    raise ImproperlyConfigured(f"An account must be {NAME_RULE}, and not site or anonymous. {account!r} is not.")


def _no_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


class _CsrfCheck(CsrfViewMiddleware):
    def _reject(self, request: HttpRequest, reason: str) -> HttpResponse:
        csrf_logger.warning("Forbidden (%s): %s", reason, request.path, extra={"status_code": 403, "request": request})
        raise PermissionDenied(reason)


async def _may_be_forged(request: HttpRequest, user: Any, payer: str) -> bool:
    """Whether a page of another site may have sent it: only a cookie goes with a request that its user did not make.

    The views are exempt from Django's own check. JSON of an origin that is the site's own needs no token, since no
    other site can send that. Where PAYER named somebody else, by a key for example, an origin decides alone.
    """
    if request.method in ("GET", "HEAD") or not await _came_by_cookie(request, user):
        return False
    if payer != f"user:{user.pk}" and "HTTP_ORIGIN" not in request.META:
        return False

    def check() -> bool:
        middleware = _CsrfCheck(_no_view)
        # A JSON request has its token in a header: a form, which may be broken or large, is not looked into.
        request.POST = QueryDict()
        is_json = request.content_type == "application/json"
        if is_json and "HTTP_ORIGIN" in request.META and middleware._origin_verified(request):  # type: ignore[attr-defined]
            return False
        try:
            middleware.process_request(request)
            middleware.process_view(request, _no_view, (), {})
        except PermissionDenied:
            return True
        return False

    return await sync_to_async(check)()  # with CSRF_USE_SESSIONS it reads the session


async def _came_by_cookie(request: HttpRequest, user: Any) -> bool:
    """By Django's session, or by a cookie that a middleware reads; not by a token in a header."""
    if not request.COOKIES:
        return False
    if "HTTP_AUTHORIZATION" not in request.META:
        return True
    session: Any = getattr(request, "session", None)
    return session is not None and await session.aget(SESSION_KEY) == str(user.pk)


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

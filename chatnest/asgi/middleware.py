"""Django's own middleware without its threads: put ``chatnest.asgi.middleware.`` for the first part of their paths.

Under ASGI, Django runs each sync method of each middleware in a thread, thirteen hand-overs a request for the
stack that ``startproject`` writes. These subclasses are the same middleware; they call what only computes right
on the event loop, and leave to a thread what may wait for the database. Optional: it makes requests cheaper.
"""

from __future__ import annotations

from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import middleware as auth
from django.contrib.messages import middleware as messages
from django.contrib.messages.storage import default_storage
from django.contrib.sessions import middleware as sessions
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.middleware import clickjacking, common, csrf, locale, security
from django.utils.deprecation import MiddlewareMixin
from django.utils.functional import SimpleLazyObject, empty


class OnLoop(MiddlewareMixin):
    """For a middleware whose methods compute. ``waits_before`` and ``waits_after`` tell where one may not."""

    async def __acall__(self, request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase | None = None
        if before := getattr(self, "process_request", None):
            response = await sync_to_async(before)(request) if self.waits_before(request) else before(request)
        response = response or await self.get_response(request)  # type: ignore[misc]
        if after := getattr(self, "process_response", None):
            waits = self.waits_after(request)
            response = await sync_to_async(after)(request, response) if waits else after(request, response)
        return response

    def waits_before(self, request: HttpRequest) -> bool:
        return False

    def waits_after(self, request: HttpRequest) -> bool:
        return False


class SecurityMiddleware(OnLoop, security.SecurityMiddleware):
    pass


class LocaleMiddleware(OnLoop, locale.LocaleMiddleware):
    pass


class CommonMiddleware(OnLoop, common.CommonMiddleware):
    pass


class XFrameOptionsMiddleware(OnLoop, clickjacking.XFrameOptionsMiddleware):
    pass


class AuthenticationMiddleware(OnLoop, auth.AuthenticationMiddleware):
    pass


class SessionMiddleware(OnLoop, sessions.SessionMiddleware):
    def waits_after(self, request: HttpRequest) -> bool:
        """It saves the session."""
        return bool(request.session.modified or settings.SESSION_SAVE_EVERY_REQUEST)


class MessageMiddleware(OnLoop, messages.MessageMiddleware):
    async def __acall__(self, request: HttpRequest) -> HttpResponseBase:
        storage = SimpleLazyObject(lambda: default_storage(request))
        request._messages = storage  # type: ignore[attr-defined]
        response: Any = await self.get_response(request)  # type: ignore[misc]
        if storage._wrapped is empty:  # nobody asked for messages, so there are none to store
            return response  # type: ignore[no-any-return]
        stored: HttpResponseBase = await sync_to_async(self.process_response)(request, response)
        return stored


class CsrfViewMiddleware(OnLoop, csrf.CsrfViewMiddleware):
    def waits_before(self, request: HttpRequest) -> bool:
        """The secret may be in the session."""
        return bool(settings.CSRF_USE_SESSIONS)

    def waits_after(self, request: HttpRequest) -> bool:
        return bool(settings.CSRF_USE_SESSIONS)

    async def process_view(self, request: HttpRequest, callback: Any, *args: Any) -> Any:  # type: ignore[override]
        # Past the exemption it reads the form, which may be a large file.
        if getattr(callback, "csrf_exempt", False):
            return super().process_view(request, callback, *args)
        return await sync_to_async(super().process_view)(request, callback, *args)

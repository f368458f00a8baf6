"""POST -> who pays -> limits -> what the site prepares -> reserve -> stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import ImproperlyConfigured, RequestDataTooBig
from django.core.handlers.asgi import ASGIRequest
from django.db import InterfaceError, OperationalError, connections, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils.functional import lazy
from django.utils.text import format_lazy, get_text_list
from django.utils.translation import gettext_lazy as _
from django.views.decorators.csrf import csrf_exempt

from . import ledger, metrics
from .accounts import charged, is_stranger
from .asgi.lifespan import hear_sigterm
from .asgi.threads import let_request_thread_go
from .conf import provider, settings
from .conversation import awindow
from .errors import (
    BodyTooLarge,
    ChatError,
    InternalError,
    LedgerUnavailable,
    MethodNotAllowed,
    NeedsASGI,
    UnsupportedMediaType,
)
from .holds import reservation
from .hooks import ask, hook
from .ledger import Reserve
from .ledger.batcher import batcher
from .limits import profile_name
from .models import LABEL_LENGTH
from .policy import Terms
from .refusals import refusals
from .slots import StreamSlot
from .stream import Chat, ChatStream
from .tokens import abound
from .wires import ChatRequest, Message, chatnest

logger = logging.getLogger("chatnest.views")

View = Callable[[HttpRequest], Coroutine[Any, Any, HttpResponseBase]]


class EventStreamResponse(StreamingHttpResponse):
    """Streams a ChatStream. No ``Content-Length``, no compression, no proxy buffer: a token is seen at once."""

    def __init__(self, stream: ChatStream) -> None:
        super().__init__(stream, content_type=chatnest.CONTENT_TYPE)
        self["Cache-Control"] = "no-cache"
        self["X-Accel-Buffering"] = "no"

    def has_header(self, header: str) -> bool:
        """Compressing middleware leave alone what is encoded already: they would hold frames back.

        To be asked is enough; ``Content-Encoding: identity`` on the wire is refused by clients that know only what
        they asked for (https://www.rfc-editor.org/rfc/rfc9110#section-8.4.1 lets nobody send it).
        """
        return header.lower() == "content-encoding" or super().has_header(header)

    __contains__ = has_header

    def __aiter__(self) -> AsyncIterator[bytes]:
        # Django's own goes through two more generators a frame, and closes neither of them.
        let_request_thread_go()  # middleware is done; minutes of streaming need none
        iterator: AsyncIterator[bytes] = self._iterator  # type: ignore[attr-defined]
        return iterator


def endpoint(*methods: str) -> Callable[[View], View]:
    """An async view that answers every failure in the chat-nest wire, and none with a stack trace."""

    def decorate(view: View) -> View:
        @wraps(view)
        async def answer(request: HttpRequest) -> HttpResponseBase:
            try:
                if request.method not in methods:
                    raise MethodNotAllowed(
                        format_lazy(_("Use {methods}."), methods=lazy(get_text_list, str)([*methods]))
                    )
                return await view(request)
            except ChatError as problem:
                response = _refused(problem)
                if isinstance(problem, MethodNotAllowed):
                    response["Allow"] = ", ".join(methods)
                return response
            except (OperationalError, InterfaceError) as error:
                logger.warning("The database does not say who is asking: %s", error)
                return _refused(LedgerUnavailable(retry_after=5))
            except Exception:
                logger.exception("A chat request failed")
                return _refused(InternalError())

        for alias in connections:  # Django's ATOMIC_REQUESTS would refuse an async view
            transaction.non_atomic_requests(using=alias)(answer)
        # Who may chat is decided in accounts, and cookies are checked there.
        return csrf_exempt(login_not_required(answer))

    return decorate


def _refused(problem: ChatError) -> HttpResponse:
    metrics.refused(problem.code)
    return chatnest.refusal(problem)


@endpoint("POST")
async def chat(request: HttpRequest) -> HttpResponseBase:
    """Stream an answer to a conversation."""
    if not isinstance(request, ASGIRequest):
        raise NeedsASGI()
    try:
        accounts = await charged(request)
        try:
            return EventStreamResponse(await begin(request, accounts))
        except ChatError as refusal:
            refusals.note(accounts[0], refusal)
            raise
    finally:
        # Sentry sends the body with each trace and error (https://docs.sentry.io/platforms/python/configuration/options/,
        # max_request_body_size), and a stream would keep it for minutes.
        request._body = b""


async def begin(request: HttpRequest, accounts: Sequence[str]) -> ChatStream:
    """The stream that these accounts pay for, if they may have one. Raises ChatError."""
    hear_sigterm()
    asked = chatnest.parse(read_body(request))
    policy = await batcher.policy(accounts)
    terms = policy.terms(accounts, asked.profile, asked)
    if refusal := refusals.recall(terms):
        raise refusal
    with StreamSlot.acquire(stranger=is_stranger(accounts[0])) as slot:
        if prepare := hook("PREPARE"):
            asked = await prepared(prepare, request, asked)
            terms = policy.terms(accounts, asked.profile, asked)
        return await open_stream(asked, terms, slot)


async def prepared(prepare: Callable[..., Any], request: HttpRequest, asked: ChatRequest) -> ChatRequest:
    """What the site makes of ``asked`` before anything is counted, within what the client may ask for.

    ``CHATNEST["PREPARE"]`` is called with the request and the ChatRequest and returns the one to answer: with
    instructions for this user (system messages in front, always sent), retrieved text, words taken out, another
    profile, a ``label``. It may raise any ChatError. A sync one runs in a thread, where it may use the ORM.
    """
    answer = await ask(prepare, request, asked)
    if not isinstance(answer, ChatRequest):
        raise ImproperlyConfigured(f"CHATNEST['PREPARE'] must return a ChatRequest, not {type(answer).__name__}.")
    return replace(answer, profile=profile_name(answer.profile), label=answer.label[:LABEL_LENGTH])


@endpoint("GET", "HEAD")
async def usage(request: HttpRequest) -> HttpResponseBase:
    """The payer's limit, use and remainder today, under ``?profile=`` (balanced by default)."""
    accounts = await charged(request)
    terms = (await batcher.policy(accounts)).terms(accounts, profile_name(request.GET.get("profile")))
    used, reserved, remaining = await batcher.query(partial(ledger.standing, ledger.todays_budgets(terms.budgets)))
    standing = {
        "profile": terms.profile,
        "dailyTokenLimit": terms.budgets[accounts[0]],
        "usedToday": used,
        "reservedToday": reserved,
        "remainingToday": remaining,
        "resetsAt": ledger.day_ends(ledger.today()).isoformat(),
    }
    return JsonResponse(standing, headers={"Cache-Control": "no-store"})


def read_body(request: HttpRequest) -> bytes:
    """The body, if it is JSON and not too large. Raises UnsupportedMediaType and BodyTooLarge."""
    if request.content_type != "application/json":
        raise UnsupportedMediaType()
    limit = settings.MAX_BODY_BYTES
    declared = request.META.get("CONTENT_LENGTH") or ""
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    try:
        body = request.body
    except RequestDataTooBig:
        raise _too_large(limit) from None
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(format_lazy(_("The request body may have at most {limit} bytes."), limit=limit))


async def reservation_for(messages: Sequence[Message], terms: Terms, label: str) -> Reserve:
    """What these ask of the ledger."""
    return reservation(terms, await abound(messages, terms.model, provider(terms.provider)), label)


async def open_stream(asked: ChatRequest, terms: Terms, slot: StreamSlot) -> ChatStream:
    """Reserve what the answer may cost. Raises ChatError."""
    limits = terms.limits
    window = await awindow(
        asked.messages,
        system=terms.system_prompt,
        max_messages=limits.max_messages,
        max_tokens=limits.max_tokens_per_request,
        allowance=limits.max_output_tokens,
    )
    ask, fallback = await reservation_for(window.messages, terms, asked.label), None
    if terms.fallback:
        other = replace(terms, provider=terms.fallback[0], model=terms.fallback[1])
        ask, fallback = ask.or_else(await reservation_for(window.messages, other, asked.label))
    try:
        hold = await batcher.reserve(ask)
    except ChatError as refusal:
        refusals.remember(terms, refusal)
        raise
    return ChatStream(
        Chat(
            ask,
            hold,
            window.messages,
            fallback=fallback,
            temperature=limits.temperature,
            dropped=window.dropped,
            metadata=asked.metadata,
            slot=slot,
        )
    )

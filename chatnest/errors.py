"""Everything a client may be told when it gets no answer: a code, a status, a sentence of our own.

The provider's words, keys and addresses are for the log. Wires turn these into their own format, and into the
language of the request: where an error is raised, in the ledger's thread for example, nobody knows that.
"""

from __future__ import annotations

from typing import ClassVar

from django.utils.functional import Promise
from django.utils.translation import gettext_lazy as _
from django.utils.translation import override


class ChatError(Exception):
    """A refusal, or the end of a stream that did not complete.

    ``message`` is for the client, and lazy: in the language that is active where it becomes text. ``str`` of the error
    is for logs: in English. ``retry_after`` is in whole seconds; None where waiting does not help. ``detail`` is for
    operators: who has how much of what, which no client is told.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    message: str | Promise = _("AI request failed")

    def __init__(
        self, message: str | Promise | None = None, *, retry_after: float | None = None, detail: str = ""
    ) -> None:
        super().__init__()
        self.message = type(self).message if message is None else message
        self.retry_after = None if retry_after is None else max(1, -int(-retry_after // 1))
        self.detail = detail

    def __str__(self) -> str:
        with override(None):
            return str(self.message)


class InternalError(ChatError):
    retryable = True


class InvalidMessages(ChatError):
    code, status, message = "invalid_messages", 400, _("Invalid messages payload")


class InvalidRequest(ChatError):
    code, status, message = "invalid_request", 400, _("Invalid request")


class NotAuthenticated(ChatError):
    code, status, message = "not_authenticated", 401, _("Please log in to use the chat.")


class Forbidden(ChatError):
    code, status, message = "forbidden", 403, _("You may not use the chat.")


class MethodNotAllowed(ChatError):
    code, status, message = "method_not_allowed", 405, _("This address does not take that method.")


class BodyTooLarge(ChatError):
    code, status, message = "body_too_large", 413, _("The request body is too large.")


class UnsupportedMediaType(ChatError):
    code, status = "unsupported_media_type", 415
    message = _("Send the request as Content-Type: application/json.")


class NeedsASGI(ChatError):
    code, status = "needs_asgi", 501
    message = _("Streams need an ASGI server, such as uvicorn. This one is WSGI (runserver is too, without daphne).")


class RateLimited(ChatError):
    code, status, retryable = "rate_limited", 429, True
    message = _("Rate limit exceeded. Please slow down.")


class RequestTooLarge(ChatError):
    code, status = "request_too_large", 429
    message = _("Request too large. Please shorten your message.")


class DailyBudgetExceeded(ChatError):
    code, status = "daily_budget_exceeded", 429
    message = _("Daily AI budget exceeded. Try again tomorrow.")


class MonthlyBudgetExceeded(ChatError):
    code, status = "monthly_budget_exceeded", 429
    message = _("Monthly AI budget exceeded. Try again next month.")


class PriceUnknown(ChatError):
    """Money is limited, and nobody knows what the model costs: only the operator can mend it."""

    code, status = "price_unknown", 503
    message = _("The chat is not set up correctly. Its operator has been told.")


class TooManyStreams(ChatError):
    code, status, retryable = "too_many_streams", 429, True
    message = _("Too many answers are being written for you at once. Let one finish first.")


class Paused(ChatError):
    code, status, retryable = "paused", 503, True
    message = _("The chat is paused by its operator. Please try again later.")


class LedgerUnavailable(ChatError):
    code, status, retryable = "ledger_unavailable", 503, True
    message = _("The chat cannot check its budget right now. Please try again shortly.")


class Overloaded(ChatError):
    code, status, retryable = "overloaded", 503, True
    message = _("The chat is very busy right now. Please try again shortly.")


class Restarting(Overloaded):
    """The process ends in the middle of an answer; another will take the next request."""

    message = _("The chat is being restarted. Please try again.")


class UpstreamError(ChatError):
    """The model's provider failed.

    ``billed``: it may have charged for the prompt, or more, all the same.
    """

    billed: bool = False


class UpstreamTimeout(UpstreamError):
    code, status, retryable, billed = "upstream_timeout", 504, True, True
    message = _("The AI model took too long to answer. Please try again.")


class UpstreamRateLimited(UpstreamError):
    code, status, retryable = "upstream_rate_limited", 503, True
    message = _("The AI model is busy right now. Please try again shortly.")


class UpstreamUnavailable(UpstreamError):
    code, status, retryable = "upstream_unavailable", 502, True
    message = _("The AI model cannot be reached right now. Please try again shortly.")


class UpstreamRejected(UpstreamError):
    code, status = "upstream_rejected", 502
    message = _("The AI model did not accept this request.")


class ContextLengthExceeded(UpstreamError):
    code, status = "context_length_exceeded", 502
    message = _("This conversation is too long for the model. Start a new one.")


class UpstreamMisconfigured(UpstreamError):
    """A wrong key, an unknown model, a parameter it does not know, credit used up: only the operator can mend it."""

    code, status = "upstream_misconfigured", 502
    message = _("The chat is not set up correctly. Its operator has been told.")


class UpstreamBroken(UpstreamError):
    code, status, retryable, billed = "upstream_broken", 502, True, True
    message = _("The AI model's answer broke off. Please try again.")

"""The rows: what operators set (Profile, Account) and what the ledger alone writes (all the others).

An account is a name that usage is charged to: ``site``, ``anonymous``, ``user:<pk>``, ``ip:<address>``, ``key:<id>``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import date, datetime
from typing import Any, Final, Self

from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator, RegexValidator
from django.db import models
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from .accounts import SHARED, canonical, is_name, misnamed
from .conf import DEFAULT_PROVIDER, provider_names, settings, today
from .limits import DEFAULT_MODEL, DEFAULT_PROFILES, FIELDS, Limits

ACCOUNT_LENGTH: Final = 200
LABEL_LENGTH: Final = 100


class Profile(models.Model):
    """A set of limits that operators edit. What is in force is this, clamped by the code's hard caps.

    The three that clients may ask for are always there: they can be neither deleted nor renamed, only switched off.
    """

    class Audience(models.TextChoices):
        """Who may choose it. Whom an account's row gives it has it in any case."""

        EVERYONE = "everyone", _("Everyone")
        USERS = "users", _("Logged-in users")
        FORCED = "forced", _("Only accounts that force it")

    name = models.CharField(
        _("name"),
        max_length=50,
        unique=True,
        validators=[RegexValidator(r"^[a-z0-9_-]+\Z", _("Use lower-case letters, digits, - and _."))],
        help_text=_("Clients choose constrained, balanced or expanded; other names serve accounts that force them."),
    )
    enabled = models.BooleanField(
        _("enabled"),
        default=True,
        help_text=_("Off: clients that ask for it get balanced; with balanced off too, the chat is paused for them."),
    )
    audience = models.CharField(
        _("audience"),
        max_length=10,
        choices=Audience.choices,
        default=Audience.EVERYONE,
        help_text=_(
            "Who may choose it. Others get the next smaller one that they may choose, of expanded, balanced and "
            "constrained. Accounts that force it have it in any case."
        ),
    )
    provider = models.CharField(
        _("provider"), max_length=100, default=DEFAULT_PROVIDER, help_text=_("One of PROVIDERS in the site's settings.")
    )
    model = models.CharField(_("model"), max_length=100, default=DEFAULT_MODEL)
    fallback = models.ForeignKey(
        "self",
        verbose_name=_("fallback"),
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="+",
        help_text=_(
            "Whose provider and model are asked where this profile's refuse, fail or cannot be reached before the "
            "first word. The limits stay this profile's."
        ),
    )
    system_prompt = models.TextField(
        _("system prompt"), blank=True, help_text=_("Put before every conversation and counted in its tokens.")
    )
    temperature = models.FloatField(
        _("temperature"),
        null=True,
        blank=True,
        validators=[MinValueValidator(0.0)],
        help_text=_("Empty: not sent to the model."),
    )
    max_output_tokens = models.PositiveIntegerField(
        _("max output tokens"), validators=[MinValueValidator(1)], help_text=_("The longest answer.")
    )
    max_messages = models.PositiveIntegerField(
        _("max messages"),
        validators=[MinValueValidator(1)],
        help_text=_("How many of the last messages the model sees."),
    )
    max_tokens_per_request = models.PositiveIntegerField(
        _("max tokens per request"),
        validators=[MinValueValidator(1)],
        help_text=_("Prompt and answer together; must be above the longest answer."),
    )
    daily_token_limit = models.PositiveBigIntegerField(_("daily token limit"), help_text=_("For each payer, each day."))
    rate_max_requests = models.PositiveIntegerField(
        _("rate max requests"), help_text=_("Requests of one payer in a rate window.")
    )
    rate_window_seconds = models.PositiveIntegerField(_("rate window seconds"), validators=[MinValueValidator(1)])
    max_concurrent_streams = models.PositiveIntegerField(
        _("max concurrent streams"), help_text=_("Answers being written for one payer at once.")
    )

    class Meta:
        verbose_name = _("profile")
        verbose_name_plural = _("profiles")
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    @property
    def is_delivered(self) -> bool:
        """One of the three that clients may ask for."""
        return self.name in DEFAULT_PROFILES

    @property
    def limits(self) -> Limits:
        """What was typed, before the clamp."""
        return Limits(**{name: getattr(self, name) for name in FIELDS})

    def _is_another_name_for_a_delivered_one(self) -> bool:
        stored = type(self)._base_manager.using(self._state.db).filter(pk=self.pk, name__in=DEFAULT_PROFILES)
        return stored.exclude(name=self.name).exists()

    def clean(self) -> None:
        if self.provider not in provider_names():
            raise ValidationError({"provider": _("The settings have no provider of this name.")})
        if not self._state.adding and self._is_another_name_for_a_delivered_one():
            raise ValidationError({"name": _("Clients ask for this profile by its name, so it keeps it.")})
        if self.fallback and (self.fallback.provider, self.fallback.model) == (self.provider, self.model):
            raise ValidationError({"fallback": _("It asks the same model of the same provider.")})
        output, request = self.max_output_tokens, self.max_tokens_per_request
        if output is not None and request is not None and output >= request:
            raise ValidationError(
                {
                    "max_output_tokens": _(
                        "This profile could never answer: the longest answer must be below the tokens per request (%d)."
                    )
                    % request
                }
            )


def _validate_account_name(name: str) -> None:
    if not is_name(name):
        raise ValidationError(_("Use text of 1 to 200 characters, without control characters or space at an end."))


class Account(models.Model):
    """What an operator decided about one account. Accounts need no row; most have none.

    What is in force is for ``policy`` to say.
    """

    name = models.CharField(
        _("name"),
        max_length=ACCOUNT_LENGTH,
        unique=True,
        validators=[_validate_account_name],
        help_text=_(
            "site, anonymous, user:7 (its primary key), ip:192.0.2.1 or key:3, or what the site's PAYER charges. "
            "Pausing site stops every chat; pausing anonymous, those of visitors who are not logged in."
        ),
    )
    profile = models.ForeignKey(
        Profile,
        verbose_name=_("profile"),
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        help_text=_("Used whatever the client asks for."),
    )
    daily_token_limit = models.PositiveBigIntegerField(
        _("daily token limit"), null=True, blank=True, help_text=_("Lowers the limit that is in force without it.")
    )
    extra_tokens = models.PositiveBigIntegerField(
        _("extra tokens"),
        null=True,
        blank=True,
        help_text=_("More than the limit, for one day. The code's hard caps still apply."),
    )
    extra_day = models.DateField(
        _("extra day"), null=True, blank=True, help_text=_("The day of the extra tokens. Empty: today.")
    )
    paused = models.BooleanField(_("paused"), default=False)

    class Meta:
        verbose_name = _("account")
        verbose_name_plural = _("accounts")
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(extra_tokens__isnull=True, extra_day__isnull=True)
                | Q(extra_tokens__isnull=False, extra_day__isnull=False),
                name="chatnest_extra_has_its_day",
            )
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.name = canonical(self.name)
        super().save(*args, **kwargs)

    @property
    def is_shared(self) -> bool:
        """``site`` and ``anonymous``, which everybody or every stranger pays from: always there."""
        return self.name in SHARED

    def extra_on(self, day: date) -> int:
        """The tokens granted for that day."""
        return self.extra_tokens if self.extra_tokens and self.extra_day == day else 0

    def clean(self) -> None:
        self.name = canonical(self.name)
        self._clean_name()
        if not self.extra_tokens:
            self.extra_tokens = self.extra_day = None
        elif self.extra_day is None:
            self.extra_day = today()

    def _clean_name(self) -> None:
        """Whatever can pay can be paused, and what cannot is refused: it would look like a success."""
        stored = None if self._state.adding else type(self)._base_manager.using(self._state.db).get(pk=self.pk)
        if not is_name(self.name) or (stored and stored.name == self.name):
            return
        if stored and stored.is_shared:
            raise ValidationError({"name": _("Everybody pays from this account by its name, so it keeps it.")})
        problem = misnamed(self.name)
        if problem and not self._has_been_charged():
            raise ValidationError({"name": problem})

    def _has_been_charged(self) -> bool:
        return DailyUsage.objects.using(settings.DATABASE_ALIAS).filter(account=self.name).exists()


class DailyUsageQuerySet(models.QuerySet["DailyUsage"]):
    def on(self, day: date) -> Self:
        return self.filter(day=day)

    def named(self, keys: Iterable[tuple[date, str]]) -> Self:
        """The rows of these (day, account) pairs."""
        accounts_of: dict[date, list[str]] = {}
        for day, account in keys:
            accounts_of.setdefault(day, []).append(account)
        chosen = Q(pk__in=())
        for day, accounts in accounts_of.items():
            chosen |= Q(day=day, account__in=accounts)
        return self.filter(chosen)


class DailyUsage(models.Model):
    """One account's tokens on one day. ``tokens_used`` = charges + adjustments."""

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    tokens_used = models.BigIntegerField(_("tokens used"), default=0)
    tokens_reserved = models.BigIntegerField(_("tokens reserved"), default=0)
    prompt_tokens = models.BigIntegerField(_("prompt tokens"), default=0)
    completion_tokens = models.BigIntegerField(_("completion tokens"), default=0)
    requests = models.BigIntegerField(_("requests"), default=0)
    crossed = models.PositiveSmallIntegerField(
        _("crossed"), default=0, help_text=_("The percentage of the limit whose crossing was told: 50, 80 or 100.")
    )

    objects = DailyUsageQuerySet.as_manager()

    class Meta:
        verbose_name = _("daily usage")
        verbose_name_plural = _("daily usage")
        ordering = ["-day", "account"]
        constraints = [
            models.UniqueConstraint(fields=["day", "account"], name="chatnest_one_usage_a_day"),
            models.CheckConstraint(
                condition=Q(
                    tokens_used__gte=0,
                    tokens_reserved__gte=0,
                    prompt_tokens__gte=0,
                    completion_tokens__gte=0,
                    requests__gte=0,
                ),
                name="chatnest_usage_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.account}, {self.day}"


class RateWindow(models.Model):
    """How many requests of an account were admitted in one window, which starts at a multiple of its length."""

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    window_start = models.DateTimeField(_("window start"))
    window_seconds = models.PositiveIntegerField(_("window seconds"))
    count = models.PositiveIntegerField(_("count"), default=0)

    class Meta:
        verbose_name = _("rate window")
        verbose_name_plural = _("rate windows")
        constraints = [
            models.UniqueConstraint(
                # The day is in the key because the day's usage row is the lock that guards the count.
                fields=["account", "window_start", "window_seconds", "day"],
                name="chatnest_one_count_a_window",
            ),
            models.CheckConstraint(condition=Q(window_seconds__gte=1), name="chatnest_window_has_length"),
        ]
        indexes = [models.Index(fields=["day"], name="chatnest_window_day")]

    def __str__(self) -> str:
        return f"{self.account}, {self.window_start:%H:%M:%S}"


class ReservationQuerySet(models.QuerySet["Reservation"]):
    def open(self) -> Self:
        return self.filter(state=Reservation.State.OPEN)

    def overdue(self, now: datetime) -> Self:
        """Open, but its process has stopped renewing it."""
        return self.open().filter(expires_at__lte=now)


class Reservation(models.Model):
    """A hold on the tokens of one request, and what became of it. It resolves once."""

    class State(models.TextChoices):
        OPEN = "open", pgettext_lazy("reservation", "Open")
        SETTLED = "settled", pgettext_lazy("reservation", "Settled")
        EXPIRED = "expired", pgettext_lazy("reservation", "Expired")

    class Outcome(models.TextChoices):
        COMPLETED = "completed", pgettext_lazy("reservation", "Completed")
        CANCELLED = "cancelled", pgettext_lazy("reservation", "Cancelled")
        TIMED_OUT = "timed_out", pgettext_lazy("reservation", "Timed out")
        UPSTREAM_ERROR = "upstream_error", pgettext_lazy("reservation", "Upstream error")
        STOPPED = "stopped", pgettext_lazy("reservation", "Stopped")
        EXPIRED = "expired", pgettext_lazy("reservation", "Expired")

    class UsageSource(models.TextChoices):
        REPORTED = "reported", pgettext_lazy("usage", "Reported")
        COUNTED = "counted", pgettext_lazy("usage", "Counted")
        HELD = "held", pgettext_lazy("usage", "Held")
        NONE = "none", pgettext_lazy("usage", "None")

    id = models.UUIDField("ID", primary_key=True, default=uuid.uuid4, editable=False)
    day = models.DateField(_("day"))
    payer = models.CharField(_("payer"), max_length=ACCOUNT_LENGTH)
    accounts: models.JSONField[list[str], list[str]] = models.JSONField(
        _("accounts"), help_text=_("Every account that is charged, the payer first.")
    )
    profile = models.CharField(_("profile"), max_length=50)
    provider = models.CharField(_("provider"), max_length=100, default=DEFAULT_PROVIDER)
    model = models.CharField(_("model"), max_length=100)
    label = models.CharField(
        _("label"), max_length=LABEL_LENGTH, blank=True, default="", help_text=_("Which feature of the site asked.")
    )
    tokens = models.PositiveBigIntegerField(
        _("tokens"), help_text=_("The hold: the prompt's bound and the answer's allowance.")
    )
    state = models.CharField(_("state"), max_length=10, choices=State.choices, default=State.OPEN)
    outcome = models.CharField(_("outcome"), max_length=20, choices=Outcome.choices, blank=True, default="")
    usage_source = models.CharField(
        _("usage source"), max_length=10, choices=UsageSource.choices, default=UsageSource.NONE
    )
    prompt_tokens = models.PositiveBigIntegerField(_("prompt tokens"), default=0)
    completion_tokens = models.PositiveBigIntegerField(_("completion tokens"), default=0)
    tokens_charged = models.PositiveBigIntegerField(_("tokens charged"), default=0)
    created_at = models.DateTimeField(_("created at"))
    expires_at = models.DateTimeField(_("expires at"))
    settled_at = models.DateTimeField(_("settled at"), null=True, blank=True)

    objects = ReservationQuerySet.as_manager()

    class Meta:
        verbose_name = _("reservation")
        verbose_name_plural = _("reservations")
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(condition=Q(state__in=["open", "settled", "expired"]), name="chatnest_known_state"),
            models.CheckConstraint(
                condition=Q(state="open", settled_at=None, tokens_charged=0, outcome="")
                | (~Q(state="open") & Q(settled_at__isnull=False) & ~Q(outcome="")),
                name="chatnest_resolved_once",
            ),
            models.CheckConstraint(condition=Q(expires_at__gte=F("created_at")), name="chatnest_lease_has_length"),
        ]
        indexes = [
            models.Index(fields=["expires_at"], condition=Q(state="open"), name="chatnest_open_lease"),
            # By lease too, so that counting a payer's streams passes by all that closed since the last vacuum.
            models.Index(fields=["payer", "expires_at"], condition=Q(state="open"), name="chatnest_open_payer"),
            models.Index(fields=["day", "payer"], name="chatnest_reservation_day"),
            models.Index(fields=["-created_at"], name="chatnest_reservation_latest"),
        ]

    def __str__(self) -> str:
        return str(self.pk)

    def is_overdue(self, now: datetime) -> bool:
        return self.state == self.State.OPEN and self.expires_at <= now


class Refusal(models.Model):
    """How often an account was refused on a day, and why. Summed in memory and written now and then: not exact."""

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    code = models.CharField(_("code"), max_length=50)
    count = models.PositiveBigIntegerField(_("count"), default=0)
    last_at = models.DateTimeField(_("last at"))
    last_detail = models.CharField(_("last detail"), max_length=200, blank=True, default="")

    class Meta:
        verbose_name = _("refusal")
        verbose_name_plural = _("refusals")
        ordering = ["-last_at"]
        constraints = [
            models.UniqueConstraint(fields=["day", "account", "code"], name="chatnest_one_refusal_a_day_and_code")
        ]

    def __str__(self) -> str:
        return f"{self.account}, {self.day}: {self.code}"


class Calibration(models.Model):
    """What the reports of one model have taught about it. To forget it, delete the row."""

    provider = models.CharField(_("provider"), max_length=100)
    model = models.CharField(_("model"), max_length=100)
    reports = models.PositiveBigIntegerField(
        _("reports"), default=0, help_text=_("Answers, read to their end, whose usage was reported.")
    )
    prompt_excess = models.PositiveBigIntegerField(
        _("prompt excess"),
        default=0,
        help_text=_("The most tokens by which a reported prompt exceeded its bound: later holds add them."),
    )
    completion_excess = models.PositiveBigIntegerField(
        _("completion excess"),
        default=0,
        help_text=_("The most tokens by which a reported answer exceeded what was counted of it."),
    )
    reasons_unseen = models.BooleanField(
        _("reasons unseen"),
        default=False,
        help_text=_("A report named reasoning that was not received: without a report, the whole hold is charged."),
    )
    ignores_max_tokens = models.BooleanField(
        _("ignores max tokens"), default=False, help_text=_("An answer was longer than it was allowed to be.")
    )
    updated_at = models.DateTimeField(_("updated at"))

    class Meta:
        verbose_name = _("calibration")
        verbose_name_plural = _("calibrations")
        ordering = ["provider", "model"]
        constraints = [models.UniqueConstraint(fields=["provider", "model"], name="chatnest_one_calibration_a_model")]

    def __str__(self) -> str:
        return f"{self.provider}: {self.model}"

    @property
    def bills_what_it_shows(self) -> bool:
        """So that an answer without a report can be counted."""
        return self.reports > 0 and not self.reasons_unseen


class Adjustment(models.Model):
    """A correction of one account's day, beside the charges. What it means is its kind; the reason is for people."""

    class Kind(models.TextChoices):
        FORGIVEN = "forgiven", pgettext_lazy("adjustment", "Forgiven")  # an operator's reset
        LATE = "late", pgettext_lazy("adjustment", "Late")  # a settlement after its hold was charged
        PRUNED = "pruned", pgettext_lazy("adjustment", "Pruned")  # stands for the account's deleted rows of the day
        GRANTED = "granted", pgettext_lazy("adjustment", "Granted")  # an operator's gift for the day

    day = models.DateField(_("day"))
    account = models.CharField(_("account"), max_length=ACCOUNT_LENGTH)
    tokens = models.BigIntegerField(_("tokens"))
    kind = models.CharField(_("kind"), max_length=10, choices=Kind.choices)
    reason = models.CharField(_("reason"), max_length=200, blank=True)
    actor = models.CharField(
        _("actor"), max_length=200, blank=True, help_text=_("Who did it; empty for chatnest itself.")
    )
    created_at = models.DateTimeField(_("created at"))

    class Meta:
        verbose_name = _("adjustment")
        verbose_name_plural = _("adjustments")
        ordering = ["-created_at"]
        constraints = [
            models.CheckConstraint(
                condition=Q(kind__in=["forgiven", "late", "pruned", "granted"]), name="chatnest_known_kind"
            )
        ]
        indexes = [models.Index(fields=["day", "account"], name="chatnest_adjustment_day")]

    def __str__(self) -> str:
        return f"{self.account}, {self.day}: {self.tokens:+}"

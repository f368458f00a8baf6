"""A set of limits."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator, RegexValidator
from django.db import models
from django.utils.translation import gettext_lazy as _

from ..conf import DEFAULT_PROVIDER, provider_names
from ..limits import DEFAULT_MODEL, DEFAULT_PROFILES, FIELDS, Limits
from .price import MONEY


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
        _("max output tokens"), validators=[MinValueValidator(1)], help_text=_("The longest answer, in tokens.")
    )
    max_messages = models.PositiveIntegerField(
        _("max messages"),
        validators=[MinValueValidator(1)],
        help_text=_("How many of the last messages the model sees."),
    )
    max_tokens_per_request = models.PositiveIntegerField(
        _("max tokens per request"),
        validators=[MinValueValidator(1)],
        help_text=_("Tokens of prompt and answer together; must be above the longest answer."),
    )
    daily_token_limit = models.PositiveBigIntegerField(
        _("daily token limit"), help_text=_("Tokens, for each payer, each day.")
    )
    daily_money_limit = models.DecimalField(
        _("daily money limit"),
        **MONEY,
        help_text=_("For each payer, each day, in the currency of the settings. Empty: none."),
    )
    monthly_money_limit = models.DecimalField(
        _("monthly money limit"),
        **MONEY,
        help_text=_("For each payer, each calendar month. Empty: none."),
    )
    rate_max_requests = models.PositiveIntegerField(
        _("rate max requests"), help_text=_("Requests of one payer in a rate window.")
    )
    rate_window_seconds = models.PositiveIntegerField(
        _("rate window seconds"),
        validators=[MinValueValidator(1)],
        help_text=_("How long a rate window is, in seconds."),
    )
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

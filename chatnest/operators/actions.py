"""What operators can do, each with what it will change, said beforehand, and what it has changed, said after.

All save rows one by one, so that every process hears of it and it is recorded who did it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

from django import forms
from django.utils.functional import Promise
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from .. import ledger
from ..accounts import ANONYMOUS, SITE
from ..changes import record
from ..conf import now, settings, today
from ..errors import Paused
from ..ledger import Reset, Stop
from ..models import Account, DailyUsage, Reservation
from .standing import daily_limit, pays_beside, reasons
from .words import lasting, number, when


@dataclass(frozen=True, slots=True)
class Target:
    """Of whom: an account; ``name`` as people know it. ``answer``: one of its, where that is meant."""

    account: str
    name: str
    answer: Reservation | None = None


class ReasonForm(forms.Form):
    reason = forms.CharField(
        label=gettext_lazy("Reason"),
        max_length=200,
        required=False,
        help_text=gettext_lazy("For your colleagues. It is kept in the list of changes."),
    )

    def __init__(self, target: Target, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.target = target


class GrantForm(ReasonForm):
    tokens = forms.IntegerField(
        label=gettext_lazy("More tokens today"),
        min_value=1,
        help_text=gettext_lazy("Beside the day's limit, until it ends. HARD_CAPS in the code still apply."),
    )
    field_order = ("tokens", "reason")

    def clean_tokens(self) -> int:
        tokens: int = self.cleaned_data["tokens"]
        limit, without = (limit_with(self.target.account, extra_tokens=extra) for extra in (tokens, 0))
        if limit <= without:
            raise forms.ValidationError(
                _("This would change nothing: the limit is %s tokens, and no more may be.") % number(limit)
            )
        return tokens


class LowerForm(ReasonForm):
    tokens = forms.IntegerField(
        label=gettext_lazy("Tokens a day"),
        min_value=0,
        required=False,
        help_text=gettext_lazy("From now on, until this is changed. Empty: as without this."),
    )
    field_order = ("tokens", "reason")

    def clean_tokens(self) -> int | None:
        tokens: int | None = self.cleaned_data["tokens"]
        without = limit_with(self.target.account, daily_token_limit=None)
        if tokens is not None and tokens >= without:
            raise forms.ValidationError(
                _("This would change nothing: the limit is %s tokens without it.") % number(without)
            )
        return tokens


def limit_with(account: str, **changes: Any) -> int:
    """The limit in force today, were the account's row changed so."""
    row = row_of(account)
    for field, value in changes.items():
        setattr(row, field, value)
    if "extra_tokens" in changes:
        row.extra_day = today() if row.extra_tokens else None
    return daily_limit(row).in_force


def row_of(account: str) -> Account:
    """Its row, saved or not."""
    rows = Account.objects.using(settings.DATABASE_ALIAS).select_related("profile")
    return rows.filter(name=account).first() or Account(name=account)


def running(account: str) -> list[Reservation]:
    """The answers that are being written for it."""
    return Reservation.objects.using(settings.DATABASE_ALIAS).open().charging([account])


class Action:
    """One thing that can be done, asked for on a page of its own.

    ``everywhere``: the action that does it to the site, which is for everybody and a permission of its own.
    """

    permission: ClassVar[str]
    everywhere: ClassVar[str] = ""
    title: ClassVar[str | Promise]
    button: ClassVar[str | Promise]
    form: ClassVar[type[ReasonForm]] = ReasonForm
    is_grave: ClassVar[bool] = False

    def will(self, target: Target) -> list[str]:
        """What it will change."""
        raise NotImplementedError

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        """Do it, and say what was changed."""
        raise NotImplementedError


class Pause(Action):
    permission, everywhere, is_grave = "pause_account", "stop", True
    title, button = gettext_lazy("Pause %s"), gettext_lazy("Pause")

    def will(self, target: Target) -> list[str]:
        answers = len(running(target.account))
        return [
            ngettext(
                "%(number)s answer that is being written ends within 15 seconds.",
                "%(number)s answers that are being written end within 15 seconds.",
                answers,
            )
            % {"number": number(answers)},
            _("Until it is undone, whoever asks reads: “%s”") % Paused.message,
            *self.whom(target),
        ]

    def whom(self, target: Target) -> list[str]:
        if target.account == ANONYMOUS:
            return [_("This holds for everybody who is not logged in; users go on.")]
        return []

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        save(target.account, paused=True)
        return _("Paused: %s.") % target.name


class StopChat(Pause):
    permission, everywhere = "stop_chat", ""
    title, button = gettext_lazy("Stop the chat for everybody"), gettext_lazy("Stop the chat")

    def whom(self, target: Target) -> list[str]:
        return [_("This holds for everybody, in every process, within 5 seconds.")]

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        super().do(target, typed, actor)
        return _("The chat is stopped for everybody.")


class Resume(Action):
    permission, everywhere = "pause_account", "start"
    title, button = gettext_lazy("Let %s chat again"), gettext_lazy("Let it chat again")

    def will(self, target: Target) -> list[str]:
        told = [_("It is answered again, in every process within 5 seconds.")]
        rows = Account.objects.using(settings.DATABASE_ALIAS).filter(name__in=pays_beside(target.account), paused=True)
        told += [_("But %s is paused too, and stops it still.") % row.name for row in rows]
        return told

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        save(target.account, paused=False)
        return _("Chats again: %s.") % target.name


class StartChat(Resume):
    permission, everywhere = "stop_chat", ""
    title, button = gettext_lazy("Start the chat again"), gettext_lazy("Start the chat")

    def will(self, target: Target) -> list[str]:
        return [_("Everybody is answered again, in every process within 5 seconds.")]

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        super().do(target, typed, actor)
        return _("The chat is started.")


class Forgive(Action):
    permission = "forgive_usage"
    title, button = gettext_lazy("Forgive what %s has used today"), gettext_lazy("Forgive")

    def will(self, target: Target) -> list[str]:
        usage = DailyUsage.objects.using(settings.DATABASE_ALIAS).filter(day=today(), account=target.account).first()
        used, held = (usage.tokens_used, usage.tokens_reserved) if usage else (0, 0)
        told = [
            _("%s tokens no longer count against its day; what is owed to the provider stays as it is.") % number(used)
        ]
        if held:
            told.append(_("%s tokens stay reserved by running answers, and will count.") % number(held))
        if beside := pays_beside(target.account):
            told.append(_("The day's budget of %s stays as it is.") % _(" and of ").join(beside))
        return told

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        reset = Reset(day=today(), account=target.account, reason=typed["reason"], actor=actor)
        forgiven = cast("int", ledger.apply([reset])[0])
        return _("Forgiven: %(tokens)s tokens of %(name)s.") % {"name": target.name, "tokens": number(forgiven)}


class Grant(Action):
    permission = "grant_tokens"
    form: ClassVar[type[ReasonForm]] = GrantForm
    title, button = gettext_lazy("Give %s more today"), gettext_lazy("Give")

    def will(self, target: Target) -> list[str]:
        row = row_of(target.account)
        limit = daily_limit(row)
        facts = {"limit": number(limit.in_force), "why": reasons(limit, row)}
        told = [_("Today's limit is %(limit)s tokens (%(why)s).") % facts]
        if extra := row.extra_on(today()):
            told.append(_("What you give takes the place of the %s that were given for today.") % number(extra))
        return told

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        save(target.account, extra_tokens=typed["tokens"], extra_day=today())
        limit = limit_with(target.account)
        return _("Today's limit of %(name)s is %(limit)s tokens now.") % {"name": target.name, "limit": number(limit)}


class Lower(Grant):
    form = LowerForm
    title, button = gettext_lazy("Lower the limit of %s"), gettext_lazy("Set the limit")

    def will(self, target: Target) -> list[str]:
        return super().will(target)[:1]

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        save(target.account, daily_token_limit=typed["tokens"])
        limit = limit_with(target.account)
        return _("The daily limit of %(name)s is %(limit)s tokens now.") % {"name": target.name, "limit": number(limit)}


class EndAnswer(Action):
    permission, is_grave = "stop_chat", True
    title, button = gettext_lazy("End this answer to %s"), gettext_lazy("End it")

    def will(self, target: Target) -> list[str]:
        answer = target.answer
        if answer is None or answer.state != Reservation.State.OPEN:
            return [_("It has ended already.")]
        return [
            _("It began %(since)s ago, is written by %(model)s and holds %(tokens)s tokens.")
            % {"since": lasting(now() - answer.created_at), "model": answer.model, "tokens": number(answer.tokens)},
            _("It ends within 15 seconds in whichever process it runs, and is charged for what it has used."),
            _("Its reader reads: “%s” Other answers go on.") % Paused.message,
        ]

    def do(self, target: Target, typed: Mapping[str, Any], actor: str) -> str:
        answer = target.answer
        assert answer
        ended = ledger.apply([Stop(id=answer.pk, day=answer.day, accounts=answer.accounts)])[0]
        if not ended:
            return _("It had ended already.")
        record("account", target.account, "answer", when(answer.created_at), _("ended"))
        return _("The answer ends within 15 seconds.")


ACTIONS: Final[Mapping[str, Action]] = {
    "stop": StopChat(),
    "start": StartChat(),
    "pause": Pause(),
    "resume": Resume(),
    "forgive": Forgive(),
    "grant": Grant(),
    "lower": Lower(),
    "end": EndAnswer(),
}


def meant(action: str, account: str) -> str:
    """The name of the action that does it to this account."""
    return (ACTIONS[action].everywhere if account == SITE else "") or action


def save(account: str, **changes: Any) -> Account:
    """Save these fields of its row, which is made if there is none.

    Raises ValidationError where no request is charged to that name: it would look like a success.
    """
    row = row_of(account)
    for field, value in changes.items():
        setattr(row, field, value)
    row.full_clean()
    row.save(using=settings.DATABASE_ALIAS)
    return row

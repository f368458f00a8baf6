from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from django.core.management import call_command
from django.core.management.base import CommandError, CommandParser
from django.db import connections

from chatnest.accounts import SITE, paying
from chatnest.conf import moment, provider, settings
from chatnest.errors import ChatError
from chatnest.ledger.batcher import batcher
from chatnest.limits import clamp, hard_caps
from chatnest.models import Calibration, Profile, Reservation
from chatnest.policy import Policy, Terms
from chatnest.reports import currency, money
from chatnest.slots import StreamSlot
from chatnest.views import open_stream
from chatnest.wires import ChatRequest, Message

from ..base import OperatorCommand

PAYER: Final = "doctor"
QUESTION: Final = (Message("user", "Answer with one word: ready?"),)
MOST_TOKENS: Final = 16  # the least that some models take
MOST_SKEW: Final = 2.0  # seconds: a lease has thirty
OTHER: Final = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


class Command(OperatorCommand):
    help = (
        "Ask each enabled profile's model one short question, as a chat does: through the ledger, paid by the account "
        f"{PAYER!r} and by the site. Says what the settings, the clock, the keys and the models' reports are like, and "
        "what it cost. Exits with 1 if a profile cannot answer."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--profile", action="append", metavar="NAME", help="only this one; may be repeated")

    def run(self, *args: Any, profile: list[str] | None, **options: Any) -> None:
        alias = settings.DATABASE_ALIAS
        call_command("check", databases=[alias], stdout=self.stdout, stderr=self.stderr)
        self._clock(alias)
        profiles = self._profiles(alias, profile)
        try:
            failed = [row.name for row in profiles if not self._ask(row)]
        finally:
            batcher.close()
        if failed:
            raise CommandError(f"No answer from {', '.join(failed)}.")

    def _clock(self, alias: str) -> None:
        """Leases compare the clocks of processes; the database's stands for all of them."""
        if connections[alias].vendor != "postgresql":
            return
        with connections[alias].cursor() as cursor:
            began = moment()
            cursor.execute("SELECT clock_timestamp()")
            skew = abs((cursor.fetchone()[0] - began).total_seconds())
        style = self.style.SUCCESS if skew <= MOST_SKEW else self.style.ERROR
        self.say(style(f"Clock: {skew:.1f} s from the database's."))

    def _profiles(self, alias: str, names: list[str] | None) -> Iterable[Profile]:
        rows = {row.name: row for row in Profile.objects.using(alias)}
        for name in names or ():
            if name not in rows:
                raise CommandError(f"There is no profile {name!r}. There are {', '.join(sorted(rows))}.")
        if names:
            return [rows[name] for name in names]
        models: dict[tuple[str, str], Profile] = {}
        for row in rows.values():  # one question a model
            if row.enabled:
                models.setdefault((row.provider, row.model), row)
        return models.values()

    def _ask(self, profile: Profile) -> bool:
        self.say(f"{profile.name}: {profile.model} of {profile.provider}")
        words = _Words()
        logger = logging.getLogger("chatnest.upstream")
        logger.addHandler(words)
        propagates, logger.propagate = logger.propagate, False  # it is told below
        try:
            seconds, problem = asyncio.run(_chat(profile))
        except ChatError as refusal:
            return self._failed(str(refusal), refusal.detail)
        finally:
            logger.removeHandler(words)
            logger.propagate = propagates
        if problem:
            return self._failed(problem, *words.told, self._hint(profile, " ".join(words.told)))
        self._report(profile, seconds)
        return True

    def _failed(self, *lines: str) -> bool:
        for line in filter(None, lines):
            self.stdout.write(self.style.ERROR(f"  {line}"))
        return False

    def _hint(self, profile: Profile, words: str) -> str:
        parameter = provider(profile.provider).max_tokens_parameter
        if parameter not in words:
            return ""
        return f"Set this provider's MAX_TOKENS_PARAMETER to {OTHER[parameter]!r}."

    def _report(self, profile: Profile, seconds: float) -> None:
        alias = settings.DATABASE_ALIAS
        row = Reservation.objects.using(alias).filter(payer=PAYER).latest("created_at")
        known = Calibration.objects.using(alias).filter(provider=profile.provider, model=profile.model).first()
        self.say(self.style.SUCCESS(f"  It answered after {seconds:.1f} s. Its key is right."))
        reported = row.usage_source == Reservation.UsageSource.REPORTED
        self.say(
            f"  It cost {row.tokens_charged:,} tokens ({row.prompt_tokens:,} of the prompt, "
            f"{row.completion_tokens:,} of the answer), {'as reported' if reported else 'for nothing was reported'}."
        )
        priced = row.cost is not None
        self.say(
            f"  That is {money(row.cost or 0)} {currency()}." if priced else "  Its price is not known: set PRICES."
        )
        if known and known.bills_what_it_shows:
            self.say("  It reports usage: answers that readers leave are charged for what was received.")
        else:
            self.say("  Until it reports usage that covers what it shows, answers that are left cost the whole hold.")


class _Words(logging.Handler):
    """What the provider said, which is for the log, and for whoever runs this."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (words := record.getMessage()) not in self.told:  # each retry says it
            self.told.append(words)


async def _chat(profile: Profile) -> tuple[float, str]:
    """Seconds to the first token, and why there was no answer. Raises ChatError where the ledger refuses."""
    terms = _terms(profile, await batcher.policy(paying(PAYER)))
    asked = ChatRequest(messages=QUESTION, profile=profile.name, label="doctor")
    with StreamSlot.acquire(stranger=False) as slot:
        stream = await open_stream(asked, terms, slot)
    began, first, problem = time.monotonic(), None, ""
    async for frames in stream:
        if b"event: token\n" in frames and first is None:
            first = time.monotonic() - began
        _, is_error, data = frames.partition(b"event: error\ndata: ")
        if is_error:
            problem = json.loads(data)["message"]
    return first or time.monotonic() - began, problem


def _terms(profile: Profile, policy: Policy) -> Terms:
    """Whoever may choose it, and paused or not: it is its model that is asked about."""
    limits = clamp(profile.limits, hard_caps())
    return Terms(
        profile=profile.name,
        provider=profile.provider,
        model=profile.model,
        system_prompt="",
        limits=replace(limits, max_output_tokens=min(MOST_TOKENS, limits.max_output_tokens)),
        budgets={PAYER: limits.daily_token_limit, SITE: policy.daily_limit(SITE).in_force},
        prices=policy.prices,
    )

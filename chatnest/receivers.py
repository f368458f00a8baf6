"""What saving, deleting and migrating rows sets off.

An operator's edit is in force at once in the process that saved it; the others see it within seconds.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from django.apps import apps as all_apps
from django.db import router, transaction
from django.db.models import ProtectedError
from django.db.models.signals import post_delete, post_save, pre_delete
from django.dispatch import receiver
from django.utils.translation import gettext as _

from .accounts import SHARED
from .ledger.batcher import batcher
from .limits import DEFAULT_PROFILES
from .models import Account, Calibration, Profile


@receiver([post_save, post_delete], sender=Profile)
@receiver([post_save, post_delete], sender=Account)
def forget_policy(using: str, **kwargs: Any) -> None:
    transaction.on_commit(batcher.forget_policy, using=using)


@receiver(post_delete, sender=Calibration)
def forget_calibrations(using: str, **kwargs: Any) -> None:
    transaction.on_commit(partial(batcher.forget_policy, calibrations=True), using=using)


@receiver(pre_delete, sender=Profile)
def keep_delivered_profiles(instance: Profile, **kwargs: Any) -> None:
    """Whether one or many are deleted, and by whom: without its row, nobody who asks for it gets an answer."""
    if instance.is_delivered:
        raise ProtectedError(_("Profile %s cannot be deleted; it can be switched off.") % instance.name, {instance})


def deliver_rows(using: str, apps: Any = all_apps, **kwargs: Any) -> None:
    """The rows of migration 0002 where there are none: after a flush, as TransactionTestCase does it.

    What is missing beside others stays missing: its limits may have been tightened.
    """
    try:
        profiles, accounts = (apps.get_model("chatnest", name) for name in ("Profile", "Account"))
    except LookupError:
        return
    if router.allow_migrate_model(using, profiles) and not profiles.objects.using(using).exists():
        profiles.objects.using(using).bulk_create(
            [profiles(name=name, **asdict(limits)) for name, limits in DEFAULT_PROFILES.items()]
        )
        accounts.objects.using(using).bulk_create([accounts(name=name) for name in SHARED], ignore_conflicts=True)

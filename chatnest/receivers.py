"""What saving, deleting and migrating rows sets off.

An operator's edit is in force at once in the process that saved it; the others see it within seconds.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any, Final

from django.apps import apps as all_apps
from django.db import router, transaction
from django.db.models import Model, ProtectedError
from django.db.models.signals import post_delete, post_save, pre_delete, pre_save
from django.dispatch import receiver
from django.utils.translation import gettext as _

from . import changes
from .accounts import SHARED
from .ledger.batcher import batcher
from .limits import DEFAULT_PROFILES
from .models import Account, Calibration, Price, Profile

BEFORE: Final = "_chatnest_before"  # on the instance, from before a save until after it


@receiver([post_save, post_delete], sender=Profile)
@receiver([post_save, post_delete], sender=Account)
@receiver([post_save, post_delete], sender=Price)
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


@receiver(pre_save, sender=Account)
@receiver(pre_save, sender=Profile)
@receiver(pre_save, sender=Price)
def note_what_was(instance: Model, using: str, raw: bool, **kwargs: Any) -> None:
    if not raw:  # a fixture brings what it has of the record
        setattr(instance, BEFORE, changes.stored(instance, using))


@receiver(post_save, sender=Account)
@receiver(post_save, sender=Profile)
@receiver(post_save, sender=Price)
def record_save(instance: Model, using: str, raw: bool, created: bool, **kwargs: Any) -> None:
    if not raw:
        changes.record_save(instance, using, vars(instance).pop(BEFORE), created=created)


# After keep_delivered_profiles, within the transaction that deletes.
@receiver(pre_delete, sender=Account)
@receiver(pre_delete, sender=Profile)
@receiver(pre_delete, sender=Price)
@receiver(pre_delete, sender=Calibration)
def record_delete(instance: Model, using: str, **kwargs: Any) -> None:
    changes.record_delete(instance, using)


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

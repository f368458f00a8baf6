"""An operator's edit is in force at once in the process that saved it; the others see it within seconds."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models.signals import post_delete, post_save
from django.dispatch import receiver

from .ledger.batcher import batcher
from .models import Account, Calibration, Profile


@receiver([post_save, post_delete], sender=Profile)
@receiver([post_save, post_delete], sender=Account)
@receiver(post_delete, sender=Calibration)
def forget_policy(using: str, **kwargs: Any) -> None:
    transaction.on_commit(batcher.forget_policy, using=using)

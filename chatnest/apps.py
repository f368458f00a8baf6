from __future__ import annotations

from django.apps import AppConfig
from django.db.models.signals import post_migrate


class ChatnestConfig(AppConfig):
    name = "chatnest"
    verbose_name = "Chat"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks, signals  # noqa: F401 - they register themselves

        post_migrate.connect(signals.deliver_rows, sender=self)

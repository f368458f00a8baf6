from __future__ import annotations

from django.apps import AppConfig


class ChatnestConfig(AppConfig):
    name = "chatnest"
    verbose_name = "Chat"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks, signals  # noqa: F401 - they register themselves

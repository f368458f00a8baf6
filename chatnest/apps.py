from __future__ import annotations

import sys

from django.apps import AppConfig
from django.db.models.signals import post_migrate
from django.utils.translation import gettext_lazy as _


class ChatnestConfig(AppConfig):
    name = "chatnest"
    verbose_name = _("Chat")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import alerts, checks, receivers  # noqa: F401 - they register themselves

        post_migrate.connect(receivers.deliver_rows, sender=self)
        if "django.core.asgi" in sys.modules:  # to serve, and not a command: nobody is to wait while these are loaded
            from . import prices, tokens, views  # noqa: F401 - views: with the openai package

            prices.warm_up()
            tokens.warm_up()

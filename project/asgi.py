"""The site as an ASGI application: ``uvicorn project.asgi:application``."""

from __future__ import annotations

import os
from typing import Any

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application
from django.core.exceptions import SuspiciousFileOperation
from django.http import Http404

from chatnest.asgi import for_streaming

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")


class StaticFilesHandler(ASGIStaticFilesHandler):
    def serve(self, request: Any) -> Any:
        try:
            return super().serve(request)
        except SuspiciousFileOperation as error:  # a path that leaves the folder: Django's own is a 500
            raise Http404 from error


# Static files too, whatever DEBUG says: the demo has no web server before it to serve them.
# A site that has one lets it answer at STATIC_URL, and loses nothing here.
application = for_streaming(StaticFilesHandler(get_asgi_application()))

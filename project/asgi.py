"""The site as an ASGI application: ``uvicorn project.asgi:application``."""

from __future__ import annotations

import os

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

from chatnest.asgi import for_streaming

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

# Static files too, whatever DEBUG says: the demo has no web server before it to serve them.
# A site that has one lets it answer at STATIC_URL, and loses nothing here.
application = for_streaming(ASGIStaticFilesHandler(get_asgi_application()))

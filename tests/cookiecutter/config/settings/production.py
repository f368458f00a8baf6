"""Behind a proxy that speaks TLS."""

import logging

import sentry_sdk
from config.sentry import Kept
from sentry_sdk.integrations.asyncio import AsyncioIntegration
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.integrations.openai import OpenAIIntegration

from .base import *  # noqa: F403
from .base import env

SECRET_KEY = env("DJANGO_SECRET_KEY")
ALLOWED_HOSTS = ["localhost"]

SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
SECURE_SSL_REDIRECT = True
SESSION_COOKIE_SECURE = True
SESSION_COOKIE_NAME = "__Secure-sessionid"
CSRF_COOKIE_SECURE = True
CSRF_COOKIE_NAME = "__Secure-csrftoken"
SECURE_HSTS_SECONDS = 518400
SECURE_HSTS_INCLUDE_SUBDOMAINS = True
SECURE_HSTS_PRELOAD = True
SECURE_CONTENT_TYPE_NOSNIFF = True

STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
}

sentry_sdk.init(
    dsn="http://key@localhost/1",
    transport=Kept,  # nothing leaves the machine
    integrations=[
        LoggingIntegration(level=logging.INFO, event_level=logging.ERROR),
        DjangoIntegration(),
        AsyncioIntegration(),
        OpenAIIntegration(),
    ],
    environment="production",
    traces_sample_rate=1.0,
)

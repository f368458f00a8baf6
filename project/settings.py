"""Settings of the demo project, read from the environment (``.env.example`` lists the variables)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from project.env import BASE_DIR, database, flag, items, number, text

DEBUG = flag("DEBUG")
SECRET_KEY = text("SECRET_KEY", "django-insecure-for-development-only" if DEBUG else "")
if not SECRET_KEY:
    raise ImproperlyConfigured(
        "SECRET_KEY is not set. Set it to a long random string, in the environment or in .env "
        "(see .env.example), or set DEBUG=on to develop without one."
    )
ALLOWED_HOSTS = items("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]")

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "chatnest",
    "project",
]
# Django's own stack, without its hand-overs to threads (see chatnest.asgi.middleware).
MIDDLEWARE = [
    "chatnest.asgi.middleware.SecurityMiddleware",
    "chatnest.asgi.middleware.SessionMiddleware",
    "chatnest.asgi.middleware.LocaleMiddleware",
    "chatnest.asgi.middleware.CommonMiddleware",
    "chatnest.asgi.middleware.CsrfViewMiddleware",
    "chatnest.asgi.middleware.AuthenticationMiddleware",
    "chatnest.asgi.middleware.MessageMiddleware",
    "chatnest.asgi.middleware.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
ROOT_URLCONF = "project.urls"
ASGI_APPLICATION = "project.asgi.application"

DATABASES = {"default": database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.NumericPasswordValidator"},
]

LANGUAGE_CODE = "en-us"
LANGUAGES = [("de", "Deutsch"), ("en", "English"), ("es", "Español"), ("fr", "Français")]  # that chatnest speaks
TIME_ZONE = "UTC"
USE_I18N = True
USE_TZ = True

LOGIN_URL = "login"
LOGIN_REDIRECT_URL = LOGOUT_REDIRECT_URL = "home"

STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"

# One switch, not DEBUG: without DEBUG the site must still answer over plain http on this machine.
HTTPS = flag("HTTPS")
SECURE_SSL_REDIRECT = HTTPS
SESSION_COOKIE_SECURE = HTTPS
CSRF_COOKIE_SECURE = HTTPS
# An hour is easily taken back; raise it to a year once https has proved itself.
SECURE_HSTS_SECONDS = 3600 if HTTPS else 0
# Subdomains and the preload list concern the domain's other sites, which this one cannot speak for.
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]
# These look for Django's own middleware by its path, and do not see that chatnest's is a subclass of it.
SILENCED_SYSTEM_CHECKS += ["security.W001", "security.W002", "security.W003"]

# Only what the environment names: the rest keeps chatnest's own defaults.
readers: dict[str, Callable[[str], object]] = {
    "OPENAI_API_KEY": text,
    "OPENAI_BASE_URL": text,
    "CHATNEST_ALLOW_ANONYMOUS": flag,
    "CHATNEST_SITE_DAILY_TOKEN_LIMIT": number,
    "CHATNEST_ANONYMOUS_DAILY_TOKEN_LIMIT": number,
}
CHATNEST: dict[str, Any] = {name.removeprefix("CHATNEST_"): read(name) for name, read in readers.items() if text(name)}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
    "loggers": {
        "chatnest": {"level": "INFO"},
        # In place of Django's own handlers, or every line would be printed twice with DEBUG.
        "django": {"handlers": [], "level": "INFO"},
    },
}

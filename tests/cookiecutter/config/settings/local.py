"""On a developer's machine."""

from .base import *  # noqa: F403
from .base import INSTALLED_APPS, MIDDLEWARE

DEBUG = True
SECRET_KEY = "local"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]

INSTALLED_APPS = ["whitenoise.runserver_nostatic", *INSTALLED_APPS, "debug_toolbar"]
# Behind the middleware that encodes a page, and before the others.
MIDDLEWARE = [*MIDDLEWARE[:4], "debug_toolbar.middleware.DebugToolbarMiddleware", *MIDDLEWARE[4:]]
INTERNAL_IPS = ["127.0.0.1"]

"""The demo project's settings for a server in a process of its own, which has no test around it.

``CHATNEST_CHANGES`` in the environment is JSON, over ``CHATNEST``.
"""

import json
import os

from project.settings import *  # noqa: F403
from project.settings import CHATNEST

ALLOWED_HOSTS = ["*"]
CHATNEST = {
    **CHATNEST,
    "ALLOW_ANONYMOUS": True,
    "TRUSTED_PROXIES": 1,  # each client says who it is, and pays for itself
    "SITE_DAILY_TOKEN_LIMIT": 10**12,
    "ANONYMOUS_DAILY_TOKEN_LIMIT": 10**12,
    "MAX_STREAMS_PER_PROCESS": 20_000,
    **json.loads(os.environ.get("CHATNEST_CHANGES", "{}")),
}

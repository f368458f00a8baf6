"""A site's Celery: a broker of files, and the README's own task."""

from __future__ import annotations

import os
import re
from pathlib import Path
from textwrap import dedent

import django
from celery import Celery
from openai import OpenAI

README = (Path(__file__).parent.parent / "README.md").read_text()
HOLD = dedent(re.search(r"```python\n(import chatnest\n.*?)```", README, re.DOTALL)[1])

QUEUE = os.environ["CELERY_FILES"]

app = Celery("site", broker="filesystem://")
app.conf.broker_transport_options = {"data_folder_in": QUEUE, "data_folder_out": QUEUE, "control_folder": QUEUE}
app.conf.broker_connection_retry_on_startup = False
app.conf.worker_hijack_root_logger = False

django.setup()

_task = {"client": OpenAI(api_key="sk", base_url=os.environ.get("UPSTREAM_URL", "http://127.0.0.1:9/v1"))}
exec(HOLD, _task)


@app.task(name="digest")
def digest(user: str, text: str) -> None:
    _task["digest"](user, [{"role": "user", "content": text}])

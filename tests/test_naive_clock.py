"""A site with ``USE_TZ`` off: its day is its own all the same, and everything adds up."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from django.db import connections

from chatnest.models import Reservation
from chatnest.testing import FakeUpstream

from .benchmarks import processes
from .benchmarks.machine import ROOT
from .client import Client
from .conftest import eventually


def test_with_use_tz_off_a_day_is_the_sites_own_and_adds_up(database: str) -> None:
    port = processes.free_port()
    serve = f"-m uvicorn project.asgi:application --port {port} --timeout-graceful-shutdown 1".split()
    with FakeUpstream() as upstream:
        env = {
            "DJANGO_SETTINGS_MODULE": "tests.naive_settings",
            "SECRET_KEY": "naive",
            "DEBUG": "",
            "DATABASE_URL": processes.url_of(connections[database].settings_dict),
            "OPENAI_API_KEY": "sk-naive",
            "OPENAI_BASE_URL": upstream.url,
        }
        with processes.serving(sys.executable, *serve, port=port, env=env):
            client = Client(port, connection="close")
            assert [client.chat().events[-1] for _ in range(2)] == ["done", "done"]
            standing = client.usage()
            assert standing["usedToday"] == 28
            midnight = datetime.fromisoformat(standing["resetsAt"]).astimezone(ZoneInfo("Europe/Berlin"))
            assert midnight.time() == time()
            assert timedelta(0) < midnight - datetime.now(UTC) <= timedelta(hours=25)
            with client.stream() as stream:
                stream.until("token")
            eventually(lambda: not Reservation.objects.using(database).open().exists())
        for command in ("chatnest_usage", "chatnest_verify"):
            subprocess.run([sys.executable, "manage.py", command], cwd=ROOT, env={**os.environ, **env}, check=True)

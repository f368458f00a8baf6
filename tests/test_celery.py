"""``chatnest.hold`` in a worker of Celery's, which forks the processes that work: no request, and no event loop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from django.db import connections

from chatnest.models import Refusal, Reservation
from chatnest.testing import FakeUpstream, Reply

from .benchmarks.processes import environment, url_of
from .conftest import EditProfile, Settled, eventually, on_sqlite
from .test_holds import answer

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, "-m", "celery", "-A", "tests.celery_site")


class Worker:
    """One, with one process that works."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self.env = {**os.environ, **env}
        self.log = log
        with log.open("wb") as file:
            command = [*COMMAND, "worker", "-P", "prefork", "-c", "1", "-l", "INFO", "--without-mingle"]
            self.process = psutil.Popen(command, cwd=ROOT, env=self.env, stdout=file, stderr=subprocess.STDOUT)
        eventually(lambda: "ready." in log.read_text(), seconds=60)

    def digest(self, user: str, text: str) -> None:
        """Have it done, some time."""
        command = [*COMMAND, "call", "digest", f'--args=["{user}", "{text}"]']
        subprocess.run(command, cwd=ROOT, env=self.env, check=True, capture_output=True, timeout=60)

    def kill_who_works(self) -> None:
        (working,) = self.process.children()
        working.kill()

    def end(self) -> None:
        children = self.process.children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            for process in [self.process, *children]:
                if process.is_running():
                    process.kill()


@pytest.fixture
def worker(database: str, upstream: FakeUpstream, tmp_path: Path) -> Iterator[Worker]:
    url = url_of(connections[database].settings_dict)
    (tmp_path / "queue").mkdir()
    env = environment(url, upstream.url, LEASE_SECONDS=2)
    worker = Worker({**env, "CELERY_FILES": str(tmp_path / "queue"), "UPSTREAM_URL": upstream.url}, tmp_path / "log")
    yield worker
    worker.end()


@on_sqlite
def test_a_worker_pays_for_what_it_asks(
    worker: Worker, upstream: FakeUpstream, database: str, settled: Settled, edit_profile: EditProfile
) -> None:
    reservations = Reservation.objects.using(database)
    edit_profile(rate_max_requests=2)
    upstream.replies(answer(12, 3))
    worker.digest("user:7", "Sum this up.")
    eventually(lambda: reservations.filter(outcome="completed").exists(), seconds=30)
    row = reservations.get()
    assert (row.payer, row.label, row.tokens_charged) == ("user:7", "digest", 15)

    # One that takes longer than its lease is renewed; then its process is killed, and another charges it.
    upstream.replies(Reply(gate_after=-1), answer(12, 3))
    worker.digest("user:7", "Take your time.")
    upstream.wait_for(lambda: len(upstream.requests) == 2, timeout=30)
    held = reservations.open().get()
    eventually(lambda: reservations.get(pk=held.pk).expires_at > held.expires_at, seconds=30)
    worker.kill_who_works()
    worker.digest("user:8", "Sum this up.")
    eventually(lambda: reservations.filter(outcome="expired").exists(), seconds=30)
    row = reservations.get(pk=held.pk)
    assert (row.outcome, row.tokens_charged) == ("expired", row.tokens)

    worker.digest("user:7", "Once more.")
    eventually(lambda: Refusal.objects.using(database).exists(), seconds=30)
    refusal = Refusal.objects.using(database).get()
    assert (refusal.account, refusal.code) == ("user:7", "rate_limited")
    assert "RateLimited" in worker.log.read_text()  # Celery's own line: the task has failed by it
    assert len(upstream.requests) == 3

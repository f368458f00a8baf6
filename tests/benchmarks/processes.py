"""Servers in processes of their own, to be crowded, measured and ended: what they cost is theirs alone."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from .machine import ROOT

_random = random.SystemRandom()


def free_port() -> int:
    """None of those that the kernel gives to connections: one could take it before its server does."""
    while True:
        port = _random.randrange(10_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass(frozen=True)
class Serving:
    """A process that serves ``port``. Memory is in KiB, CPU in seconds."""

    port: int
    process: psutil.Popen
    log: Path

    @property
    def memory(self) -> float:
        return self.process.memory_info().rss / 1024

    @property
    def threads(self) -> int:
        return self.process.num_threads()

    @property
    def files(self) -> int:
        return self.process.num_fds()

    @property
    def cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def serves(self, client: socket.socket) -> bool:
        """Whether its end of the client's connection is open."""
        ends = self.process.net_connections("tcp")
        return any(end.raddr and end.raddr.port == client.getsockname()[1] for end in ends)

    def inside(self, query: str = "") -> dict[str, Any]:
        """What it says itself that it holds: see ``tests.benchmarks.asgi``."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", f"/debug?{query}", headers={"Connection": "close"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@contextmanager
def serving(
    *command: str,
    port: int,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    cpu: int | None = None,
    patience: float = 60,
) -> Iterator[Serving]:
    """Run ``command``, which serves ``port`` within ``patience`` seconds, for as long as the context lasts.

    On one core, if named.
    """
    with tempfile.TemporaryDirectory(prefix="chatnest-served-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = psutil.Popen(
                command, cwd=cwd, env={**os.environ, **(env or {})}, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            if cpu is not None:
                process.cpu_affinity([cpu])
            _wait_for(port, process, log, patience)
            yield Serving(port, process, log)
        finally:
            workers = process.children(recursive=True) if process.is_running() else []
            with suppress(psutil.NoSuchProcess):
                process.terminate()
            try:
                process.wait(5)
            except psutil.TimeoutExpired:  # streams are open
                process.kill()
                process.wait()
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()


def _wait_for(port: int, process: psutil.Popen, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{process.args} does not serve:\n{log.read_text()}")
            time.sleep(0.02)


def chatnest(
    database_url: str,
    upstream_url: str,
    *,
    application: str = "tests.benchmarks.asgi:application",
    cpu: int | None = None,
    **changes: Any,
) -> Any:
    """The demo site under uvicorn; ``changes`` are to ``CHATNEST``."""
    port = free_port()
    command = (
        f"{sys.executable} -m uvicorn {application} --port {port} --lifespan off --log-level warning"
        " --no-proxy-headers --backlog 8192"
    )
    return serving(*command.split(), port=port, env=environment(database_url, upstream_url, **changes), cpu=cpu)


def environment(database_url: str, upstream_url: str, **changes: Any) -> dict[str, str]:
    """The demo site's, under any server."""
    return {
        "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
        "SECRET_KEY": "benchmarks",
        "DEBUG": "",
        "DATABASE_URL": database_url,
        "OPENAI_API_KEY": "sk-benchmarks",
        "OPENAI_BASE_URL": upstream_url,
        # No TOKENIZER: a token here carries a number that OpenAI's would cut in nine, so that answers end early.
        "CHATNEST_CHANGES": json.dumps(changes),
    }


@contextmanager
def upstream(tokens: int, interval: float, cpu: int | None = None) -> Iterator[str]:
    """The base URL of a ``tests.benchmarks.upstream``."""
    port = free_port()
    command = (sys.executable, "-m", "tests.benchmarks.upstream", str(port), str(tokens), str(interval))
    with serving(*command, port=port, cpu=cpu):
        yield f"http://127.0.0.1:{port}/v1"


def url_of(database: Mapping[str, Any]) -> str:
    """An entry of ``DATABASES`` as the DATABASE_URL that another process opens it by."""
    if database["ENGINE"].endswith("sqlite3"):
        return f"sqlite:///{database['NAME']}"
    user, name, host = (quote(str(database[part]), safe="") for part in ("USER", "NAME", "HOST"))
    password = quote(str(database["PASSWORD"]), safe="")
    return f"postgresql://{user}:{password}@/{name}?host={host}&port={database['PORT'] or 5432}"

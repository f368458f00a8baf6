"""A worker's life under each ASGI server: it streams, it hears who leaves, and told to end it settles what it can."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
from django.db import connections

from chatnest.ledger.charges import IN_FLIGHT
from chatnest.models import Reservation
from chatnest.testing import FakeUpstream, Reply

from .benchmarks.processes import Serving, environment, free_port, serving, url_of
from .client import Client
from .conftest import Settled, on_sqlite

SITE = "project.asgi:application"
PATIENCE_SECONDS = 30
OPEN = 4

COMMANDS = {
    "uvicorn": f"uvicorn {SITE} --port {{port}} --timeout-graceful-shutdown 1",
    "uvicorn-without-a-timeout": f"uvicorn {SITE} --port {{port}}",
    "uvicorn-without-lifespan": f"uvicorn {SITE} --port {{port}} --lifespan off --timeout-graceful-shutdown 3",
    "uvicorn-and-Django-s-own-application": "uvicorn django.core.asgi:get_asgi_application --factory --port {port}",
    "gunicorn": f"gunicorn {SITE} -k uvicorn_worker.UvicornWorker -b 127.0.0.1:{{port}}",
    "granian": f"granian {SITE} --interface asgi --port {{port}}",
    "hypercorn": f"hypercorn {SITE} -b 127.0.0.1:{{port}} --graceful-timeout 1",
    "daphne": f"daphne {SITE} -p {{port}}",
}


@pytest.fixture(params=COMMANDS)
def server(
    request: pytest.FixtureRequest, database: str, upstream: FakeUpstream, known_model: object
) -> Iterator[Serving]:
    """The demo site under a server that a team may have chosen, in a process of its own."""
    command = COMMANDS[request.param]
    package = command.split()[0]
    if not find_spec(package) and not os.environ.get("CI"):
        pytest.skip(f"{package} is not installed")
    port = free_port()
    env = environment(url_of(connections[database].settings_dict), upstream.url)
    with serving(sys.executable, "-m", *command.format(port=port).split(), port=port, env=env) as serving_it:
        yield serving_it


@on_sqlite
def test_a_server_streams_and_hears_who_leaves_and_ends_politely(
    server: Serving, upstream: FakeUpstream, settled: Settled, database: str
) -> None:
    upstream.replies(Reply("one", " two", " three", gate_after=2))
    client = Client(server.port)
    with client.stream(x_forwarded_for="10.0.0.0") as reader:
        assert [reader.until("token")[1] for _ in range(2)] == ['"one"', '" two"']  # the model has not said more
    upstream.wait_for_disconnect()
    (left,) = settled()
    assert (left.outcome, left.usage_source) == ("cancelled", "counted")

    with ExitStack() as readers:
        streams = [readers.enter_context(client.stream(x_forwarded_for=f"10.0.0.{n + 1}")) for n in range(OPEN)]
        for stream in streams:
            stream.until("token"), stream.until("token")
        server.process.terminate()
        server.process.wait(PATIENCE_SECONDS)
    upstream.wait_for_disconnect(1 + OPEN)
    rows = Reservation.objects.using(database).exclude(pk=left.pk)
    ends = [(row.state, row.outcome, row.usage_source, row.tokens_charged - row.prompt_tokens) for row in rows]
    assert ends == [("settled", "cancelled", "counted", 2 + IN_FLIGHT)] * OPEN, server.log.read_text()
    assert " chatnest" not in server.log.read_text(), "the package has complained"

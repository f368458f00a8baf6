"""``manage.py demo``: one command, and a person chats in their browser, without a key and without a network."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from chatnest.testing import FakeUpstream, Reply

from .client import Client
from .conftest import eventually

MANAGE = Path(__file__).parent.parent / "manage.py"
OURS = re.compile("SECRET_KEY|DEBUG|ALLOWED_HOSTS|DATABASE_URL|OPENAI_.*|CHATNEST_.*|HTTPS|DJANGO_.*")


class Demo:
    """The command as a process of its own: what it printed, and a client of what it serves."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
        # Empty counts as unset, and wins over a developer's own .env.
        site = dict.fromkeys(("SECRET_KEY", "DEBUG", "ALLOWED_HOSTS", "HTTPS"), "")
        limits = ("CHATNEST_SITE_DAILY_TOKEN_LIMIT", "CHATNEST_ANONYMOUS_DAILY_TOKEN_LIMIT")
        chat = dict.fromkeys(("CHATNEST_ALLOW_ANONYMOUS", *limits), "")
        model = dict.fromkeys(("OPENAI_API_KEY", "OPENAI_BASE_URL"), "")
        self.database = folder / "demo.sqlite3"
        settings = {**site, **chat, **model, "DATABASE_URL": f"sqlite:///{self.database}", **variables}
        self.process = subprocess.Popen(
            [sys.executable, str(MANAGE), "demo", "--port", "0", *arguments],
            env={**environment, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.output += line

    def said(self, pattern: str) -> str:
        """The first group of ``pattern``, once it has been printed."""
        eventually(lambda: re.search(pattern, self.output) or self.process.poll() is not None, seconds=60)
        found = re.search(pattern, self.output)
        assert found, self.output
        return found[1]

    @property
    def client(self) -> Client:
        return Client(int(self.said(r"Chat page +http://127\.0\.0\.1:(\d+)/\n")))

    def end(self, kind: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(kind)
        code = self.process.wait(20)
        self._reader.join(10)
        return code

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query).fetchall()


@contextmanager
def demo(folder: Path, *arguments: str, **variables: str) -> Iterator[Demo]:
    running = Demo(folder, *arguments, **variables)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait(10)
        running._reader.join(10)
        if running.process.stdout:
            running.process.stdout.close()


def log_in(client: Client, name: str, password: str, form: str = "/login/") -> str:
    """The cookies of somebody who logged in by the form."""
    page = client.request("GET", form)
    (token,) = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)
    (cookie,) = re.findall(r"csrftoken=(\w+)", page.headers["set-cookie"])
    typed = {"username": name, "password": password, "csrfmiddlewaretoken": token}
    answer = client.request(
        "POST",
        form,
        urlencode(typed).encode(),
        content_type="application/x-www-form-urlencoded",
        cookie=f"csrftoken={cookie}",
    )
    assert answer.status == 302, answer.text
    (session,) = re.findall(r"sessionid=(\w+)", answer.headers["set-cookie"])
    return f"sessionid={session}; csrftoken={cookie}"


def test_a_person_with_nothing_else_chats_after_one_command(tmp_path: Path) -> None:
    """And the operator whose password was printed finds the cost of it in the admin; then a polite kill ends it."""
    with demo(tmp_path) as running:
        client = running.client
        port = client.port
        assert running.said(r"Admin +(.+)\n") == f"http://127.0.0.1:{port}/admin/"
        assert running.said(r"Model +(.+)\n").startswith("the built-in offline model (not an AI")
        for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
            assert running.said(rf"\n  ({variable}) ") == variable

        page = client.request("GET", "/")
        assert page.status == 200
        for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
            assert client.request("GET", path).status == 200
        assert "chat.js" in page.text
        assert client.request("GET", "/static/..%2f..%2fx").status == 404

        before = client.usage()["remainingToday"]
        with client.stream({"messages": [{"role": "user", "content": "Is it “you”? 😀"}]}) as stream:
            pieces = [json.loads(stream.until("token")[1]) for _ in range(2)]
            rest = stream.rest()
        assert [event for event, _ in rest][-2:] == ["usage", "done"]
        text = "".join([*pieces, *(json.loads(data) for event, data in rest if event == "token")])
        assert "I am not an AI" in text
        assert "Is it “you”? 😀" in text
        told = json.loads(dict(rest)["usage"])
        assert told["completionTokens"] == len(text.split())
        assert client.usage()["remainingToday"] == before - told["totalTokens"]
        assert running.rows("SELECT outcome, usage_source, tokens_charged FROM chatnest_reservation") == [
            ("completed", "reported", told["totalTokens"])
        ]

        password = running.said(r"Log in as +operator, password (\S+) \(shown only now\)")
        cookie = log_in(client, "operator", password)
        admin = client.request("GET", "/admin/", cookie=cookie)
        assert admin.status == 200
        assert "Reservation" in admin.text
        charged = client.request("GET", "/admin/chatnest/reservation/", cookie=cookie)
        assert str(told["totalTokens"]) in charged.text

        limits = {}
        for name in ("writer", "reader"):
            password = running.said(rf"{name}, password (\S+) \(shown only now\)")
            cookie = log_in(client, name, password)
            limits[name] = client.usage(cookie=cookie)["dailyTokenLimit"]
            page = client.request("GET", "/", cookie=cookie)
            assert name in page.text and "Log out" in page.text and "/admin/" not in page.text
        assert limits == {"writer": 70_000, "reader": 3_000}

        assert running.end() == 0
        assert running.output.endswith("Stopped.\n")
        assert "Traceback" not in running.output
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)

    # What was decided stays: a second start changes nothing, and shows no password again.
    with demo(tmp_path) as again:
        assert again.client.usage()["remainingToday"] == before - told["totalTokens"]
        assert "operator, who exists already" in again.output
        assert password not in again.output
        assert again.end(signal.SIGINT) == 0
        assert "Traceback" not in again.output


def test_ending_it_settles_the_answers_that_are_being_written(tmp_path: Path) -> None:
    with demo(tmp_path) as running, running.client.stream() as stream:
        stream.until("token")
        assert running.end() == 0
        assert "Traceback" not in running.output
        with pytest.raises((OSError, EOFError, ValueError)):
            while True:
                stream.next()
        query = "SELECT state, outcome, usage_source, tokens_charged > 0 FROM chatnest_reservation"
        assert running.rows(query) == [("settled", "cancelled", "held", 1)]
        assert running.rows("SELECT sum(tokens_reserved) FROM chatnest_dailyusage") == [(0,)]


def test_two_variables_reach_a_real_provider(tmp_path: Path) -> None:
    with FakeUpstream() as upstream:
        upstream.replies(Reply("A real answer."))
        variables = {"OPENAI_API_KEY": "sk-mine", "OPENAI_BASE_URL": upstream.url}
        with demo(tmp_path, **variables) as running:
            assert running.client.chat().answer == "A real answer."
            assert running.said(r"Model +(.+)\n") == upstream.url
            assert running.end() == 0
            assert "sk-mine" not in running.output
        assert upstream.requests[0].headers["authorization"] == "Bearer sk-mine"


def test_a_port_that_is_taken_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with demo(tmp_path, "--port", str(port)) as running:
            assert running.process.wait(60) == 1
            running._reader.join(10)
    assert f"Cannot listen on 127.0.0.1, port {port}: it is taken (try another --port)" in running.output
    assert "Traceback" not in running.output
    assert not running.database.exists()


def test_nobody_names_another_address_than_their_own(tmp_path: Path) -> None:
    """Nobody stands before the demo."""
    with demo(tmp_path) as running:
        with running.client.stream(x_forwarded_for="192.0.2.7") as stream:
            stream.until("token")
        assert running.rows("SELECT payer FROM chatnest_reservation") == [("ip:127.0.0.1",)]
        assert running.client.request("GET", "/", host="evil.example").status == 400
        connection = http.client.HTTPConnection("127.0.0.1", running.client.port, timeout=10)
        with closing(connection):
            connection.request("GET", "/nowhere")
            assert connection.getresponse().status == 404

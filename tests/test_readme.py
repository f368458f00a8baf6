"""The README's own lines, executed: a site made of startproject and of them, and nothing else, chats."""

from __future__ import annotations

import ast
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.request import urlopen

import pytest
from django.contrib.auth.models import User
from openai import OpenAI

from chatnest.checks import check_settings
from chatnest.conf import provider
from chatnest.models import Change
from chatnest.signals import announcer, budget_crossed, provider_refused, tell_provider_refused
from chatnest.testing import FakeUpstream, Reply

from .benchmarks.processes import Serving, free_port, serving
from .bookkeeping import ask, do, used
from .client import Client
from .conftest import Settled, eventually
from .test_demo import OURS, log_in
from .test_holds import answer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", README, re.DOTALL | re.MULTILINE)]


def block(beginning: str) -> str:
    """The one that begins like this."""
    (found,) = [text for text in BLOCKS if text.startswith(beginning)]
    return found


SETTINGS = block("INSTALLED_APPS = ")
PAYER = block("from allauth")
JWT = block("import jwt")
OAUTH = block("MIDDLEWARE +=")
CORS = block('INSTALLED_APPS += ["corsheaders"]')
LIFESPAN = block("from chatnest.asgi")
PREPARE = block("from dataclasses import replace\n\nfrom chatnest.wires")
CONVERSATIONS = block("from dataclasses import replace\n\nfrom chatnest.signals")
HOLD = block("import chatnest")
CHANGES = block("from chatnest.changes")
ROUTER = block('CHATNEST["DATABASE_ALIAS"]')
PROVIDERS = block('CHATNEST = {\n    "PROVIDERS"')
WEBHOOK = block("import json")
PROMETHEUS = block("from opentelemetry")
TEST_CASE = block("from django.test")
FIXTURE = block("def test_chat(chat_upstream")
TESTING = block("from chatnest.testing")
URL = re.search(r'`(path\("api/", .*?\))`', README)


def test_no_block_is_left_out() -> None:
    ours = {
        SETTINGS,
        PAYER,
        JWT,
        OAUTH,
        CORS,
        LIFESPAN,
        PREPARE,
        CONVERSATIONS,
        HOLD,
        CHANGES,
        ROUTER,
        PROVIDERS,
        WEBHOOK,
        PROMETHEUS,
        TEST_CASE,
        FIXTURE,
        TESTING,
    }
    assert ours == set(BLOCKS)
    for text in BLOCKS:
        ast.parse(text)


class Site:
    """What ``startproject`` makes, with the README's lines added where it says."""

    def __init__(self, folder: Path, upstream: FakeUpstream) -> None:
        self.folder = folder
        site = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
        self.environment = {**site, "OPENAI_API_KEY": "sk-readme", "DJANGO_SETTINGS_MODULE": "mysite.settings"}
        self.run("-m", "django", "startproject", "mysite", ".", DJANGO_SETTINGS_MODULE="")
        self.add("settings", "import os", SETTINGS.replace("[...,", "[*INSTALLED_APPS,"))
        self.add("settings", 'DATABASES["default"]["OPTIONS"] = {"transaction_mode": "IMMEDIATE"}')
        self.add("settings", f'CHATNEST["OPENAI_BASE_URL"] = "{upstream.url}"')
        assert URL
        self.add("urls", "from django.urls import include", f"urlpatterns += [{URL[1]}]")
        self.add("asgi", LIFESPAN)

    def add(self, module: str, *lines: str) -> None:
        with (self.folder / "mysite" / f"{module}.py").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")

    def run(self, *command: str, **variables: str) -> str:
        environment = {**self.environment, **variables}
        ran = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def manage(self, *command: str, **variables: str) -> str:
        return self.run("manage.py", *command, **variables)

    def served(self) -> AbstractContextManager[Serving]:
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "mysite.asgi:application", "--port", str(port)]
        return serving(*command, port=port, env=self.environment, cwd=self.folder)


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
def site(tmp_path: Path, upstream: FakeUpstream) -> Site:
    site = Site(tmp_path, upstream)
    site.manage("check", "--fail-level", "WARNING")
    site.manage("migrate", "--verbosity", "0")
    site.manage("createsuperuser", "--noinput", "--username", "grace", "--email", "", DJANGO_SUPERUSER_PASSWORD="x")
    return site


def test_a_site_made_of_the_readme_chats(site: Site, upstream: FakeUpstream) -> None:
    """As a logged-in user with a page of the same origin, which sends no token; what it adds to a chat is held."""
    site.add("settings", 'CHATNEST["PREPARE"] = "mysite.chat.prepare"')
    (site.folder / "mysite" / "chat.py").write_text(PREPARE)
    with site.served() as running:
        client = Client(running.port)
        assert client.chat().json["code"] == "not_authenticated"
        cookie = log_in(client, "grace", "x", form="/admin/login/")
        own = {"cookie": cookie, "host": "localhost", "origin": "http://localhost"}
        answer = client.chat(**own)
        assert (answer.status, answer.events[-2:]) == (200, ["usage", "done"])
        assert upstream.requests[0].json["messages"][0] == {"role": "system", "content": "The user's name is grace."}
        assert client.chat(cookie=cookie, origin="https://evil.example").status == 403

        upstream.replies(Reply("One", "two", gate_after=1))
        with client.stream(cookie=cookie, origin="http://localhost") as stream:
            stream.until("token")
        upstream.wait_for_disconnect()
        running.process.terminate()
        assert running.process.wait(20) is not None
    site.manage("chatnest_verify")
    rows = "from chatnest.models import *; print([(r.state, r.label) for r in Reservation.objects.order_by('id')])"
    assert "[('settled', 'help desk'), ('settled', 'help desk')]" in site.manage("shell", "-c", rows)


def test_a_site_keeps_its_conversations(site: Site, upstream: FakeUpstream) -> None:
    """In two models of its own, also of an answer that a restart broke off."""
    site.add("settings", 'INSTALLED_APPS += ["mysite"]', 'CHATNEST["PREPARE"] = "mysite.models.prepare"')
    (site.folder / "mysite" / "models.py").write_text(CONVERSATIONS)
    site.manage("makemigrations", "mysite", "--verbosity", "0")
    site.manage("migrate", "--verbosity", "0")
    with site.served() as running:
        client = Client(running.port)
        cookie = log_in(client, "grace", "x", form="/admin/login/")
        headers = {"cookie": cookie, "origin": "http://localhost", "Host": "localhost"}
        upstream.replies(Reply("Paris"), Reply("It", " is", gate_after=1))
        assert client.chat(path="/api/chat?conversation=one", **headers).answer == "Paris"
        with client.stream(path="/api/chat?conversation=two", **headers) as stream:
            stream.until("token")
            running.process.terminate()
            running.process.wait(20)
    fields = "'conversation__key', 'conversation__user__username', 'question', 'answer'"
    turns = f"from mysite.models import Turn; print([*Turn.objects.order_by('pk').values_list({fields})])"
    told = "[('one', 'grace', 'Hello!', 'Paris'), ('two', 'grace', 'Hello!', 'It')]"
    assert told in site.manage("shell", "-c", turns)


def test_a_management_command_needs_no_key(site: Site) -> None:
    said = site.manage("showmigrations", "chatnest", OPENAI_API_KEY="")
    assert "[X] 0001_initial" in said
    assert "chatnest.W002" not in said


def test_the_ledger_has_a_database_of_its_own(site: Site) -> None:
    site.add("settings", 'DATABASES["ledger"] = {**DATABASES["default"], "NAME": BASE_DIR / "ledger.sqlite3"}')
    site.add("settings", ROUTER)
    site.manage("check", "--fail-level", "WARNING")
    site.manage("migrate", "--verbosity", "0", "--database", "ledger")
    rows = (
        "from chatnest.models import Profile; p = Profile.objects.first(); print(p._state.db, Profile.objects.count())"
    )
    assert "ledger 3" in site.manage("shell", "-c", rows)


def test_several_providers_are_right(settings: Any) -> None:
    names: dict[str, Any] = {"env": lambda name: "sk-from-the-environment"}
    exec(PROVIDERS.replace("mysite.ai.azure_client", "openai.AsyncAzureOpenAI"), names)
    settings.CHATNEST = names["CHATNEST"]
    assert check_settings() == []
    assert provider("default").max_tokens_parameter == "max_completion_tokens"


def test_prometheus_scrapes_all_that_the_rules_and_the_table_name(site: Site, upstream: FakeUpstream) -> None:
    port = free_port()
    site.add("asgi", "import os", PROMETHEUS)
    site.add("settings", 'CHATNEST["LEASE_SECONDS"] = 1')
    upstream.replies(Reply("Hello", gate_after=1), Reply.refuse(401))
    site.environment["METRICS_PORT"] = str(port)
    with site.served() as running:
        client = Client(running.port)
        client.chat()
        cookie = log_in(client, "grace", "x", form="/admin/login/")
        headers = {"cookie": cookie, "origin": "http://localhost", "Host": "localhost"}

        def scraped() -> str:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
                return str(response.read().decode())

        with client.stream(**headers) as stream:
            stream.until("token")
            eventually(lambda: "chatnest_lease_renewals_total" in scraped())
            # Newer exporters say which instrument's scope it is of.
            assert re.search(r"^chatnest_streams_open(\{.*\})? 1\.0$", scraped(), re.MULTILINE)
            upstream.release()
            stream.rest()
        client.chat(**headers)
        names = set(re.findall(r"^# TYPE (\w+)", scraped(), re.MULTILINE))
        (rules,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
        named = set(re.findall(r"\b(?:gen_ai|chatnest)_\w+", rules))
        table = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \| `(?:gen_ai|chatnest)\.", README, re.MULTILINE)
        assert len(table) == 6
        assert {name.removesuffix("_count") for name in named} <= names
        assert {name for row in table for name in row if name} <= names
        assert len(named) == 4
        assert 'error_type="upstream_misconfigured"' in scraped()
        assert 'chatnest_refusals_total{code="not_authenticated"' in scraped()


def test_a_webhook_is_posted_to(settings: Any, database: str) -> None:
    posted: queue.Queue[tuple[str, bytes]] = queue.Queue()

    class Room(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.put((self.headers["Content-Type"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    names: dict[str, Any] = {"__name__": "webhook"}
    exec(WEBHOOK, names)
    with HTTPServer(("127.0.0.1", 0), Room) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings.WEBHOOK = f"http://127.0.0.1:{server.server_port}/"
        try:
            do(used(do(ask(budgets={"site": 1_000})), 800))
            kind, body = posted.get(timeout=10)
            assert kind == "application/json"
            assert json.loads(body) == {"text": "site has used 80 % of today's tokens: 800 of 1,000."}
            tell_provider_refused("default", "gpt-4o-mini", code="upstream_misconfigured", detail="wrong key")
            assert json.loads(posted.get(timeout=10)[1]) == {
                "text": "The provider default refuses gpt-4o-mini: wrong key."
            }
        finally:
            budget_crossed.disconnect(names["post_budget"])
            provider_refused.disconnect(names["post_refusal"])
            announcer.close()
            server.shutdown()


def test_a_task_pays(database: str, settled: Settled) -> None:
    with FakeUpstream() as upstream, OpenAI(api_key="sk", base_url=upstream.url) as client:
        upstream.replies(answer(12, 3))
        names: dict[str, Any] = {"client": client}
        exec(HOLD, names)
        assert names["digest"]("user:7", [{"role": "user", "content": "Sum this up."}]) == "Done."
    assert settled()[0].tokens_charged == 15


def test_a_sites_own_code_says_who_it_acts_for(database: str) -> None:
    names: dict[str, Any] = {}
    exec(CHANGES, names)
    names["ban"]("user:7", User(username="ada"))
    change = Change.objects.get()
    assert (change.subject, change.field, change.new) == ("user:7", "paused", "yes")
    assert (change.actor, change.reason) == ("ada", "banned in the forum")


def test_a_sites_pytest_has_a_fixture_and_asks_no_real_provider(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["chatnest.testing.fixtures"]\n')
    (tmp_path / "test_site.py").write_text(FIXTURE + GUARDED)
    command = (sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path))
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "project.settings", "DEBUG": "on", "OPENAI_API_KEY": "sk-real"}
    env |= {"OPENAI_BASE_URL": "https://192.0.2.1/v1", "PYTHONPATH": str(ROOT), "CHATNEST_ALLOW_ANONYMOUS": "on"}
    env["DATABASE_URL"] = "sqlite:///unused"
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "2 passed" in ran.stdout, ran.stdout


GUARDED = """

import pytest
from asgiref.sync import async_to_sync
from django.test import AsyncClient

from chatnest.testing import inline_ledger

BODY = '{"messages": [{"role": "user", "content": "Hi!"}]}'


@pytest.mark.django_db
def test_it_scripts_nothing(caplog):
    async def story():
        response = await AsyncClient().post("/api/chat", BODY, "application/json")
        return b"".join([part async for part in response])

    with inline_ledger():
        assert b"upstream_misconfigured" in async_to_sync(story)()
    assert "would ask 192.0.2.1, and pay" in caplog.text
"""


def test_a_sites_own_test_scripts_the_provider(settings: Any) -> None:
    names: dict[str, Any] = {"settings": settings}
    exec(TESTING, names)
    assert settings.CHATNEST["OPENAI_BASE_URL"] == names["upstream"].url


_names: dict[str, Any] = {"__name__": __name__}
exec(TEST_CASE, _names)
TestOfASite = _names["ChatTests"]  # visitors may chat in the tests' settings

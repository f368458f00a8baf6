"""A site as cookiecutter-django makes one, with allauth, axes, csp, DRF, the debug toolbar, Sentry, and now chatnest.

What chatnest adds to it is a wheel and the README's lines. The site's packages are the newest, in an environment of
their own; its database is a real PostgreSQL, behind Django's pool.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, OpenerDirector, build_opener
from uuid import uuid4

import pytest

from chatnest.testing import FakeUpstream, Reply

from .benchmarks.processes import Serving, free_port, serving
from .client import Answer, Client, RawStream
from .conftest import eventually, not_here
from .packing import run, uv, wheel
from .settings import POSTGRES
from .test_demo import OURS
from .test_readme import LIFESPAN, SETTINGS, URL

KEY = "sk-of-the-site"
SECRET = "the pigeons of Lisbon"
QUESTION = {"messages": [{"role": "user", "content": f"Tell me of {SECRET}."}]}
PASSWORD = "correct horse battery staple"
SERVERS = {
    # A developer's, with the debug toolbar; and production's, with Sentry, in two processes behind a proxy.
    "local": "uvicorn config.asgi:application --port {port}",
    "production": "gunicorn config.asgi:application -k uvicorn_worker.UvicornWorker -w 2 -b 127.0.0.1:{port}",
}
PATIENCE = 30


class Site:
    def __init__(self, folder: Path, upstream: FakeUpstream) -> None:
        self.folder = folder / "site"
        self.upstream = upstream
        shutil.copytree(Path(__file__).parent / "cookiecutter", self.folder)
        packed = wheel(folder)
        self.python = str(folder / "environment" / "bin" / "python")
        uv("venv", "--quiet", "--python", sys.executable, str(folder / "environment"))
        needs = ("-r", str(self.folder / "requirements.txt"), f"{packed}[postgres]")
        uv("pip", "install", "--quiet", "--compile-bytecode", "--python", self.python, *needs)

        POSTGRES.psql("CREATE DATABASE cookiecutter")
        site = {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}
        self.environment = {
            **site,
            "DATABASE_URL": POSTGRES.get_uri("cookiecutter"),
            "DJANGO_SECRET_KEY": f"{uuid4()}{uuid4()}",
            "OPENAI_API_KEY": KEY,
            "PYTHONWARNINGS": "error",
        }
        settings = f"import os\n\n{SETTINGS.replace('[...,', '[*INSTALLED_APPS,')}"
        self.add("settings/base", settings, f'CHATNEST["OPENAI_BASE_URL"] = "{upstream.url}"')
        assert URL
        self.add("urls", f"urlpatterns += [{URL[1]}]")
        self.add("asgi", LIFESPAN.replace("get_asgi_application()", "application"))

    def add(self, module: str, *lines: str) -> None:
        with (self.folder / "config" / f"{module}.py").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")

    def variables(self, settings: str) -> dict[str, str]:
        return {**self.environment, "DJANGO_SETTINGS_MODULE": f"config.settings.{settings}"}

    def manage(self, *command: str, settings: str = "production", **variables: str) -> str:
        env = {**self.variables(settings), **variables}
        return run(self.python, "manage.py", *command, cwd=self.folder, env=env)

    def served(self, settings: str) -> AbstractContextManager[Serving]:
        port = free_port()
        command = [self.python, "-m", *SERVERS[settings].format(port=port).split()]
        return serving(*command, port=port, cwd=self.folder, env=self.variables(settings))

    def rows(self, of: str) -> list[list[Any]]:
        """``[state, outcome, source, charged, held]`` of each reservation of a payer, oldest first."""
        fields = "state, outcome, usage_source, tokens_charged, tokens"
        query = f"SELECT json_agg(json_build_array({fields}) ORDER BY created_at) FROM chatnest_reservation"
        said = POSTGRES.psql(f"\\connect cookiecutter\n\\t on\n{query} WHERE payer = 'user:{of}';")
        return json.loads(re.sub(r"\s*\n\s*", "", said[said.index("[") : said.rindex("]") + 1]))

    @property
    def sentry(self) -> list[str]:
        return [file.read_text() for file in (self.folder / "sentry").glob("*.envelope")]


class Browser:
    """A person's: it keeps cookies, follows redirects, and sends what a page of the site's own origin does."""

    def __init__(self, running: Serving) -> None:
        self.origin = f"https://localhost:{running.port}"
        self.url = f"http://localhost:{running.port}"  # behind the proxy
        self.cookies = CookieJar(DefaultCookiePolicy(secure_protocols=("http", "https")))
        self.chats = Client(running.port, x_forwarded_proto="https")
        self.html = ""

    @cached_property
    def opener(self) -> OpenerDirector:
        opener = build_opener(HTTPCookieProcessor(self.cookies))
        opener.addheaders = [("X-Forwarded-Proto", "https"), ("Accept", "text/html"), ("Origin", self.origin)]
        return opener

    def open(self, path: str, **typed: str) -> str:
        with self.opener.open(self.url + path, urlencode(typed).encode() if typed else None, timeout=30) as response:
            self.headers = response.headers
            self.html = response.read().decode()
        return self.html

    def submit(self, path: str, **typed: str) -> str:
        """Open a page, fill in its form, and send it."""
        (token,) = set(re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', self.open(path)))
        return self.open(path, csrfmiddlewaretoken=token, **typed)

    @property
    def headers_of_a_page(self) -> dict[str, str]:
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in self.cookies)
        return {"cookie": cookies, "origin": "https://localhost"}

    def stream(self, body: object = QUESTION) -> RawStream:
        return self.chats.stream(body, **self.headers_of_a_page)

    def chat(self, body: object = QUESTION) -> Answer:
        return self.chats.chat(body, host="localhost", **self.headers_of_a_page)

    def usage(self) -> Any:
        return self.chats.usage(host="localhost", **self.headers_of_a_page)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with FakeUpstream() as upstream:
        try:
            site = Site(tmp_path_factory.mktemp("cookiecutter"), upstream)
        except subprocess.TimeoutExpired as error:
            not_here(f"the site's packages cannot be installed: {error}")
        site.manage("makemigrations", "users")
        site.manage("migrate", "--verbosity", "0")
        site.manage("collectstatic", "--noinput", "--verbosity", "0")
        site.manage(
            *["createsuperuser", "--noinput", "--email", "operator@example.com"], DJANGO_SUPERUSER_PASSWORD=PASSWORD
        )
        yield site


@pytest.fixture(scope="module", params=SERVERS)
def running(request: pytest.FixtureRequest, site: Site) -> Iterator[Serving]:
    site.manage("check", "--deploy", settings="production")
    with site.served(request.param) as running:
        yield running


@pytest.fixture
def upstream(site: Site) -> Iterator[FakeUpstream]:
    site.upstream.reset()
    yield site.upstream
    site.upstream.release()


def signed_up(site: Site, running: Serving) -> tuple[Browser, str]:
    """Somebody new, by allauth's own pages and the link in its e-mail; and their primary key."""
    browser, email = Browser(running), f"{uuid4()}@example.com"
    browser.submit("/accounts/signup/", email=email, password1=PASSWORD, password2=PASSWORD)
    (mail,) = [text for file in (site.folder / "sent").iterdir() if email in (text := file.read_text())]
    (link,) = re.findall(r"/accounts/confirm-email/\S+", mail)
    browser.submit(link)
    if email not in browser.open("/"):
        browser.submit("/accounts/login/", login=email, password=PASSWORD)
    assert email in browser.open("/")
    said = POSTGRES.psql(f"\\connect cookiecutter\nSELECT id FROM users_user WHERE email = '{email}';")
    return browser, re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", said)[0]


def test_a_user_reads_while_the_model_writes_and_closes_the_tab(
    site: Site, running: Serving, upstream: FakeUpstream
) -> None:
    browser, user = signed_up(site, running)
    upstream.replies(Reply("one", " two", gate_after=1, usage=(20, 2)))
    with browser.stream() as stream:
        assert stream.until("token")[1] == '"one"'
        assert upstream.pieces_sent == 1, "the model has not said more"
        upstream.release()
        assert stream.rest()[-1][0] == "done"

    upstream.replies(Reply("one", " two", gate_after=1))
    with browser.stream() as stream:
        stream.until("token")
    left = time.monotonic()
    assert upstream.wait_for_disconnect() - left < 2
    eventually(lambda: [row[:2] for row in site.rows(user)] == [["settled", "completed"], ["settled", "cancelled"]])
    assert site.rows(user)[0][2:4] == ["reported", 22]
    assert browser.usage()["reservedToday"] == 0


def test_open_streams_hold_no_connection_of_the_pool(site: Site, running: Serving, upstream: FakeUpstream) -> None:
    """It has four in each process; the other pages go on."""
    upstream.replies(Reply("one", " two", gate_after=1))
    with ExitStack() as readers:
        for browser in [signed_up(site, running)[0] for _ in range(3)]:
            for _ in range(4):
                stream = readers.enter_context(browser.stream())
                stream.until("token")
        for _ in range(8):
            assert "@example.com" in browser.open("/api/users/me/")
        upstream.release()
        assert stream.rest()[-1][0] == "done"


def test_what_is_refused_is_json_and_no_page(site: Site, running: Serving, upstream: FakeUpstream) -> None:
    visitor = Browser(running)
    refused = visitor.chat()
    assert (refused.status, refused.json["code"]) == (401, "not_authenticated")
    browser, _ = signed_up(site, running)
    refused = browser.chat({**QUESTION, "dailyTokenLimit": 50})
    assert (refused.status, refused.json["code"]) == (429, "daily_budget_exceeded")
    assert "retry-after" in refused.headers
    cookies = browser.headers_of_a_page["cookie"]
    forged = browser.chats.chat(QUESTION, host="localhost", cookie=cookies, origin="https://evil.example")
    assert (forged.status, forged.json["code"]) == (403, "forbidden")
    assert not upstream.requests


def test_what_the_sites_middleware_adds_is_there(site: Site, running: Serving, upstream: FakeUpstream) -> None:
    browser, _ = signed_up(site, running)
    answer = browser.chats.chat(
        QUESTION, host="localhost", accept_encoding="gzip", accept_language="de", **browser.headers_of_a_page
    )
    assert answer.events[-1] == "done"  # read as it is: not compressed
    assert answer.headers["content-language"] == "de"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "etag" not in answer.headers and "content-encoding" not in answer.headers


def test_an_operator_pauses_the_site_under_its_policy(site: Site, running: Serving, upstream: FakeUpstream) -> None:
    browser, _ = signed_up(site, running)
    operator = Browser(running)
    operator.submit("/accounts/login/", login="operator@example.com", password=PASSWORD)
    if "Hello" not in operator.open("/"):  # the address is to be confirmed first
        operator.submit("/admin/login/", username="operator@example.com", password=PASSWORD)
    listed = operator.open("/admin/chatnest/account/?q=site")
    (change,) = re.findall(r'href="(/admin/chatnest/account/\d+/change/)[^"]*">site<', listed)
    usage = "/admin/chatnest/usage/"
    pages = ("/admin/chatnest/profile/1/change/", "/admin/chatnest/reservation/", change)
    for page in (*pages, usage, f"{usage}costs/", f"{usage}account/?name=site", f"{usage}do/stop/"):
        html = re.sub(r'<div id="djDebug".*|<script[^>]*djdt.*', "", operator.open(page), flags=re.DOTALL)
        assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)(?![^>]*application/json)", html), page
    operator.submit(change, name="site", paused="on")
    eventually(lambda: (refused := browser.chat()).status == 503 and refused.json["code"] == "paused")
    operator.submit(change, name="site")
    eventually(lambda: browser.chat().status == 200)
    assert "The chat is stopped." in operator.submit(f"{usage}do/stop/", reason="drill")
    eventually(lambda: browser.chat().status == 503)
    assert "drill" in operator.submit(f"{usage}do/start/")
    eventually(lambda: browser.chat().status == 200)


def test_told_to_end_it_settles_and_has_nothing_to_complain_about(
    site: Site, running: Serving, upstream: FakeUpstream
) -> None:
    """After all the stories above: its log, and what Sentry has heard."""
    browser, user = signed_up(site, running)
    upstream.replies(Reply("one", " two", gate_after=1))
    with ExitStack() as readers:
        streams: list[RawStream] = []

        def all_are_open() -> bool:
            """A process may not have heard yet that the operator's pause is over."""
            stream = readers.enter_context(browser.stream())
            if stream.status == 200:
                stream.until("token")
                streams.append(stream)
            return len(streams) == 4

        eventually(all_are_open)
        running.process.terminate()
        assert running.process.wait(PATIENCE) is not None
    upstream.wait_for_disconnect(4)
    rows = site.rows(user)
    assert [row[:2] for row in rows] == [["settled", "cancelled"]] * 4, running.log.read_text()
    site.manage("chatnest_verify")
    log = running.log.read_text()
    assert not re.findall(r"Traceback|\w*Warning\b|^(?:WARNING|ERROR) \S+ \S+ chatnest.*", log, re.MULTILINE), log
    assert SECRET not in log and KEY not in log


def test_sentry_has_heard_no_conversation(site: Site, upstream: FakeUpstream) -> None:
    """It traces each request, and hears of no error, for nothing that happened above is one."""
    kinds = [json.loads(envelope.split("\n")[1])["type"] for envelope in site.sentry]
    assert "transaction" in kinds
    assert "event" not in kinds
    for envelope in site.sentry:
        assert SECRET not in envelope and KEY not in envelope, envelope


def test_the_doctor_finds_nothing(site: Site, upstream: FakeUpstream) -> None:
    upstream.replies(Reply("Ready"))
    assert "It reports usage" in site.manage("chatnest_doctor")

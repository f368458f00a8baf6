"""Who is asking, as the README's recipes know it: one site with all of them, before the packages they name."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from playwright.sync_api import Browser, Page

from chatnest.testing import FakeUpstream, Reply

from .benchmarks.processes import free_port, serving
from .client import Answer, Client
from .test_demo import log_in
from .test_readme import CORS, JWT, OAUTH, PAYER, Site

PEOPLE = """
import datetime
from django.contrib.auth.models import User
from django.utils import timezone
from oauth2_provider.models import AccessToken
from rest_framework.authtoken.models import Token
for name in ("session", "drf", "jwt", "oauth", "allauth"):
    user = User.objects.create_superuser(name, f"{name}@example.com", "x")
Token.objects.create(user=User.objects.get(username="drf"), key="drf-secret")
soon = timezone.now() + datetime.timedelta(hours=1)
AccessToken.objects.create(user=User.objects.get(username="oauth"), token="oauth-secret", expires=soon, scope="read")
AccessToken.objects.create(
    user=User.objects.get(username="oauth"), token="old", expires=soon - datetime.timedelta(days=1), scope="read"
)
"""
USER = {"session": 1, "drf": 2, "jwt": 3, "oauth": 4, "allauth": 5}
ALLAUTH = """
INSTALLED_APPS += ["allauth", "allauth.account", "allauth.headless", "rest_framework", "rest_framework.authtoken"]
INSTALLED_APPS += ["oauth2_provider"]
MIDDLEWARE += ["allauth.account.middleware.AccountMiddleware"]
AUTHENTICATION_BACKENDS += ["allauth.account.auth_backends.AuthenticationBackend"]
ACCOUNT_EMAIL_VERIFICATION = "none"
HEADLESS_CLIENTS = ("app", "browser")
"""
# What the original's React hook sends (useAiChat of chat-nest-sdk 1.1.2): JSON, and no header of CSRF's.
ASK = """async ([url, credentials]) => {
    const response = await fetch(url, {
        method: "POST", credentials, headers: { "Content-Type": "application/json" },
        body: JSON.stringify({
            messages: [{ id: "1", role: "user", content: "Hi!" }], profile: "balanced", systemPrompt: "Be kind.",
        }),
    });
    if (!response.ok) return [response.status, (await response.json()).code];
    const reader = response.body.getReader(), decoder = new TextDecoder();
    window.seen = "";
    for (let part; !(part = await reader.read()).done;) window.seen += decoder.decode(part.value, { stream: true });
    return [response.status, window.seen];
}"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def spa() -> Iterator[str]:
    """The origin of a page that another server serves."""

    class Blank(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>Another port</title>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Blank) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, upstream: FakeUpstream, spa: str) -> Site:
    site = Site(tmp_path_factory.mktemp("recipes"), upstream)
    (site.folder / "mysite" / "jwt.py").write_text(JWT)
    (site.folder / "mysite" / "payers.py").write_text(PAYER)
    site.add("settings", 'MIDDLEWARE += ["django.contrib.auth.middleware.LoginRequiredMiddleware"]')
    site.add("settings", 'MIDDLEWARE += ["mysite.jwt.JWTMiddleware"]', OAUTH, ALLAUTH)
    site.add("settings", CORS.replace("http://localhost:5173", spa), 'CHATNEST["PAYER"] = "mysite.payers.payer"')
    site.add("urls", 'urlpatterns += [path("_allauth/", include("allauth.headless.urls"))]')
    site.manage("check")
    site.manage("migrate", "--verbosity", "0")
    site.manage("shell", "-c", PEOPLE)
    return site


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Client]:
    with site.served() as running:
        yield Client(running.port, Host="localhost")


def paid(site: Site) -> str:
    with closing(sqlite3.connect(site.folder / "db.sqlite3")) as connection:
        ((payer,),) = connection.execute("SELECT payer FROM chatnest_reservation ORDER BY created_at DESC LIMIT 1")
    return str(payer)


def assert_pays(site: Site, name: str, answer: Answer) -> None:
    assert (answer.status, answer.events[-1:]) == (200, ["done"])
    assert paid(site) == f"user:{USER[name]}"


def refused(answer: Answer) -> Any:
    return answer.status, answer.json["code"]


def test_nobody_is_told_so(client: Client) -> None:
    assert refused(client.chat()) == (401, "not_authenticated")


def test_a_session_pays(site: Site, client: Client) -> None:
    cookie = log_in(client, "session", "x", form="/admin/login/")
    assert_pays(site, "session", client.chat(cookie=cookie, origin="http://localhost"))
    assert refused(client.chat(cookie=cookie, origin="https://evil.example")) == (403, "forbidden")


def test_a_token_of_rest_framework_pays(site: Site, client: Client) -> None:
    assert_pays(site, "drf", client.chat(authorization="Token drf-secret"))
    assert refused(client.chat(authorization="Token wrong")) == (401, "not_authenticated")


def test_a_json_web_token_pays(site: Site, client: Client) -> None:
    secret = site.manage("shell", "-c", "from django.conf import settings; print(settings.SECRET_KEY)").split()[-1]
    claims = {"sub": str(USER["jwt"]), "exp": 4_000_000_000}
    assert_pays(site, "jwt", client.chat(authorization=f"Bearer {jwt.encode(claims, secret, 'HS256')}"))
    for wrong in (jwt.encode(claims, "x" * 32, "HS256"), jwt.encode({**claims, "exp": 1}, secret, "HS256")):
        assert refused(client.chat(authorization=f"Bearer {wrong}")) == (401, "not_authenticated")


def test_a_token_of_oauth_pays(site: Site, client: Client) -> None:
    assert_pays(site, "oauth", client.chat(authorization="Bearer oauth-secret"))
    assert refused(client.chat(authorization="Bearer old")) == (401, "not_authenticated")


def test_a_session_token_of_allauth_headless_pays(site: Site, client: Client) -> None:
    typed = json.dumps({"username": "allauth", "password": "x"}).encode()
    login = client.request("POST", "/_allauth/app/v1/auth/login", typed, Content_Type="application/json")
    assert login.status == 200, login.text
    assert_pays(site, "allauth", client.chat(x_session_token=login.json["meta"]["session_token"]))
    assert refused(client.chat(x_session_token="wrong")) == (401, "not_authenticated")


def test_a_browsers_session_of_allauth_headless_pays(site: Site, client: Client) -> None:
    page = client.request("GET", "/_allauth/browser/v1/config")
    (csrf,) = re.findall(r"csrftoken=(\w+)", page.headers["set-cookie"])
    typed = json.dumps({"username": "allauth", "password": "x"}).encode()
    login = client.request(
        "POST",
        "/_allauth/browser/v1/auth/login",
        typed,
        Content_Type="application/json",
        Cookie=f"csrftoken={csrf}",
        X_CSRFToken=csrf,
    )
    assert login.status == 200, login.text
    (session,) = re.findall(r"sessionid=(\w+)", login.headers["set-cookie"])
    assert_pays(site, "allauth", client.chat(cookie=f"sessionid={session}", origin="http://localhost"))


def test_a_visitor_pays_by_address(site: Site) -> None:
    port = free_port()
    settings = "from mysite.settings import *\nCHATNEST['ALLOW_ANONYMOUS'] = True\n"
    (site.folder / "mysite" / "open.py").write_text(settings)
    command = [sys.executable, "-m", "uvicorn", "mysite.asgi:application", "--port", str(port)]
    env = {**site.environment, "DJANGO_SETTINGS_MODULE": "mysite.open"}
    with serving(*command, port=port, env=env, cwd=site.folder):
        assert Client(port, Host="localhost").chat().events[-1] == "done"
    assert paid(site) == "ip:127.0.0.1"


@pytest.fixture
def page(browser: Browser, client: Client) -> Iterator[Page]:
    context = browser.new_context()
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()


def log_in_by_hand(page: Page, client: Client) -> None:
    page.goto(f"http://localhost:{client.port}/admin/login/?next=/admin/")
    page.get_by_label("Username").fill("session")
    page.get_by_label("Password").fill("x")
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/admin/")


def streams(page: Page, upstream: FakeUpstream, url: str, credentials: str) -> None:
    """An answer is seen before it has ended."""
    upstream.replies(Reply("Hello", " you", gate_after=1))
    page.evaluate(f"arguments => {{ window.answer = ({ASK})(arguments); }}", [url, credentials])
    page.wait_for_function("window.seen && window.seen.includes('Hello')")
    assert " you" not in page.evaluate("window.seen")
    upstream.release()
    status, text = page.evaluate("window.answer")
    assert status == 200
    assert text.endswith("event: done\ndata: \n\n")


def test_a_page_of_the_same_origin_chats_as_the_originals_hook_does(
    page: Page, site: Site, client: Client, upstream: FakeUpstream
) -> None:
    page.goto(f"http://localhost:{client.port}/admin/login/")
    assert page.evaluate(ASK, ["/api/chat", "same-origin"]) == [401, "not_authenticated"]
    log_in_by_hand(page, client)
    streams(page, upstream, "/api/chat", "same-origin")
    assert paid(site) == f"user:{USER['session']}"


def test_a_page_on_another_port_chats(page: Page, site: Site, client: Client, upstream: FakeUpstream, spa: str) -> None:
    chat = f"http://localhost:{client.port}/api/chat"
    page.goto(spa)
    assert page.evaluate(ASK, [chat, "include"]) == [401, "not_authenticated"]
    log_in_by_hand(page, client)
    page.goto(spa)
    streams(page, upstream, chat, "include")
    assert paid(site) == f"user:{USER['session']}"
    page.goto(spa.replace("localhost", "127.0.0.1"))  # an origin that nobody named
    assert "Failed to fetch" in page.evaluate(f"a => ({ASK})(a).catch(String)", [chat, "include"])

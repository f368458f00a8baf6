"""Two databases, a real upstream, a real server: what the stories happen on."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, NoReturn

import django
import pytest
import uvicorn
from django.utils import timezone
from hypothesis import settings as hypothesis_settings
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from chatnest import stream
from chatnest.ledger.batcher import batcher
from chatnest.limits import DEFAULT_MODEL, DEFAULT_PROFILES
from chatnest.models import Calibration, Profile, Reservation
from chatnest.refusals import refusals
from chatnest.testing import FakeUpstream
from project.asgi import application

from .client import Client

hypothesis_settings.register_profile("shared machine", deadline=None)
hypothesis_settings.load_profile("shared machine")

# ADMINS: https://docs.djangoproject.com/en/6.0/ref/settings/#admins
OPERATORS: Any = ["grace@example.com"] if django.VERSION >= (6, 0) else [("Grace", "grace@example.com")]

Configure = Callable[..., None]
Settled = Callable[[], list[Reservation]]
EditProfile = Callable[..., Profile]


def _on(alias: str, *databases: str) -> Any:
    return pytest.param(
        alias,
        id={"default": "sqlite"}.get(alias, alias),
        marks=pytest.mark.django_db(transaction=True, databases=list(databases)),
    )


SQLITE, POSTGRES = _on("default", "default"), _on("postgres", "default", "postgres")

# For stories in which the database is no part, or in which only one of them can play.
on_sqlite = pytest.mark.parametrize("database", [SQLITE], indirect=True)
on_postgres = pytest.mark.parametrize("database", [POSTGRES], indirect=True)


@pytest.fixture(params=[SQLITE, POSTGRES])
def database(request: pytest.FixtureRequest, configure: Configure) -> Iterator[str]:
    """The alias of the database that the ledger lives in; each test that asks for it runs on both."""
    configure(DATABASE_ALIAS=request.param)
    batcher.forget_policy(calibrations=True)
    refusals.clear()
    yield request.param
    refusals.clear()  # what it has to write would start the batcher again, between two tests
    batcher.close()


@pytest.fixture
def configure(settings: Any) -> Configure:
    """Change ``CHATNEST`` for one test: ``configure(ALLOW_ANONYMOUS=False)``."""

    def configure(**changes: Any) -> None:
        settings.CHATNEST = {**settings.CHATNEST, **changes}
        batcher.forget_policy()

    return configure


@pytest.fixture
def upstream(configure: Configure) -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        # It counts as OpenAI does: a prompt's bound is exact.
        configure(OPENAI_BASE_URL=upstream.url, PROVIDERS={"default": {"TOKENIZER": "o200k_base"}})
        yield upstream


@contextmanager
def served(application: Any, **options: Any) -> Iterator[uvicorn.Server]:
    """An application served from a thread, so that a test's settings and clock are the server's too.

    ``options`` are uvicorn's.
    """
    # Without proxy_headers=False, uvicorn takes an X-Forwarded-For from loopback for the client's address.
    options = {"port": 0, "lifespan": "off", "log_level": "warning", "proxy_headers": False, **options}
    config = uvicorn.Config(application, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def port_of(server: uvicorn.Server) -> int:
    return int(server.servers[0].sockets[0].getsockname()[1])


def is_at_rest(server: uvicorn.Server) -> bool:
    """A story's end: the next one is not to see a request whose reader has left, nor an answer that outlives it."""
    return not (server.server_state.tasks or stream._chats)


@pytest.fixture(scope="session")
def server() -> Iterator[uvicorn.Server]:
    with served(application) as server:
        yield server


@pytest.fixture
def known_model(database: str) -> Calibration:
    """The default model has reported before: what is not reported is counted, and not the whole hold."""
    row = Calibration(provider="default", model=DEFAULT_MODEL, reports=1, updated_at=timezone.now())
    row.save(using=database)
    batcher.forget_policy()
    return row


@pytest.fixture
def client(server: uvicorn.Server, database: str, upstream: FakeUpstream, known_model: Calibration) -> Iterator[Client]:
    """An anonymous client of the real server, on each database, before the scripted upstream."""
    yield Client(port_of(server))
    eventually(lambda: is_at_rest(server))


@pytest.fixture
def settled(database: str) -> Settled:
    """All reservations, oldest first, once none is open: a client that left does not wait for its settlement."""

    def settled() -> list[Reservation]:
        rows = Reservation.objects.using(database)
        eventually(lambda: not rows.open().exists())
        return list(rows.order_by("created_at"))

    return settled


@pytest.fixture
def edit_profile(database: str) -> EditProfile:
    """An operator saves a profile: ``edit_profile("balanced", enabled=False)``; what is not named is as delivered."""

    def edit_profile(name: str = "balanced", **changes: Any) -> Profile:
        typed = asdict(DEFAULT_PROFILES.get(name, DEFAULT_PROFILES["balanced"])) | changes
        row, _ = Profile.objects.using(database).update_or_create(name=name, defaults=typed)
        return row

    return edit_profile


CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if executable is None:
        not_here("Pages are tested in Chromium: install it, or name its path in CHROMIUM.")
    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        # Its loop runs in this thread for as long as the browser does, and Django takes that for an async view's.
        patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


# Answers of any length: for stories of readers who stall, which fill every buffer on the way.
_MOST = 10**7
_CAPS = {"max_output_tokens": _MOST, "max_tokens_per_request": 2 * _MOST, "daily_token_limit": 10**11}
GENEROUS = {"HARD_CAPS": _CAPS, "SITE_DAILY_TOKEN_LIMIT": 10**12}


@pytest.fixture
def generous(configure: Configure, edit_profile: EditProfile) -> None:
    configure(**GENEROUS)
    edit_profile(**_CAPS)


def close(context: BrowserContext) -> None:
    """Once all is loaded: of a request that is cancelled, Django 6.1 leaves the static file open."""
    for page in context.pages:
        page.wait_for_load_state("networkidle")
    context.close()


def stalled(upstream: FakeUpstream, seconds: float) -> int:
    """How many pieces the upstream has sent once no more go out for this long: every buffer on the way is full."""
    with suppress(TimeoutError):
        while True:
            upstream.wait_for_pieces(upstream.pieces_sent + 1, timeout=seconds)
    return upstream.pieces_sent


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for what another process or thread is about to make true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.005)


def not_here(reason: str) -> NoReturn:
    """A newcomer's machine need not have everything; CI must."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)

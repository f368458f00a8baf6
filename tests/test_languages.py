"""German, French and Spanish: each reader and operator is told things in their own; code, logs and rows stay English.

To renew the catalogues after a text has changed (with gettext's own tools, Debian's package ``gettext``), run RENEW,
translate what is empty or fuzzy in the .po files, and run the last line of it again.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract
from babel.messages.mofile import read_mo
from babel.messages.pofile import read_po
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application
from django.test import Client as Browser
from django.urls import reverse
from django.utils.decorators import async_only_middleware
from django.utils.translation import deactivate, override
from django.utils.translation.template import templatize

from chatnest.errors import RateLimited
from chatnest.models import Account, Calibration, DailyUsage, Refusal
from chatnest.testing import FakeUpstream, Reply

from .client import HELLO, Client
from .conftest import EditProfile, eventually, on_sqlite, port_of, served

ROOT = Path(__file__).parent.parent
LANGUAGES = ("de", "es", "fr")


@pytest.fixture(autouse=True)
def own_language() -> Iterator[None]:
    """LocaleMiddleware leaves the last request's on in its thread, which here is the tests'."""
    yield
    deactivate()


RENEW = """
for domain in django djangojs; do DEBUG=on .venv/bin/python manage.py makemessages -d $domain -l de -l es -l fr \\
    -i .venv -i build -i tests --no-location --no-obsolete --no-wrap; done
DEBUG=on .venv/bin/python manage.py compilemessages -i .venv -i build
"""

# The catalogues.

CATALOGUES = [("chatnest", "django"), ("project", "django"), ("project", "djangojs")]
EVERY = [(package, domain, language) for package, domain in CATALOGUES for language in LANGUAGES]
each_catalogue = pytest.mark.parametrize(("package", "domain", "language"), EVERY, ids=map("-".join, EVERY))

CALLS: dict[str, Any] = {
    **dict.fromkeys(["_", "gettext", "gettext_lazy", "gettext_noop"]),
    **dict.fromkeys(["ngettext", "ngettext_lazy"], (1, 2)),
    **dict.fromkeys(["pgettext", "pgettext_lazy"], ((1, "c"), 2)),
    **dict.fromkeys(["npgettext", "npgettext_lazy"], ((1, "c"), 2, 3)),
}
PLACEHOLDER = re.compile(r"%(?:\(\w+\))?[sd]|\{\w*\}")
Key = tuple[str | None, str]  # context and text


def key(message: Message) -> Key:
    return message.context, message.id if isinstance(message.id, str) else message.id[0]


def written(package: str, domain: str) -> set[Key]:
    """What the sources mark to be translated, as makemessages finds it."""
    found: set[Key] = set()
    suffixes = {".js"} if domain == "djangojs" else {".py", ".html"}
    for path in sorted((ROOT / package).rglob("*")):
        if path.suffix not in suffixes:
            continue
        text = path.read_text()
        if path.suffix == ".html":  # to what a Python parser reads, as Django does it for xgettext
            text = "\n".join(line.strip() for line in templatize(text).splitlines())
        method = "javascript" if domain == "djangojs" else "python"
        for _, said, _, context in extract(method, BytesIO(text.encode()), CALLS):
            found.add((context, said if isinstance(said, str) else said[0]))
    return found


def catalogue(package: str, domain: str, language: str) -> Catalog:
    with path_of(package, domain, language).open("rb") as file:
        return read_po(file, locale=language)


def path_of(package: str, domain: str, language: str) -> Path:
    return ROOT / package / "locale" / language / "LC_MESSAGES" / f"{domain}.po"


def messages(catalog: Catalog) -> Iterator[Message]:
    return (message for message in catalog if message.id)


def listed(keys: set[Key]) -> str:
    return "".join(
        f"\n  {text!r}" + (f" (context {context!r})" if context else "") for context, text in sorted(keys, key=str)
    )


@each_catalogue
def test_every_text_is_translated_and_no_other(package: str, domain: str, language: str) -> None:
    catalog = catalogue(package, domain, language)
    done = {key(one) for one in messages(catalog) if not one.fuzzy and all(texts(one.string))}
    there = {key(one) for one in messages(catalog)}
    marked = written(package, domain)
    name = path_of(package, domain, language).relative_to(ROOT)
    assert marked, "the sources were not found"
    assert not marked - done, f"{name} does not translate:{listed(marked - done)}\nRun:{RENEW}"
    stale = there - marked | {key(one) for one in catalog.obsolete.values()}
    assert not stale, f"{name} has what no source says any more:{listed(stale)}\nRun:{RENEW}"


def texts(string: Any) -> tuple[str, ...]:
    return (string,) if isinstance(string, str) else tuple(string)


@each_catalogue
def test_a_translation_has_the_placeholders_of_its_text(package: str, domain: str, language: str) -> None:
    for message in messages(catalogue(package, domain, language)):
        (wanted,) = {tuple(sorted(PLACEHOLDER.findall(text))) for text in texts(message.id)}
        for said in texts(message.string):
            assert tuple(sorted(PLACEHOLDER.findall(said))) == wanted, f"{language}: {message.id!r} -> {said!r}"


@each_catalogue
def test_what_is_installed_is_compiled_from_what_is_written(package: str, domain: str, language: str) -> None:
    path = path_of(package, domain, language)
    with path.with_suffix(".mo").open("rb") as file:
        compiled = {key(one): texts(one.string) for one in messages(read_mo(file))}
    source = {key(one): texts(one.string) for one in messages(catalogue(package, domain, language))}
    differ = {one for one in source.keys() | compiled.keys() if source.get(one) != compiled.get(one)}
    name = path.with_suffix(".mo").relative_to(ROOT)
    assert not differ, f"{name} is older than its .po in:{listed(differ)}\nRun:{RENEW}"


def test_the_wheel_takes_the_catalogues_along() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tools["setuptools"]["package-data"]["chatnest"]
    taken = {path for pattern in patterns for path in (ROOT / "chatnest").glob(pattern)}
    assert {path_of("chatnest", "django", language).with_suffix(".mo") for language in LANGUAGES} <= taken


# Errors.


def test_an_error_is_told_in_the_readers_language_and_logged_in_english() -> None:
    refusal = RateLimited(retry_after=3)
    with override("de"):
        assert str(refusal.message) == "Zu viele Anfragen. Bitte warten Sie einen Moment."
        assert str(refusal) == "Rate limit exceeded. Please slow down."
        told = pickle.loads(pickle.dumps(refusal))  # as Celery keeps it
        assert (str(told), told.retry_after) == (str(refusal), 3)
        assert str(told.message) == str(refusal.message)


def test_errors_are_imported_where_django_has_no_settings_yet() -> None:
    command = [sys.executable, "-c", "import chatnest.errors"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT)}, timeout=60)


@on_sqlite
def test_a_refusal_is_in_the_language_that_the_client_asks_for(client: Client) -> None:
    said = {"code": "invalid_messages", "retryable": False}
    assert client.chat({}).json == {"error": "Invalid messages payload", **said}
    answer = client.chat({}, accept_language="de-AT,en;q=0.5")
    assert (answer.status, answer.json) == (400, {"error": "Ungültiger Inhalt in „messages“", **said})
    assert client.chat({}, accept_language="ja").json["error"] == "Invalid messages payload"
    odd = client.chat({**HELLO, "dailyTokenLimit": "many"}, accept_language="fr").json
    assert odd["error"] == "dailyTokenLimit doit être un nombre supérieur à 0 et inférieur à 2^63."
    assert client.request("GET", "/api/chat", accept_language="de").json["error"] == "Verwenden Sie POST."
    assert client.request("DELETE", "/api/usage", accept_language="de").json["error"] == "Verwenden Sie GET oder HEAD."


@on_sqlite
def test_a_refusal_that_is_remembered_is_told_to_each_in_their_own_language(
    client: Client, edit_profile: EditProfile
) -> None:
    """And what operators find of it is not in the language of whoever came last."""
    edit_profile(rate_max_requests=1)
    assert client.chat().status == 200
    told = [client.chat(accept_language=language).json for language in ("de", "fr", "en")]
    assert [one["error"] for one in told] == [
        "Zu viele Anfragen. Bitte warten Sie einen Moment.",
        "Trop de requêtes. Veuillez patienter un instant.",
        "Rate limit exceeded. Please slow down.",
    ]
    assert {one["code"] for one in told} == {"rate_limited"}
    eventually(Refusal.objects.filter(count=3).exists)
    assert Refusal.objects.get().last_detail == "request 2 in 60 s; balanced allows 1"


BROKE_OFF = {
    "en": "The AI model's answer broke off. Please try again.",
    "de": "Die Antwort des KI-Modells ist abgebrochen. Bitte versuchen Sie es noch einmal.",
    "fr": "La réponse du modèle d’IA s’est interrompue. Veuillez réessayer.",  # noqa: RUF001 - as French is written
}
BROKEN = Reply("Half", {"error": {"message": "overloaded"}}, gate_after=1)


@on_sqlite
def test_streams_that_break_at_once_are_each_told_so_in_their_language(
    client: Client, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies(BROKEN, BROKEN, BROKEN)
    with ExitStack() as stack, caplog.at_level(logging.WARNING, "chatnest"):
        streams = {code: stack.enter_context(client.stream(accept_language=code)) for code in BROKE_OFF}
        for stream in streams.values():
            stream.until("token")
        upstream.release()
        problems = {code: json.loads(stream.until("error")[1]) for code, stream in streams.items()}
    assert {code: problem["message"] for code, problem in problems.items()} == BROKE_OFF
    assert {problem["code"] for problem in problems.values()} == {"upstream_broken"}
    assert caplog.messages and "abgebrochen" not in caplog.text and "interrompue" not in caplog.text


@async_only_middleware
def in_french(get_response: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """A site's own, which knows its users' languages, and cleans up after itself: before the response is streamed."""

    async def middleware(request: Any) -> Any:
        with override("fr"):
            return await get_response(request)

    return middleware


DJANGOS = ["django.contrib.sessions.middleware.SessionMiddleware", "django.middleware.locale.LocaleMiddleware"]


@on_sqlite
@pytest.mark.parametrize(
    "middleware", [DJANGOS, ["tests.test_languages.in_french"]], ids=["Django's", "the site's own"]
)
def test_whatever_middleware_chose_the_language_an_error_in_the_stream_is_in_it(
    upstream: FakeUpstream, database: str, settings: Any, middleware: list[str]
) -> None:
    settings.MIDDLEWARE = middleware
    upstream.replies(Reply("Half", {"error": {"message": "overloaded"}}))
    with served(get_asgi_application()) as server:
        answer = Client(port_of(server)).chat(accept_language="fr")
    assert answer.data("error")["message"] == BROKE_OFF["fr"]


# The admin.


@pytest.fixture
def operator(database: str) -> Browser:
    browser = Browser(headers={"accept-language": "es"})
    browser.force_login(User.objects.create_superuser("operator"))
    return browser


@on_sqlite
def test_an_operator_reads_the_admin_in_spanish(operator: Browser) -> None:
    Account.objects.filter(name="anonymous").update(paused=True)
    listed = operator.get(reverse("admin:chatnest_account_changelist")).content.decode()
    for words in (
        "Cuentas",
        "Estado",
        "Vigente hoy",
        "<strong>En pausa</strong>",
        ">Activa<",
    ):
        assert words in listed
    assert "500\xa0000 (500\xa0000 según SITE_DAILY_TOKEN_LIMIT)" in listed
    assert "Límite diario de tokens" in operator.get(reverse("admin:chatnest_account_add")).content.decode()
    form = operator.get(reverse("admin:chatnest_profile_add")).content.decode()
    for words in ("La respuesta más larga, en tokens.", "Máx. de mensajes (vigente):", "Usuarios con sesión iniciada"):
        assert words in form
    assert "escriba" in form
    problem = operator.post(reverse("admin:chatnest_account_add"), {"name": "Site"}).content.decode()
    assert "Ninguna solicitud se carga a Site. ¿Quiso decir site?" in problem


@on_sqlite
def test_what_the_admin_writes_of_a_row_is_in_no_language(database: str) -> None:
    """It is kept in the log of actions, for operators of any."""
    rows = [DailyUsage(account="site", day="2026-11-27"), Calibration(provider="default", model="gpt-4o-mini")]
    with override("es"):
        assert [str(row) for row in rows] == ["site, 2026-11-27", "default: gpt-4o-mini"]

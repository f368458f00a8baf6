"""The faults of real providers and clients, replayed from ``cases/``: one file a fault, with what is right.

A case is data:

    essence, source   what happens, for a stranger; where it was met ("-": nowhere that could be named)
    settings          of CHATNEST
    extra_settings    lines of Python, at the end of the site's settings module
    profiles          {name: {field: value}}
    base_url_suffix   after the provider's address
    uvicorn           options of the server
    upstream          a script of ``provider_script``: one list of steps for each request to the provider
    elsewhere         a script for a second server, whose address is ``{elsewhere}`` in the first one's
    taught            how many ordinary answers the model has reported before
    requests          the clients', one after the other, each {"body", "headers", "address", "path", "method",
                      "leave_after" and "patience" in seconds, "upstream" in place of the case's}
    expected          what is right of the last request; "expected_each" of each
    waits_for         why the case may fail yet

A long string is {"text": "what is repeated", "times": n}, anywhere. What is expected is one of the ``facts``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from django.apps import apps
from django.conf import settings as site_settings
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application
from django.core.management import call_command
from django.db import connections

from chatnest.asgi import for_streaming
from chatnest.ledger.batcher import batcher
from chatnest.models import Account, Profile

from . import settings as tests_settings
from .benchmarks import processes
from .conftest import Configure, EditProfile, Settled, eventually, is_at_rest, port_of, served
from .facts import compared, facts, summary
from .provider_script import ScriptedProvider
from .reader import Reader

Case = dict[str, Any]

ALIAS = "cases"
SITE = "project.asgi:application"
KEY = "sk-the-key-of-the-site"
ORDINARY = [[["head"], ["say", "Hi"], ["finish", "stop"], ["usage", 9, 1], ["done"], ["end"]]]
FIRST_ADDRESS = ip_address("198.18.0.1")  # each case's client pays for itself


def cases() -> Iterator[Any]:
    for number, file in enumerate(sorted(Path(__file__).parent.glob("cases/*.json"))):
        case = json.loads(file.read_text(), object_hook=repeated)
        assert case["name"] == file.stem
        waits = [pytest.mark.xfail(reason=case["waits_for"], strict=False)] if "waits_for" in case else []
        yield pytest.param(case, str(FIRST_ADDRESS + number), id=file.stem, marks=waits)


def repeated(value: dict[str, Any]) -> Any:
    """``{"text": "x", "times": 3}`` stands for ``"xxx"``, wherever it is."""
    return value["text"] * value["times"] if value.keys() == {"text", "times"} else value


@pytest.fixture(scope="module")
def tables(django_db_blocker: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SQLite for all cases: to flush one after each would take longer than they do."""
    file = tmp_path_factory.mktemp("cases") / "db.sqlite3"
    known = {"default": {}, ALIAS: {**connections.settings["default"], "NAME": str(file)}}
    connections.settings[ALIAS] = connections.configure_settings(known)[ALIAS]
    with django_db_blocker.unblock():
        call_command("migrate", database=ALIAS, verbosity=0)
        yield
        batcher.close()
        connections[ALIAS].close()
        del connections[ALIAS], connections.settings[ALIAS]


@pytest.fixture
def database(tables: None, configure: Configure, server: uvicorn.Server) -> Iterator[str]:
    configure(DATABASE_ALIAS=ALIAS)
    for model in set(apps.get_app_config("chatnest").get_models()) - {Account, Profile}:
        model._default_manager.using(ALIAS).all().delete()
    yield ALIAS
    eventually(lambda: is_at_rest(server))


@pytest.mark.parametrize(("case", "address"), list(cases()))
def test_case(
    case: Case,
    address: str,
    server: uvicorn.Server,
    configure: Configure,
    edit_profile: EditProfile,
    settled: Settled,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A model of its own, so that no case knows what the reports of another have taught.
    for name, changes in {"balanced": {}, **case.get("profiles", {})}.items():
        edit_profile(name, **{"model": f"model-of-{case['name']}", **changes})
    with (
        ScriptedProvider() as provider,
        ScriptedProvider() as elsewhere,
        site(case, server, settings, monkeypatch) as port,
    ):
        elsewhere.follow(case.get("elsewhere", [[]]))
        configure(
            OPENAI_API_KEY=KEY,
            OPENAI_BASE_URL=provider.url + case.get("base_url_suffix", ""),
            TRUSTED_PROXIES=1,
            SITE_DAILY_TOKEN_LIMIT=100_000_000,
            MAX_STREAM_SECONDS=9,  # what should have ended fails soon
        )
        configure(**case.get("settings", {}))
        report: list[str] = []
        for request, expected in requests(case):
            before = {row.pk for row in settled()}
            caplog.clear()
            script = json.dumps(request.get("upstream", case.get("upstream", ORDINARY)))
            provider.follow(json.loads(script.replace("{elsewhere}", elsewhere.url)))
            reader = Reader(port, request, {"X-Forwarded-For": request.get("address", address)})
            provider.leave = reader.leave
            reader.read()
            rows = [row for row in settled() if row.pk not in before]
            known = facts(reader, rows, provider, elsewhere, caplog.records)
            report += [*compared(expected, known), f"      saw  {summary(known)}"]
        if any(line.startswith("WRONG") for line in report):
            pytest.fail("\n".join([case["essence"], *report]), pytrace=False)


def requests(case: Case) -> list[tuple[Case, Case]]:
    """Each request, with what is right of it."""
    asked = case.get("requests", [{}])
    taught = [{"upstream": ORDINARY}] * case.get("taught", 0)
    each = case.get("expected_each") or [{}] * (len(asked) - 1) + [case["expected"]]
    return list(zip([*taught, *asked], [{}] * len(taught) + each, strict=True))


@contextmanager
def site(case: Case, server: uvicorn.Server, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of the site as the case wants it: the one that all tests share, where that will do."""
    if not ({"extra_settings", "uvicorn"} & case.keys()):
        yield port_of(server)
        return
    module = ModuleType("case_settings")
    given = {name: getattr(site_settings, name) for name in dir(tests_settings) if name.isupper()}
    vars(module).update(given)
    exec("\n".join(case.get("extra_settings", [])), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, value in vars(module).items():
        if name.isupper() and value is not given.get(name):
            setattr(settings, name, value)
    application = for_streaming(ASGIStaticFilesHandler(get_asgi_application()))
    with served(application, **case.get("uvicorn", {})) as own:
        yield port_of(own)


def test_the_operator_is_told_of_each_fault_once_a_minute(tables: None) -> None:
    """In a process of its own, for others here make the same faults. No word of the provider's leaves it."""
    faults = {
        "a-wrong-key": (401, "invalid_api_key"),
        "an-unknown-model": (404, "model_not_found"),
        "an-unknown-parameter": (400, "unsupported_parameter"),
        "no-credit": (429, "insufficient_quota"),
    }
    address = processes.url_of(connections.settings[ALIAS])
    with ScriptedProvider() as provider, processes.chatnest(address, provider.url, application=SITE) as serving:
        for words, (status, code) in [*faults.items(), *faults.items()]:
            provider.follow([[["respond", status, {"error": {"message": words, "type": code, "code": code}}]]])
            reader = Reader(serving.port, {}, {"X-Forwarded-For": "203.0.113.7"})
            reader.read()
            assert (reader.error["code"], reader.error["retryable"]) == ("upstream_misconfigured", False)
            assert words not in reader.text
        told = [line for line in serving.log.read_text().splitlines() if " ERROR chatnest" in line]
    assert [[words for words in faults if words in line] for line in told] == [[words] for words in faults]

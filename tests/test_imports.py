"""The rooms of the package: imports go downward only, and every room is on the map."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import chatnest

PACKAGE = Path(chatnest.__file__).parent
ROOT = PACKAGE.parent

# From the ground up. Rooms of one floor may import each other, in no circle.
FLOORS = [
    {"conf", "errors"},
    {"hooks", "logs", "metrics"},
    {"limits", "tokens", "accounts", "provider", "wires", "slots", "frames", "deadlines", "conversation"},
    {"models"},
    {"prices"},
    {"policy", "signals", "changes", "reports"},
    {"ledger"},
    {"alerts", "refusals", "attempts", "stream", "proofs"},
    {"holds"},
    {"asgi"},
    {"views", "urls"},
    {"operators"},
]
# Beside the path: nobody imports them, but for what stands here.
BESIDE = {
    "admin": set(),
    "apps": set(),
    "checks": {"apps"},
    "management": set(),
    "routers": set(),
    "migrations": set(),
    "receivers": {"apps"},
    "templatetags": set(),
    "testing": set(),
}
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = {*FLOOR_OF, *BESIDE}


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """The full names of what a file imports, wherever in it; ``from a import b`` gives ``a.b``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]  # an __init__'s own name is the package's, so it needs no other treatment
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else ()
            names = [*origin, *(node.module.split(".") if node.module else ())]
            yield from (".".join([*names, alias.name]) for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(path)]
    found = {name[1] for name in names if name[0] == "chatnest" and len(name) > 1} - {room_of(path)}
    assert found <= ROOMS, f"{path.name} imports {found - ROOMS}, which are on no floor"
    return found


def test_every_room_has_a_floor_or_stands_beside() -> None:
    assert {room_of(path) for path in files()} == ROOMS


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    room = room_of(path)
    for other in rooms_imported(path):
        if other in BESIDE:
            assert room in BESIDE[other], f"{room} imports {other}"
        elif room in FLOOR_OF:
            assert FLOOR_OF[other] <= FLOOR_OF[room], f"{room} imports {other}, which is above it"


def test_no_room_imports_itself_round_a_circle() -> None:
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in files():
        graph[room_of(path)] |= rooms_imported(path)
    assert len(list(TopologicalSorter(graph).static_order())) == len(ROOMS)


def test_the_event_stream_knows_of_nothing_else() -> None:
    assert {name.partition(".")[0] for name in imported(PACKAGE / "provider" / "events.py")} <= {
        "__future__",
        "re",
        "typing",
    }


def test_the_app_imports_only_what_it_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {line.split(">")[0] for line in declared} == {
        "django",
        "asgiref",
        "openai",
        "httpx2",
        "aiohttp",
        "msgspec",
        "toktok-rs",
    }
    roots = {name.partition(".")[0] for path in files() for name in imported(path)} - set(sys.stdlib_module_names)
    # asgiref is Django's own; pytest is the site's, whose tests ask for the fixtures; the others are extras.
    assert roots - {"pytest", "opentelemetry", "genai_prices"} == {
        "chatnest",
        "django",
        "asgiref",
        "openai",
        "httpx2",
        "aiohttp",
        "msgspec",
        "toktok",
    }


def test_the_map_in_the_packages_docstring_names_every_room() -> None:
    words = (chatnest.__doc__ or "").replace(",", " ").replace("/", " ").replace(".", " ").split()
    assert ROOMS - {"apps", "urls", "migrations"} <= set(words)

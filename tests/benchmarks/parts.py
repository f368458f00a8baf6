"""What each part of ``chatnest.asgi`` spares a request: all of them, beside all but one.

    python -m tests.benchmarks.parts [--rounds 5]

One server process on PostgreSQL, 32 requests at a time, an answer of one token each, as in ``tests.benchmarks.relay``.
A part that is left out is Django's or asgiref's own. CPU is user and system time of the server's process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from . import processes
from .ledger import postgres
from .machine import described, end_tidily
from .processes import Serving
from .relay import CORES, OTHER_CORE, SERVER_CORE, Start, measured

THREADS, FREEZE = "share_threads", "gc.freeze"
MIDDLEWARE = (
    "SecurityMiddleware",
    "SessionMiddleware",
    "LocaleMiddleware",
    "CommonMiddleware",
    "CsrfViewMiddleware",
    "AuthenticationMiddleware",
    "MessageMiddleware",
    "XFrameOptionsMiddleware",
)
WITHOUT = {"nothing": (), **{name: (name,) for name in (*MIDDLEWARE, THREADS, FREEZE)}}
WITHOUT |= {"all middleware": MIDDLEWARE, "everything": (*MIDDLEWARE, THREADS, FREEZE)}


def __getattr__(name: str) -> Any:
    """``application``, made where a server asks for it."""
    if name != "application":
        raise AttributeError(name)
    import gc

    import django
    from django.conf import settings

    django.setup()

    import chatnest.asgi.application as parts
    from chatnest.asgi import middleware

    without = os.environ["WITHOUT"].split(",")
    if THREADS in without:
        parts.share_threads = lambda application: application
    if FREEZE in without:
        gc.freeze = lambda: None
    owns = {
        f"{middleware.__name__}.{name}": getattr(middleware, name).__bases__[-1]
        for name in without
        if name in MIDDLEWARE
    }
    settings.MIDDLEWARE = [
        f"{owns[path].__module__}.{owns[path].__name__}" if path in owns else path for path in settings.MIDDLEWARE
    ]
    from project.asgi import application

    return application


@contextmanager
def serving(database_url: str, without: tuple[str, ...], upstream: str) -> Iterator[Serving]:
    os.environ["WITHOUT"] = ",".join(without)
    application = "tests.benchmarks.parts:application"
    with processes.chatnest(database_url, upstream, application=application, cpu=SERVER_CORE) as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    end_tidily()
    if OTHER_CORE is not None:
        os.sched_setaffinity(0, set(CORES[1:]))
    with postgres() as database_url:
        servers: dict[str, Start] = {name: partial(serving, database_url, parts) for name, parts in WITHOUT.items()}
        medians = measured(servers, ["request"], args.rounds)["request"]
    print(f"{described()}.\n\n| without | ms of CPU a request | to all |\n|---|---|---|")
    for name, figures in medians.items():
        print(f"| {name} | {figures['request']:.3f} | {figures['request'] / medians['nothing']['request']:.2f} |")


if __name__ == "__main__":
    main()

"""How long the operators' pages take on a site of some size, and how many queries. Prints a Markdown table.

    python -m tests.benchmarks.operators [PostgreSQL] [SQLite] [--rows 1000000] [--rounds 11]

A year of reservations of 5,000 accounts, 20,000 of them today's; the sums are proven before and after.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from statistics import median
from typing import Any, Final

from .ledger import SETTINGS, migrate, postgres
from .machine import ROOT, described

ACCOUNTS: Final = 5000
DAYS: Final = 365
TODAYS: Final = 20_000  # within two hours: three a second
CHUNK: Final = 2000
CHARGE: Final = {"prompt_tokens": 300, "completion_tokens": 100}
COST: Final = 105
MODELS: Final = ("gpt-4o-mini", "gpt-4o", "local")
PAGES: Final = {
    "Usage": "",
    "who is shut out": "?who=shut",
    "an account": "account/?name=user:5",
    "costs of this month": "costs/?period=month",
    "costs of a year": "costs/?from={year_ago}",
}


@contextmanager
def sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="chatnest-benchmark-") as folder:
        url = f"sqlite:///{folder}/db.sqlite3"
        migrate(url)
        yield url


DATABASES: Final = {"PostgreSQL": postgres, "SQLite": sqlite}


# In a process of its own, on a database of its own.


def seed(rows: int) -> None:
    from django.contrib.auth.models import User

    from chatnest.conf import now, today
    from chatnest.models import Account, DailyUsage, Refusal, Reservation, UsageLine

    names = (User(pk=n, username=f"user{n}", email=f"user{n}@example.org") for n in range(1, ACCOUNTS + 1))
    save(User, names)
    save(Account, (Account(name=f"user:{n}", paused=n % 50 == 0, daily_token_limit=1000) for n in range(1, 500)))
    day, at = today(), now()
    lines: Counter[tuple[Any, str, str]] = Counter()

    def reservations() -> Iterator[Reservation]:
        for number in range(rows):
            ago = 0 if number < TODAYS else number % DAYS
            payer, model = f"user:{number % ACCOUNTS + 1}", MODELS[number % 3]
            of, began = day - timedelta(days=ago), at - timedelta(days=ago, seconds=number % 7200)
            for account in (payer, "site"):
                lines[of, account, model] += 1
            yield Reservation(
                day=of, payer=payer, accounts=[payer, "site"], profile="balanced", model=model, tokens=900,
                state="settled", outcome="upstream_error" if number % 50 == 0 else "completed", usage_source="reported",
                tokens_charged=400, cost=COST, first_token_ms=number % 3000, created_at=began,
                expires_at=began + timedelta(seconds=30), settled_at=began, **CHARGE,
            )  # fmt: skip

    save(Reservation, reservations())
    save(
        UsageLine,
        (
            UsageLine(
                day=of, account=account, profile="balanced", model=model, requests=n, tokens_reported=400 * n,
                cost=COST * n, **{name: n * tokens for name, tokens in CHARGE.items()},
            )
            for (of, account, model), n in lines.items()
        ),
    )  # fmt: skip
    days: Counter[tuple[Any, str]] = Counter()
    for (of, account, _), n in lines.items():
        days[of, account] += n
    save(
        DailyUsage,
        (
            DailyUsage(
                day=of, account=account, requests=n, tokens_used=400 * n, cost_used=COST * n,
                **{name: n * tokens for name, tokens in CHARGE.items()},
            )
            for (of, account), n in days.items()
        ),
    )  # fmt: skip
    hour = at.replace(minute=0, second=0, microsecond=0)
    save(
        Refusal,
        (
            Refusal(day=day, hour=hour - timedelta(hours=n % 24), account=f"user:{n % 400}", code=code, count=n,
                    last_at=at - timedelta(minutes=n))
            for code in ("rate_limited", "daily_budget_exceeded")
            for n in range(1, 2000)
        ),
    )  # fmt: skip


def save(model: Any, rows: Iterable[Any]) -> None:
    rows = iter(rows)
    while some := list(islice(rows, CHUNK)):
        model.objects.bulk_create(some, ignore_conflicts=True)


def measure(database: str, rows: int, rounds: int) -> None:
    import django

    django.setup()
    from django.contrib.auth.models import User
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    from chatnest.conf import today
    from chatnest.ledger import audit

    seed(rows)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    prove(audit)
    browser = Client()
    browser.force_login(User.objects.create_superuser("operator", pk=ACCOUNTS + 1))
    for name, page in PAGES.items():
        path = f"/admin/chatnest/usage/{page.format(year_ago=today() - timedelta(days=364))}"
        times = []
        for _ in range(rounds + 1):
            with CaptureQueriesContext(connection) as queries:
                began = time.perf_counter()
                response = browser.get(path)
                times.append(time.perf_counter() - began)
            assert response.status_code == 200, path
        print(f"| {database} | {rows:,} | {name} | {1000 * median(times[1:]):.0f} | {len(queries)} |", flush=True)
    prove(audit)


def prove(audit: Any) -> None:
    began = time.perf_counter()
    assert audit.verify() == []
    print(f"proven in {time.perf_counter() - began:.1f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("databases", nargs="*", default=list(DATABASES))
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.measure, asked.rows[0], asked.rounds)
        return
    print(f"{described()}\n\n| | reservations | page | ms | queries |\n|---|---|---|---|---|", flush=True)
    for database in asked.databases:
        for rows in asked.rows:
            with DATABASES[database]() as url:
                words = ["--measure", database, "--rows", str(rows), "--rounds", str(asked.rounds)]
                env = {**os.environ, **SETTINGS, "DATABASE_URL": url}
                subprocess.run(
                    [sys.executable, "-m", "tests.benchmarks.operators", *words], cwd=ROOT, env=env, check=True
                )


if __name__ == "__main__":
    main()

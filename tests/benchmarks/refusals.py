"""What a refused request costs beside an admitted one, and what a hundred thousand accounts cost either.

    python -m tests.benchmarks.refusals [--rounds 3] [--accounts 100000]

One server process on PostgreSQL, as in ``tests.benchmarks.relay``. CPU is user and system time of its process.

    admitted  an answer of one token, of a payer each
    rate      429 rate_limited, of one payer who goes on asking
    budget    429 daily_budget_exceeded, of one payer whose day is used up
    size      429 request_too_large, a message of 1 MiB of one letter
    body      413 body_too_large, a body of 1 MiB that says so
    json      400 invalid_request, 1 MiB that is no JSON
    nothing   404, what Django itself takes to refuse: a path that no view has
    crowded   admitted, with ``--accounts`` rows that operators made
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from statistics import median
from typing import Final

from . import processes
from .ledger import postgres
from .machine import described, end_tidily
from .processes import Serving
from .relay import OTHER_CORE, SERVER_CORE

AT_ONCE: Final = 16
REQUESTS: Final = 800
LARGE_REQUESTS: Final = 160
MIB: Final = 1024 * 1024
# Of the demo's profiles: room for every payer but the two who have used theirs up.
OPEN_UP: Final = """
import django; django.setup()
from chatnest.models import Account, Profile
Profile.objects.filter(name="balanced").update(rate_max_requests=60, max_concurrent_streams=16)
Account.objects.create(name="ip:10.255.0.2", daily_token_limit=1)
"""
FILL: Final = """
import sys, django; django.setup()
from chatnest.models import Account
rows = (Account(name=f"user:{number}", daily_token_limit=50_000) for number in range(int(sys.argv[1])))
Account.objects.bulk_create(rows, batch_size=5000)
"""


def message(content: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


NOTHING: Final = "nothing"
KINDS: Final[dict[str, tuple[bytes, str | None, int, int]]] = {
    # the body, the payer's address (None: another each time), the status, how many
    NOTHING: (message("Tell me about streaming."), None, 404, REQUESTS),
    "admitted": (message("Tell me about streaming."), None, 200, REQUESTS),
    "rate": (message("Tell me about streaming."), "10.255.0.1", 429, REQUESTS),
    "budget": (message("Tell me about streaming."), "10.255.0.2", 429, REQUESTS),
    "size": (message("x" * (MIB - 100)), None, 429, LARGE_REQUESTS),
    "body": (message("x" * MIB), None, 413, LARGE_REQUESTS),
    "json": (b"[" * (MIB - 1), None, 400, LARGE_REQUESTS),
}


class Visitors:
    """Each asks, reads what comes to its end, and is another address next time, unless told whose to be."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.path = "/api/chat"
        self._next = 0

    def ask(self, body: bytes, address: str | None, requests: int) -> Counter[int]:
        async def everybody() -> Counter[int]:
            doors = asyncio.Semaphore(AT_ONCE)

            async def one() -> int:
                async with doors:
                    return await self._ask(body, address or self._address())

            return Counter(await asyncio.gather(*(one() for _ in range(requests))))

        return asyncio.run(everybody())

    def _address(self) -> str:
        self._next += 1
        return "10." + ".".join(str(self._next >> shift & 255) for shift in (16, 8, 0))

    async def _ask(self, body: bytes, address: str) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"POST {self.path} HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"X-Forwarded-For: {address}",
            "Connection: close",
        )
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        try:
            return int((await reader.read())[9:12])
        finally:
            writer.close()


def cost(server: Serving, visitors: Visitors, kind: str) -> float:
    """Milliseconds of the server's CPU for one request of this kind."""
    body, address, status, requests = KINDS[kind]
    visitors.path = "/nothing" if kind == NOTHING else "/api/chat"
    visitors.ask(body, address, 100 if status == 429 else 20)  # until it is refused
    before = server.cpu
    statuses = visitors.ask(body, address, requests)
    spent = server.cpu - before
    if statuses[status] < 0.95 * requests:  # who waits for a minute is let in now and then
        sys.exit(f"{kind}: {dict(statuses)}")
    return spent * 1e3 / requests


def run(database_url: str, script: str, *arguments: str) -> None:
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings", "DATABASE_URL": database_url}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env={**env, "SECRET_KEY": "benchmarks"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accounts", type=int, default=100_000)
    asked = parser.parse_args()
    end_tidily()
    print(described())
    with postgres() as url:
        run(url, OPEN_UP)
        figures: dict[str, list[float]] = {}

        def measure(kinds: list[str], name: str | None = None) -> None:
            with (
                processes.upstream(1, 0, OTHER_CORE) as upstream,
                processes.chatnest(url, upstream, application="project.asgi:application", cpu=SERVER_CORE) as server,
            ):
                visitors = Visitors(server.port)
                for _ in range(asked.rounds):
                    for kind in kinds:
                        figures.setdefault(name or kind, []).append(cost(server, visitors, kind))

        measure(list(KINDS))
        run(url, FILL, str(asked.accounts))
        measure(["admitted"], "crowded")
    admitted = median(figures["admitted"])
    for kind, costs in figures.items():
        print(f"{kind:10} {median(costs):6.2f} ms   {median(costs) / admitted:5.2f} x admitted")


if __name__ == "__main__":
    main()

"""What a streamed token costs: chatnest, accounting on PostgreSQL, beside relays that account for nothing.

    python -m tests.benchmarks.relay [SERVER ...] [--scenario NAME ...] [--rounds 3]

The servers: ``chatnest``; ``express`` (needs node and npm, which installs two packages into a temporary folder);
``fastapi`` (needs fastapi, sse-starlette and openai); ``floor``, ASGI and aiohttp and nothing else. One process
each, on a core of its own where there are two; upstream and clients have another. Servers take turns; figures are
medians. CPU is user and system time of the server's process: a busy machine moves it less than it moves a clock.

    paced     200 streams of 300 tokens, one each 20 ms       CPU a token, a token's added latency
    burst     32 streams at a time, 300 tokens each at once   CPU a token
    request   32 requests at a time, of 1 token               CPU a request
    idle      1,000 streams, a token a second                 memory and threads a stream
    few, many 100 and 1,000 streams, 2,000 tokens a second    CPU a token: does it grow with the streams?
    first     1, 10, 50, 200 streams, 20 tokens a second      how long the first token of one more takes
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles

from . import processes
from .crowd import Crowd
from .ledger import postgres
from .machine import described, end_tidily
from .processes import Serving, free_port, serving

PEERS = Path(__file__).parent / "peers"
CROWDS = (1, 10, 50, 200)
STEADY_SECONDS = 6
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
SERVER_CORE = CORES[0] if len(CORES) > 1 else None
OTHER_CORE = CORES[1] if len(CORES) > 1 else None

Figures = dict[str, float]
Start = Callable[[str], AbstractContextManager[Serving]]  # with the upstream's URL


# The servers.


def chatnest(database_url: str, upstream: str) -> AbstractContextManager[Serving]:
    return processes.chatnest(database_url, upstream, application="project.asgi:application", cpu=SERVER_CORE)


def asgi(application: str, upstream: str) -> AbstractContextManager[Serving]:
    port = free_port()
    command = f"{sys.executable} -m uvicorn {application} --port {port} --log-level warning --lifespan off"
    return serving(*command.split(), port=port, env=environment(upstream, port), cwd=PEERS, cpu=SERVER_CORE)


def express(upstream: str) -> AbstractContextManager[Serving]:
    port = free_port()
    folder = Path(tempfile.gettempdir()) / "chatnest-benchmarks-express"
    folder.mkdir(exist_ok=True)
    for name in ("express.mjs", "package.json"):
        shutil.copy(PEERS / name, folder)
    if not (folder / "node_modules").exists():
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)
    return serving("node", "express.mjs", port=port, env=environment(upstream, port), cwd=folder, cpu=SERVER_CORE)


def environment(upstream: str, port: int) -> dict[str, str]:
    return {"OPENAI_BASE_URL": upstream, "PORT": str(port), "NODE_ENV": "production"}


def available(database_url: str) -> dict[str, Start]:
    servers: dict[str, Start] = {"chatnest": partial(chatnest, database_url)}
    if shutil.which("node") and shutil.which("npm"):
        servers["express"] = express
    if all(map(find_spec, ("fastapi", "sse_starlette", "openai"))):
        servers["fastapi"] = partial(asgi, "fastapi_relay:app")
    servers["floor"] = partial(asgi, "floor:app")
    return servers


# The scenarios: each starts an upstream and a server, warms both up, and measures once.


def streams(start: Start, tokens: int, interval: float, streams: int, rounds: int = 1, warm_up: int = 1) -> Figures:
    with (
        processes.upstream(tokens, interval, OTHER_CORE) as upstream,
        start(upstream) as server,
        Crowd(server.port) as crowd,
    ):
        ramp = interval / streams
        crowd.run(min(streams, 50), warm_up)
        cpu = server.cpu
        chats = crowd.run(streams, rounds, ramp)
        spent = server.cpu - cpu
        if short := [chat for chat in chats if not chat.done or len(chat.lateness) != tokens]:
            print(f"# {len(short)} of {len(chats)} answers are not whole", file=sys.stderr)
        late = [lateness for chat in chats for lateness in chat.lateness]
        return {
            "token": spent * 1e6 / len(late),
            "request": spent * 1e3 / len(chats),
            "p50": median(late),
            "p99": quantiles(late, n=100)[98],
        }


def idle(start: Start) -> Figures:
    count = 1000
    with (
        processes.upstream(10**6, 1, OTHER_CORE) as upstream,
        start(upstream) as server,
        Crowd(server.port) as crowd,
    ):
        crowd.open(50)
        crowd.leave()  # the openai package's pool has room for a thousand; one more would wait for ever
        memory, threads = server.memory, server.threads
        crowd.open(count)
        return {"memory": (server.memory - memory) / count, "threads": (server.threads - threads) / count}


def steady(start: Start, streams: int, interval: float) -> Figures:
    """What tokens cost once all streams are open."""
    with (
        processes.upstream(10**6, interval, OTHER_CORE) as upstream,
        start(upstream) as server,
        Crowd(server.port) as crowd,
    ):
        crowd.open(streams)
        tokens, cpu = crowd.tokens, server.cpu
        time.sleep(STEADY_SECONDS)
        return {"token": (server.cpu - cpu) * 1e6 / (crowd.tokens - tokens)}


def first(start: Start) -> Figures:
    """Medians of the visits of 30 more, one after another."""
    figures: Figures = {}
    with (
        processes.upstream(10**6, 0.05, OTHER_CORE) as upstream,
        start(upstream) as server,
        Crowd(server.port) as crowd,
    ):
        for _ in range(50):
            crowd.visit()
        for count in CROWDS:
            crowd.open(count - 1 - sum(not chat.ended.done() for chat in crowd.chats))
            figures[str(count)] = median(one_more(crowd) for _ in range(30))
    return figures


def one_more(crowd: Crowd) -> float:
    time.sleep(0.05)  # the one before has left, and is settled
    return crowd.visit().first_token or 0


SCENARIOS: dict[str, Callable[[Start], Figures]] = {
    "paced": partial(streams, tokens=300, interval=0.02, streams=200),
    "burst": partial(streams, tokens=300, interval=0, streams=32, rounds=20, warm_up=10),
    "request": partial(streams, tokens=1, interval=0, streams=32, rounds=60, warm_up=20),
    "idle": idle,
    "few": partial(steady, streams=100, interval=0.05),
    "many": partial(steady, streams=1000, interval=0.5),
    "first": first,
}

ROWS = (
    ("CPU a token, 200 streams of 50 tokens a second", "paced", "token", "{:.0f} µs"),
    ("CPU a token, bursts", "burst", "token", "{:.1f} µs"),
    ("CPU a request (of 1 token)", "request", "request", "{:.2f} ms"),
    ("a token's added latency at 200 streams, p50", "paced", "p50", "{:.1f} ms"),
    ("… p99", "paced", "p99", "{:.1f} ms"),
    ("memory a stream, of 1,000", "idle", "memory", "{:.0f} KiB"),
    ("threads a stream, of 1,000", "idle", "threads", "{:.2f}"),
    ("CPU a token at 100 streams", "few", "token", "{:.0f} µs"),
    ("CPU a token at 1,000 streams", "many", "token", "{:.0f} µs"),
    *((f"first token beside {count - 1} streams", "first", str(count), "{:.1f} ms") for count in CROWDS),
)


def measured(servers: dict[str, Start], scenarios: list[str], rounds: int) -> dict[str, dict[str, Figures]]:
    """Each scenario's medians for each server."""
    medians: dict[str, dict[str, Figures]] = {}
    for scenario in scenarios:
        reports: dict[str, list[Figures]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, start in servers.items():
                reports[name].append(SCENARIOS[scenario](start))
                print(f"# {scenario} {name}: {reports[name][-1]}", file=sys.stderr)
        medians[scenario] = {
            name: {figure: median(report[figure] for report in of_server) for figure in of_server[0]}
            for name, of_server in reports.items()
        }
    return medians


def table(medians: dict[str, dict[str, Figures]], names: list[str]) -> None:
    compared = "express" in names and "chatnest" in names
    print(f"| | {' | '.join(names)} |{' chatnest / express |' if compared else ''}")
    print("|---" * (1 + len(names) + compared) + "|")
    for words, scenario, figure, form in ROWS:
        if scenario in medians:
            values = {name: medians[scenario][name][figure] for name in names}
            cells = [words, *(form.format(values[name]) for name in names)]
            if compared:
                base = values["express"]
                cells.append(f"{values['chatnest'] / base:.2f}" if base > 0.01 else "")
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    end_tidily()
    if OTHER_CORE is not None:
        os.sched_setaffinity(0, set(CORES[1:]))
    with postgres() as database_url:
        servers = available(database_url)
        if missing := set(args.servers) - servers.keys():
            parser.error(f"not here: {', '.join(sorted(missing))}")
        servers = {name: servers[name] for name in args.servers or servers}
        medians = measured(servers, args.scenario, args.rounds)
    print(f"{described()}.\n")
    table(medians, list(servers))


if __name__ == "__main__":
    main()

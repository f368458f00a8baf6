"""What telling OpenTelemetry costs a request: without its package, with its API alone, and with an SDK.

    python -m tests.benchmarks.telemetry [--rounds 5]

One server process on PostgreSQL, 32 requests at a time, an answer of one token each, as in ``tests.benchmarks.relay``.
The SDK batches spans for an exporter that drops them, and is asked for its metrics every second. CPU is user and
system time of the server's process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from . import processes
from .ledger import postgres
from .machine import described, end_tidily
from .processes import Serving
from .relay import CORES, OTHER_CORE, SERVER_CORE, Start, measured

MODES = ("no package", "API", "SDK")


def __getattr__(name: str) -> Any:
    """``application``, made where a server asks for it."""
    if name != "application":
        raise AttributeError(name)
    mode = os.environ["TELEMETRY"]
    if mode == "no package":
        sys.modules["opentelemetry"] = None  # type: ignore[assignment]
    elif mode == "SDK":
        _set_up()
    from project.asgi import application

    return application


def _set_up() -> None:
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Spans(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    class Metrics(MetricExporter):
        def export(self, *args: Any, **options: Any) -> MetricExportResult:
            return MetricExportResult.SUCCESS

        def force_flush(self, timeout_millis: float = 0) -> bool:
            return True

        def shutdown(self, *args: Any, **options: Any) -> None:
            pass

    tracing = TracerProvider()
    tracing.add_span_processor(BatchSpanProcessor(Spans()))
    trace.set_tracer_provider(tracing)
    metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(Metrics(), 1000)]))


@contextmanager
def serving(database_url: str, mode: str, upstream: str) -> Iterator[Serving]:
    os.environ["TELEMETRY"] = mode
    application = "tests.benchmarks.telemetry:application"
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
        servers: dict[str, Start] = {mode: partial(serving, database_url, mode) for mode in MODES}
        medians = measured(servers, ["request"], args.rounds)["request"]
    print(f"{described()}.\n\n| | ms of CPU a request | to none |\n|---|---|---|")
    for name, figures in medians.items():
        print(f"| {name} | {figures['request']:.3f} | {figures['request'] / medians['no package']['request']:.2f} |")


if __name__ == "__main__":
    main()

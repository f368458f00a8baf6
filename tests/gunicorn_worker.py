"""gunicorn's own graceful timeout kills a worker: uvicorn's, within it, ends streams politely. README has it."""

from __future__ import annotations

from uvicorn_worker import UvicornWorker


class Worker(UvicornWorker):
    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, "timeout_graceful_shutdown": 1}

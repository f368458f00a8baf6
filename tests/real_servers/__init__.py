"""OpenAI-compatible servers that nobody here wrote, each installed from PyPI into an environment of its own.

A server is a script that names its packages itself (https://packaging.python.org/en/latest/specifications/inline-script-metadata/):
uv makes the environment in its cache at first use, in seconds, and takes no release younger than the script says.
``tests/test_real_servers.py`` tells the stories; ``python -m tests.real_servers`` tells them to transformers too, whose
packages are 5 GB, and prints a table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..benchmarks.processes import Serving, serving

INSTALL_SECONDS = 600
START_SECONDS = 300  # LiteLLM reads 17 seconds of Python, where it has a core to itself
PATIENCE = 60  # seconds, for what a busy machine may take its time for
KEY = "sk-real"
FOLDER = Path(__file__).parent


def installed(script: str) -> str:
    """The path of the Python that has what ``script`` needs. Raises CalledProcessError and TimeoutExpired."""
    _uv("sync", "--quiet", "--python", sys.executable, "--script", str(FOLDER / script))
    return _uv("python", "find", "--script", str(FOLDER / script)).strip()


def running(python: str, script: str, port: int, *arguments: str) -> AbstractContextManager[Serving]:
    """Run ``script``, which serves ``port``, with the Python of its own environment."""
    return serving(python, str(FOLDER / script), str(port), *arguments, port=port, patience=START_SECONDS)


def _uv(*arguments: str) -> str:
    command = [sys.executable, "-m", "uv", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS).stdout


@dataclass(frozen=True)
class Real:
    """A server at ``url``, and how to ask it for ``model`` with nothing of ours between."""

    url: str
    model: str

    def ask(self, method: str, path: str, body: object = None, seconds: float = PATIENCE) -> str:
        parts = urlsplit(self.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)
        try:
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def reports(self, body: dict[str, Any], tokens: int, seconds: float = PATIENCE) -> dict[str, Any]:
        """The usage that it reports for an answer of at most so many tokens."""
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": tokens}
        stream = self.ask("POST", "/v1/chat/completions", {"model": self.model, **options, **body}, seconds)
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        return events[-1]["usage"]


@dataclass(frozen=True)
class Meter:
    """What llama.cpp itself counts: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"""

    llama: Real

    def __getitem__(self, name: str) -> int:
        lines = dict(line.rsplit(" ", 1) for line in self.llama.ask("GET", "/metrics").splitlines() if line[:1] != "#")
        return int(float(lines[f"llamacpp:{name}"]))

    def tokens(self) -> int:
        """All that it has read and written since it started."""
        return sum(self[f"{name}_total"] for name in ("prompt_tokens", "prompt_tokens_cached", "tokens_predicted"))

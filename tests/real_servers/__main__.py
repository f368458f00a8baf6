"""Tell the stories of ``tests/test_real_servers.py`` to every server and print a table; arguments are pytest's.

``python -m tests.real_servers -k transformers``
"""

from __future__ import annotations

import os
import sys
import time

import pytest

from . import FOLDER, installed

os.environ["ALL_REAL_SERVERS"] = "yes"


class Table:
    """A pytest plugin: what became of each story, in the order in which they were told."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            story, server = report.nodeid.split("::test_")[1].removesuffix("-sqlite]").split("[")
            why = next((line[1:].strip() for line in report.longreprtext.splitlines() if line[:2] == "E "), "")
            self.rows.append((server, report.outcome, f"{report.duration:.1f} s", story.replace("_", " "), why))

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in list(zip(*self.rows, strict=True))[:-1]]
        return "\n".join("  ".join(map(str.ljust, row, [*widths, 0])).rstrip() for row in self.rows)


for script in ("llama_cpp.py", "litellm_proxy.py", "transformers_serve.py"):
    started = time.monotonic()
    installed(script)
    print(f"{script} installed in {time.monotonic() - started:.0f} s")
table = Table()
code = pytest.main([str(FOLDER.parent / "test_real_servers.py"), "-q", "--no-summary", *sys.argv[1:]], plugins=[table])
print(table)
sys.exit(code)

"""Where a benchmark runs, and that it leaves nothing behind there."""

from __future__ import annotations

import os
import platform
import signal
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def described() -> str:
    """For the table's caption: the processor, its cores, the Python, the day."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today():%B %Y} ({load})"


def end_tidily() -> None:
    """If this process is terminated, end those it has started too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))

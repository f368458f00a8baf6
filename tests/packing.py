"""The wheel, and environments to install it into."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .benchmarks.machine import ROOT


def run(*command: str, **options: Any) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


def uv(*arguments: str) -> str:
    return run(sys.executable, "-m", "uv", *arguments)


def wheel(folder: Path) -> Path:
    """Of a copy: what an older build left beside the sources would be packed too."""
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "chatnest", source / "chatnest", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    uv("build", "--quiet", "--wheel", "--python", sys.executable, "--out-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))

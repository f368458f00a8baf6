"""A site that types strictly: what it writes with chatnest, and what mypy says of it, before the installed wheel."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from .packing import run, uv, wheel

TYPING = Path(__file__).parent / "typing"


def test_what_a_site_writes_is_typed(tmp_path: Path) -> None:
    python = str(tmp_path / "environment" / "bin" / "python")
    checkers = [f"{name}=={version(name)}" for name in ("mypy", "django-stubs")]
    uv("venv", "--quiet", "--python", sys.executable, str(tmp_path / "environment"))
    uv("pip", "install", "--quiet", "--python", python, str(wheel(tmp_path)), *checkers)
    site = shutil.copytree(TYPING, tmp_path / "site")
    said = run(python, "-m", "mypy", "site_settings.py", "site_chat.py", cwd=site)
    assert "no issues found in 2 source files" in said

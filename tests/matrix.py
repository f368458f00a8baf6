"""The suite on every Python and Django that chatnest supports, with the oldest and the newest packages it allows.

``python -m tests.matrix`` runs all of it, ``python -m tests.matrix corners`` the oldest of all and the newest, and
``python -m tests.matrix 3.12-6.0-newest`` one; what follows ``--`` is pytest's. Each runs in an environment of its own.
A Python that is not on this machine is left out, and said; a corner is then the next one that can be.

uv alone, since neither tox nor nox finds pyenv's Pythons unless they are switched on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What Django supports: https://docs.djangoproject.com/en/6.1/faq/install/#what-python-version-can-i-use-with-django
DJANGO = {"3.11": ["5.2"], "3.12": ["5.2", "6.0", "6.1"], "3.13": ["5.2", "6.0", "6.1"]}
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
# Minutes, and about the machine, or about servers and a site that have environments of their own.
LEFT_OUT = ("test_scale.py", "test_real_servers.py", "test_cookiecutter.py")
AT_ONCE = ("-n", "3", "--dist", "loadfile")
PATIENCE_SECONDS = 30 * 60


@dataclass(frozen=True)
class Cell:
    python: str
    django: str
    packages: str

    def __str__(self) -> str:
        return f"{self.python}-{self.django}-{self.packages}"

    def run(self, pytest_arguments: list[str]) -> str:
        """What became of it."""
        interpreter = find(self.python)
        if interpreter is None:
            return f"no Python {self.python} on this machine"
        with tempfile.TemporaryDirectory(prefix="chatnest-matrix-") as folder:
            python = str(Path(folder) / "bin/python")
            uv("venv", "--quiet", "--python", interpreter, folder)
            chosen = ["--resolution", RESOLUTION[self.packages], "--editable", ".[test]", f"django=={self.django}.*"]
            uv("pip", "install", "--quiet", "--python", python, *chosen)
            left_out = [f"--ignore=tests/{name}" for name in LEFT_OUT]
            suite = [python, "-m", "pytest", "-q", *left_out, *pytest_arguments]
            try:
                ran = subprocess.run([*suite, *AT_ONCE], cwd=ROOT, timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                return "failed: it hangs"
        return "passed" if ran.returncode == 0 else f"failed: pytest ended with {ran.returncode}"


CELLS = [
    Cell(python, django, packages) for python, all_ in DJANGO.items() for django in all_ for packages in RESOLUTION
]


def uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", *arguments], cwd=ROOT, check=True)


def corners() -> list[Cell]:
    """The oldest Python and Django with the oldest packages, and the newest of all; of the Pythons that are here."""
    here = [cell for cell in CELLS if find(cell.python)]
    oldest = next((cell for cell in here if cell.packages == "lowest"), None)
    newest = next((cell for cell in reversed(here) if cell.packages == "newest"), None)
    return [cell for cell in (oldest, newest) if cell]


def find(python: str) -> str | None:
    """The path of such an interpreter, on the PATH or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    # Before its shims, which refuse to run what is not switched on.
    places = [*map(str, pyenv.glob(f"versions/{python}.*/bin")), os.environ["PATH"]]
    command = [
        sys.executable,
        "-m",
        "uv",
        "python",
        "find",
        "--no-project",
        "--system",
        "--no-python-downloads",
        python,
    ]
    environment = {**os.environ, "PATH": os.pathsep.join(places)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names = [name for word in arguments[:cut] for name in (map(str, corners()) if word == "corners" else [word])]
    if unknown := set(names) - set(map(str, CELLS)):
        print(f"No such cell: {', '.join(sorted(unknown))}. There are {', '.join(map(str, CELLS))}.")
        return 2
    became = {}
    for cell in CELLS:
        if not names or str(cell) in names:
            print(f"\n== {cell}", flush=True)
            began = time.monotonic()
            became[cell] = f"{cell.run(arguments[cut + 1 :])} ({time.monotonic() - began:.0f} s)"
    print("\n".join(f"{cell}  {what}" for cell, what in became.items()))
    return 0 if became and all(what.startswith(("passed", "no Python")) for what in became.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

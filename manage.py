#!/usr/bin/env python
"""Django's command line for the demo project."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    try:
        from django.core.management import execute_from_command_line
    except ImportError as exc:
        raise ImportError("Django is not installed for this Python. Is the virtual environment the right one?") from exc
    if sys.argv[1:2] == ["demo"]:
        # Settings are read before a command runs, so what the demo presumes must be in place by now.
        from project.env import presume

        presume(DEBUG="on", CHATNEST_ALLOW_ANONYMOUS="on")
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()

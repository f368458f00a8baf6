"""A site that has ``USE_TZ`` off, in a place whose clocks change."""

from tests.benchmarks.settings import *  # noqa: F403

USE_TZ = False
TIME_ZONE = "Europe/Berlin"

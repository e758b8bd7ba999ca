"""A module that handles SIGALRM from its import on. Only workers import it, in a task."""

from __future__ import annotations

from tests.coordinator import signal_functions

signal_functions.handle_alarms()

"""What a fork server imports before anything else of ringpool: all that it imports then is for workers."""

from __future__ import annotations

from ringpool import startup

startup.in_fork_server = True

"""The environment of a program, for workers whose fork server was started before the program changed it."""

from __future__ import annotations

import os
import time


def environment() -> dict[str, str]:
    """That of this process, as it is now; other threads may be changing it."""
    found = {name: os.environ.get(name) for name in list(os.environ)}
    return {name: value for name, value in found.items() if value is not None}


def take_environment(wanted: dict[str, str]) -> None:
    """Have that one, and no other variables; the time zone as well, where it is another."""
    if wanted == os.environ:
        return
    zone = os.environ.get("TZ")
    for name in list(os.environ):
        if name not in wanted:
            del os.environ[name]
    os.environ.update(wanted)
    if os.environ.get("TZ") != zone:
        time.tzset()

"""The environment of a program, for workers whose fork server was started before the program changed it.

Workers have what they have, but for what the program changed since: the main module may set variables for workers
alone, and C code (``putenv``) those of which ``os.environ`` does not know.
"""

from __future__ import annotations

import os
import time


def _now() -> dict[str, str]:
    """Other threads may be changing it."""
    found = {name: os.environ.get(name) for name in list(os.environ)}
    return {name: value for name, value in found.items() if value is not None}


_first = _now()  # in a fork server, and so in its workers: as its program had it when it was started, see ``ahead``
_names = {*_first}  # that there were


def environment() -> dict[str, str | None]:
    """That of this process, as it is now; None: a variable that is there no more."""
    _names.update(_now())
    return {name: os.environ.get(name) for name in list(_names)}


def take_environment(wanted: dict[str, str | None]) -> None:
    """Have what has changed; the time zone as well, where it is another."""
    zone = os.environ.get("TZ")
    for name, value in wanted.items():
        if value == _first.get(name):
            continue
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if os.environ.get("TZ") != zone:
        time.tzset()

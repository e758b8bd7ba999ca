"""What takes a while to import, for a test of limits in time. Only that test, and its workers, import it."""

from __future__ import annotations

import time

IMPORT_S = 2.0

time.sleep(IMPORT_S)


class Number(int):
    """One that a worker can only unpickle when it has imported this."""


def double(x: int) -> int:
    return 2 * x


def overrun() -> None:
    while True:
        pass

"""What all of them have in common."""

from __future__ import annotations

import signal as signals
from contextlib import suppress

_PACKAGE = "ringpool.errors"


class RingpoolError(Exception):
    """The root of ringpool's errors: catch it to catch all of them."""

    def __init_subclass__(cls) -> None:
        """Tracebacks and pickles call each by its public name."""
        super().__init_subclass__()
        if cls.__module__.startswith(f"{_PACKAGE}."):
            cls.__module__ = _PACKAGE


def words_of(value: object) -> str:
    """``str(value)``. An exception's own ``__str__`` may fail; who reports it must not."""
    try:
        return str(value)
    except Exception as error:
        return f"({type(value).__qualname__} that cannot be shown: {type(error).__qualname__})"


def add_note(error: BaseException, text: str) -> None:
    """Add a note to ``error``. One that takes none (a frozen dataclass) is raised all the same."""
    with suppress(Exception):
        error.add_note(text)


def signal_name(number: int) -> str:
    """The name of signal ``number``, or ``signal N`` where the platform gives it none."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"

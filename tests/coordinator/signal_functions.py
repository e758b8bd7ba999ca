"""What the tests of signals have run by workers, which import this module."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

FAR_S = 3600.0


class AlarmError(Exception):
    """The handler's, who was called."""


def raise_alarm(_number: int, _frame: FrameType | None) -> None:
    raise AlarmError


def handle_alarms() -> None:
    signal.signal(signal.SIGALRM, raise_alarm)


def limit_itself(timeout_s: float = 0.02) -> str:
    """Waits for a timer of its own, by a handler that is there already."""
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        time.sleep(FAR_S)
    except Exception as error:
        return type(error).__name__
    return "waited in vain"


def import_and_limit_itself() -> str:
    """By a handler that an import installs, the first time."""
    from tests.coordinator import alarm_on_import

    assert alarm_on_import
    return limit_itself()


def leave_a_timer() -> tuple[int, float]:
    """Which process this is, and what is left of a timer that is found."""
    found_s = signal.getitimer(signal.ITIMER_REAL)[0]
    signal.setitimer(signal.ITIMER_REAL, FAR_S)
    return os.getpid(), found_s


def ignore(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)


def handler_of(number: int) -> str:
    """The name of a handler."""
    handler = signal.getsignal(number)
    return getattr(handler, "__qualname__", None) or getattr(handler, "name", "of C")


def wakeup_fd() -> int:
    return signal.set_wakeup_fd(-1)


def wait_for_signal(number: int) -> bool:
    """Sends this process a signal that is held back, and takes it; whether it was there."""
    os.kill(os.getpid(), number)
    return signal.sigtimedwait([number], FAR_S) is not None


def held_back() -> set[int]:
    return set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))

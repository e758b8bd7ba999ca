"""The end of a thread, and what a signal handler that raises must not make of it."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest

from ringpool.coordinator.ending import Ending

WATCHDOG_S = 30.0


def test_an_end_is_not_there_before_it_is_reached() -> None:
    ending = Ending()
    assert not ending.wait(0)
    assert not ending.has_come
    ending.reached()
    assert ending.has_come
    assert ending.wait(0)
    assert ending.wait(0), "for ever"


def test_a_waiter_is_woken_by_the_end() -> None:
    ending = Ending()
    thread = threading.Thread(target=ending.reached)
    thread.start()
    assert ending.wait(WATCHDOG_S)
    thread.join()


@pytest.mark.parametrize("reached", [False, True])
def test_an_interrupted_wait_says_nothing_untrue_afterwards(reached: bool) -> None:
    """KeyboardInterrupt at every bytecode of ``wait``."""
    for n in range(1, 200):
        ending = Ending()
        if reached:
            ending.reached()
        if not _interrupt(ending, n):
            break
        assert ending.has_come is reached
        assert ending.wait(0) is reached
        if not reached:
            ending.reached()
        assert ending.wait(0)
    assert n > 5, "there were bytecodes to interrupt"


def _interrupt(ending: Ending, n: int) -> bool:
    """Wait, and be interrupted before the n-th bytecode; whether there were so many."""
    left = n

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if frame.f_code is not Ending.wait.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return trace

    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one such frame when tracing begins
    sys.settrace(trace)
    try:
        ending.wait(0)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False

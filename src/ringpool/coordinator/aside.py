"""The condition of a future, and what is done where another thread keeps it.

    pump --condition not to be had within some ms--> put aside --had, at a later look--> told
                                                        +--left: opened, and then told--> told

``wait`` and ``as_completed`` of ``concurrent.futures`` take the conditions of all their futures, one after the other.
Ctrl-C in the midst of that leaves some held by a thread that will never release them. So the pump waits for none
longer than for a thread that is about to release it, and goes on with other futures.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from _thread import RLock
from collections import deque
from collections.abc import Callable
from concurrent.futures import wait
from types import FrameType
from typing import Any, NamedTuple

from ringpool.coordinator import signals

PATIENCE_S = 0.005
LOOK_S = 0.02
LEFT_AFTER_S = 1.0
_OWNER = re.compile(r"owner=(\d+)")
_FUTURES = frozenset((wait.__code__.co_filename, os.path.join(os.path.dirname(__file__), "futures.py")))


class FutureCondition(RLock):  # pyright: ignore[reportGeneralTypeIssues]  # it may be derived from
    """A ``threading.Condition`` with a lock of its own, as far as futures use one.

    ``with`` is two calls of C here: Ctrl-C, which comes between bytecodes, leaves it held by none. And it is made in a
    fraction of the time: ``wait`` makes those of all its futures while it has taken some of them.
    """

    _bells: list[threading.Lock] | None = None  # of those who wait
    _is_told = False  # what they wait for comes once: maybe while a signal's handler waits, in one who is about to

    def wait(self, timeout: float | None = None) -> bool:
        """Release it, wait to be notified, up to ``timeout`` seconds, and take it again; whether it was notified."""
        bell, is_rung, held = threading.Lock(), False, None
        bell.acquire()
        if self._bells is None:
            self._bells = []
        self._bells.append(bell)
        own: Any = self  # what follows is of every RLock, and typeshed does not know it
        try:
            held = own._release_save()
            is_rung = self._is_told or signals.acquire(bell, -1 if timeout is None else max(0.0, timeout))
        finally:
            if held is not None:
                own._acquire_restore(held)
            elif not own._is_owned():  # Ctrl-C has come just as it was released
                self.acquire()
            if not is_rung:
                self._forget(bell)
        return is_rung or not bell.locked()

    def _forget(self, bell: threading.Lock) -> None:
        if self._bells is not None and bell in self._bells:
            self._bells.remove(bell)

    def notify_all(self) -> None:
        """Wake all who ``wait``."""
        self._is_told = True
        while self._bells:
            bell = self._bells[-1]
            if bell.locked():  # it may be rung, where Ctrl-C has come amid this, and it is done again
                bell.release()
            self._bells.pop()

    def open_if_left(self) -> None:
        """Release it, whoever holds it, unless that thread may still do so. Its owner shows in its ``repr`` alone."""
        owner = _OWNER.search(repr(self))
        frame = sys._current_frames().get(int(owner[1])) if owner else None  # pyright: ignore[reportPrivateUsage]
        if not _is_amid_futures(frame):
            with contextlib.suppress(RuntimeError):  # nobody holds it any more
                self._release_save()  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]


_SLEEPERS = frozenset(each.__code__ for each in (threading.Condition.wait, threading.Event.wait, signals.acquire))
_CALLERS = _SLEEPERS | {FutureCondition.wait.__code__}


def _is_amid_futures(frame: FrameType | None) -> bool:
    """Whether a thread executes code of futures, below a signal's handler too. What sleeps there for a condition, or an
    event, holds the lock of none of them.
    """
    while frame is not None:
        if frame.f_code in _SLEEPERS:
            while frame is not None and (frame.f_code in _CALLERS or frame.f_code.co_filename in _FUTURES):
                frame = frame.f_back
            continue
        if frame.f_code.co_filename in _FUTURES:
            return True
        frame = frame.f_back
    return False


def can_be_told(waiter: Any) -> bool:
    """Whether one who waits for futures (of ``wait``, ``as_completed``) can be told at all. Ctrl-C may have left the
    lock of his event held by his thread, which waits no more.
    """
    lock = getattr(getattr(waiter, "event", None), "_cond", None)
    if lock is None:
        return True
    if not lock.acquire(timeout=LEFT_AFTER_S):
        return False
    lock.release()
    return True


class Waiting(NamedTuple):
    """``tell`` is to be called with ``condition`` held, which it releases; that has been tried ``since_s``."""

    condition: FutureCondition
    tell: Callable[[], None]
    since_s: float


class Aside:
    """What is told to futures later. Any thread puts something there; the pump's looks, each ``LOOK_S`` or so."""

    def __init__(self) -> None:
        self._waiting: deque[Waiting] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def tell(self, condition: FutureCondition, tell: Callable[[], None]) -> bool:
        """Call ``tell`` with ``condition`` held; whether that could be, or was put aside."""
        if condition.acquire(timeout=0 if self._waiting else PATIENCE_S):
            tell()
            return True
        self._waiting.append(Waiting(condition, tell, time.monotonic()))
        return False

    def look(self) -> None:
        """Tell what can be told by now. A condition that was left after a second is opened."""
        for _ in range(len(self._waiting)):
            try:
                waiting = self._waiting.popleft()
            except IndexError:  # another thread looks, too: the pool has ended
                return
            is_had = waiting.condition.acquire(blocking=False)
            if not is_had and time.monotonic() - waiting.since_s > LEFT_AFTER_S:
                waiting.condition.open_if_left()
                is_had = waiting.condition.acquire(blocking=False)
            if is_had:
                try:
                    waiting.tell()
                except BaseException:  # of a callback
                    traceback.print_exc()
            else:
                self._waiting.append(waiting)

    def finish(self) -> None:
        """``look`` until there is nothing left to tell."""
        while self._waiting:
            self.look()
            time.sleep(LOOK_S)

"""The end of a thread, to be waited for by a thread that Ctrl-C may interrupt.

    Ending() --- thread starts --- ... --- reached() --- wait() is true, for ever

``threading.Thread.join`` and ``is_alive`` are not for that: in CPython up to 3.12, an exception that a signal handler
raises inside either marks the thread as ended while it runs (seen: a segment was closed under a thread that was at work
in it, and the program died of SIGSEGV). Here are a flag and a bare lock, whose methods are single steps.
"""

from __future__ import annotations

import threading


class Ending:
    """Whether one thread has ended. ``has_come`` (bool) may be read at any time."""

    def __init__(self) -> None:
        self.has_come = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def reached(self) -> None:
        """The last act of the thread; once."""
        self.has_come = True  # before the lock: a waiter that is interrupted after its acquire leaves that held
        self._lock.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` seconds; whether the thread has ended."""
        if not self.has_come and self._lock.acquire(timeout=timeout_s):
            self._lock.release()
        return self.has_come

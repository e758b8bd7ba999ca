"""Where the pump puts what arrives for an iterator over results.

It is apart from the iterator, so that one that nobody has any more is noticed.

    pump:      arrived.append ... settle     --->     consumer:  wait, arrived.popleft
    consumer:  closed := True, Pump.abandon  --->     pump:      retire; drops what still comes; at last on_retired
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ringpool.coordinator import signals


class Inbox:
    """``arrived``: a deque of whatever a subclass puts there. ``on_retired``: called when nothing comes any more."""

    def __init__(self, on_retired: Callable[[], None]) -> None:
        self._on_retired = on_retired
        self._has_ended = False
        self._left = 0  # once closed: tasks that a worker still has
        self.arrived: deque[Any] = deque()
        # Locked: no news. A lock, because its methods are single steps: an Event takes its own lock in Python code, and
        # Ctrl-C can leave that held by the thread that waits, so that the pump would wait for it for ever.
        self._news = threading.Lock()
        self._news.acquire()
        self.closed = False
        self._is_taken = False  # what had arrived, by who came between, in the thread that waits

    def settle(self) -> None:
        """What was there for now has been delivered."""
        if self._news.locked():
            with contextlib.suppress(RuntimeError):  # ``wait_beside`` has just unlocked it
                self._news.release()

    def wait(self, timeout_s: float = -1) -> bool:
        """Wait until something has arrived, up to ``timeout_s`` seconds (-1: for ever); whether it has."""
        while not self.arrived:
            if self._is_taken:
                self._is_taken = False
                return True
            if not signals.acquire(self._news, timeout_s):
                return bool(self.arrived)
        return True

    def tell_taken(self) -> None:
        """Have whoever waits look again: a signal handler in its thread has taken what had arrived."""
        self._is_taken = True
        Inbox.settle(self)

    def wait_beside(self, timeout_s: float) -> None:
        """``wait``, beside the consumer, who may wait as well: news wake one of both, and this one gives them on."""
        if self.wait(timeout_s):
            Inbox.settle(self)

    def retire(self, left: int) -> None:
        """Nobody takes results any more, and ``left`` are still to come. In the pump's thread, or where none are."""
        self._left = left
        if not left:
            self._end()

    def dropped(self) -> None:
        """One of those that were still to come has come."""
        self._left -= 1
        if not self._left:
            self._end()

    def _end(self) -> None:
        """Once, although a run may be abandoned twice: with what it had queued in the midst of that."""
        if not self._has_ended:
            self._has_ended = True
            self._on_retired()

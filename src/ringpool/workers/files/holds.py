"""Holds: files that this process has locked with flock, by which others tell the living from the dead.

    Hold.take --> open, entered, locked --> let_go   the kernel lets go of a dead process's
                    |
                 a fork: the child closes its copies, and unlocks nothing

A transaction holds its id, a recovery that of the dead one and, while it looks through all, their directory.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Generator
from contextlib import suppress

from ringpool.workers.files.durability import close_quietly
from ringpool.workers.files.oslayer import calls

WAIT_MIN_S = 5e-5
WAIT_MAX_S = 5e-3


class OutOfTimeError(Exception):
    """The deadline came first. ``holder`` (str): who had what was waited for, where that is known. Never leaves this
    package.
    """

    def __init__(self, holder: str = "") -> None:
        super().__init__(holder)
        self.holder = holder


class Hold:
    """A file that may be held: then ``fd`` is its descriptor, else None. Whoever makes one lets go of it."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd: int | None = None

    def take(self, dir_fd: int, name: bytes, flags: int) -> bool:
        """Open and lock the file ``name`` of a directory; False where it was removed meanwhile.

        Raises ``OSError``: ``BlockingIOError`` where another has it.
        """
        with _guard:
            self.fd = fd = calls.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666, dir_fd=dir_fd)
            _held.add(self)
        try:
            calls.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if calls.fstat(fd).st_nlink:
                return True
        except BaseException:
            self.let_go_surely()
            raise
        self.let_go()
        return False

    def let_go(self) -> None:
        """Unlock and close it, if it is held. Raises no ``OSError``."""
        with _guard:
            fd = self.fd
            if fd is None:
                return
            with suppress(OSError):  # closing is not enough while a child that has just been forked has a copy
                calls.flock(fd, fcntl.LOCK_UN)
            if self.fd is not None:  # else this is the child of a signal handler's fork
                self.fd = None
                _held.discard(self)
                close_quietly(fd)

    def let_go_surely(self) -> None:
        """``let_go``, to its end where a Ctrl-C comes in between."""
        try:
            self.let_go()
        except BaseException:
            self.let_go()
            raise

    def abandon(self) -> None:
        """In the child of a fork: what is held is the parent's."""
        fd, self.fd = self.fd, None
        if fd is not None:
            close_quietly(fd)


_held: set[Hold] = set()
_guard = threading.RLock()  # no fork between opening a descriptor and its entry; re-entrant: signal handlers may fork


def tries(end_s: float) -> Generator[bool]:
    """Once at each try, with a growing pause after it, until ``end_s`` (monotonic); true for the last one."""
    wait_s = WAIT_MIN_S
    while (left_s := end_s - time.monotonic()) > 0:
        yield False
        time.sleep(min(wait_s, left_s))  # flock wakes only who blocks in it, and that cannot be ended at a deadline
        wait_s = min(2 * wait_s, WAIT_MAX_S)
    yield True


def _forget() -> None:
    global _guard
    for hold in _held:
        hold.abandon()
    _held.clear()
    _guard = threading.RLock()


os.register_at_fork(before=lambda: _guard.acquire(), after_in_parent=lambda: _guard.release(), after_in_child=_forget)

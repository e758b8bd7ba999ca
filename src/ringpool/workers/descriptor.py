"""A file descriptor as an argument of a process, and one out of the way of what a task opens."""

from __future__ import annotations

import contextlib
import fcntl
import os
from multiprocessing.reduction import DupFd
from typing import Any

_ASIDE_MIN = 200  # out of the way of a task that closes and opens low descriptors


def out_of_the_way(fd: int) -> int:
    """A copy with a high number, for a task that closes and opens low ones; as high as the limit allows."""
    for lowest in (_ASIDE_MIN, _ASIDE_MIN // 2, _ASIDE_MIN // 4):
        with contextlib.suppress(OSError):  # EINVAL: beyond ulimit -n
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


class Descriptor:
    """Owns file descriptor ``fd``. A forked process inherits it; to another one it is sent while that is started.

    ``multiprocessing.connection.Connection`` does the same; but to import that takes a sixth of a worker's start.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._fd),)

    def fileno(self) -> int:
        """The number; -1 where it is closed."""
        return self._fd

    def close(self) -> None:
        """Close it, if that was not done."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _received(sent: Any) -> Descriptor:
    return Descriptor(sent.detach())

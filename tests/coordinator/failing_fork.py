"""For a fork server: while the file that RINGPOOL_TEST_NO_FORK names is there, no process can be forked."""

from __future__ import annotations

import errno
import os

_fork = os.fork


def _fork_unless_told() -> int:
    if os.path.exists(os.environ["RINGPOOL_TEST_NO_FORK"]):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    return _fork()


os.fork = _fork_unless_told

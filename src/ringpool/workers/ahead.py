"""What a fork server imports before anything else of ringpool: all that it imports then is for workers.

A fork that fails (EAGAIN, where ``ulimit -u`` or a container's ``pids.max`` is reached) ends the server of
``multiprocessing``, and all workers with it. Here it costs the one who asked: he reads the end of his pipe. The server
goes on after ECONNABORTED, which it takes for a client that left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from types import FrameType

from ringpool import startup

startup.in_fork_server = True
_OF_A_REQUEST = {"child_r", "child_w", "fds"}  # in multiprocessing.forkserver.main, Python 3.11 to 3.13
_fork = os.fork


def _fork_or_hang_up() -> int:
    try:
        pid = _fork()
    except OSError as error:
        if not _hang_up(sys._getframe(1)):  # pyright: ignore[reportPrivateUsage]  (whose request it is, only it knows)
            raise
        with contextlib.suppress(OSError):  # nobody listens
            os.write(2, f"ringpool: no process can be made: {error}\n".encode())
        raise ConnectionAbortedError(errno.ECONNABORTED, str(error)) from error
    if pid == 0:
        os.fork = _fork  # what a worker forks is its own affair
    return pid


def _hang_up(server: FrameType) -> bool:
    """Close what the server has for the process that was asked for; False where this is no server that we know."""
    names = server.f_locals
    if server.f_globals.get("__name__") != "multiprocessing.forkserver" or not _OF_A_REQUEST.issubset(names):
        return False
    for descriptor in (names["child_r"], names["child_w"], *names["fds"]):
        os.close(descriptor)
    return True


os.fork = _fork_or_hang_up

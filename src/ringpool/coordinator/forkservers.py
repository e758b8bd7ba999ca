"""The fork server of ``multiprocessing``: where it listens, how it is started, and what a fork of the program forgets.

Its address is a path in a directory for temporary files, which the kernel wants short.

    $TMPDIR/pymp-12345678/listener-12345678      at most 107 bytes; else bind() fails
    /tmp/pymp-12345678/listener-12345678         then

``multiprocessing`` makes that directory when it first needs it, one for a process. Where the path would be too long, it
is made here, somewhere else, before: as Python 3.14 does (gh-93852).

It is started with signals held back. Ctrl-C at a terminal reaches it too, and until it ignores that, which is when it
has imported all that it is to, it would end with a traceback of its own, beside the program's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Collection
from multiprocessing import forkserver, process, resource_tracker, util
from typing import Any

AHEAD = "ringpool.workers.ahead"  # imports the main module too, where it can
HEEDED = "ringpool.workers.heeded"  # for ``ahead``: whose processes are not ours are to have SIGINT again
PATH_MAX_BYTES = 107  # of sun_path (unix(7)), less the zero at its end
PLACES = ("/tmp", "/var/tmp", "/dev/shm")
LOCK_TIMEOUT_S = 1.0
_NAMES_BYTES = len("/pymp-12345678/listener-12345678")


def keep_short() -> None:
    """Have the address fit, if that is possible, from now on. Safe to call again."""
    own: dict[str, Any] | None = getattr(process.current_process(), "_config", None)
    if own is None or own.get("tempdir") is not None:
        return
    import tempfile  # here: the fork server's start imports it anyway

    if len(os.fsencode(tempfile.gettempdir())) + _NAMES_BYTES <= PATH_MAX_BYTES:
        return
    for place in PLACES:
        try:
            made = tempfile.mkdtemp(prefix="pymp-", dir=place)
        except OSError:
            continue
        util.Finalize(None, shutil.rmtree, args=(made,), kwargs={"ignore_errors": True}, exitpriority=-100)
        own["tempdir"] = made
        return


def preload() -> list[str]:
    """The modules that a server started now would import first."""
    return getattr(_server(), "_preload_modules", [])


def start(held_back: Collection[signal.Signals]) -> None:
    """Start the server, unless it runs, with signals held back from it and from all its processes."""
    resource_tracker.ensure_running()  # first: when it is started, it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_shared() -> None:
    """Start the server, unless it runs, with SIGINT held back from it, and from workers until they are bound to their
    program. The processes that others start have it as they would have had it. A server that would not import
    ``AHEAD``, which sees to that, is left to be started by its first process, as it always was.
    """
    modules = [name for name in preload() if name != HEEDED]
    if AHEAD not in modules:
        return
    is_heeded = signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    multiprocessing.set_forkserver_preload(modules + [HEEDED] * is_heeded)
    start({signal.SIGINT})


def end_if_new() -> bool:
    """End the server, if it has no process yet, because it is still importing; whether it was so.

    The interpreter may wait for it at exit: the resource tracker ends when all have who were given its pipe, and some
    releases of Python 3.13 wait for that without a limit.
    """
    pid: int = getattr(_server(), "_forkserver_pid", None) or 0
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            if children.read():
                return False
        os.kill(pid, signal.SIGKILL)
    except OSError:  # it has ended; or this kernel does not tell
        return False
    return True


def forget() -> None:
    """In a fork of the program: the server is none of its own.

    ``multiprocessing`` does not notice: it would wait for the server and not find it, and the server would not end with
    its owner while this fork holds its pipe's write end.
    """
    server = _server()
    alive_fd = getattr(server, "_forkserver_alive_fd", None)
    if alive_fd is not None:
        with contextlib.suppress(OSError):
            os.close(alive_fd)
        server.__init__()


def forget_foreign() -> None:
    """``forget``, where the server is another process's: of the program that this one is a fork of, made by
    ``os.fork`` or by a process of ``multiprocessing``, before ``ringpool`` was there to notice. Or where it was reaped
    by somebody else. What a server is to import stays. Several threads may do this at once.
    """
    server = _server()
    if not _is_foreign(server):
        return
    lock = server._lock  # which a thread may have that was not forked with this process
    is_locked = lock.acquire(timeout=LOCK_TIMEOUT_S)
    try:
        if not _is_foreign(server):  # another thread was faster
            return
        alive_fd, server._forkserver_alive_fd = server._forkserver_alive_fd, None
        fresh: Any = type(server)()
        fresh._lock, fresh._preload_modules = lock, server._preload_modules
        server.__dict__.update(fresh.__dict__)
        if alive_fd is not None:
            with contextlib.suppress(OSError):
                os.close(alive_fd)
    finally:
        if is_locked:
            lock.release()


def _is_foreign(server: Any) -> bool:
    pid: int | None = getattr(server, "_forkserver_pid", None)
    if pid is None:
        return False
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _server() -> Any:
    return getattr(forkserver, "_forkserver", None)

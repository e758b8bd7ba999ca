"""What a fork server imports before anything else of ringpool: all that it imports then is for workers.

It imports the program's main module first, where the fork server knows its file. Newer releases of Python 3.13 and 3.14
do so themselves where ``__main__`` is to be preloaded, but an error of it is the end of the server, and of each that is
started in its place. Here such a main module is left to the workers, who say what is wrong, as Python 3.15 does. Nor
does a server outlive the program because a main module takes long.

A fork that fails (EAGAIN, where ``ulimit -u`` or a container's ``pids.max`` is reached) ends the server of
``multiprocessing``, and all workers with it. Here it costs the one who asked: he reads the end of his pipe. The server
goes on after ECONNABORTED, which it takes for a client that left.

A worker begins with SIGINT blocked, until it is bound to its program: a Ctrl-C before would be a traceback of its own;
so does the server, until it ignores that. A process of somebody else's has it back when it comes to its own work. One
whose program ended before it had sent what the process is to be ends without a word: nobody waits for it.

When the program has ended, by SIGKILL too, so does the server; then it ends what tasks had started.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from multiprocessing import process, spawn
from types import FrameType
from typing import Any

from ringpool import startup
from ringpool.workers import environment as environment  # before the main module: it may change that
from ringpool.workers.confinement import end_with_parent
from ringpool.workers.sessions import Orphans

_OF_A_REQUEST = {"child_r", "child_w", "fds"}  # in multiprocessing.forkserver.main, Python 3.11 to 3.13
_fork, _waitpid = os.fork, os.waitpid
_orphans = Orphans()


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
        os.fork, os.waitpid = _fork, _waitpid  # what a worker forks is its own affair
        _keep_from_programs(sys._getframe(1))  # pyright: ignore[reportPrivateUsage]  (as above)
        _hold_back_interrupts()
        _expect_no_data()
    return pid


def _wait_and_note(pid: int, options: int) -> tuple[int, int]:
    """In the server's loop: whoever is reaped is noted before, while it still has its name and its number."""
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) if pid == -1 else None
    if found is not None:
        _orphans.note(found.si_pid)
        pid = found.si_pid
    return _waitpid(pid, options)


def _keep_from_programs(server: FrameType) -> None:
    """What ``os.system`` starts in this process is not to have the pipe whose end tells the server of the program's."""
    if (request := _request_of(server)) is not None:
        for alive in request["fds"][:1]:
            os.set_inheritable(alive, False)


def _hold_back_interrupts() -> None:
    """Until it is known whose process this is; the server itself ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if "ringpool.workers.heeded" in sys.modules:
        before.discard(signal.SIGINT)
    base: Any = process.BaseProcess
    bootstrap = base._bootstrap

    def begin(self: Any, *arguments: Any, **more: Any) -> Any:
        base._bootstrap = bootstrap
        target = getattr(self, "_target", None)  # not there, where a subclass pickles only what its ``run`` needs
        if getattr(target, "__module__", None) != "ringpool.workers.process":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return bootstrap(self, *arguments, **more)

    base._bootstrap = begin


def _expect_no_data() -> None:
    """Where what a process is to be is cut off, he who asked for it is gone."""
    server: Any = spawn
    main = server._main

    def begin(*arguments: Any) -> int:
        server._main = main
        try:
            return main(*arguments)
        except (EOFError, pickle.UnpicklingError) as error:
            raised = error.__traceback__
            while raised is not None and raised.tb_next is not None:
                raised = raised.tb_next
            if raised is None or raised.tb_frame.f_code is not main.__code__:
                raise  # by something that was unpickled
            return 1

    server._main = begin


def _hang_up(server: FrameType) -> bool:
    """Close what the server has for the process that was asked for; False where this is no server that we know."""
    request = _request_of(server)
    if request is None:
        return False
    for descriptor in (request["child_r"], request["child_w"], *request["fds"]):
        os.close(descriptor)
    return True


def _request_of(server: FrameType) -> Mapping[str, Any] | None:
    """The variables of a server that forks for a request; None where this is no server that we know."""
    names = server.f_locals
    is_known = server.f_globals.get("__name__") == "multiprocessing.forkserver" and _OF_A_REQUEST.issubset(names)
    return names if is_known else None


def _main_path() -> str | None:
    """The file of the program's main module, where the fork server that imports this was told of it."""
    frame: FrameType | None = sys._getframe()  # pyright: ignore[reportPrivateUsage]  (only it knows)
    while frame is not None:
        if frame.f_globals.get("__name__") == "multiprocessing.forkserver" and "main_path" in frame.f_locals:
            return frame.f_locals["main_path"]
        frame = frame.f_back
    return None


def _import_main(path: str) -> None:
    before = sys.modules["__main__"]
    this: Any = process.current_process()
    startup.imports_main_ahead = this._inheriting = True
    end_with_parent()  # whose thread waits for this
    try:
        spawn.import_main_path(path)
    except (Exception, SystemExit, startup.Unguarded):
        pass  # workers import it again, each for itself, and say it
    finally:
        end_with_parent(0)
        startup.imports_main_ahead = False
        del this._inheriting
        if startup.is_unguarded:  # even where it has caught that
            sys.modules["__main__"] = sys.modules["__mp_main__"] = before


if (path := _main_path()) is not None:
    _import_main(path)
startup.in_fork_server = True
os.fork = _fork_or_hang_up
os.waitpid = _wait_and_note
atexit.register(_orphans.end)  # forks of the server end without that

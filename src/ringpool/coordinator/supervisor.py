"""Start, watch, stop and replace worker processes. It knows nothing of tasks.

    starting --> running --(pidfd readable)--> dead --(on_death; the ring settles it)--> start again, by command
                    |
                    +--(stop: told through the ring)--> exited

One thread per pool starts all processes and waits on their pidfds, so that a death is noticed when it happens, and so
that this thread is the parent for as long as the pool lives (a worker's PDEATHSIG fires when the *thread* that made
it ends).

Each worker has a guard pipe. Only this process holds its write end, and forks of this process close it at once, so
that the kernel closes it when this process ends, however it ends; and at that the kernel kills the worker
(``workers.confinement``).
"""

from __future__ import annotations

import _socket
import contextlib
import contextvars
import fcntl
import math
import multiprocessing.process
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, cast

import msgspec

from ringpool.coordinator import forkservers
from ringpool.coordinator.ending import Ending
from ringpool.errors.tasks import WorkingDirectoryError
from ringpool.workers.descriptor import Descriptor
from ringpool.workers.process import WorkerArguments, main
from ringpool.workers.sessions import kill_session
from ringpool.workers.setup import Setup

EXIT_STATUS_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 10.0  # what SIGKILL does not end by then hangs in the kernel, and is left to it
START_DESCRIPTORS = 12  # what a start opens at a time: a guard, pidfd, pipes and a socket to the fork server, a module
START_RETRY_MIN_S = 0.05
START_RETRY_MAX_S = 1.0
WAKE_TIMEOUT_S = 0.1  # without being woken, the supervisor looks every second
WORKER_NAME = "ringpool-worker-"  # of the process, as multiprocessing knows it; its index follows


class Death(msgspec.Struct, frozen=True):
    """A worker process that ended: its index and pid, and the signal that killed it or its exit status; or one that
    never was, and in words why not.
    """

    index: int
    pid: int
    signal: int | None
    exitcode: int | None
    not_started: str = ""


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens
        os.write(2, f"ringpool: {words}\n".encode())


def _require_descriptors(any_open: int) -> None:
    """Raise ``OSError`` where a start would run out of descriptors on its way. ``any_open``: one to be copied.

    Having connected to the fork server, ``multiprocessing`` opens pipes. Where it cannot, the server reads the end of
    that connection, takes it for a mistake of its own, and ends; and with it all workers.
    """
    found: list[int] = []
    try:
        found.extend(os.dup(any_open) for _ in range(START_DESCRIPTORS))
    finally:
        for descriptor in found:
            os.close(descriptor)


class _Guard:
    """A guard pipe: its read end, for the worker, and its write end, for this process alone; and a ``keeper``, which
    has the read end too. ``is_child``: the worker will be this process's child.

    When this process is killed, a child may end before the kernel has closed the pipe (the end of its parent, a
    thread, kills it as well), and with the last reader of the pipe the signal for the child's children would be lost.
    A descriptor of this process is no such reader: the kernel counts it off at once, and closes the write end later.
    One on its way through a socket is: it is let go with that socket. Of a dead process's files the kernel closes the
    last first: of the write end before the socket, which has the lower number.
    """

    def __init__(self, is_child: bool) -> None:
        read_end, write_end = os.pipe()
        try:
            self.keeper = _on_its_way(read_end) if is_child else os.dup(read_end)
            try:
                self.write_end = fcntl.fcntl(write_end, fcntl.F_DUPFD_CLOEXEC, self.keeper)
            except OSError:
                os.close(self.keeper)
                raise
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self.read_end = Descriptor(read_end)  # until the worker has it

    def close(self) -> None:
        """What this process has of it: the worker, where it is a fork that is just made, goes on with its read end."""
        for descriptor in (self.write_end, self.keeper):
            with contextlib.suppress(OSError):  # the program has closed it, as daemons close all
                os.close(descriptor)


def _on_its_way(descriptor: int) -> int:
    """A socket through which ``descriptor`` is on its way. Or a copy of it, where that cannot be: of all processes of a
    user together, no more may be so than this one may have open (ETOOMANYREFS).
    """
    keeper, sender = _socket.socketpair()
    try:
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))
        sender.sendmsg([b"\0"], [rights])
        return keeper.detach()
    except OSError:
        return os.dup(descriptor)
    finally:
        keeper.close()
        sender.close()


class _Guards:
    """Those that this process holds. A fork of it must not keep them, or the kernel would not close the pipes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[_Guard] = set()
        self._used = False
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._close_in_child
        )

    def open(self, is_child: bool) -> _Guard:
        with self._lock:
            guard = _Guard(is_child)
            self._open.add(guard)
            self._used = True
        return guard

    def close(self, guard: _Guard) -> None:
        """Which kills the worker."""
        with self._lock:
            if guard in self._open:
                self._open.discard(guard)
                guard.close()

    def _close_in_child(self) -> None:
        for guard in self._open:
            guard.close()
        if self._used:
            _forget_processes()
        self._open.clear()
        self._lock.release()


def _forget_processes() -> None:
    """In a fork of this process: the workers and the fork server are its parent's children, and none of its own.

    ``multiprocessing`` does not notice. Its exit handler would join the workers and fail.
    """
    children: set[object] = getattr(multiprocessing.process, "_children", set())
    children.clear()
    forkservers.forget()


@contextlib.contextmanager
def _interrupts_held_back(context: BaseContext) -> Generator[None]:
    """A worker begins with SIGINT blocked, until it is bound to us: a Ctrl-C before would be a traceback of its own.

    The fork server, once it runs, does not have that from us: there, ``workers.ahead`` does this.
    """
    if context.get_start_method() == "forkserver":
        forkservers.start_shared()
        yield
        return
    if context.get_start_method() == "spawn":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # first: when it is started, it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _presentable_main() -> Generator[None]:
    """A program from standard input says that it is the file ``<stdin>``, which a new process would run. One that
    ``pdb`` runs has no ``__spec__``, which ``multiprocessing`` asks for.
    """
    main = sys.modules["__main__"]
    main.__dict__.setdefault("__spec__", None)  # as a script has it
    path = getattr(main, "__file__", None)
    if path is None or getattr(main, "__spec__", None) is not None or os.path.isfile(path):
        yield
        return
    main.__file__ = None
    try:
        yield
    finally:
        main.__file__ = path


_guards = _Guards()


class _Worker:
    """One living worker process: its pidfd, and its guard pipe."""

    def __init__(self, process: BaseProcess, pidfd: int, guard: _Guard) -> None:
        self.process = process
        self.pid: int = process.pid or 0
        self.pidfd = pidfd
        self.guard = guard

    def kill(self) -> None:
        """SIGKILL for the worker and its process group."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


class Supervisor:
    """The processes of workers 0 to ``n - 1``. ``on_death(death)`` is called in its thread, at once;
    ``on_failure(error)`` where the thread itself fails; ``on_look()`` when nothing has happened for a second. After a
    death that index stays empty until ``start(index)``.
    """

    def __init__(
        self,
        context: BaseContext,
        arguments: Callable[[int], tuple[WorkerArguments, Setup | None]],
        n: int,
        on_death: Callable[[Death], None],
        on_failure: Callable[[BaseException], None],
        on_look: Callable[[], None],
    ) -> None:
        self._context = context
        self._arguments = arguments
        self._on_death = on_death
        self._on_failure = on_failure
        self._on_look = on_look
        self._workers: dict[int, _Worker] = {}
        self._to_start: deque[int] = deque(range(n))
        self._stopping = False
        self._killing = False
        self._starting = False  # which may take long, where a fork server imports the main module first
        self._poll = select.poll()
        self._wake_read, self._wake_write = os.pipe()
        self._wake_lock = threading.Lock()  # of the pipe's write end
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poll.register(self._wake_read, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="ringpool-supervisor", daemon=True)
        self._variables = contextvars.Context()
        self._begun = False
        self._has_tried = threading.Event()  # to start a first one
        self._ending = Ending()
        self._start_retry_s = START_RETRY_MIN_S
        self._start_at_s = 0.0
        self._start_failed_by = ""

    def begin(self) -> None:
        """Start the thread, and with it the workers. Those that are forks have the context variables of the caller."""
        self._variables = contextvars.copy_context()
        self._thread.start()
        self._begun = True

    def wait_for_first(self, timeout_s: float) -> None:
        """Until the start of a first worker was tried, or ``timeout_s`` seconds have passed."""
        self._has_tried.wait(timeout_s)

    # ---- for other threads

    @property
    def pids(self) -> tuple[int, ...]:
        """The pids of the living workers, by index."""
        return tuple(worker.pid for _, worker in sorted(self._workers.copy().items()))

    def start(self, index: int) -> None:
        """Start worker ``index`` again."""
        self._to_start.append(index)
        self._wake()

    def kill_all(self) -> None:
        """SIGKILL for every worker and what it has started; none is started any more."""
        self._stopping = self._killing = True
        self._wake()

    def join(self, timeout_s: float) -> None:
        """Wait for all workers to end by themselves; after ``timeout_s`` seconds they are killed."""
        self._stopping = True
        if not self._begun:
            if self._thread.ident is None:  # otherwise Ctrl-C has come just when it was started
                self._close_wake()
            return
        self._wake()
        if not self._ending.wait(timeout_s):
            if not self._killing and self.pids:  # none: the fork server has yet to make them
                _say(f"workers {self.pids} have not ended {timeout_s:g} s after they were told to, and are killed")
            self.kill_all()
            if not (self._starting and self._context.get_start_method() == "forkserver") or forkservers.end_if_new():
                self._ending.wait(KILL_TIMEOUT_S)

    def _wake(self) -> None:
        if not self._wake_lock.acquire(timeout=WAKE_TIMEOUT_S):  # a signal handler has come to one who has it
            return
        try:
            if self._wake_write >= 0:
                os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # there are enough
        finally:
            self._wake_lock.release()

    def _close_wake(self) -> None:
        """Nobody writes to a number that may be another file's by then; better that the pipe stays."""
        if self._wake_lock.acquire(timeout=WAKE_TIMEOUT_S):
            try:
                wake_write, self._wake_write = self._wake_write, -1
                if wake_write >= 0:  # a pool without a task may be closed by several
                    with contextlib.suppress(OSError):  # the program has closed all its descriptors
                        os.close(wake_write)
                        os.close(self._wake_read)
            finally:
                self._wake_lock.release()

    # ---- the thread

    def _run(self) -> None:
        try:
            if self._context.get_start_method() == "forkserver":
                forkservers.keep_short()
            while not (self._stopping and not self._workers):
                if self._killing:
                    for worker in self._workers.values():
                        worker.kill()
                if self._to_start and not self._stopping and time.monotonic() >= self._start_at_s:
                    self._start(self._to_start.popleft())  # one at a time: a death in between is not to wait
                    self._has_tried.set()
                ready = {fd for fd, _ in self._poll.poll(self._patience_ms())}
                if not ready:
                    self._on_look()
                if self._wake_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                for index, worker in list(self._workers.items()):
                    if worker.pidfd in ready:
                        self._bury(index, worker)
        except BaseException as error:  # we are wrong: nobody may wait for a death that nobody will report
            self._on_failure(error)
        finally:
            del self._arguments  # and the initializer's with them: locks and queues that somebody may want to be rid of
            del self._variables
            self._has_tried.set()
            self._close_wake()
            self._ending.reached()

    def _patience_ms(self) -> int:
        """How long to wait for a death: until the next start is due."""
        if not self._to_start or self._stopping:
            return 1000
        return min(max(0, math.ceil(1000 * (self._start_at_s - time.monotonic()))), 1000)

    def _start(self, index: int) -> None:
        try:
            current_directory()
            _require_descriptors(self._wake_read)
            arguments, setup = self._arguments(index)
            guard = _guards.open(self._context.get_start_method() != "forkserver")
        except (OSError, WorkingDirectoryError) as error:  # EMFILE
            self._cannot_start(index, error)
            return
        process: BaseProcess = cast(
            "Any", self._context
        ).Process(  # every context has it; typeshed's base class has not
            target=main, args=(arguments, guard.read_end, setup), name=f"{WORKER_NAME}{index}"
        )
        self._starting = True
        try:
            with _presentable_main(), _interrupts_held_back(self._context):
                self._variables.run(process.start)
        except Exception as error:  # fork fails (EAGAIN, ENOMEM), or arguments do not pickle: it counts as a death
            _guards.close(guard)
            self._cannot_start(index, error)
            return
        finally:
            self._starting = False
            guard.read_end.close()
        try:
            pidfd = os.pidfd_open(process.pid or 0)
        except OSError:  # it ended and was reaped already, or there is no descriptor left to watch it by
            _guards.close(guard)  # which kills it
            self._report(index, process)
            return
        self._start_retry_s, self._start_failed_by = START_RETRY_MIN_S, ""
        self._workers[index] = _Worker(process, pidfd, guard)
        self._poll.register(pidfd, select.POLLIN)

    def _cannot_start(self, index: int, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}"
        if not self._killing and why != self._start_failed_by:  # it is tried again, for as long as others are at work
            self._start_failed_by = why
            _say(f"worker {index} cannot be started: {why}")
        self._start_at_s = time.monotonic() + self._start_retry_s  # EMFILE, EAGAIN and their like may pass
        self._start_retry_s = min(2 * self._start_retry_s, START_RETRY_MAX_S)
        self._on_death(Death(index, 0, None, None, why))

    def _bury(self, index: int, worker: _Worker) -> None:
        """The worker has ended: end what it had started, reap it, report it."""
        self._poll.unregister(worker.pidfd)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)  # at once: a pid is not given to others for a long time
        _guards.close(worker.guard)
        os.close(worker.pidfd)
        del self._workers[index]
        self._report(index, worker.process)

    def _report(self, index: int, process: BaseProcess) -> None:
        deadline = time.monotonic() + EXIT_STATUS_TIMEOUT_S
        pid = process.pid or 0
        is_child = self._context.get_start_method() != "forkserver"
        process.join(EXIT_STATUS_TIMEOUT_S)
        is_lost = False
        while process.exitcode is None and not is_lost and time.monotonic() < deadline:
            is_lost = is_child and _is_reaped(pid)  # asked before: another thread may be about to note it
            process.join(0.01)  # its sentinel fires early where a task has closed all descriptors
        code = process.exitcode
        if pid and code:  # it did not end by itself, or not well
            kill_session(pid)
        if code is not None:
            process.close()
        self._on_death(
            Death(
                index,
                pid,
                -code if code is not None and code < 0 else None,
                code if code is None or code >= 0 else None,
            )
        )


def current_directory() -> str:
    """The directory that workers begin in. Raises ``WorkingDirectoryError`` where it was removed, perhaps since the
    pool was made; another one will do.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise WorkingDirectoryError("was removed") from None


def _is_reaped(pid: int) -> bool:
    """Whether nobody will ever have the exit status of this child: the program ignores SIGCHLD, or waits for any."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False

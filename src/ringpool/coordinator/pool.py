"""A pool: segment, pump and supervisor with their workers, from start to end. What runs on it, others say.

    caller --tickets--> Pump (thread) <--ring--> workers
                        Supervisor (thread) --processes--> workers

open --close()--> draining --idle--> closed        nothing is left in /dev/shm, no process, no thread
  |                  |
  +--close(cancel)---+ what has not begun is cancelled first
  +--Ctrl-C, SIGTERM, exit of the program after an error--> workers are killed at once --> closed
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import itertools
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import ModuleType, NoneType
from typing import NamedTuple, Protocol

from ringpool.coordinator import leftovers, signals
from ringpool.coordinator.contexts import (
    context_of,
    require_directory,
    require_no_daemon,
    require_no_main_import,
    require_unpatched,
)
from ringpool.coordinator.pump import Pump
from ringpool.coordinator.supervisor import Death, Supervisor
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import (
    CoordinatorClosedError,
    RingpoolError,
    SharedMemoryFullError,
    ThreadStartError,
)
from ringpool.shm import blobs, layout, segment
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.layout import CHUNK_BYTES, INLINE_BYTES
from ringpool.shm.vectors import Arena
from ringpool.workers import calls, values
from ringpool.workers.environment import environment
from ringpool.workers.process import WorkerArguments
from ringpool.workers.setup import Setup
from ringpool.workers.umask import umask

ABORT_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 5.0
SPINS = 500  # looks for work before a worker sleeps: about 250 us in all, during which whoever needs the core has it
CHUNKS_PER_WORKER, CHUNKS_MORE = 4, 24  # at most; and together no more than this part of /dev/shm:
CHUNKS_SHARE = 8

# CPython 3.12.0 to 3.12.2 start no thread, and fork no process, from when a program's main module has come to its end
# (python/cpython#113964): before tasks that it leaves behind are run.
_STARTS_NOTHING_AT_THE_END = (3, 12) <= sys.version_info < (3, 12, 3)
FIRST_START_TIMEOUT_S = 30.0

_BEFORE_OTHERS = 100  # among finalizers of multiprocessing; its own have 15 at most
_finalizer: Finalize | None = None
_open: set[Pool] = set()  # not weak: one that its program has lost sight of is closed at exit as well


class WorkerLimits(NamedTuple):
    """When a worker is replaced between tasks: after so many, or grown beyond so many bytes; 0: never."""

    tasks_max: int = 0
    rss_max_bytes: int = 0


class OpenRun(Protocol):
    """A map that is not at its end."""

    def end(self, *, cancel: bool) -> None:
        """The pool closes: send what is left of the items, or with ``cancel`` nothing more."""
        ...


class Pool:
    """``n_workers`` processes and a ring of ``slots`` between them and this process.

    ``limits``: when a worker is replaced between tasks. ``memory_limit_bytes``: it is killed when it has more.
    ``on_demand``: workers are started when tasks wait for them. ``setup``: gives what a worker does before its first
    task. ``on_exit(death, reason)``: told of each worker that ended, in the pump's thread. ``on_ended``: called when
    all workers have ended. ``closed``: makes the error for tasks that come too late, ``ended`` that
    of those that are not done when the pool is ended. ``retains``: results stay in the
    segment until they are released, and the segment when the pool is closed, or dead: who made it removes it.
    Raises ``SharedMemoryFullError``, ``ThreadStartError``, ``ValueError``, ``MainModuleError``,
    ``DaemonicProcessError``, ``MonkeyPatchedError`` and ``WorkingDirectoryError``.
    """

    def __init__(
        self,
        n_workers: int,
        mp_context: str | BaseContext | ModuleType | None,
        *,
        slots: int,
        claims_max: int = layout.CLAIMS_MAX,
        limits: WorkerLimits = WorkerLimits(),  # noqa: B008  (immutable)
        memory_limit_bytes: int | None = None,
        on_demand: bool = False,
        setup: Callable[[], Setup | None] = lambda: None,
        on_exit: Callable[[Death, str], None] | None = None,
        on_ended: Callable[[], None] | None = None,
        closed: Callable[[], Exception] = CoordinatorClosedError,
        ended: Callable[[], RingpoolError] = CoordinatorClosedError,
        retains: bool = False,
    ) -> None:
        require_no_main_import()
        require_no_daemon()
        require_unpatched()
        self.pid = os.getpid()
        self._arena_lock = threading.Lock()
        self.lock = threading.Lock()  # for short steps of Python code in threads that are not the main one alone
        self._beginning = threading.Lock()
        self.closing = False
        self.closed = False
        self._removed = False  # what is written into the segment's blobs from now on, nobody removes
        self._closed_error = closed
        self._on_ended = on_ended
        self._n_ends_outlived = 0  # ends of the program, by signals, that it has caught before its last task here
        self.runs: set[OpenRun] = set()
        self._blob_ids = itertools.count(1)
        self.function_ids = itertools.count(1)
        context = self.context = context_of(mp_context)
        require_directory(context)
        leftovers.reclaim_dead()
        self._retains = retains
        arguments_of = _arguments_of_workers(context, limits)
        try:
            signals.install(self)  # from now on there is something that a signal would leave behind
            self._segment = segment.create(slots, n_workers, claims_max, kept=retains)
        except BaseException:
            self._uninstall_signals()
            raise
        try:
            header = self._segment.header
            name = self.name = self._segment.name
            self.token = header.uuid.hex()[:16]  # what names of staged outputs carry
            self.slots, self.n_workers, claims_max = header.slots, header.workers, header.claims_max  # plain integers
            self._end = CoordinatorEnd(self._segment, retains=retains)
            n_started = 1 if on_demand else self.n_workers  # it begins with a first task
            self.pump = pump = Pump(self._end, n_started, on_demand, memory_limit_bytes, on_exit, ended)
            self.supervisor = Supervisor(
                context,
                lambda worker: (arguments_of(name, worker, claims_max), setup()),
                n_started,
                pump.on_death,
                pump.on_failure,
                pump.nudge,
            )
            _close_at_the_end()
            _open.add(self)
        except BaseException:
            _open.discard(self)
            segment.unlink(self._segment.name)
            self._uninstall_signals()
            raise
        if not on_demand:
            try:
                self._begin()
            except BaseException:
                segment.unlink(name)  # nobody has this pool, to release what it retains
                raise

    def _begin(self) -> None:
        """Start the threads. Raises ``ThreadStartError``, having ended all."""
        try:
            signals.handle()  # where the pool was made by another thread than the main one, and this is that one
            self.pump.staff.supervisor = self.supervisor
            self.supervisor.begin()  # first: to start a process takes longest
            self.pump.begin()
            # As ProcessPoolExecutor's, a first worker is there when submit returns. Or it would be forked while this
            # thread imports what it needs to send a call, a socket's reducer say, and could never import that.
            if _STARTS_NOTHING_AT_THE_END or self.context.get_start_method() == "fork":
                self.supervisor.wait_for_first(FIRST_START_TIMEOUT_S)
        except BaseException as error:
            self._kill()
            if isinstance(error, RuntimeError):  # "can't start new thread"
                raise ThreadStartError(str(error)) from error
            raise

    # ---- tasks

    @property
    def was_used(self) -> bool:
        """Whether its threads and workers are there, or about to be."""
        return self.pump.has_begun or self._beginning.locked()

    @property
    def is_ending(self) -> bool:
        """Whether a signal ends the program, as far as this pool was told: it had no task since."""
        return signals.n_ended() > self._n_ends_outlived

    def check_process(self) -> None:
        """Raise ``WrongProcessError`` in a fork of the program: nothing arrives there, and what it sends would take the
        place of what its parent does. To be asked before a lock is taken, which another thread of the parent may hold.
        """
        self.pump.check_process()

    def check_open(self, *, first: Callable[[], None] | None = None) -> None:
        """Be ready for a task. ``first``: called before the first worker is forked; a fork that is made while another
        thread imports a module can never import that.

        Raises ``WrongProcessError``, what broke the pool, that it is closed, or ``ThreadStartError``.
        """
        self.check_process()
        if signals.n_ended() > self._n_ends_outlived and signals.is_caught():
            self._n_ends_outlived = signals.n_ended()
        if self.pump.broken is not None:
            raise copy.copy(self.pump.broken)  # with a traceback of its own, which leads to nobody else's frames
        if self.closing:
            raise self._closed_error()
        if not self.pump.has_begun:
            if first is not None and self.context.get_start_method() == "fork":
                first()
            with self._beginning:
                if self.closing:  # meanwhile, by another thread, who does not wait for threads that have not begun
                    raise self._closed_error()
                if not self.pump.has_begun:
                    self._begin()

    def task(self, function: int, encoded: values.Encoded, form: int = layout.Form.FILE) -> Task:
        """A task with that payload, inline or as a blob. Raises ``SharedMemoryFullError``."""
        if len(encoded.body) <= INLINE_BYTES and not encoded.buffers:
            return Task(function, encoded.body, 0, form)
        spares = self.pump.parcels.spares
        blob = next(self._blob_ids)
        name = blobs.payload_name(self.name, blob)
        try:
            values.write_blob(name, encoded, spares.take(blobs.size_of(encoded.body, encoded.buffers)))
        except SharedMemoryFullError:
            spares.clear()
            values.write_blob(name, encoded)
        self.keep(name)
        return Task(function, b"", blob, form)

    def keep(self, blob: str) -> None:
        """A blob was written that goes with the segment. Raises that the pool is closed, and removes it, where another
        thread may have removed the segment already: pickling takes its time.
        """
        if self._removed:  # read after the blob was made; ``_finish`` stores it, and then lists the blobs
            blobs.unlink(blob)
            raise self._closed_error()

    def make_arena(self) -> None:
        """Have an arena, for vectors. Raises ``SharedMemoryFullError``, or that the pool is closed."""
        with self._arena_lock:  # not ``lock``: whoever closes the pool meanwhile, in a signal handler, waits for that
            if not self.closing and self.pump.publisher.arena is None:
                n_at_first = self.n_workers + 2
                n_fitting = max(n_at_first, blobs.size_of_place() // CHUNKS_SHARE // CHUNK_BYTES)
                n = min(CHUNKS_PER_WORKER * self.n_workers + CHUNKS_MORE, n_fitting)
                arena = Arena(self.name, n, n_at_first)
                with self.lock:
                    if not self.closing:
                        self.pump.publisher.arena = arena
                        return
                arena.close()  # the segment may be removed already, without this
                arena.unlink()
            if self.closing:
                raise self._closed_error()

    # ---- the end

    def close(self, *, cancel: bool = False) -> None:
        """Stop: run what is queued to its end (``cancel``: drop what has not begun), end the workers, leave nothing.

        Ctrl-C while it waits kills the workers. Safe to call twice, and from any thread; in a
        future's callback, which it would have to wait for, it raises ``WrongThreadError``.
        """
        if self.closed or os.getpid() != self.pid:
            signals.restore()
            return
        self.pump.check_thread("close its pool")
        self.closing = True
        try:
            with self._beginning:  # whoever came before waits for threads to begin; who comes now finds it closing
                pass
            if cancel:  # first: who takes the results of a map, and has its turn, is told then
                self.drop_unstarted()
            for run in self.runs.copy():
                run.end(cancel=cancel)
            self.pump.wait_idle()
            self._end_workers(STOP_TIMEOUT_S)
            self._finish()
        except BaseException:
            self.abort()
            raise

    def close_soon(self, *, cancel: bool = False) -> None:
        """``close``, without waiting for it: from any thread, and while objects are collected."""
        if self.closed or os.getpid() != self.pid:
            return
        self.closing = True
        try:
            threading.Thread(target=self.close, kwargs={"cancel": cancel}, name="ringpool-closer", daemon=True).start()
        except RuntimeError:
            return  # the interpreter ends: it is closed at exit

    def drop_unstarted(self, *, claimed: bool = False) -> None:
        """Cancel what has not begun; with ``claimed`` also what a worker is just about to."""
        if not self.pump.has_begun:  # there was no task ever, and no thread that would answer
            return
        cancel = self.pump.refuse_all if claimed else self.pump.cancel_all
        try:
            dropped: list[Ticket] = self.pump.call(cancel) or []
        except CoordinatorClosedError:
            return
        for ticket in dropped:
            ticket.sink.drop(ticket)
        for sink in {ticket.sink for ticket in dropped}:
            sink.settle()

    def _end_workers(self, timeout_s: float) -> None:
        self.pump.expect_exits()
        with self.lock:
            if self.closed:  # by another thread, meanwhile
                return
            self._end.stop_workers()
        self.supervisor.join(timeout_s)

    def abort(self) -> None:
        """Kill everything now; what was queued or running fails with the error of a closed pool."""
        if self.closed or os.getpid() != self.pid:
            return
        self.closing = True
        if self._beginning.acquire(timeout=ABORT_TIMEOUT_S):  # see ``close``; Ctrl-C may have left it held
            self._beginning.release()
        self._kill()

    def _kill(self) -> None:
        self.closing = True
        self.pump.expect_exits()
        self.supervisor.kill_all()
        self.supervisor.join(ABORT_TIMEOUT_S)
        self._finish()

    def _finish(self) -> None:
        """Each step may be done again: Ctrl-C may come in the middle, and then another way of closing begins anew."""
        try:
            if self._on_ended is not None:
                self._on_ended()
            stopped = self.pump.stop()
        finally:
            if not self._retains:
                with self.lock:
                    self._removed = True
                    segment.unlink(self.name)
        self._uninstall_signals()
        with self.lock:
            if stopped and not self.closed:
                self._end.close()
                if self.pump.publisher.arena is not None:
                    self.pump.publisher.arena.close()
            self.closed = True
        _open.discard(self)

    def _uninstall_signals(self) -> None:
        signals.uninstall(self)
        signals.restore()  # also where another thread, which could not, has closed it meanwhile


def _arguments_of_workers(context: BaseContext, limits: WorkerLimits) -> Callable[[str, int, int], WorkerArguments]:
    """What a worker is started with, by segment, index, and how many claims it may hold; the program as it is now, but
    for its environment.
    """
    mask, main_file, method = umask(), calls.remember_main(), context.get_start_method()
    spins = SPINS if len(os.sched_getaffinity(0)) > 1 else 0  # on one core it keeps others from making work
    if method == "fork":
        main_file = None

    def arguments_of(segment: str, worker: int, claims_max: int) -> WorkerArguments:
        variables = environment() if method == "forkserver" else None
        return WorkerArguments(segment, worker, claims_max, spins, *limits, mask, main_file, variables)

    return arguments_of


def _close_at_the_end() -> None:
    """Have pools closed when this process ends, each time anew: so that it comes before what was imported meanwhile
    wants to do at exit. A process of ``multiprocessing`` ends by its finalizers alone, and then waits for its children.
    """
    global _finalizer
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    if _finalizer is not None:
        _finalizer.cancel()
    _finalizer = Finalize(None, _close_all, exitpriority=_BEFORE_OTHERS)


def _close_after_main() -> None:
    """When the main thread has come to its end: before what a program has registered with ``atexit``, which may remove
    what tasks need. Where other threads of it go on, they may use their pools, and it is done at exit. Those of thread
    pools end now: as they would in a moment.
    """
    signals.main_has_ended()
    thread_pools = sys.modules.get("concurrent.futures.thread")
    try:
        if thread_pools is not None and _open:
            thread_pools._python_exit()
    except BaseException as error:
        if not signals.is_late(error):
            raise
    others = (each for each in threading.enumerate() if each is not threading.main_thread())
    if all(each.daemon for each in others):
        _close_all()


def _close_all() -> None:
    """Drain what is left open; or kill it, where the program ends by an error."""
    failed = _has_failed()
    try:
        for pool in list(_open):
            if failed or pool.is_ending:
                pool.abort()
            else:
                pool.close()
    except BaseException as error:  # from a signal
        for pool in list(_open):
            pool.abort()
        if not signals.is_late(error):
            raise


def _has_failed() -> bool:
    """Whether an exception has ended the program: one that nothing had called it from. A prompt and what has callbacks
    (Tk, Qt, pytest) leave theirs in ``sys.last_traceback`` too, and go on. In a process of ``multiprocessing`` it is on
    its way up to Python 3.12; since then it has been printed, by a module that is imported there for that alone.
    """
    if not isinstance(sys.exc_info()[1], (NoneType, SystemExit)):
        return True
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage]  (nothing else tells what has become of a process)
    while (frame := frame.f_back) is not None:
        if frame.f_code is BaseProcess._bootstrap.__code__:  # pyright: ignore  (as typeshed does not know it)
            return "traceback" in frame.f_locals
    trace = getattr(sys, "last_traceback", None)
    return trace is not None and trace.tb_frame.f_back is None and not hasattr(sys, "ps1")


with contextlib.suppress(RuntimeError):  # imported when the program ends: it is done at exit
    threading._register_atexit(_close_after_main)  # pyright: ignore  (as concurrent.futures does)

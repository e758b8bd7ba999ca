"""RingPoolExecutor: what ``concurrent.futures.ProcessPoolExecutor`` does, on a ring that survives deaths.

submit, submit_with --+
map, map_unordered ---+--> CallPool       imported when one is made, or here, in a program that is going to
options(...) --> a view: the same, with other TaskOptions

What is private to an executor begins with ``_rp_``: a class of your own may have any other name.

A worker imports its program's main module, and with it this one; it makes no pool, and all that a pool is made of would
be most of what it imports.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ringpool import startup
from ringpool.coordinator import numbers
from ringpool.coordinator.taskoptions import TaskOptions as TaskOptions
from ringpool.shm import layout

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext
    from types import ModuleType, TracebackType

    from ringpool.coordinator.callpool import CallPool
    from ringpool.coordinator.pool import Pool
    from ringpool.coordinator.supervisor import Death


class WorkerExit(msgspec.Struct, frozen=True):
    """A worker that ended: its index and pid, the signal that killed it or its exit status, and what for.

    ``reason``: ``"died"``, ``"recycled"`` (it had run its number of tasks, or outgrown its memory), ``"timeout"`` or
    ``"memory"`` (it was killed for a limit).
    """

    index: int
    pid: int
    signal: int | None
    exitcode: int | None
    reason: str


class ExecutorStats(NamedTuple):
    """Counts since the start, and what is under way now; a vector of a map counts as one task."""

    workers_alive: int
    queued: int  # waiting outside the ring
    in_ring: int  # published, not yet delivered
    completed: int
    failed: int
    worker_deaths: int
    retried: int  # tasks tried again after a death
    recycled: int  # workers replaced between tasks
    taken_back: int  # tasks and items taken from a worker that was busy with a long one


class _Tasks(Executor):
    """What an executor and its views have in common: tasks, run with certain options."""

    _rp_options: TaskOptions

    def submit_with(self, options: TaskOptions, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """``submit``, with these options."""
        raise NotImplementedError

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue ``fn(*args, **kwargs)``; its future.

        Whatever keeps the call from being sent, or its result from coming back, is the future's exception. Raises
        ``RuntimeError`` after ``shutdown``, or what broke the pool (a ``BrokenProcessPool``).
        """
        return self.submit_with(self._rp_options, fn, *args, **kwargs)

    def _rp_map(self, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], **how: Any) -> Iterator[Any]:
        raise NotImplementedError

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        return_exceptions: bool = False,
    ) -> Iterator[Any]:
        """``fn`` of each item, in order. Items are drawn as results are taken, so many ahead as keep the workers busy.

        ``timeout``: seconds from now after which taking a result raises ``TimeoutError``. ``chunksize``: items that are
        sent together; None: by themselves, as many as are 8 to 32 ms of work, and they are shared out again
        where one takes longer. Whichever it is, an item's exception, or its worker's death, is that item's alone.
        ``buffersize``: most items drawn whose results were not taken. The first exception is raised when its turn has
        come, and ends the iterator; with ``return_exceptions`` it is given out instead of a result.

        Where a class of your own overrides ``submit``, each item goes through that, see docs/executor.md.
        """
        how = {"timeout": timeout, "chunksize": chunksize, "buffersize": buffersize}
        return self._rp_map(fn, iterables, ordered=True, return_exceptions=return_exceptions, **how)

    def map_unordered(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        return_exceptions: bool = False,
    ) -> Iterator[Any]:
        """``map``, with results in the order in which they arrive."""
        how = {"timeout": timeout, "chunksize": chunksize, "buffersize": buffersize}
        return self._rp_map(fn, iterables, ordered=False, return_exceptions=return_exceptions, **how)


class _Deferred:
    """The ``_rp_calls`` of an executor that has none yet. It is no ``functools.cached_property``: that holds one lock
    for all executors up to Python 3.11, which a fork for another thread's pool would inherit locked; later none at all.
    """

    def __get__(self, executor: RingPoolExecutor, _owner: type | None = None) -> CallPool:
        return executor.make_deferred()


_executors: weakref.WeakValueDictionary[int, RingPoolExecutor] = weakref.WeakValueDictionary()  # by id


def _renew_unused() -> None:
    for executor in list(_executors.values()):
        executor.renew_if_unused()


os.register_at_fork(after_in_child=_renew_unused)


class RingPoolExecutor(_Tasks):
    """A pool of processes that takes any callable. Every argument of ``ProcessPoolExecutor`` means here what it means
    there.

    ``max_workers``: default, one per core that this process may use; at most 64. They are started when tasks wait for
    them. ``mp_context``: ``multiprocessing``, a context of it, or the name of a start method; default ``"forkserver"``.
    ``initializer(*initargs)``: called in each worker first. ``max_tasks_per_child``: a worker is replaced after so many
    tasks. ``memory_per_child_max``: it is replaced between tasks when it has grown beyond so many bytes.
    ``memory_limit``: it is killed when it has, and the task that it runs fails with ``MemoryLimitError``.
    ``on_worker_exit``: called with a ``WorkerExit``, in a thread of the pool. ``forward_logs``: log records of the
    workers reach this process's ``logging``.

    Use it as a context manager: it waits for what was submitted; Ctrl-C, ``SIGTERM`` and ``SIGHUP`` end it at once. A
    task whose worker dies fails with ``WorkerDiedError``, a ``BrokenProcessPool``; the pool goes on.

    Raises ``SharedMemoryFullError``, ``SharedMemoryUnusableError``, ``ValueError`` and ``TypeError`` for arguments,
    ``MainModuleError``, ``DaemonicProcessError``, ``MonkeyPatchedError``, ``WorkingDirectoryError``.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: str | BaseContext | ModuleType | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        memory_limit: int | None = None,
        memory_per_child_max: int | None = None,
        on_worker_exit: Callable[[WorkerExit], object] | None = None,
        forward_logs: bool = True,
    ) -> None:
        n_workers = _n_workers(max_workers)
        if initializer is not None and not callable(initializer):  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError("initializer must be a callable")
        self._max_workers = n_workers  # dask reads it
        self._rp_options = TaskOptions()
        arguments: dict[str, Any] = {
            "n_workers": n_workers,
            "mp_context": mp_context,
            "initializer": initializer,
            "initargs": initargs,
            "max_tasks_per_child": _count("max_tasks_per_child", max_tasks_per_child),
            "memory_limit": _size("memory_limit", memory_limit),
            "memory_per_child_max": _size("memory_per_child_max", memory_per_child_max),
            "on_exit": _teller(on_worker_exit),
            "forward_logs": forward_logs,
        }
        self._rp_arguments: dict[str, Any] | None = arguments
        self._rp_defer()
        if not startup.is_importing_main():  # else it is a global of the main module: its workers rarely use it
            self._rp_make(arguments)
        _executors[id(self)] = self  # no set of them: a subclass may have no hash

    _rp_calls: CallPool = _Deferred()  # pyright: ignore[reportAssignmentType]  (of the class; an executor's own hides it)

    def _rp_defer(self) -> None:
        self._rp_deferred: dict[str, Any] | None = self._rp_arguments
        self._rp_making = threading.Lock()

    def renew_if_unused(self) -> None:
        """In a fork of the program: what had no task yet makes a pool of its own there, when it has one."""
        calls: CallPool | None = self.__dict__.get("_rp_calls")
        if calls is None:
            self._rp_making = threading.Lock()
        elif not calls.pool.was_used and not calls.pool.closing:
            del self._rp_calls
            self._rp_defer()

    def _rp_make(self, arguments: dict[str, Any]) -> None:
        from ringpool.coordinator.callpool import CallPool  # here: see the module

        calls = CallPool(**arguments)
        weakref.finalize(self, calls.pool.close_soon).atexit = False
        self._rp_calls = calls
        self._rp_deferred = None

    def make_deferred(self) -> CallPool:
        """Make what was not made while the main module was imported."""
        with self._rp_making:
            if "_rp_calls" not in self.__dict__:
                if self._rp_deferred is None:
                    raise RuntimeError("cannot schedule new futures after shutdown")
                self._rp_make(self._rp_deferred)
        return self._rp_calls

    def _rp_is_over_unmade(self) -> bool:
        """Whether there was nothing to end: an executor that is not made yet will not be. One that is lets go of the
        initializer's arguments.
        """
        self._rp_arguments = None
        if "_rp_calls" in self.__dict__:
            return False
        with self._rp_making:
            self._rp_deferred = None
        return "_rp_calls" not in self.__dict__

    @property
    def _rp_pool(self) -> Pool:
        return self._rp_calls.pool

    # ---- tasks

    def options(self, *, timeout: float | None = None, retries: int = 0, priority: int = 0) -> ExecutorView:
        """A view of this executor whose tasks are run with these options, see ``TaskOptions``."""
        return ExecutorView(self, TaskOptions(timeout=timeout, retries=retries, priority=priority))

    def submit_with(self, options: TaskOptions, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """``submit``, with these options."""
        if not isinstance(options, TaskOptions):  # pyright: ignore[reportUnnecessaryIsInstance]  (nor may a caller check)
            raise TypeError(f"options must be TaskOptions, not {options!r}")
        return self._rp_calls.submit(options, fn, args, kwargs)

    def _rp_map(self, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], **how: Any) -> Iterator[Any]:
        if not how["ordered"] or getattr(self.submit, "__func__", None) is _Tasks.submit:
            return self.map_with(self._rp_options, fn, iterables, **how)
        from ringpool.coordinator.mapbysubmit import results_by_submit  # here: see the module

        _convert(how)
        del how["ordered"], how["chunksize"]
        return results_by_submit(self.submit, fn, iterables, **how)

    def map_with(
        self, options: TaskOptions, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], **how: Any
    ) -> Iterator[Any]:
        """What ``map`` and ``map_unordered`` are, with these options."""
        _convert(how)
        return self._rp_calls.map(options, fn, iterables, **how)

    # ---- looking in

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The pids of the living workers."""
        return self._rp_pool.supervisor.pids

    def stats(self) -> ExecutorStats:
        """Counts, as they are now."""
        pump = self._rp_pool.pump
        queued, in_ring = pump.in_flight
        return ExecutorStats(
            len(self._rp_pool.supervisor.pids),
            queued,
            in_ring,
            pump.n_completed,
            pump.n_failed,
            pump.staff.n_deaths,
            pump.staff.n_retried,
            pump.staff.n_recycled,
            pump.balance.n_taken_back,
        )

    @property
    def _broken(self) -> BaseException | bool:
        """As ``ProcessPoolExecutor`` has it: whether it can be used no more."""
        return self._rp_pool.pump.broken or False

    # ---- the end

    def terminate_workers(self) -> None:
        """Shut down, and end what runs at once: its futures, and those that wait, fail."""
        if not self._rp_is_over_unmade():
            self._rp_pool.abort()

    kill_workers = terminate_workers

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; run those that were submitted, or with ``cancel_futures`` only those that have begun.

        ``wait``: return when all that is done and the workers are gone; otherwise at once.
        """
        if self._rp_is_over_unmade():
            return
        if wait:
            self._rp_pool.close(cancel=cancel_futures)
        else:
            self._rp_pool.close_soon(cancel=cancel_futures)

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if not self._rp_is_over_unmade() and _is_urgent(error, self._rp_pool):
            self._rp_pool.abort()
        self.shutdown(wait=True)  # of a class of your own, it may be more


class ExecutorView(_Tasks):
    """An executor, seen through other ``TaskOptions``. To shut it down is to shut the executor down."""

    def __init__(self, executor: RingPoolExecutor, options: TaskOptions) -> None:
        self._executor = executor
        self._rp_options = options

    def submit_with(self, options: TaskOptions, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """``submit``, with these options."""
        return self._executor.submit_with(options, fn, *args, **kwargs)

    def _rp_map(self, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], **how: Any) -> Iterator[Any]:
        return self._executor.map_with(self._rp_options, fn, iterables, **how)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """``RingPoolExecutor.shutdown``."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


def _is_urgent(error: BaseException | None, pool: Pool) -> bool:
    """Whether what leaves a block is to end it at once: Ctrl-C, a signal, or a cancellation, which is how asyncio tells
    of Ctrl-C. Not ``sys.exit``, nor the end of a generator; but where they are the answer to Ctrl-C.
    """
    if error is None or isinstance(error, Exception):
        return False
    if not isinstance(error, (SystemExit, GeneratorExit)) or pool.is_ending:
        return True
    return isinstance(error.__context__, KeyboardInterrupt)


def _n_workers(max_workers: int | None) -> int:
    if max_workers is None:
        return min(len(os.sched_getaffinity(0)), layout.WORKERS_MAX)
    n_workers = numbers.whole("max_workers", max_workers)
    if n_workers <= 0:
        raise ValueError("max_workers must be greater than 0")
    if n_workers > layout.WORKERS_MAX:
        raise ValueError(f"max_workers must be at most {layout.WORKERS_MAX}, not {n_workers}")
    return n_workers


def _convert(how: dict[str, Any]) -> None:
    """Numbers that a map is given, to ``int`` and ``float``. Raises ``TypeError`` and ``ValueError``."""
    for name in ("chunksize", "buffersize"):
        how[name] = _count(name, how[name])
    if how["timeout"] is not None:
        how["timeout"] = numbers.real("timeout", how["timeout"])


def _count(name: str, count: Any) -> int | None:
    if count is None:
        return None
    n = numbers.whole(name, count, "an integer or None")
    if n < 1:
        raise ValueError(f"{name} must be >= 1")
    return n


def _size(name: str, size: Any) -> int | None:
    if size is None:
        return None
    n_bytes = numbers.whole(name, size)
    if n_bytes <= 0:
        raise ValueError(f"{name} must be above 0 bytes, not {n_bytes!r}")
    return n_bytes


def _teller(on_worker_exit: Callable[[WorkerExit], object] | None) -> Callable[[Death, str], None] | None:
    if on_worker_exit is None:
        return None
    if not callable(on_worker_exit):  # pyright: ignore[reportUnnecessaryComparison]
        raise TypeError(f"on_worker_exit must be a callable, not {on_worker_exit!r}")

    def tell(death: Death, reason: str) -> None:
        on_worker_exit(WorkerExit(death.index, death.pid, death.signal, death.exitcode, reason))

    return tell


if not startup.is_for_workers():
    from ringpool.coordinator import callpool as callpool  # now: who makes a pool waits for its first result

__all__ = ["ExecutorStats", "ExecutorView", "RingPoolExecutor", "TaskOptions", "WorkerExit"]

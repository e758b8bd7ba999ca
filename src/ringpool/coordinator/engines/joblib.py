"""joblib's backend ``"ringpool"``: the batches of a ``joblib.Parallel`` run on a ``RingPoolExecutor``.

Parallel call --configure--> the pool that the last call left, if it was made in the same way; else a new one
              --submit-----> executor.submit(batch) --done--> joblib takes the result, and submits the next batch
              --terminate--> the pool is kept for the next call, for a while: workers have imported what batches need
              --abort------> its workers are killed: after an error, a timeout, Ctrl-C, a generator that is not read on

A ``Parallel`` inside a task gets what joblib's own process backends give it: threads, and inside those no more.

Source of what a backend must do: ``joblib._parallel_backends.ParallelBackendBase`` (joblib 1.5 and 1.6).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any

import joblib  # pyright: ignore[reportMissingModuleSource]
from joblib.parallel import (  # pyright: ignore[reportMissingModuleSource]
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from ringpool.coordinator import numbers
from ringpool.coordinator.executor import RingPoolExecutor
from ringpool.errors import PoolError
from ringpool.shm.layout import WORKERS_MAX
from ringpool.workers import calls

NAME = "ringpool"
IDLE_WORKER_TIMEOUT_S = 300.0  # as joblib's own
SHARED_BYTES_MIN = 1 << 20  # as joblib's own, where nobody says max_nbytes
# What joblib hands to every backend: how it shares arrays, see ``_shared_bytes_min``, and hints that it heeds itself.
_NOT_OURS = frozenset({"max_nbytes", "mmap_mode", "temp_folder", "prefer", "require", "verbose", "context"})
_SHARING = ("max_nbytes", "mmap_mode")
_THREADS = {"openmp": "OMP_NUM_THREADS", "blas": "OPENBLAS_NUM_THREADS"}  # by threadpoolctl's names


def register() -> None:
    """Make the backend known to joblib in this process."""
    joblib.register_parallel_backend(NAME, RingPoolBackend)


class RingPoolBackend(AutoBatchingMixin, ParallelBackendBase):
    """What ``joblib.Parallel(backend="ringpool")`` talks to. joblib makes it.

    Keywords, of ``joblib.parallel_config`` or of ``Parallel``: those of ``RingPoolExecutor``, and
    ``idle_worker_timeout`` (seconds for which workers are kept after a call, for the next). An array of less than
    ``max_nbytes`` is a task's own, to be written to; others are read-only and shared, unless ``max_nbytes`` is None,
    or ``mmap_mode`` another one than ``"r"``: nothing that a task writes is seen elsewhere. Where nobody gives
    ``n_jobs`` it is -1, all cores, since who names a backend wants it used. A batch whose worker dies raises
    ``WorkerDiedError``.
    """

    supports_retrieve_callback = True  # and with it timeout= and return_as="generator"
    supports_inner_max_num_threads = True
    default_n_jobs = -1

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._pool: _Pool | None = None
        self._shared_bytes_min: float = SHARED_BYTES_MIN

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many workers that means: negative numbers count down from all cores, -1; no pool has more than 64.

        One in a daemonic process of ``multiprocessing``, which may have no workers; with a warning, as loky's.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or n_jobs == 1:
            return 1
        if multiprocessing.current_process().daemon:
            warnings.warn("ringpool: a daemonic process can have no workers, setting n_jobs=1", stacklevel=3)
            return 1
        return min(n_jobs if n_jobs > 0 else max(joblib.cpu_count() + 1 + n_jobs, 1), WORKERS_MAX)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: str | None = None,
        require: str | None = None,
        **keywords: Any,
    ) -> int:
        """Get a pool ready for a call; its number of workers. One needs none: joblib runs the tasks itself then."""
        n_workers = self.effective_n_jobs(n_jobs)
        if n_workers == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        given = {**self.backend_kwargs, **keywords}
        options = {name: value for name, value in given.items() if name not in _NOT_OURS}
        self.parallel = parallel
        self._shared_bytes_min = _shared_bytes_min(**{name: given[name] for name in _SHARING if name in given})
        self._pool = _take(n_workers, options, self._prepare_worker_env(n_workers))
        return n_workers

    def submit(self, func: Callable[[], Any], callback: Callable[[Future[Any]], None] | None = None) -> Future[Any]:
        """Queue a batch. The callback, in the pump's thread, takes its result and queues the next one."""
        if self._pool is None:
            raise PoolError("this joblib.Parallel has no pool any more: its call was aborted")
        future = self._pool.executor.submit(Batch(func, self._shared_bytes_min))
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """What the batch returned; raises what it raised."""
        try:
            return out.result()
        except CancelledError as error:
            raise PoolError("this joblib.Parallel was aborted before the batch had begun") from error

    def terminate(self) -> None:
        """The call is over: keep the pool for the next one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            _keep(pool)
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Kill the workers with what they run; ``ensure_ready``: and have new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.executor.kill_workers()
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel, **self.parallel._backend_kwargs)


# ---- what is sent


def _shared_bytes_min(max_nbytes: float | None = SHARED_BYTES_MIN, mmap_mode: str | None = "r") -> float:
    """From what size on an array is not a task's own, in bytes; below 4 KiB it may be. Source: ``joblib.Parallel``."""
    return math.inf if max_nbytes is None or mmap_mode != "r" else max_nbytes


class Batch:
    """A batch of joblib's on its way to a worker, where it is what ``function`` was."""

    def __init__(self, function: Callable[[], Any], shared_bytes_min: float) -> None:
        self._function = function
        self._shared_bytes_min = shared_bytes_min

    def __call__(self) -> Any:
        """What the batch returns."""
        return self._function()

    def __reduce__(self) -> tuple[Any, ...]:
        buffers: list[memoryview] = []
        body = calls.dumps(self._function, buffers, buffer_bytes_min=self._shared_bytes_min)
        return _rebuilt, (body, *map(pickle.PickleBuffer, buffers))


def _rebuilt(body: bytes, *buffers: memoryview) -> Any:
    return calls.rebuild(body, list(buffers))


# ---- what a worker does first


def _prepare(
    environment: Mapping[str, str], initializer: Callable[..., Any] | None, arguments: tuple[Any, ...]
) -> None:
    """Let BLAS and OpenMP in this worker have its share of the cores, and let its tasks name the backend too."""
    os.environ.update(environment)  # read by libraries when they are loaded
    register()
    try:
        import threadpoolctl  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:  # for those that the fork server has loaded already
        limits = {api: int(environment[name]) for api, name in _THREADS.items() if environment[name].isdigit()}
        threadpoolctl.threadpool_limits(limits)  # pyright: ignore[reportUnknownMemberType]
    if initializer is not None:
        initializer(*arguments)


# ---- one pool is kept between calls


class _Pool:
    """An executor, and in what way it was made."""

    def __init__(self, n_workers: int, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.way = (os.getpid(), n_workers, dict(options), dict(environment))
        more = dict(options)
        self._idle_timeout_s = _idle_timeout_of(more.pop("idle_worker_timeout", IDLE_WORKER_TIMEOUT_S))
        preparation = (environment, more.pop("initializer", None), more.pop("initargs", ()))
        self.executor = RingPoolExecutor(n_workers, initializer=_prepare, initargs=preparation, **more)
        self._timer: threading.Timer | None = None

    def begin_idling(self) -> None:
        """Call before it is kept."""
        self._timer = threading.Timer(self._idle_timeout_s, self._end_idling)
        self._timer.daemon = True
        self._timer.start()

    def stop_idling(self) -> None:
        """Call when it was taken."""
        if self._timer is not None:
            self._timer.cancel()

    def _end_idling(self) -> None:
        try:
            _kept.remove(self)
        except ValueError:  # somebody has just taken it
            return
        self.executor.shutdown()


def _idle_timeout_of(given: Any) -> float:
    """Seconds; None means for ever. Raises ``TypeError``, ``ValueError``."""
    timeout_s = math.inf if given is None else numbers.real("idle_worker_timeout", given)
    if not timeout_s >= 0:
        raise ValueError(f"idle_worker_timeout must be 0 seconds or more, not {given!r}")
    return min(timeout_s, threading.TIMEOUT_MAX)


_kept: deque[_Pool] = deque()  # at most one; who removes it, has it


def _take(n_workers: int, options: Mapping[str, Any], environment: Mapping[str, str]) -> _Pool:
    try:
        pool = _kept.pop()
    except IndexError:
        return _Pool(n_workers, options, environment)
    pool.stop_idling()
    try:
        if pool.way == (os.getpid(), n_workers, options, environment):
            return pool
    except Exception:  # of an array among ``initargs``, say: no two are known to be the same
        pass
    pool.executor.shutdown()  # in a fork of its process, does nothing
    return _Pool(n_workers, options, environment)


def _keep(pool: _Pool) -> None:
    release_kept_pool()
    try:
        pool.begin_idling()
    except RuntimeError:  # the interpreter ends, and starts no thread any more
        pool.executor.shutdown()
    else:
        _kept.append(pool)


def release_kept_pool() -> None:
    """End the workers that wait for the next ``Parallel`` call, if there are any; it makes new ones."""
    while _kept:
        try:
            pool = _kept.pop()
        except IndexError:
            return
        pool.stop_idling()
        pool.executor.shutdown()

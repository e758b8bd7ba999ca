"""The pools that people use, and ours: opened alike, and each used as is best for it.

    package           many items                                       one task                 opened as
    ringpool          map, map_unordered                               submit                   RingPoolExecutor
    multiprocessing   Pool.map; imap_unordered, chunks of 1, 64, 4096  apply, apply_async       Pool
    concurrent        map, chunks of 1, 64, 1024                       submit                   ProcessPoolExecutor
    joblib            Parallel, batches by itself or of 1024           -                        Parallel as a context
    mpire             map_unordered, chunks by itself                  -                        WorkerPool, keep_alive
    pebble            map, chunks of 64                                schedule                 ProcessPool
    loky              map, chunks of 1, 64                             submit                   ProcessPoolExecutor

Why so: ``Parallel`` as a context keeps what it has learned about batches from call to call. Of mpire's four maps,
``map_unordered`` is the fastest, with chunks by itself (a 128th of the list); ``keep_alive`` spares it new workers.
pebble is no faster with longer chunks. Chunks of 1024 and 4096 are what a patient user would find by trying. All start
by ``forkserver`` but loky, which has its own way, and do not fork a process that has threads.

All pools of a case stay open from round to round, and are idle while others have their turn. That costs those little:
mpire, the most restless, takes 1.6 % of a core then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import multiprocessing.pool
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

from ringpool.coordinator.executor import RingPoolExecutor

OPTIONAL = ("joblib", "mpire", "pebble", "loky")

MAP = "RingPoolExecutor.map"
MAP_UNORDERED = "RingPoolExecutor.map_unordered"
POOL_MAP = "Pool.map"
IMAP_1, IMAP_64, IMAP_4096 = (f"Pool.imap_unordered, chunks of {n}" for n in (1, 64, 4096))
FUTURES_MAP_1, FUTURES_MAP_64, FUTURES_MAP_1024 = (f"ProcessPoolExecutor.map, chunks of {n}" for n in (1, 64, 1024))
JOBLIB, JOBLIB_1024 = "joblib.Parallel", "joblib.Parallel, batches of 1024"
MPIRE = "mpire.map_unordered"
PEBBLE_64 = "pebble.map, chunks of 64"
LOKY_1, LOKY_64 = (f"loky.map, chunks of {n}" for n in (1, 64))

SUBMIT = "RingPoolExecutor.submit"
FUTURES_SUBMIT = "ProcessPoolExecutor.submit"
APPLY_ASYNC = "Pool.apply_async"
PEBBLE_SCHEDULE = "pebble.schedule"
LOKY_SUBMIT = "loky.submit"

Call = Callable[[Any], Any]
Map = Callable[["Pools", Call, Iterable[Any]], Iterable[Any]]
Submit = Callable[["Pools", Call, Any], "Promise"]


class Pools:
    """A pool of each kind, with ``workers`` processes, opened when it is first asked for; closed together."""

    def __init__(self, workers: int = 2) -> None:
        self._workers = workers
        self._context = multiprocessing.get_context("forkserver")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Pools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def ring(self) -> RingPoolExecutor:
        """Ours."""
        return self._stack.enter_context(RingPoolExecutor(self._workers, self._context))

    @cached_property
    def pool(self) -> multiprocessing.pool.Pool:
        """Of the standard library."""
        pool = self._context.Pool(self._workers)
        self._stack.callback(pool.join)
        self._stack.callback(pool.terminate)
        return pool

    @cached_property
    def futures(self) -> ProcessPoolExecutor:
        """Of the standard library."""
        return self._stack.enter_context(ProcessPoolExecutor(self._workers, self._context))

    @cached_property
    def joblib(self) -> Callable[[Iterable[Any]], Any]:
        """Batches by itself."""
        return self._parallel()

    @cached_property
    def joblib_1024(self) -> Callable[[Iterable[Any]], Any]:
        """With the batches that are best for no-ops."""
        return self._parallel(batch_size=1024)

    def _parallel(self, **options: Any) -> Callable[[Iterable[Any]], Any]:
        joblib: Any = import_module("joblib")
        loky: Any = import_module("joblib.externals.loky")
        # The executor is shared by all of a program's Parallels, and outlives them.
        self._stack.callback(lambda: loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True))
        return self._stack.enter_context(joblib.Parallel(n_jobs=self._workers, **options))

    @cached_property
    def mpire(self) -> Any:
        """Keeps its workers from call to call."""
        pool = import_module("mpire").WorkerPool(n_jobs=self._workers, start_method="forkserver", keep_alive=True)
        self._stack.callback(pool.stop_and_join)
        return pool

    @cached_property
    def pebble(self) -> Any:
        """Its map takes chunks; its futures have timeouts."""
        pool = import_module("pebble").ProcessPool(self._workers, context=self._context)
        self._stack.callback(pool.join)
        self._stack.callback(pool.stop)
        return pool

    @cached_property
    def loky(self) -> Any:
        """What joblib is built on."""
        executor = import_module("loky").ProcessPoolExecutor(self._workers)
        self._stack.callback(lambda: executor.shutdown(wait=True, kill_workers=True))
        return executor


# ---- many items


def _joblib(parallel: Callable[[Iterable[Any]], Any], call: Call, items: Iterable[Any]) -> Any:
    return parallel(map(import_module("joblib").delayed(call), items))


MAPS: dict[str, Map] = {
    MAP: lambda pools, call, items: pools.ring.map(call, items),
    MAP_UNORDERED: lambda pools, call, items: pools.ring.map_unordered(call, items),
    POOL_MAP: lambda pools, call, items: pools.pool.map(call, items),
    IMAP_1: lambda pools, call, items: pools.pool.imap_unordered(call, items, 1),
    IMAP_64: lambda pools, call, items: pools.pool.imap_unordered(call, items, 64),
    IMAP_4096: lambda pools, call, items: pools.pool.imap_unordered(call, items, 4096),
    FUTURES_MAP_1: lambda pools, call, items: pools.futures.map(call, items),
    FUTURES_MAP_64: lambda pools, call, items: pools.futures.map(call, items, chunksize=64),
    FUTURES_MAP_1024: lambda pools, call, items: pools.futures.map(call, items, chunksize=1024),
    JOBLIB: lambda pools, call, items: _joblib(pools.joblib, call, items),
    JOBLIB_1024: lambda pools, call, items: _joblib(pools.joblib_1024, call, items),
    MPIRE: lambda pools, call, items: pools.mpire.map_unordered(call, items),
    PEBBLE_64: lambda pools, call, items: pools.pebble.map(call, items, chunksize=64).result(),
    LOKY_1: lambda pools, call, items: pools.loky.map(call, items),
    LOKY_64: lambda pools, call, items: pools.loky.map(call, items, chunksize=64),
}


# ---- one task


class Promise(Protocol):
    """A future, or what Pool has for one."""

    def result(self) -> Any: ...


class _Applied:
    """What ``apply_async`` gives, as a future."""

    def __init__(self, applied: multiprocessing.pool.ApplyResult[Any]) -> None:
        self.result = applied.get


SUBMITS: dict[str, Submit] = {
    SUBMIT: lambda pools, call, item: pools.ring.submit(call, item),
    FUTURES_SUBMIT: lambda pools, call, item: pools.futures.submit(call, item),
    APPLY_ASYNC: lambda pools, call, item: _Applied(pools.pool.apply_async(call, (item,))),
    PEBBLE_SCHEDULE: lambda pools, call, item: pools.pebble.schedule(call, (item,)),
    LOKY_SUBMIT: lambda pools, call, item: pools.loky.submit(call, item),
}


def submit_all(submit: Submit) -> Map:
    """All items submitted, then all results taken."""

    def run(pools: Pools, call: Call, items: Iterable[Any]) -> list[Any]:
        return [promise.result() for promise in [submit(pools, call, item) for item in items]]

    return run


# ---- what is not installed


def installed(names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose packages are there."""
    return [name for name in names if _package(name) not in missing()]


def missing() -> list[str]:
    """The optional packages that are not installed."""
    return [package for package in OPTIONAL if importlib.util.find_spec(package) is None]


def without(names: Iterable[str]) -> str:
    """What a title says of those of ``names`` that cannot be measured."""
    absent = sorted({_package(name) for name in names} & set(missing()))
    return f" (not installed: {', '.join(absent)})" if absent else ""


def _package(name: str) -> str:
    return name.partition(".")[0]

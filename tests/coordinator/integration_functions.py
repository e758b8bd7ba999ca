"""Functions that other people's schedulers run on ringpool's workers. Worker processes import this module."""

from __future__ import annotations

import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.task_functions import wait_for

MARK = "unset"


def square(x: int) -> int:
    return x * x


def process_id(_: object = None) -> int:
    return os.getpid()


def fail(word: str) -> None:
    raise ValueError(word)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell_and_wait(begun: Path, gate: Path) -> int:
    """Say by ``begun``, which gets this process's pid, that it runs; and wait for ``gate``."""
    part = begun.with_suffix(f".{os.getpid()}")
    part.write_text(str(os.getpid()))
    part.rename(begun)
    wait_for(gate)
    return os.getpid()


def wait_for_then_fail(begun: Path, word: str) -> None:
    wait_for(begun)
    raise ValueError(word)


def set_mark(mark: str) -> None:
    global MARK
    MARK = mark


def get_mark() -> str:
    return MARK


def total(array: Any) -> float:
    return float(array.sum())


# ---- pools inside workers


def nested_threads(n: int) -> tuple[list[int], set[int], str]:
    """What a ``joblib.Parallel`` without a backend gives inside a task: results, pids, and the backend's name."""
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=2)
    values = parallel(delayed(square)(i) for i in range(n))
    pids = set(parallel(delayed(process_id)() for _ in range(4)))
    return values, pids, type(parallel._backend).__name__


def nested_by_name(n: int) -> tuple[list[int], set[int]]:
    """A ``joblib.Parallel`` that names ringpool's backend inside a task: results, and the pids that it used."""
    from joblib import Parallel, delayed

    from ringpool.coordinator.engines.joblib import release_kept_pool

    with Parallel(n_jobs=2, backend="ringpool") as parallel:
        values = parallel(delayed(square)(i) for i in range(n))
        pids = set(parallel(delayed(process_id)() for _ in range(4)))
    release_kept_pool()
    return values, pids


def nested_ringpool(n: int) -> tuple[int, int]:
    """A pool of one's own inside a task: a sum, and the pid of its worker."""
    from ringpool import RingPoolExecutor

    with RingPoolExecutor(1) as own:
        return sum(own.map(square, range(n))), own.submit(process_id).result()


def nested_process_pool(n: int) -> int:
    with ProcessPoolExecutor(1) as own:
        return sum(own.map(square, range(n)))


def blas_threads() -> list[int]:
    """How many threads each BLAS of this process would use."""
    import numpy as np
    import threadpoolctl

    np.ones((4, 4)) @ np.ones((4, 4))
    return [found["num_threads"] for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]


def in_a_daemonic_process() -> tuple[list[int], int, list[tuple[str, bool]]]:
    """Where joblib runs its tasks, this process's pid, and by what pools are refused."""
    import joblib

    import ringpool

    ringpool.register_joblib_backend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pids = joblib.Parallel(n_jobs=2, backend="ringpool")([joblib.delayed(process_id)()] * 3)
    refused: list[tuple[str, bool]] = []
    for make in (ringpool.RingPoolExecutor, ringpool.Coordinator):
        try:
            make(1)
        except AssertionError as error:
            refused.append((type(error).__name__, "not allowed to have children" in str(error)))
    return pids, os.getpid(), refused


def write_into(array: Any) -> float:
    """The sum of the ``array``, whose first element is 1 from now on."""
    array[0] = 1
    return float(array.sum())

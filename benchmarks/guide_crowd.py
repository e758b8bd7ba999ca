"""Several threads or processes that do the same at once, each to files of its own: what they did, and how fast.

thread      in this process; they share one operation
process     forked; each begins an operation of its own, and all wait for each other before the clock starts
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

FILES = 48  # a multiple of all numbers of workers
STUCK_S = 60.0  # without a word from a worker: something is wrong
_fork = multiprocessing.get_context("fork")


class Crowd(NamedTuple):
    """So many workers."""

    workers: int
    kind: str

    def __str__(self) -> str:
        plural = "" if self.workers == 1 else "e" * self.kind.endswith("s") + "s"
        return f"{self.workers} {self.kind}{plural}"


Operation = Callable[[int], object]  # what is done to the file of a number
Begin = Callable[[], Operation]  # called in each process; threads share what it returns


class Work(NamedTuple):
    """What a crowd did: operations by worker, in how many seconds."""

    counts: list[int]
    spent_s: float

    @property
    def rate_per_s(self) -> float:
        """Of all workers together."""
        return sum(self.counts) / self.spent_s


def operate(operation: Operation, files: Sequence[int], end_s: float) -> tuple[int, float]:
    """Do it to the files in turn; how often, and when the last one ended."""
    count, now_s = 0, time.perf_counter()
    for number in itertools.cycle(files):
        if now_s >= end_s:
            break
        operation(number)
        count, now_s = count + 1, time.perf_counter()
    return count, now_s


def serve(begin: Begin, files: Sequence[int], turn_s: float, gate: Any, results: Any) -> None:
    """In a process: one worker's part."""
    operation = begin()
    operation(files[0])
    gate.wait(STUCK_S)
    results.put(operate(operation, files, time.perf_counter() + turn_s))


def work(crowd: Crowd, begin: Begin, turn_s: float, n_files: int = FILES) -> Work:
    """Let a crowd work at once for ``turn_s``, each on files of its own; a first go of each is not counted."""
    shares = [range(worker, n_files, crowd.workers) for worker in range(crowd.workers)]
    if crowd.kind == "process":
        return _in_processes(begin, shares, turn_s)
    operation = begin()
    done: list[tuple[int, float]] = []
    for files in shares:
        operation(files[0])
    began_s = time.perf_counter()
    end_s = began_s + turn_s
    if crowd.workers == 1:
        done.append(operate(operation, shares[0], end_s))
    else:

        def body(files: Sequence[int]) -> None:
            done.append(operate(operation, files, end_s))

        threads = [threading.Thread(target=body, args=(files,)) for files in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return _work(done, began_s, crowd.workers)


def _in_processes(begin: Begin, shares: Sequence[Sequence[int]], turn_s: float) -> Work:
    gate, results = _fork.Barrier(len(shares) + 1), _fork.Queue()
    processes = [_fork.Process(target=serve, args=(begin, files, turn_s, gate, results)) for files in shares]
    for process in processes:
        process.start()
    gate.wait(STUCK_S)
    began_s = time.perf_counter()
    done = [results.get(timeout=STUCK_S) for _ in processes]
    for process in processes:
        process.join()
    return _work(done, began_s, len(shares))


def _work(done: Sequence[tuple[int, float]], began_s: float, workers: int) -> Work:
    if len(done) != workers:
        raise RuntimeError(f"{workers - len(done)} of {workers} workers failed")
    return Work([count for count, _ in done], max(ended_s for _, ended_s in done) - began_s)


def rates(crowd: Crowd, begins: Mapping[str, Begin], turn_s: float, n: int = FILES) -> dict[str, Callable[[], float]]:
    """Contestants; their figure is how many operations a second the crowd does."""
    return {name: lambda begin=begin: work(crowd, begin, turn_s, n).rate_per_s for name, begin in begins.items()}

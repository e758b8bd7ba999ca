"""What a pool adds to tasks that are worth one: the CPU of all its processes; and, to file work, all of it.

    case         contestants                                                                 bar
    cost-cpu     1 ms of computing a task, one by one: the CPU of all processes, less what   30 us a task
                 each task says that it took itself
    cost-locks   1 KiB files in memory, read, 100 us of computing, written whole, under a    95 % of two processes
                 lock for each output: run_file_tasks, one by one and in groups, and Job     without a pool

    python -m benchmarks costs [--quick] [--json FILE]        or one of them, by name

The kernel counts a process's CPU in steps of 10 ms: a turn has seconds of it. Two processes without a pool take the
same locks (``PathLock``) and write at the same level (``atomic_write``, ``atomic``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_dispatch import Split
from benchmarks.bench_pools import calibrate
from benchmarks.pool_tasks import compute, compute_timed

from ringpool import Coordinator, Job, PathLock, atomic_write
from ringpool.bench import measure, peers
from ringpool.bench.measure import Case, Claim, at_least, at_most
from ringpool.bench.peers import Pools
from ringpool.coordinator.coordinator import FileTask
from ringpool.shm import segment

WORKERS = 2
ALONE_LOCKED = "two processes alone, PathLock and atomic_write"
RUN, JOB = "run_file_tasks with outputs", "Job, its ledger included"
RUN_GROUPS = "run_file_tasks with outputs, group_commit"
ONE_BY_ONE = (peers.SUBMIT, peers.FUTURES_SUBMIT, peers.APPLY_ASYNC, peers.PEBBLE_SCHEDULE, peers.LOKY_SUBMIT)
MAPPED = (peers.MAP, peers.IMAP_1)
EXTRA_US_MAX = 30
FILE_BYTES = 1024
DIRECTORIES = 64
LOCKED_SHARE = 0.1  # of a millisecond, that the computing takes


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int
    tasks: int
    files: int


FULL = Scale(measure.ROUNDS, 2_000, 20_000)
QUICK = Scale(measure.QUICK_ROUNDS, 1_000, 5_000)


# ---- CPU


def bench_cpu(quick: bool) -> Iterator[Case]:
    """The CPU that a task takes beyond its own, one by one; and mapped, without a chunk size."""
    scale = QUICK if quick else FULL
    items = [calibrate()] * scale.tasks
    with Pools(WORKERS) as pools:
        runs: dict[str, Callable[[], float]] = {}
        for name in peers.installed((*ONE_BY_ONE, *MAPPED)):
            way = peers.MAPS.get(name) or peers.submit_all(peers.SUBMITS[name])
            runs[name] = _extra_us(lambda some, way=way: way(pools, compute_timed, some), items)
        extra, others = measure.take_turns(runs, scale.rounds)
    title = f"CPU of all processes for a task of 1 ms, less what it says that it took{peers.without(ONE_BY_ONE)}"
    yield Case(f"cost-cpu, each round: {title}", "us/task", extra, [], others)
    medians = {name: [statistics.median(figures)] for name, figures in extra.items()}
    claims = [Claim(name, None, at_most(EXTRA_US_MAX)) for name in (peers.SUBMIT, peers.MAP)]
    yield Case(f"cost-cpu, median: {title}", "us/task", medians, claims, others)


def _extra_us(run: Callable[[Sequence[Any]], Iterable[int]], items: Sequence[Any]) -> Callable[[], float]:
    def turn() -> float:
        list(run(items[: len(items) // 10]))  # workers are awake, and batches have their size
        before = measure.cpu_s()
        own_ns = sum(run(items))
        after = measure.cpu_s()
        return (1e6 * (sum(after) - sum(before)) - own_ns / 1000) / len(items)

    return turn


# ---- file work under locks


def copy_computed(src: bytes, dst: bytes, *, iterations: int) -> int:
    """Read, compute, write."""
    with open(src, "rb", buffering=0) as file:
        data = file.read()
    value = compute(iterations)
    with open(dst, "wb", buffering=0) as file:
        file.write(data)
    return value


def _copy_locked(pair: str, iterations: int) -> None:
    src, dst = pair.split("\0")
    with PathLock(dst):
        data = Path(src).read_bytes()
        compute(iterations)
        atomic_write(dst, data, durability="atomic")


def bench_locks(quick: bool) -> Iterator[Case]:
    """Files whose outputs are written whole, each under its lock."""
    scale = QUICK if quick else FULL
    iterations = round(LOCKED_SHARE * calibrate())
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir=segment.SHM_DIRECTORY))
        names = [f"{i % DIRECTORIES:02}/{i:06}.bin" for i in range(scale.files)]
        for i in range(DIRECTORIES):
            os.makedirs(f"{root}/in/{i:02}")
        for name in names:
            Path(f"{root}/in/{name}").write_bytes(os.urandom(FILE_BYTES))

        def make_places() -> None:
            shutil.rmtree(f"{root}/out", ignore_errors=True)
            for i in range(DIRECTORIES):
                os.makedirs(f"{root}/out/{i:02}")
            os.makedirs(f"{root}/out/.ringpool")  # one base for all locks

        make_places()
        pairs = [f"{root}/in/{name}\0{root}/out/{name}" for name in names]
        split = Split(WORKERS, pairs, partial(_copy_locked, iterations=iterations))
        stack.callback(split.close)
        pool = stack.enter_context(Coordinator(WORKERS, durability="atomic"))
        files = [FileTask(Path(f"{root}/in/{name}"), Path(f"{root}/out/{name}")) for name in names]

        def run_files(some: Sequence[Any], *, group_commit: bool = False) -> None:
            params = {"iterations": iterations}
            results = list(pool.run_file_tasks(copy_computed, some, params=params, group_commit=group_commit))
            if any(result.error is not None for result in results) or len(results) != len(some):
                raise RuntimeError(f"{len(results)} results, the first {results[:1]}")

        def run_job(some: Sequence[Any]) -> None:
            output = f"{root}/out/{{relpath}}"
            job = Job(copy_computed, f"{root}/in", output, params={"iterations": iterations}, durability="atomic")
            done = job.run(WORKERS).progress.done
            if done != len(some):
                raise RuntimeError(f"the job did {done} of {len(some)} files")

        in_groups = partial(run_files, group_commit=True)
        ways = {ALONE_LOCKED: split.run, RUN: run_files, RUN_GROUPS: in_groups, JOB: run_job}
        runs = {name: _cleaned(measure.rate_per_s(way, files), make_places) for name, way in ways.items()}
        series, others = measure.take_turns(runs, scale.rounds)
    claims = [Claim(name, ALONE_LOCKED, at_least(0.95)) for name in (RUN, RUN_GROUPS)] + [Claim(JOB, ALONE_LOCKED)]
    title = f"cost-locks: {scale.files:,} files, 100 us of computing each, a lock for each output"
    yield Case(title, "files/s", series, claims, others)


def _cleaned(turn: Callable[[], float], after: Callable[[], None]) -> Callable[[], float]:
    def cleaned() -> float:
        figure = turn()
        after()
        return figure

    return cleaned


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {"cost-cpu": bench_cpu, "cost-locks": bench_locks}

"""ringpool beside the guide that it grew out of, and beside that guide's own figures (``guide_baseline`` has its way).

    operations a second    1 thread   4 threads   2 processes      the guide's table: each cell is a bar
    guide-write               1,000       3,500           800      written in place, under a lock
    guide-read                5,000      15,000         2,000      a whole file
    guide-atomic                800       2,800           600      temporary file and rename
    guide-transaction           500       1,800           400      3 files, all or none

    case           contestants                                                              bar
    guide-locks    pairs and Jain's index on one lock: FileLock, PathLock                   index: at least 0.9
                   a lock for each file beside one for all, theirs and ours                 (reported)
    guide-memory   the peak of a fresh process: states of files, locks, queued tasks        (reported)
    guide-queue    a JSON file as task queue, 1,000 long / run_file_tasks, 2 workers        1000x, no-ops
    guide-status   set and get among 100 and 10,000 files: text in memory / the table       (reported)

    python -m benchmarks guide [--quick] [--json FILE]        or some of them, by name

Files have 1 KiB and lie on disk, below the temporary directory. The guide syncs nothing, so bars are for what may be
lost at a power cut (``none``, ``atomic``); ``full``, with fsync of file and directory, is reported for both. Each
worker has files of its own among 48: contention is the matter of guide-locks. A bar is for the worst round.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import guide_memory
from benchmarks.bench_dispatch import no_op, read_and_compute
from benchmarks.bench_locks import jain
from benchmarks.guide_baseline import (
    FileLocks,
    JsonQueue,
    LockedFiles,
    LockedWriter,
    TextStatus,
    Transaction,
    run_queue,
)
from benchmarks.guide_crowd import FILES, Begin, Crowd, Operation, rates, work
from filelock import FileLock

from ringpool import Coordinator, FileState, FileStatusTable, FileStore, FileTransaction, PathLock, atomic_write
from ringpool.bench import measure
from ringpool.bench.measure import Case, Claim, at_least

CONTENT = os.urandom(1024)
TRANSACTION_FILES = 3
QUEUE_TASKS = 1000
_fork = multiprocessing.get_context("fork")


class Scale(NamedTuple):
    """How much is measured. ``turn_s``: of each contestant; ``served``: tasks of the JSON queue that are run."""

    rounds: int
    turn_s: float
    served: int
    tasks: int
    tracked: int
    locked: int


FULL = Scale(measure.ROUNDS, 0.3, 300, 300_000, 100_000, 10_000)
QUICK = Scale(measure.QUICK_ROUNDS, 0.12, 60, 100_000, 20_000, 2_000)


# ---- the guide's table


CROWDS = (Crowd(1, "thread"), Crowd(4, "thread"), Crowd(2, "process"))
GUIDE = {
    "guide-write": (1000, 3500, 800),
    "guide-read": (5000, 15_000, 2000),
    "guide-atomic": (800, 2800, 600),
    "guide-transaction": (500, 1800, 400),
}


def path_of(directory: str, number: int) -> str:
    """Of a file."""
    return f"{directory}/{number:04}.bin"


def plain_write(directory: str, locks: Sequence[Any]) -> Operation:
    """Theirs."""
    writer = LockedWriter(locks)
    return lambda number: writer.write(path_of(directory, number), CONTENT)


def write_in_place(directory: str) -> Operation:
    """Ours, of the same kind."""

    def write(number: int) -> None:
        path = path_of(directory, number)
        with PathLock(path):
            atomic_write(path, CONTENT, durability="none")

    return write


def store_write(directory: str, level: str) -> Operation:
    """Ours: replaced as a whole."""
    store = FileStore(directory, durability=level)
    return lambda number: store.write(f"{number:04}.bin", CONTENT)


def locked_write(directory: str, level: str) -> Operation:
    """Theirs: replaced as a whole."""
    files, durable = LockedFiles(), level == "full"
    return lambda number: files.write(path_of(directory, number), CONTENT, durable=durable)


def locked_read(directory: str) -> Operation:
    """Theirs."""
    files = LockedFiles()
    return lambda number: files.read(path_of(directory, number))


def store_read(directory: str) -> Operation:
    """Ours: what is replaced as a whole is read without a lock."""
    store = FileStore(directory)
    return lambda number: store.read(f"{number:04}.bin")


def shared_read(directory: str) -> Operation:
    """Ours, with a lock as the guide has one; readers share it."""
    store = FileStore(directory)

    def read(number: int) -> bytes:
        with store.lock(f"{number:04}.bin", "shared"):
            return store.read(f"{number:04}.bin")

    return read


def backed_up(directory: str, level: str) -> Operation:
    """Theirs: the file of this number and the two beside it."""
    locks, durable = FileLocks(), level == "full"

    def write(number: int) -> None:
        with Transaction(locks, durable=durable) as transaction:
            for part in range(TRANSACTION_FILES):
                transaction.write(f"{directory}/{number:04}.{part}", CONTENT)

    return write


def journaled(directory: str, level: str) -> Operation:
    """Ours."""

    def write(number: int) -> None:
        with FileTransaction(directory, durability=level) as transaction:
            for part in range(TRANSACTION_FILES):
                transaction.write(f"{number:04}.{part}", CONTENT)

    return write


class Pair(NamedTuple):
    """One of ours, and the guide's way of the same; ``has_bar``: it promises what the guide's way does, not more."""

    ours: str
    guide: str
    has_bar: bool = True


def _contestants(case: str, directory: str, crowd: Crowd) -> tuple[dict[str, Begin], list[Pair]]:
    if case == "guide-write":
        make = _fork.Lock if crowd.kind == "process" else threading.Lock
        guide, ours, whole = "guide: Lock, open, write", "PathLock, atomic_write, none", "FileStore.write, atomic"
        return {
            guide: partial(plain_write, directory, [make() for _ in range(FILES)]),
            ours: partial(write_in_place, directory),
            whole: partial(store_write, directory, "atomic"),
        }, [Pair(ours, guide), Pair(whole, guide, has_bar=False)]
    if case == "guide-read":
        guide, ours, locked = "guide: FileLock, open, read", "FileStore.read", "FileStore.read, shared PathLock"
        return {
            guide: partial(locked_read, directory),
            ours: partial(store_read, directory),
            locked: partial(shared_read, directory),
        }, [Pair(ours, guide), Pair(locked, guide, has_bar=False)]
    begins: dict[str, Begin] = {}
    pairs: list[Pair] = []
    for level in ("atomic", "full"):
        if case == "guide-atomic":
            guide, ours, theirs, mine = "guide: FileLock, replace", "FileStore.write", locked_write, store_write
        else:
            guide, ours, theirs, mine = "guide: backups, renames", "FileTransaction", backed_up, journaled
        begins[f"{guide}, {level}"] = partial(theirs, directory, level)
        begins[f"{ours}, {level}"] = partial(mine, directory, level)
        pairs.append(Pair(f"{ours}, {level}", f"{guide}, {level}", level == "atomic"))
    return begins, pairs


TITLES = {
    "guide-write": "1 KiB written under a lock, on disk, durability none or atomic (no fsync)",
    "guide-read": "1 KiB read, on disk",
    "guide-atomic": "1 KiB replaced, on disk, durability atomic (no fsync), and full",
    "guide-transaction": f"{TRANSACTION_FILES} files of 1 KiB, on disk, durability atomic (no fsync), and full",
}


def bench_operations(case: str, quick: bool) -> Iterator[Case]:
    """A line of the guide's table."""
    scale = QUICK if quick else FULL
    for crowd, figure_per_s in zip(CROWDS, GUIDE[case], strict=True):
        with tempfile.TemporaryDirectory(prefix="ringpool-bench-") as directory:
            os.mkdir(f"{directory}/.ringpool")
            for number in range(FILES):
                Path(path_of(directory, number)).write_bytes(CONTENT)
            begins, pairs = _contestants(case, directory, crowd)
            series, others = measure.take_turns(rates(crowd, begins, scale.turn_s), scale.rounds)
        claims = [Claim(pair.ours, None, at_least(figure_per_s)) for pair in pairs if pair.has_bar]
        claims += [Claim(pair.ours, pair.guide) for pair in pairs]
        yield Case(f"{case}, {crowd}: {TITLES[case]}", "operations/s", series, claims, others)


# ---- locks


LOCK_CROWDS = (Crowd(2, "process"), Crowd(4, "process"), Crowd(4, "thread"))
POLLED, POLLED_OFTEN, OURS = "guide: FileLock", "guide: FileLock, polled every 1 ms", "PathLock"


def pairs_of_file_lock(path: str, poll_s: float) -> Operation:
    """Theirs: locked and unlocked."""
    lock = FileLock(f"{path}.lock", poll_interval=poll_s)

    def pair(_number: int) -> None:
        with lock:
            pass

    return pair


def pairs_of_path_lock(path: str) -> Operation:
    """Ours."""

    def pair(_number: int) -> None:
        with PathLock(path):
            pass

    return pair


def write_under(directory: str, kind: str, granularity: str) -> Operation:
    """Write a file as it stands, under a lock of its own or of all."""
    locks = FileLocks()

    def write(number: int) -> None:
        path = path_of(directory, number)
        locked = path if granularity == "file" else f"{directory}/all"
        with locks.lock(locked) if kind == POLLED else PathLock(locked), open(path, "wb") as file:
            file.write(CONTENT)

    return write


def bench_locks(quick: bool) -> Iterator[Case]:
    """One lock that all want, and many."""
    scale = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="ringpool-bench-") as directory:
        os.mkdir(f"{directory}/.ringpool")
        begins: dict[str, Begin] = {
            POLLED: partial(pairs_of_file_lock, f"{directory}/polled", 0.05),
            POLLED_OFTEN: partial(pairs_of_file_lock, f"{directory}/often", 0.001),
            OURS: partial(pairs_of_path_lock, f"{directory}/ours"),
        }
        for crowd in LOCK_CROWDS:
            contestants = {name: partial(work, crowd, begin, 2 * scale.turn_s) for name, begin in begins.items()}
            turns = measure.take_turns(contestants, scale.rounds)
            found = turns.series.items()
            speeds = {name: [each.rate_per_s for each in figures] for name, figures in found}
            claims = [Claim(OURS, name) for name in speeds if name != OURS]
            title = f"guide-locks, {crowd}: on one lock, nothing done under it"
            yield Case(title, "pairs/s", speeds, claims, turns.others)
            fairness = {name: [jain(each.counts) for each in figures] for name, figures in found}
            claims = [Claim(OURS, None, at_least(0.9))]
            yield Case(f"guide-locks, {crowd}: Jain's index of the same", "index", fairness, claims, turns.others)
        yield from _granularity(directory, scale)


def _granularity(directory: str, scale: Scale) -> Iterator[Case]:
    for crowd in CROWDS[1:]:
        begins: dict[str, Begin] = {
            f"{kind}, of {'each file' if granularity == 'file' else 'all'}": partial(
                write_under, directory, kind, granularity
            )
            for kind in (POLLED, OURS)
            for granularity in ("all", "file")
        }
        series, others = measure.take_turns(rates(crowd, begins, scale.turn_s), scale.rounds)
        claims = [Claim(f"{kind}, of each file", f"{kind}, of all") for kind in (POLLED, OURS)]
        title = f"guide-locks, {crowd}: 1 KiB written in place on disk, no fsync, under a lock of each file or of all"
        yield Case(title, "files/s", series, claims, others)


# ---- a queue


JSON_QUEUE, RUN = "guide: JSON file under a FileLock", "run_file_tasks"
QUEUE_LENGTHS = {100: 60, 10_000: 10}  # and how many tasks of it are run
TASK = {"no-ops": no_op, "1 KiB read": read_and_compute}


def _served(directory: str, paths: Sequence[str], call: Callable[[str], object], n_tasks: int) -> float:
    """Tasks a second through a JSON queue of all ``paths``, of which the first ``n_tasks`` are run."""
    tasks = JsonQueue(f"{directory}/queue.json")
    tasks.fill(paths)
    spent_s = run_queue(tasks.path, call, 2, n_tasks // 2)
    if sum(task["state"] == "done" for task in tasks.tasks()) != n_tasks // 2 * 2:
        raise RuntimeError("the JSON queue did not do its tasks")
    return n_tasks // 2 * 2 / spent_s


def _run(coordinator: Coordinator, paths: Sequence[str], call: Callable[[str], object], n_tasks: int) -> float:
    began_s = time.perf_counter()
    inputs = itertools.islice(itertools.cycle(paths), n_tasks)
    done = sum(result.ok for result in coordinator.run_file_tasks(call, inputs))
    spent_s = time.perf_counter() - began_s
    if done != n_tasks:
        raise RuntimeError(f"run_file_tasks did {done} of {n_tasks} tasks")
    return n_tasks / spent_s


def bench_queue(quick: bool) -> Iterator[Case]:
    """Tasks a second, and what the length of a JSON queue does to them."""
    scale = QUICK if quick else FULL
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-"))
        paths = [path_of(directory, number) for number in range(QUEUE_TASKS)]
        for path in paths:
            Path(path).write_bytes(CONTENT)
        coordinator = stack.enter_context(Coordinator(workers=2))
        for name, call in TASK.items():
            contestants: dict[str, Callable[[], float]] = {
                JSON_QUEUE: partial(_served, directory, paths, call, scale.served),
                RUN: partial(_run, coordinator, paths, call, scale.tasks // (1 if call is no_op else 4)),
            }
            series, others = measure.take_turns(contestants, scale.rounds)
            claims = [Claim(RUN, JSON_QUEUE, at_least(1000) if call is no_op else None)]
            title = f"guide-queue: {name}, 2 workers; the JSON file has {QUEUE_TASKS:,} tasks, {scale.served} are run"
            yield Case(title, "tasks/s", series, claims, others)
        contestants = {}
        for length, n_tasks in QUEUE_LENGTHS.items():
            queued = [*itertools.islice(itertools.cycle(paths), length)]
            contestants[f"guide: JSON file of {length:,}"] = partial(_served, directory, queued, no_op, n_tasks)
        series, others = measure.take_turns(contestants, measure.QUICK_ROUNDS)
        yield Case("guide-queue: no-ops, 2 workers, by the length of the queue", "tasks/s", series, (), others)


# ---- a status table


def text_operation(table: TextStatus, paths: Sequence[str], kind: str) -> Operation:
    """Theirs."""
    if kind == "get":
        return lambda number: table.get(paths[number])
    return lambda number: table.set(paths[number], "processing")


def table_operation(table: FileStatusTable, paths: Sequence[str], kind: str) -> Operation:
    """Ours."""
    if kind == "get":
        return lambda number: table.get(paths[number])
    return lambda number: table.set(paths[number], FileState.AVAILABLE)


def bench_status(quick: bool) -> Iterator[Case]:
    """Writing and reading states, among few files and among many."""
    scale = QUICK if quick else FULL
    for n_files, crowd in itertools.product((100, 10_000), (Crowd(1, "process"), Crowd(2, "process"))):
        paths = [f"/srv/in/batch/{number:08}.tif" for number in range(n_files)]
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir="/dev/shm"))
            text = TextStatus(f"{directory}/status.txt", n_files, _fork.Lock())
            stack.callback(text.close)
            text.fill(paths, "pending")
            ours = stack.enter_context(FileStatusTable(f"bench-{os.getpid()}-{secrets.token_hex(4)}", n_files))
            stack.callback(ours.unlink)
            for path in paths:
                ours.set(path, FileState.AVAILABLE)
            begins: dict[str, Begin] = {}
            for kind in ("set", "get"):
                begins[f"guide: text in memory, {kind}"] = partial(text_operation, text, paths, kind)
                begins[f"FileStatusTable, {kind}"] = partial(table_operation, ours, paths, kind)
            series, others = measure.take_turns(rates(crowd, begins, scale.turn_s, n_files), scale.rounds)
        claims = [Claim(f"FileStatusTable, {kind}", f"guide: text in memory, {kind}") for kind in ("set", "get")]
        yield Case(f"guide-status, {crowd}: states of {n_files:,} files", "operations/s", series, claims, others)


def bench_memory(quick: bool) -> Iterator[Case]:
    """What a file costs, in a process of its own each time. Once: memory has no noise."""
    scale = QUICK if quick else FULL
    for what, group in guide_memory.GROUPS.items():
        names = [*group]
        n = scale.locked if what == "locks" else scale.tracked
        grown = {name: [guide_memory.measure_alone(name, n)] for name in names}
        claims = [Claim(names[0], name) for name in names if name.startswith("guide")]
        yield Case(f"guide-memory, {what}: growth of the peak, a file, with {n:,} files", "bytes", grown, claims)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    **{case: partial(bench_operations, case) for case in GUIDE},
    "guide-locks": bench_locks,
    "guide-memory": bench_memory,
    "guide-queue": bench_queue,
    "guide-status": bench_status,
}

"""Four claims of the guide that ringpool grew out of, each measured: true, false, or depends.

    case             the guide claims                           measured
    claim-batching   batching is 3 to 5 times as fast           files written durably, and not, one by one / in batches;
                                                                reads under one FileLock a file / one a batch;
                                                                no-ops through a multiprocessing.Pool by 1 / by 64
    claim-mmap       mmap is 2 to 3 times as fast as read()     reading whole files, searching in them,
                     above 10 MB                                one by one of their blocks; files of 1 and 32 MiB
    claim-aiofiles   aiofiles is 20 to 30 % faster              small and large files read, in turn and 16 at a time
    claim-locks      finer locks are 40 to 60 % faster          1 KiB written without and with fsync, and work that
                                                                waits, under a lock of each file / of all

    verdict   of the median ratios that the claim speaks of
    true      each reaches the lower end of what is claimed
    false     none does
    depends   some do: on what, the ratios tell

    python -m benchmarks claims [--quick] [--json FILE]        or some of them, by name

The rule is ``verdict``. A ratio that the machine was too noisy for counts, and is said to be noisy. Files are in the
page cache when they are read: nothing here waits for a disk but fsync.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench_dispatch import no_op
from benchmarks.guide_baseline import FileLocks, write_temporary
from benchmarks.guide_crowd import Begin, Crowd, Operation, rates

from ringpool import PathLock, atomic_write, write_batch
from ringpool.bench import measure
from ringpool.bench.measure import Case, Claim, at_least

CONTENT = os.urandom(1024)
SMALL_BYTES = 1024
AT_A_TIME = 16
WAIT_S = 0.001
MIB = 1 << 20
BLOCK_BYTES = 64 * 1024


class Scale(NamedTuple):
    """How much is measured. ``files``: of 1 KiB, in a turn; ``repeats``: of a large file; ``turn_s``: of a crowd."""

    rounds: int
    files: int
    repeats: int
    turn_s: float


FULL = Scale(measure.ROUNDS, 512, 6, 0.4)
QUICK = Scale(measure.QUICK_ROUNDS, 256, 2, 0.15)


class Claimed(NamedTuple):
    """What the guide says: so many times as fast, from ... to."""

    words: str
    lowest: float


BATCHING = Claimed("batching is 3 to 5 times as fast", 3)
MMAP = Claimed("mmap is 2 to 3 times as fast as read() above 10 MB", 2)
AIOFILES = Claimed("aiofiles is 20 to 30 % faster", 1.2)
LOCKS = Claimed("finer locks are 40 to 60 % faster", 1.4)


def verdict(ratios: Sequence[float], lowest: float) -> str:
    """See the module. ``ratios``: one or more, each how many times as fast; ``lowest``: of what is claimed."""
    reached = sum(ratio >= lowest for ratio in ratios)
    return "true" if reached == len(ratios) else "depends" if reached else "false"


def judged(claimed: Claimed, measured: Sequence[Case]) -> str:
    """The verdict on a claim, in a line, with the ratios that it rests on."""
    outcomes = [
        measure.judge(case, claim._replace(bar=at_least(claimed.lowest))) for case in measured for claim in case.claims
    ]
    ratios = [outcome.figure for outcome in outcomes]
    noisy = sum(outcome.verdict == "void" for outcome in outcomes)
    found = ", ".join(f"{ratio:.2f}x" for ratio in ratios)
    doubt = f"; {noisy} of these {len(ratios)} ratios are noisy" if noisy else ""
    word = verdict(ratios, claimed.lowest).upper()
    return f"{claimed.words}: {word} ({found}; claimed: {claimed.lowest:g}x or more{doubt})"


def _passed_on(
    claimed: Claimed, cases: Iterator[Case], speaks_of: Callable[[Case], bool] = lambda _: True
) -> Iterator[Case]:
    """The cases, to be reported; and, at the end, the verdict on those that the claim speaks of."""
    measured: list[Case] = []
    for case in cases:
        yield case
        if speaks_of(case):
            measured.append(case)
    print(f"\nclaim: {judged(claimed, measured)}")


# ---- batching


def _files_per_s(write: Callable[[Sequence[str]], object], directory: str, n_files: int) -> Callable[[], float]:
    """A contestant that writes so many new files, each time in a directory of its own."""

    def turn() -> float:
        with tempfile.TemporaryDirectory(dir=directory) as place:
            paths = [f"{place}/{number:06}.bin" for number in range(n_files)]
            began_s = time.perf_counter()
            write(paths)
            return n_files / (time.perf_counter() - began_s)

    return turn


def write_each(level: str, paths: Sequence[str]) -> None:
    """One by one."""
    for path in paths:
        atomic_write(path, CONTENT, durability=level)


def write_together(level: str, size: int, paths: Sequence[str]) -> None:
    """In batches."""
    for at in range(0, len(paths), size):
        write_batch(((path, CONTENT) for path in paths[at : at + size]), durability=level)


def read_under_lock(locks: FileLocks, size: int, paths: Sequence[str]) -> None:
    """Read files, with a ``FileLock`` around so many at a time."""
    for at in range(0, len(paths), size):
        with locks.lock(paths[at]):
            for path in paths[at : at + size]:
                Path(path).read_bytes()


def _batching(scale: Scale) -> Iterator[Case]:
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("forkserver").Pool(2))
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-"))
        for level in ("full", "atomic"):
            ways = {"one by one": partial(write_each, level)}
            ways |= {f"batches of {size}": partial(write_together, level, size) for size in (16, 256)}
            contestants = {name: _files_per_s(way, directory, scale.files) for name, way in ways.items()}
            yield _compared(f"claim-batching: new files of 1 KiB, durability {level}", "files/s", contestants, scale)
        paths = [f"{directory}/{number:04}.bin" for number in range(AT_A_TIME)]
        for path in paths:
            write_temporary(path, CONTENT, durable=False)
        paths *= scale.files // AT_A_TIME
        locks = FileLocks()
        ways = {
            "a FileLock each": partial(read_under_lock, locks, 1),
            f"a FileLock for {AT_A_TIME}": partial(read_under_lock, locks, AT_A_TIME),
        }
        contestants = {name: measure.rate_per_s(way, paths) for name, way in ways.items()}
        yield _compared("claim-batching: 1 KiB read under a FileLock", "files/s", contestants, scale)

        def through_pool(size: int, items: Sequence[str]) -> None:
            for _ in pool.imap_unordered(no_op, items, size):
                pass

        items = paths * 40
        contestants = {f"chunks of {size}": measure.rate_per_s(partial(through_pool, size), items) for size in (1, 64)}
        yield _compared("claim-batching: no-ops through Pool.imap_unordered, 2 workers", "tasks/s", contestants, scale)


def _compared(title: str, unit: str, contestants: dict[str, Callable[[], float]], scale: Scale) -> Case:
    """A case in which each contestant is compared with the first."""
    series, others = measure.take_turns(contestants, scale.rounds)
    baseline, *names = contestants
    return Case(title, unit, series, [Claim(name, baseline) for name in names], others)


# ---- mmap


NEEDLE = b"\xff" * 32  # which is in none of the files: they are searched to their end


def read_whole(path: str) -> int:
    """read()."""
    with open(path, "rb", buffering=0) as file:
        return len(file.read())


def map_whole(path: str) -> int:
    """The same bytes, from a map."""
    with open(path, "rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return len(mapped[:])


def search_read(path: str) -> int:
    """Read, and search."""
    with open(path, "rb", buffering=0) as file:
        return file.read().find(NEEDLE)


def search_map(path: str) -> int:
    """Search in place."""
    with open(path, "rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(NEEDLE)


def read_blocks(path: str) -> int:
    """Block by block."""
    total = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            total += len(block)
    return total


def map_blocks(path: str) -> int:
    """The same blocks, from a map."""
    with open(path, "rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return sum(len(mapped[at : at + BLOCK_BYTES]) for at in range(0, len(mapped), BLOCK_BYTES))


def _mib_per_s(use: Callable[[str], object], path: str, repeats: int) -> Callable[[], float]:
    """A contestant that goes through a file so many times."""
    mib = os.path.getsize(path) / MIB

    def turn() -> float:
        began_s = time.perf_counter()
        for _ in range(repeats):
            use(path)
        return mib * repeats / (time.perf_counter() - began_s)

    return turn


MMAP_USES = {
    "read whole": (read_whole, map_whole),
    "searched to the end": (search_read, search_map),
    "read in blocks of 64 KiB": (read_blocks, map_blocks),
}
LARGE_MIB = (32, 64)


def _mmap(scale: Scale) -> Iterator[Case]:
    for size_mib in (1, *LARGE_MIB):
        with tempfile.TemporaryDirectory(prefix="ringpool-bench-") as directory:
            path = f"{directory}/large.bin"
            block = os.urandom(MIB)
            with open(path, "wb") as file:
                for _ in range(size_mib):
                    file.write(block)
            repeats = max(1, scale.repeats * LARGE_MIB[0] // size_mib)
            for use, (by_read, by_map) in MMAP_USES.items():
                contestants = {
                    "read()": _mib_per_s(by_read, path, repeats),
                    "mmap": _mib_per_s(by_map, path, repeats),
                }
                yield _compared(f"claim-mmap: {use}, a file of {size_mib} MiB, cached", "MiB/s", contestants, scale)


# ---- aiofiles


def read_plainly(paths: Sequence[str]) -> None:
    """open, read."""
    for path in paths:
        with open(path, "rb") as file:
            file.read()


def read_by_aiofiles(at_a_time: int, paths: Sequence[str]) -> None:
    """The same in coroutines, so many at once."""
    aiofiles = import_module("aiofiles")

    async def read(path: str) -> None:
        async with aiofiles.open(path, "rb") as file:
            await file.read()

    async def read_all() -> None:
        for at in range(0, len(paths), at_a_time):
            reads: list[Awaitable[None]] = [read(path) for path in paths[at : at + at_a_time]]
            await asyncio.gather(*reads)

    asyncio.run(read_all())


def _aiofiles(scale: Scale) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="ringpool-bench-") as directory:
        for name, size_bytes, n_files in (("1 KiB", SMALL_BYTES, scale.files), ("16 MiB", 16 * MIB, AT_A_TIME)):
            paths = [f"{directory}/{size_bytes}.{number}" for number in range(AT_A_TIME if size_bytes < MIB else 2)]
            for path in paths:
                write_temporary(path, os.urandom(size_bytes), durable=False)
            paths *= n_files // len(paths)
            contestants = {
                "open, read": measure.rate_per_s(read_plainly, paths),
                "aiofiles, one at a time": measure.rate_per_s(partial(read_by_aiofiles, 1), paths),
                f"aiofiles, {AT_A_TIME} at a time": measure.rate_per_s(partial(read_by_aiofiles, AT_A_TIME), paths),
            }
            yield _compared(f"claim-aiofiles: files of {name} read, cached", "files/s", contestants, scale)


# ---- locks


def locked_work(directory: str, kind: str, granularity: str) -> Operation:
    """Do it under a lock of each file, or of all."""

    def do(number: int) -> None:
        path = f"{directory}/{number:04}.bin"
        with PathLock(path if granularity == "each file" else f"{directory}/all"):
            if kind == "waits 1 ms":
                time.sleep(WAIT_S)
            elif kind == "1 KiB written, no fsync":
                atomic_write(path, CONTENT, durability="none")
            else:
                write_temporary(path, CONTENT, durable=True)

    return do


def _locks(scale: Scale) -> Iterator[Case]:
    for kind in ("1 KiB written, no fsync", "1 KiB written, fsync", "waits 1 ms"):
        for crowd in (Crowd(4, "thread"), Crowd(2, "process")):
            with tempfile.TemporaryDirectory(prefix="ringpool-bench-") as directory:
                os.mkdir(f"{directory}/.ringpool")
                begins: dict[str, Begin] = {
                    f"a lock of {granularity}": partial(locked_work, directory, kind, granularity)
                    for granularity in ("all", "each file")
                }
                contestants = rates(crowd, begins, scale.turn_s)
                yield _compared(f"claim-locks, {crowd}: {kind}", "operations/s", contestants, scale)


# ---- the cases


def bench_batching(quick: bool) -> Iterator[Case]:
    """Fixed costs shared by many."""
    yield from _passed_on(BATCHING, _batching(QUICK if quick else FULL))


def bench_mmap(quick: bool) -> Iterator[Case]:
    """Reading, searching, blocks."""

    def is_large(case: Case) -> bool:
        return any(f" {size_mib} MiB" in case.title for size_mib in LARGE_MIB)

    yield from _passed_on(MMAP, _mmap(QUICK if quick else FULL), is_large)


def bench_aiofiles(quick: bool) -> Iterator[Case]:
    """Files read in coroutines."""
    if importlib.util.find_spec("aiofiles") is None:
        print("\nclaim-aiofiles: left out, aiofiles is not installed (pip install 'ringpool[bench]')")
        return
    yield from _passed_on(AIOFILES, _aiofiles(QUICK if quick else FULL))


def bench_locks(quick: bool) -> Iterator[Case]:
    """Locks of each file."""
    yield from _passed_on(LOCKS, _locks(QUICK if quick else FULL))


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "claim-batching": bench_batching,
    "claim-mmap": bench_mmap,
    "claim-aiofiles": bench_aiofiles,
    "claim-locks": bench_locks,
}

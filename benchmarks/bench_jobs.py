"""Batch jobs beside what they replace, with 2 workers; a job is measured from end to end, its ledger included.

    case            contestants                                                              bar
    jobs-files      1 KiB files: read, hashed, written; sharded output tree, on tmpfs        half of two bare processes
    jobs-disk       the same on disk, level ``atomic``                                       half
    jobs-durable    the same on disk, level ``full``: outputs that share their syncs         4x one sequence per file
    jobs-short      40 us of CPU a file, no output                                           70 % of two bare processes
    jobs-long       1 ms of CPU a file, no output                                            95 %
    jobs-resume     a resume with nothing to do                                              under 5 s for 100,000
    jobs-memory     growth of the parent, in a process of its own                            under 30 MiB

Two bare processes: forked, each with every second file of the list, which they have at the start; without a ledger,
without locks, and with no look at the input before and after. What they write appears by a rename, too.

    python -m benchmarks jobs [--quick] [--json FILE]
    python -m benchmarks.bench_jobs memory N FILE.csv     RSS of the parent over N names from a generator, sampled
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench_dispatch import Split, _calibrate, _small_files, read_and_compute

from ringpool import Job, atomic_write
from ringpool.bench import measure
from ringpool.bench.measure import Case, Claim, at_least, at_most
from ringpool.shm import segment

WORKERS = 2
FILE_BYTES = 1024
SHARDS = 256
BARE, ONE_BY_ONE, JOB = "two bare processes", "two bare processes, atomic_write of each", "Job"
RESUME_S, GROWTH_MIB = 5.0, 30.0


class Scale(NamedTuple):
    """How much is measured. ``resumed``: files that a resume looks at; ``lazy``: inputs while memory is watched."""

    rounds: int
    files: int
    disk: int
    durable: int
    short: int
    long: int
    resumed: int
    lazy: int


FULL = Scale(measure.ROUNDS, 200_000, 50_000, 20_000, 100_000, 10_000, 100_000, 200_000)
QUICK = Scale(measure.QUICK_ROUNDS, 20_000, 10_000, 5_000, 20_000, 2_000, 20_000, 50_000)


# ---- what the workers run


def copy_hashed(src: bytes, dst: bytes) -> str:
    """Read, hash, write."""
    with open(src, "rb", buffering=0) as file:
        data = file.read()
    digest = hashlib.sha256(data).hexdigest()
    with open(dst, "wb", buffering=0) as file:
        file.write(data)
    return digest


def compute(src: str, *, iterations: int) -> int:
    """What takes its time."""
    return read_and_compute(src, iterations=iterations)


def name_of(src: str) -> None:
    """A file task that costs nothing, of an input that need not be there."""


# ---- the contestants


class Tree:
    """``n`` files of 1 KiB below ``root``/in, and places for what is made of them, for each turn its own.

    On disk they are removed at the end only: ext4 does not give the inode of a removed file away for minutes, and
    looks through all of them whenever a file is made. Whoever comes after a removal would pay for it.
    """

    def __init__(self, root: str, n: int) -> None:
        self.root = root
        self.files: list[str] = []
        self._turn = mmap.mmap(-1, 1)  # shared with the bare processes, which are forked
        for number in range(n):
            directory = f"{root}/in/{number // 1000:04}"
            if number % 1000 == 0:
                os.makedirs(directory)
            self.files.append(f"{directory}/{number:07}.dat")
            Path(self.files[-1]).write_bytes(number.to_bytes(8, "little") * (FILE_BYTES // 8))
        self.make_place()

    def make_place(self) -> None:
        """A new place for outputs, once all that was written before is on disk; in memory the one before is removed."""
        if self.root.startswith(segment.SHM_DIRECTORY):
            shutil.rmtree(self.place, ignore_errors=True)
        self._turn[0] += 1
        for shard in range(SHARDS):
            os.makedirs(f"{self.place}/bare/{shard:02x}")
        os.sync()

    @property
    def place(self) -> str:
        """Where this turn's outputs go."""
        return f"{self.root}/{self._turn[0]}"

    @property
    def output(self) -> str:
        """... those of a job, as a pattern."""
        return f"{self.place}/out/{{hash:2}}/{{name}}"

    def bare_target(self, path: str) -> str:
        """Where a bare process writes what it makes of ``path``."""
        name = os.path.basename(path)
        return f"{self.place}/bare/{zlib.crc32(name.encode()) % SHARDS:02x}/{name}"

    def without_pool(self, path: str) -> None:
        """The work of one file, and a rename."""
        target = self.bare_target(path)
        copy_hashed(os.fsencode(path), os.fsencode(target) + b".tmp")
        os.rename(target + ".tmp", target)

    def durably(self, path: str) -> None:
        """The work of one file, each synced by itself."""
        data = Path(path).read_bytes()
        hashlib.sha256(data).hexdigest()
        atomic_write(self.bare_target(path), data)

    def job(self, durability: str) -> None:
        """All of it, as a job."""
        report = Job(copy_hashed, f"{self.root}/in", self.output, durability=durability).run(WORKERS)
        if report.progress.done != len(self.files):
            raise RuntimeError(f"the job did {report.progress.done} of {len(self.files)} files")


def _timed(run: Callable[[], object], n: int, after: Callable[[], None]) -> Callable[[], float]:
    def turn() -> float:
        began_s = time.perf_counter()
        run()
        rate_per_s = n / (time.perf_counter() - began_s)
        after()
        return rate_per_s

    return turn


def _bench_tree(title: str, where: str | None, n: int, rounds: int, levels: tuple[str, ...], bar: float) -> Case:
    """A tree of files: bare processes against a job at ``levels``; at ``full``, against one sync sequence per file."""
    durable = "full" in levels
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir=where))
        tree = Tree(root, n)
        split = Split(WORKERS, tree.files, tree.durably if durable else tree.without_pool)
        stack.callback(split.close)
        plain = ONE_BY_ONE if durable else BARE
        contestants = {plain: _timed(split.run, n, tree.make_place)}
        for level in levels:
            contestants[f"{JOB}, {level}"] = _timed(lambda level=level: tree.job(level), n, tree.make_place)
        series, others = measure.take_turns(contestants, rounds)
    claims = [Claim(f"{JOB}, {level}", plain, at_least(bar)) for level in levels]
    return Case(title, "files/s", series, claims, others)


def bench_files(quick: bool) -> Iterator[Case]:
    """Many small files in memory: all that a job adds shows."""
    scale = QUICK if quick else FULL
    title = f"jobs-files: {scale.files:,} files of 1 KiB on tmpfs, read, hashed, written"
    yield _bench_tree(title, segment.SHM_DIRECTORY, scale.files, scale.rounds, ("atomic",), 0.5)


def bench_disk(quick: bool) -> Iterator[Case]:
    """The same on disk."""
    scale = QUICK if quick else FULL
    title = f"jobs-disk: {scale.disk:,} files of 1 KiB on disk, read, hashed, written"
    yield _bench_tree(title, None, scale.disk, scale.rounds, ("atomic",), 0.5)


def bench_durable(quick: bool) -> Iterator[Case]:
    """Outputs that survive a power cut."""
    scale = QUICK if quick else FULL
    title = f"jobs-durable: {scale.durable:,} files of 1 KiB on disk, synced"
    yield _bench_tree(title, None, scale.durable, scale.rounds, ("full",), 4)


def _bench_computing(title: str, n: int, rounds: int, times: float, bar: float) -> Case:
    """Files without an output: bare processes against a job."""
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir=segment.SHM_DIRECTORY))
        small = _small_files(root)
        iterations = round(_calibrate(small) * times)
        os.mkdir(f"{root}/in")
        files = [f"{root}/in/{number:06}" for number in range(n)]
        for file, content in zip(files, itertools.cycle(small), strict=False):
            os.link(content, file)
        split = Split(WORKERS, files, lambda path: read_and_compute(path, iterations=iterations))
        stack.callback(split.close)

        def job() -> None:
            report = Job(compute, f"{root}/in", directory=f"{root}/job", params={"iterations": iterations}).run(WORKERS)
            if report.progress.done != n:
                raise RuntimeError(f"the job did {report.progress.done} of {n} files")

        def clean() -> None:
            shutil.rmtree(f"{root}/job", ignore_errors=True)

        series, others = measure.take_turns({BARE: _timed(split.run, n, clean), JOB: _timed(job, n, clean)}, rounds)
    return Case(title, "files/s", series, [Claim(JOB, BARE, at_least(bar))], others)


def bench_short(quick: bool) -> Iterator[Case]:
    """Short tasks."""
    scale = QUICK if quick else FULL
    yield _bench_computing("jobs-short: 40 us of CPU a file, values", scale.short, scale.rounds, 1, 0.7)


def bench_long(quick: bool) -> Iterator[Case]:
    """Tasks long enough for most of what a job adds to vanish."""
    scale = QUICK if quick else FULL
    yield _bench_computing("jobs-long: 1 ms of CPU a file, values", scale.long, scale.rounds, 25, 0.95)


def bench_resume(quick: bool) -> Iterator[Case]:
    """What it costs to see that nothing is to be done."""
    scale = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir=segment.SHM_DIRECTORY) as root:
        tree = Tree(root, scale.resumed)
        tree.job("atomic")

        def resume() -> float:
            began_s = time.perf_counter()
            report = Job(copy_hashed, f"{root}/in", tree.output, durability="atomic").run(WORKERS)
            if report.progress.skipped != scale.resumed:
                raise RuntimeError(f"the resume skipped {report.progress.skipped} of {scale.resumed} files")
            return time.perf_counter() - began_s

        series, others = measure.take_turns({JOB: resume}, scale.rounds)
    limit_s = RESUME_S * scale.resumed / FULL.resumed
    yield Case(
        f"jobs-resume: {scale.resumed:,} files that are done", "s", series, [Claim(JOB, None, at_most(limit_s))], others
    )


def bench_memory(quick: bool) -> Iterator[Case]:
    """How much the parent grows over many inputs. Once: memory has no noise."""
    scale = QUICK if quick else FULL
    command = [sys.executable, "-m", "benchmarks.bench_jobs", "memory", str(scale.lazy)]
    grown = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    title = f"jobs-memory: growth of the parent over {scale.lazy:,} names from a generator"
    yield Case(title, "MiB", {JOB: [grown]}, [Claim(JOB, None, at_most(GROWTH_MIB))])


# ---- alone


def _rss_mib() -> float:
    with open("/proc/self/statm", "rb", buffering=0) as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / (1 << 20)


def _watch(samples: list[tuple[float, float]], ended: threading.Event) -> None:
    began_s = time.monotonic()
    while not ended.wait(0.5):
        samples.append((time.monotonic() - began_s, _rss_mib()))


def _memory(n: int, file: str | None) -> float:
    """Growth in MiB over ``n`` inputs, after the first 10,000; the samples go into ``file``: seconds, MiB."""
    samples: list[tuple[float, float]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(samples, ended))
    first_mib = 0.0

    def names() -> Iterable[str]:
        nonlocal first_mib
        for number in range(n):
            if number == 10_000:
                first_mib = _rss_mib()
            yield f"s3://bucket/{number:09}"

    with tempfile.TemporaryDirectory(prefix="ringpool-bench-") as directory:
        watcher.start()
        report = Job(name_of, names(), directory=directory, fingerprints=False, durability="atomic").run(WORKERS)
        last_mib = _rss_mib()
        ended.set()
        watcher.join()
    if report.progress.done != n:
        raise RuntimeError(f"the job did {report.progress.done} of {n} inputs")
    if file is not None:
        with open(file, "w", newline="") as table:
            csv.writer(table).writerows([("seconds", "rss_mib"), *samples])
    return max([last_mib, *(mib for _, mib in samples)]) - first_mib


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "jobs-files": bench_files,
    "jobs-disk": bench_disk,
    "jobs-durable": bench_durable,
    "jobs-short": bench_short,
    "jobs-long": bench_long,
    "jobs-resume": bench_resume,
    "jobs-memory": bench_memory,
}


def main(arguments: Sequence[str]) -> None:
    """``memory N [FILE]``: print how much the parent grew, in MiB."""
    _, n, *file = arguments
    print(json.dumps(_memory(int(n), file[0] if file else None)))


if __name__ == "__main__":
    main(sys.argv[1:])

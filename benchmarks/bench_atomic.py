"""What an atomic write costs: beside bare system calls, and in a batch beside one by one.

    case      contestants                                                                    where       bar
    new       open, write, close, replace of 1 KiB / atomic_write at level atomic            tmpfs       1.8 times
    over      the same, over files that are there                                            tmpfs       (reported)
    stream    the same as new / atomic_open                                                  tmpfs       (reported)
    batch     256 atomic_write at level full / one write_batch of 256                        ext4, ...   a quarter

    python -m benchmarks [--quick] write batch

``atomic_write`` looks at what stands there, keeps its owner and attributes, and holds the directory; bare calls do none
of that. The batch is measured on the file system of the temporary directory (TMPDIR chooses); its bar is meant for a
disk with a real fsync, thus neither for tmpfs nor for overlayfs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ringpool.bench import measure
from ringpool.bench.measure import Case
from ringpool.workers.files.atomic import atomic_open, atomic_write
from ringpool.workers.files.batch import write_batch

CONTENT = os.urandom(1024)
BATCH_FILES = 256
REPEATS = 10  # of a turn of few milliseconds, since a neighbour on the machine takes as long

Paths = Sequence[str]


def bare(paths: Paths) -> None:
    """What people write by hand, with a name that is no other's."""
    for path in paths:
        temp = f"{path}.{os.urandom(8).hex()}"
        fd = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, CONTENT)
        os.close(fd)
        os.replace(temp, path)


def atomic(paths: Paths) -> None:
    """Ours, at the level that promises what ``bare`` does."""
    for path in paths:
        atomic_write(path, CONTENT, durability="atomic")


def streamed(paths: Paths) -> None:
    """Ours, as a file object."""
    for path in paths:
        with atomic_open(path, durability="atomic") as file:
            file.write(CONTENT)


def singly(paths: Paths) -> None:
    """Each file durable by itself."""
    for path in paths:
        atomic_write(path, CONTENT)


def together(paths: Paths) -> None:
    """All of them durable at once."""
    write_batch((path, CONTENT) for path in paths)


def us_per_file(write: Callable[[Paths], None], directory: Path, n_files: int, *, over: bool) -> Callable[[], float]:
    """A contestant; its figure is the best of ``REPEATS`` goes, each in an empty directory, or ``over`` old files."""

    def turn() -> float:
        figures: list[float] = []
        for _ in range(REPEATS if n_files < BATCH_FILES else 1):
            place = Path(tempfile.mkdtemp(dir=directory))
            paths = [f"{place}/{n}.bin" for n in range(n_files)]
            if over:
                bare(paths)
            began_s = time.perf_counter()
            write(paths)
            figures.append((time.perf_counter() - began_s) / n_files * 1e6)
            shutil.rmtree(place)
        return min(figures)

    return turn


def bench_writes(quick: bool) -> Iterator[Case]:
    """One file at a time, on tmpfs."""
    rounds = measure.QUICK_ROUNDS if quick else measure.ROUNDS
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm") as memory:
        for title, ours, over, bar in (
            ("write, new: 1 KiB on tmpfs, no file there", atomic, False, measure.at_most(1.8)),
            ("write, over: 1 KiB on tmpfs, over a file", atomic, True, None),
            ("write, stream: 1 KiB on tmpfs, no file there", streamed, False, None),
        ):
            name = "atomic_open" if ours is streamed else "atomic_write"
            contestants = {
                "bare system calls": us_per_file(bare, Path(memory), 200, over=over),
                name: us_per_file(ours, Path(memory), 200, over=over),
            }
            series, others = measure.take_turns(contestants, rounds)
            yield Case(title, "us a file", series, [measure.Claim(name, "bare system calls", bar)], others)


def bench_batch(quick: bool) -> Iterator[Case]:
    """Many durable files together, on a disk."""
    rounds = measure.QUICK_ROUNDS if quick else measure.ROUNDS
    with tempfile.TemporaryDirectory(prefix="bench-") as disk:
        alone, ours = "atomic_write, one by one", "write_batch"
        contestants = {
            alone: us_per_file(singly, Path(disk), BATCH_FILES, over=False),
            ours: us_per_file(together, Path(disk), BATCH_FILES, over=False),
        }
        series, others = measure.take_turns(contestants, rounds)
        title = f"batch: {BATCH_FILES} files of 1 KiB, durable, below {Path(disk).parent}"
        yield Case(title, "us a file", series, [measure.Claim(ours, alone, measure.at_most(0.25))], others)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {"write": bench_writes, "batch": bench_batch}

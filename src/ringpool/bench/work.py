"""Work for pools, and the turns in which they do it.

    Work          a function, its items, and what should come of them
    contestants   peers' maps and submits: tasks a second
    trips_us      one task there and back, again and again: median and p99
    starter       a fresh interpreter, a new pool, its first result
    FileTree      1 KiB files to be read, hashed and written

A turn of ``contestants`` begins with a tenth of the work, uncounted: workers are awake then, and batches have their
size. Work that is over soon is repeated, for a steadier figure. What came back is compared with what should have, off
the clock.

A start is measured in a fresh interpreter, because a program's second pool finds modules imported and the fork server
running. So each contestant starts a fork server of its own, and waits for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ringpool.bench import peers
from ringpool.bench.peers import Call, Pools
from ringpool.bench.tasks import target_of

DIRECTORIES = 64
FILE_BYTES = 1024
SAMPLE_EVERY = 251  # of the files written, these are read again
START_MODULES = {"ProcessPoolExecutor": "concurrent.futures", "RingPoolExecutor": "ringpool"}

Run = Callable[[Call, Sequence[Any]], Iterable[Any]]


class Work(NamedTuple):
    """``call`` of each of ``items``, what this should give, and what is to be done after a go, of how many items."""

    call: Call
    items: Sequence[Any]
    expected: Sequence[Any]
    after: Callable[[int], None] = lambda _n: None

    def first(self, n: int) -> Work:
        """The same, with fewer items."""
        return self._replace(items=self.items[:n], expected=self.expected[:n])

    def check(self, name: str, results: Sequence[Any], *, sends_results: bool = True) -> None:
        """Raises ``RuntimeError`` where contestant ``name`` was fast, and wrong."""
        sort = sorted if "unordered" in name else list
        if sends_results and sort(results) != sort(self.expected):
            raise RuntimeError(f"{name}: wrong results, {len(results)} of {len(self.items)}, first {results[:3]}")
        self.after(len(self.items))


def rate_per_s(name: str, run: Run, work: Work, turn_s: float, *, sends_results: bool = True) -> Callable[[], float]:
    """A contestant; its figure is how many items a second it does."""

    def turn() -> float:
        few = work.first(max(1, len(work.items) // 10))
        few.check(name, list(run(few.call, few.items)), sends_results=sends_results)
        n, spent_s = 0, 0.0
        while spent_s < turn_s:
            began_s = time.perf_counter()
            results = list(run(work.call, work.items))
            spent_s += time.perf_counter() - began_s
            n += len(work.items)
            work.check(name, results, sends_results=sends_results)
        return n / spent_s

    return turn


def contestants(
    names: Iterable[str], pools: Pools, work: Work, few: int, turn_s: float
) -> dict[str, Callable[[], float]]:
    """The peers of these names that are installed; those that send each item by itself get ``few`` items."""

    def contestant(name: str) -> Callable[[], float]:
        way = peers.MAPS.get(name) or peers.submit_all(peers.SUBMITS[name])
        mine = work if name in peers.MAPS and not name.endswith("chunks of 1") else work.first(few)
        return rate_per_s(name, lambda call, items: way(pools, call, items), mine, turn_s)

    return {name: contestant(name) for name in peers.installed(names)}


def trips_us(trip: Callable[[], object], n: int) -> Callable[[], tuple[float, float]]:
    """A contestant; its figures are the median and the 99th percentile of ``n`` trips, in microseconds."""

    def turn() -> tuple[float, float]:
        for _ in range(n // 10):
            trip()
        spent_us: list[float] = []
        for _ in range(n):
            began_ns = time.perf_counter_ns()
            trip()
            spent_us.append((time.perf_counter_ns() - began_ns) / 1000)
        spent_us.sort()
        return spent_us[n // 2], spent_us[n * 99 // 100]

    return turn


# ---- starts


START = """
import json, multiprocessing, time
began_s = time.perf_counter()
from {module} import {executor}
imported_s = time.perf_counter()
pool = {executor}({workers}, multiprocessing.get_context("{method}"))
assert pool.submit(pow, 2, 8).result() == 256
ready_s = time.perf_counter()
pool.shutdown()
print(json.dumps([1000 * (ready_s - imported_s), 1000 * (ready_s - began_s)]))
"""


def starter(executor: str, workers: int, method: str) -> Callable[[], list[float]]:
    """A contestant of ``START_MODULES``; its figures are the milliseconds from the making of a pool to its first
    result, and the same with its import.
    """
    program = START.format(module=START_MODULES[executor], executor=executor, workers=workers, method=method)
    return lambda: json.loads(python("-c", program))


def python(*arguments: str) -> str:
    """What a fresh interpreter prints. Raises ``subprocess.CalledProcessError``."""
    # Compiled modules are kept, by the first round at the latest: no installed program compiles itself at each start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


# ---- files


class FileTree:
    """``n`` files below ``directory``/in, and a place for what ``copy_hashed`` makes of them. Attributes: ``sources``
    (list of str), ``digests`` (list of str, of their contents).

    They lie in many directories, in turn: the kernel locks a directory while a file is made in it, and two processes
    that write into the same one are hardly faster than one process.
    """

    def __init__(self, directory: str, n: int) -> None:
        self._directory = directory
        for tree in ("in", "out"):
            for i in range(DIRECTORIES):
                os.makedirs(f"{directory}/{tree}/{i:02}")
        self.sources = [f"{directory}/in/{i % DIRECTORIES:02}/{i:06}.bin" for i in range(n)]
        self.digests: list[str] = []
        for source in self.sources:
            content = os.urandom(FILE_BYTES)
            Path(source).write_bytes(content)
            self.digests.append(hashlib.sha256(content).hexdigest())

    def remove_written(self, n: int) -> None:
        """Remove the outputs of the first ``n``; raises ``RuntimeError`` where they are not what they should be."""
        sources = self.sources[:n]
        written = {os.path.join(place, name) for place, _, names in os.walk(f"{self._directory}/out") for name in names}
        if written != {*map(target_of, sources)}:
            raise RuntimeError(f"{len(written)} files were written for {len(sources)}, or under other names")
        for source in sources[::SAMPLE_EVERY]:
            if Path(source).read_bytes() != Path(target_of(source)).read_bytes():
                raise RuntimeError(f"{target_of(source)} is no copy of {source}")
        for path in written:
            os.unlink(path)

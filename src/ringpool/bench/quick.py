"""What a task costs in ringpool, beside the pools that are installed: with 2 workers, in about a minute.

    case       contestants, of the peers that are installed                        figure
    one        no-ops, all submitted one by one, all results taken                 tasks/s
    mapped     no-ops, through whatever a pool has for many items                  items/s
    trip       one no-op there and back, the pool idle before: median, p99         us
    start      a new pool in a fresh interpreter, to its first result              ms
    files      1 KiB files: read, hashed, written atomically; in /dev/shm          files/s
    lock       a lock for each output, taken and let go: PathLock, FileLock        us

``peers`` has how each pool is used, ``work`` what a turn is. Of each contestant the table says how many times as fast
ringpool is: the median of the ratios within a round, less than 1 where ringpool is slower.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, NamedTuple

from filelock import FileLock

from ringpool.bench import measure, peers, tables
from ringpool.bench.measure import Case, Claim
from ringpool.bench.peers import Pools
from ringpool.bench.tables import Table
from ringpool.bench.tasks import copy_hashed, no_op
from ringpool.bench.work import START_MODULES, FileTree, Work, contestants, starter, trips_us
from ringpool.workers.files.locks import PathLock

WORKERS = 2
PATH_LOCK, FILE_LOCK = "PathLock", "filelock.FileLock"
SUBMITS = tuple(peers.SUBMITS)
MAPS = (
    peers.MAP,
    peers.MAP_UNORDERED,
    peers.POOL_MAP,
    peers.IMAP_64,
    peers.FUTURES_MAP_1,
    peers.FUTURES_MAP_64,
    peers.JOBLIB,
    peers.MPIRE,
    peers.PEBBLE_64,
    peers.LOKY_64,
)
FILE_MAPS = (peers.MAP, peers.POOL_MAP, peers.IMAP_64, peers.FUTURES_MAP_64, peers.JOBLIB, peers.MPIRE)
UNITS_OF_TIME = ("us", "ms")

OnTurn = Callable[[int, str], object]


class Scale(NamedTuple):
    """How much is measured. What is over before ``turn_s`` is repeated. Who sends each item by itself gets ``few``."""

    rounds: int
    turn_s: float
    items: int
    few: int
    trips: int
    files: int
    locks: int


FULL = Scale(measure.ROUNDS, 0.2, 200_000, 2_000, 500, 8_000, 1_000)
QUICK = Scale(measure.QUICK_ROUNDS, 0.08, 50_000, 1_000, 200, 3_000, 500)


def bench_one(scale: Scale, on_turn: OnTurn) -> list[Case]:
    """A few thousand futures."""
    items = range(scale.few)
    with Pools(WORKERS) as pools:
        runs = contestants(SUBMITS, pools, Work(no_op, items, items), scale.few, scale.turn_s)
        series, others = measure.take_turns(runs, scale.rounds, on_turn)
    return [_case("no-ops, submitted one by one", "tasks/s", series, others, peers.SUBMIT)]


def bench_mapped(scale: Scale, on_turn: OnTurn) -> list[Case]:
    """Many items at once."""
    items = range(scale.items)
    with Pools(WORKERS) as pools:
        runs = contestants(MAPS, pools, Work(no_op, items, items), scale.few, scale.turn_s)
        series, others = measure.take_turns(runs, scale.rounds, on_turn)
    return [_case("no-ops, mapped", "items/s", series, others, peers.MAP)]


def bench_trip(scale: Scale, on_turn: OnTurn) -> list[Case]:
    """The round trip of a single task."""
    with Pools(WORKERS) as pools:
        runs = {
            name: trips_us(lambda submit=peers.SUBMITS[name]: submit(pools, no_op, 1).result(), scale.trips)
            for name in peers.installed(SUBMITS)
        }
        figures, others = measure.take_turns(runs, scale.rounds, on_turn)
    return [
        _case(f"one no-op there and back, {which}", "us", _nth(figures, place), others, peers.SUBMIT)
        for place, which in enumerate(("median", "p99"))
    ]


def bench_start(scale: Scale, on_turn: OnTurn) -> list[Case]:
    """A new pool, to its first result."""
    runs = {name: starter(name, WORKERS, "forkserver") for name in START_MODULES}
    # a fork server whose program has ended is nobody's, and its CPU would count as others'
    figures, _ = measure.take_turns(runs, scale.rounds, on_turn)
    return [
        _case(f"fresh interpreter, forkserver: {what}", "ms", _nth(figures, place), [], "RingPoolExecutor")
        for place, what in enumerate(("new pool to first result", "import, new pool and first result"))
    ]


def _nth(figures: dict[str, Any], place: int) -> dict[str, list[float]]:
    return {name: [turn[place] for turn in turns] for name, turns in figures.items()}


def bench_files(scale: Scale, on_turn: OnTurn) -> list[Case]:
    """Small files."""
    with tempfile.TemporaryDirectory(prefix=f"ringpool-bench-{os.getpid()}-", dir="/dev/shm") as directory:
        tree = FileTree(directory, scale.files)
        work = Work(copy_hashed, tree.sources, tree.digests, tree.remove_written)
        with Pools(WORKERS) as pools:
            runs = contestants(FILE_MAPS, pools, work, scale.few, scale.turn_s)
            series, others = measure.take_turns(runs, scale.rounds, on_turn)
    return [_case("1 KiB files: read, hashed, written atomically; in memory", "files/s", series, others, peers.MAP)]


def bench_lock(scale: Scale, on_turn: OnTurn) -> list[Case]:
    """A lock for each of many outputs, nobody else there."""
    with tempfile.TemporaryDirectory(prefix=f"ringpool-bench-{os.getpid()}-") as directory:
        outputs = [f"{directory}/{number}" for number in range(scale.locks)]
        runs = {
            PATH_LOCK: _locker(lambda output: PathLock(output), outputs),
            FILE_LOCK: _locker(lambda output: FileLock(f"{output}.lock"), outputs),
        }
        series, others = measure.take_turns(runs, scale.rounds, on_turn)
    return [_case("a lock for each output, taken and let go", "us", series, others, PATH_LOCK)]


def _locker(make: Callable[[str], Any], outputs: Iterable[str]) -> Callable[[], float]:
    def turn() -> float:
        began_s, n = time.perf_counter(), 0
        for output in outputs:
            with make(output):
                n += 1
        return (time.perf_counter() - began_s) / n * 1e6

    return turn


CASES: dict[str, Callable[[Scale, OnTurn], list[Case]]] = {
    "one": bench_one,
    "mapped": bench_mapped,
    "trip": bench_trip,
    "start": bench_start,
    "files": bench_files,
    "lock": bench_lock,
}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _case(title: str, unit: str, series: dict[str, list[float]], others: list[float], ours: str) -> Case:
    return Case(title, unit, series, [Claim(ours, name) for name in series if name != ours], others)


def as_table(case: Case) -> Table:
    """A case, with how many times as fast ringpool is."""
    ours = case.claims[0].ours
    ratios = {claim.baseline: measure.judge(case, claim).figure for claim in case.claims}
    rows: list[list[str]] = []
    for name, figures in case.series.items():
        found = measure.spread(figures)
        ratio = ratios.get(name)
        if ratio is not None and case.unit in UNITS_OF_TIME:
            ratio = 1 / ratio
        faster = "" if name == ours or ratio is None else tables.factor(ratio)
        rows.append(
            [name, tables.rate(found.median), "-" if len(figures) < 2 else tables.percent(found.relative), faster]
        )
    others = statistics.median(case.others) if case.others else 0.0
    notes = [f"other programs had {others:.0%} of the cores: measure again, on a quieter machine"]
    return Table(
        f"{case.title} ({WORKERS} workers)" if PATH_LOCK not in case.series else case.title,
        ["", case.unit, "spread", "ringpool is"],
        rows,
        notes if others > measure.OTHERS_MAX else (),
    )


def describe() -> dict[str, Any]:
    """The machine, and which peers of which version are measured."""
    versions = {name: metadata.version(name) for name in peers.OPTIONAL if name not in peers.missing()}
    return {**measure.describe_machine("ringpool"), "peers": versions, "peers_missing": peers.missing()}


def peers_in_words(machine: dict[str, Any]) -> str:
    """Which peers are measured, and which are not there."""
    found = [f"{name} {version}" for name, version in machine["peers"].items()]
    text = f"beside {', '.join(['the standard library', *found])}"
    absent = machine["peers_missing"]
    return text + (f"; not installed: {', '.join(absent)} (pip install 'ringpool[bench]')" if absent else "")

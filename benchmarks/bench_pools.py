"""RingPoolExecutor beside the pools that people use, with 2 workers (``ringpool.bench.peers``: how each is used).

    case           contestants                                                            bar
    pools-submit   futures of no-ops, all submitted, then all results taken               8x ProcessPoolExecutor
    pools-map      no-ops through map, which batches by itself                            faster than every peer's map
                                                                                          40 % of Pool.map
    pools-trip     submit(...).result(), one at a time: median, p99                       half of ProcessPoolExecutor's
                                                                                          and of Pool.apply's
    pools-files    1 KiB files on tmpfs: read, hashed, written atomically                 95 % of two processes alone
    pools-cpu      1 ms of computing a task, no chunk size given                          97 % of two processes alone
    pools-sizes    bytes of 5 and 300 kB, small dicts: as arguments, as results           faster than each peer
    pools-memory   the parent over a million lazy items, in a process of its own          at most 10 MiB
    pools-start    first result of a new pool, by start method, in a fresh interpreter    before ProcessPoolExecutor

    python -m benchmarks pools [--quick] [--json FILE]        or some of them, by name

Two processes alone: without a pool, forked, taking blocks of the list from a shared counter; they send no results back.

``ringpool.bench.work`` has what a turn is.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.pool_peers import Unpooled, pipe
from benchmarks.pool_tasks import compute, fields_of

from ringpool.bench import measure, peers
from ringpool.bench.measure import Case, Claim, Figure, at_least, at_most
from ringpool.bench.peers import Pools
from ringpool.bench.tasks import copy_hashed, no_op
from ringpool.bench.work import START_MODULES, FileTree, Work, contestants, python, rate_per_s, starter, trips_us

WORKERS = 2
ALONE = "two processes alone"
PIPE = "a bare pipe"
PIPE_APART = "a bare pipe, to another core"
APPLY = "Pool.apply"

OUR_MAPS = (peers.MAP, peers.MAP_UNORDERED)
FOUND_BY_TRYING = (peers.IMAP_4096, peers.FUTURES_MAP_1024, peers.JOBLIB_1024)  # sizes that nobody is told
FILE_MAPS = (peers.MAP, peers.POOL_MAP, peers.IMAP_64, peers.FUTURES_MAP_64, peers.JOBLIB, peers.MPIRE)
FILE_SUBMITS = (peers.SUBMIT, peers.FUTURES_SUBMIT)
CPU_MAPS = (*OUR_MAPS, peers.POOL_MAP, peers.IMAP_1, peers.FUTURES_MAP_1, peers.JOBLIB, peers.MPIRE)
SIZED_MAPS = (peers.MAP, peers.POOL_MAP, peers.FUTURES_MAP_1, peers.FUTURES_MAP_64, peers.JOBLIB)
SIZED_SUBMITS = (peers.SUBMIT, peers.FUTURES_SUBMIT)
LAZY_MAPS = (*OUR_MAPS, peers.IMAP_64, peers.FUTURES_MAP_64, peers.JOBLIB)

TASK_NS = 1_000_000
FILES_A_BLOCK = 64  # that a process without a pool takes at a time
GROWTH_MAX_MIB = 10
START_METHODS = ("fork", "forkserver", "spawn")


class Scale(NamedTuple):
    """How much is measured. What is over before ``turn_s`` is repeated. Who sends each item by itself gets ``few``."""

    rounds: int
    turn_s: float
    items: int
    few: int
    trips: int
    files: int
    cpu_tasks: int
    lazy_items: int


FULL = Scale(measure.ROUNDS, 0.25, 400_000, 5_000, 1_000, 20_000, 2_000, 1_000_000)
QUICK = Scale(measure.QUICK_ROUNDS, 0.08, 100_000, 1_000, 300, 6_000, 500, 300_000)


# ---- the cases


def bench_submit(quick: bool) -> Iterator[Case]:
    """A few thousand futures."""
    scale = QUICK if quick else FULL
    items = range(scale.few)
    with Pools(WORKERS) as pools:
        runs = contestants(peers.SUBMITS, pools, Work(no_op, items, items), scale.few, scale.turn_s)
        series, others = measure.take_turns(runs, scale.rounds)
    bars = {peers.FUTURES_SUBMIT: at_least(8)}
    claims = [Claim(peers.SUBMIT, name, bars.get(name)) for name in series if name != peers.SUBMIT]
    title = f"pools, submit: no-ops, all submitted, all results taken{peers.without(peers.SUBMITS)}"
    yield Case(title, "tasks/s", series, claims, others)


def bench_map(quick: bool) -> Iterator[Case]:
    """No-ops, through whatever a pool has for many items."""
    scale = QUICK if quick else FULL
    items = range(scale.items)
    with Pools(WORKERS) as pools:
        runs = contestants(peers.MAPS, pools, Work(no_op, items, items), scale.few, scale.turn_s)
        series, others = measure.take_turns(runs, scale.rounds)
    bars = {name: at_least(1) for name in peers.MAPS if name not in FOUND_BY_TRYING} | {peers.POOL_MAP: at_least(0.4)}
    claims = [Claim(peers.MAP, name, bars.get(name)) for name in series if name not in OUR_MAPS]
    yield Case(f"pools, map: no-ops{peers.without(peers.MAPS)}", "items/s", series, claims, others)


def bench_trip(quick: bool) -> Iterator[Case]:
    """The round trip of a single task."""
    scale = QUICK if quick else FULL
    last_core = max(os.sched_getaffinity(0))
    with pipe() as over_pipe, pipe(last_core) as to_another_core, Pools(WORKERS) as pools:
        trips: dict[str, Callable[[], object]] = {
            PIPE: over_pipe,
            PIPE_APART: to_another_core,
            APPLY: lambda: pools.pool.apply(no_op, (1,)),
        }
        for name in peers.installed(peers.SUBMITS):
            if name != peers.APPLY_ASYNC:
                trips[name] = lambda submit=peers.SUBMITS[name]: submit(pools, no_op, 1).result()
        runs = {name: trips_us(trip, scale.trips) for name, trip in trips.items()}
        runs[PIPE_APART] = _on_first_core(runs[PIPE_APART])
        figures, others = measure.take_turns(runs, scale.rounds)
    bars = {peers.FUTURES_SUBMIT: at_most(0.5), APPLY: at_most(0.5)}
    claims = [Claim(peers.SUBMIT, name, bars.get(name)) for name in figures if name != peers.SUBMIT]
    for which, quantile in enumerate(("median", "p99")):
        series = {name: [turn[which] for turn in turns] for name, turns in figures.items()}
        title = f"pools, trip, {quantile}: one no-op there and back{peers.without(peers.SUBMITS)}"
        yield Case(title, "us", series, claims, others)


def _on_first_core(turn: Callable[[], Figure]) -> Callable[[], Figure]:
    """Keep this thread on the first of its cores meanwhile."""

    def pinned() -> Figure:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            return turn()
        finally:
            os.sched_setaffinity(0, cores)

    return pinned


def bench_files(quick: bool) -> Iterator[Case]:
    """Small files read, hashed, and written atomically."""
    scale = QUICK if quick else FULL
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir="/dev/shm"))
        tree = FileTree(directory, scale.files)
        work = Work(copy_hashed, tree.sources, tree.digests, tree.remove_written)
        series, others = _beside_none(stack, (*FILE_MAPS, *FILE_SUBMITS), work, FILES_A_BLOCK, scale)
    bars = {peers.MAP: at_least(0.95)}
    claims = [Claim(name, ALONE, bars.get(name)) for name in series if name != ALONE]
    title = f"pools, files: 1 KiB read, hashed, written atomically, tmpfs{peers.without(FILE_MAPS)}"
    yield Case(title, "files/s", series, claims, others)


def _beside_none(
    stack: contextlib.ExitStack, names: Iterable[str], work: Work, block: int, scale: Scale
) -> measure.Turns[float]:
    """Peers beside two processes that take blocks of the items."""
    unpooled = Unpooled(WORKERS, work.call, work.items, block)  # forked before pools have started threads
    stack.callback(unpooled.close)
    pools = stack.enter_context(Pools(WORKERS))
    alone = rate_per_s(ALONE, unpooled.run, work, scale.turn_s, sends_results=False)
    runs = {ALONE: alone} | contestants(names, pools, work, scale.few, scale.turn_s)
    return measure.take_turns(runs, scale.rounds)


def bench_cpu(quick: bool) -> Iterator[Case]:
    """Tasks of a millisecond, without a chunk size where a pool has a choice of its own."""
    scale = QUICK if quick else FULL
    iterations = calibrate()
    work = Work(compute, [iterations] * scale.cpu_tasks, [compute(iterations)] * scale.cpu_tasks)
    with contextlib.ExitStack() as stack:
        series, others = _beside_none(stack, CPU_MAPS, work, 1, scale)
    bars = {peers.MAP: at_least(0.97)}
    claims = [Claim(name, ALONE, bars.get(name)) for name in series if name != ALONE]
    title = f"pools, cpu: tasks of 1 ms, no chunk size given{peers.without(CPU_MAPS)}"
    yield Case(title, "tasks/s", series, claims, others)


def calibrate() -> int:
    """How many iterations of ``compute`` take TASK_NS of CPU on this machine, at its quietest."""
    costs_ns: list[int] = []
    for _ in range(20):
        began_ns = time.process_time_ns()
        compute(50_000)
        costs_ns.append(time.process_time_ns() - began_ns)
    return TASK_NS * 50_000 // min(costs_ns)


def bench_sizes(quick: bool) -> Iterator[Case]:
    """Arguments and results that are more than a few words."""
    scale = QUICK if quick else FULL
    records = [{"id": i, "words": ["a", "b", "c"], "text": "x" * 50} for i in range(scale.few)]
    works = {"small dicts there and back": Work(fields_of, records, [fields_of(record) for record in records])}
    for n_bytes in (5_000, 300_000):
        n, name = scale.few // 20, f"bytes of {n_bytes // 1000} kB"
        each = [i.to_bytes(4) * (n_bytes // 4) for i in range(n)]  # one object in all places is sent once to a chunk
        works[f"{name}, arguments"] = Work(len, each, [n_bytes] * n)
        works[f"{name}, results"] = Work(bytes, [n_bytes] * n, [bytes(n_bytes)] * n)
    for title, work in works.items():
        with Pools(WORKERS) as pools:
            runs = contestants((*SIZED_MAPS, *SIZED_SUBMITS), pools, work, scale.few, scale.turn_s)
            series, others = measure.take_turns(runs, scale.rounds)
        claims = [Claim(peers.MAP, name, at_least(1)) for name in SIZED_MAPS[1:] if name in series]
        claims.append(Claim(peers.SUBMIT, peers.FUTURES_SUBMIT, at_least(1)))
        yield Case(f"pools, sizes: {title}{peers.without(SIZED_MAPS)}", "items/s", series, claims, others)


def bench_memory(quick: bool) -> Iterator[Case]:
    """How much the parent grows over a million lazy items. Once: memory has no noise."""
    n = (QUICK if quick else FULL).lazy_items
    names = peers.installed(LAZY_MAPS)
    grown = {name: [float(python("-m", "benchmarks.bench_pools", name, str(n)))] for name in names}
    title = f"pools, memory: growth of the parent over {n:,} lazy items{peers.without(LAZY_MAPS)}"
    yield Case(title, "MiB", grown, [Claim(name, None, at_most(GROWTH_MAX_MIB)) for name in OUR_MAPS])


def print_growth(name: str, n_items: str) -> None:
    """A program of its own, for a heap that nobody has used: the MiB by which this process ever grew over a map."""

    def items(n: int) -> Iterator[str]:
        return (f"/srv/photos/2024/holiday/{i:08}.jpg" for i in range(n))

    def memory_kib(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0])

    with Pools(WORKERS) as pools:
        n_warm = sum(1 for _ in peers.MAPS[name](pools, no_op, items(1_000)))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, see proc_pid_clear_refs(5)
        before_kib = memory_kib("VmRSS")
        n = sum(1 for _ in peers.MAPS[name](pools, no_op, items(int(n_items))))
        grown_kib = memory_kib("VmHWM") - before_kib
    if (n_warm, n) != (1_000, int(n_items)):
        raise RuntimeError(f"{name} gave {n} results for {n_items} items")
    print(grown_kib / 1024)


def bench_start(quick: bool) -> Iterator[Case]:
    """From the making of a pool to its first result; and the same with its import."""
    rounds = (QUICK if quick else FULL).rounds
    peer, ours = START_MODULES
    for method in START_METHODS:
        runs = {name: starter(name, WORKERS, method) for name in START_MODULES}
        # a fork server whose program has ended is nobody's, and its CPU would count as others'
        figures, _ = measure.take_turns(runs, rounds)
        for which, (what, bar) in enumerate((("first result", at_most(1)), ("import and first result", None))):
            series = {name: [turn[which] for turn in turns] for name, turns in figures.items()}
            title = f"pools, start, {method}: {what}, fresh interpreter"
            yield Case(title, "ms", series, [Claim(ours, peer, bar)])


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "pools-submit": bench_submit,
    "pools-map": bench_map,
    "pools-trip": bench_trip,
    "pools-files": bench_files,
    "pools-cpu": bench_cpu,
    "pools-sizes": bench_sizes,
    "pools-memory": bench_memory,
    "pools-start": bench_start,
}


if __name__ == "__main__":
    from benchmarks import bench_pools  # so that workers know its functions by a name that they can import

    bench_pools.print_growth(*sys.argv[1:])

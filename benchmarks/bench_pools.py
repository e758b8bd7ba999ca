"""RingPoolExecutor beside the pools that people use, with 2 workers (``pool_peers`` has how each is used).

    case           contestants                                                            bar
    pools-submit   futures of no-ops, all submitted, then all results taken               8x ProcessPoolExecutor
    pools-map      no-ops through map, which batches by itself                            faster than every peer's map
                                                                                          40 % of Pool.map
    pools-trip     submit(...).result(), one at a time: median, p99                       half of ProcessPoolExecutor's
                                                                                          and of Pool.apply's
    pools-files    1 KiB files on tmpfs: read, hashed, written atomically                 95 % of two processes alone
    pools-cpu      1 ms of computing a task, no chunk size given                          97 % of two processes alone
    pools-memory   the parent over a million lazy items, in a process of its own          at most 10 MiB
    pools-start    first result of a new pool, by start method, in a fresh interpreter    before ProcessPoolExecutor
    pools-deaths   1,000 tasks of 1 ms, 10 of which SIGKILL their worker                  1.5x the undisturbed time,
                                                                                          no wrong outcome

    python -m benchmarks pools [--quick] [--json FILE]        or some of them, by name

Two processes alone: without a pool, forked, taking blocks of the list from a shared counter; they send no results back.

A turn begins with a tenth of the work, uncounted: workers are awake then, and batches have their size. Work that is
over soon is repeated, for a steadier figure. What came back is compared with what should have, off the clock.

A start is measured in a fresh interpreter, because a program's second pool finds modules imported and the fork server
running. So each contestant starts a fork server of its own, and waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure, pool_peers as peers
from benchmarks.pool_peers import Call, Pools
from benchmarks.pool_tasks import compute, compute_or_die, copy_hashed, no_op, target_of

from ringpool.bench.measure import Case, Claim, Figure, at_least, at_most

WORKERS = 2
ALONE = "two processes alone"
PIPE = "a bare pipe"
PIPE_APART = "a bare pipe, to another core"
APPLY = "Pool.apply"
UNDISTURBED = "RingPoolExecutor.submit, no deaths"
MAP_EXCEPTIONS = "RingPoolExecutor.map, return_exceptions"

OUR_MAPS = (peers.MAP, peers.MAP_UNORDERED)
FOUND_BY_TRYING = (peers.IMAP_4096, peers.FUTURES_MAP_1024, peers.JOBLIB_1024)  # sizes that nobody is told
FILE_MAPS = (peers.MAP, peers.POOL_MAP, peers.IMAP_64, peers.FUTURES_MAP_64, peers.JOBLIB, peers.MPIRE)
FILE_SUBMITS = (peers.SUBMIT, peers.FUTURES_SUBMIT)
CPU_MAPS = (*OUR_MAPS, peers.POOL_MAP, peers.IMAP_1, peers.FUTURES_MAP_1, peers.JOBLIB, peers.MPIRE)
LAZY_MAPS = (*OUR_MAPS, peers.IMAP_64, peers.FUTURES_MAP_64, peers.JOBLIB)
BREAKABLE = (peers.FUTURES_SUBMIT, peers.LOKY_SUBMIT)
DEADLY_SUBMITS = (peers.SUBMIT, peers.PEBBLE_SCHEDULE, *BREAKABLE)

TASK_NS = 1_000_000
FILE_BYTES = 1024
DIRECTORIES = 64
FILES_A_BLOCK = 64  # that a process without a pool takes at a time
SAMPLE_EVERY = 251  # of the files written, these are read again
DEADLY_TASKS = 1_000
DEATHS = 10
DEATH_ERRORS = (BrokenProcessPool, OSError)  # ours and everybody's; pebble's
GROWTH_MAX_MIB = 10
START_METHODS = ("fork", "forkserver", "spawn")

Run = Callable[[Call, Sequence[Any]], Iterable[Any]]


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


# ---- turns


class Work(NamedTuple):
    """``call`` of each of ``items``, what this should give, and what is to be done after a go, of how many items."""

    call: Call
    items: Sequence[Any]
    expected: Sequence[Any]
    after: Callable[[int], None] = lambda _n: None

    def first(self, n: int) -> Work:
        """The same, with fewer items."""
        return self._replace(items=self.items[:n], expected=self.expected[:n])

    def check(self, name: str, results: Sequence[Any]) -> None:
        """Raises ``RuntimeError`` where contestant ``name`` was fast, and wrong."""
        sort = sorted if "unordered" in name else list
        if name != ALONE and sort(results) != sort(self.expected):
            raise RuntimeError(f"{name}: wrong results, {len(results)} of {len(self.items)}, first {results[:3]}")
        self.after(len(self.items))


def _rate_per_s(name: str, run: Run, work: Work, turn_s: float) -> Callable[[], float]:
    """A contestant; its figure is how many items a second it does."""

    def turn() -> float:
        few = work.first(max(1, len(work.items) // 10))
        few.check(name, list(run(few.call, few.items)))
        n, spent_s = 0, 0.0
        while spent_s < turn_s:
            began_s = time.perf_counter()
            results = list(run(work.call, work.items))
            spent_s += time.perf_counter() - began_s
            n += len(work.items)
            work.check(name, results)
        return n / spent_s

    return turn


def _contestants(names: Iterable[str], pools: Pools, work: Work, scale: Scale) -> dict[str, Callable[[], float]]:
    """The peers of these names that are installed; those that send each item by itself get few."""

    def contestant(name: str) -> Callable[[], float]:
        way = peers.MAPS.get(name) or peers.submit_all(peers.SUBMITS[name])
        mine = work if name in peers.MAPS and not name.endswith("chunks of 1") else work.first(scale.few)
        return _rate_per_s(name, lambda call, items: way(pools, call, items), mine, scale.turn_s)

    return {name: contestant(name) for name in peers.installed(names)}


# ---- the cases


def bench_submit(quick: bool) -> Iterator[Case]:
    """A few thousand futures."""
    scale = QUICK if quick else FULL
    items = range(scale.few)
    with Pools(WORKERS) as pools:
        contestants = _contestants(peers.SUBMITS, pools, Work(no_op, items, items), scale)
        series, others = measure.take_turns(contestants, scale.rounds)
    bars = {peers.FUTURES_SUBMIT: at_least(8)}
    claims = [Claim(peers.SUBMIT, name, bars.get(name)) for name in series if name != peers.SUBMIT]
    title = f"pools, submit: no-ops, all submitted, all results taken{peers.without(peers.SUBMITS)}"
    yield Case(title, "tasks/s", series, claims, others)


def bench_map(quick: bool) -> Iterator[Case]:
    """No-ops, through whatever a pool has for many items."""
    scale = QUICK if quick else FULL
    items = range(scale.items)
    with Pools(WORKERS) as pools:
        contestants = _contestants(peers.MAPS, pools, Work(no_op, items, items), scale)
        series, others = measure.take_turns(contestants, scale.rounds)
    bars = {name: at_least(1) for name in peers.MAPS if name not in FOUND_BY_TRYING} | {peers.POOL_MAP: at_least(0.4)}
    claims = [Claim(peers.MAP, name, bars.get(name)) for name in series if name not in OUR_MAPS]
    yield Case(f"pools, map: no-ops{peers.without(peers.MAPS)}", "items/s", series, claims, others)


def bench_trip(quick: bool) -> Iterator[Case]:
    """The round trip of a single task."""
    scale = QUICK if quick else FULL
    last_core = max(os.sched_getaffinity(0))
    with peers.pipe() as over_pipe, peers.pipe(last_core) as to_another_core, Pools(WORKERS) as pools:
        trips: dict[str, Callable[[], object]] = {
            PIPE: over_pipe,
            PIPE_APART: to_another_core,
            APPLY: lambda: pools.pool.apply(no_op, (1,)),
        }
        for name in peers.installed(peers.SUBMITS):
            if name != peers.APPLY_ASYNC:
                trips[name] = lambda submit=peers.SUBMITS[name]: submit(pools, no_op, 1).result()
        contestants = {name: _trips_us(trip, scale.trips) for name, trip in trips.items()}
        contestants[PIPE_APART] = _on_first_core(contestants[PIPE_APART])
        figures, others = measure.take_turns(contestants, scale.rounds)
    bars = {peers.FUTURES_SUBMIT: at_most(0.5), APPLY: at_most(0.5)}
    claims = [Claim(peers.SUBMIT, name, bars.get(name)) for name in figures if name != peers.SUBMIT]
    for which, quantile in enumerate(("median", "p99")):
        series = {name: [turn[which] for turn in turns] for name, turns in figures.items()}
        title = f"pools, trip, {quantile}: one no-op there and back{peers.without(peers.SUBMITS)}"
        yield Case(title, "us", series, claims, others)


def _trips_us(trip: Callable[[], object], n: int) -> Callable[[], tuple[float, float]]:
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
        sources, digests = _make_sources(directory, scale.files)

        def remove_written(n: int) -> None:
            _remove_written(directory, sources[:n])

        work = Work(copy_hashed, sources, digests, remove_written)
        series, others = _beside_none(stack, (*FILE_MAPS, *FILE_SUBMITS), work, FILES_A_BLOCK, scale)
    bars = {peers.MAP: at_least(0.95)}
    claims = [Claim(name, ALONE, bars.get(name)) for name in series if name != ALONE]
    title = f"pools, files: 1 KiB read, hashed, written atomically, tmpfs{peers.without(FILE_MAPS)}"
    yield Case(title, "files/s", series, claims, others)


def _beside_none(
    stack: contextlib.ExitStack, names: Iterable[str], work: Work, block: int, scale: Scale
) -> measure.Turns[float]:
    """Peers beside two processes that take blocks of the items."""
    unpooled = peers.Unpooled(WORKERS, work.call, work.items, block)  # forked before pools have started threads
    stack.callback(unpooled.close)
    pools = stack.enter_context(Pools(WORKERS))
    alone = _rate_per_s(ALONE, unpooled.run, work, scale.turn_s)
    return measure.take_turns({ALONE: alone} | _contestants(names, pools, work, scale), scale.rounds)


def _make_sources(directory: str, n: int) -> tuple[list[str], list[str]]:
    """Files to be read, and their digests.

    They lie in many directories, in turn: the kernel locks a directory while a file is made in it, and two processes
    that write into the same one are hardly faster than one process.
    """
    for tree in ("in", "out"):
        for i in range(DIRECTORIES):
            os.makedirs(f"{directory}/{tree}/{i:02}")
    sources = [f"{directory}/in/{i % DIRECTORIES:02}/{i:06}.bin" for i in range(n)]
    digests: list[str] = []
    for source in sources:
        content = os.urandom(FILE_BYTES)
        Path(source).write_bytes(content)
        digests.append(hashlib.sha256(content).hexdigest())
    return sources, digests


def _remove_written(directory: str, sources: Sequence[str]) -> None:
    """Remove the outputs; raises ``RuntimeError`` where they are not what they should be."""
    written = {os.path.join(place, name) for place, _, names in os.walk(f"{directory}/out") for name in names}
    if written != {*map(target_of, sources)}:
        raise RuntimeError(f"{len(written)} files were written for {len(sources)}, or under other names")
    for source in sources[::SAMPLE_EVERY]:
        if Path(source).read_bytes() != Path(target_of(source)).read_bytes():
            raise RuntimeError(f"{target_of(source)} is no copy of {source}")
    for path in written:
        os.unlink(path)


def bench_cpu(quick: bool) -> Iterator[Case]:
    """Tasks of a millisecond, without a chunk size where a pool has a choice of its own."""
    scale = QUICK if quick else FULL
    iterations = _calibrate()
    work = Work(compute, [iterations] * scale.cpu_tasks, [compute(iterations)] * scale.cpu_tasks)
    with contextlib.ExitStack() as stack:
        series, others = _beside_none(stack, CPU_MAPS, work, 1, scale)
    bars = {peers.MAP: at_least(0.97)}
    claims = [Claim(name, ALONE, bars.get(name)) for name in series if name != ALONE]
    title = f"pools, cpu: tasks of 1 ms, no chunk size given{peers.without(CPU_MAPS)}"
    yield Case(title, "tasks/s", series, claims, others)


def _calibrate() -> int:
    """How many iterations of ``compute`` take TASK_NS of CPU on this machine, at its quietest."""
    costs_ns: list[int] = []
    for _ in range(20):
        began_ns = time.process_time_ns()
        compute(50_000)
        costs_ns.append(time.process_time_ns() - began_ns)
    return TASK_NS * 50_000 // min(costs_ns)


def bench_memory(quick: bool) -> Iterator[Case]:
    """How much the parent grows over a million lazy items. Once: memory has no noise."""
    n = (QUICK if quick else FULL).lazy_items
    names = peers.installed(LAZY_MAPS)
    grown = {name: [float(_python("-m", "benchmarks.bench_pools", name, str(n)))] for name in names}
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


def _python(*arguments: str) -> str:
    # Compiled modules are kept, by the first round at the latest: no installed program compiles itself at each start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


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


def bench_start(quick: bool) -> Iterator[Case]:
    """From the making of a pool to its first result; and the same with its import."""
    rounds = (QUICK if quick else FULL).rounds
    modules = {"ProcessPoolExecutor": "concurrent.futures", "RingPoolExecutor": "ringpool"}
    peer, ours = modules
    for method in START_METHODS:
        contestants = {name: _starter(module, name, method) for name, module in modules.items()}
        figures, _ = measure.take_turns(contestants, rounds)  # processes that have ended would count as others
        for which, (what, bar) in enumerate((("first result", at_most(1)), ("import and first result", None))):
            series = {name: [turn[which] for turn in turns] for name, turns in figures.items()}
            title = f"pools, start, {method}: {what}, fresh interpreter"
            yield Case(title, "ms", series, [Claim(ours, peer, bar)])


def _starter(module: str, executor: str, method: str) -> Callable[[], list[float]]:
    program = START.format(module=module, executor=executor, workers=WORKERS, method=method)
    return lambda: json.loads(_python("-c", program))


def bench_deaths(quick: bool) -> Iterator[Case]:
    """Tasks that kill their worker, among others that should not suffer. Each turn has a new pool: some end broken."""
    rounds = (QUICK if quick else FULL).rounds
    iterations = _calibrate()
    every = DEADLY_TASKS // DEATHS
    quiet, deadly = (
        [(iterations, dies and i % every == every // 2) for i in range(DEADLY_TASKS)] for dies in (False, True)
    )
    submits = peers.installed(DEADLY_SUBMITS)
    ways = {MAP_EXCEPTIONS: _mapped} | {name: _submitted(peers.SUBMITS[name]) for name in submits}
    contestants = {UNDISTURBED: lambda: _survive(ways[peers.SUBMIT], quiet)}
    contestants |= {name: lambda way=way: _survive(way, deadly) for name, way in ways.items()}
    figures, _ = measure.take_turns(contestants, rounds)  # workers that have ended would count as others
    seconds, wrong = ({name: [turn[which] for turn in turns] for name, turns in figures.items()} for which in (0, 1))
    for name in BREAKABLE:  # the less they did, the sooner they were done
        seconds.pop(name, None)
    title = f"{DEADLY_TASKS:,} tasks of 1 ms, {DEATHS} of them deadly{peers.without(DEADLY_SUBMITS)}"
    bars = {peers.SUBMIT: at_most(1.5), MAP_EXCEPTIONS: at_most(1.5)}
    claims = [Claim(name, UNDISTURBED, bars.get(name)) for name in seconds if name != UNDISTURBED]
    yield Case(f"pools, deaths, time: {title}", "s", seconds, claims)
    claims = [Claim(name, None, at_most(0)) for name in (UNDISTURBED, *bars)]
    yield Case(f"pools, deaths, wrong outcomes: {title}", "tasks", wrong, claims)


Outcomes = Callable[[Pools, Sequence[tuple[int, bool]]], list[Any]]


def _survive(way: Outcomes, tasks: Sequence[tuple[int, bool]]) -> tuple[float, int]:
    """The seconds until every task has an outcome, and how many outcomes are wrong."""
    iterations = tasks[0][0]
    value = compute(iterations)
    with Pools(WORKERS) as pools:
        way(pools, [(iterations, False)] * 20)  # both workers have started
        began_s = time.perf_counter()
        outcomes = way(pools, tasks)
        spent_s = time.perf_counter() - began_s
    wrong = abs(len(tasks) - len(outcomes))
    for (_, dies), outcome in zip(tasks, outcomes, strict=False):
        wrong += not isinstance(outcome, DEATH_ERRORS) if dies else outcome != value
    return spent_s, wrong


def _submitted(submit: peers.Submit) -> Outcomes:
    def outcome_of(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # a broken pool refuses tasks, too
            return error

    def run(pools: Pools, tasks: Sequence[tuple[int, bool]]) -> list[Any]:
        promises = [outcome_of(lambda task=task: submit(pools, compute_or_die, task)) for task in tasks]
        return [each if isinstance(each, Exception) else outcome_of(each.result) for each in promises]

    return run


def _mapped(pools: Pools, tasks: Sequence[tuple[int, bool]]) -> list[Any]:
    return list(pools.ring.map(compute_or_die, tasks, return_exceptions=True))


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "pools-submit": bench_submit,
    "pools-map": bench_map,
    "pools-trip": bench_trip,
    "pools-files": bench_files,
    "pools-cpu": bench_cpu,
    "pools-memory": bench_memory,
    "pools-start": bench_start,
    "pools-deaths": bench_deaths,
}


if __name__ == "__main__":
    from benchmarks import bench_pools  # so that workers know its functions by a name that they can import

    bench_pools.print_growth(*sys.argv[1:])

"""How throughput follows the number of workers, of tasks, and of slots in the ring.

    case            what varies                      contestants                                bar
    scale-workers   1, 2, 4, ... workers; 10 us,     run_file_tasks, RingPoolExecutor.map /
                    40 us, 100 us, 1 ms of CPU       the list split, no pool /
                                                     ProcessPoolExecutor.map, chunks of 5 ms
    scale-tasks     a thousand to 10 million lazy    RingPoolExecutor.map, with its own window  a million in 1 s
                    no-ops; to a million for peers   and with a buffersize / Pool.imap, joblib,
                                                     ProcessPoolExecutor.map
    scale-ring      64 to 16,384 slots; claims of    run_file_tasks: no-ops, and 40 us of CPU;
                    1 to 64                          context switches beside it

    python -m benchmarks scale [--quick] [--json FILE]        or some of them, by name

Workers are doubled up to the cores that this process may use; nobody keeps a core for the parent. All pools stay open
from round to round, so that a speed-up, too, is a ratio within a round. Efficiency is speed-up by workers.

Context switches are the kernel's counts for each worker, and for the parent with all its threads. The library does not
count how often a lock was found held; a worker that finds it so for long sleeps, which is a voluntary switch.

Lazy items are taken in a process of its own, whose heap nobody has used; its peak begins anew after a first thousand.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from benchmarks.bench_dispatch import Split, _paths, _small_files, no_op as no_file_op, read_and_compute

from ringpool import Coordinator
from ringpool.bench import measure, peers
from ringpool.bench.measure import Case, Claim, at_most
from ringpool.bench.peers import Pools
from ringpool.bench.tasks import no_op
from ringpool.bench.work import python
from ringpool.shm import segment

TASKS_NS = {"10 us": 10_000, "40 us": 40_000, "100 us": 100_000, "1 ms": 1_000_000}
SPLIT, FILES, FUTURES = "split, no pool", "run_file_tasks", "ProcessPoolExecutor.map"
CHUNK_NS = 5_000_000  # what chunks for ProcessPoolExecutor hold: longer ones are no faster
TASKS_MAX = 400_000  # a turn, however many workers there are

WINDOW = 16_384
IMAP_64 = "Pool.imap, chunks of 64"
BOUNDED = f"{peers.MAP}, buffersize"
LAZY: dict[str, peers.Map] = {
    peers.MAP: peers.MAPS[peers.MAP],  # its own window: at most 32,768 items
    BOUNDED: lambda pools, call, items: pools.ring.map(call, items, buffersize=WINDOW),
    IMAP_64: lambda pools, call, items: pools.pool.imap(call, items, 64),
    peers.JOBLIB: peers.MAPS[peers.JOBLIB],
    peers.FUTURES_MAP_64: peers.MAPS[peers.FUTURES_MAP_64],
}
LAZY_WORKERS = 2
SECONDS_MAX = 1.0
SLOW_S = 6.0  # who would need longer has one turn

RING_WORKERS = 2
SLOTS = (64, 256, 1024, 4096, 16_384)
CLAIMS = (1, 2, 4, 8, 16, 64)
SLOTS_DEFAULT, CLAIMS_DEFAULT = 1024, 64
PROBES = 15


class Scale(NamedTuple):
    """How much is measured: rounds; seconds that a turn is to take; numbers of lazy items: few, once; many, in rounds;
    and the most, for ours.
    """

    rounds: int
    workers_turn_s: float
    ring_turn_s: float
    lazy_rounds: int
    lazy_few: tuple[int, ...]
    lazy_many: int
    lazy_max: int


FULL = Scale(measure.ROUNDS, 0.3, 0.25, measure.ROUNDS, (1_000, 10_000, 100_000), 1_000_000, 10_000_000)
QUICK = Scale(measure.QUICK_ROUNDS, 0.08, 0.05, 1, (1_000, 10_000), 100_000, 100_000)


def worker_counts(cores: int | None = None) -> list[int]:
    """1, 2, 4, ... up to ``cores``, which is always among them; by default, those that this process may use."""
    n = len(os.sched_getaffinity(0)) if cores is None else cores
    return sorted({*(1 << power for power in range(n.bit_length())), n})


def workers_name(name: str, workers: int) -> str:
    """A contestant, with its number of workers."""
    return f"{name}, {workers} worker{'s' * (workers > 1)}"


def iterations_for(task_ns: int, files: Sequence[str]) -> int:
    """For how many iterations ``read_and_compute`` takes ``task_ns`` of CPU on this machine, at its quietest; 0 where
    reading alone takes longer.
    """

    def cost_ns(iterations: int) -> float:
        costs_ns: list[int] = []
        for _ in range(PROBES):
            began_ns = time.process_time_ns()
            for file in files:
                read_and_compute(file, iterations=iterations)
            costs_ns.append(time.process_time_ns() - began_ns)
        return min(costs_ns) / len(files)

    fixed_ns, with_1000_ns = cost_ns(0), cost_ns(1000)
    return max(0, round((task_ns - fixed_ns) * 1000 / (with_1000_ns - fixed_ns)))


# ---- workers


def bench_workers(quick: bool) -> Iterator[Case]:
    """Throughput over workers, and what of it is lost to the pool."""
    scale = QUICK if quick else FULL
    counts = worker_counts()
    for label, task_ns in TASKS_NS.items():
        with contextlib.ExitStack() as stack:
            series, others = measure.take_turns(scaling(stack, task_ns, counts, scale), scale.rounds)
        names = (FILES, peers.MAP, FUTURES)
        claims = [
            Claim(workers_name(name, n), workers_name(base, n))
            for n in counts
            for name, base in ((FILES, SPLIT), (peers.MAP, SPLIT), (FUTURES, SPLIT), (FILES, FUTURES))
        ]
        _print_efficiency(label, series, counts, (SPLIT, *names))
        yield Case(f"scale-workers, {label} of CPU a file task", "tasks/s", series, claims, others)


def scaling(
    stack: contextlib.ExitStack, task_ns: int, counts: Sequence[int], scale: Scale
) -> dict[str, Callable[[], float]]:
    """All contestants with each number of workers, closed with ``stack``. Processes are forked before threads start."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir=segment.SHM_DIRECTORY))
    files = _small_files(directory)
    iterations = iterations_for(task_ns, files)
    call = functools.partial(read_and_compute, iterations=iterations)
    chunk = max(1, CHUNK_NS // task_ns)
    lists: dict[int, list[str]] = {}
    contestants: dict[str, Callable[[], float]] = {}
    for n in counts:
        n_tasks = min(TASKS_MAX, round(scale.workers_turn_s * 1e9 / task_ns) * n)
        paths = lists[n] = [files[i % len(files)] for i in range(n_tasks)]
        split = Split(n, paths, call)
        stack.callback(split.close)
        contestants[workers_name(SPLIT, n)] = measure.rate_per_s(split.run, paths)
    for n, paths in lists.items():
        pools = stack.enter_context(Pools(n))
        coordinator = stack.enter_context(Coordinator(n))
        runs: dict[str, Callable[[Sequence[str]], Iterable[Any]]] = {
            FILES: lambda items, c=coordinator: _values(c, items, iterations),
            peers.MAP: lambda items, p=pools: p.ring.map(call, items),
            FUTURES: lambda items, p=pools: p.futures.map(call, items, chunksize=chunk),
        }
        for name, run in runs.items():
            contestants[workers_name(name, n)] = measure.rate_per_s(_counted(run), paths)
    return contestants


def _values(coordinator: Coordinator, paths: Sequence[str], iterations: int) -> Iterator[Any]:
    for result in coordinator.run_file_tasks(read_and_compute, paths, params={"iterations": iterations}):
        yield result.unwrap()


def _counted(run: Callable[[Sequence[str]], Iterable[Any]]) -> Callable[[Sequence[str]], None]:
    def take(items: Sequence[str]) -> None:
        n = sum(1 for _ in run(items))
        if n != len(items):
            raise RuntimeError(f"{n} results for {len(items)} tasks")

    return take


def _print_efficiency(label: str, series: dict[str, list[float]], counts: Sequence[int], names: Sequence[str]) -> None:
    print(f"\nspeed-up and efficiency, {label}")
    print(f"    {'workers':28}" + "".join(f"{n:>16}" for n in counts))
    for name in names:
        alone = statistics.median(series[workers_name(name, 1)])
        ups = [statistics.median(series[workers_name(name, n)]) / alone for n in counts]
        print(f"    {name:28}" + "".join(f"{f'{up:.2f}x {up / n:.0%}':>16}" for up, n in zip(ups, counts, strict=True)))


# ---- tasks


def bench_tasks(quick: bool) -> Iterator[Case]:
    """Lazy no-ops: how fast, and how much the parent grows."""
    scale = QUICK if quick else FULL
    many, names = scale.lazy_many, peers.installed(LAZY)
    taken = {name: {n: [_taken(name, n)] for n in scale.lazy_few} for name in names}
    last = scale.lazy_few[-1]
    slow = [name for name in names if taken[name][last][0][0] * many / last > SLOW_S]
    turns, _ = measure.take_turns(
        {name: functools.partial(_taken, name, many) for name in names if name not in slow}, scale.lazy_rounds
    )
    for name in names:
        taken[name][many] = turns[name] if name not in slow else [_taken(name, many)]
    if scale.lazy_max > many:
        taken[peers.MAP][scale.lazy_max] = [_taken(peers.MAP, scale.lazy_max)]
    limit_s = SECONDS_MAX * many / FULL.lazy_many
    seconds = {name: [spent_s for spent_s, _ in taken[name][many]] for name in names}
    claims = [Claim(name, None, at_most(limit_s)) for name in (peers.MAP, BOUNDED)]
    claims += [Claim(peers.MAP, name) for name in turns if name != peers.MAP]
    title = f"{many:,} lazy no-ops{peers.without(LAZY)}"
    once = f"; once: {', '.join(slow)}" if slow else ""
    yield Case(f"scale-tasks, time: {title}{once}", "s", seconds, claims)  # what has ended would count as others
    rates = {_of(name, n): [n / spent_s for spent_s, _ in taken[name][n]] for name in names for n in taken[name]}
    growth = {_of(name, n): [grown_mib for _, grown_mib in taken[name][n]] for name in names for n in taken[name]}
    yield Case(f"scale-tasks, rate: lazy no-ops, by their number{peers.without(LAZY)}", "items/s", rates, [])
    yield Case(f"scale-tasks, memory: growth of the parent over them{peers.without(LAZY)}", "MiB", growth, [])


def _of(name: str, n: int) -> str:
    return f"10^{len(str(n)) - 1} {name}"


def _taken(name: str, n: int) -> tuple[float, float]:
    """Seconds and MiB that ``n`` lazy items cost a fresh program."""
    spent_s, grown_mib = json.loads(python("-m", "benchmarks.bench_scale", name, str(n)))
    return spent_s, grown_mib


def print_taken(name: str, n_items: str) -> None:
    """The program of its own: seconds that a map over so many lazy items takes, and the MiB that it ever grew by."""

    def items(n: int) -> Iterator[int]:
        return (i for i in range(n))  # a generator: nobody knows how many will come

    def memory_kib(field: str) -> int:
        return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    way = LAZY[name]
    with Pools(LAZY_WORKERS) as pools:
        n_taken = sum(1 for _ in way(pools, no_op, items(1_000)))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, see proc_pid_clear_refs(5)
        before_kib, began_s = memory_kib("VmRSS"), time.perf_counter()
        n_taken += sum(1 for _ in way(pools, no_op, items(int(n_items))))
        spent_s = time.perf_counter() - began_s
        grown_kib = memory_kib("VmHWM") - before_kib
    if n_taken != 1_000 + int(n_items):
        raise RuntimeError(f"{name} gave {n_taken - 1_000} results for {n_items} items")
    print(json.dumps([spent_s, grown_kib / 1024]))


# ---- the ring


class Switches(NamedTuple):
    """Context switches so far: of workers that went to sleep, of workers that had to go, and of the parent."""

    voluntary: int
    involuntary: int
    parent: int

    @staticmethod
    def of(coordinator: Coordinator) -> Switches:
        counts = [psutil.Process(pid).num_ctx_switches() for pid in coordinator.worker_pids]
        mine = resource.getrusage(resource.RUSAGE_SELF)
        return Switches(
            sum(count.voluntary for count in counts),
            sum(count.involuntary for count in counts),
            mine.ru_nvcsw + mine.ru_nivcsw,
        )


def bench_ring(quick: bool) -> Iterator[Case]:
    """Slots and claims: throughput, and who has to sleep for it."""
    scale = QUICK if quick else FULL
    pairs = [(slots, CLAIMS_DEFAULT) for slots in SLOTS] + [(SLOTS_DEFAULT, n) for n in CLAIMS if n != CLAIMS_DEFAULT]
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir=segment.SHM_DIRECTORY)
        )
        files = _small_files(directory)
        iterations = iterations_for(TASKS_NS["40 us"], files)
        coordinators = {
            f"{slots:,} slots, claims of {claims}": stack.enter_context(
                Coordinator(RING_WORKERS, ring_slots=slots, claims_max=claims)
            )
            for slots, claims in pairs
        }
        n_tasks = round(scale.ring_turn_s * RING_WORKERS * 25_000)
        computing = [files[i % len(files)] for i in range(n_tasks)]
        for label, call, paths, params in (
            ("no-ops", no_file_op, _paths(round(scale.ring_turn_s * 300_000)), {}),
            ("40 us of CPU a task", read_and_compute, computing, {"iterations": iterations}),
        ):
            contestants = {
                name: functools.partial(_switching, coordinator, call, paths, params)
                for name, coordinator in coordinators.items()
            }
            figures, others = measure.take_turns(contestants, scale.rounds)
            yield from _ring_cases(f"{label}, {RING_WORKERS} workers", figures, others)


def _switching(
    coordinator: Coordinator, call: Callable[..., Any], paths: Sequence[str], params: dict[str, Any]
) -> tuple[float, ...]:
    """Tasks a second; and per thousand tasks, what ``Switches`` counts."""
    before, began_s, n = Switches.of(coordinator), time.perf_counter(), 0
    for result in coordinator.run_file_tasks(call, paths, params=params):
        if result.error is not None:
            raise result.error
        n += 1
    spent_s = time.perf_counter() - began_s
    after = Switches.of(coordinator)
    if n != len(paths):
        raise RuntimeError(f"{n} results for {len(paths)} tasks")
    return n / spent_s, *(1000 * (b - a) / n for a, b in zip(before, after, strict=True))


def _ring_cases(label: str, figures: dict[str, list[tuple[float, ...]]], others: list[float]) -> Iterator[Case]:
    default = f"{SLOTS_DEFAULT:,} slots, claims of {CLAIMS_DEFAULT}"
    for which, (what, unit) in enumerate(
        (
            ("throughput", "tasks/s"),
            ("workers' voluntary switches", "/ 1,000 tasks"),
            ("workers' involuntary switches", "/ 1,000 tasks"),
            ("the parent's switches", "/ 1,000 tasks"),
        )
    ):
        series = {name: [turn[which] for turn in turns] for name, turns in figures.items()}
        claims = [] if which else [Claim(name, default) for name in series if name != default]
        yield Case(f"scale-ring, {what}: {label}", unit, series, claims, others)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "scale-workers": bench_workers,
    "scale-tasks": bench_tasks,
    "scale-ring": bench_ring,
}


if __name__ == "__main__":
    from benchmarks import bench_scale  # so that workers know its functions by a name that they can import

    bench_scale.print_taken(*sys.argv[1:])

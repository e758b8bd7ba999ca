"""What deaths cost, and long tasks among short ones, and large arrays; beside what people use today.

    case            contestants                                                             bar
    faults-deaths   1,000 tasks of 1 ms; 10 of them SIGKILL their worker, the first time,   nothing lost, 990 results;
                    or whenever they are tried: who ends, with what, when                   1.5x the undisturbed time
    heavy-tail      10 us to half a second of CPU a task, as in a Pareto distribution
    arrays          64 MiB of numpy there and back

    python -m benchmarks faults [--quick] [--json FILE]        or some of them, by name
    python -m benchmarks.bench_faults NAME DIRECTORY .once|.always       a contestant's own program

``faults-deaths``: some contestants hang, and some take their program with them. So each has a process of its own, which
says what became of a task as soon as that is known, and which is killed with all its descendants 30 s after its start,
or when it has said nothing for 10 s. With ``--quick``, all are deadly always.

    outcome     of a task
    result      the value that it should give
    error       an exception, of whatever kind
    lost        nothing was heard of it

``heavy-tail``: of a truncated Pareto distribution with exponent 1, in which each decade of durations has the same share
of the CPU time, its quantiles in a seeded order: all rounds, and all machines, have the same list. Efficiency is what
the tasks take, by what the cores had to give.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import math
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from importlib import import_module
from typing import Any, NamedTuple

import psutil
from benchmarks.bench_dispatch import Split
from benchmarks.pool_tasks import compute
from benchmarks.scale_tasks import ALWAYS, ONCE, PIECE_ITERATIONS, live_or_die, negated

from ringpool import Coordinator, RingPoolExecutor
from ringpool.bench import measure, peers
from ringpool.bench.measure import Case, Claim, at_least, at_most
from ringpool.bench.peers import Pools
from ringpool.shm import segment

WORKERS = 2
TASKS = 1_000
DEATHS = 10


class Patience(NamedTuple):
    """How long a contestant may live, and how long it may say nothing, in seconds."""

    life_s: float
    silence_s: float


PATIENCE, QUICK_PATIENCE = Patience(30, 10), Patience(10, 4)
END_S = 5.0  # for the tracker of a killed program's semaphores, to remove them
TIME_MAX = 1.5

MAP_EXCEPTIONS = f"{peers.MAP}, return_exceptions"
RETRIES = "RingPoolExecutor.submit, retries=2"
FILES = "Coordinator.run_file_tasks"
IMAP = "Pool.imap_unordered"
JOBLIB = "joblib.Parallel, generator_unordered"
DASK = "dask.distributed, submit"
OURS = (peers.SUBMIT, MAP_EXCEPTIONS, RETRIES, FILES)
UNDISTURBED = f"{peers.SUBMIT}, no deaths"
NONE = ".none"  # what no name ends in

DECADES = 5  # of durations, from SHORTEST_US
SHORTEST_US = 10.0
HEAVY_S, QUICK_HEAVY_S = 1.5, 0.25  # of CPU for each worker
SPLIT = "split, no pool"
HEAVY_MAPS = (peers.MAP, peers.MAP_UNORDERED, peers.FUTURES_MAP_64, peers.IMAP_64)
HEAVY_SUBMITS = (peers.SUBMIT, peers.FUTURES_SUBMIT)

ARRAY_MIB = 64
ARRAY_SUBMITS = (peers.SUBMIT, peers.FUTURES_SUBMIT, peers.APPLY_ASYNC, peers.LOKY_SUBMIT)
ARRAY_MAPS = (peers.JOBLIB,)


# ---- deaths: the contestants. Each gives (task, its value or its exception), as they come

Outcome = tuple[int, Any]


def _of_futures(submit: Callable[[str], Any], names: Sequence[str]) -> Iterator[Outcome]:
    futures: dict[Future[Any], int] = {}
    for index, name in enumerate(names):
        try:
            futures[submit(name)] = index
        except Exception as error:  # a broken pool refuses tasks
            yield index, error
    for future in as_completed(futures):
        yield futures[future], future.exception() or future.result()


def _of_iterator(results: Iterable[Any]) -> Iterator[Outcome]:
    """Values without their tasks; an exception ends them, and is that of all that have none."""
    yield from enumerate(results)


def _submitted(how: peers.Submit) -> Callable[[Sequence[str]], Iterator[Outcome]]:
    def run(names: Sequence[str]) -> Iterator[Outcome]:
        with Pools(WORKERS) as pools:
            yield from _of_futures(lambda name: how(pools, live_or_die, name), names)

    return run


def _with_retries(names: Sequence[str]) -> Iterator[Outcome]:
    with RingPoolExecutor(WORKERS) as pool:
        yield from _of_futures(functools.partial(pool.options(retries=2).submit, live_or_die), names)


def _map_exceptions(names: Sequence[str]) -> Iterator[Outcome]:
    with Pools(WORKERS) as pools:
        yield from enumerate(pools.ring.map(live_or_die, names, return_exceptions=True))


def _file_tasks(names: Sequence[str]) -> Iterator[Outcome]:
    numbers = {name: index for index, name in enumerate(names)}
    with Coordinator(WORKERS) as coordinator:
        for result in coordinator.run_file_tasks(live_or_die, names):
            yield numbers[result.path], result.error or result.value


def _imap(names: Sequence[str]) -> Iterator[Outcome]:
    with Pools(WORKERS) as pools:
        yield from _of_iterator(pools.pool.imap_unordered(live_or_die, names))


def _mpire(names: Sequence[str]) -> Iterator[Outcome]:
    with Pools(WORKERS) as pools:
        yield from _of_iterator(pools.mpire.imap_unordered(live_or_die, names))


def _joblib(names: Sequence[str]) -> Iterator[Outcome]:
    joblib: Any = import_module("joblib")
    parallel = joblib.Parallel(n_jobs=WORKERS, return_as="generator_unordered")
    yield from _of_iterator(parallel(map(joblib.delayed(live_or_die), names)))


def _dask(names: Sequence[str]) -> Iterator[Outcome]:
    distributed: Any = import_module("distributed")
    with (
        distributed.LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        futures = [client.submit(live_or_die, name, pure=False) for name in names]
        numbers = {future.key: index for index, future in enumerate(futures)}
        for future in distributed.as_completed(futures):
            yield numbers[future.key], future.exception() or future.result()


SURVIVORS: dict[str, Callable[[Sequence[str]], Iterator[Outcome]]] = {
    peers.SUBMIT: _submitted(peers.SUBMITS[peers.SUBMIT]),
    MAP_EXCEPTIONS: _map_exceptions,
    RETRIES: _with_retries,
    FILES: _file_tasks,
    peers.FUTURES_SUBMIT: _submitted(peers.SUBMITS[peers.FUTURES_SUBMIT]),
    IMAP: _imap,
    peers.LOKY_SUBMIT: _submitted(peers.SUBMITS[peers.LOKY_SUBMIT]),
    JOBLIB: _joblib,
    "mpire.imap_unordered": _mpire,
    peers.PEBBLE_SCHEDULE: _submitted(peers.SUBMITS[peers.PEBBLE_SCHEDULE]),
    DASK: _dask,
}


def print_outcomes(name: str, directory: str, fate: str) -> None:
    """A contestant's program: a line for each task that has an outcome, and one at the end."""
    every = TASKS // DEATHS
    names = [f"{directory}/{i:04}{fate if i % every == every // 2 else ''}" for i in range(TASKS)]
    value = compute(PIECE_ITERATIONS)
    print("begin", flush=True)
    try:
        for index, outcome in SURVIVORS[name](names):
            what = "result" if outcome == value else type(outcome).__name__
            print(index, what, flush=True)
    except Exception as error:
        print("raised", type(error).__name__, flush=True)
    print("end", "-", flush=True)


# ---- deaths: what is heard of them


class Heard(NamedTuple):
    """What was heard of a contestant: results; errors, by their kind; the exception that ended its run; the end of its
    program (``ended``, ``died``, ``killed``); seconds from the start of its pool to that; how long before that it had
    last said something; and seconds from its first outcome to its last.
    """

    results: int
    errors: collections.Counter[str]
    raised: str
    end: str
    spent_s: float
    silent_s: float
    working_s: float

    @property
    def lost(self) -> int:
        """Tasks of which nothing was heard."""
        return TASKS - self.results - self.errors.total()

    @property
    def manner(self) -> str:
        """How it ended, for people."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.errors.most_common(2))
        silent = f" after {self.silent_s:.1f} s of silence" if self.end == "killed" else ""
        return "; ".join(filter(None, (self.end + silent, self.raised and f"map raised {self.raised}", kinds)))


def _hear(name: str, fate: str, patience: Patience) -> Heard:
    """Run a contestant in a process of its own, and listen until it ends, or has had its time."""
    with tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir=segment.SHM_DIRECTORY) as directory:
        program = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_faults", name, directory, fate],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"TMPDIR": directory, "JOBLIB_TEMP_FOLDER": directory},
        )
        try:
            return _listen(program, patience)
        finally:
            _end(program)


def _listen(program: subprocess.Popen[bytes], patience: Patience) -> Heard:
    assert program.stdout is not None
    fd, began_s = program.stdout.fileno(), time.perf_counter()
    text, heard_s, end = b"", began_s, "killed"
    outcomes_s: list[float] = []
    while select.select([fd], [], [], max(0.0, min(patience.silence_s, began_s + patience.life_s - heard_s)))[0]:
        more = os.read(fd, 1 << 16)
        heard_s = time.perf_counter()
        if not text:
            began_s = heard_s  # with its first word: it has been imported
        elif more.partition(b"\n")[0].split()[-1:] != [b"-"]:
            outcomes_s.append(heard_s)
        text += more
        if not more or text.endswith(b"end -\n"):
            end = "ended" if more else "died"
            break
    whole, _, _ = text.rpartition(b"\n")
    lines = [line.split() for line in whole.decode().splitlines()[1:]]
    outcomes = {words[0]: words[1] for words in lines if words[0].isdigit()}
    errors = collections.Counter(what for what in outcomes.values() if what != "result")
    raised = next((words[1] for words in lines if words[0] == "raised"), "")
    results = sum(what == "result" for what in outcomes.values())
    over_s = time.perf_counter() if end == "killed" else heard_s
    working_s = outcomes_s[-1] - outcomes_s[0] if outcomes_s else 0.0
    return Heard(results, errors, raised, end, over_s - began_s, over_s - heard_s, working_s)


def _end(program: subprocess.Popen[bytes]) -> None:
    """Kill a program and its descendants; but trackers of semaphores, which end by themselves and leave none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        me = psutil.Process(program.pid)
        family = [me, *me.children(recursive=True)]
        trackers: list[psutil.Process] = []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "resource_tracker" in " ".join(process.cmdline()):
                    trackers.append(process)
                else:
                    process.kill()
        for process in psutil.wait_procs(trackers, END_S)[1]:
            process.kill()
    program.kill()
    program.wait()
    assert program.stdout is not None
    program.stdout.close()


def bench_deaths(quick: bool) -> Iterator[Case]:
    """Who outlives the deaths of workers; and, of those that do, what time it costs."""
    patience = QUICK_PATIENCE if quick else PATIENCE
    names = [name for name in peers.installed(SURVIVORS) if name != DASK or importlib.util.find_spec("distributed")]
    missing = "" if DASK in names else " (not installed: distributed)"
    enduring: list[str] = []
    for fate, title in ((ONCE, "deadly once"), (ALWAYS, "deadly always"))[quick:]:
        heard = {name: _hear(name, fate, patience) for name in names}
        _print_heard(title, heard)
        title = f"{title}: {TASKS:,} tasks, {DEATHS} kill their worker{peers.without(names)}{missing}"
        claims = [Claim(name, None, at_least(TASKS - DEATHS)) for name in OURS]
        results = {name: [float(each.results)] for name, each in heard.items()}
        yield Case(f"faults, results, {title}", "tasks", results, claims)
        lost = {name: [float(each.lost)] for name, each in heard.items()}
        yield Case(f"faults, lost, {title}", "tasks", lost, [Claim(claim.ours, None, at_most(0)) for claim in claims])
        seconds = {name: [each.spent_s] for name, each in heard.items()}
        yield Case(f"faults, until the end or the watchdog, {title}", "s", seconds, [])
        enduring = [name for name in names if not heard[name].lost and heard[name].results >= TASKS - DEATHS]
    if quick:
        enduring = [name for name in enduring if name == peers.SUBMIT]
    yield _time_of(enduring, patience, 1 if quick else measure.ROUNDS)


def _time_of(names: Sequence[str], patience: Patience, rounds: int) -> Case:
    """What ten deaths cost those who outlive them."""
    contestants = {UNDISTURBED: lambda: _hear(peers.SUBMIT, NONE, patience).working_s}
    contestants |= {name: lambda name=name: _hear(name, ALWAYS, patience).working_s for name in names}
    series, _ = measure.take_turns(contestants, rounds)  # programs that have ended would count as others
    claims = [
        Claim(name, UNDISTURBED, at_most(TIME_MAX) if name in (peers.SUBMIT, MAP_EXCEPTIONS) else None)
        for name in series
        if name != UNDISTURBED
    ]
    return Case("faults, time, deadly always: from the first outcome to the last", "s", series, claims)


def _print_heard(title: str, heard: dict[str, Heard]) -> None:
    print(f"\n{TASKS:,} tasks of 1 ms, {DEATHS} of them {title}")
    print(f"    {'':42}{'results':>8}{'errors':>8}{'lost':>6}{'seconds':>9}   end")
    for name, each in heard.items():
        print(
            f"    {name:42}{each.results:>8}{each.errors.total():>8}{each.lost:>6}{each.spent_s:>9.2f}   {each.manner}"
        )


# ---- long tasks among short ones


def durations_us(total_us: float, seed: int = 1) -> list[float]:
    """Durations of tasks that take about ``total_us`` together, see the module."""
    longest = 10.0**DECADES  # times the shortest
    mean_us = SHORTEST_US * math.log(longest) / (1 - 1 / longest)
    n = max(1, round(total_us / mean_us))
    # The inverse of F(x) = (1 - 1/x) / (1 - 1/longest), x being a multiple of the shortest, in the middle of each part.
    spent_us = [SHORTEST_US / (1 - (i + 0.5) / n * (1 - 1 / longest)) for i in range(n)]
    random.Random(seed).shuffle(spent_us)
    return spent_us


def bench_heavy_tail(quick: bool) -> Iterator[Case]:
    """How well a few long tasks are spread among cores that have very many short ones."""
    wanted_s = QUICK_HEAVY_S if quick else HEAVY_S
    spent_us = durations_us(wanted_s * 1e6 * WORKERS)
    per_us = _iterations_per_us()
    items = [max(1, round(us * per_us)) for us in spent_us]
    numbers = [str(i) for i in range(len(items))]
    cpu_s = sum(items) / per_us / 1e6
    with contextlib.ExitStack() as stack:
        split = Split(WORKERS, numbers, lambda number: compute(items[int(number)]))
        stack.callback(split.close)
        pools = stack.enter_context(Pools(WORKERS))
        contestants = {SPLIT: _seconds(split.run)}
        for name in peers.installed((*HEAVY_MAPS, *HEAVY_SUBMITS)):
            way = peers.MAPS.get(name) or peers.submit_all(peers.SUBMITS[name])
            contestants[name] = _seconds(lambda way=way: _drain(way(pools, compute, items)))
        series, others = measure.take_turns(contestants, measure.QUICK_ROUNDS if quick else measure.ROUNDS)
    longest_s = max(spent_us) / 1e6
    title = f"{len(items):,} tasks of 10 us to {longest_s:.2g} s, {cpu_s:.2g} s of CPU{peers.without(HEAVY_MAPS)}"
    claims = [Claim(name, SPLIT) for name in series if name != SPLIT]
    claims += [Claim(peers.MAP, name) for name in series if not name.startswith((SPLIT, "RingPool"))]
    yield Case(f"heavy-tail, time: {title}", "s", series, claims, others)
    efficiency = {name: [100 * cpu_s / (WORKERS * s) for s in turns] for name, turns in series.items()}
    yield Case(f"heavy-tail, efficiency: {title}", "%", efficiency, [], others)


def _iterations_per_us() -> float:
    """Of ``compute``, on this machine at its quietest."""
    costs_ns: list[int] = []
    for _ in range(20):
        began_ns = time.process_time_ns()
        compute(50_000)
        costs_ns.append(time.process_time_ns() - began_ns)
    return 50_000_000 / min(costs_ns)


def _seconds(run: Callable[[], object]) -> Callable[[], float]:
    def turn() -> float:
        began_s = time.perf_counter()
        run()
        return time.perf_counter() - began_s

    return turn


def _drain(results: Iterable[Any]) -> None:
    collections.deque(results, maxlen=0)


# ---- arrays


def bench_arrays(quick: bool) -> Iterator[Case]:
    """A large array to a worker, and one as large back."""
    if importlib.util.find_spec("numpy") is None:
        print("\narrays: numpy is not installed")
        return
    numpy: Any = import_module("numpy")
    array = numpy.arange(ARRAY_MIB << 17, dtype=numpy.float64)

    def trip(result_of: Callable[[], Any]) -> Callable[[], float]:
        def turn() -> float:
            began_s = time.perf_counter()
            result = result_of()
            ends = (result[0], result[1], result[-1])
            spent_s = time.perf_counter() - began_s
            if ends != (0, -1, 1 - len(array)):
                raise RuntimeError(f"a wrong array came back: {ends}")
            return 1000 * spent_s

        return turn

    with Pools(WORKERS) as pools:
        contestants = {"in this process": trip(lambda: negated(array))}
        for name in peers.installed(ARRAY_SUBMITS):
            contestants[name] = trip(lambda submit=peers.SUBMITS[name]: submit(pools, negated, array).result())
        for name in peers.installed(ARRAY_MAPS):
            contestants[name] = trip(lambda way=peers.MAPS[name]: next(iter(way(pools, negated, [array]))))
        series, others = measure.take_turns(contestants, measure.QUICK_ROUNDS if quick else measure.ROUNDS)
    claims = [Claim(peers.SUBMIT, name) for name in series if name != peers.SUBMIT]
    title = f"{ARRAY_MIB} MiB of numpy there, as much back{peers.without((*ARRAY_SUBMITS, *ARRAY_MAPS))}"
    yield Case(f"arrays: {title}", "ms", series, claims, others)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "faults-deaths": bench_deaths,
    "heavy-tail": bench_heavy_tail,
    "arrays": bench_arrays,
}


if __name__ == "__main__":
    from benchmarks import bench_faults  # so that workers know its functions by a name that they can import

    bench_faults.print_outcomes(*sys.argv[1:])

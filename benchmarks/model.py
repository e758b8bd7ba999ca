"""A model of one ring: how fast it is with more workers than this machine has, and what stops it.

                +--> lock (one at a time): hold h ---------+
    N workers --+                                          +--> b tasks: b (S + o) --> again     machine repairman, MVA
                +------------------------------------------+
    coordinator (one interpreter): c a task                     the ring between them holds far more than N tasks,
                                                                so each of the two goes at its own pace, or the other's

    throughput = the least of        workers       N b / (b (S + o) + R(N)),  R(N): time at the lock, by MVA
                                     coordinator   1 / c,  or 1 / (c + w / b) where workers sleep between claims
                                     cores         C / (S + o + c + h / b)

    S   seconds of CPU of a task          given; in the validation, as the bare split has it with as many processes
    b   tasks to a claim                  as the library chooses: a vector of 16 ms of work
    o   of a worker, for each task        measured: CPU time of a worker over no-ops
    c   of the coordinator, for each      measured: CPU time of this process over no-ops
    h   lock held by a claim              measured; and the handover between two processes
    w   to wake a worker that sleeps      measured: what a post costs the one who posts

Parameters are those of a quiet machine: the least of some goes, the lowest decile of many sections.

Left out: the machine itself. Memory that all cores share, a clock that falls when all of them compute, sockets apart:
these slow the bare split just as much, and the prediction is to be read beside that.

    python -m benchmarks.model [--quick] [--json FILE]        measure, predict, validate; a minute
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import bench_scale
from benchmarks.bench_dispatch import _fork, _paths, _reap, no_op as no_file_op
from benchmarks.bench_scale import FILES, SPLIT, TASKS_NS, worker_counts, workers_name

from ringpool import Coordinator
from ringpool.bench import measure, peers
from ringpool.bench.peers import Pools
from ringpool.bench.tasks import no_op
from ringpool.coordinator.callpool import RING_SLOTS
from ringpool.coordinator.filerun import AHEAD_MAX, TOGETHER_MAX
from ringpool.coordinator.pool import SPINS
from ringpool.coordinator.sizer import UNDER_WAY_ITEMS_MAX, VECTOR_ITEMS_MAX, VECTOR_NS
from ringpool.shm import segment
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import Results

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES_NS = TASKS_NS | {"10 ms": 10_000_000}
SCALES = 0.8  # of what as many rings with one worker each would do
SEARCH_MAX = 1 << 14  # workers
SPIN_S = SPINS * 0.5e-6  # how long a worker looks for work before it sleeps
LOCK_S = 0.2
PROBES = 2_000
POSTS = 200
VALIDATION_ROUNDS = 5


class Locks(NamedTuple):
    """Seconds: the lock held by a claim; what it takes to get it from another process; and what it costs to wake one
    that sleeps.
    """

    hold_s: float
    handover_s: float
    wake_s: float


class Way(NamedTuple):
    """A way to hand out tasks, as vectors: how many are in one, at most; tasks under way, at most; seconds that a task
    costs a worker, and the coordinator.
    """

    name: str
    tasks_max: int
    under_way_max: int
    worker_s: float
    coordinator_s: float

    def claim_of(self, task_s: float, workers: int) -> int:
        """How many tasks a worker takes at once."""
        share = self.under_way_max // (2 * workers)
        return max(1, min(int(VECTOR_NS / 1e9 / task_s), self.tasks_max, share))


class Prediction(NamedTuple):
    """Tasks a second, and what keeps it from being more: ``workers``, ``coordinator`` or ``cores``."""

    rate_per_s: float
    limit: str


# ---- the model: pure


def lock_residence_s(workers: int, think_s: float, hold_s: float) -> float:
    """Seconds that one of ``workers`` spends on waiting for a lock and holding it, where each comes back ``think_s``
    after it has let go: exact mean value analysis of a closed network of a delay and one queue.
    """
    queued = residence_s = 0.0
    for n in range(1, workers + 1):
        residence_s = hold_s * (1 + queued)
        queued = n * residence_s / (think_s + residence_s)
    return residence_s


def predict(way: Way, locks: Locks, task_s: float, workers: int, cores: int) -> Prediction:
    """Throughput of one ring, see the module."""
    b = way.claim_of(task_s, workers)
    hold_s = locks.hold_s + (locks.handover_s if workers > 1 else 0)
    think_s = b * (task_s + way.worker_s)
    workers_per_s = workers * b / (think_s + lock_residence_s(workers, think_s, hold_s))
    coordinator_per_s = 1 / way.coordinator_s
    if workers * b / coordinator_per_s - think_s > SPIN_S:  # a worker has so long between two claims that it sleeps
        coordinator_per_s = 1 / (way.coordinator_s + locks.wake_s / b)
    cores_per_s = cores / (task_s + way.worker_s + way.coordinator_s + hold_s / b)
    bounds = {"workers": workers_per_s, "coordinator": coordinator_per_s, "cores": cores_per_s}
    limit = min(bounds, key=bounds.__getitem__)
    return Prediction(bounds[limit], limit)


def scaling_of(way: Way, locks: Locks, task_s: float, workers: int) -> float:
    """Throughput by that of as many rings with one worker each; cores are as many as workers."""
    alone_per_s = predict(way, locks, task_s, 1, 1).rate_per_s
    return predict(way, locks, task_s, workers, workers).rate_per_s / (workers * alone_per_s)


def most_workers(way: Way, locks: Locks, task_s: float) -> int:
    """Where one ring stops scaling: how many workers it has before it falls below SCALES."""
    least, most = 1, SEARCH_MAX
    while most - least > 1:
        middle = (least + most) // 2
        if scaling_of(way, locks, task_s, middle) >= SCALES:
            least = middle
        else:
            most = middle
    return least


# ---- its parameters, measured


def measure_locks() -> Locks:
    """On a segment of its own, in this process and a forked one."""
    ring = segment.create(RING_SLOTS, 1)
    try:
        end = CoordinatorEnd(ring)
        hold_s = _exchange_s(ring, end)
        handover_s = _handover_s(end)
        wake_s = _wake_s(end)
        end.close()
    finally:
        segment.unlink(ring.name)
    return Locks(hold_s, handover_s, wake_s)


def _exchange_s(ring: segment.Segment, end: CoordinatorEnd) -> float:
    """A worker's one section: hand in an entry, and take another. Nobody else is there."""
    worker = WorkerEnd(segment.attach(ring.name), 0)
    results = Results(worker.ring, 0)
    spent_s: list[float] = []
    for _ in range(PROBES):
        end.publish([Task(0, b"")])
        began_s = time.perf_counter()
        entries = worker.exchange(1, False)
        spent_s.append(time.perf_counter() - began_s)
        for entry in entries or ():
            results.post(entry, int(Status.OK), int(Encoding.MSGPACK), b"\xc0", 0)
        end.collect(lambda _slot, _entry: None)
    worker.leave()
    end.collect(lambda _slot, _entry: None)
    worker.ring.close()
    return statistics.quantiles(spent_s, n=10)[0]


def _handover_s(end: CoordinatorEnd) -> float:
    """What a pair of lock and unlock costs more where two processes do nothing else."""
    lock = end.ring.lock

    def pairs() -> int:
        n, until_s = 0, time.perf_counter() + LOCK_S
        while time.perf_counter() < until_s:
            for _ in range(64):
                lock.acquire()
                lock.release()
            n += 64
        return n

    alone_s = LOCK_S / pairs()
    read_fd, write_fd = os.pipe()
    pid = _fork(lambda: os.write(write_fd, pairs().to_bytes(8, "little")))
    mine = pairs()
    theirs = int.from_bytes(os.read(read_fd, 8), "little")
    _reap([pid])
    os.close(read_fd)
    os.close(write_fd)
    return max(0.0, LOCK_S / (mine + theirs) - alone_s)


def _wake_s(end: CoordinatorEnd) -> float:
    """What a post costs the one who posts, where a process sleeps on the semaphore."""
    semaphore = end.semaphores[0]
    pid = _fork(lambda: [semaphore.acquire() for _ in range(POSTS)])
    spent_s: list[float] = []
    for _ in range(POSTS):
        time.sleep(0.001)  # it sleeps again by then
        began_s = time.perf_counter()
        semaphore.release()
        spent_s.append(time.perf_counter() - began_s)
    _reap([pid])
    return statistics.quantiles(spent_s, n=10)[0]


def measure_ways(n_tasks: int) -> tuple[Way, Way]:
    """File tasks, and the items of a map: what a no-op costs each side, with one worker."""
    paths, numbers = _paths(n_tasks), range(4 * n_tasks)
    with Coordinator(1) as coordinator:
        files = _costs(lambda: coordinator.run_file_tasks(no_file_op, paths), n_tasks, lambda: coordinator.worker_pids)
    with Pools(1) as pools:
        vectors = _costs(lambda: pools.ring.map(no_op, numbers), len(numbers), lambda: pools.ring.worker_pids)
    return (
        Way(FILES, TOGETHER_MAX, AHEAD_MAX, *files),
        Way(peers.MAP, VECTOR_ITEMS_MAX, UNDER_WAY_ITEMS_MAX, *vectors),
    )


def _costs(run: Callable[[], Iterable[Any]], n_tasks: int, pids: Callable[[], tuple[int, ...]]) -> tuple[float, float]:
    """Seconds of CPU that a task costs its worker, and this process; the least of some goes."""

    def own_s() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    def workers_s() -> float:  # schedstat counts nanoseconds, where stat has ticks of 10 ms
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids()) / 1e9

    costs: list[tuple[float, float]] = []
    sum(1 for _ in run())
    for _ in range(VALIDATION_ROUNDS):
        began = workers_s(), own_s()
        n = sum(1 for _ in run())
        costs.append(((workers_s() - began[0]) / n, (own_s() - began[1]) / n))
        if n != n_tasks:
            raise RuntimeError(f"{n} results for {n_tasks} tasks")
    return min(cost for cost, _ in costs), min(cost for _, cost in costs)


# ---- validation


class Point(NamedTuple):
    """A measured throughput beside the predicted one, tasks a second."""

    way: str
    task: str
    workers: int
    split_per_s: float
    measured_per_s: float
    predicted_per_s: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a part of what was measured; above 0: it promises too much."""
        return self.predicted_per_s / self.measured_per_s - 1


def validate(ways: Sequence[Way], locks: Locks, quick: bool) -> list[Point]:
    """Measure with each number of workers that this machine has cores for, and compare."""
    scale = bench_scale.QUICK if quick else bench_scale.FULL
    rounds = measure.QUICK_ROUNDS if quick else VALIDATION_ROUNDS
    counts, points = worker_counts(), list[Point]()
    for label, task_ns in TASKS_NS.items():
        with contextlib.ExitStack() as stack:
            series, _ = measure.take_turns(bench_scale.scaling(stack, task_ns, counts, scale), rounds)
        for way in ways:
            for n in counts:
                split_per_s = statistics.median(series[workers_name(SPLIT, n)])
                measured_per_s = statistics.median(series[workers_name(way.name, n)])
                predicted = predict(way, locks, n / split_per_s, n, counts[-1])
                points.append(Point(way.name, label, n, split_per_s, measured_per_s, predicted.rate_per_s))
    return points


# ---- the command


def print_parameters(ways: Sequence[Way], locks: Locks) -> None:
    """What was measured, in microseconds."""
    print("\nparameters, us")
    for way in ways:
        print(
            f"    {way.name:24} worker {1e6 * way.worker_s:6.2f}   coordinator {1e6 * way.coordinator_s:6.2f}   a task"
        )
    print(f"    {'lock':24} held by a claim {1e6 * locks.hold_s:.2f}; handover {1e6 * locks.handover_s:.2f}")
    print(f"    {'post to a sleeper':24} {1e6 * locks.wake_s:.2f}")


def print_predictions(way: Way, locks: Locks) -> None:
    """Throughput over workers, as a part of what the cores could do if nothing but the tasks took time."""
    print(f"\n{way.name}: predicted tasks/s with as many cores as workers, and efficiency")
    print(f"{'limit: w workers, c coordinator, o cores':>60}")
    print(f"    {'task':8}" + "".join(f"{n:>16}" for n in WORKERS) + "   scales to")
    for label, task_ns in SIZES_NS.items():
        task_s, cells = task_ns / 1e9, ""
        for n in WORKERS:
            rate_per_s, limit = predict(way, locks, task_s, n, n)
            letter = {"workers": "w", "coordinator": "c", "cores": "o"}[limit]
            cells += f"{f'{rate_per_s:,.0f} {rate_per_s * task_s / n:.0%} {letter}':>16}"
        print(f"    {label:8}{cells}   {most_workers(way, locks, task_s):,} workers")


def print_validation(points: Sequence[Point]) -> None:
    """Measured and predicted, side by side."""
    print(f"\n{'validation':36}{'workers':>8}{'bare split':>14}{'measured':>12}{'predicted':>12}{'error':>8}")
    for point in points:
        print(
            f"    {point.way + ', ' + point.task:32}"
            f"{point.workers:>8}{point.split_per_s:>14,.0f}{point.measured_per_s:>12,.0f}"
            f"{point.predicted_per_s:>12,.0f}{point.error:>+8.0%}"
        )
    errors = sorted(abs(point.error) for point in points)
    print(f"    median error {statistics.median(errors):.0%}, largest {errors[-1]:.0%}")


def write_json(file: Path, machine: dict[str, Any], ways: Sequence[Way], locks: Locks, points: Sequence[Point]) -> None:
    """Parameters, predictions and validation. Raises ``OSError``."""
    predictions = [
        {"way": way.name, "task": label, "task_s": task_ns / 1e9, "workers": n}
        | predict(way, locks, task_ns / 1e9, n, n)._asdict()
        for way in ways
        for label, task_ns in SIZES_NS.items()
        for n in WORKERS
    ]
    document = {
        "machine": machine,
        "locks": locks._asdict(),
        "ways": [way._asdict() for way in ways],
        "predictions": predictions,
        "validation": [point._asdict() | {"error": point.error} for point in points],
    }
    file.write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter turns, and fewer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write parameters, predictions and validation there")
    chosen = parser.parse_args(arguments)
    machine = measure.describe_machine("ringpool")
    measure.print_machine(machine, measure.QUICK_ROUNDS if chosen.quick else VALIDATION_ROUNDS)
    locks = measure_locks()
    ways = measure_ways(20_000 if chosen.quick else 100_000)
    print_parameters(ways, locks)
    for way in ways:
        print_predictions(way, locks)
    points = validate(ways, locks, chosen.quick)
    print_validation(points)
    if chosen.json is not None:
        write_json(chosen.json, machine, ways, locks, points)
    return 0


if __name__ == "__main__":
    sys.exit(main())

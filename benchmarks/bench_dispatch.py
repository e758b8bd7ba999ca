"""What it costs to hand a task to a worker and to get its result back, beside what people use today.

    case      contestants                                                       bar
    ring      bare ring, claims of 1, 8, 64  /  Pool.imap_unordered             claims of 1: at least 4x
    files     run_file_tasks  /  Pool.imap_unordered                            at least 2.5x
                              /  ProcessPoolExecutor.submit, result             at least 10x
    trip      submit_file_task(...).result()  /  submit(...).result()           at most half, median and p99
    memory    the parent over a million lazy inputs, in a process of its own    flat: at most 4 MiB
    real      40 us of CPU a task: bare ring  /  the list split in two, no pool at most 1.08x the time
                                   run_file_tasks  /  the same                  at most 1.3x the time
    end       SIGKILL, Ctrl-C: until the last process is gone                   SIGKILL: at most 2 s

    python -m benchmarks.bench_dispatch [--quick] [--json FILE] [CASE ...]

The peers get the same function and the same paths; the parameter that our file tasks carry they are spared, because it
would slow them down (``functools.partial`` is pickled with each task). All but the bare ring start by ``forkserver``:
how processes start is not measured, and they do not fork a process that has threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import multiprocessing.pool
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ringpool import Coordinator
from ringpool.bench import measure
from ringpool.bench.measure import Case, Claim, at_least, at_most
from ringpool.coordinator import leftovers
from ringpool.coordinator.pace import COLLECT_EVERY_S
from ringpool.coordinator.pool import SPINS
from ringpool.shm import segment
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import Results

RING_SLOTS = 1024
PUBLISH_MAX = 64
STUCK_S = 30.0  # without a single result: something is wrong, and nobody should wait for it
PR_SET_PDEATHSIG = 1
TASK_NS = 40_000
OCCUPIED_S = 30.0  # how long a task occupies its worker, at most: what outlives its pool does not do so for ever
GONE_LIMIT_S = 2.5
FLAT_MIB = 4.0
RSS_EVERY = 10_000
FIRST_ITEMS, TURN_S = 2_000, 3.0  # of a baseline
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

IMAP = "Pool.imap_unordered"
SUBMIT = "ProcessPoolExecutor.submit, result"
RUN = "run_file_tasks"


Item = TypeVar("Item")


class Scale(NamedTuple):
    """How much is measured: rounds, and tasks a turn. Futures cost so much that they get fewer."""

    rounds: int
    ring_tasks: int
    file_tasks: int
    future_tasks: int
    trips: int
    lazy_tasks: int
    real_tasks: int


FULL = Scale(measure.ROUNDS, 300_000, 300_000, 10_000, 1_000, 1_000_000, 25_000)
QUICK = Scale(measure.QUICK_ROUNDS, 40_000, 40_000, 5_000, 500, 300_000, 12_500)


# ---- what the workers run


def echo(payload: bytes) -> bytes:
    """The task of the bare ring: its result is its payload."""
    return payload


def no_op(src: str, *, level: int = 0) -> None:
    """The file task that costs nothing."""


def read_and_compute(src: str | bytes, *, iterations: int = 0) -> int:
    """A task as they really are, only short: open and read a small file, and compute."""
    with open(src, "rb", buffering=0) as file:
        total = len(file.read())
    for i in range(iterations):
        total += i & 1
    return total


def occupy(src: str) -> None:
    """Write this process's pid into the FIFO ``src``, and compute until somebody ends it."""
    with open(src, "wb", buffering=0) as fifo:
        fifo.write(b"%d\n" % os.getpid())
    deadline_s = time.monotonic() + OCCUPIED_S
    while time.monotonic() < deadline_s:
        pass


# ---- the bare ring, and no pool at all


def _fork(body: Callable[[], object]) -> int:
    """A child that runs ``body`` and ends; it is killed if this process dies. Its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        body()
        code = 0
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        os.write(2, f"a forked worker ended: {error!r}\n".encode())
    finally:
        os._exit(code)


class BareRing:
    """The ring with as little around it as possible: forked workers, and the coordinator's end in this thread."""

    def __init__(self, workers: int, batch: int, call: Callable[[bytes], bytes]) -> None:
        self._segment = segment.create(RING_SLOTS, workers)
        self._end = CoordinatorEnd(self._segment)
        self._n_collected = 0
        self._pids = [_fork(lambda index=index: self._work(index, batch, call)) for index in range(workers)]

    def _work(self, index: int, batch: int, call: Callable[[bytes], bytes]) -> None:
        end = WorkerEnd(self._segment, index, SPINS)
        results = Results(end.ring, index)
        claim, start, read_task, post, clock = end.claim, end.start, results.read_task, results.post, time.monotonic_ns
        ok, msgpack = int(Status.OK), int(Encoding.MSGPACK)
        while (entries := claim(batch)) is not None:
            began_ns = clock()
            for entry in entries:
                if not start(entry, began_ns):
                    break
                _, payload, _, _, _ = read_task(entry)
                post(entry, ok, msgpack, call(payload), 0)

    def run(self, tasks: Sequence[Task]) -> None:
        """Publish ``tasks``, and collect a result for each. Raises ``RuntimeError`` where none come any more."""
        end = self._end
        self._n_collected, n_published, n = 0, 0, len(tasks)
        heard_s = time.monotonic()
        while self._n_collected < n:
            while n_published < n and end.n_free:
                published = tasks[n_published : n_published + min(end.n_free, PUBLISH_MAX)]
                end.publish(published)
                n_published += len(published)
            end.wait(COLLECT_EVERY_S, RING_SLOTS // 2, COLLECT_EVERY_S)  # as the pool does it
            if end.collect(self._deliver):
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > STUCK_S:
                raise RuntimeError(f"no result for {STUCK_S:g} s; a worker of the bare ring must have died")

    def _deliver(self, _slot: int, entry: int) -> None:
        self._end.results.read(entry)
        self._n_collected += 1

    def close(self) -> None:
        """End the workers; nothing is left."""
        self._end.stop_workers()
        _reap(self._pids)
        self._end.close()
        segment.unlink(self._segment.name)


def _reap(pids: Sequence[int]) -> None:
    """Wait for children that were told to end; those that do not are killed."""
    for pid in pids:
        pidfd = os.pidfd_open(pid)
        if not select.select([pidfd], [], [], STUCK_S)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        os.waitpid(pid, 0)


class Split:
    """No pool: each of some forked processes runs its share of a list, and says when it has."""

    def __init__(self, processes: int, items: Sequence[str], call: Callable[[str], object]) -> None:
        self._go: list[int] = []
        self._ended: list[int] = []
        self._pids: list[int] = []
        for index in range(processes):
            go_read, go_write = os.pipe()
            ended_read, ended_write = os.pipe()
            share = items[index::processes]
            self._pids.append(_fork(lambda a=go_read, b=ended_write, items=share: self._work(a, b, items, call)))
            os.close(go_read)
            os.close(ended_write)
            self._go.append(go_write)
            self._ended.append(ended_read)

    def _work(self, go: int, ended: int, items: Sequence[str], call: Callable[[str], object]) -> None:
        while os.read(go, 1) == b"g":
            for item in items:
                call(item)
            os.write(ended, b"e")

    def run(self, _items: object = None) -> None:
        """Have the list run once. Raises ``RuntimeError`` where a process has died."""
        for fd in self._go:
            os.write(fd, b"g")
        for fd in self._ended:
            if os.read(fd, 1) != b"e":
                raise RuntimeError("a process without a pool has died")

    def close(self) -> None:
        """End the processes."""
        for fd in self._go:
            os.write(fd, b"x")
        _reap(self._pids)
        for fd in (*self._go, *self._ended):
            os.close(fd)


# ---- the peers, and ours, as contestants


@contextlib.contextmanager
def _pool(workers: int) -> Generator[multiprocessing.pool.Pool]:
    pool = multiprocessing.get_context("forkserver").Pool(workers)
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()


def _executor(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"))


def _imap(pool: multiprocessing.pool.Pool, call: Callable[..., Any]) -> Callable[[Sequence[object]], None]:
    def run(items: Sequence[object]) -> None:
        n = 0
        for _ in pool.imap_unordered(call, items, chunksize=1):
            n += 1
        assert n == len(items)

    return run


def _in_turns(run: Callable[[Sequence[object]], None], items: Sequence[object]) -> Callable[[], float]:
    """``rate_per_s`` of as many of ``items`` as take ``TURN_S``, by a first go: there are days when it would be ten
    times that.
    """
    first = items[:FIRST_ITEMS]
    began_s = time.perf_counter()
    run(first)
    return measure.rate_per_s(run, items[: int(len(first) * TURN_S / (time.perf_counter() - began_s))])


def _submit_all(executor: ProcessPoolExecutor, call: Callable[..., Any]) -> Callable[[Sequence[object]], None]:
    def run(items: Sequence[object]) -> None:
        for future in [executor.submit(call, item) for item in items]:
            future.result()

    return run


def _run_files(coordinator: Coordinator, call: Callable[..., Any], **params: Any) -> Callable[[Sequence[str]], None]:
    def run(items: Sequence[str]) -> None:
        n = 0
        for result in coordinator.run_file_tasks(call, items, params=params):
            if result.error is not None:
                raise result.error
            n += 1
        assert n == len(items)

    return run


def _paths(n: int) -> list[str]:
    return [f"/srv/photos/2024/holiday/{i:08}.jpg" for i in range(n)]


# ---- the cases


def bench_ring(quick: bool) -> Iterator[Case]:
    """No-op tasks a second through the ring alone."""
    scale = QUICK if quick else FULL
    payloads = [os.fsencode(path) for path in _paths(scale.ring_tasks)]
    tasks = [Task(0, payload) for payload in payloads]
    for workers in (1, 2):
        with contextlib.ExitStack() as stack:
            rings = {f"ring, claims of {batch}": BareRing(workers, batch, echo) for batch in (1, 8, 64)}
            for ring in rings.values():
                stack.callback(ring.close)
            pool = stack.enter_context(_pool(workers))
            series, others = measure.take_turns(
                {
                    IMAP: _in_turns(_imap(pool, echo), payloads),
                    **{name: measure.rate_per_s(ring.run, tasks) for name, ring in rings.items()},
                },
                scale.rounds,
            )
        claims = [Claim(name, IMAP, at_least(4) if name.endswith(" 1") else None) for name in rings]
        yield Case(f"ring, {_count(workers)}: no-ops through the bare ring", "tasks/s", series, claims, others)


def bench_files(quick: bool) -> Iterator[Case]:
    """No-op file tasks a second, all of the way."""
    scale = QUICK if quick else FULL
    paths = _paths(scale.file_tasks)
    for workers in (1, 2):
        with _pool(workers) as pool, _executor(workers) as executor, Coordinator(workers) as coordinator:
            series, others = measure.take_turns(
                {
                    IMAP: _in_turns(_imap(pool, no_op), paths),
                    RUN: measure.rate_per_s(_run_files(coordinator, no_op, level=3), paths),
                    SUBMIT: measure.rate_per_s(_submit_all(executor, no_op), paths[: scale.future_tasks]),
                },
                scale.rounds,
            )
        claims = [Claim(RUN, IMAP, at_least(2.5)), Claim(RUN, SUBMIT, at_least(10))]
        yield Case(f"files, {_count(workers)}: no-op file tasks", "tasks/s", series, claims, others)


def bench_trip(quick: bool) -> Iterator[Case]:
    """The round trip of a single file task."""
    scale = QUICK if quick else FULL

    def trips(trip: Callable[[], object]) -> Callable[[], tuple[float, float]]:
        def turn() -> tuple[float, float]:
            spent_us: list[float] = []
            for _ in range(scale.trips):
                began_ns = time.perf_counter_ns()
                trip()
                spent_us.append((time.perf_counter_ns() - began_ns) / 1000)
            spent_us.sort()
            return spent_us[len(spent_us) // 2], spent_us[len(spent_us) * 99 // 100]

        return turn

    ours, peer = "submit_file_task, result", "ProcessPoolExecutor.submit, result"
    with _executor(2) as executor, Coordinator(2) as coordinator:
        figures, others = measure.take_turns(
            {
                peer: trips(lambda: executor.submit(no_op, __file__).result()),
                ours: trips(lambda: coordinator.submit_file_task(no_op, __file__, params={"level": 3}).result()),
            },
            scale.rounds,
        )
    for which, quantile in enumerate(("median", "p99")):
        series = {name: [turn[which] for turn in turns] for name, turns in figures.items()}
        title = f"trip, {quantile}: one file task there and back, 2 workers"
        yield Case(title, "us", series, [Claim(ours, peer, at_most(0.5))], others)


def bench_memory(quick: bool) -> Iterator[Case]:
    """How much the parent grows over very many lazy inputs. Once: it takes long, and memory has no noise."""
    scale = QUICK if quick else FULL
    tasks = {"ringpool": scale.lazy_tasks, "pool": scale.lazy_tasks // 5}
    grown = {name: json.loads(_alone(f"memory-{name}", str(n), capture=True)) for name, n in tasks.items()}
    ours, peer = f"run_file_tasks, {scale.lazy_tasks:,}", f"{IMAP}, {scale.lazy_tasks // 5:,}"
    yield Case(
        "memory: growth of the parent over lazy inputs",
        "MiB",
        {peer: [grown["pool"]], ours: [grown["ringpool"]]},
        [Claim(ours, None, at_most(FLAT_MIB))],
    )


def bench_real(quick: bool) -> Iterator[Case]:
    """Tasks of 40 us of CPU, with 2 workers; the time that the list takes."""
    scale = QUICK if quick else FULL
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=segment.SHM_DIRECTORY))
        files = _small_files(directory)
        iterations = _calibrate(files)
        paths = [files[i % len(files)] for i in range(scale.real_tasks)]

        def on_ring(payload: bytes) -> bytes:
            return b"%d" % read_and_compute(payload, iterations=iterations)

        tasks = [Task(0, os.fsencode(path)) for path in paths]
        split = Split(2, paths, lambda path: read_and_compute(path, iterations=iterations))
        stack.callback(split.close)
        contestants: dict[str, Callable[[], float]] = {(plain := "split in two, no pool"): _time_us(split.run, paths)}
        for batch in (1, 8):
            ring = BareRing(2, batch, on_ring)
            stack.callback(ring.close)
            contestants[f"ring, claims of {batch}"] = _time_us(ring.run, tasks)
        coordinator = stack.enter_context(Coordinator(2))
        contestants[RUN] = _time_us(_run_files(coordinator, read_and_compute, iterations=iterations), paths)
        series, others = measure.take_turns(contestants, scale.rounds)
    claims = [
        *(Claim(name, plain, at_most(1.08)) for name in contestants if name.startswith("ring")),
        Claim(RUN, plain, at_most(1.3)),
    ]
    yield Case("real, 2 workers: 40 us of CPU a task, open and read included", "us/task", series, claims, others)


def _time_us(run: Callable[[Sequence[Item]], object], items: Sequence[Item]) -> Callable[[], float]:
    per_s = measure.rate_per_s(run, items)
    return lambda: 1e6 / per_s()


def _small_files(directory: str) -> list[str]:
    names = [os.path.join(directory, f"{i:03}.txt") for i in range(64)]
    for name in names:
        Path(name).write_bytes(b"a line of a small file\n" * 20)
    return names


def _calibrate(files: Sequence[str]) -> int:
    """For how many iterations ``read_and_compute`` takes TASK_NS of CPU on this machine, at its quietest."""

    def cost_ns(iterations: int) -> int:
        costs: list[int] = []
        for _ in range(20):
            began_ns = time.process_time_ns()
            for file in files:
                read_and_compute(file, iterations=iterations)
            costs.append(time.process_time_ns() - began_ns)
        return min(costs) // len(files)

    fixed_ns, with_1000_ns = cost_ns(0), cost_ns(1000)
    return max(0, round((TASK_NS - fixed_ns) * 1000 / (with_1000_ns - fixed_ns)))


def bench_end(quick: bool) -> Iterator[Case]:
    """From a signal to the end of the last process of a pool whose two workers are busy."""
    scale = QUICK if quick else FULL
    for number, title in (
        (signal.SIGKILL, "end, SIGKILL: of the parent, until its last worker is gone"),
        (signal.SIGINT, "end, Ctrl-C: until the program and its last worker are gone"),
    ):
        peer, ours = f"ProcessPoolExecutor ({GONE_LIMIT_S:g}: still there)", "Coordinator"
        series, _ = measure.take_turns(
            {
                peer: lambda number=number: _until_gone_s("occupied-futures", number),
                ours: lambda number=number: _until_gone_s("occupied-ringpool", number),
            },
            scale.rounds,
        )
        yield Case(title, "s", series, [Claim(ours, None, at_most(2) if number is signal.SIGKILL else None)])
    leftovers.reclaim_dead()  # the last killed one's


def _until_gone_s(name: str, number: signal.Signals) -> float:
    """Start program ``name``, wait until its two workers are in their tasks, signal it, and time the last end."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, contextlib.ExitStack() as stack:
        fifo = os.path.join(directory, "pids")
        os.mkfifo(fifo)
        told = os.open(fifo, os.O_RDWR)
        stack.callback(os.close, told)
        program = subprocess.Popen(
            _command(name, fifo), start_new_session=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        pidfds = [os.pidfd_open(program.pid)]
        stack.callback(program.wait)
        stack.callback(lambda: _end_all(pidfds))
        heard = b""
        while heard.count(b"\n") < 2:
            if not select.select([told], [], [], STUCK_S)[0]:
                raise RuntimeError(f"{name} has not started its tasks within {STUCK_S:g} s")
            heard += os.read(told, 100)
        pidfds += [os.pidfd_open(int(pid)) for pid in heard.split()]
        began_s = time.perf_counter()
        if number is signal.SIGKILL:
            os.kill(program.pid, number)
        else:
            os.killpg(program.pid, number)  # as a terminal does
        return _wait_all(pidfds, began_s)


def _wait_all(pidfds: Sequence[int], began_s: float) -> float:
    """Seconds from ``began_s`` until all processes have ended, or GONE_LIMIT_S."""
    living = set(pidfds)
    while living:
        left_s = began_s + GONE_LIMIT_S - time.perf_counter()
        if left_s <= 0:
            return GONE_LIMIT_S
        living -= set(select.select(living, [], [], left_s)[0])
    return time.perf_counter() - began_s


def _end_all(pidfds: Sequence[int]) -> None:
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


# ---- programs of their own: for a heap that nobody has used, and to be killed


def _command(name: str, argument: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.bench_dispatch", name, argument]


def _alone(name: str, argument: str, *, capture: bool) -> bytes:
    return subprocess.run(_command(name, argument), check=True, capture_output=capture).stdout


def _growth_mib(results: Iterator[object]) -> float:
    """How much larger this process ever is while it takes ``results`` than it was after the first RSS_EVERY."""

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / (1 << 20)

    first = top = 0.0
    for n, _ in enumerate(results, 1):
        if n % RSS_EVERY == 0:
            now = resident_mib()
            first, top = first or now, max(top, now)
    return top - first


def _memory_ringpool(tasks: str) -> None:
    inputs = (f"/srv/photos/2024/holiday/{i:08}.jpg" for i in range(int(tasks)))
    with Coordinator(2) as coordinator:
        print(json.dumps(_growth_mib(coordinator.run_file_tasks(no_op, inputs, params={"level": 3}))))


def _memory_pool(tasks: str) -> None:
    inputs = (f"/srv/photos/2024/holiday/{i:08}.jpg" for i in range(int(tasks)))
    with _pool(2) as pool:
        print(json.dumps(_growth_mib(pool.imap_unordered(no_op, inputs, chunksize=1))))


def _occupied_ringpool(fifo: str) -> None:
    with Coordinator(2) as coordinator:
        for _ in coordinator.run_file_tasks(occupy, [fifo, fifo]):
            pass


def _occupied_futures(fifo: str) -> None:
    with ProcessPoolExecutor(2) as executor:
        for future in [executor.submit(occupy, fifo) for _ in range(2)]:
            future.result()


ALONE = {
    "memory-ringpool": _memory_ringpool,
    "memory-pool": _memory_pool,
    "occupied-ringpool": _occupied_ringpool,
    "occupied-futures": _occupied_futures,
}
CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "ring": bench_ring,
    "files": bench_files,
    "trip": bench_trip,
    "memory": bench_memory,
    "real": bench_real,
    "end": bench_end,
}


if __name__ == "__main__":
    from benchmarks import bench_dispatch  # so that workers know its functions by a name that they can import

    bench_dispatch.ALONE[sys.argv[1]](sys.argv[2])

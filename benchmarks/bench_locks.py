"""Path locks beside ``filelock``: what a pair costs, how fair they are, and how long the dead hold up the living.

    case        contestants                                                             bar
    pair        lock and unlock, nobody else there: PathLock, kept and made anew;       PathLock: at most a fifth
                AsyncPathLock / a kept FileLock
    contended   8 processes in a loop, each holds it 1 ms: Jain's index of the grants   PathLock: at least 0.98
                8 writers; 6 readers and 2 writers; 2 and 6; FileLock (8 writers)
    killed      from the SIGKILL of the holder, or of the first waiter while the        at most 100 ms
                lock is let go, until the next one has it

    python -m benchmarks [--quick] locks

Jain's index of n counts is (sum)^2 / (n * sum of squares): 1 where all are equal, 1/n where one has all. Readers and
writers are each compared among themselves, since readers share; the lower index of the two counts.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from ringpool.bench import measure
from ringpool.bench.measure import Case, Claim, at_least, at_most
from ringpool.workers.files.asynclocks import AsyncPathLock
from ringpool.workers.files.locks import Mode, PathLock

HOLD_S = 0.001
KEPT = "PathLock"
PEER = "FileLock"
_fork = multiprocessing.get_context("fork")


# ---- pairs


def pair_us(pairs: int, use: Callable[[int], None]) -> Callable[[], float]:
    """A contestant: ``use`` locks and unlocks so many times."""

    def turn() -> float:
        began_ns = time.perf_counter_ns()
        use(pairs)
        return (time.perf_counter_ns() - began_ns) / pairs / 1000

    return turn


def keep(lock: PathLock | FileLock, pairs: int) -> None:
    """Use one lock object."""
    for _ in range(pairs):
        with lock:
            pass


def make_anew(path: str, pairs: int) -> None:
    """Make a lock object each time, as a worker does."""
    for _ in range(pairs):
        with PathLock(path):
            pass


def await_it(path: str, pairs: int) -> None:
    """Use one lock object in a task."""

    async def use() -> None:
        lock = AsyncPathLock(path)
        for _ in range(pairs):
            async with lock:
                pass

    asyncio.run(use())


# ---- fairness


def jain(counts: Sequence[int]) -> float:
    """See the module."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts)) if any(counts) else 0.0


def work(make: Callable[[], PathLock | FileLock], start: Any, results: Any, kind: str, duration_s: float) -> None:
    """In a process: take the lock again and again; tell how often, and the longest wait."""
    lock = make()
    start.wait()
    end_s = time.monotonic() + duration_s
    count, longest_s = 0, 0.0
    while time.monotonic() < end_s:
        asked_s = time.monotonic()
        with lock:
            longest_s = max(longest_s, time.monotonic() - asked_s)
            count += 1
            time.sleep(HOLD_S)
    results.put((kind, count, longest_s))


def contend(makers: Iterable[tuple[str, Callable[[], PathLock | FileLock]]], duration_s: float) -> tuple[float, float]:
    """Jain's index of the less fairly treated kind, and the longest wait of all in seconds."""
    start, results = _fork.Event(), _fork.Queue()
    processes = [_fork.Process(target=work, args=(make, start, results, kind, duration_s)) for kind, make in makers]
    for process in processes:
        process.start()
    start.set()
    told = [results.get() for _ in processes]
    for process in processes:
        process.join()
    kinds = {kind for kind, _, _ in told}
    index = min(jain([count for each, count, _ in told if each == kind]) for kind in kinds)
    return index, max(longest_s for _, _, longest_s in told)


def mix(path: str, readers: int, writers: int) -> list[tuple[str, Callable[[], PathLock]]]:
    """So many of each."""
    modes: list[Mode] = ["shared"] * readers + ["exclusive"] * writers
    return [(mode, partial(PathLock, path, mode)) for mode in modes]


# ---- killed


def hold(path: str, said: Any, heard: Any) -> None:
    """In a process: take it, say so, and let it go when told to."""
    with PathLock(path):
        said.send(time.monotonic())
        heard.recv()
    said.send(time.monotonic())
    heard.recv()


class Holder:
    """A process that wants the lock."""

    def __init__(self, path: str) -> None:
        self.told, said = _fork.Pipe(duplex=False)
        heard, self.tell = _fork.Pipe(duplex=False)
        self.process = _fork.Process(target=hold, args=(path, said, heard))
        self.process.start()

    def kill(self) -> float:
        """When."""
        assert self.process.pid is not None
        now_s = time.monotonic()
        os.kill(self.process.pid, signal.SIGKILL)
        return now_s

    def end(self) -> None:
        """Kill and reap it."""
        self.kill()
        self.process.join()


def until_waiting(path: str, count: int) -> None:
    """Wait until so many tickets are out. Source: proc(5), /proc/locks."""
    lock = PathLock(path)
    inode = os.stat(Path(path).parent / f".ringpool/locks/{lock.stripe:02x}.lock").st_ino
    while True:
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if len({line[6] for line in lines if line[1] == "OFDLCK" and line[5].endswith(f":{inode}")}) >= count:
            return
        time.sleep(0.001)


def after_the_holder_ms(path: str) -> float:
    """From the holder's SIGKILL until the waiter has it."""
    holder = Holder(path)
    holder.told.recv()
    waiter = Holder(path)
    until_waiting(path, 1)
    killed_s = holder.kill()
    had_s = waiter.told.recv()
    for each in (holder, waiter):
        each.end()
    return 1000 * (had_s - killed_s)


def after_a_waiter_ms(path: str) -> float:
    """From the SIGKILL of the first waiter, at which the holder lets go, until the second has it."""
    holder = Holder(path)
    holder.told.recv()
    first = Holder(path)
    until_waiting(path, 1)
    second = Holder(path)
    until_waiting(path, 2)
    killed_s = first.kill()
    holder.tell.send(None)
    had_s = second.told.recv()
    for each in (holder, first, second):
        each.end()
    return 1000 * (had_s - killed_s)


def worst(measure_ms: Callable[[str], float], path: str, times: int) -> Callable[[], float]:
    """A contestant: the longest of so many."""
    return lambda: max(measure_ms(path) for _ in range(times))


# ---- all of it


def bench_locks(quick: bool) -> Iterator[Case]:
    """All three."""
    rounds, pairs, duration_s, times = (measure.QUICK_ROUNDS, 2000, 0.5, 3) if quick else (measure.ROUNDS, 5000, 1.0, 5)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        path, peer = f"{directory}/a", f"{directory}/peer.lock"
        keep(PathLock(path), 1)
        yield _pairs(path, peer, rounds, pairs)
        yield _contended(path, peer, rounds, duration_s)
        yield _killed(path, rounds, times)


def _pairs(path: str, peer: str, rounds: int, pairs: int) -> Case:
    anew, task = "PathLock made anew", "AsyncPathLock"
    contestants = {
        PEER: pair_us(pairs // 4, partial(keep, FileLock(peer))),
        KEPT: pair_us(pairs, partial(keep, PathLock(path))),
        anew: pair_us(pairs, partial(make_anew, path)),
        task: pair_us(pairs, partial(await_it, path)),
    }
    turns = measure.take_turns(contestants, rounds)
    claims = [Claim(KEPT, PEER, at_most(0.2)), Claim(anew, PEER, at_most(0.2)), Claim(task, PEER)]
    return Case("lock, pair: lock and unlock, nobody else there", "us", turns.series, claims, turns.others)


def _contended(path: str, peer: str, rounds: int, duration_s: float) -> Case:
    mixes = {f"{KEPT}, 8 writers": (0, 8), f"{KEPT}, 6 readers, 2 writers": (6, 2), f"{KEPT}, 2 and 6": (2, 6)}
    contestants: dict[str, list[tuple[str, Callable[[], PathLock | FileLock]]]] = {
        f"{PEER}, 8 writers": [("exclusive", partial(FileLock, peer))] * 8
    }
    contestants |= {name: [*mix(path, *counts)] for name, counts in mixes.items()}
    longest_s = dict.fromkeys(contestants, 0.0)

    def turn(name: str) -> float:
        index, waited_s = contend(contestants[name], duration_s)
        longest_s[name] = max(longest_s[name], waited_s)
        return index

    turns = measure.take_turns({name: partial(turn, name) for name in contestants}, rounds)
    for name, waited_s in longest_s.items():
        print(f"longest wait, {name}: {1000 * waited_s:,.0f} ms")
    claims = [Claim(name, None, at_least(0.98)) for name in mixes]
    return Case(f"lock, contended: Jain's index, {duration_s} s a round", "index", turns.series, claims, turns.others)


def _killed(path: str, rounds: int, times: int) -> Case:
    contestants = {
        "the holder": worst(after_the_holder_ms, path, times),
        "the first waiter": worst(after_a_waiter_ms, path, times),
    }
    turns = measure.take_turns(contestants, rounds)
    claims = [Claim(name, None, at_most(100)) for name in contestants]
    return Case(f"lock, killed: until the next one has it, worst of {times}", "ms", turns.series, claims, turns.others)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {"locks": bench_locks}

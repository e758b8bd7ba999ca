"""Calls with priorities: who overtakes whom, in the ring too; and that nothing is lost or run twice by it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from tests.coordinator import call_functions as functions
from tests.coordinator.program import WATCHDOG_S, wait_until

from ringpool import RingPoolExecutor, WorkerDiedError
from ringpool.coordinator.callpool import RING_SLOTS
from ringpool.coordinator.publisher import Publisher
from ringpool.shm.dispatch import CoordinatorEnd


@pytest.fixture
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(1) as made:
        list(made.map(functions.process_id, range(64)))
        yield made


@pytest.fixture
def gate(executor: RingPoolExecutor, tmp_path: Path) -> Iterator[Path]:
    """The worker is held until this is made."""
    begun, path = tmp_path / "begun", tmp_path / "gate"
    future = executor.submit(functions.hold, str(begun), str(path))
    wait_until(begun.exists, "the task that holds the worker")
    yield path
    path.touch()
    future.result(WATCHDOG_S)


def n_in_ring(executor: RingPoolExecutor) -> int:
    return executor.stats().in_ring


def test_a_higher_priority_overtakes_what_is_in_the_ring(
    executor: RingPoolExecutor, gate: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "notes")
    futures = [executor.submit(functions.note, path, item) for item in range(300)]
    wait_until(lambda: n_in_ring(executor) == 301, "all tasks in the ring")
    for priority in (1, 2, -1):
        futures.append(executor.options(priority=priority).submit(functions.note, path, 1000 + priority))
    wait_until(lambda: n_in_ring(executor) == 303, "those that overtake in the ring, too")
    gate.touch()
    wait(futures, WATCHDOG_S)
    assert functions.noted(path) == [1002, 1001, *range(300), 999]


def test_what_is_overtaken_twice_stays_in_its_order(executor: RingPoolExecutor, tmp_path: Path) -> None:
    """The second time, only some of it is in the ring again."""
    path = str(tmp_path / "notes")
    futures = [executor.submit(functions.note_slowly, path, item) for item in range(200)]
    wait_until(lambda: functions.n_noted(path), "the first")
    for n in (20, 40):
        futures.append(executor.options(priority=1).submit(functions.note, path, 1000))
        wait_until(lambda n=n: functions.n_noted(path) > n, "some more")
    wait(futures, WATCHDOG_S)
    assert [item for item in functions.noted(path) if item != 1000] == list(range(200))


def test_what_runs_for_long_holds_up_nobody_whom_it_was_overtaken_with(tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with RingPoolExecutor(2) as executor:
        held = executor.submit(functions.hold, str(begun), str(gate))
        wait_until(begun.exists, "the task that runs for long")
        for priority in (1, 0):
            assert executor.options(priority=priority).submit(abs, -1).result(WATCHDOG_S) == 1
        gate.touch()
        held.result(WATCHDOG_S)


def test_a_full_ring_can_be_overtaken(executor: RingPoolExecutor, gate: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    futures = [executor.submit(functions.note_slowly, path, item) for item in range(RING_SLOTS + 100)]
    wait_until(lambda: n_in_ring(executor) == RING_SLOTS, "a full ring")
    first = executor.options(priority=1).submit(functions.note, path, -1)
    wait_until(lambda: executor._rp_pool.pump.publisher._precedence._refused, "the others to be refused")
    gate.touch()
    first.result(WATCHDOG_S)
    assert functions.noted(path)[0] == -1
    executor.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures[-100:])


def test_who_comes_while_others_are_put_into_the_ring_overtakes_them(
    executor: RingPoolExecutor, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, take = str(tmp_path / "notes"), Publisher._take
    late: list[Any] = []

    def take_later(publisher: Publisher, *arguments: Any) -> Any:
        if not late:
            late.append(executor.options(priority=1).submit(functions.note, path, -1))
        return take(publisher, *arguments)

    futures = [executor.submit(functions.note, path, item) for item in range(300)]
    wait_until(lambda: n_in_ring(executor) == 301, "all tasks in the ring")
    monkeypatch.setattr(Publisher, "_take", take_later)
    futures.append(executor.submit(functions.note, path, 300))
    wait_until(lambda: n_in_ring(executor) == 302, "the one that comes late in the ring")
    gate.touch()
    wait([*futures, *late], WATCHDOG_S)
    assert functions.noted(path) == [-1, *range(301)]


def test_the_last_ones_are_refused_first(
    executor: RingPoolExecutor, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While that goes on, a worker that skips what is refused is not to come upon what is not yet."""
    refused: list[int] = []
    refuse = CoordinatorEnd.refuse

    def note_and_refuse(end: CoordinatorEnd, slot: int, sequence: int) -> None:
        refused.append(sequence)
        refuse(end, slot, sequence)

    futures = [executor.submit(abs, -1) for _ in range(300)]
    wait_until(lambda: n_in_ring(executor) == 301, "all tasks in the ring")
    monkeypatch.setattr(CoordinatorEnd, "refuse", note_and_refuse)
    futures.append(executor.options(priority=1).submit(abs, -1))
    wait_until(lambda: n_in_ring(executor) == 302, "the one that overtakes in the ring, too")
    gate.touch()
    wait(futures, WATCHDOG_S)
    assert len(refused) >= 300
    assert refused[:300] == sorted(refused[:300], reverse=True)


def test_what_was_overtaken_does_not_wear_its_worker_out(tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with RingPoolExecutor(1, max_tasks_per_child=50) as executor:
        held = executor.submit(functions.hold, str(begun), str(gate))
        wait_until(begun.exists, "the task that holds the worker")
        futures = [executor.submit(abs, -1) for _ in range(40)]
        wait_until(lambda: n_in_ring(executor) == 41, "all tasks in the ring")
        futures += [executor.options(priority=1).submit(abs, -1), held]
        wait_until(lambda: n_in_ring(executor) == 42, "the one that overtakes in the ring")
        gate.touch()
        wait(futures, WATCHDOG_S)
        assert executor.stats().recycled == 0


def test_what_was_overtaken_can_be_cancelled(executor: RingPoolExecutor, gate: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    futures = [executor.submit(functions.note, path, item) for item in range(100)]
    wait_until(lambda: n_in_ring(executor) == 101, "all tasks in the ring")
    first = executor.options(priority=1).submit(functions.note, path, 1000)
    assert [future.cancel() for future in futures[::2]] == [True] * 50
    assert not any(future.running() or future.done() for future in futures[1::2])
    wait_until(lambda: n_in_ring(executor) == 102, "the one that overtakes in the ring, too")
    gate.touch()
    assert first.result(WATCHDOG_S) == 1000
    assert [future.result(WATCHDOG_S) for future in futures[1::2]] == list(range(1, 100, 2))
    assert functions.noted(path) == [1000, *range(1, 100, 2)]
    assert all(future.cancelled() for future in futures[::2])


def test_after_a_while_the_ring_is_filled_as_if_there_had_been_no_priority(
    executor: RingPoolExecutor, tmp_path: Path
) -> None:
    path = str(tmp_path / "notes")
    for priority in (-1, 1):
        assert executor.options(priority=priority).submit(functions.note, path, priority).result(WATCHDOG_S) == priority
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    held = executor.submit(functions.hold, str(begun), str(gate))
    futures = [executor.submit(functions.note, path, item) for item in range(2 * RING_SLOTS)]
    wait_until(lambda: n_in_ring(executor) == RING_SLOTS, "a full ring")
    gate.touch()
    wait([held, *futures], WATCHDOG_S)
    assert functions.noted(path) == [-1, 1, *range(2 * RING_SLOTS)]


def test_no_call_is_lost_or_run_twice(tmp_path: Path) -> None:
    """While workers are killed, and others cancelled."""
    chance, path = random.Random(20261129), str(tmp_path / "notes")
    priorities = [0, 0, 0, 1, -1, 5]
    over = threading.Event()
    with RingPoolExecutor(2) as executor:

        def kill() -> None:
            while not over.wait(0.1):
                for pid in executor.worker_pids[:1]:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue

        killer = threading.Thread(target=kill)
        killer.start()
        futures: list[Any] = []
        cancelled: set[int] = set()
        try:
            for item in range(4000):
                view = executor.options(priority=chance.choice(priorities))
                futures.append(view.submit(functions.note, path, item))
                other = chance.randrange(len(futures))
                if item % 5 == 0 and futures[other].cancel():
                    cancelled.add(other)
                if item % 500 == 0:
                    time.sleep(0.05)
        finally:
            over.set()
            killer.join()
        done, waiting = wait(futures, 4 * WATCHDOG_S)
        assert not waiting
        assert len(done) == len(futures)
    died: set[int] = set()
    for item, future in enumerate(futures):
        if item in cancelled:
            assert future.cancelled()
        elif isinstance(future.exception(), WorkerDiedError):
            died.add(item)
        else:
            assert future.result() == item
    noted = functions.noted(path)
    assert len(noted) == len(set(noted)), "run twice"
    assert not cancelled & set(noted)
    assert set(range(4000)) - cancelled - died <= set(noted)

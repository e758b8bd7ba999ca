"""What a program has let go of is freed at once: no cycle of references keeps it until a garbage collection.

Such a cycle is garbage that holds much: the frames of a traceback with all that their functions have, and for a pool
descriptors and shared memory.
"""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tests.task_functions as tasks
from tests.coordinator import call_functions as functions
from tests.coordinator.program import shared_memory_of

from ringpool import Coordinator, RetryPolicy, RingPoolExecutor
from ringpool.coordinator.coordinator import IDLE_MAX

PATH = Path(__file__)
WATCHDOG_S = 30.0


class Large:
    """What a caller has at hand."""


@pytest.fixture(autouse=True)
def without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def failing_input() -> Iterator[Path]:
    yield PATH
    raise LookupError("no more")


CALLS: dict[str, Callable[[RingPoolExecutor], object]] = {
    "result": lambda executor: executor.submit(functions.fail, "no").result(),
    "result that is late": lambda executor: executor.submit(time.sleep, 0.5).result(0.01),
    "map": lambda executor: list(executor.map(functions.fail, ["no", "no"])),
    "input of a map": lambda executor: list(executor.map(str, failing_input())),
}
HOW = {"how": "value"}
FILES: dict[str, Callable[[Coordinator], object]] = {
    "result": lambda pool: pool.submit_file_task(tasks.fail, PATH, params=HOW).result(),
    "by its id": lambda pool: pool.wait_for_task_result(pool.submit_file_task(tasks.fail, PATH, params=HOW).task_id),
    "unwrap": lambda pool: next(pool.run_file_tasks(tasks.fail, [PATH], params=HOW)).unwrap(),
    "input of a run": lambda pool: list(pool.run_file_tasks(tasks.fail, failing_input(), params=HOW)),
}


def what_is_left_of(action: Callable[[Any], object], pool: Any) -> object:
    """What the caller of an ``action`` that fails had at hand, if that is still there when he has caught the error."""

    def call() -> weakref.ref[Large]:
        large = Large()
        try:
            action(pool)
        except (LookupError, ValueError, TimeoutError):
            return weakref.ref(large)
        raise AssertionError("it does not fail")

    return call()()


@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_a_call_keeps_nothing(call: str) -> None:
    with RingPoolExecutor(1) as executor:
        assert what_is_left_of(CALLS[call], executor) is None


@pytest.mark.parametrize("call", FILES)
def test_an_error_of_a_file_task_keeps_nothing(call: str) -> None:
    with Coordinator(1) as pool:
        assert what_is_left_of(FILES[call], pool) is None


@pytest.mark.parametrize("has_vectors", [False, True])
def test_a_pool_that_is_closed_keeps_no_descriptor_and_no_mapping(has_vectors: bool) -> None:
    def held() -> tuple[int, int]:
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/rp" in line]
        return len(os.listdir("/proc/self/fd")), len(mapped)

    with RingPoolExecutor(1) as executor:  # what the first pool of a process makes for all: the fork server
        assert executor.submit(int).result() == 0
    before = held()
    for _ in range(3):
        with RingPoolExecutor(1) as executor:
            assert executor.submit(int).result() == 0
            if has_vectors:
                assert list(executor.map(abs, range(10))) == list(range(10))
    assert held() == before


def test_a_worker_keeps_no_function_of_maps_and_runs_that_have_ended() -> None:
    with RingPoolExecutor(1) as executor:
        for _ in range(5):
            function = partial(tasks.instances, counted=tasks.Counted(), run=0)
            # The map before may end a moment after the next one has come to the worker.
            assert set(executor.map(function, [PATH] * 4)) <= {1, 2}
    with Coordinator(1) as pool:
        for run in range(5):
            results = pool.run_file_tasks(tasks.instances, [PATH] * 4, params={"counted": tasks.Counted(), "run": run})
            assert {result.unwrap() for result in results} <= {1, 2}


@pytest.mark.parametrize("way", ["submitted", "run"])
def test_retry_policies_leave_no_more_than_the_last_ones_in_shared_memory(way: str) -> None:
    with Coordinator(1) as pool:
        counts: list[int] = []
        for number in range(2 * IDLE_MAX + 10):
            retry = RetryPolicy(deadline_s=10 + number)
            if way == "submitted":
                assert pool.submit_file_task(tasks.size, PATH, retry=retry).result() > 0
            else:
                assert all(result.ok for result in pool.run_file_tasks(tasks.size, [PATH], retry=retry))
            counts.append(len(shared_memory_of(os.getpid())))
        assert len(pool._functions) <= IDLE_MAX + 1
        futures = [
            pool.submit_file_task(tasks.size, PATH, retry=RetryPolicy(deadline_s=1000 + number))
            for number in range(500)
        ]
        assert all(future.result() for future in futures)
        n_left = len(shared_memory_of(os.getpid()))
        assert n_left <= counts[0] + IDLE_MAX + 10, (
            "without another one that comes; but for those that ended amid another"
        )
    assert max(counts) <= counts[0] + IDLE_MAX


def test_a_future_may_be_cancelled_by_a_signal_handler_amid_a_submit_with_a_policy(run_program: Any) -> None:
    program = run_program(
        """
        pending = []
        signal.signal(signal.SIGALRM, lambda *_: pending and pending.pop().cancel())
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        with Coordinator(1, ring_slots=16) as pool:
            end_s = time.monotonic() + 4
            while time.monotonic() < end_s:
                for number in range(300):
                    retry = RetryPolicy(max_attempts=number + 1)
                    pending.append(pool.submit_file_task(os.path.getsize, __file__, retry=retry))
                while pending:
                    try:
                        pending.pop().result()
                    except (IndexError, CancelledError):
                        pass
            signal.setitimer(signal.ITIMER_REAL, 0)
        say("done")
        """,
        top="""
import signal, time
from concurrent.futures import CancelledError
from ringpool import Coordinator, RetryPolicy
""",
    )
    assert program.finish() == 0, program.err
    assert program.out.split() == ["done"]


class Item:
    """One that a map is over, and a worker gets as a number."""

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (1,)


@pytest.mark.parametrize("how_many", ["none", "one", "all"])
def test_a_map_that_is_left_leaves_its_items_and_itself(how_many: str) -> None:
    with RingPoolExecutor(1) as executor:
        items = [Item() for _ in range(100)]
        left = weakref.ref(items[50])
        results = executor.map(str, items, chunksize=1)
        if how_many == "one":
            next(results)
        elif how_many == "all":
            list(results)
        runs = [weakref.ref(run) for run in executor._rp_pool.runs]
        results.close()  # type: ignore[attr-defined]
        del results, items
    end_s = time.monotonic() + WATCHDOG_S
    while any(run() for run in runs) and time.monotonic() < end_s:  # its thread may be about to end
        time.sleep(0.01)
    assert left() is None
    assert [run() for run in runs] == [None] * len(runs)

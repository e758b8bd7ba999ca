"""RingPoolExecutor: what tasks and workers may use; who uses more is stopped, and nobody else is harmed."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, wait
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest
from tests.coordinator import limit_functions as functions, slow_import
from tests.coordinator.limit_functions import MIB
from tests.coordinator.program import WATCHDOG_S, is_alive, wait_until

from ringpool import RingPoolExecutor, TaskOptions
from ringpool.coordinator.limits import own_bytes
from ringpool.errors import MemoryLimitError, TaskTimeoutError, WorkerDiedError
from ringpool.shm.dispatch import CoordinatorEnd

LIMIT_S = 0.2  # of tasks that never end
AMPLE_S = 2.0  # no short task takes so long, whoever else wants the processor or the disk
LONG_S = 60.0  # no task of these tests gets there by itself
ROOM = 160 * MIB  # above what a worker has that only imported this


@pytest.fixture(scope="module")
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as pool:
        assert list(pool.map(functions.double, range(4))) == [0, 2, 4, 6]
        yield pool


class Exits:
    """Takes ``WorkerExit``s."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, worker_exit: Any) -> None:
        self.seen.append(worker_exit)

    def wait_for(self, n: int) -> list[Any]:
        wait_until(lambda: len(self.seen) >= n, f"{n} exits of workers, not {self.seen}")
        return self.seen


# ---- timeout ---------------------------------------------------------------------------------------------------------


def test_a_timeout_holds_where_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A semaphore's timeout follows the wall clock: whoever sleeps then sleeps for an hour more."""
    monkeypatch.setattr(CoordinatorEnd, "sleep", lambda end, _timeout_s: end.semaphore.acquire())
    with RingPoolExecutor(1) as own:
        late = own.submit_with(TaskOptions(timeout=LIMIT_S), functions.overrun, "sleep")
        assert isinstance(late.exception(WATCHDOG_S), TaskTimeoutError)


@pytest.mark.parametrize("how", ["python", "sleep", "holding the GIL", "stopped", "child", "deaf"])
def test_a_task_that_overruns_fails_whatever_it_is_at(executor: RingPoolExecutor, how: str) -> None:
    began = time.monotonic()
    error = executor.submit_with(TaskOptions(timeout=LIMIT_S), functions.overrun, how).exception(WATCHDOG_S)
    assert time.monotonic() - began >= LIMIT_S
    assert isinstance(error, TaskTimeoutError)
    assert isinstance(error, TimeoutError)
    assert not isinstance(error, BrokenExecutor)
    assert (error.timeout_s, error.deaths) == (LIMIT_S, 1)
    assert "overrun" in error.task
    assert "overrun" in str(error)
    assert error.pid > 0
    assert not is_alive(error.pid)
    assert executor.submit(functions.double, 4).result(WATCHDOG_S) == 8


def test_a_task_in_its_time_is_like_any_other(executor: RingPoolExecutor) -> None:
    timed = executor.options(timeout=LONG_S)
    assert timed.submit(functions.double, 4).result(WATCHDOG_S) == 8
    assert list(timed.map(functions.double, range(100))) == [2 * x for x in range(100)]
    assert isinstance(timed.submit(divmod, 1, 0).exception(WATCHDOG_S), ZeroDivisionError)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_limit_that_is_no_time_is_refused(executor: RingPoolExecutor, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        TaskOptions(timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        executor.options(timeout=timeout)


@pytest.mark.parametrize("name", ["retries", "priority"])
@pytest.mark.parametrize("count", ["1", 0.5, float("nan"), None])
def test_a_count_that_is_no_integer_is_refused_and_the_pool_goes_on(
    executor: RingPoolExecutor, name: str, count: Any
) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, not"):
        executor.options(**{name: count}).submit(functions.double, 1).result(WATCHDOG_S)
    assert executor.submit(functions.double, 4).result(WATCHDOG_S) == 8


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 10**9])
def test_a_limit_beyond_all_time_is_none(executor: RingPoolExecutor, timeout: float) -> None:
    assert executor.submit_with(TaskOptions(timeout=timeout), functions.double, 4).result(WATCHDOG_S) == 8


@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction, Decimal])
def test_a_limit_may_be_a_number_of_any_type(executor: RingPoolExecutor, number: Callable[[float], Any]) -> None:
    options = TaskOptions(timeout=number(LIMIT_S))
    error = executor.submit_with(options, functions.overrun, "sleep").exception(WATCHDOG_S)
    assert isinstance(error, TaskTimeoutError)
    assert type(error.timeout_s) is float
    assert executor.submit_with(options, functions.double, 4).result(WATCHDOG_S) == 8
    assert next(executor.map(functions.double, [4], timeout=number(WATCHDOG_S))) == 8


@pytest.mark.parametrize("timeout", ["1", b"1", 1j])
def test_a_limit_that_is_no_number_is_refused(executor: RingPoolExecutor, timeout: Any) -> None:
    with pytest.raises(TypeError, match="timeout must be a number, not"):
        TaskOptions(timeout=timeout)
    with pytest.raises(TypeError, match="timeout must be a number, not"):
        executor.map(functions.double, [4], timeout=timeout)


def test_counts_may_be_integers_of_any_type(executor: RingPoolExecutor) -> None:
    options = TaskOptions(retries=np.int8(1), priority=np.uint8(9))  # pyright: ignore[reportArgumentType]
    assert (options.retries, -options.priority) == (1, -9)
    sizes = {"chunksize": np.int64(2), "buffersize": np.uint8(4)}
    assert list(executor.map(functions.double, range(9), **sizes)) == [2 * i for i in range(9)]  # type: ignore[arg-type]


def test_what_was_about_to_be_published_is_told_where_that_fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def expect(_timeout_s: float) -> None:
        raise ArithmeticError("not today")

    with RingPoolExecutor(1) as pool:
        assert pool.submit(functions.double, 1).result(WATCHDOG_S) == 2
        monkeypatch.setattr(pool._rp_pool.pump.staff.limits, "expect", expect)
        future = pool.options(timeout=LONG_S).submit(functions.double, 2)
        assert isinstance(future.exception(WATCHDOG_S), ArithmeticError)
    assert "not today" in capfd.readouterr().err


def test_a_task_that_waits_for_a_worker_does_not_use_up_its_time(tmp_path: Path) -> None:
    with RingPoolExecutor(1) as pool:
        gate, begun = tmp_path / "gate", tmp_path / "begun"
        first = pool.submit(functions.hold, str(gate), str(begun))
        wait_until(begun.exists, "the first task")
        second = pool.submit_with(TaskOptions(timeout=5.0), functions.double, 4)
        wait_until(lambda: pool.stats().in_ring == 2, "the second in the ring")
        threading.Event().wait(0.1)  # nothing is waited for: it is the time that would be charged
        gate.touch()
        assert first.result(WATCHDOG_S) > 0
        assert second.result(WATCHDOG_S) == 8


def test_importing_what_is_called_is_not_the_tasks_time() -> None:
    """Else a pool with limits below that would never get anything done: each new worker dies in its first task."""
    with RingPoolExecutor(1) as pool:
        options = TaskOptions(timeout=slow_import.IMPORT_S / 2)
        assert pool.submit_with(options, slow_import.double, 4).result(WATCHDOG_S) == 8
        assert pool.submit_with(options, functions.double, slow_import.Number(4)).result(WATCHDOG_S) == 8
        assert pool.stats().worker_deaths == 0
    with RingPoolExecutor(1) as pool:
        assert pool.submit_with(options, functions.double, slow_import.Number(4)).result(WATCHDOG_S) == 8
        late = pool.submit_with(options, slow_import.overrun).exception(WATCHDOG_S)
        assert isinstance(late, TaskTimeoutError)
        assert late.timeout_s == options.timeout


def test_a_task_without_a_limit_outlives_one_with_a_limit(executor: RingPoolExecutor, tmp_path: Path) -> None:
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    untimed = executor.submit(functions.hold, str(gate), str(begun))
    wait_until(begun.exists, "the task's begin")
    late = executor.submit_with(TaskOptions(timeout=LIMIT_S), functions.overrun, "python")
    assert isinstance(late.exception(WATCHDOG_S), TaskTimeoutError)
    gate.touch()
    assert untimed.result(WATCHDOG_S) == int(begun.read_text())


def test_only_the_task_that_overruns_fails(executor: RingPoolExecutor) -> None:
    before = executor.stats()
    timed = executor.options(timeout=5.0)
    good = [executor.submit(functions.double, i) for i in range(200)]
    bad = [executor.submit_with(TaskOptions(timeout=LIMIT_S), functions.overrun, "sleep") for _ in range(3)]
    good += [timed.submit(functions.double, i) for i in range(200, 400)]
    assert [future.result(WATCHDOG_S) for future in good] == [2 * i for i in range(400)]
    assert {type(future.exception(WATCHDOG_S)) for future in bad} == {TaskTimeoutError}
    wait_until(lambda: executor.stats().worker_deaths == before.worker_deaths + 3, "three deaths, and no more")


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("chunksize", [None, 1, 4])
def test_in_a_map_a_limit_is_each_items_own(executor: RingPoolExecutor, chunksize: int | None, unordered: bool) -> None:
    view = executor.options(timeout=AMPLE_S)
    run = view.map_unordered if unordered else view.map
    results = list(run(functions.overrun_if, range(20), chunksize=chunksize, return_exceptions=True))
    errors = [result for result in results if not isinstance(result, int)]
    assert [type(error) for error in errors] == [TaskTimeoutError]
    assert sorted(result for result in results if isinstance(result, int)) == [2 * i for i in range(20) if i != 3]
    if not unordered:
        assert results[3] is errors[0]


def test_items_that_together_take_longer_than_the_limit_are_not_over(executor: RingPoolExecutor) -> None:
    before = executor.stats().worker_deaths
    view = executor.options(timeout=AMPLE_S)
    assert list(view.map(functions.spin, [0.08] * 60, chunksize=30)) == [0.08] * 60
    assert executor.stats().worker_deaths == before


def test_the_timeout_of_a_map_itself_is_another_one(executor: RingPoolExecutor, tmp_path: Path) -> None:
    """As in ``concurrent.futures``: how long the caller waits; no task is harmed."""
    gate = tmp_path / "gate"
    results = executor.options(timeout=LONG_S).map(
        functions.hold, [str(gate)], [str(tmp_path / "begun")], timeout=LIMIT_S
    )
    with pytest.raises(TimeoutError) as caught:
        next(results)
    assert not isinstance(caught.value, TaskTimeoutError)
    gate.touch()


def test_what_a_task_that_overruns_has_started_goes_with_it(executor: RingPoolExecutor, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    late = executor.submit_with(TaskOptions(timeout=2 * AMPLE_S), functions.overrun_with_child, str(begun))
    assert isinstance(late.exception(WATCHDOG_S), TaskTimeoutError)
    child = int(begun.read_text())
    wait_until(lambda: not is_alive(child), "the end of the task's child")


def test_tasks_that_end_at_about_their_limit_have_one_outcome_each(executor: RingPoolExecutor) -> None:
    """Each is done, or over; no death but for a task that was over; whoever was in time, is done."""
    before = executor.stats().worker_deaths
    view = executor.options(timeout=0.05)
    lengths = [0.05 if i % 20 == 0 else 0.0 for i in range(200)]
    futures = [view.submit(functions.spin, length) for length in lengths]
    wait(futures, WATCHDOG_S)
    outcomes = Counter(type(future.exception(0)) for future in futures)
    assert set(outcomes) <= {type(None), TaskTimeoutError}
    assert sum(outcomes.values()) == 200
    wait_until(lambda: executor.stats().worker_deaths == before + outcomes[TaskTimeoutError], "the deaths")


# ---- retries ---------------------------------------------------------------------------------------------------------


def test_a_plain_call_is_not_tried_again(executor: RingPoolExecutor, tmp_path: Path) -> None:
    error = executor.submit(functions.die_at_first, str(tmp_path)).exception(WATCHDOG_S)
    assert isinstance(error, WorkerDiedError)
    assert isinstance(error, BrokenExecutor)
    assert (error.signal, error.deaths) == (signal.SIGKILL, 1)
    assert "die_at_first" in str(error)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("function", "error_type"),
    [(functions.die_at_first, WorkerDiedError), (functions.overrun_at_first, TaskTimeoutError)],
)
def test_a_task_is_tried_again_as_often_as_it_may(
    executor: RingPoolExecutor, tmp_path: Path, function: Any, error_type: type[Exception]
) -> None:
    few, enough = tmp_path / "few", tmp_path / "enough"
    few.mkdir()
    enough.mkdir()
    view = executor.options(timeout=AMPLE_S, retries=1)
    error = view.submit(function, str(few)).exception(WATCHDOG_S)
    assert type(error) is error_type
    assert error.deaths == 2  # type: ignore[union-attr]
    assert len(list(few.iterdir())) == 2
    view = executor.options(timeout=AMPLE_S, retries=2)
    assert view.submit(function, str(enough)).result(WATCHDOG_S) == "done"
    assert len(list(enough.iterdir())) == 3


def test_an_exception_is_not_tried_again(executor: RingPoolExecutor, tmp_path: Path) -> None:
    error = executor.submit_with(TaskOptions(retries=5), functions.fail, str(tmp_path)).exception(WATCHDOG_S)
    assert isinstance(error, ValueError)
    assert len(list(tmp_path.iterdir())) == 1


def test_in_a_map_each_item_is_tried_again(executor: RingPoolExecutor, tmp_path: Path) -> None:
    places = [tmp_path / str(i) for i in range(4)]
    for place in places:
        place.mkdir()
    view = executor.options(retries=2)
    assert list(view.map(functions.die_at_first, map(str, places), chunksize=4)) == ["done"] * 4
    assert [len(list(place.iterdir())) for place in places] == [3] * 4


@pytest.mark.parametrize("retries", [-1, 63])
def test_a_number_of_retries_that_cannot_be_counted_is_refused(retries: int) -> None:
    with pytest.raises(ValueError, match="retries"):
        TaskOptions(retries=retries)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_task_that_takes_more_memory_than_it_may_fails_alone(tmp_path: Path) -> None:
    with RingPoolExecutor(2, memory_limit=ROOM) as pool:
        good = [pool.submit(functions.double, i) for i in range(100)]
        heavy = pool.submit(functions.grow_without_end)
        good += [pool.submit(functions.double, i) for i in range(100, 200)]
        error = heavy.exception(WATCHDOG_S)
        assert isinstance(error, MemoryLimitError)
        assert isinstance(error, BrokenExecutor)
        assert error.limit_bytes == ROOM
        assert error.peak_rss_bytes > ROOM
        assert (error.signal, error.exitcode, error.deaths) == (signal.SIGKILL, None, 1)
        assert "grow_without_end" in error.task
        assert f"{ROOM:,}" in str(error)
        assert not is_alive(error.pid)
        assert [future.result(WATCHDOG_S) for future in good] == [2 * i for i in range(200)]
        (tmp_path / "gate").touch()
        assert pool.submit(functions.grow, 32 * MIB, str(tmp_path / "gate")).result(WATCHDOG_S) == 32 * MIB
        assert pool.stats().worker_deaths == 1


def test_sizes_and_numbers_of_a_pool_may_be_integers_of_any_type() -> None:
    sizes: dict[str, Any] = {"memory_limit": np.int64(ROOM), "memory_per_child_max": np.uint64(ROOM)}
    with RingPoolExecutor(np.int8(1), max_tasks_per_child=np.uint16(9), **sizes) as pool:  # type: ignore[arg-type]
        error = pool.submit(functions.grow_without_end).exception(WATCHDOG_S)
        assert isinstance(error, MemoryLimitError)
        assert error.limit_bytes == ROOM
        assert list(pool.map(functions.double, range(20))) == [2 * i for i in range(20)]


@pytest.mark.parametrize("name", ["max_tasks_per_child", "memory_limit", "memory_per_child_max"])
@pytest.mark.parametrize(("number", "error"), [(1.5, TypeError), ("1", TypeError), (0, ValueError)])
def test_a_size_or_number_that_is_none_is_refused(name: str, number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        RingPoolExecutor(1, **{name: number})


@pytest.mark.parametrize("chunksize", [None, 1, 20])
def test_in_a_map_only_the_item_that_takes_too_much_fails(chunksize: int | None) -> None:
    with RingPoolExecutor(2, memory_limit=ROOM) as pool:
        results = list(pool.map(functions.grow_if, range(20), chunksize=chunksize, return_exceptions=True))
        assert isinstance(results[5], MemoryLimitError)
        assert [result for i, result in enumerate(results) if i != 5] == [2 * i for i in range(20) if i != 5]


def test_an_array_that_is_handed_over_in_shared_memory_is_not_the_workers(tmp_path: Path) -> None:
    numbers = np.ones(ROOM // 8)
    gate = tmp_path / "gate"
    with RingPoolExecutor(1, memory_limit=ROOM) as pool:
        assert pool.submit(functions.double, 1).result(WATCHDOG_S) == 2
        future = pool.submit(functions.look_at, numbers, str(gate))
        threading.Event().wait(0.3)  # several looks; nothing is waited for
        gate.touch()
        assert future.result(WATCHDOG_S) == len(numbers)
        assert pool.stats().worker_deaths == 0


def test_what_a_task_left_behind_is_not_charged_to_those_after_it(executor: RingPoolExecutor) -> None:
    """Its worker is replaced first, also where it had taken both at once, among many short ones."""
    usual = own_bytes(executor.submit(functions.process_id).result(WATCHDOG_S))
    with RingPoolExecutor(1, memory_limit=usual + 40 * MIB) as pool:
        for _ in range(5):
            short = [pool.submit(functions.double, i) for i in range(300)]
            left = pool.submit(functions.leave_behind, 48 * MIB)
            innocent = pool.submit(functions.spin, 0.15)
            assert [future.result(WATCHDOG_S) for future in short] == [2 * i for i in range(300)]
            assert isinstance(left.exception(WATCHDOG_S), MemoryLimitError | NoneType)  # whether anybody has looked
            assert innocent.result(WATCHDOG_S) == 0.15


def test_a_worker_that_has_grown_is_replaced_between_tasks() -> None:
    exits = Exits()
    with RingPoolExecutor(1, memory_per_child_max=ROOM, on_worker_exit=exits) as pool:
        first = pool.submit(functions.leave_behind, ROOM).result(WATCHDOG_S)
        wait_until(lambda: pool.submit(functions.process_id).result(WATCHDOG_S) != first, "a new worker")
        assert exits.wait_for(1)[0].reason == "recycled"
        assert exits.seen[0].pid == first
        stats = pool.stats()
        assert (stats.worker_deaths, stats.recycled) == (0, 1)


def test_a_worker_that_has_grown_is_replaced_in_the_midst_of_a_batch() -> None:
    with RingPoolExecutor(1, memory_per_child_max=ROOM) as pool:
        pids = list(pool.map(functions.leave_behind, [10 * MIB] * 60, chunksize=60))
        assert max(Counter(pids).values()) < 30
        stats = pool.stats()
        assert (len(pids), stats.worker_deaths) == (60, 0)
        assert stats.recycled >= 2


def test_a_worker_in_which_nothing_stays_is_kept() -> None:
    with RingPoolExecutor(1, memory_per_child_max=ROOM) as pool:
        assert len(set(pool.map(functions.process_id, range(2000), chunksize=1))) == 1
        assert pool.stats().recycled == 0


# ---- tasks per worker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mp_context", ["forkserver", "spawn"])
def test_a_worker_runs_as_many_tasks_as_it_may(mp_context: str) -> None:
    exits = Exits()
    with RingPoolExecutor(1, mp_context, max_tasks_per_child=3, on_worker_exit=exits) as pool:
        pids = [pool.submit(functions.process_id).result(WATCHDOG_S) for _ in range(7)]
        assert [len(set(pids[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
        assert len(set(pids)) == 3
        assert {each.reason for each in exits.wait_for(2)} == {"recycled"}
        assert pool.stats().worker_deaths == 0


def test_workers_that_are_forks_are_not_replaced_after_a_number_of_tasks() -> None:
    """As in ``ProcessPoolExecutor``: a program with threads is not to be forked again and again."""
    with pytest.raises(ValueError, match="fork"):
        RingPoolExecutor(1, "fork", max_tasks_per_child=3)


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_no_worker_runs_more_items_of_a_map_than_it_may(chunksize: int | None) -> None:
    with RingPoolExecutor(2, max_tasks_per_child=5) as pool:
        pids = list(pool.map(functions.process_id, range(32), chunksize=chunksize))
        assert len(pids) == 32
        assert max(Counter(pids).values()) <= 5


def test_workers_that_are_replaced_all_the_time_do_not_hang_the_pool() -> None:
    """CPython #115634: every worker reaches its number at once, while tasks wait."""
    with RingPoolExecutor(2, max_tasks_per_child=1) as pool:
        futures = [pool.submit(functions.double, i) for i in range(16)]
        assert [future.result(WATCHDOG_S) for future in futures] == [2 * i for i in range(16)]
        assert pool.submit(functions.double, 4).result(WATCHDOG_S) == 8


def test_limits_work_in_workers_that_are_replaced() -> None:
    with RingPoolExecutor(2, max_tasks_per_child=2) as pool:
        view = pool.options(timeout=AMPLE_S)
        results = list(view.map(functions.overrun_if, range(12), return_exceptions=True))
        assert isinstance(results[3], TaskTimeoutError)
        assert [result for i, result in enumerate(results) if i != 3] == [2 * i for i in range(12) if i != 3]


# ---- on_worker_exit --------------------------------------------------------------------------------------------------


def test_each_exit_of_a_worker_is_told_with_its_reason() -> None:
    exits = Exits()
    with RingPoolExecutor(1, memory_limit=ROOM, on_worker_exit=exits) as pool:
        died = pool.submit(functions.die).exception(WATCHDOG_S)
        late = pool.submit_with(TaskOptions(timeout=LIMIT_S), functions.overrun, "sleep").exception(WATCHDOG_S)
        heavy = pool.submit(functions.grow_without_end).exception(WATCHDOG_S)
        seen = exits.wait_for(3)
        assert isinstance(died, WorkerDiedError)
        assert isinstance(late, TaskTimeoutError)
        assert isinstance(heavy, MemoryLimitError)
        assert [each.reason for each in seen] == ["died", "timeout", "memory"]
        assert [each.pid for each in seen] == [died.pid, late.pid, heavy.pid]
        assert {(each.index, each.signal, each.exitcode) for each in seen} == {(0, signal.SIGKILL, None)}
    assert len(exits.seen) == 3, "the end of the pool is no exit of a worker"


def test_what_cannot_be_called_is_told_of_no_exit() -> None:
    with pytest.raises(TypeError, match="on_worker_exit must be a callable, not 3"):
        RingPoolExecutor(1, on_worker_exit=3)  # type: ignore[arg-type]


def test_an_error_in_on_worker_exit_harms_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(_exit: Any) -> None:
        raise ValueError("refused")

    with RingPoolExecutor(1, on_worker_exit=refuse) as pool:
        assert isinstance(pool.submit(functions.die).exception(WATCHDOG_S), WorkerDiedError)
        assert pool.submit(functions.double, 4).result(WATCHDOG_S) == 8
    assert "refused" in capfd.readouterr().err

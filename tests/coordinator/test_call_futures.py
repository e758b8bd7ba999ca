"""Futures of calls: cancelled, waited for, with callbacks that do what they like."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Future,
    as_completed,
    wait,
)
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from tests.coordinator import call_functions as functions
from tests.coordinator.program import WATCHDOG_S, wait_until

from ringpool import RingPoolExecutor
from ringpool.coordinator.aside import FutureCondition
from ringpool.coordinator.futures import PoolFuture
from ringpool.errors import PoolError, WorkerDiedError, WrongThreadError


@pytest.fixture(scope="module")
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as made:
        list(made.map(functions.process_id, range(64)))
        yield made


class Held:
    """Both workers are held until the gate opens."""

    def __init__(self, executor: RingPoolExecutor, directory: Path, n: int = 2) -> None:
        self.gate = directory / "gate"
        begun = [directory / f"begun-{i}" for i in range(n)]
        self.futures = [executor.submit(functions.hold, str(path), str(self.gate)) for path in begun]
        wait_until(lambda: all(path.exists() for path in begun), "tasks on all workers")

    def release(self) -> None:
        self.gate.touch()
        wait(self.futures, WATCHDOG_S)


@pytest.fixture
def held(executor: RingPoolExecutor, tmp_path: Path) -> Iterator[Held]:
    made = Held(executor, tmp_path)
    yield made
    made.release()


# ---- cancelled -------------------------------------------------------------------------------------------------------


def test_what_waits_can_be_cancelled_and_never_runs(executor: RingPoolExecutor, held: Held, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    futures = [executor.submit(functions.note, str(path), item) for item in range(100)]
    assert [future.cancel() for future in futures[::2]] == [True] * 50
    for future in futures[::2]:
        assert future.cancelled()
        assert future.done()
        assert not future.running()
        assert future.cancel()  # again
        with pytest.raises(CancelledError):
            future.result(0)
        with pytest.raises(CancelledError):
            future.exception(0)
    held.release()
    assert [future.result(WATCHDOG_S) for future in futures[1::2]] == list(range(1, 100, 2))
    assert sorted(functions.noted(path)) == list(range(1, 100, 2))


def test_what_runs_cannot_be_cancelled(executor: RingPoolExecutor, held: Held) -> None:
    for future in held.futures:
        assert not future.cancel()
        assert future.running()
        assert "state=running" in repr(future)
        assert not future.done()
    held.release()
    assert {future.result(WATCHDOG_S) for future in held.futures} == set(executor.worker_pids)
    assert not any(future.running() or future.cancelled() or future.cancel() for future in held.futures)


def test_what_waits_is_not_running(executor: RingPoolExecutor, held: Held) -> None:
    future = executor.submit(functions.double, 1)
    assert not future.running()
    assert not future.done()
    held.release()
    assert future.result(WATCHDOG_S) == 2


def test_a_result_is_waited_for_as_long_as_is_said(executor: RingPoolExecutor, held: Held) -> None:
    future = executor.submit(functions.double, 1)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError) as caught:
            future.result(timeout)
        assert not isinstance(caught.value, PoolError)
        with pytest.raises(TimeoutError):
            future.exception(timeout)
    held.release()
    assert future.result(WATCHDOG_S) == 2
    assert future.exception(0) is None


# ---- waited for ------------------------------------------------------------------------------------------------------


def test_who_waits_again_and_again_leaves_nothing_behind(executor: RingPoolExecutor, held: Held) -> None:
    future = executor.submit(functions.double, 4)

    def size_after(n_waits: int) -> int:
        for _ in range(n_waits):
            with pytest.raises(TimeoutError):
                future.result(0)
        return len(gc.get_objects())

    before = size_after(10)
    assert size_after(1000) < before + 500
    held.release()
    assert future.result(WATCHDOG_S) == 8


def test_all_who_wait_for_one_future_are_woken(executor: RingPoolExecutor, held: Held) -> None:
    future = executor.submit(functions.double, 4)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(future.result(WATCHDOG_S))) for _ in range(5)]
    for thread in threads:
        thread.start()
    held.release()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert found == [8] * 5


def test_wait_returns_when_it_should(executor: RingPoolExecutor, held: Held) -> None:
    late = executor.submit(functions.double, 1)
    early: Future[Any] = Future()
    early.set_result(1)
    assert wait([late, early], WATCHDOG_S, FIRST_COMPLETED) == ({early}, {late})
    assert wait([late, early], 0.01, ALL_COMPLETED) == ({early}, {late})
    held.release()
    assert wait([late, early], WATCHDOG_S, ALL_COMPLETED) == ({early, late}, set())


def test_the_first_exception_ends_a_wait(executor: RingPoolExecutor, tmp_path: Path) -> None:
    held = Held(executor, tmp_path, 1)
    failing = executor.submit(functions.meet, "raise", 3)
    done, not_done = wait([*held.futures, failing], WATCHDOG_S, FIRST_EXCEPTION)
    assert (done, not_done) == ({failing}, set(held.futures))
    held.release()


@pytest.mark.parametrize("kind", ["value", "error", "cancelled"])
def test_futures_that_an_interrupted_wait_has_left_locked_stop_no_other(kind: str, tmp_path: Path) -> None:
    """Ctrl-C amid ``wait``, that the program catches, leaves conditions of its futures held by this thread."""
    with RingPoolExecutor(1) as own:
        held = Held(own, tmp_path, 1)
        work = partial(functions.meet, "raise") if kind == "error" else functions.double
        futures = [own.submit(work, item) for item in range(10)]
        waiting = threading.Thread(target=futures[0].exception if kind == "error" else futures[0].done)
        for future in futures:
            future._condition.acquire()  # pyright: ignore[reportPrivateUsage]
        waiting.start()
        if kind == "cancelled":
            pump = own._rp_pool.pump
            threading.Thread(target=own.shutdown, kwargs={"wait": False, "cancel_futures": True}).start()
            wait_until(lambda: pump._cancels_all, "the cancel")  # pyright: ignore[reportPrivateUsage]
            held.gate.touch()
        else:
            held.gate.touch()
            assert own.submit(functions.double, 1).result(WATCHDOG_S / 2) == 2
        wait_until(lambda: all(future.done() for future in futures), "futures whose conditions were left")
        assert all(future.cancelled() == (kind == "cancelled") for future in futures)
        assert [future for future in futures if kind == "value" and future.result() is None] == []
        waiting.join(WATCHDOG_S)
        assert not waiting.is_alive()


def test_one_who_waits_and_cannot_be_told_stops_no_future(tmp_path: Path) -> None:
    """Ctrl-C in the sleep of ``wait`` may leave the lock of its event held by that thread, which waits no more."""
    own = RingPoolExecutor(1)
    held = Held(own, tmp_path, 1)
    future = own.submit(functions.double, 3)
    left = threading.Thread(target=wait, args=([future],), daemon=True)
    left.start()
    wait_until(lambda: future.__dict__.get("_waiters"), "one who waits")
    [waiter] = future._waiters  # pyright: ignore[reportPrivateUsage]
    with waiter.event._cond:
        held.gate.touch()
        assert own.submit(functions.double, 1).result(WATCHDOG_S) == 2
        assert future.result(WATCHDOG_S) == 6
    waiter.event.set()
    left.join(WATCHDOG_S)
    own.shutdown()


def test_a_condition_that_its_thread_is_about_to_release_is_not_opened() -> None:
    """The thread is amid ``wait``, which takes the conditions of all futures by their ``id``."""
    first, second = sorted((PoolFuture(cast("Any", None)) for _ in range(2)), key=id)
    begun, go_on = threading.Event(), threading.Lock()
    go_on.acquire()

    class Slow(FutureCondition):
        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            begun.set()
            return go_on.acquire(timeout=WATCHDOG_S) and super().acquire(blocking, timeout)

    second.__dict__["_condition"] = Slow()
    condition: FutureCondition = first._condition  # pyright: ignore[reportPrivateUsage]
    thread = threading.Thread(target=wait, args=([first, second], 0))
    thread.start()
    assert begun.wait(WATCHDOG_S)
    condition.open_if_left()
    assert not condition.acquire(blocking=False)
    go_on.release()
    thread.join(WATCHDOG_S)
    thread = threading.Thread(target=condition.acquire)  # and leaves it
    thread.start()
    thread.join(WATCHDOG_S)
    assert not condition.acquire(blocking=False)
    condition.open_if_left()
    assert condition.acquire(blocking=False)


def test_as_completed_gives_each_once(executor: RingPoolExecutor) -> None:
    futures = {executor.submit(functions.raise_at, 500, item): item for item in range(1000)}
    seen = [futures[future] for future in as_completed(futures, WATCHDOG_S)]
    assert sorted(seen) == list(range(1000))
    assert [item for future, item in futures.items() if future.exception(0)] == [500]
    assert list(as_completed(futures, 0)) != []


# ---- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_are_called_once_in_their_order_with_the_future(executor: RingPoolExecutor, held: Held) -> None:
    called: list[tuple[str, Future[int]]] = []
    all_called = threading.Event()
    future = executor.submit(functions.double, 1)
    future.add_done_callback(lambda done: called.append(("first", done)))
    future.add_done_callback(lambda done: called.append(("second", done)))
    future.add_done_callback(lambda _: all_called.set())
    held.release()
    assert all_called.wait(WATCHDOG_S)
    future.add_done_callback(lambda done: called.append(("late", done)))
    assert called == [("first", future), ("second", future), ("late", future)]


def test_a_callback_of_what_was_cancelled_is_called(executor: RingPoolExecutor, held: Held) -> None:
    called: list[bool] = []
    future = executor.submit(functions.double, 1)
    future.add_done_callback(lambda done: called.append(done.cancelled()))
    assert future.cancel()
    assert called == [True]
    held.release()


@pytest.mark.parametrize("kind", [LookupError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_harms_nobody(
    executor: RingPoolExecutor,
    held: Held,
    kind: type[BaseException],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    called: list[int] = []

    def callback(_: object) -> None:
        called.append(1)
        raise kind("in a callback")

    futures = [executor.submit(functions.double, item) for item in range(20)]
    futures[3].add_done_callback(callback)
    futures[5].add_done_callback(callback)
    held.release()  # of a future that is done, a callback would be called here
    assert [future.result(WATCHDOG_S) for future in futures] == list(range(0, 40, 2))
    assert executor.submit(functions.double, 1).result(WATCHDOG_S) == 2
    wait_until(lambda: called == [1, 1], "both callbacks")
    wait_until(lambda: executor.stats()[1:3] == (0, 0), "the end of all tasks")
    assert all(future.ticket is None for future in futures if isinstance(future, PoolFuture))
    told = caplog.text + capfd.readouterr().err
    assert told.count("in a callback") >= 2  # nothing is lost in silence


def test_a_callback_may_submit_again(executor: RingPoolExecutor) -> None:
    found: list[int] = []
    done = threading.Event()

    def again(future: Future[int]) -> None:
        found.append(future.result())
        if len(found) < 200:
            executor.submit(functions.double, len(found)).add_done_callback(again)
        else:
            done.set()

    executor.submit(functions.double, 0).add_done_callback(again)
    assert done.wait(WATCHDOG_S)
    assert found == list(range(0, 400, 2))


def test_a_callback_may_cancel_others(executor: RingPoolExecutor, held: Held, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    waiting = [executor.submit(functions.note, str(path), item) for item in range(50)]
    called = threading.Event()

    def cancel_all(_: object) -> None:
        for future in waiting:
            future.cancel()
        called.set()

    other: Future[int] = executor.options(priority=-1).submit(functions.double, 1)
    other.add_done_callback(cancel_all)
    assert other.cancel()
    assert called.wait(WATCHDOG_S)
    held.release()
    assert all(future.cancelled() for future in waiting)
    assert functions.noted(path) == []


@pytest.mark.parametrize("wait_for_it", [True, False])
def test_a_callback_that_shuts_down_hangs_nobody(wait_for_it: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It cannot wait for the thread that it runs in: that is refused, and told. The rest is as it would be outside."""
    caplog.set_level(logging.CRITICAL, "concurrent.futures")
    own = RingPoolExecutor(2)
    called = threading.Event()

    def end(_: object) -> None:
        try:
            own.shutdown(wait=wait_for_it)
        finally:
            called.set()

    futures = [own.submit(functions.double, item) for item in range(100)]
    futures[50].add_done_callback(end)
    assert called.wait(WATCHDOG_S)
    assert [future.result(WATCHDOG_S) for future in futures] == list(range(0, 200, 2))
    own.shutdown()
    assert own.worker_pids == ()


def test_what_a_callback_submits_during_shutdown_is_refused(tmp_path: Path) -> None:
    own = RingPoolExecutor(1)
    held = Held(own, tmp_path, 1)
    errors: list[BaseException] = []

    def again(_: object) -> None:
        try:
            own.submit(functions.double, 1)
        except RuntimeError as error:
            errors.append(error)

    held.futures[0].add_done_callback(again)
    own.shutdown(wait=False)
    held.release()
    own.shutdown()
    assert [str(error) for error in errors] == ["cannot schedule new futures after shutdown"]


def test_a_callback_may_map(executor: RingPoolExecutor) -> None:
    """To take the results there would be to wait for itself; to give them to another thread is not."""
    made: list[Iterator[int]] = []
    called = threading.Event()

    def start(_: object) -> None:
        made.append(executor.map(functions.double, range(1000)))
        called.set()

    executor.submit(functions.double, 1).add_done_callback(start)
    assert called.wait(WATCHDOG_S)
    assert list(made[0]) == list(range(0, 2000, 2))


@pytest.mark.parametrize(
    "wait_for_it",
    [
        lambda executor: executor.submit(functions.double, 1).result(),
        lambda executor: executor.submit(functions.double, 1).exception(),
        lambda executor: executor.submit(functions.double, 1).result(WATCHDOG_S),
        lambda executor: executor.submit(functions.double, 1).exception(WATCHDOG_S),
        lambda executor: list(executor.map(functions.double, range(10))),
        lambda executor: list(executor.map_unordered(functions.double, range(10))),
    ],
    ids=["result", "exception", "result, timeout", "exception, timeout", "map", "map_unordered"],
)
def test_a_callback_does_not_wait_for_its_own_pool(
    executor: RingPoolExecutor, wait_for_it: Callable[[RingPoolExecutor], object]
) -> None:
    ended: list[object] = []
    called = threading.Event()

    def call(_: object) -> None:
        try:
            ended.append(wait_for_it(executor))
        except WrongThreadError as error:
            ended.append(type(error))
        finally:
            called.set()

    executor.submit(functions.double, 1).add_done_callback(call)
    assert called.wait(WATCHDOG_S)
    assert ended == [WrongThreadError]


# ---- very many -------------------------------------------------------------------------------------------------------


def test_more_calls_than_the_ring_has_slots(executor: RingPoolExecutor) -> None:
    futures = [executor.submit(functions.double, item) for item in range(20_000)]
    assert [future.result(WATCHDOG_S) for future in futures] == list(range(0, 40_000, 2))


def test_calls_from_many_threads(executor: RingPoolExecutor) -> None:
    found: dict[int, list[int]] = {}

    def call(of: int) -> None:
        futures = [executor.submit(functions.add, of, item) for item in range(500)]
        found[of] = [future.result(WATCHDOG_S) for future in futures]

    threads = [threading.Thread(target=call, args=(of,)) for of in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert found == {of: list(range(of, of + 500)) for of in range(8)}


def test_the_counts_are_of_what_was_done(tmp_path: Path) -> None:
    with RingPoolExecutor(2) as own:
        assert own.stats() == (0,) * len(own.stats())
        held = Held(own, tmp_path, 2)
        waiting = [own.submit(functions.double, item) for item in range(2000)]
        wait_until(lambda: own.stats().in_ring > 1000, "a full ring")
        assert own.stats().workers_alive == len(own.worker_pids) == 2
        assert own.stats().queued + own.stats().in_ring == 2002
        held.release()
        wait(waiting, WATCHDOG_S)
        failing = [own.submit(partial(functions.meet, "raise"), item) for item in range(3)]
        dying = own.submit(os._exit, 1)
        wait([*failing, dying], WATCHDOG_S)
        wait_until(lambda: own.stats().worker_deaths == 1, "the death to be counted")
        stats = own.stats()
        assert (stats.completed, stats.failed, stats.queued, stats.in_ring, stats.retried) == (2002, 4, 0, 0, 0)
    assert own.stats().workers_alive == 0
    assert own.stats().completed == 2002


# ---- several threads at once -----------------------------------------------------------------------------------------


def test_a_cancel_waits_for_nobody(executor: RingPoolExecutor, held: Held) -> None:
    """Not for the thread that brings results either, which may be in a callback that waits for whoever cancels."""
    lock, entered = threading.Lock(), threading.Event()
    queued = executor.submit(functions.double, 1)

    def blocked(_future: Future[Any]) -> None:
        entered.set()
        assert lock.acquire(timeout=WATCHDOG_S)
        lock.release()

    with lock:
        held.futures[0].add_done_callback(blocked)
        held.gate.touch()
        assert entered.wait(WATCHDOG_S)
        queued.cancel()  # or not: the other worker may have come to it
        assert executor.submit(functions.double, 2).cancel(), "it cannot have been published"
    assert executor.submit(functions.double, 3).result(WATCHDOG_S) == 6


def test_what_was_cancelled_never_ran_and_all_else_did_once(tmp_path: Path) -> None:
    path, n = str(tmp_path / "notes"), 6000
    with RingPoolExecutor(2) as own:
        held = Held(own, tmp_path)
        futures = [own.submit(functions.note, path, i) for i in range(n)]
        cancelled: list[list[int]] = [[], []]

        def cancel(mine: list[int], order: Iterable[int]) -> None:
            mine.extend(i for i in order if i % 3 and futures[i].cancel())

        threads = [
            threading.Thread(target=cancel, args=(cancelled[0], range(n))),
            threading.Thread(target=cancel, args=(cancelled[1], reversed(range(n)))),
        ]
        assert futures[-1].cancel()  # on a slow machine workers may win every race from here on
        held.gate.touch()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WATCHDOG_S)
    gone = {i for i, future in enumerate(futures) if future.cancelled()}
    assert gone == {n - 1}.union(*cancelled)
    assert sorted(functions.noted(path)) == [i for i in range(n) if i not in gone]
    assert 0 < len(gone) < n
    for i, future in enumerate(futures):
        if i not in gone:
            assert future.result(0) is not None


def test_a_cancel_that_comes_too_late_gives_no_more_retries(executor: RingPoolExecutor, tmp_path: Path) -> None:
    notes, gate = tmp_path / "notes", tmp_path / "gate"
    future = executor.options(retries=1).submit(functions.note_and_die, str(notes), str(gate))
    wait_until(lambda: functions.n_noted(notes) == 1, "the start of the task")
    assert not future.cancel()
    gate.touch()
    with pytest.raises(WorkerDiedError):
        future.result(WATCHDOG_S)
    assert functions.n_noted(notes) == 2


def test_futures_that_are_asked_while_they_become_done_tell_no_half_truths(executor: RingPoolExecutor) -> None:
    """Nothing of ``wait`` and ``as_completed`` exists in a future until it is asked for, from several threads here."""
    failures: list[BaseException] = []
    for _ in range(60):
        futures = [executor.submit(functions.double, i) for i in range(60)]
        called: list[int] = []

        def ask(futures: list[Future[int]] = futures, called: list[int] = called) -> None:
            try:
                for future in reversed(futures):
                    future.add_done_callback(lambda future: called.append(future.result(0)))
                done, not_done = wait(futures, WATCHDOG_S)
                assert (len(done), len(not_done)) == (60, 0)
                assert sorted(future.result(0) for future in as_completed(futures, WATCHDOG_S)) == list(
                    range(0, 120, 2)
                )
                assert all(future.result(WATCHDOG_S) == 2 * i for i, future in enumerate(futures))
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        ask()
        for thread in threads:
            thread.join(WATCHDOG_S)
        wait_until(lambda called=called: len(called) == 180, "every callback, once")
    assert not failures


def test_cancelled_again_a_future_calls_nobody_again(executor: RingPoolExecutor, held: Held) -> None:
    queued = [executor.submit(functions.double, i) for i in range(3)]
    called: list[Future[Any]] = []
    for future in queued:
        future.add_done_callback(called.append)
        assert future.cancel()
        assert future.cancel()
    assert called == queued


def test_a_future_that_nobody_has_waited_in_is_like_any_other(executor: RingPoolExecutor, tmp_path: Path) -> None:
    future = executor.submit(functions.double, 4)
    wait_until(future.done, "its end")
    assert "_condition" not in vars(future)
    assert (future.running(), future.cancelled(), future.cancel()) == (False, False, False)
    assert (future.exception(0), future.result(0)) == (None, 8)
    assert "finished returned int" in repr(future)
    called: list[Future[Any]] = []
    future.add_done_callback(called.append)
    assert called == [future]
    assert wait([future], 0).done == {future}
    with pytest.raises(AttributeError, match="nothing"):
        future.nothing  # noqa: B018

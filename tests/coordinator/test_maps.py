"""Maps: what is drawn from the input and when, and what comes back in which order."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.coordinator import call_functions as functions
from tests.coordinator.program import WATCHDOG_S, wait_until

from ringpool import RingPoolExecutor
from ringpool.coordinator.maprun import MapRun
from ringpool.errors import PoolError

BOTH = pytest.mark.parametrize("map_name", ["map", "map_unordered"])
WINDOW_MAX = 65_536  # items of 5 us: what keeps two workers busy is far below this
SHORT_WINDOW_MAX = 2 * (131_072 + 4096) + 4096


@pytest.fixture(scope="module")
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as made:
        list(made.map(functions.process_id, range(64)))
        yield made


class Drawn(Iterator[int]):
    """0, 1, 2 ..., ``n`` of them, that count how far they were drawn."""

    def __init__(self, n: int | None = None) -> None:
        self.n = 0
        self._items = itertools.count() if n is None else iter(range(n))

    def __next__(self) -> int:
        item = next(self._items)
        self.n += 1
        return item


# ---- drawing ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("function", "n_items", "window_max"),
    [(functions.work, 300_000, WINDOW_MAX), (functions.identity, 1_000_000, SHORT_WINDOW_MAX)],
)
def test_the_input_is_drawn_as_results_are_taken(
    executor: RingPoolExecutor, map_name: str, function: Callable[[int], int], n_items: int, window_max: int
) -> None:
    drawn = Drawn(n_items)
    ahead_max = n = total = 0
    for n, value in enumerate(getattr(executor, map_name)(function, drawn), 1):
        ahead = drawn.n - n
        if ahead > ahead_max:
            ahead_max = ahead
        total += value
    assert (n, total) == (n_items, sum(range(n_items)))
    assert ahead_max <= window_max


@BOTH
def test_what_is_at_hand_is_run_before_results_are_taken(
    executor: RingPoolExecutor, map_name: str, tmp_path: Path
) -> None:
    """Up to a bound; the caller may have something else to do meanwhile."""
    path = tmp_path / "notes"
    results = getattr(executor, map_name)(partial(functions.note, str(path)), range(500_000))
    wait_until(lambda: functions.n_noted(path) >= 10_000, "the first 10,000 runs")
    wait_until(lambda: executor.stats()[1:3] == (0, 0), "the end of what may be run by now")
    executor.submit(abs, 1).result(WATCHDOG_S)
    n = functions.n_noted(path)
    assert n <= WINDOW_MAX
    assert next(results) in range(n)
    results.close()


@BOTH
def test_nothing_more_is_drawn_while_nobody_takes_results(executor: RingPoolExecutor, map_name: str) -> None:
    drawn = Drawn()
    results = getattr(executor, map_name)(functions.work, drawn)
    assert 2 <= drawn.n <= WINDOW_MAX  # the workers have something to do at once
    next(results)
    n = drawn.n
    executor.submit(abs, 1).result(WATCHDOG_S)
    assert drawn.n == n <= WINDOW_MAX
    results.close()


@BOTH
def test_an_endless_input_is_left_at_a_break(executor: RingPoolExecutor, map_name: str) -> None:
    drawn = Drawn()
    found: list[int] = []
    for value in getattr(executor, map_name)(functions.work, drawn):
        found.append(value)
        if len(found) == 1000:
            break
    assert len(set(found)) == 1000
    if map_name == "map":
        assert found == list(range(1000))
    assert drawn.n <= WINDOW_MAX


@BOTH
@pytest.mark.parametrize("chunksize", [None, 1, 7])
@pytest.mark.parametrize("buffersize", [1, 2, 5, 64])
def test_no_more_than_the_buffersize_is_drawn_ahead(
    executor: RingPoolExecutor, map_name: str, chunksize: int | None, buffersize: int
) -> None:
    drawn = Drawn(300)
    results = getattr(executor, map_name)(functions.double, drawn, chunksize=chunksize, buffersize=buffersize)
    ahead = [drawn.n]
    found: list[int] = []
    for n, value in enumerate(results, 1):
        ahead.append(drawn.n - n)
        found.append(value)
    assert max(ahead) <= buffersize
    assert (found if map_name == "map" else sorted(found)) == list(range(0, 600, 2))


@BOTH
def test_a_large_buffer_is_filled_in_few_pieces(
    executor: RingPoolExecutor, map_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    send = MapRun._send

    def count(run: MapRun, items: list[Any], index: int) -> int:
        sizes.append(send(run, items, index))
        return sizes[-1]

    monkeypatch.setattr(MapRun, "_send", count)
    drawn = Drawn(50_000)
    results = getattr(executor, map_name)(functions.identity, drawn, buffersize=4096)
    for n_given, _ in enumerate(results, 1):
        assert drawn.n - n_given <= 4096
    assert sum(sizes) == 50_000
    assert len(sizes) < 5_000, "items went out one by one"


@BOTH
def test_the_buffersize_counts_items_that_fail_too(executor: RingPoolExecutor, map_name: str) -> None:
    drawn = Drawn(100)
    results = getattr(executor, map_name)(
        partial(functions.raise_at, 50), drawn, buffersize=4, chunksize=1, return_exceptions=True
    )
    ahead = [drawn.n - n for n, _ in enumerate(results, 1)]
    assert len(ahead) == 100
    assert max(ahead) <= 4


@BOTH
def test_the_next_item_may_wait_until_the_one_before_has_been_run(
    executor: RingPoolExecutor, map_name: str, tmp_path: Path
) -> None:
    """With a buffer of one, whether items came quickly until then or not."""
    path = tmp_path / "notes"

    def items() -> Iterator[int]:
        for item in range(120):
            if item > 100:
                wait_until(lambda: functions.n_noted(path) >= item, f"the run of item {item - 1}")  # noqa: B023
            yield item

    results = getattr(executor, map_name)(partial(functions.note, str(path)), items(), buffersize=1)
    assert list(results) == list(range(120))


@BOTH
@pytest.mark.parametrize("buffersize", [None, 100])
def test_what_was_drawn_is_run_while_the_next_item_is_waited_for(
    executor: RingPoolExecutor, map_name: str, tmp_path: Path, buffersize: int | None
) -> None:
    """Items come in bursts, each when those of the bursts before it have been run."""
    path = tmp_path / "notes"
    n_items = 0

    def items() -> Iterator[int]:
        nonlocal n_items
        for burst in (3, 1, 2, 5, 1, 30, 7, 64, 90, 1, 33):
            for _ in range(burst):
                n_items += 1
                yield n_items
            wait_until(lambda n=n_items: functions.n_noted(path) >= n, f"the run of {n_items} items")

    results = getattr(executor, map_name)(partial(functions.note, str(path)), items(), buffersize=buffersize)
    assert sorted(results) == list(range(1, n_items + 1))
    assert functions.n_noted(path) == n_items, "each was run once"


@BOTH
def test_results_that_are_there_do_not_wait_for_an_item_that_takes_its_time(
    executor: RingPoolExecutor, map_name: str, tmp_path: Path
) -> None:
    """Items come in bursts with pauses between them, and no burst before the results of the last but one were taken."""
    path = tmp_path / "notes"
    items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    n_put, n_taken, failures = 0, 0, list[BaseException]()

    def feed() -> None:
        nonlocal n_put
        try:
            for burst in (3, 1, 2, 5, 1, 1, 30, 7, 64, 1, 90, 1, 33):
                n_before = n_put
                for n_put in range(n_before + 1, n_before + burst + 1):
                    items.put(n_put)
                wait_until(lambda n=n_put: functions.n_noted(path) >= n, f"the run of {n_put} items")
                time.sleep(0.05)  # longer than an item takes
                wait_until(lambda n=n_before: n_taken >= n, f"{n_before} results")
        except BaseException as error:
            failures.append(error)
        items.put(None)

    feeder = threading.Thread(target=feed)
    feeder.start()
    for _ in getattr(executor, map_name)(partial(functions.note, str(path)), iter(items.get, None)):
        n_taken += 1
    feeder.join(WATCHDOG_S)
    assert not failures
    assert n_taken == n_put


@BOTH
def test_an_item_that_cannot_be_sent_while_the_next_is_waited_for_is_its_own_error(
    executor: RingPoolExecutor, map_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "notes"

    def items() -> Iterator[Any]:
        yield from range(20)
        yield threading.Lock()
        yield from range(20, 40)
        wait_until(lambda: functions.n_noted(path) >= 40, "the run of all others")

    mapped = getattr(executor, map_name)(partial(functions.note, str(path)), items(), return_exceptions=True)
    results = list(mapped)
    assert sorted(result for result in results if isinstance(result, int)) == list(range(40))
    [error] = [result for result in results if not isinstance(result, int)]
    assert isinstance(error, TypeError)


@BOTH
def test_an_input_may_be_fed_by_the_results(executor: RingPoolExecutor, map_name: str) -> None:
    """With a window that is smaller than what was put in at first."""
    items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for item in range(8):
        items.put(item)
    found: list[int] = []
    for value in getattr(executor, map_name)(functions.double, iter(items.get, None), buffersize=4):
        found.append(value)
        items.put(len(found) + 7 if len(found) < 93 else None)
    assert sorted(found) == list(range(0, 200, 2))


def test_an_input_may_be_fed_by_another_thread(executor: RingPoolExecutor) -> None:
    items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    taken = threading.Semaphore(0)

    def feed() -> None:
        for item in range(100):
            items.put(item)
            if item % 10 == 9:
                taken.acquire(timeout=WATCHDOG_S)
        items.put(None)

    feeder = threading.Thread(target=feed)
    feeder.start()
    found: list[int] = []

    def take() -> None:
        for value in executor.map(functions.identity, iter(items.get, None), buffersize=2):
            found.append(value)
            if value % 10 == 5:
                taken.release()

    taker = threading.Thread(target=take)
    taker.start()
    taker.join(WATCHDOG_S)
    feeder.join(WATCHDOG_S)
    assert found == list(range(100))


@BOTH
def test_an_error_of_the_input_comes_after_the_results_before_it(executor: RingPoolExecutor, map_name: str) -> None:
    def items() -> Iterator[int]:
        yield from range(100)
        raise LookupError("the input")

    results = getattr(executor, map_name)(functions.identity, items())
    found = [next(results) for _ in range(100)]
    assert sorted(found) == list(range(100))
    with pytest.raises(LookupError, match="the input"):
        next(results)
    assert next(results, "the end") == "the end"


def test_an_input_that_fails_at_once_fails_the_map(executor: RingPoolExecutor) -> None:
    def items() -> Iterator[int]:
        raise LookupError("at once")
        yield 1

    with pytest.raises(LookupError, match="at once"):
        list(executor.map(functions.identity, items()))


def test_what_cannot_be_iterated_over_is_refused_at_once(executor: RingPoolExecutor) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        executor.map(functions.identity, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="iter"):
        executor.map(functions.add, range(3), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["chunksize", "buffersize"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), ("1", TypeError)])
@BOTH
def test_a_size_that_is_none_is_refused(
    executor: RingPoolExecutor, map_name: str, name: str, value: Any, error: type[Exception]
) -> None:
    drawn = Drawn()
    with pytest.raises(error, match=name):
        getattr(executor, map_name)(functions.identity, drawn, **{name: value})
    assert drawn.n == 0


# ---- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [[], (), iter([]), range(0), "", {}], ids=lambda items: type(items).__name__)
@BOTH
def test_without_items_there_are_no_results(executor: RingPoolExecutor, map_name: str, items: Iterable[Any]) -> None:
    assert list(getattr(executor, map_name)(functions.identity, items)) == []


@BOTH
def test_without_an_iterable_there_are_no_results(executor: RingPoolExecutor, map_name: str) -> None:
    """As ``ProcessPoolExecutor`` has it, by the rules of ``zip``."""
    assert list(getattr(executor, map_name)(functions.process_id)) == []


@pytest.mark.parametrize("n", [1, 2, 3, 100, 5000])
@pytest.mark.parametrize("chunksize", [None, 1, 64, 10_000])
def test_results_come_in_the_order_of_items(executor: RingPoolExecutor, n: int, chunksize: int | None) -> None:
    assert list(executor.map(functions.double, range(n), chunksize=chunksize)) == list(range(0, 2 * n, 2))
    assert list(executor.map(functions.double, iter(range(n)), chunksize=chunksize)) == list(range(0, 2 * n, 2))


def test_the_order_holds_where_the_first_item_ends_last(executor: RingPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    call = partial(functions.note_but_one_waits, str(path), 0, 99)
    assert list(executor.map(call, range(100))) == list(range(100))
    assert sorted(functions.noted(path)) == list(range(1, 100))


def test_unordered_results_come_as_they_end(executor: RingPoolExecutor, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    results = executor.map_unordered(partial(functions.wait_for_if, str(gate), 0), range(100))
    found = [next(results) for _ in range(99)]
    assert sorted(found) == list(range(1, 100))
    gate.touch()
    assert list(results) == [0]


@BOTH
def test_several_iterables_are_zipped_up_to_the_shortest(executor: RingPoolExecutor, map_name: str) -> None:
    drawn = Drawn()
    found = list(getattr(executor, map_name)(functions.add, range(1000), drawn, itertools.repeat(7)))
    assert sorted(found) == [2 * i + 7 for i in range(1000)]
    assert list(getattr(executor, map_name)(functions.add, range(3), [])) == []


@BOTH
def test_iterables_of_structured_items_are_zipped(executor: RingPoolExecutor, map_name: str) -> None:
    found = list(getattr(executor, map_name)(functions.keywords, [(i, [i]) for i in range(500)], map(str, range(500))))
    assert sorted(found) == sorted((((i, [i]), str(i)), {}) for i in range(500))


@pytest.mark.parametrize("chunksize", [1, 25, 100])
def test_a_chunksize_is_how_many_items_go_together(executor: RingPoolExecutor, chunksize: int) -> None:
    before = executor.stats().completed
    pids = list(executor.map(functions.process_id, range(1000), chunksize=chunksize))
    wait_until(lambda: executor.stats().in_ring == 0, "the last chunk")
    assert executor.stats().completed - before == 1000 // chunksize
    together = [set(pids[first : first + chunksize]) for first in range(0, 1000, chunksize)]
    assert all(len(each) == 1 for each in together)
    assert set(pids) <= set(executor.worker_pids)


def test_items_in_a_chunk_of_a_chosen_size_stay_together(executor: RingPoolExecutor, tmp_path: Path) -> None:
    """The caller says that they shall: the second chunk's items wait for none, the first one's for its slow one."""
    gate = tmp_path / "gate"
    call = partial(functions.wait_for_if, str(gate), 0)
    results = executor.map_unordered(call, range(20), chunksize=10)
    assert [next(results) for _ in range(10)] == list(range(10, 20))
    gate.touch()
    assert list(results) == list(range(10))


@BOTH
def test_a_result_that_does_not_come_in_time_is_a_timeout(
    executor: RingPoolExecutor, map_name: str, tmp_path: Path
) -> None:
    gate, before = tmp_path / "gate", executor.stats().completed
    results = getattr(executor, map_name)(
        partial(functions.wait_for_if, str(gate), 3), range(4), timeout=0.5, chunksize=1
    )
    wait_until(lambda: executor.stats().completed >= before + 3, "three results, however long that takes")
    found = [next(results) for _ in range(3)]
    assert sorted(found) == [0, 1, 2]
    with pytest.raises(TimeoutError) as caught:
        next(results)
    assert not isinstance(caught.value, PoolError)
    gate.touch()
    assert executor.submit(abs, -1).result(WATCHDOG_S) == 1


def test_results_that_have_arrived_are_given_out_after_the_time_as_well() -> None:
    with RingPoolExecutor(2) as own:
        assert own.submit(functions.double, 1).result(WATCHDOG_S) == 2
        results = own.map(functions.double, range(4), timeout=0.2, chunksize=1)
        wait_until(lambda: own.stats().completed == 5, "all results")
        threading.Event().wait(0.21)  # beyond the time
        assert list(results) == [0, 2, 4, 6]


@BOTH
def test_the_first_exception_ends_the_iterator(executor: RingPoolExecutor, map_name: str) -> None:
    results = getattr(executor, map_name)(partial(functions.raise_at, 10), range(1000), chunksize=1)
    with pytest.raises(LookupError) as caught:
        deque(results, 0)
    assert caught.value.args == (10,)
    assert next(results, "the end") == "the end"


def test_exceptions_may_be_results(executor: RingPoolExecutor) -> None:
    found = list(executor.map(partial(functions.raise_at, 10), range(1000), return_exceptions=True))
    assert [value for value in found if value != 10 and isinstance(value, int)] == [i for i in range(1000) if i != 10]
    assert isinstance(found[10], LookupError)
    assert "raise_at" in str(found[10].__cause__)
    given = list(executor.map(functions.identity, [LookupError(1), None], return_exceptions=False))
    assert isinstance(given[0], LookupError)  # one that was returned is a result like any other


def test_a_map_of_what_was_shut_down_is_refused() -> None:
    own = RingPoolExecutor(1)
    own.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        own.map(functions.identity, [1])


def test_cancelling_shutdown_cancels_the_rest_of_a_map(tmp_path: Path) -> None:
    begun, gate = tmp_path / "notes", tmp_path / "gate"
    own = RingPoolExecutor(1)
    results = own.map(partial(functions.note_and_hold, str(begun), str(gate)), Drawn(), chunksize=1)
    assert next(results) == 0
    wait_until(lambda: functions.n_noted(begun) == 2, "the second item")
    own.shutdown(wait=False, cancel_futures=True)
    wait_until(lambda: own.stats().queued == 0, "the end of what waited")
    gate.touch()
    found: list[int] = []
    with pytest.raises(CancelledError):
        found.extend(results)
    own.shutdown()
    assert os.path.getsize(begun) <= 8 * 8  # those of the claim that the worker was at


def test_a_call_does_not_wait_for_all_items_of_vectors_that_have_become_long() -> None:
    n_short, n_taken = 1000, 0
    is_over = threading.Event()

    def take(results: Iterator[None]) -> None:
        nonlocal n_taken
        for _ in results:
            n_taken += 1
            if is_over.is_set():
                return  # and what has not begun is cancelled

    with RingPoolExecutor(2) as pool:
        thread = threading.Thread(target=take, args=(pool.map(time.sleep, [0.001] * n_short + [0.05] * 400),))
        thread.start()
        wait_until(lambda: n_taken > n_short, "the first long item")
        n_before = n_taken
        assert pool.submit(abs, -1).result() == 1
        n_meanwhile = n_taken - n_before
        is_over.set()
        thread.join()
    assert n_meanwhile <= 20  # two or so; else 200 and more: all those of the vectors that had been sent before

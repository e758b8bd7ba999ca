"""How a map ends: taken by somebody, by nobody, in another thread, half, after the pool, or by Ctrl-C."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.coordinator import call_functions as functions
from tests.coordinator.program import WATCHDOG_S, Program, shared_memory_of, wait_until

from ringpool import RingPoolExecutor
from ringpool.coordinator import pool as pool_module
from ringpool.coordinator.inbox import Inbox
from ringpool.coordinator.pump import Pump
from ringpool.errors import WorkerDiedError, WrongProcessError
from ringpool.shm import blobs
from ringpool.shm.layout import CHUNK_BYTES
from ringpool.shm.vectors import Arena

RunProgram = Callable[..., Program]
BOTH = pytest.mark.parametrize("map_name", ["map", "map_unordered"])
N = 20_000  # more than may be drawn ahead
INPUTS: dict[str, Callable[[], Iterator[int] | range]] = {
    "a range": lambda: range(N),
    "a generator": lambda: (item for item in range(N)),
}
EITHER = pytest.mark.parametrize("source", INPUTS)
TOP = """
from ringpool import RingPoolExecutor
from functools import partial
from tests.coordinator import call_functions as functions
"""


@pytest.fixture(scope="module")
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as made:
        list(made.map(functions.process_id, range(64)))
        yield made


@pytest.fixture
def notes(tmp_path: Path) -> str:
    return os.path.join(tmp_path, "notes")


def wait_for_commands(executor: RingPoolExecutor) -> None:
    """Until the pool has done what it was told before."""
    executor._rp_pool.pump.call(lambda: None)


def settled_memory(executor: RingPoolExecutor) -> set[str]:
    """What this process has in ``/dev/shm``, once the functions of maps before have gone from it."""
    pool, introduced = executor._rp_calls.pool, executor._rp_calls._functions

    def are_gone() -> bool:
        stay = {blobs.function_name(pool.name, number) for number in introduced.values()}
        functions_there = {name for name in shared_memory_of(os.getpid()) if name.startswith(f"{pool.name}.f")}
        return functions_there <= stay

    wait_until(are_gone, "the end of the functions before")
    return shared_memory_of(os.getpid())


# ---- taken by nobody -------------------------------------------------------------------------------------------------


@BOTH
@EITHER
def test_a_map_whose_results_nobody_takes_is_run(
    executor: RingPoolExecutor, notes: str, map_name: str, source: str
) -> None:
    getattr(executor, map_name)(partial(functions.note, notes), INPUTS[source]())
    gc.collect()
    wait_until(lambda: functions.n_noted(notes) >= N, "all runs")
    assert sorted(functions.noted(notes)) == list(range(N))


@EITHER
def test_the_end_of_the_block_waits_for_a_map_that_nobody_takes(notes: str, source: str) -> None:
    with RingPoolExecutor(2) as own:
        own.map(partial(functions.note, notes), INPUTS[source]())
    assert sorted(functions.noted(notes)) == list(range(N))


@EITHER
def test_errors_in_a_map_that_nobody_takes_are_nobodys(notes: str, source: str) -> None:
    hazards = frozenset(range(0, N, 1000))
    with RingPoolExecutor(2) as own:
        own.map(partial(functions.tolerate, notes, "raise", hazards), INPUTS[source]())
    assert sorted(functions.noted(notes)) == list(range(N))


@EITHER
@pytest.mark.parametrize("dropped", [True, False])
def test_a_program_that_ends_runs_a_map_that_nobody_takes(
    run_program: RunProgram, notes: str, source: str, dropped: bool
) -> None:
    items = f"range({N})" if source == "a range" else f"(item for item in range({N}))"
    body = f"pool = RingPoolExecutor(2)\nresults = pool.map(partial(functions.note, {notes!r}), {items})\n"
    program = run_program(body + ("del results" if dropped else "globals()['kept'] = results"), top=TOP)
    assert program.finish() == 0, program.err
    assert program.err == ""
    assert sorted(functions.noted(notes)) == list(range(N))
    program.assert_nothing_is_left()


def test_a_map_that_nobody_takes_draws_what_belongs_to_the_thread_that_closes(notes: str) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE items (item INTEGER)")
        database.executemany("INSERT INTO items VALUES (?)", [(item,) for item in range(500)])
        with RingPoolExecutor(2) as own:
            rows = database.execute("SELECT item FROM items")
            own.map(partial(functions.note_first, notes), rows)
    assert sorted(functions.noted(notes)) == list(range(500))


def test_such_a_map_draws_what_there_was_no_room_for_as_well(notes: str) -> None:
    """Items that were drawn before and are sent by another thread do not make the iterator that thread's."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE items (item INTEGER, content BLOB)")
        sizes = [10] * 575 + [6000 * CHUNK_BYTES // (1 << 18)] * 1425
        database.executemany("INSERT INTO items VALUES (?, ?)", ((i, bytes(size)) for i, size in enumerate(sizes)))
        with RingPoolExecutor(2) as own:
            rows = database.execute("SELECT item, content FROM items ORDER BY item")
            own.map(partial(functions.note_first, notes), rows, chunksize=100)
    assert sorted(functions.noted(notes)) == list(range(2000))


def test_a_handler_that_closes_the_pool_while_a_map_is_prepared_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared_memory_of(os.getpid())
    own = RingPoolExecutor(2)

    def close_first(*arguments: Any) -> Arena:
        own.shutdown()
        return Arena(*arguments)

    monkeypatch.setattr(pool_module, "Arena", close_first)
    with pytest.raises(RuntimeError, match="after shutdown"):
        own.map(abs, range(10))
    assert shared_memory_of(os.getpid()) == before


@pytest.mark.parametrize("n", [0, 30])
def test_an_error_of_the_items_of_a_map_that_nobody_takes_is_reported(
    notes: str, capfd: pytest.CaptureFixture[str], n: int
) -> None:
    def items() -> Iterator[int]:
        yield from range(n)
        raise LookupError("the input broke")

    with RingPoolExecutor(2) as own:
        own.map(partial(functions.note, notes), items())
    assert sorted(functions.noted(notes)) == list(range(n))
    assert capfd.readouterr().err.count("LookupError: the input broke") == 1


LEFT: dict[str, Callable[[], Iterable[Any]]] = {
    **INPUTS,
    "nothing": list,
    "few": lambda: range(10),
    "few of an iterator": lambda: iter(range(10)),
    "one that cannot be sent": lambda: [1, threading.Lock(), 2],
}


@pytest.mark.parametrize("source", LEFT)
def test_of_a_map_that_nobody_takes_nothing_is_left_when_it_has_run(executor: RingPoolExecutor, source: str) -> None:
    before = settled_memory(executor)
    function = partial(functions.identity)
    there = weakref.ref(function)
    executor.map(function, LEFT[source]())
    del function

    def is_left() -> bool:
        gc.collect()
        return bool(there() or executor._rp_pool.runs or executor._rp_pool.pump.feeders)

    wait_until(lambda: not is_left(), "the end of the map")
    wait_until(lambda: shared_memory_of(os.getpid()) == before, "the end of its function")


class NotIterable:
    def __iter__(self) -> Iterator[int]:
        raise LookupError


def interrupted() -> Iterator[int]:
    yield 1
    raise KeyboardInterrupt


@pytest.mark.parametrize(("items", "error"), [(NotIterable, LookupError), (interrupted, KeyboardInterrupt)])
def test_of_a_map_that_nobody_has_got_nothing_is_left(
    executor: RingPoolExecutor, items: Callable[[], Iterable[int]], error: type[BaseException]
) -> None:
    before = settled_memory(executor)
    with pytest.raises(error):
        executor.map(functions.identity, items())
    assert not executor._rp_pool.runs
    wait_until(lambda: shared_memory_of(os.getpid()) == before, "the end of its function")


# ---- taken after the end of the pool ---------------------------------------------------------------------------------


@BOTH
@EITHER
def test_results_are_taken_after_the_block(map_name: str, source: str) -> None:
    with RingPoolExecutor(2) as own:
        results = getattr(own, map_name)(functions.double, INPUTS[source]())
    assert sorted(results) == list(range(0, 2 * N, 2))


def test_what_cannot_come_is_raised_after_the_block() -> None:
    with RingPoolExecutor(2) as own:
        results = own.map(partial(functions.raise_at, 1000), range(N))
    found: list[int] = []
    with pytest.raises(LookupError):
        found.extend(results)
    assert found == list(range(1000))


def test_results_that_were_begun_are_taken_after_the_block() -> None:
    with RingPoolExecutor(2) as own:
        results = own.map(functions.double, range(N))
        first = next(results)
    assert [first, *results] == list(range(0, 2 * N, 2))


def test_a_begun_map_of_an_iterator_does_not_hold_up_the_end_of_the_block() -> None:
    """It may be endless. What was drawn comes; then the iterator says that it is not all."""
    found: list[int] = []
    with RingPoolExecutor(2) as own:
        results = own.map(functions.double, itertools.count())
        found.append(next(results))
    with pytest.raises(RuntimeError, match="before this map had drawn all its items"):
        found.extend(results)
    assert len(found) > 2
    assert found == list(range(0, 2 * len(found), 2))


@EITHER
def test_closing_while_another_thread_takes(source: str) -> None:
    own = RingPoolExecutor(2)
    results = own.map(functions.work, INPUTS[source]())
    found: list[int] = []
    errors: list[Exception] = []
    under_way = threading.Event()

    def take() -> None:
        try:
            for value in results:
                found.append(value)
                if len(found) == 100:
                    under_way.set()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    under_way.wait(WATCHDOG_S)
    own.shutdown()
    thread.join(WATCHDOG_S)
    assert not thread.is_alive()
    assert found == list(range(len(found)))
    if source == "a range":
        assert (len(found), errors) == (N, [])
    else:
        assert len(found) == N or [type(error) for error in errors] == [RuntimeError]


class SlowList(list[int]):
    """Takes its time for one of its first items: until results of those before have come."""

    def __init__(self, executor: RingPoolExecutor, items: Iterable[int]) -> None:
        super().__init__(items)
        self._executor = executor

    def __iter__(self) -> Iterator[int]:
        n_completed = self._executor.stats().completed
        for i, item in enumerate(super().__iter__()):
            if i == 2500:
                wait_until(lambda: self._executor.stats().completed > n_completed, "a first result")
                wait_for_commands(self._executor)
            yield item


def test_results_that_come_while_the_first_items_are_drawn_draw_none_beside(executor: RingPoolExecutor) -> None:
    items = SlowList(executor, range(10_000))
    assert list(executor.map(functions.identity, items, chunksize=1000)) == list(range(10_000))


def test_who_closes_leaves_the_news_to_whoever_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine under load all that is under way may have come when the pump looks: one release of one lock."""
    turn = Pump._turn

    def late_turn(pump: Pump) -> None:
        time.sleep(0.15)
        turn(pump)

    monkeypatch.setattr(Pump, "_turn", late_turn)
    own = RingPoolExecutor(2)
    results = own.map(functions.identity, range(600_000))
    assert next(results) == 0
    closing = threading.Thread(target=own.shutdown, daemon=True)
    found: list[int] = []
    taking = threading.Thread(target=lambda: found.extend(results), daemon=True)
    closing.start()
    taking.start()
    taking.join(WATCHDOG_S)
    assert len(found) == 599_999
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()


def test_killing_the_workers_ends_whoever_takes(tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    own = RingPoolExecutor(1)
    results = own.map(partial(functions.note_and_hold, str(begun), str(gate)), range(100), return_exceptions=True)
    assert next(results) == 0
    wait_until(lambda: functions.n_noted(begun) > 1, "the second item")
    own.terminate_workers()
    found = list(results)
    assert len(found) == 99
    assert all(isinstance(outcome, BrokenProcessPool) for outcome in found)


def test_killing_the_workers_ends_whoever_takes_what_a_vector_has_delivered_early(tmp_path: Path) -> None:
    own = RingPoolExecutor(1)
    call = partial(functions.wait_for_if, str(tmp_path / "never"), 5)
    results = own.map(call, range(8), chunksize=8, return_exceptions=True)
    assert [next(results) for _ in range(5)] == list(range(5))
    own.terminate_workers()
    found = list(results)
    assert len(found) == 3
    assert all(isinstance(outcome, BrokenProcessPool) for outcome in found)


def test_killing_the_workers_breaks_what_runs_and_what_waits(tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    own = RingPoolExecutor(1)
    futures = [own.submit(functions.note_and_hold, str(begun), str(gate), i) for i in range(1, 2000)]
    wait_until(lambda: functions.n_noted(begun) > 0, "the first task")
    own.kill_workers()
    assert all(isinstance(future.exception(WATCHDOG_S), BrokenProcessPool) for future in futures)


def test_workers_that_are_killed_end_a_shutdown_that_draws() -> None:
    """What it still had to draw, without end here, would be for nobody."""
    own = RingPoolExecutor(1)
    has_drawn = threading.Event()

    def items() -> Iterator[int]:
        for item in itertools.count():
            if item > 100:
                has_drawn.set()
            yield item

    results = own.map(functions.process_id, items())
    closing = threading.Thread(target=own.shutdown, daemon=True)
    closing.start()
    assert has_drawn.wait(WATCHDOG_S)
    own.kill_workers()
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()
    with pytest.raises(BrokenProcessPool):
        list(results)


# ---- taken in part ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("chunksize", [None, 1, 16])
@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_begun_map_that_is_dropped_cancels_the_rest(
    executor: RingPoolExecutor, tmp_path: Path, notes: str, map_name: str, chunksize: int | None, how: str
) -> None:
    gate = tmp_path / "gate"
    call = partial(functions.note_and_hold, notes, str(gate))
    items = [0] * 32 + list(range(1, 200))  # those that are 0 end at once
    results = getattr(executor, map_name)(call, items, chunksize=chunksize)
    for _ in range(32 if chunksize == 16 else 5):
        next(results)
    wait_until(lambda: len([item for item in functions.noted(notes) if item]) == 2, "both workers at it")
    n_zeros = len(functions.noted(notes)) - 2
    if how == "close":
        results.close()
    else:
        del results
        gc.collect()
    wait_for_commands(executor)
    gate.touch()
    wait_until(lambda: executor.stats()[1:3] == (0, 0), "the end of what had begun")
    assert functions.n_noted(notes) == n_zeros + 2
    assert executor.submit(functions.double, 2).result(WATCHDOG_S) == 4


def test_an_error_that_ends_a_map_cancels_the_rest(executor: RingPoolExecutor, notes: str) -> None:
    hazard = partial(functions.tolerate, notes, "raise", frozenset({3}))
    with pytest.raises(LookupError):
        list(executor.map(hazard, itertools.count()))
    wait_until(lambda: executor.stats()[1:3] == (0, 0), "the end of what had begun")
    n = functions.n_noted(notes)
    assert executor.submit(functions.double, 2).result(WATCHDOG_S) == 4
    assert functions.n_noted(notes) == n < N


# ---- several at a time -----------------------------------------------------------------------------------------------


@BOTH
def test_two_maps_are_taken_in_turns(executor: RingPoolExecutor, map_name: str) -> None:
    one = getattr(executor, map_name)(functions.double, INPUTS["a generator"]())
    other = getattr(executor, map_name)(functions.identity, INPUTS["a range"]())
    pairs = list(zip(one, other, strict=True))
    assert sorted(value for value, _ in pairs) == list(range(0, 2 * N, 2))
    assert sorted(value for _, value in pairs) == list(range(N))


def test_the_results_of_a_map_are_the_input_of_another(executor: RingPoolExecutor) -> None:
    once = executor.map(functions.double, range(N))
    assert list(executor.map(functions.double, once)) == list(range(0, 4 * N, 4))


def test_maps_in_many_threads(executor: RingPoolExecutor) -> None:
    found: dict[int, list[int]] = {}

    def take(of: int) -> None:
        found[of] = list(executor.map(functions.add, range(3000), itertools.repeat(of)))

    threads = [threading.Thread(target=take, args=(of,)) for of in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert found == {of: list(range(of, 3000 + of)) for of in range(6)}


def test_a_map_is_made_in_one_thread_and_taken_in_others(executor: RingPoolExecutor) -> None:
    """In turn: the first leaves it when it has had enough, and its end is not the map's."""
    results = executor.map(functions.double, INPUTS["a generator"]())
    found: list[int] = []
    for n in (1, 5000, N):
        thread = threading.Thread(target=lambda n=n: found.extend(itertools.islice(results, n)))
        thread.start()
        thread.join(WATCHDOG_S)
    assert found == list(range(0, 2 * N, 2))


def test_a_map_inside_a_task_of_another_pool(executor: RingPoolExecutor) -> None:
    assert list(executor.map(functions.map_inside, [10, 100])) == [90, 9900]


def test_a_list_that_asks_its_pool_as_it_is_iterated_over_is_drawn_by_who_takes(executor: RingPoolExecutor) -> None:
    """And not by the pool's own thread, in which nobody may wait for it."""

    class Asking(list[int]):
        def __iter__(self) -> Iterator[int]:
            for item in super().__iter__():
                yield executor.submit(functions.double, item).result(WATCHDOG_S)

    found: list[int] = []
    for value in executor.map(functions.double, Asking(range(500))):
        found.append(value)
        time.sleep(0.001)  # meanwhile the pool would draw what is at hand
    assert found == list(range(0, 2000, 4))


def test_a_task_cannot_use_the_pool_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of the program has its pools, and is told whose they are."""
    with RingPoolExecutor(1, mp_context="fork") as own:
        monkeypatch.setattr(functions, "inherited", [own])
        with pytest.raises(WrongProcessError):
            own.submit(functions.map_in_inherited, 3).result(WATCHDOG_S)
        with pytest.raises(TypeError, match="pickle"):
            own.submit(functions.identity, own).result(WATCHDOG_S)
        assert list(own.map(functions.double, range(3))) == [0, 2, 4]


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

ENDLESS = {
    "a block": """
        with RingPoolExecutor(2) as pool:
            for value in pool.map(functions.work, itertools.count()):
                if value == 1000:
                    say("ready")
        """,
    "no block": """
        pool = RingPoolExecutor(2)
        for n, value in enumerate(pool.map_unordered(functions.work, itertools.count())):
            if n == 1000:
                say("ready")
        """,
    "a wait for a result": """
        with RingPoolExecutor(2) as pool:
            call = partial(functions.wait_for_if, "never", 500)
            for value in pool.map(call, itertools.count(), chunksize=1):
                if value == 499:
                    say("ready")
        """,
    "a wait for the input": """
        def items():
            yield 1
            say("ready")
            wait()
        with RingPoolExecutor(2) as pool:
            list(pool.map(functions.work, items()))
        """,
    "the end of a map that nobody takes": """
        with RingPoolExecutor(2) as pool:
            pool.map(functions.work, itertools.count())
            say("ready")
        """,
}


@pytest.mark.parametrize("where", ENDLESS)
def test_an_interrupt_ends_a_map_and_its_program(run_program: RunProgram, where: str) -> None:
    program = run_program(ENDLESS[where], top=TOP)
    program.wait_for("ready")
    program.signal(signal.SIGINT)
    assert program.finish() == -signal.SIGINT, program.err
    assert program.err.splitlines()[-1] == "KeyboardInterrupt"
    program.assert_nothing_is_left()


# ---- the pool is shut down, and what has not begun is cancelled ------------------------------------------------------


@pytest.mark.parametrize("chunksize", [100, 1000])
@pytest.mark.parametrize("ends_by", ["a gate", "a death"])
def test_items_behind_the_one_that_runs_are_cancelled(tmp_path: Path, notes: str, ends_by: str, chunksize: int) -> None:
    gate, n_vectors = tmp_path / "gate", 1000 // chunksize
    pool = RingPoolExecutor(1)
    hold = partial(functions.note_and_hold, notes, str(gate))
    how: dict[str, Any] = {"chunksize": chunksize, "buffersize": 1000, "timeout": WATCHDOG_S}
    results = pool.options(retries=3).map_unordered(hold, range(1, 1000), return_exceptions=True, **how)
    wait_until(lambda: functions.n_noted(notes) == 1, "the first item")
    pool.shutdown(wait=False, cancel_futures=True)
    try:
        cancelled = list(itertools.islice(results, 999 - n_vectors))  # while the first one runs
        if ends_by == "a death":
            os.kill(pool.worker_pids[0], signal.SIGKILL)
            pool.shutdown()
    finally:
        gate.touch()
    pool.shutdown()
    assert {type(error) for error in cancelled} == {CancelledError}
    last = [result for result in results if not isinstance(result, CancelledError)]
    assert last == ([1] if ends_by == "a gate" else [])
    assert functions.n_noted(notes) == 1


def test_who_takes_results_in_a_thread_does_not_keep_a_pool_from_cancelling(tmp_path: Path, notes: str) -> None:
    gate, pool, outcomes = tmp_path / "gate", RingPoolExecutor(1), list[object]()
    first = pool.submit(functions.note_and_hold, notes, str(gate), 1)
    wait_until(lambda: functions.n_noted(notes) == 1, "the first item")
    futures = [pool.submit(functions.note_and_hold, notes, str(gate), item) for item in range(2, 5)]
    results = pool.map(partial(functions.note_and_hold, notes, str(gate)), iter(range(5, 8)), timeout=WATCHDOG_S)

    def take() -> None:
        try:
            outcomes.append(next(results))
        except CancelledError:
            outcomes.append(None)

    thread = threading.Thread(target=take)
    thread.start()
    closing = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
    closing.start()
    wait_until(lambda: pool._rp_calls.pool.pump._cancels_all, "the pool that cancels")  # pyright: ignore[reportPrivateUsage]
    gate.touch()
    closing.join(WATCHDOG_S)
    thread.join(WATCHDOG_S)
    assert outcomes == [None]
    assert [future.cancelled() for future in (first, *futures)] == [False, True, True, True]
    assert functions.n_noted(notes) == 1


def test_what_dies_when_all_is_cancelled_is_not_begun_again(tmp_path: Path, notes: str) -> None:
    pool = RingPoolExecutor(1)
    future = pool.options(retries=3).submit(functions.note_and_hold, notes, str(tmp_path / "gate"), 1)
    wait_until(lambda: functions.n_noted(notes) == 1, "the task")
    pool.shutdown(wait=False, cancel_futures=True)
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    assert isinstance(future.exception(WATCHDOG_S), WorkerDiedError)
    pool.shutdown()
    assert functions.n_noted(notes) == 1


# ---- the pool is shut down from within -------------------------------------------------------------------------------

SHUT_DOWN = """
import os, signal, threading
def shut_down(*_):
    pool.shutdown(wait=True, cancel_futures=%s)
pool = RingPoolExecutor(2)
pool.submit(abs, 1).result()
signal.signal(signal.SIGUSR1, shut_down)
n = 0
def strike():
    os.kill(os.getpid(), signal.SIGUSR1)
    return 0
def items():
    for item in range(3000):
        yield strike() if item == 2000 else item
def some():
    return %s
results = pool.map(functions.double, some()) if %s else pool.map_unordered(functions.double, some())
try:
    for n, _ in enumerate(results, 1):
        if n == 100 and not %s:
            strike()
except BaseException as error:
    print(type(error).__name__, flush=True)
else:
    print("all", n, flush=True)
"""


@pytest.mark.parametrize("ordered", [True, False], ids=["map", "map_unordered"])
@pytest.mark.parametrize("cancel", [True, False], ids=["cancel", "wait"])
@pytest.mark.parametrize("drawn", [True, False], ids=["an item does it", "a handler does it"])
def test_a_pool_that_is_shut_down_while_its_map_is_taken_hangs_nobody(
    run_program: RunProgram, ordered: bool, cancel: bool, drawn: bool
) -> None:
    source = "items()" if drawn else "[*range(100_000)]"
    program = run_program(SHUT_DOWN % (cancel, source, ordered, drawn), top=TOP)
    kept = "ExecutorEndedError"  # of items that were drawn and not sent
    ends = ("CancelledError", kept) if cancel else ("RuntimeError", kept) if drawn else ("all 100000",)
    assert program.finish() == 0, program.err
    assert program.out.strip() in ends
    program.assert_nothing_is_left()


def test_a_handler_that_shuts_a_pool_down_while_a_map_waits_hangs_nobody(run_program: RunProgram) -> None:
    body = """
import os, signal, threading, time
pool = RingPoolExecutor(2)
pool.submit(abs, 1).result()
signal.signal(signal.SIGUSR1, lambda *_: pool.shutdown(wait=True))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
print(len(list(pool.map(time.sleep, [0.01] * 200))), flush=True)
"""
    program = run_program(body, top=TOP)
    assert program.finish() == 0, program.err
    assert program.out.strip() == "200"
    program.assert_nothing_is_left()


def test_who_waits_looks_again_where_a_handler_has_taken_what_had_arrived() -> None:
    inbox = Inbox(lambda: None)
    threading.Timer(0.1, inbox.tell_taken).start()
    assert inbox.wait(WATCHDOG_S)
    assert not inbox.wait(0.01)


def test_a_map_that_nobody_takes_ends_without_a_word_where_the_workers_are_killed(run_program: RunProgram) -> None:
    program = run_program(
        """
        own = RingPoolExecutor(1)
        has_drawn = threading.Event()

        def items():
            for item in itertools.count():
                if item > 100:
                    has_drawn.set()
                yield item

        own.map(abs, items())
        has_drawn.wait()
        own.kill_workers()
        """,
        top=TOP,
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()

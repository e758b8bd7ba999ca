"""The coordinator as its users know it: tasks and their futures, runs over inputs, cancelling, what is refused."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import task_functions as tasks
from tests.coordinator.program import WATCHDOG_S, shared_memory_of, wait_until

from ringpool import Coordinator, FileTask
from ringpool.coordinator.futures import TaskBoard, TaskFuture
from ringpool.errors import (
    CoordinatorClosedError,
    InputMissingError,
    ParameterError,
    PathNameError,
    RemoteError,
    ResultTransportError,
    UnknownFunctionError,
    WorkerDiedError,
    WrongProcessError,
    WrongThreadError,
)

MakeFiles = Callable[[int], list[Path]]


class Gate:
    """Holds tasks: ``hold(pool, file)`` gives a future whose task has begun, and does not end before ``open()``."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._counter = itertools.count()
        self.path = place / "gate"

    def hold(self, pool: Coordinator, file: Path) -> TaskFuture:
        begun = self._place / f"begun-{next(self._counter)}"
        future = pool.submit_file_task(tasks.hold, file, params={"gate": str(self.path), "begun": str(begun)})
        wait_until(begun.exists, "the task's begin")
        return future

    def hold_all(self, pool: Coordinator, file: Path, workers: int = 2) -> list[TaskFuture]:
        return [self.hold(pool, file) for _ in range(workers)]

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.open()


# ---- one task --------------------------------------------------------------------------------------------------------


def test_a_task_returns_its_value(pool: Coordinator, file: Path) -> None:
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5


def test_a_function_may_be_given_by_name(pool: Coordinator, file: Path) -> None:
    assert pool.submit_file_task("tests.task_functions:name", file).result(WATCHDOG_S) == "input"


def test_tasks_run_in_the_workers(pool: Coordinator, file: Path) -> None:
    assert pool.submit_file_task(tasks.process_id, file).result(WATCHDOG_S) in pool.worker_pids


def test_parameters_are_converted_to_their_annotations(pool: Coordinator, file: Path) -> None:
    future = pool.submit_file_task(tasks.typed, file, params={"times": "3", "mark": "y"})
    assert future.result(WATCHDOG_S) == "3 'y'"


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**64,
        -(2**63),
        1.5,
        float("inf"),
        "",
        "\udcff",
        b"\x00\xff",
        (1, [2, {3: 4}]),
        {"a", "b"},
        Path("x"),
        ...,
        1j,
        "long " * 1000,
        [b"x" * 10_000, "y"],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_arrive_as_they_are(pool: Coordinator, file: Path, value: Any) -> None:
    for result in (
        pool.submit_file_task(tasks.echo, file, params={"value": value}).result(WATCHDOG_S),
        next(pool.run_file_tasks(tasks.echo, [file], params={"value": value})).unwrap(),
    ):
        assert result == value
        assert type(result) is type(value)


def test_large_results_and_parameters_leave_no_shared_memory(pool: Coordinator, file: Path) -> None:
    before = shared_memory_of(os.getpid())
    n = 50_000_000
    result = pool.submit_file_task(tasks.many_bytes, file, params={"n": n}).result(WATCHDOG_S)
    assert len(result) == n
    array = pool.submit_file_task(tasks.ramp, file, params={"n": 1_000_000}).result(WATCHDOG_S)
    array += 1  # it is the caller's own
    assert array[-1] == 1_000_000
    assert pool.submit_file_task(tasks.total, file, params={"numbers": array}).result(WATCHDOG_S) == int(array.sum())
    left = shared_memory_of(os.getpid()) - before
    assert not [name for name in left if ".t" in name or ".r" in name]


def test_a_value_that_cannot_travel_is_an_error_of_its_task(pool: Coordinator, file: Path) -> None:
    with pytest.raises(ResultTransportError, match="lock"):
        pool.submit_file_task(tasks.unpicklable, file).result(WATCHDOG_S)


# ---- tasks that raise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("value", ValueError, "no good"),
        ("chained", ValueError, "second"),
        ("interrupt", KeyboardInterrupt, ""),
        ("exit", SystemExit, "3"),
        ("generator exit", GeneratorExit, ""),
        ("unpicklable", RemoteError, "UnpicklableError: holds a lock"),
        ("cannot be rebuilt", RemoteError, "TwoArgumentsError: a and b"),
        ("local class", RemoteError, "LocalError: nobody knows me"),
        ("mute", Exception, None),
        ("frozen", tasks.FrozenError, ""),
        ("rebuilt as a text", RemoteError, "RebuiltAsTextError: words of it"),
        ("huge", ValueError, "xxx"),
        ("surrogates", ValueError, "\udcff"),
        ("recursion", RecursionError, "recursion"),
        ("memory", MemoryError, ""),
        ("group", ExceptionGroup, "several"),
        ("of ringpool", tasks.TaskRefusedError, "own"),
    ],
)
def test_what_a_task_raises_is_raised_where_its_result_is_wanted(
    pool: Coordinator, file: Path, how: str, kind: type[BaseException], words: str | None
) -> None:
    pids = pool.worker_pids
    error = pool.submit_file_task(tasks.fail, file, params={"how": how}).exception(WATCHDOG_S)
    assert isinstance(error, kind)
    if words is not None:
        assert words in str(error)
    assert "task_functions.py" in str(error.__cause__), "the worker's traceback"
    [result] = pool.run_file_tasks(tasks.fail, [file], params={"how": how})
    assert isinstance(result.error, kind)
    assert not result.ok
    assert pool.worker_pids == pids, "no worker ends by an exception"


def test_a_failing_task_leaves_its_neighbours_alone(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(200)
    bad = set(paths[::7])
    for path in bad:
        path.write_text("fail")
    results = {result.path: result for result in pool.run_file_tasks(tasks.fail_if_marked, paths)}
    assert {path for path, result in results.items() if not result.ok} == bad
    assert all(result.value == path.name for path, result in results.items() if result.ok)


# ---- what is refused at once -----------------------------------------------------------------------------------------


def nested() -> Callable[..., Any]:
    def inside(src: Path) -> None:
        pass

    return inside


@pytest.mark.parametrize(
    "function",
    [
        "tests.task_functions:no_such",
        "tests.no_such_module:size",
        "no_colon",
        ":",
        "",
        "tests.task_functions:WATCHDOG_S",
        lambda src: None,
        nested(),
        42,
    ],
    ids=lambda function: function if isinstance(function, str) else type(function).__name__,
)
@pytest.mark.parametrize("way", ["submit_file_task", "run_file_tasks"])
def test_an_unknown_function_is_refused(pool: Coordinator, file: Path, function: Any, way: str) -> None:
    before = pool.stats()
    with pytest.raises(UnknownFunctionError):
        getattr(pool, way)(function, file if way == "submit_file_task" else [file])
    assert pool.stats() == before, "nothing was queued"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "'times' is missing"),
        ({"times": "many"}, "'times'"),
        ({"times": 1, "mark": 2.5}, "'mark'"),
        ({"times": 1, "colour": "red"}, "no parameter 'colour'"),
        ({"times": 1, "src": "x"}, "'src'"),
    ],
)
@pytest.mark.parametrize("way", ["submit_file_task", "run_file_tasks"])
def test_a_bad_parameter_is_refused(
    pool: Coordinator, file: Path, params: dict[str, Any], words: str, way: str
) -> None:
    before = pool.stats()
    with pytest.raises(ParameterError, match=words):
        getattr(pool, way)(tasks.typed, file if way == "submit_file_task" else [file], params=params)
    assert pool.stats() == before


def test_a_parameter_that_cannot_travel_is_refused(pool: Coordinator, file: Path) -> None:
    with pytest.raises(ParameterError, match="pickle"):
        pool.submit_file_task(tasks.echo, file, params={"value": threading.Lock()})


@pytest.mark.parametrize("path", ["no/such/file", "", "nul\0byte"])
def test_a_missing_input_is_refused(pool: Coordinator, path: str) -> None:
    before = pool.stats()
    with pytest.raises(InputMissingError) as caught:
        pool.submit_file_task(tasks.size, path)
    assert isinstance(caught.value, FileNotFoundError)
    assert pool.stats() == before


def test_a_missing_input_of_a_run_is_an_error_of_its_own(pool: Coordinator, file: Path, tmp_path: Path) -> None:
    results = {r.path: r for r in pool.run_file_tasks(tasks.size, [tmp_path / "missing", file])}
    assert isinstance(results[tmp_path / "missing"].error, FileNotFoundError)
    assert results[file].value == 5


def test_what_is_no_path_is_refused(pool: Coordinator, file: Path) -> None:
    with pytest.raises(TypeError):
        pool.submit_file_task(tasks.size, 5)  # type: ignore[arg-type]
    run = pool.run_file_tasks(tasks.size, [file, None])  # type: ignore[list-item]
    assert next(run).value == 5
    with pytest.raises(TypeError):
        next(run)


def test_a_run_whose_inputs_cannot_be_had_leaves_no_function(pool: Coordinator) -> None:
    before = shared_memory_of(os.getpid())
    with pytest.raises(TypeError, match="not iterable"):
        pool.run_file_tasks(tasks.many_bytes, 5, params={"n": 5})  # type: ignore[arg-type]
    assert shared_memory_of(os.getpid()) == before


def test_a_single_path_is_no_run_of_its_letters(pool: Coordinator) -> None:
    with pytest.raises(TypeError):
        pool.run_file_tasks(tasks.size, "data")


@pytest.mark.parametrize(
    "arguments",
    [
        {"workers": 0},
        {"workers": 1000},
        {"ring_slots": 0},
        {"attempts_max": 0},
        {"attempts_max": 64},
        {"claims_max": 0},
        {"claims_max": 65},
        {"durability": "some"},
        {"mp_context": "thread"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (the messages are ringpool's, Enum's and multiprocessing's)
        Coordinator(**{"workers": 1} | arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("workers", "4"), ("workers", 2.5), ("claims_max", 8.0), ("attempts_max", None)]
)
def test_numbers_that_are_not_whole_are_refused_by_their_names(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a whole number, not {value!r}$"):
        Coordinator(**{"workers": 1} | {name: value})


def test_numbers_may_be_integers_of_any_type(file: Path) -> None:
    numbers = {"workers": 1, "ring_slots": 8, "attempts_max": 1, "claims_max": 2}
    with Coordinator(**{name: np.uint8(n) for name, n in numbers.items()}) as pool:  # type: ignore[arg-type]
        run = pool.run_file_tasks(tasks.die, [file] * 2, window=np.uint8(1))  # type: ignore[arg-type]
        errors = [result.error for result in run]
    assert [(type(error), error.deaths) for error in errors if isinstance(error, WorkerDiedError)] == [
        (WorkerDiedError, 1)
    ] * 2


def test_what_a_run_cannot_use_is_named(pool: Coordinator) -> None:
    # What no type checker would let through is what is refused.
    with pytest.raises(TypeError, match=r"^window must be a whole number, not 2\.5$"):
        pool.run_file_tasks(tasks.size, [], window=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^output must be a function .*, not '{name}'"):
        pool.run_file_tasks(tasks.copy, [], output="{name}")  # pyright: ignore[reportArgumentType]


UNUSABLE = {"": "it is empty", "\ud800": "Invalid", "a\0": "NUL", "/a\0b": "NUL"}


@pytest.mark.parametrize("window", [1, None])
def test_a_path_that_can_name_no_file_is_that_files_failure(pool: Coordinator, file: Path, window: int | None) -> None:
    given = [file, *UNUSABLE, file]
    results = list(pool.run_file_tasks(tasks.size, given, window=window))
    assert sorted(str(r.path) for r in results) == sorted(map(str, given))
    assert [r.value for r in results if r.path == file] == [5, 5]
    for r in results:
        if r.path != file:
            assert isinstance(r.error, PathNameError)
            assert UNUSABLE[r.path] in str(r.error)
            assert "\0" not in str(r.error)
            assert (r.attempts, r.worker) == (0, -1)
            with pytest.raises((PathNameError, InputMissingError)):
                pool.submit_file_task(tasks.size, r.path)


def test_an_output_that_can_name_no_file_is_that_files_failure(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(3)
    outputs: dict[Any, Any] = dict(zip(paths, ["\ud800", paths[1].with_suffix(".out"), "a\0"], strict=True))
    found = {r.path: r for r in pool.run_file_tasks(tasks.copy, paths, output=outputs.__getitem__)}
    assert [type(found[path].error) for path in paths] == [PathNameError, type(None), PathNameError]
    assert outputs[paths[1]].read_bytes() == paths[1].read_bytes()


def test_a_callback_does_not_wait_for_its_own_pool(pool: Coordinator, file: Path) -> None:
    """It would wait for ever: nobody else takes results out of the ring."""
    errors: list[BaseException] = []
    called = threading.Event()
    other = pool.submit_file_task(tasks.size, file)
    waits: list[Callable[[], object]] = [
        lambda: pool.submit_file_task(tasks.size, file).result(),
        lambda: pool.submit_file_task(tasks.size, file).exception(),
        lambda: pool.wait_for_task_result(pool.submit_file_task(tasks.size, file).task_id),
        lambda: list(pool.run_file_tasks(tasks.size, [file])),
    ]

    def call(_: object) -> None:
        assert other.result() == 5, "it is done"
        for wait_for_it in waits:
            try:
                wait_for_it()
            except WrongThreadError as error:
                errors.append(error)
        called.set()

    assert other.result(WATCHDOG_S) == 5
    pool.submit_file_task(tasks.size, file).add_done_callback(call)
    assert called.wait(WATCHDOG_S)
    assert len(errors) == len(waits)
    assert "a future's callback cannot wait for results of its pool" in str(errors[0])


# ---- results by id ---------------------------------------------------------------------------------------------------


def test_a_result_can_be_had_by_its_id_once(pool: Coordinator, file: Path) -> None:
    future = pool.submit_file_task(tasks.size, file)
    assert pool.wait_for_task_result(future.task_id, WATCHDOG_S) == 5
    with pytest.raises(KeyError, match="read already"):
        pool.wait_for_task_result(future.task_id)
    assert future.result() == 5, "the future keeps it"


@pytest.mark.parametrize("fn", [tasks.wait_for_gate, tasks.wait_for_gate_and_raise])
def test_a_callback_that_exits_leaves_a_future_done_and_unread(
    pool: Coordinator, file: Path, tmp_path: Path, fn: Callable[..., Any]
) -> None:
    gate = tmp_path / "gate"
    future = pool.submit_file_task(fn, file, params={"gate": str(gate)})
    future.add_done_callback(lambda _: sys.exit(3))
    gate.touch()
    wait([future], WATCHDOG_S)
    wait_until(lambda: pool.stats()[1:3] == (0, 0), "the end of the task")
    pool._pump.call(lambda: None)
    assert future.ticket is None
    assert future.task_id not in pool._board._pending
    assert pool._board.find(future.task_id) is future


def test_waiting_for_a_result_has_a_limit(pool: Coordinator, file: Path, gate: Gate) -> None:
    future = gate.hold(pool, file)
    with pytest.raises(TimeoutError):
        pool.wait_for_task_result(future.task_id, 0.01)
    with pytest.raises(TimeoutError):
        future.result(0.01)
    gate.open()
    assert pool.wait_for_task_result(future.task_id, WATCHDOG_S) in pool.worker_pids


def test_a_failed_result_by_id_raises(pool: Coordinator, file: Path) -> None:
    future = pool.submit_file_task(tasks.fail, file, params={"how": "value"})
    with pytest.raises(ValueError, match="no good"):
        pool.wait_for_task_result(future.task_id, WATCHDOG_S)


@pytest.mark.parametrize("task_id", [0, -1, 10**12])
def test_an_id_that_was_never_given_is_unknown(pool: Coordinator, task_id: int) -> None:
    with pytest.raises(KeyError):
        pool.wait_for_task_result(task_id)


def test_of_unread_results_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringpool.coordinator.futures.UNREAD_MAX", 3)
    board = TaskBoard()
    futures = [TaskFuture(i, None, board) for i in range(5)]  # type: ignore[arg-type]
    for future in futures:
        board.add(future)
        board.arrived(future)
    assert [board.find(i) for i in range(5)] == [None, None, *futures[2:]]


# ---- futures ---------------------------------------------------------------------------------------------------------


def test_wait_and_as_completed_work(pool: Coordinator, files: MakeFiles) -> None:
    futures = [pool.submit_file_task(tasks.name, path) for path in files(50)]
    assert {future.result() for future in as_completed(futures[:25], WATCHDOG_S)} == {f"{i:05}" for i in range(25)}
    assert wait(futures, WATCHDOG_S).not_done == set()


def test_a_callback_may_submit(pool: Coordinator, file: Path) -> None:
    done = threading.Event()
    seen: list[int] = []

    def again(future: Any) -> None:
        seen.append(future.result())
        if len(seen) < 20:
            pool.submit_file_task(tasks.size, file).add_done_callback(again)
        else:
            done.set()

    pool.submit_file_task(tasks.size, file).add_done_callback(again)
    assert done.wait(WATCHDOG_S)
    assert seen == [5] * 20


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_callback_that_raises_harms_nobody(
    pool: Coordinator, file: Path, gate: Gate, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def bad(_future: object) -> None:
        raise error

    held = gate.hold(pool, file)
    held.add_done_callback(bad)
    gate.open()
    assert held.result(WATCHDOG_S) in pool.worker_pids
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5


def test_many_threads_may_submit_and_run(pool: Coordinator, file: Path) -> None:
    found: list[int] = []

    def use() -> None:
        futures = [pool.submit_file_task(tasks.size, file) for _ in range(50)]
        found.extend(r.unwrap() for r in pool.run_file_tasks(tasks.size, [file] * 50, window=7))
        found.extend(future.result(WATCHDOG_S) for future in futures)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert found == [5] * 600


def test_a_running_task_says_so(pool: Coordinator, file: Path, gate: Gate) -> None:
    held = gate.hold(pool, file)
    assert held.running()
    assert not held.done()
    gate.open()
    held.result(WATCHDOG_S)
    assert not held.running()


# ---- cancelling ------------------------------------------------------------------------------------------------------


def test_a_task_that_has_not_begun_can_be_cancelled_and_never_runs(
    pool: Coordinator, file: Path, files: MakeFiles, gate: Gate
) -> None:
    held = gate.hold_all(pool, file)
    [other] = files(1)
    waiting = [pool.submit_file_task(tasks.append_line, other) for _ in range(10)]
    assert all(future.cancel() for future in waiting)
    assert all(future.cancelled() and future.done() for future in waiting)
    assert wait(waiting, WATCHDOG_S).not_done == set()
    assert len(list(as_completed(waiting, WATCHDOG_S))) == 10
    with pytest.raises(CancelledError):
        waiting[0].result()
    with pytest.raises(CancelledError):
        pool.wait_for_task_result(waiting[1].task_id)
    gate.open()
    wait(held, WATCHDOG_S)
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5
    assert other.read_text() == "00000", "none was run"


def test_waiters_are_told_of_a_cancelled_task(pool: Coordinator, file: Path, gate: Gate) -> None:
    gate.hold_all(pool, file)
    future = pool.submit_file_task(tasks.size, file)
    told = threading.Event()
    future.add_done_callback(lambda _: told.set())
    waiter = threading.Thread(target=lambda: wait([future], WATCHDOG_S))
    waiter.start()
    assert future.cancel()
    waiter.join(WATCHDOG_S)
    assert told.is_set()
    assert not waiter.is_alive()


def test_a_running_or_finished_task_cannot_be_cancelled(pool: Coordinator, file: Path, gate: Gate) -> None:
    held = gate.hold(pool, file)
    assert not held.cancel()
    gate.open()
    assert held.result(WATCHDOG_S) in pool.worker_pids
    assert not held.cancel()


def test_a_task_beyond_the_ring_can_be_cancelled(file: Path, gate: Gate) -> None:
    with Coordinator(1, ring_slots=2) as small:
        held = gate.hold(small, file)
        waiting = [small.submit_file_task(tasks.size, file) for _ in range(10)]
        assert all(future.cancel() for future in waiting[::2])
        gate.open()
        assert [future.result(WATCHDOG_S) for future in waiting[1::2]] == [5] * 5
        held.result(WATCHDOG_S)


def test_a_cancel_from_a_callback_works(pool: Coordinator, file: Path, gate: Gate) -> None:
    first, second = gate.hold_all(pool, file)
    later = [pool.submit_file_task(tasks.size, file) for _ in range(5)]
    cancelled: list[bool] = []
    done = threading.Event()

    def cancel_rest(_future: object) -> None:
        cancelled.extend(future.cancel() for future in later)
        done.set()

    first.add_done_callback(cancel_rest)
    gate.open()
    assert done.wait(WATCHDOG_S)
    wait([second, *later], WATCHDOG_S)
    assert cancelled == [future.cancelled() for future in later]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_gives_each_input_its_result(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(3000)
    results = list(pool.run_file_tasks(tasks.name, paths))
    assert sorted((r.path, r.value) for r in results) == [(path, path.name) for path in paths]
    assert {(r.ok, r.attempts, r.output) for r in results} == {(True, 1, None)}
    assert {r.worker for r in results} <= {0, 1}
    assert all(r.duration_s >= 0 for r in results)


def test_paths_of_every_kind_come_back_as_they_were_given(pool: Coordinator, file: Path) -> None:
    given = [file, str(file), os.fsencode(file), FileTask(file)]
    assert [r.path for r in pool.run_file_tasks(tasks.size, given, window=1)] == [file, str(file), given[2], file]


@pytest.mark.parametrize("window", [None, 1, 10_000])
def test_an_empty_run_is_empty(pool: Coordinator, window: int | None) -> None:
    assert list(pool.run_file_tasks(tasks.size, [], window=window)) == []
    assert list(pool.run_file_tasks(tasks.size, iter(()), window=window)) == []


@pytest.mark.parametrize("window", [1, 2, 7, 100])
def test_inputs_are_drawn_at_most_a_window_ahead(pool: Coordinator, file: Path, window: int) -> None:
    drawn = 0

    def inputs() -> Iterator[Path]:
        nonlocal drawn
        for _ in range(300):
            drawn += 1
            yield file

    run = pool.run_file_tasks(tasks.size, inputs(), window=window)
    assert drawn == 0, "nothing is drawn before a result is wanted"
    for taken, result in enumerate(run):
        assert result.ok
        assert drawn <= taken + window
    assert drawn == 300


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(pool: Coordinator, file: Path, window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        pool.run_file_tasks(tasks.size, [file], window=window)


def test_a_run_over_infinite_inputs_can_be_left(pool: Coordinator, file: Path) -> None:
    run = pool.run_file_tasks(tasks.size, itertools.repeat(file))
    assert [result.value for result in itertools.islice(run, 2000)] == [5] * 2000
    del run
    gc.collect()
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5
    wait_until(lambda: pool.stats().in_ring == 0, "an empty ring")


def test_leaving_a_run_cancels_what_has_not_begun(pool: Coordinator, file: Path, files: MakeFiles, gate: Gate) -> None:
    [other] = files(1)
    held = gate.hold(pool, file)  # one of two workers
    run = pool.run_file_tasks(tasks.append_line, itertools.chain([other], itertools.repeat(other)), window=500)
    assert next(run).ok
    gate.hold(pool, file)  # now both
    run.close()
    assert list(run) == []
    before = other.read_text().count("run")
    gate.open()
    held.result(WATCHDOG_S)
    wait_until(lambda: pool.stats().in_ring == 0, "an empty ring")
    assert other.read_text().count("run") == before


def test_results_that_nobody_takes_are_freed(pool: Coordinator, file: Path) -> None:
    run = pool.run_file_tasks(tasks.many_bytes, itertools.repeat(file), params={"n": 100_000}, window=20)
    next(run)
    del run
    gc.collect()
    wait_until(lambda: pool.stats().in_ring == 0, "an empty ring")


def test_an_error_of_the_inputs_is_raised_after_the_results_before_it(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(10)

    def inputs() -> Iterator[Path]:
        yield from paths
        raise LookupError("no more")

    run = pool.run_file_tasks(tasks.name, inputs())
    assert sorted(next(run).value for _ in paths) == [path.name for path in paths]
    with pytest.raises(LookupError, match="no more"):
        next(run)
    assert list(run) == []


def test_an_input_that_blocks_does_not_hold_up_those_before_it(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(3)
    drawn = threading.Event()

    def inputs() -> Iterator[Path]:
        yield from paths
        wait_until(lambda: all("run" in path.read_text() for path in paths), "the run of what was drawn")
        drawn.set()

    assert len(list(pool.run_file_tasks(tasks.append_line, inputs()))) == 3
    assert drawn.is_set()


def test_results_come_while_inputs_are_slow(pool: Coordinator, file: Path) -> None:
    """The second input is made only when the first has its result."""
    before = pool.stats().completed

    def inputs() -> Iterator[Path]:
        for i in range(5):
            yield file
            wait_until(lambda n=i: pool.stats().completed > before + n, "the result of the last input")

    assert [r.value for r in pool.run_file_tasks(tasks.size, inputs())] == [5] * 5


def test_inputs_may_be_made_of_results_with_a_window_of_one(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(5)
    waiting = [paths[0]]

    def inputs() -> Iterator[Path]:
        while waiting:
            yield waiting.pop()

    names: list[str] = []
    for result in pool.run_file_tasks(tasks.name, inputs(), window=1):
        names.append(result.value)
        if len(names) < len(paths):
            waiting.append(paths[len(names)])
    assert names == [path.name for path in paths]


def test_two_runs_may_be_taken_by_turns(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(100)
    runs = [pool.run_file_tasks(tasks.name, paths, window=5) for _ in range(3)]
    taken = [result.value for results in zip(*runs, strict=True) for result in results]
    assert sorted(taken) == sorted([path.name for path in paths] * 3)


def test_a_run_may_start_another_for_each_of_its_results(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(10)
    inner = 0
    for _ in pool.run_file_tasks(tasks.size, paths):
        inner += sum(1 for _ in pool.run_file_tasks(tasks.size, paths))
    assert inner == 100


def test_shared_parameters_go_with_their_run(pool: Coordinator, file: Path) -> None:
    before = shared_memory_of(os.getpid())
    numbers = np.arange(100_000)
    for _ in range(3):
        results = list(pool.run_file_tasks(tasks.total, [file] * 20, params={"numbers": numbers}))
        assert {r.value for r in results} == {int(numbers.sum())}
    wait_until(lambda: not shared_memory_of(os.getpid()) - before, "the end of the parameters")


# ---- one long task among short ones ----------------------------------------------------------------------------------


def test_short_tasks_do_not_wait_for_a_long_one(pool: Coordinator, file: Path, files: MakeFiles, gate: Gate) -> None:
    """The long one is claimed together with short ones, and ends only when all of these have ended."""
    paths = files(2000)
    assert all(r.ok for r in pool.run_file_tasks(tasks.size, paths)), "they are short: workers claim many at once"
    begun = str(gate.path) + ".begun"
    half = len(paths) // 2
    futures = [pool.submit_file_task(tasks.size, path) for path in paths[:half]]
    long = pool.submit_file_task(tasks.hold, file, params={"gate": str(gate.path), "begun": begun})
    futures += [pool.submit_file_task(tasks.size, path) for path in paths[half:]]
    assert wait(futures, WATCHDOG_S).not_done == set()
    assert not long.done()
    gate.open()
    assert long.result(WATCHDOG_S) in pool.worker_pids


# ---- several pools, several processes --------------------------------------------------------------------------------


def test_two_pools_live_side_by_side(pool: Coordinator, file: Path) -> None:
    with Coordinator(1) as other:
        assert set(other.worker_pids).isdisjoint(pool.worker_pids)
        assert other.submit_file_task(tasks.process_id, file).result(WATCHDOG_S) in other.worker_pids
        assert pool.submit_file_task(tasks.process_id, file).result(WATCHDOG_S) in pool.worker_pids
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5


def test_a_coordinator_may_be_made_and_closed_in_a_thread(file: Path) -> None:
    found: list[int] = []

    def use() -> None:
        with Coordinator(1) as own:
            found.append(own.submit_file_task(tasks.size, file).result(WATCHDOG_S))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(WATCHDOG_S)
    assert found == [5]


def test_a_coordinator_outlives_the_thread_that_made_it(file: Path) -> None:
    made: list[Coordinator] = []
    thread = threading.Thread(target=lambda: made.append(Coordinator(1)))
    thread.start()
    thread.join(WATCHDOG_S)
    with made[0] as own:
        assert [r.value for r in own.run_file_tasks(tasks.size, [file] * 50)] == [5] * 50


def in_a_fork(body: Callable[[], None]) -> None:
    """Run ``body`` in a fork of this process; fails where it raises."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a program with threads, from 3.12 on
def test_a_fork_cannot_use_its_parents_coordinator_nor_harm_it(pool: Coordinator, file: Path) -> None:
    def body() -> None:
        for use in (
            lambda: pool.submit_file_task(tasks.size, file),
            lambda: pool.run_file_tasks(tasks.size, [file]),
        ):
            with pytest.raises(WrongProcessError):
                use()
        pool.close()

    in_a_fork(body)
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_that_drops_a_run_takes_nothing_from_its_parent(pool: Coordinator, file: Path) -> None:
    run = pool.run_file_tasks(tasks.many_bytes, [file] * 20, params={"n": 5000})
    before = pool.stats().completed
    results = [next(run)]
    wait_until(lambda: pool.stats().completed >= before + 19, "the results")

    def body() -> None:
        run.__del__()

    in_a_fork(body)
    results += run
    assert [len(r.unwrap()) for r in results] == [5000] * 20


# ---- a closed coordinator --------------------------------------------------------------------------------------------


def test_a_closed_coordinator_refuses_tasks(file: Path) -> None:
    own = Coordinator(1)
    future = own.submit_file_task(tasks.size, file)
    own.close()
    own.close()
    assert future.result() == 5
    with pytest.raises(CoordinatorClosedError):
        own.submit_file_task(tasks.size, file)
    with pytest.raises(CoordinatorClosedError):
        own.run_file_tasks(tasks.size, [file])
    assert own.worker_pids == ()
    assert own.stats().workers_alive == 0


def test_outputs_obey_the_umask_of_the_program_when_the_pool_was_made(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("x")
    modes: list[int] = []
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            with Coordinator(workers=1, durability="atomic") as pool:
                output = tmp_path / f"{mask:o}"
                pool.submit_file_task(tasks.copy, tmp_path / "in", output).result(WATCHDOG_S)
        finally:
            os.umask(before)
        modes.append(output.stat().st_mode & 0o777)
    assert modes == [0o644, 0o600]

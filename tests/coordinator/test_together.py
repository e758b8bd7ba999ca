"""Short file tasks go together, and it shows nowhere: what one of them is, does or leaves is its own affair."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from tests import task_functions as tasks
from tests.coordinator.program import WATCHDOG_S, Program, shared_memory_of, wait_until

from ringpool import Coordinator, FileResult, FileTask
from ringpool.coordinator import pool as pool_module
from ringpool.coordinator.filerun import TOGETHER_PATH_BYTES_MAX
from ringpool.coordinator.pool import Pool
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import (
    CoordinatorClosedError,
    RemoteError,
    ResultTransportError,
    SharedMemoryFullError,
    UnknownFunctionError,
    WorkerDiedError,
)

MakeFiles = Callable[[int], list[Path]]
MANY = 3000
ODD = 1500  # the one among many that is not like the others: by then, hundreds go together


def odd_among_many(pool: Coordinator, paths: list[Path], act: str, **more: str) -> dict[Path, FileResult]:
    return {result.path: result for result in pool.run_file_tasks(tasks.odd, paths, params={"act": act, "more": more})}


def in_a_thread(body: Callable[[], Any]) -> Any:
    """What ``body`` returns; the test fails where it never does."""
    returned: list[Any] = []
    thread = threading.Thread(target=lambda: returned.append(body()), daemon=True)
    thread.start()
    thread.join(WATCHDOG_S)
    assert returned, "it waits for ever"
    return returned[0]


@pytest.fixture
def many(files: MakeFiles) -> list[Path]:
    """Many files, one of which says that it is odd."""
    paths = files(MANY)
    paths[ODD].write_text("odd")
    return paths


def assert_others_are_well(results: dict[Path, FileResult], odd: Path) -> None:
    assert len(results) == MANY
    others = [result for path, result in results.items() if path != odd]
    assert [r for r in others if not r.ok or r.value != r.path.name or r.attempts != 1] == []


def test_short_tasks_go_together(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(MANY)
    for _ in range(20):  # a machine that is busy with other things makes a first task look long
        before = pool._pump._pace.n_results
        assert len(list(pool.run_file_tasks(tasks.size, paths))) == MANY
        if pool._pump._pace.n_results - before < MANY // 10:
            break
    else:
        pytest.fail("they went one by one")


def test_each_is_timed_by_itself(pool: Coordinator, many: list[Path]) -> None:
    began_s = time.monotonic()
    results = odd_among_many(pool, many, "sleep")
    elapsed_s = time.monotonic() - began_s
    assert_others_are_well(results, many[ODD])
    assert results[many[ODD]].duration_s >= 0.05
    assert sum(result.duration_s for result in results.values()) <= 2 * elapsed_s, (
        "two workers, one task at a time each"
    )
    assert all(result.duration_s > 0 for result in results.values())
    assert {result.worker for result in results.values()} <= {0, 1}


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        ("raise", ValueError),
        ("exit", SystemExit),
        ("interrupt", KeyboardInterrupt),
        ("return a lock", ResultTransportError),
        ("raise what is huge", ValueError),
        ("raise what cannot be pickled", RemoteError),
    ],
)
def test_what_one_raises_is_its_own(pool: Coordinator, many: list[Path], act: str, kind: type[BaseException]) -> None:
    before = pool.stats()
    results = odd_among_many(pool, many, act)
    assert_others_are_well(results, many[ODD])
    odd = results[many[ODD]]
    assert isinstance(odd.error, kind)
    assert (odd.value, odd.attempts) == (None, 1)
    if act == "raise":
        assert "raise ValueError(src.name)" in str(odd.error.__cause__)
    after = pool.stats()
    assert (after.completed - before.completed, after.failed - before.failed) == (MANY - 1, 1)


@pytest.mark.parametrize("n_bytes", [1, 1000, 60_000, 240_000, 300_000, 5_000_000])
def test_a_result_of_any_size_comes_back(pool: Coordinator, many: list[Path], n_bytes: int) -> None:
    results = odd_among_many(pool, many, "return bytes", n=str(n_bytes))
    assert_others_are_well(results, many[ODD])
    assert results[many[ODD]].value == bytes(n_bytes)


@pytest.mark.parametrize("how", ["memory", "exit"])
def test_one_that_cannot_be_rebuilt_costs_nobody_a_result(pool: Coordinator, many: list[Path], how: str) -> None:
    results = odd_among_many(pool, many, "return what is rebuilt", how=how)
    assert_others_are_well(results, many[ODD])
    assert isinstance(results[many[ODD]].error, ResultTransportError)


def test_a_signal_that_ends_the_program_is_no_result(run_program: Callable[..., Program]) -> None:
    """It comes while one among many results is rebuilt."""
    body = """
        paths = [Path(f"{i:04}") for i in range(3000)]
        for path in paths:
            path.write_text("odd" if path.name == "1500" else "")
        parameters = {"act": "return what is rebuilt", "more": {"how": "terminated"}}
        with Coordinator(2) as c:
            for result in c.run_file_tasks(tasks.odd, paths, params=parameters):
                assert result.ok, result
        say("never")
        """
    program = run_program(body)
    assert program.finish() == 128 + signal.SIGTERM, program.err
    assert "never" not in program.out
    program.assert_nothing_is_left()


@pytest.mark.parametrize(("function", "n"), [(tasks.many_bytes, 280_000), (tasks.ramp, 10_000)])
def test_results_that_would_each_end_a_vector_go_one_by_one(
    pool: Coordinator, files: MakeFiles, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], n: int
) -> None:
    """What is left of a vector is sent again: that costs more than each of them for itself."""
    vectors: list[object] = []
    publisher = pool._pump.publisher
    place = publisher._place
    monkeypatch.setattr(publisher, "_place", lambda ticket: vectors.append(ticket) or place(ticket))
    assert all(result.ok for result in pool.run_file_tasks(function, files(200), params={"n": n}))
    assert len(vectors) < 20


@pytest.mark.parametrize("act", ["chdir", "ignore signals", "set a timer"])
def test_what_one_does_to_its_process_is_over_before_the_next(pool: Coordinator, many: list[Path], act: str) -> None:
    before = pool.stats().worker_deaths
    results = {r.path: r for r in pool.run_file_tasks(tasks.surroundings, many, params={"act": act})}
    assert len({result.unwrap() for path, result in results.items() if path != many[ODD]}) == 1
    assert pool.stats().worker_deaths == before


def test_one_that_closes_all_descriptors_costs_nobody_anything(pool: Coordinator, many: list[Path]) -> None:
    results = odd_among_many(pool, many, "close descriptors")
    assert_others_are_well(results, many[ODD])
    assert results[many[ODD]].ok


def test_an_interrupt_between_two_of_them_costs_one(files: MakeFiles) -> None:
    paths = files(500)
    with Coordinator(1) as own:
        for _ in range(20):  # a machine that is busy with other things makes them look long, and they go one by one
            results = list(own.run_file_tasks(tasks.interrupted_later, paths))
            if not all(result.ok for result in results):
                break
    assert len({result.path for result in results}) == 500
    assert [type(result.error) for result in results if not result.ok] == [KeyboardInterrupt]


@pytest.mark.parametrize("how", ["kill", "exit at once"])
def test_one_that_kills_its_workers_is_tried_again_and_blamed_alone(
    pool: Coordinator, many: list[Path], how: str
) -> None:
    before = pool.stats()
    results = odd_among_many(pool, many, how)
    assert_others_are_well(results, many[ODD])
    odd = results[many[ODD]]
    assert isinstance(odd.error, WorkerDiedError)
    assert (odd.attempts, odd.error.deaths) == (3, 3)
    assert str(many[ODD]) in str(odd.error)
    assert pickle.loads(pickle.dumps(odd.error)).task == odd.error.task
    after = pool.stats()
    assert after.worker_deaths == before.worker_deaths + 3
    assert after.retried == before.retried + 2
    assert (after.completed - before.completed, after.failed - before.failed) == (MANY - 1, 1)


def test_one_that_kills_its_worker_once_has_two_attempts(pool: Coordinator, many: list[Path], tmp_path: Path) -> None:
    results = odd_among_many(pool, many, "kill once", mark=str(tmp_path / "mark"))
    assert_others_are_well(results, many[ODD])
    odd = results[many[ODD]]
    assert (odd.value, odd.attempts) == (many[ODD].name, 2)


def test_nobody_waits_for_a_slow_one(pool: Coordinator, many: list[Path], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    paths = set(many)
    for result in pool.run_file_tasks(tasks.odd, many, params={"act": "wait", "more": {"gate": str(gate)}}):
        paths.remove(result.path)
        if paths == {many[ODD]}:  # all others have come
            gate.touch()
    assert not paths


def test_nobody_waits_for_a_slow_one_while_more_come(pool: Coordinator, many: list[Path], tmp_path: Path) -> None:
    """So that the other worker is never idle."""
    gate, behind, in_time = tmp_path / "gate", set(many[ODD + 1 :]), []

    def inputs() -> Iterator[Path]:
        yield from many
        end_s = time.monotonic() + WATCHDOG_S / 2
        while behind and time.monotonic() < end_s:
            yield many[0]
        in_time.append(not behind)

    for result in pool.run_file_tasks(tasks.odd, inputs(), params={"act": "wait", "more": {"gate": str(gate)}}):
        behind.discard(result.path)
        if not behind:  # as good as at once, or when no more come
            gate.touch()
    assert in_time == [True]


def test_a_worker_has_the_parameters_of_a_run_once(pool: Coordinator, files: MakeFiles) -> None:
    """Whether its files go one by one or together; and those of few runs that are over."""
    paths = files(200)
    for run in range(40):
        parameters = {"counted": tasks.Counted(), "run": run}
        results = list(pool.run_file_tasks(tasks.instances, paths, params=parameters))
    assert max(result.unwrap() for result in results) <= 33


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_an_input_that_blocks_does_not_hold_up_those_before_it(pool: Coordinator, files: MakeFiles) -> None:
    """At any place in a long run, between any two inputs."""
    paths = files(2000)
    n_run = 0

    def inputs() -> Iterator[Path]:
        for i, path in enumerate(paths):
            yield path
            if i % 333 == 300:
                so_far = paths[: i + 1]
                wait_until(lambda some=so_far: all("run" in each.read_text() for each in some), "what was drawn")

    for result in pool.run_file_tasks(tasks.append_line, inputs()):
        assert result.ok
        n_run += 1
    assert n_run == len(paths)
    assert {path.read_text() for path in paths} == {f"{path.name}run\n" for path in paths}, "each was run once"


def test_results_that_are_there_do_not_wait_for_the_next_input(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(600)
    taken = threading.Event()

    def inputs() -> Iterator[Path]:
        yield from paths[:-1]
        assert taken.wait(WATCHDOG_S), "the results were not given out"
        yield paths[-1]

    results = pool.run_file_tasks(tasks.size, inputs(), window=300)
    n = 0
    for result in results:
        assert result.ok
        n += 1
        if n == 300:
            taken.set()
    assert n == len(paths)


@pytest.mark.parametrize("n", [3, 500])
def test_what_the_inputs_raise_leaves_those_before_it(pool: Coordinator, files: MakeFiles, n: int) -> None:
    """Whatever it is: a ``CancelledError`` of asyncio, or what ends a test, is no ``Exception``."""
    paths = files(n)

    class LeaveError(BaseException):
        pass

    def inputs() -> Iterator[Path]:
        yield from paths
        raise LeaveError

    run = pool.run_file_tasks(tasks.size, inputs(), window=2000)
    results: list[FileResult] = []
    with pytest.raises(LeaveError):
        results.extend(run)
    results += in_a_thread(lambda: list(run))
    assert sorted(result.path for result in results) == paths


@pytest.mark.parametrize("where", ["inputs", "results"])
def test_a_run_that_another_thread_closes_is_at_its_end(
    pool: Coordinator, files: MakeFiles, tmp_path: Path, where: str
) -> None:
    paths, gate, drawing, go_on = files(500), tmp_path / "gate", threading.Event(), threading.Event()
    n_drawn = 0

    def inputs() -> Iterator[Path]:
        nonlocal n_drawn
        for path in itertools.cycle(paths):
            if where == "inputs" and n_drawn == 5:
                drawing.set()
                assert go_on.wait(WATCHDOG_S)
            n_drawn += 1
            yield path

    run = pool.run_file_tasks(tasks.wait_for_gate, inputs(), params={"gate": str(gate)})
    taken: list[FileResult] = []
    taker = threading.Thread(target=lambda: taken.extend(run), daemon=True)
    taker.start()
    wait_until(lambda: drawing.is_set() or (where == "results" and sum(pool.stats()[1:3]) == 6), "a taker that waits")
    run.close()
    go_on.set()
    taker.join(WATCHDOG_S)
    gate.touch()
    assert not taker.is_alive()
    assert taken == []
    assert n_drawn <= 6
    wait_until(lambda: pool.stats()[1:3] == (0, 0), "what ran")


def test_inputs_that_take_results_are_told_and_keep_nobody_waiting(pool: Coordinator, files: MakeFiles) -> None:
    """What one may not do: an iterator cannot be drawn from while it is drawn from."""
    paths = files(100)

    def inputs() -> Iterator[Path]:
        for i, path in enumerate(paths):
            if i == 50:
                next(run)
            yield path

    run = pool.run_file_tasks(tasks.size, inputs())
    taken: list[FileResult] = []

    def take() -> type[BaseException] | None:
        try:
            taken.extend(run)
        except BaseException as error:
            return type(error)
        return None

    assert in_a_thread(take) is ValueError
    assert len(taken) >= 49


def test_outputs_and_none_may_take_turns(pool: Coordinator, files: MakeFiles, tmp_path: Path) -> None:
    paths = files(1000)
    out = tmp_path / "out"
    inputs = [FileTask(path, out / path.name) if i % 5 == 0 else path for i, path in enumerate(paths)]
    results = {r.path: r for r in pool.run_file_tasks(tasks.copy_or_size, inputs)}
    assert len(results) == len(paths)
    for i, path in enumerate(paths):
        assert results[path].ok
        assert results[path].output == (out / path.name if i % 5 == 0 else None)
    assert len(list(out.glob("0*"))) == 200


def test_paths_of_all_kinds_and_lengths(pool: Coordinator, tmp_path: Path) -> None:
    """Those that are longer than the kernel takes are errors of their own."""
    longest = TOGETHER_PATH_BYTES_MAX
    paths = [str(tmp_path / f"{i}{'x' * (i % 200)}") for i in range(500)]
    paths += ["/" + "y" * n for n in (longest - 2, longest - 1, longest, 100_000)]
    paths += [os.fsdecode(b"/\xff\xfe"), "/" + "\N{SNOWMAN}" * 80]
    given = [*paths, *map(os.fsencode, paths), *map(Path, paths)] * 3
    results = list(pool.run_file_tasks(tasks.text, given))
    assert sorted(map(repr, (r.path for r in results))) == sorted(map(repr, given))
    assert [r for r in results if not r.ok or r.value != os.fsdecode(r.path)] == []


def test_an_input_that_is_no_path_is_the_end_after_the_results_before_it(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(1000)
    run = pool.run_file_tasks(tasks.size, itertools.chain(paths, [3]))  # type: ignore[list-item]
    assert sum(1 for _ in itertools.islice(run, 1000)) == 1000
    with pytest.raises(TypeError, match="int"):
        next(run)
    assert list(run) == []


def test_a_function_that_a_worker_cannot_have_is_the_error_of_each(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module was there when the run began."""
    module = tmp_path / "fleeting.py"
    module.write_text("import os\n\ndef name(src):\n    return os.getpid()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Coordinator(1) as own:
        run = own.run_file_tasks("fleeting:name", [file] * 500)
        first = next(run)
        assert first.ok
        os.kill(first.value, signal.SIGKILL)
        module.unlink()
        for cached in (tmp_path / "__pycache__").glob("*"):
            cached.unlink()
        errors = [result.error for result in run if not result.ok]
        assert all(isinstance(error, UnknownFunctionError) for error in errors)
        list(own.run_file_tasks(tasks.size, [file] * 500))


# ---- the pool --------------------------------------------------------------------------------------------------------


def test_one_by_one_means_one_by_one(files: MakeFiles) -> None:
    with Coordinator(2, claims_max=1) as own:
        assert sum(result.ok for result in own.run_file_tasks(tasks.size, files(1000))) == 1000
        assert own._pump._pace.n_results == 1000
        assert own._pump.publisher.arena is None


def test_without_room_for_vectors_each_goes_by_itself(files: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(pool: Pool) -> None:
        raise SharedMemoryFullError(pool.name, "no room")

    monkeypatch.setattr(Pool, "make_arena", full)
    with Coordinator(2) as own:
        assert sum(result.ok for result in own.run_file_tasks(tasks.size, files(1000))) == 1000


def test_ctrl_c_while_the_arena_is_made_spoils_no_later_run(files: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, fallocate, pressed = files(1000), os.posix_fallocate, []

    def press(*arguments: int) -> None:
        fallocate(*arguments)
        if not pressed and arguments[2] >= 1 << 20:
            pressed.append(True)
            raise KeyboardInterrupt

    with Coordinator(2) as own:
        monkeypatch.setattr(os, "posix_fallocate", press)
        for _ in range(20):  # a machine that is busy with other things makes them look long
            with contextlib.suppress(KeyboardInterrupt):
                list(own.run_file_tasks(tasks.size, paths))
            if pressed:
                break
        assert pressed
        assert sum(result.ok for result in own.run_file_tasks(tasks.size, paths)) == 1000


def test_results_that_are_there_do_not_wait_for_the_next_output(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(40)
    are_there: list[bool] = []

    def output(_: Path) -> None:
        are_there.append(bool(run._ready))

    run = pool.run_file_tasks(tasks.copy_or_size, paths, output=output, window=20)
    for _ in run:
        wait_until(lambda: pool.stats()[1:3] == (0, 0), "all that were drawn")
    assert len(are_there) == 40
    assert not any(are_there)


def test_statistics_count_files(pool: Coordinator, many: list[Path], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    before = pool.stats()
    run = pool.run_file_tasks(tasks.wait_for_gate, many, params={"gate": str(gate)})
    taker = threading.Thread(target=lambda: list(run))
    gate.touch()
    assert next(run).ok
    gate.unlink()
    taker.start()
    wait_until(lambda: sum(pool.stats()[1:3]) > 0, "files under way")
    gate.touch()
    taker.join(WATCHDOG_S)
    after = pool.stats()
    assert after.completed - before.completed == MANY
    assert (after.queued, after.in_ring) == (0, 0)


def test_statistics_count_what_a_run_that_was_left_has_run(pool: Coordinator, many: list[Path]) -> None:
    list(pool.run_file_tasks(tasks.append_line, many))
    before = pool.stats()
    run = pool.run_file_tasks(tasks.append_line, many)
    for _ in itertools.islice(run, MANY // 2):
        pass
    run.close()
    wait_until(lambda: pool.stats()[1:3] == (0, 0), "what runs")
    n_run = sum(path.read_text().count("run") for path in many) - MANY
    after = pool.stats()
    assert (after.completed - before.completed, after.failed - before.failed) == (n_run, 0)


def test_statistics_tell_files_that_are_done_from_those_that_are_not(
    pool: Coordinator, many: list[Path], tmp_path: Path
) -> None:
    """Also in a vector whose worker is at a slow one."""
    gate, before = tmp_path / "gate", pool.stats()
    parameters = {"act": "wait", "more": {"gate": str(gate)}}
    results = pool.run_file_tasks(tasks.odd, many, params=parameters)
    for _ in itertools.islice(results, MANY - 1):
        pass
    wait_until(lambda: pool.stats()[1:4] == (0, 1, before.completed + MANY - 1), "all but one")
    gate.touch()
    assert next(results).path == many[ODD]


def test_what_was_not_begun_has_not_failed(files: MakeFiles) -> None:
    own = Coordinator(2)
    run = own.run_file_tasks(tasks.size, files(20_000))
    results = list(itertools.islice(run, 500))
    own.close(cancel=True)
    with pytest.raises(CoordinatorClosedError):
        results.extend(run)
    n_cancelled = sum(isinstance(result.error, CancelledError) for result in results)
    after = own.stats()
    assert after.failed == 0
    assert after.completed >= len(results) - n_cancelled, "some may come after the pool's end is told"


def test_files_behind_the_one_that_runs_are_not_begun_where_the_pool_cancels(many: list[Path], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    own = Coordinator(1)
    more = many[:ODD] * 8  # than are drawn ahead
    run = own.run_file_tasks(tasks.odd, many + more, params={"act": "wait", "more": {"gate": str(gate)}})
    assert all(result.ok for result in itertools.islice(run, ODD))
    closing = threading.Thread(target=own.close, kwargs={"cancel": True})
    try:
        closing.start()
        wait_until(lambda: own._pump._cancels_all, "the cancel")
        own._pump.call(lambda: None)
    finally:
        gate.touch()
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()
    assert own.stats().completed == ODD + 1
    found: list[FileResult] = []
    with pytest.raises(CoordinatorClosedError):
        found.extend(run)
    assert {type(result.error) for result in found if not result.ok} <= {CancelledError}
    assert list(run) == []


def test_a_pool_that_is_closed_gives_what_it_has(files: MakeFiles) -> None:
    own = Coordinator(2)
    run = own.run_file_tasks(tasks.size, itertools.cycle(files(100)), window=1000)
    assert all(result.ok for result in itertools.islice(run, 500))
    own.close()
    rest: list[FileResult] = []
    with pytest.raises(CoordinatorClosedError):
        rest.extend(run)
    assert len(rest) <= 1000
    assert all(result.ok for result in rest)


def test_what_comes_back_is_never_out_of_sight(files: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a pool that closes waits for it: it is queued again before it has left the ring."""
    with Coordinator(1) as own:
        publisher, seen = own._pump.publisher, []
        requeue = publisher.requeue

        def watched(tickets: list[Ticket]) -> None:
            if tickets:
                others = sum(ticket is not None for ticket in publisher.tickets)
                seen.append(publisher.in_ring > others)
            requeue(tickets)

        monkeypatch.setattr(publisher, "requeue", watched)
        paths = files(1000)
        for path in paths[100::100]:
            path.write_text("odd")
        parameters = {"act": "return bytes", "more": {"n": "300000"}}  # with which a vector ends
        for _ in range(20):  # on a busy machine, they may look so long that they go one by one
            assert all(result.ok for result in own.run_file_tasks(tasks.odd, paths, params=parameters))
            if seen:
                break
    assert seen
    assert all(seen)


def test_the_pump_does_not_sleep_on_free_chunks(files: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that wait for a chunk are sent as soon as there is one again."""
    monkeypatch.setattr(pool_module, "CHUNKS_PER_WORKER", 1)
    monkeypatch.setattr(pool_module, "CHUNKS_MORE", 1)
    paths = files(1000)
    with Coordinator(2) as own:
        pump, publisher = own._pump, own._pump.publisher
        was_out_of_chunks, sleeps_on = [], []
        take, wait = publisher._take, pump.end.wait

        def watched_take(*arguments: Any) -> Any:
            taken = take(*arguments)
            was_out_of_chunks.append(publisher._out_of_chunks)
            return taken

        def watched_wait(*arguments: Any) -> None:
            sleeps_on.append(publisher._out_of_chunks and publisher.arena is not None and bool(publisher.arena._free))
            wait(*arguments)

        monkeypatch.setattr(publisher, "_take", watched_take)
        monkeypatch.setattr(pump.end, "wait", watched_wait)
        for _ in range(20):  # on a busy machine, they may look so long that they go one by one
            assert all(result.ok for result in own.run_file_tasks(tasks.nap, paths, params={"seconds": 0.0005}))
            if any(was_out_of_chunks):
                break
    assert any(was_out_of_chunks)
    assert not any(sleeps_on)


def test_a_pool_whose_end_drops_all_is_one_error(files: MakeFiles) -> None:
    own = Coordinator(2)
    run = own.run_file_tasks(tasks.size, files(20_000))
    assert next(run).ok
    own.close(cancel=True)
    with pytest.raises(CoordinatorClosedError):
        list(run)
    assert list(run) == []


def test_what_was_left_is_freed(pool: Coordinator, files: MakeFiles) -> None:
    """Runs that are left at any moment leave no chunk held, no blob but spare ones, no function."""
    paths = files(2000)
    before = shared_memory_of(os.getpid())
    for n in (1, 5, 50, 500, 1500):
        run = pool.run_file_tasks(tasks.many_bytes, paths, params={"n": 3000})
        for _ in itertools.islice(run, n):
            pass
        del run
    arena = pool._pump.publisher.arena
    assert arena is not None
    wait_until(lambda: pool.stats().in_ring == 0 and len(arena._free) == arena._n_reserved, "all chunks")
    stays = re.compile(r"\.(v|s\d+(\.\d+)?)$")
    wait_until(lambda: not [name for name in shared_memory_of(os.getpid()) - before if not stays.search(name)], "")


def test_runs_in_many_threads_do_not_mix(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(3000)
    wrong: list[object] = []

    def use(some: list[Path]) -> None:
        found = sorted((r.path, r.value) for r in pool.run_file_tasks(tasks.name, some))
        if found != [(path, path.name) for path in some]:
            wrong.append(found)

    threads = [threading.Thread(target=use, args=(paths[i::5],)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert not wrong

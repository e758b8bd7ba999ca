"""A fork of a program has its runs and futures before it, as memory: they are its parent's all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.coordinator.program import Program

RunProgram = Callable[..., Program]
TOP = """
from ringpool import RingPoolExecutor
from tests.coordinator import call_functions as functions

def in_a_fork(what):
    \"\"\"The exit status of a fork that does that, and ends within 20 s.\"\"\"
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            what()
        except WrongProcessError:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def rest_of(run):
    for _ in run:
        pass
"""
RUNS = {
    "map of a list": "pool.map(functions.slowly, list(range(300)))",
    "map of a generator": "pool.map(functions.slowly, (i for i in range(300)))",
    "map of what takes a blob": "pool.map(len, (bytes(50_000 + i) for i in range(300)))",
    "map with a buffer": "pool.map(functions.slowly, range(300), buffersize=20)",
    "files of a list": "own.run_file_tasks(tasks.size, [__file__] * 3000)",
    "files of a generator": "own.run_file_tasks(tasks.size, (__file__ for _ in range(3000)))",
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_fork_cannot_take_a_run_of_its_parents(run_program: RunProgram, run: str) -> None:
    """Neither what comes, nor by drawing items, whose blobs would have the names of its parent's."""
    program = run_program(
        f"""
        with RingPoolExecutor(2) as pool, Coordinator(2) as own:
            expected = list({run})
            run = {run}
            found = [next(run) for _ in range(10)]
            assert in_a_fork(lambda: rest_of(run)) == 3
            found.extend(run)
            if hasattr(found[0], "unwrap"):
                found, expected = [one.unwrap() for one in found], [one.unwrap() for one in expected]
            assert found == expected
        """,
        top=TOP,
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()


@pytest.mark.parametrize("submit", ["pool.submit(functions.slowly, i)", "own.submit_file_task(tasks.size, __file__)"])
def test_what_a_fork_cancels_is_run_all_the_same(run_program: RunProgram, submit: str) -> None:
    program = run_program(
        f"""
        def cancel_all():
            assert not any(future.cancel() for future in futures)

        with RingPoolExecutor(1) as pool, Coordinator(1) as own:
            futures = [{submit} for i in range(200)]
            assert in_a_fork(cancel_all) == 0
            assert len([future.result(20) for future in futures]) == 200
        """,
        top=TOP,
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()


@pytest.mark.parametrize("is_bare", [True, False])
def test_a_fork_of_a_program_that_has_a_fork_server_has_a_pool(run_program: RunProgram, is_bare: bool) -> None:
    """The server is its parent's, and came before any pool."""
    program = run_program(
        f"""
        import multiprocessing

        def square_all():
            with RingPoolExecutor(1) as pool:
                assert list(pool.map(abs, [-1, -2])) == [1, 2]

        if __name__ == "__main__":
            own = multiprocessing.get_context("forkserver").Process(target=abs, args=(1,))
            own.start()
            own.join()
            if {is_bare}:
                assert in_a_fork(square_all) == 0
            child = multiprocessing.get_context("fork").Process(target=square_all)
            child.start()
            child.join(20)
            assert child.exitcode == 0
        """,
        top=TOP,
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_fork_does_not_wait_for_its_parents_futures(run_program: RunProgram, ask: str) -> None:
    program = run_program(
        f"""
        with RingPoolExecutor(1) as pool, Coordinator(1) as own:
            done = pool.submit(abs, -1)
            assert done.result(20) == 1
            futures = [pool.submit(functions.slowly, i) for i in range(200)]
            futures.append(own.submit_file_task(tasks.nap, __file__, params={{"seconds": 2}}))
            for future in futures[-2:]:
                assert in_a_fork(lambda: future.{ask}()) == 3
            assert in_a_fork(lambda: done.{ask}()) == 0
            assert len([future.result(20) for future in futures]) == 201
        """,
        top=TOP,
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()

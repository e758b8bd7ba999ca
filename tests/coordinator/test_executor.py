"""RingPoolExecutor, end to end: calls, maps, deaths, options."""

from __future__ import annotations

import argparse
import contextvars
import decimal
import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, cast

import pytest
from tests.coordinator import executor_functions as functions
from tests.coordinator.program import (
    ROOT,
    WATCHDOG_S,
    Program,
    kill_worker,
    shared_memory_of,
    state_of,
    wait_until,
)

from ringpool import RingPoolExecutor, TaskOptions, WorkerDiedError, WorkerExit
from ringpool.coordinator import staff
from ringpool.errors import CrashLoopError, MemoryLimitError, TaskTimeoutError
from ringpool.workers import process
from ringpool.workers.setup import has_fork_lock


@pytest.fixture(scope="module")
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as made:
        made.submit(abs, -1).result(WATCHDOG_S)
        yield made


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_a_program_that_ends_at_once_runs_what_it_submitted(run_program: Callable[..., Program], method: str) -> None:
    program = run_program(
        f"""
        pool = RingPoolExecutor(2, {method!r})
        for index in range(3):
            pool.submit(touch, f"run-{{index}}")
        globals()["kept"] = pool
        """,
        top="""
        from ringpool import RingPoolExecutor

        def touch(path):
            Path(path).touch()
        """,
    )
    assert program.finish() == 0, program.err
    assert len(list(program.file.parent.glob("run-*"))) == 3, program.err
    program.assert_nothing_is_left()


ENDS = {
    "sys.exit in its block": """
        with RingPoolExecutor(1) as pool:
            submit(pool)
            sys.exit(0)
        """,
    "a generator that nobody goes on with": """
        def running():
            with RingPoolExecutor(1) as pool:
                yield submit(pool)
        for _ in running():
            break
        """,
    "an error that was typed, not fatal": """
        import code
        code.InteractiveInterpreter().runsource("1 / 0")
        globals()["kept"] = pool = RingPoolExecutor(1)
        submit(pool)
        """,
}


@pytest.mark.parametrize("end", ENDS)
def test_an_end_that_is_no_error_runs_what_was_submitted(run_program: Callable[..., Program], end: str) -> None:
    program = run_program(
        ENDS[end],
        top="""
        import time
        from ringpool import RingPoolExecutor

        def touch(path):
            time.sleep(0.05)
            Path(path).touch()

        def submit(pool):
            for index in range(5):
                pool.submit(touch, f"run-{index}")
        """,
    )
    assert program.finish() == 0, program.err
    assert len(list(program.file.parent.glob("run-*"))) == 5, program.err
    program.assert_nothing_is_left()


TOUCH = """
import multiprocessing, shutil, tempfile, time
from ringpool import RingPoolExecutor

def touch(path):
    time.sleep(0.05)
    Path(path).touch()

def leave_a_pool(is_kept, end):
    pool = RingPoolExecutor(1)
    if is_kept:
        globals()["kept"] = pool
    for index in range(3):
        pool.submit(touch, f"run-{index}")
    if end == "error":
        raise LookupError("at the end")
    if end == "ctrl-c":
        os.kill(os.getpid(), signal.SIGINT)
        wait()
    sys.exit(3)
"""


def test_what_is_registered_for_the_end_after_a_pool_comes_after_its_tasks(
    run_program: Callable[..., Program],
) -> None:
    program = run_program(
        """
        pool = RingPoolExecutor(1)
        scratch = tempfile.mkdtemp(dir=".")
        atexit.register(shutil.rmtree, scratch)
        for index in range(3):
            future = pool.submit(touch, f"{scratch}/{index}")
            future.add_done_callback(lambda future: say("ran", future.exception()))
        """,
        top=TOUCH,
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["ran None"] * 3
    program.assert_nothing_is_left()


def test_a_thread_that_outlives_the_main_one_may_use_a_pool_of_it(run_program: Callable[..., Program]) -> None:
    program = run_program(
        """
        pool = RingPoolExecutor(1)
        pool.submit(touch, "run-0")
        def use():
            threading.main_thread().join()
            for index in range(1, 3):
                pool.submit(touch, f"run-{index}")
        threading.Thread(target=use).start()
        """,
        top=TOUCH,
    )
    assert program.finish() == 0, program.err
    assert len(list(program.file.parent.glob("run-*"))) == 3, program.err
    program.assert_nothing_is_left()


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
@pytest.mark.parametrize(
    ("is_kept", "end", "code"), [(False, "exit", 3), (True, "exit", 3), (True, "error", 1), (True, "ctrl-c", 1)]
)
def test_a_process_of_multiprocessing_ends_its_pools_as_a_program_does(
    run_program: Callable[..., Program], method: str, is_kept: bool, end: str, code: int
) -> None:
    program = run_program(
        f"""
        process = multiprocessing.get_context({method!r}).Process(target=leave_a_pool, args=({is_kept}, {end!r}))
        process.start()
        process.join()
        say("pid", process.pid)
        sys.exit(process.exitcode)
        """,
        top=TOUCH,
    )
    assert program.finish() == code, program.err
    n_run = len(list(program.file.parent.glob("run-*")))
    assert n_run == 3 if end == "exit" else n_run < 3, program.err
    assert shared_memory_of(int(program.wait_for("pid"))) == set()
    program.assert_no_process_is_left()


def test_a_pool_that_a_task_keeps_ends_with_its_worker(capfd: pytest.CaptureFixture[str]) -> None:
    with RingPoolExecutor(1) as made:
        worker = made.submit(functions.keep_a_pool).result(WATCHDOG_S)
        assert shared_memory_of(worker)
    assert shared_memory_of(worker) == set()
    assert capfd.readouterr().err == ""


def test_a_session_in_which_an_error_was_typed_runs_what_was_submitted(tmp_path: Path) -> None:
    typed = """
import pathlib, time
from ringpool import RingPoolExecutor
pool = RingPoolExecutor(1)
a_typing_error
futures = [pool.submit(time.sleep, 0.1), *(pool.submit(pathlib.Path(f"run-{index}").touch) for index in range(3))]
"""
    run = subprocess.run(
        [sys.executable, "-q", "-i"], cwd=tmp_path, input=typed, capture_output=True, text=True, timeout=WATCHDOG_S
    )
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("run-*"))) == 3, run.stderr


def test_ctrl_c_that_is_answered_by_sys_exit_ends_a_block_at_once() -> None:
    with pytest.raises(SystemExit), RingPoolExecutor(1) as pool:  # noqa: PT012  (it is about the block's end)
        future = pool.submit(time.sleep, 3600)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(130)
    assert isinstance(future.exception(), BrokenProcessPool)


@pytest.mark.skipif(
    not (3, 12) <= sys.version_info < (3, 12, 3), reason="this release starts processes when a program has ended, too"
)
@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_first_worker_is_there_when_submit_returns_where_the_end_would_be_too_late(method: str) -> None:
    with RingPoolExecutor(2, method) as made:
        made.submit(abs, -1)
        assert len(made.worker_pids) >= 1


def test_no_worker_is_started_before_there_is_a_task() -> None:
    with RingPoolExecutor(2) as made:
        assert made.worker_pids == ()
        assert made.submit(pow, 2, 8).result(WATCHDOG_S) == 256
        assert len(made.worker_pids) == 1


class HoldsLock:
    """As tqdm's lock is made."""

    def __init__(self, lock: Any) -> None:
        self.locks = [threading.Lock(), {"another": (lock,)}]
        self.itself = self


def test_a_lock_that_only_a_fork_can_have_is_found_in_what_holds_it() -> None:
    assert has_fork_lock([1, HoldsLock(multiprocessing.get_context("fork").RLock())])
    assert not has_fork_lock([1, HoldsLock(multiprocessing.get_context("forkserver").RLock()), threading, HoldsLock])


class Proxy:
    """As those of web frameworks are outside of a request."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"there is no {name} here")

    @property
    def __class__(self) -> Any:
        raise RuntimeError("there is no class here")


def test_nothing_is_run_of_what_may_hold_a_lock_and_much_is_not_looked_through() -> None:
    assert not has_fork_lock([Proxy()])
    deep: Any = 1
    for _ in range(5):
        deep = [list(deep) if isinstance(deep, list) else deep for _ in range(30)]
    assert not has_fork_lock([deep, [[*range(1_000)] for _ in range(1_000)]])


def test_initargs_that_cannot_be_sent_are_named_by_the_error() -> None:
    lock = multiprocessing.get_context("fork").Lock()
    with RingPoolExecutor(1, "forkserver", initializer=functions.identity, initargs=(lock,)) as made:
        error = made.submit(abs, -1).exception(WATCHDOG_S)
        assert isinstance(error, CrashLoopError)
        assert "SemLock created in a fork context" in str(error)
        assert "exit status None" not in str(error)
        with pytest.raises(CrashLoopError, match="SemLock created in a fork context"):
            made.submit(abs, -1)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_functions_without_a_name_may_be_among_initargs_and_locks_beside_them(
    run_program: Callable[..., Program], method: str
) -> None:
    program = run_program(
        f"""
        lock = multiprocessing.get_context({method!r}).Lock()
        given = (lambda: 5, lock)
        with lock, RingPoolExecutor(1, {method!r}, initializer=functions.remember, initargs=given) as pool:
            assert pool.submit(lambda: functions.remembered()[0]()).result(20) == 5
            assert pool.submit(lambda: functions.remembered()[1].acquire(False)).result(20) is False
        with RingPoolExecutor(1, {method!r}, initializer=lambda one: remember(one), initargs=(Own(),)) as pool:
            assert pool.submit(is_own).result(20)
        """,
        top="""
        import multiprocessing
        from ringpool import RingPoolExecutor
        from tests.coordinator import call_functions as functions
        from tests.coordinator.call_functions import remember

        class Own:
            pass

        def is_own():
            return type(functions.remembered()[0]) is Own
        """,
    )
    assert program.finish() == 0, program.err
    assert program.err == ""


def test_options_that_are_none_are_refused_by_name(executor: RingPoolExecutor) -> None:
    for options in ({"timeout": 3}, None):
        with pytest.raises(TypeError, match="TaskOptions"):
            executor.submit_with(cast("Any", options), abs, -1)


def test_a_map_over_many_items_gives_their_results_in_order(executor: RingPoolExecutor) -> None:
    assert list(executor.map(functions.identity, range(100_000))) == list(range(100_000))


def test_short_items_share_records(executor: RingPoolExecutor) -> None:
    before = executor.stats().completed
    assert sum(executor.map(functions.identity, range(100_000))) == sum(range(100_000))
    assert executor.stats().completed - before < 10_000


def test_results_of_all_kinds_come_back_as_they_were(executor: RingPoolExecutor) -> None:
    expected = [functions.assorted(i) for i in range(3000)]
    found = list(executor.map(functions.assorted, range(3000)))
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


def test_an_error_is_its_items_alone(executor: RingPoolExecutor) -> None:
    found = list(executor.map(functions.raise_at_seven, range(5000), return_exceptions=True))
    wrong = [i for i, value in enumerate(found) if value != i]
    assert wrong == [7, 1007, 2007, 3007, 4007]
    assert [str(found[i]) for i in wrong] == [str(i) for i in wrong]


def test_a_death_is_its_items_alone(executor: RingPoolExecutor) -> None:
    found = list(executor.map(functions.die_at_fifty, range(1000), return_exceptions=True))
    wrong = [i for i, value in enumerate(found) if value != i]
    assert wrong == list(range(50, 1000, 100))
    assert all(isinstance(found[i], WorkerDiedError) and found[i].signal == signal.SIGKILL for i in wrong)


def test_a_death_is_a_broken_process_pool_and_the_pool_goes_on(executor: RingPoolExecutor) -> None:
    with pytest.raises(BrokenProcessPool):
        executor.submit(functions.die_at_fifty, 50).result(WATCHDOG_S)
    assert executor.submit(functions.identity, 1).result(WATCHDOG_S) == 1


def test_retries_start_a_task_again_whose_worker_died(executor: RingPoolExecutor, tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "runs")
    future = executor.submit_with(TaskOptions(retries=2), functions.die_twice, path)
    assert future.result(WATCHDOG_S) == 3
    again = os.path.join(tmp_path, "again")
    assert list(executor.options(retries=2).map(functions.die_twice, [again])) == [3]


def test_a_task_that_runs_over_its_time_fails_alone(executor: RingPoolExecutor) -> None:
    with pytest.raises(TaskTimeoutError):
        executor.submit_with(TaskOptions(timeout=0.2), functions.sleep_for_ever).result(WATCHDOG_S)
    found = executor.options(timeout=2.0).map(functions.sleep_at_three, range(6), return_exceptions=True)
    assert [value if isinstance(value, int) else type(value) for value in found] == [0, 1, 2, TaskTimeoutError, 4, 5]


def test_a_task_that_takes_too_much_memory_fails_alone() -> None:
    exits: list[WorkerExit] = []
    with RingPoolExecutor(1, memory_limit=300 << 20, on_worker_exit=exits.append) as made:
        with pytest.raises(MemoryLimitError) as caught:
            made.submit(functions.take_memory, 600 << 20).result(WATCHDOG_S)
        assert caught.value.peak_rss_bytes > 300 << 20
        assert made.submit(functions.take_memory, 1 << 20).result(WATCHDOG_S) == 1 << 20
        wait_until(lambda: exits, "the worker's exit")
    assert exits[0].reason == "memory"


def test_a_worker_is_replaced_after_its_number_of_tasks() -> None:
    with RingPoolExecutor(1, max_tasks_per_child=3) as made:
        pids = [made.submit(os.getpid).result(WATCHDOG_S) for _ in range(7)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
        assert list(made.map(functions.identity, range(1000))) == list(range(1000))


DEFAULT = multiprocessing.get_context(multiprocessing.get_all_start_methods()[0]).Process.__name__
CHOICES = {  # what a program does before it makes a pool, and by what its workers are started
    "nothing": ("pass", "None", "ForkServerProcess"),
    "it has made a lock": ("multiprocessing.Lock()", "None", "ForkServerProcess"),
    "set to spawn": ("multiprocessing.set_start_method('spawn')", "None", "SpawnProcess"),
    "multiprocessing itself": ("multiprocessing.set_start_method('spawn')", "multiprocessing", "SpawnProcess"),
    "multiprocessing itself, by default": ("pass", "multiprocessing", DEFAULT),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_workers_are_started_as_the_program_has_chosen(run_program: Callable[..., Program], choice: str) -> None:
    before, mp_context, process = CHOICES[choice]
    program = run_program(
        f"""
        {before}
        with RingPoolExecutor(1, mp_context={mp_context}) as pool:
            say("process", pool.submit(functions.kind_of_process).result())
        with RingPoolExecutor(1, max_tasks_per_child=2) as pool:
            assert pool.submit(abs, -1).result() == 1
        """,
        top="""
import multiprocessing
from ringpool import RingPoolExecutor
from tests.coordinator import executor_functions as functions
""",
    )
    assert program.wait_for("process") == process
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_has_the_environment_of_its_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    with RingPoolExecutor(1, method) as first:  # the fork server is there now
        assert first.submit(os.getenv, "RINGPOOL_TEST_SET").result(WATCHDOG_S) is None
    monkeypatch.setenv("RINGPOOL_TEST_SET", "\udcff=\n")
    monkeypatch.setenv("TZ", "Etc/GMT-5")
    time.tzset()
    try:
        with RingPoolExecutor(1, method) as second:
            assert second.submit(os.getenv, "RINGPOOL_TEST_SET").result(WATCHDOG_S) == "\udcff=\n"
            assert second.submit(time.strftime, "%z").result(WATCHDOG_S) == "+0500"
        monkeypatch.undo()
        with RingPoolExecutor(1, method) as third:
            assert third.submit(os.getenv, "RINGPOOL_TEST_SET").result(WATCHDOG_S) is None
    finally:
        monkeypatch.undo()
        time.tzset()
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_have_the_context_variables_of_who_uses_the_pool_first() -> None:
    def use() -> None:
        functions.variable.set("set")
        decimal.getcontext().prec = 5
        for _ in range(2):  # also in one that is started later
            assert pool.submit(functions.variables).result(WATCHDOG_S) == ("set", "0.33333")
            kill_worker(pool.worker_pids[0])

    with RingPoolExecutor(1, "fork") as pool:
        contextvars.copy_context().run(use)


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_tasks_run_in_a_main_thread(method: str) -> None:
    with RingPoolExecutor(1, method) as pool:
        assert pool.submit(functions.main_thread).result(WATCHDOG_S) == ("MainThread", False, True)


def test_a_worker_has_what_its_main_module_and_c_code_have_set(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import os
from ringpool import RingPoolExecutor

if __name__ == "__mp_main__":
    os.environ["ONLY"] = os.environ["BOTH"] = "of workers"

if __name__ == "__main__":
    os.environ["BOTH"] = "of all"
    os.putenv("OF_C", "set")
    for changed in ("", "since"):
        if changed:
            os.environ["BOTH"] = changed
        with RingPoolExecutor(1) as pool:
            print([pool.submit(os.getenv, name).result() for name in ("ONLY", "BOTH", "OF_C", "")])
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["env", "=a name that nobody can set", sys.executable, program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=WATCHDOG_S)
    nameless = "a name that nobody can set"
    assert ran.stdout.splitlines() == [
        str(["of workers", "of workers", "set", nameless]),
        str(["of workers", "since", "set", nameless]),
    ]
    assert ran.stderr == ""


def test_a_process_without_a_target_is_started_beside_workers(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import multiprocessing, signal
from ringpool import RingPoolExecutor

class Process(multiprocessing.get_context("forkserver").Process):
    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_target"}

    def run(self):
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)

if __name__ == "__main__":
    with RingPoolExecutor(1) as pool:
        pool.submit(abs, 1).result()
        process = Process()
        process.start()
        process.join()
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=WATCHDOG_S)
    assert (ran.stdout, ran.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    "what", ["Lock()", "RLock()", "Event()", "Queue()", "SimpleQueue()", "Value('i')", "Barrier(2)"]
)
def test_a_lock_that_only_a_fork_can_have_makes_workers_forks(run_program: Callable[..., Program], what: str) -> None:
    program = run_program(
        f"""
        own = multiprocessing.get_context("fork").{what}
        with RingPoolExecutor(1, initializer=functions.identity, initargs=(own,)) as pool:
            say("first", pool.submit(functions.kind_of_process).result())
        other = multiprocessing.get_context("forkserver").{what}
        with RingPoolExecutor(1, initializer=functions.identity, initargs=(other,)) as pool:
            say("second", pool.submit(functions.kind_of_process).result())
        """,
        top="""
import multiprocessing
from ringpool import RingPoolExecutor
from tests.coordinator import executor_functions as functions
""",
    )
    assert program.wait_for("first") == "ForkProcess"
    assert program.wait_for("second") == "ForkServerProcess"
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()


def test_an_executor_that_was_not_used_may_be_used_in_forks_of_its_program(run_program: Callable[..., Program]) -> None:
    """As a server does that imports its application and then forks."""
    program = run_program(
        """
        def fork(then):
            child = os.fork()
            if not child:
                try:
                    then()
                    sys.exit(0)
                except WrongProcessError:
                    sys.exit(3)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        pool = RingPoolExecutor(1)
        for item in (1, 2):
            assert fork(lambda: functions.identity(pool.submit(abs, item).result())) == 0
        assert fork(pool.shutdown) == 0
        assert pool.submit(abs, -3).result() == 3
        assert fork(lambda: pool.submit(abs, 1)) == 3  # it is the parent's
        pool.shutdown()
        """,
        top="""
from ringpool import RingPoolExecutor
from tests.coordinator import executor_functions as functions
""",
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()


def test_an_executor_that_was_shut_down_lets_go_of_its_initargs() -> None:
    argument = argparse.Namespace()
    held = weakref.ref(argument)
    with RingPoolExecutor(1, initializer=functions.identity, initargs=(argument,)) as pool:
        assert pool.submit(abs, -1).result(WATCHDOG_S) == 1
    del argument
    gc.collect()
    assert held() is None
    pool.shutdown()


class Tracing(RingPoolExecutor):
    """Notes what it submits, and has it wrapped."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.submitted: list[tuple[Any, ...]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted.append(args)
        return super().submit(functions.in_a_list, fn, *args, **kwargs)


def test_a_map_goes_through_a_submit_of_ones_own() -> None:
    with Tracing(2) as made:
        assert list(made.map(abs, range(-50, 0), chunksize=10)) == [[-item] for item in range(-50, 0)]
        assert made.submitted == [(item,) for item in range(-50, 0)]
        assert list(made.map(pow, [2, 3], [3, 2])) == [[8], [9]]
        assert list(made.map(abs, [])) == list(made.map(abs)) == []
        with pytest.raises(ValueError, match="chunksize"):
            made.map(abs, [1], chunksize=0)
        # What is drawn goes on when the block is left, as in every executor.
        left = made.map(abs, range(5))
    assert list(left) == [[item] for item in range(5)]


def test_a_map_through_a_submit_of_ones_own_is_bounded_and_gives_errors_and_times_as_any_other(tmp_path: Path) -> None:
    with Tracing(2) as made:
        bounded = made.map(abs, itertools.count(1), buffersize=3)
        assert [next(bounded) for _ in range(4)] == [[1], [2], [3], [4]]
        assert len(made.submitted) <= 7
        bounded.close()  # type: ignore[attr-defined]  # pyright: ignore
        values = made.map(functions.raise_at_seven, range(6, 9), return_exceptions=True)
        assert [type(value) for value in values] == [list, ValueError, list]
        values = made.map(functions.raise_at_seven, range(6, 9))
        assert next(values) == [6]
        with pytest.raises(ValueError, match="7"):
            next(values)
        assert list(values) == []
        with pytest.raises(TimeoutError):
            next(made.map(functions.wait_for, [tmp_path / "gate"], timeout=0))
        (tmp_path / "gate").touch()


class Telling(RingPoolExecutor):
    """Notes how it is shut down, and cancels what has not begun."""

    def __init__(self) -> None:
        super().__init__(1)
        self.told: list[bool] = []

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.told.append(wait)
        super().shutdown(wait, cancel_futures=True)


def test_a_block_ends_by_a_shutdown_of_ones_own() -> None:
    with Telling() as made:
        futures = [made.submit(time.sleep, 0.05) for _ in range(20)]
    assert any(future.cancelled() for future in futures)
    with pytest.raises(LookupError), made:
        raise LookupError
    assert made.told == [True, True]


def test_a_block_that_is_interrupted_or_has_run_nothing_ends_by_a_shutdown_of_ones_own(tmp_path: Path) -> None:
    made = Telling()
    future = made.submit(functions.wait_for, tmp_path / "gate")
    with pytest.raises(KeyboardInterrupt), made:
        raise KeyboardInterrupt
    assert made.told == [True]
    assert isinstance(future.exception(0), BrokenProcessPool)
    with Telling() as unused:
        pass
    assert unused.told == [True]


def test_a_subclass_may_have_any_private_name_that_does_not_begin_with_rp() -> None:
    names = ("_calls", "_pool", "_arguments", "_deferred", "_making", "_task_options", "_options", "_map", "_make")
    with RingPoolExecutor(1) as made:
        there = {name for name in (*vars(made), *vars(RingPoolExecutor)) if name[0] == "_" and name[:2] != "__"}

    class Own(RingPoolExecutor):
        def __init__(self) -> None:
            super().__init__(1)
            for name in names:
                setattr(self, name, name)

    with Own() as own:
        assert own.submit(abs, -1).result(WATCHDOG_S) == 1
        assert list(own.map(abs, [-1, -2])) == [1, 2]
        assert [getattr(own, name) for name in names] == list(names)
    in_process_pool = {"_max_workers", "_broken"}  # which ProcessPoolExecutor has, too
    assert {name for name in there if not name.startswith("_rp_")} <= in_process_pool | {"_abc_impl"}


def test_a_subclass_may_have_no_hash() -> None:
    class Comparable(RingPoolExecutor):
        def __eq__(self, other: object) -> bool:
            return self is other

    with Comparable(1) as pool:  # type: ignore[abstract]
        assert pool.submit(abs, -1).result(WATCHDOG_S) == 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_a_pool_is_made_of_is_imported_with_it_and_not_by_its_workers(tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"""
from ringpool import RingPoolExecutor
from tests.coordinator import executor_functions as functions

rooms = ["ringpool.coordinator.callpool", "ringpool.coordinator.pump"]

if __name__ == "__main__":
    assert functions.loaded(rooms) == rooms
    with RingPoolExecutor(1, mp_context={method!r}) as pool:
        assert pool.submit(functions.loaded, rooms).result() == []
        assert pool.submit(functions.loaded, ["ringpool.coordinator.executor"]).result(), "the main module has it"
        assert pool.submit(functions.sum_of_lengths, ["a", "bc"]).result() == 3  # it makes a pool of its own
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, program], env=environment, check=True, timeout=WATCHDOG_S)


def test_the_fork_server_imports_what_workers_would(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
from multiprocessing import forkserver
from ringpool import Job

if __name__ == "__main__":
    assert Job("os.path:getsize", [__file__], directory=".").run(1).progress.done == 1
    print(*forkserver._forkserver._preload_modules)
"""
    )
    ran = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, check=True, timeout=WATCHDOG_S)
    ahead, *others = ran.stdout.decode().split()
    assert ahead == "ringpool.workers.ahead"
    assert {"ringpool.workers.process", "ringpool.workers.jobtasks", "ringpool.coordinator.job"} <= {*others}
    assert "ringpool.coordinator.executor" not in others


def test_tasks_that_come_one_by_one_take_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staff, "SLOW_TO_CLAIM_S", 1000)  # on a busy machine one worker may be that slow
    with RingPoolExecutor(4) as made:
        for _ in range(50):
            made.submit(functions.identity, 1).result(WATCHDOG_S)
            time.sleep(0.002)  # in which the worker goes to sleep
        assert made.stats().workers_alive == 1
        futures = [made.submit(time.sleep, 1) for _ in range(3)]
        wait_until(lambda: made.stats().workers_alive == 3, "workers for those that wait")
        wait(futures, WATCHDOG_S)


def test_a_first_lambda_does_not_meet_a_fork_that_was_made_while_cloudpickle_was_imported(
    run_program: Callable[..., Program],
) -> None:
    program = run_program(
        """
        def forks_late(*words, **more):
            assert "cloudpickle" in sys.modules
            return fork(*words, **more)

        fork, os.fork = os.fork, forks_late
        for way in ("submit", "map"):
            with RingPoolExecutor(1, mp_context="fork") as pool:
                given = pool.submit(lambda: 1).result() if way == "submit" else sum(pool.map(lambda x: x, [1]))
                assert given == 1
        """,
        top="import os, sys\nfrom ringpool import RingPoolExecutor\n",
    )
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()


@pytest.mark.parametrize("status", range(process.EXIT_ORPHAN, process.EXIT_UNGUARDED + 1))
def test_a_task_may_end_its_worker_with_any_exit_status(executor: RingPoolExecutor, status: int) -> None:
    with pytest.raises(WorkerDiedError):
        executor.submit(os._exit, status).result(WATCHDOG_S)
    assert executor.submit(abs, -1).result(WATCHDOG_S) == 1, "the pool goes on"


def test_tasks_do_not_wait_for_a_worker_that_is_stopped_while_others_can_be_had() -> None:
    with RingPoolExecutor(2) as made:
        stopped = made.submit(os.getpid).result(WATCHDOG_S)
        wait_until(lambda: state_of(stopped) == "S", "the worker's sleep")  # it may hold the ring's lock before
        os.kill(stopped, signal.SIGSTOP)
        try:
            wait_until(lambda: state_of(stopped) == "T", "the worker's stop")
            assert made.submit(os.getpid).result(WATCHDOG_S) != stopped
        finally:
            os.kill(stopped, signal.SIGCONT)


def test_tasks_do_not_wait_for_a_worker_that_lingers_at_its_end_while_others_can_be_had() -> None:
    with RingPoolExecutor(2, max_tasks_per_child=1) as made:
        lingers = made.submit(functions.leave_thread, 3.0).result(WATCHDOG_S)
        assert made.submit(functions.is_alive, lingers).result(WATCHDOG_S)


def test_what_is_registered_to_go_by_value_goes_by_value_from_a_program_that_is_no_file() -> None:
    program = """
import cloudpickle, sys, types
made = sys.modules["made"] = types.ModuleType("made")
exec("def double(x): return 2 * x", vars(made))
cloudpickle.register_pickle_by_value(made)
from ringpool import RingPoolExecutor
with RingPoolExecutor(1) as pool:
    print(pool.submit(made.double, 2).result(), *pool.map(made.double, [3]))
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=True, timeout=WATCHDOG_S).stdout == b"4 6\n"

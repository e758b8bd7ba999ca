"""Signals in workers: whose handlers are there, what is put back between tasks, and what comes of a timer."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.coordinator import signal_functions as functions
from tests.coordinator.program import WATCHDOG_S, Program, shared_memory_of

from ringpool import RingPoolExecutor

METHODS = ["forkserver", "spawn", "fork"]
TOP = """
import asyncio, time
from ringpool import RingPoolExecutor
from tests.coordinator import signal_functions as functions
"""


@pytest.mark.parametrize("method", METHODS)
def test_handlers_of_the_main_module_are_there_in_workers(run_program: Callable[..., Program], method: str) -> None:
    program = run_program(
        f"""
        with RingPoolExecutor(1, {method!r}) as pool:
            for _ in range(2):
                say("alarm", pool.submit(functions.limit_itself).result())
                say("handlers", *(pool.submit(functions.handler_of, number).result() for number in numbers))
                for number in numbers:
                    pool.submit(functions.ignore, number).result()
        """,
        top=f"""
{TOP}
def on_signal(number, frame):
    raise LookupError

numbers = [signal.SIGALRM, signal.SIGTERM, signal.SIGHUP]
for number in (signal.SIGINT, signal.SIGUSR1, *numbers):
    signal.signal(number, on_signal)
""",
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["alarm LookupError", "handlers" + 3 * " on_signal"] * 2


def test_a_handler_of_sigalrm_that_an_import_in_a_task_installs_stays() -> None:
    with RingPoolExecutor(1) as pool:
        for _ in range(3):
            assert pool.submit(functions.import_and_limit_itself).result(WATCHDOG_S) == "AlarmError"
        pool.submit(functions.ignore, signal.SIGALRM).result(WATCHDOG_S)
        assert pool.submit(functions.handler_of, signal.SIGALRM).result(WATCHDOG_S) == "SIG_DFL"


@pytest.mark.parametrize("initializer", [functions.handle_alarms, None])
def test_a_timer_that_a_task_leaves_does_not_call_its_handler_in_the_next(
    initializer: Callable[[], None] | None,
) -> None:
    with RingPoolExecutor(1, initializer=initializer) as pool:
        if initializer is None:
            pool.submit(functions.handle_alarms).result(WATCHDOG_S)
        futures = [pool.submit(functions.leave_a_timer) for _ in range(500)]  # many to a claim
        found = {future.result(WATCHDOG_S) for future in futures}
        assert len(found) == 1
        assert found.pop()[1] == 0.0


def test_handlers_of_an_event_loop_are_not_there_in_forks(run_program: Callable[..., Program]) -> None:
    program = run_program(
        """
        async def run():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, say, "in vain", number)
            with RingPoolExecutor(1, "fork") as pool:
                say(*[pool.submit(functions.handler_of, number).result() for number in (signal.SIGINT, signal.SIGTERM)])
                say(pool.submit(functions.wakeup_fd).result())

        asyncio.run(run())
        """,
        top=TOP,
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["default_int_handler SIG_DFL", "-1"]


def test_handlers_of_the_command_are_not_there_in_forks(run_program: Callable[..., Program]) -> None:
    program = run_program(
        """
        stopper.install()
        with RingPoolExecutor(1, "fork") as pool:
            say(*[pool.submit(functions.handler_of, number).result() for number in (signal.SIGINT, signal.SIGTERM)])
        """,
        top=f"{TOP}\nfrom ringpool.cli.stopping import stopper\n",
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["default_int_handler SIG_DFL"]


@pytest.mark.parametrize("method", METHODS)
def test_signals_that_the_program_holds_back_are_held_back_in_workers(
    run_program: Callable[..., Program], method: str
) -> None:
    program = run_program(
        f"""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        with RingPoolExecutor(1, {method!r}) as pool:
            say(pool.submit(functions.held_back).result() == {{int(signal.SIGUSR1)}})
            say(pool.submit(functions.wait_for_signal, signal.SIGUSR1).result())
        """,
        top=TOP,
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["True", "True"]


def test_a_fork_of_a_program_with_a_pool_ends_by_the_sigterm_that_comes_first_of_all(
    run_program: Callable[..., Program],
) -> None:
    program = run_program(
        """
        with RingPoolExecutor(1) as pool:
            pool.submit(int).result()
            ends = set()
            for i in range(60):
                pid = os.fork()
                if not pid:
                    time.sleep(1)
                    os._exit(0)
                for _ in range(i % 20 * 1000):
                    pass
                os.kill(pid, signal.SIGTERM)
                ends.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            say("ends", ends)
            for _ in range(10):
                with multiprocessing.get_context("fork").Pool(2) as others:
                    pass
            say("terminated")
            say("held back", signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        """,
        top=f"{TOP}\nimport multiprocessing",
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["ends {-15}", "terminated", "held back set()"]
    assert program.err == ""


def test_a_handler_that_raises_amid_a_fork_leaves_no_signal_held_back(tmp_path: Path) -> None:
    """Without ``filelock``, whose own hooks such a handler leaves undone: no fork is allowed after that."""
    (tmp_path / "program.py").write_text(
        """
import os, random, signal, sys, time, warnings
from ringpool import RingPoolExecutor

class Late(Exception):
    pass

def raise_late(*_):
    if is_armed:
        raise Late

def held_back():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of CPython 3.12 and later: it forks, and has threads
    signal.signal(signal.SIGALRM, raise_late)
    sys.unraisablehook = lambda _: None  # what was lost in a hook
    with RingPoolExecutor(1) as pool:
        pool.submit(int).result()
        masks, n_lost = set(), 0
        for i in range(300):
            pid = None
            try:
                is_armed = True
                signal.setitimer(signal.ITIMER_REAL, random.random() * 0.0012 + 1e-6)
                pid = os.fork()
                if pid:
                    os.waitpid(pid, 0)
                    time.sleep(0.003)
                    n_lost += 1
                is_armed = False
            except Late:
                pass
            if pid == 0:
                os._exit(bool(held_back()))
            signal.setitimer(signal.ITIMER_REAL, 0)
            masks.add(frozenset(held_back()))
        print("held back", masks, n_lost > 0, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
"""
    )
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * WATCHDOG_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "held back {frozenset()} True\n", "")


@pytest.mark.parametrize(
    "finalizer",
    [
        "Temporary()",
        "weakref.finalize(set(), slow)",
        "multiprocessing.util.Finalize(set(), slow)",
    ],
)
def test_a_sigterm_that_comes_in_a_finalizer_is_not_lost(run_program: Callable[..., Program], finalizer: str) -> None:
    program = run_program(
        f"""
        with RingPoolExecutor(1) as pool:
            pool.submit(int).result()
            for i in range(100):
                times.append(i)
                {finalizer}
                time.sleep(0.01)
        """,
        top=f"""{TOP}
import multiprocessing.util, weakref
times = []

def slow(*_):
    if len(times) == 10:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.02)

class Temporary:
    def __del__(self):
        slow()
""",
    )
    assert program.finish() == 143, program.err
    assert program.err == ""


def test_a_finalizer_that_does_not_end_keeps_no_sigterm_out(run_program: Callable[..., Program]) -> None:
    program = run_program(
        """
        finalizer = weakref.finalize(set, time.sleep, 60)
        with RingPoolExecutor(1) as pool:
            pool.submit(int).result()
            say("about to wait")
            finalizer()
        """,
        top=f"{TOP}\nimport weakref",
    )
    program.wait_for("about to wait")
    program.signal(signal.SIGTERM, group=False)
    assert program.finish() == 143, program.err


OTHERS = "os.register_at_fork({}=strike)"
OURS = "from ringpool.coordinator import signals; signals.around_forks({})"


@pytest.mark.parametrize(
    "hook",
    [
        OTHERS.format("before"),
        OTHERS.format("after_in_parent"),
        OURS.format("strike, int, int"),
        OURS.format("int, strike, int"),
    ],
)
def test_a_sigterm_that_comes_while_a_program_with_a_pool_forks_ends_it(tmp_path: Path, hook: str) -> None:
    (tmp_path / "program.py").write_text(
        f"""
import os, signal, time
is_due = False

def strike():
    if is_due:
        os.kill(os.getpid(), signal.SIGTERM)

{hook}
from ringpool import RingPoolExecutor

if __name__ == "__main__":
    with RingPoolExecutor(1) as pool:
        pool.submit(int).result()
        is_due = True
        if pid := os.fork():
            try:
                os.waitpid(pid, 0)
                time.sleep({WATCHDOG_S})
            finally:
                print("ended", flush=True)
"""
    )
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * WATCHDOG_S, check=False)
    said = [line for line in done.stderr.splitlines() if "fork()" not in line]  # CPython 3.12 and later warn of it
    assert (done.returncode, done.stdout, said) == (143, "ended\n", [])


@pytest.mark.parametrize(
    ("made", "used"),
    [
        ("RingPoolExecutor(1)", "None"),  # with nothing to do yet
        ("RingPoolExecutor(1)", "on_a_thread(pool.submit, int).result()"),
        ("on_a_thread(RingPoolExecutor, 1)", "pool.submit(int).result()"),
    ],
)
def test_a_sigterm_leaves_nothing_of_a_pool_that_has_no_task_yet_or_belongs_to_two_threads(
    run_program: Callable[..., Program], made: str, used: str
) -> None:
    program = run_program(
        f"""
        with {made} as pool:
            {used}
            say("about to wait")
            time.sleep({WATCHDOG_S})
        """,
        top=f"""{TOP}
from concurrent.futures import ThreadPoolExecutor

def on_a_thread(call, *arguments):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call, *arguments).result()
""",
    )
    program.wait_for("about to wait")
    assert shared_memory_of(program.pid)
    program.signal(signal.SIGTERM, group=False)
    assert program.finish() == 143, program.err
    assert not shared_memory_of(program.pid)


def test_a_signal_that_comes_as_soon_as_it_is_handled_has_its_default_action_after_the_last_pool(
    run_program: Callable[..., Program],
) -> None:
    program = run_program(
        """
        real = signal.signal

        def strike(number, handler):
            before = real(number, handler)
            if number == signal.SIGTERM and not times:
                times.append(number)
                os.kill(os.getpid(), number)
            return before

        signal.signal = strike
        try:
            RingPoolExecutor(1)
        except SystemExit:
            say("ended")
        signal.signal = real
        with RingPoolExecutor(1) as pool:
            pool.submit(int).result()
        say(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGHUP) is signal.SIG_DFL)
        """,
        top=f"{TOP}\ntimes = []",
    )
    assert program.finish() == 0, program.err
    assert program.out == "ended\nTrue True\n"

"""What a signal handler raises between two steps of a pool's start or end: the pool ends, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.coordinator.program import WATCHDOG_S, Program

from ringpool import Coordinator, RingPoolExecutor
from ringpool.coordinator import pool
from ringpool.shm import dispatch, owner, segment

needs_threads_at_exit = pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 3),
    reason="this release starts no thread, and forks no more, once main has ended (CPython issue 113964)",
)


def left_in_shared_memory() -> list[str]:
    me = owner.this_process()
    return [name for name in os.listdir(segment.SHM_DIRECTORY) if segment.owner_of(name) == me]


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """Have Ctrl-C come just after the next call of ``place.name`` has returned."""

    def interrupt_after(place: Any, name: str) -> None:
        call, is_due = getattr(place, name), True

        def interrupted(*arguments: Any, **named: Any) -> Any:
            nonlocal is_due
            value = call(*arguments, **named)
            if is_due:
                is_due = False
                raise KeyboardInterrupt
            return value

        monkeypatch.setattr(place, name, interrupted)

    return interrupt_after


@pytest.mark.parametrize("thread", ["ringpool-supervisor", "ringpool-pump"])
def test_ctrl_c_while_a_pool_waits_for_the_first_step_of_a_thread(
    run_program: Callable[..., Program], thread: str
) -> None:
    program = run_program(
        f"""
        start = threading.Thread.start

        def interrupted(self):
            start(self)
            if self.name == {thread!r}:
                raise KeyboardInterrupt

        threading.Thread.start = interrupted
        for _ in range(3):
            try:
                with RingPoolExecutor(2) as executor:
                    executor.submit(abs, 1)
            except KeyboardInterrupt:
                say("interrupted")
        threading.Thread.start = start
        with RingPoolExecutor(2) as executor:
            say(executor.submit(abs, -1).result())
        say(sorted(one.name for one in threading.enumerate()))
        """,
        top="from ringpool import RingPoolExecutor",
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == [*["interrupted"] * 3, "1", "['MainThread']"]
    program.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (dispatch.CoordinatorEnd, "close"),
        (dispatch.Ring, "close"),
        (segment.Segment, "close"),
        (segment, "unlink"),
    ],
)
def test_ctrl_c_in_the_midst_of_closing(interrupt_after: Callable[[Any, str], None], place: Any, name: str) -> None:
    executor = RingPoolExecutor(1)
    assert executor.submit(abs, -1).result() == 1
    interrupt_after(place, name)
    with pytest.raises(KeyboardInterrupt):
        executor.shutdown()
    executor.shutdown()
    assert left_in_shared_memory() == []
    assert not [one.name for one in threading.enumerate() if one.name.startswith("ringpool")]


def test_ctrl_c_between_two_semaphores_that_are_closed() -> None:
    own = Coordinator(1)
    semaphores = own._pool._end.semaphores

    class Interrupted:
        def __init__(self, semaphore: Any) -> None:
            self._semaphore = semaphore
            self._is_due = True

        def __getattr__(self, name: str) -> Any:
            return getattr(self._semaphore, name)

        def close(self) -> None:
            self._semaphore.close()
            if self._is_due:
                self._is_due = False
                raise KeyboardInterrupt

    own._pool._end.semaphores = [Interrupted(semaphores[0]), *semaphores[1:]]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        own.close()
    own.close()
    assert left_in_shared_memory() == []


@pytest.mark.parametrize("name", ["umask", "CoordinatorEnd", "Pump", "Supervisor", "_close_at_the_end"])
def test_ctrl_c_while_a_pool_is_made(interrupt_after: Callable[[Any, str], None], name: str) -> None:
    interrupt_after(pool, name)
    with pytest.raises(KeyboardInterrupt):
        Coordinator(1)
    assert left_in_shared_memory() == []
    with RingPoolExecutor(1) as executor:
        assert executor.submit(abs, -1).result() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("left", ["open", "shut down", "in use by a thread"])
def test_a_program_whose_tasks_a_signal_kills_at_its_exit_does_not_say_that_all_is_well(
    run_program: Callable[..., Program], number: signal.Signals, left: str
) -> None:
    if (number, left) == (signal.SIGINT, "in use by a thread"):
        pytest.skip("Python swallows a Ctrl-C while it waits for a thread at its end; the tasks are run")
    program = run_program(
        f"""
        executor = RingPoolExecutor(2)
        futures = [executor.submit(time.sleep, 60) for _ in range(3)]
        while not futures[0].running():
            time.sleep(0.01)
        if {left!r} == "shut down":
            executor.shutdown(wait=False)
        if {left!r} == "in use by a thread":
            threading.Thread(target=wait_for, args=(futures,)).start()
        threading._register_atexit(say, "main has ended")
        """,
        top="""
import concurrent.futures, time
from ringpool import RingPoolExecutor

def wait_for(futures):
    concurrent.futures.wait(futures)
""",
    )
    program.wait_for("main has ended")
    program.signal(number, group=False)
    assert program.finish() == -number, program.err
    program.assert_no_process_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("others", ["none", "a thread"])
def test_before_it_ends_by_that_it_does_what_a_program_does_at_exit(
    run_program: Callable[..., Program], tmp_path: Path, number: signal.Signals, others: str
) -> None:
    if (number, others) == (signal.SIGINT, "a thread"):
        pytest.skip("Python swallows a Ctrl-C while it waits for a thread at its end; the tasks are run")
    program = run_program(
        f"""
        atexit.register(say, "called at exit")
        target = logging.FileHandler({str(tmp_path / "log")!r})
        logging.getLogger().addHandler(logging.handlers.MemoryHandler(1000, target=target))
        logging.warning("kept in memory")
        written = open({str(tmp_path / "written")!r}, "w")
        written.write("in a buffer")
        daemon = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
        daemon.start()
        executor = RingPoolExecutor(1)
        future = executor.submit(time.sleep, 60)
        while not future.running():
            time.sleep(0.01)
        if {others!r} == "a thread":
            threading.Thread(target=wait_for, args=(future,)).start()
        threading._register_atexit(say, "main has ended")
        """,
        top="""
import concurrent.futures, time
import atexit, logging.handlers, multiprocessing
from ringpool import RingPoolExecutor

def wait_for(future):
    concurrent.futures.wait([future])
""",
    )
    program.wait_for("main has ended")
    program.signal(number, group=False)
    assert program.finish() == -number, program.err
    assert program.out.splitlines() == ["main has ended", "called at exit"]
    assert (tmp_path / "log").read_text() == "kept in memory\n"
    assert (tmp_path / "written").read_text() == "in a buffer"
    program.assert_no_process_is_left()


@needs_threads_at_exit
def test_a_fork_that_it_makes_at_exit_ends_with_its_own_status(run_program: Callable[..., Program]) -> None:
    program = run_program(
        """
        executor = RingPoolExecutor(1)
        future = executor.submit(time.sleep, 60)
        while not future.running():
            time.sleep(0.01)
        atexit.register(fork)
        threading._register_atexit(say, "main has ended")
        """,
        top="""
import atexit, time
from ringpool import RingPoolExecutor

def fork():
    pid = os.fork()
    if pid:
        say("ended with", os.waitpid(pid, 0)[1])
""",
    )
    program.wait_for("main has ended")
    program.signal(signal.SIGTERM, group=False)
    assert program.finish() == -signal.SIGTERM, program.err
    assert program.out.splitlines()[-1] == "ended with 0"


@needs_threads_at_exit
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_by_that_also_where_what_it_does_at_exit_does_not_end(
    run_program: Callable[..., Program], number: signal.Signals
) -> None:
    program = run_program(
        """
        atexit.register(time.sleep, 600)
        signals.EXIT_MAX_S = 1
        executor = RingPoolExecutor(1)
        future = executor.submit(time.sleep, 60)
        while not future.running():
            time.sleep(0.01)
        threading._register_atexit(say, "main has ended")
        """,
        top="""
import atexit, time
from ringpool import RingPoolExecutor
from ringpool.coordinator import signals
""",
    )
    program.wait_for("main has ended")
    program.signal(number, group=False)
    assert program.finish() == -number, program.err
    program.assert_no_process_is_left()


def test_as_the_first_process_of_a_container_it_does_not_either(tmp_path: Path) -> None:
    """Which the kernel spares the default action of a signal."""
    unshare = [shutil.which("unshare") or "unshare", "--user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no process of this user may be the first one of a container")
    (tmp_path / "program.py").write_text(
        """
import os, signal, threading, time
from ringpool import RingPoolExecutor

if __name__ == "__main__":
    executor = RingPoolExecutor(1)
    future = executor.submit(time.sleep, 60)
    while not future.running():
        time.sleep(0.01)
    threading._register_atexit(signal.raise_signal, signal.SIGTERM)
"""
    )
    command = [*unshare, sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * WATCHDOG_S, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr

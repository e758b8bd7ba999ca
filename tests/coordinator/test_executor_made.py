"""When an executor's pool is made: with it, or, as a global of a main module that a worker imports, when it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.coordinator.program import WATCHDOG_S, Program

from ringpool import RingPoolExecutor, startup
from ringpool.coordinator import callpool, contexts


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> RingPoolExecutor:
    """An executor as a worker has it that has imported the main module."""
    with monkeypatch.context() as patch:
        patch.setattr(startup, "is_importing_main", lambda: True)
        return RingPoolExecutor(1)


def test_an_executor_can_be_made_in_a_fork_that_was_made_while_another_was_made(
    run_program: Callable[..., Program],
) -> None:
    program = run_program(
        """
        begun, forked = threading.Event(), threading.Event()

        class Slow(callpool.CallPool):
            def __init__(self, *arguments, **more):
                begun.set()
                forked.wait()
                super().__init__(*arguments, **more)

        fast, callpool.CallPool = callpool.CallPool, Slow
        thread = threading.Thread(target=lambda: RingPoolExecutor(1).shutdown())
        thread.start()
        begun.wait()
        pid = os.fork()
        if not pid:
            signal.alarm(60)
            callpool.CallPool = fast
            RingPoolExecutor(1).shutdown()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        forked.set()
        thread.join()
        say(status)
        """,
        top="""
        from ringpool import RingPoolExecutor
        from ringpool.coordinator import callpool
        """,
    )
    assert program.finish() == 0, program.err
    assert program.out == "0\n"


@pytest.mark.parametrize(
    ("patcher", "name", "module"),
    [
        ("gevent.monkey", "is_module_patched", "threading"),
        ("gevent.monkey", "is_module_patched", "socket"),
        ("eventlet.patcher", "is_monkey_patched", "thread"),
        ("eventlet.patcher", "is_monkey_patched", "select"),
    ],
)
def test_no_pool_is_made_where_a_library_has_replaced_what_it_needs(
    run_program: Callable[..., Program], patcher: str, name: str, module: str
) -> None:
    program = run_program(
        f"""
        stand_in = sys.modules[{patcher!r}] = types.ModuleType({patcher!r})
        for replaced in ("time", {module!r}):
            stand_in.{name} = replaced.__eq__
            for kind in (RingPoolExecutor, Coordinator):
                try:
                    with kind(1):
                        say("made")
                except MonkeyPatchedError as error:
                    say(error.library, error.module)
        """,
        top="""
        import types
        from ringpool import RingPoolExecutor
        """,
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["made"] * 2 + [f"{patcher.partition('.')[0]} {module}"] * 2
    program.assert_nothing_is_left()


def test_wrong_arguments_are_told_at_once_without_assertions_too(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
from ringpool import RingPoolExecutor
try:
    RingPoolExecutor(1, mp_context="fork", max_tasks_per_child=1)
except ValueError:
    print("told")
"""
    )
    ran = subprocess.run([sys.executable, "-O", program], capture_output=True, check=True, timeout=WATCHDOG_S)
    assert ran.stdout == b"told\n"


def test_an_executor_that_is_made_when_it_is_used_is_made_once(
    deferred: RingPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    second_is_there = threading.Event()

    class Slow(callpool.CallPool):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            made.append(self)
            second_is_there.wait(0.2 if len(made) == 1 else 0)
            super().__init__(*arguments, **more)

    monkeypatch.setattr(callpool, "CallPool", Slow)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(deferred.stats().queued)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deferred.shutdown()
    assert (found, len(made)) == ([0, 0], 1)


def test_an_executor_that_could_not_be_made_when_it_was_used_can_be_made_later(
    deferred: RingPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_arguments: object) -> None:
        raise OSError("no descriptors")

    with monkeypatch.context() as patch:
        patch.setattr(callpool, "CallPool", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="no descriptors"):
                deferred.submit(os.getpid)
    assert deferred.submit(pow, 2, 3).result(WATCHDOG_S) == 8
    deferred.shutdown()


def test_an_executor_that_was_not_used_is_shut_down_unmade(
    deferred: RingPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callpool, "CallPool", None)
    with deferred:
        pass
    deferred.shutdown()
    deferred.terminate_workers()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        deferred.submit(os.getpid)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_an_executor_may_be_shut_down_by_the_main_module_outside_of_its_guard(
    run_program: Callable[..., Program], method: str
) -> None:
    program = run_program(
        """
        if __name__ == "__main__":
            say(executor.submit(pow, 2, 3).result())
        executor.shutdown()
        """,
        top=f"""
        from ringpool import RingPoolExecutor
        executor = RingPoolExecutor(2, mp_context={method!r})
        """,
        guarded=False,
    )
    assert program.finish() == 0, program.err
    assert (program.out, program.err) == ("8\n", "")


def test_a_class_of_ones_own_may_ask_for_what_is_not_there_yet() -> None:
    class Own(RingPoolExecutor):
        def __init__(self) -> None:
            self.had_pool = hasattr(self, "_pool")
            super().__init__(1)

    with Own() as made:
        assert not made.had_pool


def test_a_module_of_multiprocessing_that_another_thread_imports_says_nothing_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = ModuleType("multiprocessing.process")
    monkeypatch.setitem(sys.modules, "multiprocessing.process", half)
    assert not startup.is_for_workers()
    vars(half)["current_process"] = vars(half)["parent_process"] = lambda: yet_to_come  # type: ignore[name-defined] # noqa: F821
    assert not startup.is_for_workers()


def test_other_threads_may_import_while_it_is_told_what_the_fork_server_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Imported(str):
        def startswith(self, *_: Any) -> bool:
            sys.modules["imported.meanwhile"] = ModuleType("imported.meanwhile")
            return False

    monkeypatch.setitem(sys.modules, Imported("asks"), ModuleType("asks"))
    monkeypatch.setitem(sys.modules, "imported.meanwhile", ModuleType("imported.meanwhile"))
    del sys.modules["imported.meanwhile"]
    assert "ringpool.workers.process" in contexts._preload()

"""CPython's own executor tests, from the interpreter's ``test`` package, with another executor put under them.

test.test_concurrent_futures.util      ProcessPool{Fork,Forkserver,Spawn}Mixin.executor_type = the executor
       |
       +-- test_as_completed, test_deadlock, test_init, test_process_pool, test_shutdown, test_wait
                 |
           ProcessPool<Context>...Test   for each start method   --left_out.py-->  those that are run

A test passes here where it passes there, and leaves neither a child, a thread, nor anything in ``/dev/shm``: CPython
prints a warning for the first two and marks its environment as altered; here they are failures.

``test_future`` and ``test_thread_pool`` are about no process pool. The sources of the tests are used as they stand.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import os
import sys
import time
import unittest
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, TextIO

from tests.conformance.left_out import START_METHODS, reason_for

PACKAGE = "test.test_concurrent_futures"
MODULES = ("test_as_completed", "test_deadlock", "test_init", "test_process_pool", "test_shutdown", "test_wait")
HANG_TIMEOUT_S = 100  # the longest test takes 6 s on an idle machine
LEFT_TIMEOUT_S = 10.0
SLOW = frozenset(  # those that sleep for 2 s and longer: 14 of the 25 s that one start method takes
    {
        "test_duplicate_futures",
        "test_first_exception",
        "test_first_exception_one_already_failed",
        "test_map_timeout",
    }
)
# Two tests run those of another class once more, and look at what these leave: by start method.
_RESOURCES = {"test_spawn": "spawn", "test_forkserver": "forkserver"}


class Case(NamedTuple):
    """One test with one start method; ``left_out``: why it is not run, or None."""

    module: str
    test: str
    context: str
    case: unittest.TestCase
    left_out: str | None

    def __str__(self) -> str:
        return f"{self.context}:{self.module}.{type(self.case).__name__}.{self.test}"


def is_installed() -> bool:
    """Whether this interpreter comes with these tests."""
    try:
        return importlib.util.find_spec(f"{PACKAGE}.test_process_pool") is not None
    except ModuleNotFoundError:
        return False


# ---- which


def cases(executor: type) -> Iterator[Case]:
    """All tests of process pools, with ``executor`` under them, by module."""
    put_under_test(executor)
    for name in MODULES:
        module = _module(name)
        for case in _flat(unittest.defaultTestLoader.loadTestsFromModule(module)):
            test = case.id().rpartition(".")[2]
            context = getattr(type(case), "ctx", None) or _RESOURCES.get(test)
            if context is not None:  # else a thread pool's
                yield Case(name, test, context, case, reason_for(name, test, context))


def put_under_test(executor: type) -> None:
    """The tests of all start methods make their pools of ``executor`` from now on."""
    util = _module("util")
    for context in START_METHODS:
        getattr(util, f"ProcessPool{context.capitalize()}Mixin").executor_type = executor
    shutdown = _module("test_shutdown")
    original = getattr(shutdown.assert_python_ok, "original", shutdown.assert_python_ok)
    shutdown.assert_python_ok = _with_executor(original, executor)


def _with_executor(original: Callable[..., Any], executor: type) -> Callable[..., Any]:
    """Programs of the tests import the executor from ``concurrent.futures`` by its name: it is put there first.

    ``test_hang_gh83386`` skips ``ProcessPoolExecutor``, and nobody noticed that it does not import ``multiprocessing``.
    """
    name = executor.__name__
    preamble = (
        f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}\n"
        f"import concurrent.futures, multiprocessing\n"
        f"from {executor.__module__} import {name}; concurrent.futures.{name} = {name}\n"
    )

    def assert_python_ok(option: str, program: str) -> Any:
        # Not before the program: what it registers at exit ahead of its imports has to stay ahead of ours.
        opening, rest = program.split("from concurrent.futures import", 1)
        indent = " " * (len(opening) - len(opening.rstrip(" ")))
        inserted = preamble.replace("\n", f"\n{indent}")
        return original(option, f"{opening}{inserted}from concurrent.futures import{rest}")

    assert_python_ok.original = original  # type: ignore[attr-defined]
    return assert_python_ok


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _flat(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for member in suite:
        if isinstance(member, unittest.TestSuite):
            yield from _flat(member)
        else:
            yield member


# ---- and how


def run(chosen: list[Case], stream: TextIO) -> bool:
    """Run them, print what happens, and say whether all passed."""
    suite = unittest.TestSuite(case.case for case in chosen)
    result: Any = unittest.TextTestRunner(stream, verbosity=2, resultclass=Result).run(suite)
    if not result.testsRun:
        stream.write("no test was run\n")
    return result.wasSuccessful() and bool(result.testsRun)


class Result(unittest.TextTestResult):
    """A test that leaves something behind has failed; one that hangs ends the run, with every thread's stack."""

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802  (unittest's name)
        faulthandler.dump_traceback_later(HANG_TIMEOUT_S, exit=True, file=sys.__stderr__ or sys.stderr)
        _module_of_support().environment_altered = False
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        if _module_of_support().environment_altered:
            self.failures.append((test, "it left a child or a thread behind; see the warning above"))
        left = _left_in_shared_memory()
        if left:
            self.failures.append((test, f"it left in /dev/shm: {', '.join(sorted(left))}"))
        faulthandler.cancel_dump_traceback_later()
        super().stopTest(test)


def _module_of_support() -> Any:
    return importlib.import_module("test.support")


def _left_in_shared_memory() -> set[str]:
    """What is there of this process's after the test, and does not go within some seconds."""
    from tests.coordinator.program import shared_memory_of

    deadline = time.monotonic() + LEFT_TIMEOUT_S
    while (left := shared_memory_of(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left

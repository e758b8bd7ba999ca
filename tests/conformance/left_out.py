"""The tests of CPython's that are not run against ``RingPoolExecutor``, each with its reason.

Two reasons are good ones, and there is no third: the test reads a private attribute of ``ProcessPoolExecutor``, or
makes one by name, whatever executor is under test; or it demands that a whole pool break when one worker dies. Whatever
else does not pass is a fault of ours.

A row is a module, a test's name, the reason, and the start methods with which it is left out.
"""

from __future__ import annotations

from typing import NamedTuple

START_METHODS = ("fork", "forkserver", "spawn")
_PROCESSES = "reads the private attribute _processes"


class LeftOut(NamedTuple):
    """A test of CPython's that is not run, and why."""

    module: str
    test: str
    reason: str
    contexts: tuple[str, ...] = START_METHODS
    is_new: bool = False  # older releases of Python that we run on are without it


LEFT_OUT = (
    LeftOut(
        "test_process_pool",
        "test_killed_child",
        f"{_PROCESSES}; demands that the whole pool break when one worker dies",
    ),
    LeftOut(
        "test_process_pool",
        "test_broken_process_pool_traceback",
        f"{_PROCESSES}; demands that the whole pool break when one worker dies",
        is_new=True,
    ),
    LeftOut("test_process_pool", "test_saturation", _PROCESSES),
    LeftOut("test_process_pool", "test_idle_process_reuse_one", _PROCESSES),
    LeftOut("test_process_pool", "test_idle_process_reuse_multiple", _PROCESSES),
    LeftOut("test_process_pool", "test_max_tasks_per_child", _PROCESSES, ("forkserver", "spawn")),
    LeftOut(
        "test_process_pool",
        "test_max_tasks_per_child_defaults_to_spawn_context",
        "reads the private attribute _mp_context",
    ),
    LeftOut("test_shutdown", "test_processes_terminate", _PROCESSES),
    LeftOut(
        "test_shutdown",
        "test_context_manager_shutdown",
        f"makes a ProcessPoolExecutor by name, whatever executor is under test; {_PROCESSES}",
    ),
    LeftOut(
        "test_shutdown",
        "test_del_shutdown",
        "makes a ProcessPoolExecutor by name, whatever executor is under test; reads the private attributes "
        "_processes, _call_queue and _executor_manager_thread",
    ),
    LeftOut(
        "test_shutdown",
        "test_shutdown_no_wait",
        "makes a ProcessPoolExecutor by name, whatever executor is under test; reads the private attributes "
        "_processes, _call_queue and _executor_manager_thread",
    ),
    LeftOut(
        "test_deadlock",
        "test_shutdown_deadlock_pickle",
        "reads the private attribute _executor_manager_thread",
    ),
)


def reason_for(module: str, test: str, context: str) -> str | None:
    """Why this test is not run; None where it is."""
    for row in LEFT_OUT:
        if (row.module, row.test) == (module, test) and context in row.contexts:
            return row.reason
    return None

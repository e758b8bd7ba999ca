"""CPython's own executor tests pass with ``RingPoolExecutor``. Skipped where this interpreter comes without them.

They run in a process of their own, as ``python -m tests.conformance`` does for people: some of them count its threads
and stop its fork server. By default the fork server's, but for those that sleep for seconds; the crash tests run all.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.conformance import left_out, suite
from tests.coordinator.program import ROOT

pytestmark = pytest.mark.skipif(not suite.is_installed(), reason=f"this Python comes without {suite.PACKAGE}")
TIMEOUT_S = 110


def conformance(*arguments: str) -> tuple[int, str]:
    """Exit status and output of ``python -m tests.conformance``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("module", suite.MODULES)
def test_cpythons_tests_pass(module: str) -> None:
    status, output = conformance("--context", "forkserver", "--quick", f"*:{module}.*")
    assert status == 0, output


@pytest.mark.crash
@pytest.mark.parametrize("context", left_out.START_METHODS)
@pytest.mark.parametrize("module", suite.MODULES)
def test_all_of_cpythons_tests_pass(module: str, context: str) -> None:
    status, output = conformance("--context", context, f"*:{module}.*")
    assert status == 0, output


def test_what_is_left_out_is_there() -> None:
    """A row for a test that CPython has renamed, or never had, would say that something is left out which is not."""
    _, output = conformance("--list")
    for row in left_out.LEFT_OUT:
        if row.is_new and f".{row.test} " not in output:
            continue
        for context in row.contexts:
            lines = [line for line in output.splitlines() if line.startswith(f"{context}:{row.module}.")]
            assert any(f".{row.test} " in line and row.reason in line for line in lines), (row.test, context)


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("ForgetfulExecutor", "test_submit_keyword"),
        ("ThreadLeavingExecutor", "it left a child or a thread behind"),
        ("ChildLeavingExecutor", "it left a child or a thread behind"),
        ("MemoryLeavingExecutor", "it left in /dev/shm: rp."),
    ],
)
def test_the_harness_finds_a_fault(fault: str, word: str) -> None:
    status, output = conformance(
        "--executor", f"tests.conformance.faulty:{fault}", "--context", "forkserver", "*test_process_pool*.test_submit*"
    )
    assert status == 1, output
    assert word in output.partition("=====")[2], output


def test_a_pattern_that_matches_nothing_is_no_success() -> None:
    status, output = conformance("no such test")
    assert (status, "no test was run" in output) == (1, True), output

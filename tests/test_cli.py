"""The command line, run as users run it: exit statuses, what is printed where, and what a signal leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ringpool

ROOT = Path(__file__).resolve().parents[1]
TASKS = "tests.tasks_for_cli"
WATCHDOG_S = 60


def start(*words: str | Path, cwd: Path = ROOT, stderr: int = subprocess.PIPE, **more: str) -> subprocess.Popen[str]:
    # What pytest's own parent ignores is not what is tested: a shell's background job ignores SIGINT.
    return subprocess.Popen(
        [sys.executable, "-m", "ringpool", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="surrogateescape",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def run(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    with start(*words, cwd=cwd) as command:
        try:
            out, err = command.communicate(timeout=WATCHDOG_S)
        finally:
            command.kill()
    assert "Traceback" not in err
    return subprocess.CompletedProcess(words, command.returncode, out, err)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        select.select([], [], [], 0.01)


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def segments_of(pid: int) -> set[str]:
    """The files in /dev/shm that process ``pid`` has mapped."""
    return set(re.findall(r"(/dev/shm/\S+)", Path(f"/proc/{pid}/maps").read_text()))


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A directory with the files 0.txt to 7.txt, each with its number."""
    place = tmp_path / "numbers"
    place.mkdir()
    for number in range(8):
        (place / f"{number}.txt").write_text(str(number) * (number + 1))
    return place


# ---- all is well -----------------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"ringpool {ringpool.__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--help"]])
def test_help_is_no_error(words: list[str]) -> None:
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ringpool")


def test_values_are_printed_with_their_paths_and_the_summary_goes_elsewhere(numbers: Path) -> None:
    done = run("run", f"{TASKS}:size", numbers)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"{numbers}/{n}.txt\t{n + 1}" for n in range(8)]
    assert re.fullmatch(r"ringpool: 8 files done, 0 failed, 36 B of input, [\d.]+ s, [\d.]+ files/s\n", done.stderr)


def test_quiet_says_nothing_but_the_values(numbers: Path) -> None:
    done = run("run", f"{TASKS}:nothing", numbers / "3.txt", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{numbers}/3.txt\t\n", "")


def test_outputs_appear_where_the_pattern_says_and_nothing_is_printed(numbers: Path, tmp_path: Path) -> None:
    done = run("run", f"{TASKS}:copy", numbers, "--out", f"{tmp_path}/out/{{stem}}/{{name}}", "--durability", "none")
    assert (done.returncode, done.stdout) == (0, "")
    for number in range(8):
        copy = tmp_path / f"out/{number}/{number}.txt"
        assert copy.read_text() == (numbers / f"{number}.txt").read_text()


def test_outputs_below_the_source_are_not_inputs_of_the_next_run(numbers: Path) -> None:
    for _ in range(2):
        done = run("run", f"{TASKS}:copy", ".", "--out", "copies/{relpath}", cwd=numbers_as_cwd(numbers))
        assert done.returncode == 0
        assert "8 files done" in done.stderr
    assert sorted(os.listdir(numbers / "copies")) == sorted([".ringpool", *(f"{n}.txt" for n in range(8))])


def numbers_as_cwd(numbers: Path) -> Path:
    """The directory, with the task functions beside the numbers where a path cannot lead into the repository."""
    (numbers / ".ringpool").mkdir(exist_ok=True)
    return numbers

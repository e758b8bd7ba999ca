"""A job whose coordinator and workers are SIGKILLed at random moments, and that is run again each time.

every output is whole and right; the ledger says what the disk says; each input was committed once
nobody is alive soon after a kill, nothing is left in /dev/shm at the end
"""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tests.coordinator.program import ROOT, WATCHDOG_S
from tests.jobs.arrivals import Arrivals

from ringpool.coordinator.ledger import Ledger, State
from ringpool.shm import segment

DIRECTORIES = 20


def make_inputs(directory: Path, n: int, first: int = 0) -> dict[Path, bytes]:
    contents: dict[Path, bytes] = {}
    for i in range(first, first + n):
        path = directory / f"d{i % DIRECTORIES:02}" / f"{i:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        contents[path] = random.randbytes(random.randrange(2000))
        path.write_bytes(contents[path])
    return contents


def workers_of(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(pid).children(recursive=True) if is_worker(child)]
    return []


def is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name().startswith("ringpool-w")
    return False


def is_of(file: str, pids: set[int]) -> bool:
    """Whether a file in /dev/shm is of one of those processes; other tests have theirs."""
    belongs_to = segment.owner_of(file)
    return belongs_to is not None and belongs_to.pid in pids


class Killer(threading.Thread):
    """Kills workers of process ``pid`` at random moments, until told to stop or ``n_left`` are killed."""

    def __init__(self, n_left: int) -> None:
        super().__init__()
        self.n_left = n_left
        self.pid = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while self.n_left and not self.ended.wait(random.expovariate(1 / 0.01)):
            victims = workers_of(self.pid) if self.pid else []
            if victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    random.choice(victims).kill()  # pid and start time are looked at again
                    self.n_left -= 1


def start(source: Path, target: Path, directory: Path, durability: str) -> subprocess.Popen[str]:
    words = [str(source), str(target), durability, "compress", str(directory)]
    command = [sys.executable, "-m", "tests.jobs.job_program", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def outputs_in(target: Path) -> int:
    return sum(len(files) for at, _, files in os.walk(target) if ".ringpool" not in at)


def kill_at_random(program: subprocess.Popen[str], target: Path, n_before: int, n_more: int) -> bool:
    """SIGKILL it when about so many more outputs are there; whether it still ran."""
    deadline = time.monotonic() + WATCHDOG_S
    wanted = n_before + random.randrange(1, max(2, n_more))
    while program.poll() is None and outputs_in(target) < wanted:
        assert time.monotonic() < deadline, "no output appears"
        time.sleep(random.uniform(0, 0.02))
    workers = workers_of(program.pid)
    alive = program.poll() is None
    program.send_signal(signal.SIGKILL)
    program.wait(WATCHDOG_S)
    _, alive_after = psutil.wait_procs(workers, WATCHDOG_S)
    assert not alive_after, "a worker outlives its coordinator"
    return alive


@pytest.mark.parametrize(
    ("n_files", "n_coordinators", "n_workers", "durability", "elsewhere"),
    [
        (600, 3, 10, "full", False),
        (600, 3, 10, "atomic", False),
        (600, 3, 10, "full", True),  # the ledger is on another file system than the outputs
        pytest.param(20_000, 20, 200, "full", False, marks=[pytest.mark.crash, pytest.mark.timeout(1800)]),
        pytest.param(20_000, 20, 200, "atomic", False, marks=[pytest.mark.crash, pytest.mark.timeout(1800)]),
    ],
)
def test_a_job_that_is_killed_again_and_again(
    tmp_path: Path,
    other_file_system: Path,
    n_files: int,
    n_coordinators: int,
    n_workers: int,
    durability: str,
    elsewhere: bool,
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    directory = other_file_system / "job" if elsewhere else target
    contents = make_inputs(source, n_files)
    for number in range(DIRECTORIES):
        (target / f"d{number:02}").mkdir(parents=True)
    killer = Killer(n_workers)
    killer.start()
    n_killed = 0
    pids: set[int] = set()
    try:
        with Arrivals(sorted(target.iterdir())) as arrivals:
            while True:
                program = start(source, target, directory, durability)
                killer.pid = program.pid
                pids.add(program.pid)
                if n_killed < n_coordinators:
                    was_killed = kill_at_random(program, target, outputs_in(target), n_files // n_coordinators)
                    program.communicate(timeout=WATCHDOG_S)
                    n_killed += was_killed
                    if not was_killed:  # it was faster, and is done: the next one is to have something to do, too
                        contents |= make_inputs(source, n_files // n_coordinators, len(contents))
                    continue
                said, _ = program.communicate(timeout=900)
                break
    finally:
        killer.ended.set()
        killer.join()
    assert program.returncode == 0, said
    assert said.split()[0] == "ended"
    assert not arrivals.overflowed
    assert [name for name in os.listdir(segment.SHM_DIRECTORY) if is_of(name, pids)] == []
    assert n_killed == n_coordinators
    assert killer.n_left == 0 or n_files < 20_000, "the job ended before so many workers could be killed"
    check_outputs(contents, source, target, arrivals)
    check_ledger(contents, source, target, directory)
    assert not any((target / ".ringpool" / "staging").glob("*/*"))


def check_outputs(contents: dict[Path, bytes], source: Path, target: Path, arrivals: Arrivals) -> None:
    expected = {target / f"{path.relative_to(source)}.gz": content for path, content in contents.items()}
    found = {Path(at, name) for at, _, files in os.walk(target) if ".ringpool" not in at for name in files}
    assert found == set(expected)
    for path, content in expected.items():
        assert gzip.decompress(path.read_bytes()) == content, path
    assert arrivals.counts == dict.fromkeys(expected, 1)


def check_ledger(contents: dict[Path, bytes], source: Path, target: Path, directory: Path) -> None:
    ledger = Ledger.open(directory, create=False, read_only=True)
    try:
        assert ledger.check() == []
        [job] = ledger.jobs()
        rows = {Path(os.fsdecode(row.input)): row for row in ledger.rows(job.id)}
        assert set(rows) == set(contents)
        for path, row in rows.items():
            status = path.stat()
            assert row.state == State.DONE
            assert (row.size, row.mtime_ns, row.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)
            assert Path(os.fsdecode(row.output)) == target / f"{path.relative_to(source)}.gz"
    finally:
        ledger.close()
    assert not any((directory / ".ringpool" / "staging").glob("*/*"))

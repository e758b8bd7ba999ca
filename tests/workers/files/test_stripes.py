"""The lock files that a process has open: bounded, found anew when they vanish, never lost or kept by a fork."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files.child import Child, listen, say
from tests.workers.files.child_locks import (
    hold,
    in_a_thread,
    is_free,
    lock_file,
    try_it,
    until,
    wait_beside_a_fork,
    waiting,
)

from ringpool.errors import LockTimeoutError
from ringpool.workers.files import turns
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.oslayer import intercepted


def open_lock_files() -> list[str]:
    found: list[str] = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return [path for path in found if "/.ringpool/locks/" in path]


def names_on_other_stripes(base: Path, lock: PathLock, count: int) -> list[PathLock]:
    """Locks on ``count`` stripes, all different, none that of ``lock``."""
    found: dict[int, PathLock] = {}
    n = 0
    while len(found) < count:
        other = PathLock(base / f"other{n}", base=base)
        n += 1
        if other.stripe != lock.stripe:
            found.setdefault(other.stripe, other)
    return list(found.values())


# ---- lock files that vanish ------------------------------------------------------------------------------------------


def test_no_lock_file_is_ever_unlinked(tmp_path: Path) -> None:
    seen: list[str] = []

    def record(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(name)
        return call(*args, **kwargs)

    lock = PathLock(tmp_path / "a")
    with intercepted(record):
        with lock:
            pass
        inode = lock_file(tmp_path, lock).stat().st_ino
        with lock:
            pass
    assert "unlink" not in seen
    assert "rename" not in seen
    assert lock_file(tmp_path, lock).stat().st_ino == inode


@pytest.mark.parametrize("move", [False, True])
def test_after_somebody_removed_the_lock_files_all_meet_on_new_ones(tmp_path: Path, move: bool) -> None:
    lock = PathLock(tmp_path / "a")
    with lock:
        pass
    if move:
        (tmp_path / ".ringpool").rename(tmp_path / "away")
    else:
        shutil.rmtree(tmp_path / ".ringpool")
    with lock, Child(try_it, tmp_path / "a") as child:
        child.wait_for("taken by somebody else")


def test_a_waiter_on_a_removed_lock_file_does_not_hold_it_beside_a_newcomer(tmp_path: Path) -> None:
    path = lock_file(tmp_path, PathLock(tmp_path / "a"))
    overlaps: list[bool] = []

    def wait() -> None:
        with PathLock(tmp_path / "a", timeout_s=60):
            overlaps.append((tmp_path / "mark").exists())

    with Child(hold, tmp_path / "a") as old:
        old.wait_for("held")
        with in_a_thread(wait):
            until(lambda: str(path) in open_lock_files())
            shutil.rmtree(tmp_path / ".ringpool")
            with Child(hold, tmp_path / "a") as new:
                new.wait_for("held")
                (tmp_path / "mark").touch()
                old.answer()
                old.wait_for("released")
                until(lambda: overlaps or str(path) in open_lock_files())  # it has left the removed file
                (tmp_path / "mark").unlink()
                new.answer()
                new.wait_for("released")
    assert overlaps == [False]


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(turns, "DESCRIPTORS_MAX", 64)
    return 64


def test_descriptors_are_bounded_and_one_that_is_held_stays_open(tmp_path: Path, few_descriptors: int) -> None:
    lock = PathLock(tmp_path / "a", base=tmp_path)
    with lock:
        for other in names_on_other_stripes(tmp_path, lock, 150):
            with other:
                pass
        assert sum(path.startswith(str(tmp_path)) for path in open_lock_files()) <= few_descriptors
        assert not is_free(lock_file(tmp_path, lock))
    assert is_free(lock_file(tmp_path, lock))


def test_more_locks_than_descriptors_may_be_held(tmp_path: Path, few_descriptors: int) -> None:
    lock = PathLock(tmp_path / "a", base=tmp_path)
    others = names_on_other_stripes(tmp_path, lock, few_descriptors + 10)
    for other in others:
        other.acquire()
    try:
        assert not any(is_free(lock_file(tmp_path, other)) for other in others)
    finally:
        for other in others:
            other.release()
    with lock:
        pass
    assert sum(path.startswith(str(tmp_path)) for path in open_lock_files()) <= few_descriptors


# ---- forks -----------------------------------------------------------------------------------------------------------


def test_a_forked_child_that_leaves_the_block_does_not_free_its_parents_lock(tmp_path: Path) -> None:
    with Child(fork_inside, tmp_path / "a") as child:
        child.wait_for("the fork has left")
        with pytest.raises(LockTimeoutError):
            PathLock(tmp_path / "a", timeout_s=0).acquire()
        child.answer()
        child.wait_for("released")
        with PathLock(tmp_path / "a", timeout_s=0):
            pass


def fork_inside(path: str) -> None:
    pid = -1
    with PathLock(path):
        with PathLock(path):
            pid = os.fork()
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
            say("the fork has left")
            listen()
    if pid == 0:
        try:
            PathLock(path, timeout_s=0).acquire()
        except LockTimeoutError:
            os._exit(0)  # its parent has it
        os._exit(1)
    say("released")


def test_a_forked_child_that_lives_on_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    with Child(fork_and_release, tmp_path / "a") as child:
        child.wait_for("released")
        with PathLock(tmp_path / "a", timeout_s=0):
            pass
        child.answer()
        child.succeed()


def fork_and_release(path: str) -> None:
    reader, writer = os.pipe()
    lock = PathLock(path)
    lock.acquire()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)  # until its parent is gone or says so
        os._exit(0)
    lock.release()
    say("released")
    listen()
    os.write(writer, b".")
    assert os.waitpid(pid, 0)[1] == 0


def test_a_killed_holder_frees_it_though_a_fork_of_it_lives(tmp_path: Path) -> None:
    with Child(fork_and_wait, tmp_path / "a") as child:
        child.wait_for("forked")
        child.kill()
        with PathLock(tmp_path / "a", timeout_s=0):
            pass  # the fork ends when its standard input does, with this block


def fork_and_wait(path: str) -> None:
    with PathLock(path):
        if os.fork() == 0:
            say("forked")
            listen()
            os._exit(0)
        os.wait()


def test_a_killed_waiter_has_no_place_though_a_fork_of_it_lives(tmp_path: Path) -> None:
    with PathLock(tmp_path / "a") as lock, Child(wait_beside_a_fork, tmp_path / "a") as child:
        child.wait_for("forked")
        until(lambda: waiting(lock_file(tmp_path, lock)) == 1)
        child.kill()
        assert waiting(lock_file(tmp_path, lock)) == 0


def test_forks_beside_busy_threads_leave_no_descriptor_and_no_lock_in_the_child(tmp_path: Path) -> None:
    with Child(fork_beside_threads, tmp_path) as child:
        child.succeed()


def fork_beside_threads(directory: str) -> None:
    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: forking beside threads
    stop = threading.Event()

    def turn(name: str) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            with PathLock(Path(directory, f"{name}{n % 500}"), base=directory):
                pass

    with in_a_thread(lambda: turn("a")), in_a_thread(lambda: turn("b")):
        try:
            for _ in range(40):
                pid = os.fork()
                if pid == 0:
                    left = open_lock_files()
                    with PathLock(Path(directory, "a1"), base=directory, timeout_s=60):
                        pass
                    os._exit(1 if left else 0)
                assert os.waitpid(pid, 0)[1] == 0
        finally:
            stop.set()


def test_a_program_that_the_holder_starts_does_not_inherit_it(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    with lock:
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert is_free(lock_file(tmp_path, lock))
    finally:
        program.communicate(b"\n")


# ---- few descriptors, and bases that move ----------------------------------------------------------------------------


def test_with_few_descriptors_few_lock_files_stay_open(tmp_path: Path) -> None:
    with Child(lock_with_few_descriptors, tmp_path) as child:
        child.wait_for("15 and locked")


def lock_with_few_descriptors(directory: str) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    for n in range(300):
        with PathLock(f"{directory}/{n}"):
            pass
    n_open = turns.lock_files_open()
    files: list[Any] = []
    with suppress(OSError):
        while True:
            files.append(open("/dev/null", "rb"))  # noqa: SIM115
    with PathLock(f"{directory}/{'x' * 9}"), PathLock(f"{directory}/{'y' * 9}"):
        pass
    say(f"{n_open} and locked")


def test_who_waits_while_a_base_is_made_further_out_meets_the_others_there(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a"
    held, may_go = threading.Event(), threading.Event()

    def wait_for_it() -> None:
        with PathLock(path, timeout_s=60):
            held.set()
            assert may_go.wait(60)

    lock = PathLock(path)
    lock.acquire()
    with in_a_thread(wait_for_it):
        until(lambda: waiting(lock_file(tmp_path / "in", lock)))
        (tmp_path / ".ringpool").mkdir()
        lock.release()
        try:
            assert held.wait(60)
            assert not is_free(lock_file(tmp_path, lock))
        finally:
            may_go.set()


def test_a_renamed_base_is_locked_again_by_who_holds_it(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    lock = PathLock(tmp_path / "x/a")
    with lock:
        (tmp_path / "x").rename(tmp_path / "y")
        (tmp_path / "x").mkdir()
        for name in map(str, range(2000)):  # one on the stripe that is held, so that its file is found to be gone
            with PathLock(tmp_path / "x" / name, base=tmp_path / "x"):
                pass
        with PathLock(tmp_path / "y/a", timeout_s=0):
            pass

"""The lock: exact under contention, and never lost, whether its owner is killed or interrupted."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.opcodes import Bytecodes, interrupt_before
from tests.workers.files.child import Child, listen, say

from ringpool.errors import LockBrokenError
from ringpool.shm import lock
from ringpool.shm.lock import RobustLock

COUNTER = 128  # where the tests count, in the same mapping as the mutex


def map_file(path: Path | str) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), mmap.PAGESIZE)


class Mutex:
    """A lock in a mapped file, and how often it was redone."""

    def __init__(self, path: Path | str) -> None:
        self.mapping = map_file(path)
        self.n_redone = 0
        self.lock = RobustLock(self.mapping, 0, self.redo)

    def redo(self) -> None:
        self.n_redone += 1

    def close(self) -> None:
        self.lock.detach()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A page with a fresh mutex at its start."""
    path = tmp_path / "mutex"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with map_file(path) as mapping:
        _initialise(mapping)
    return path


def _initialise(mapping: mmap.mmap) -> None:
    lock.initialise_mutex(mapping, 0)  # in a frame of its own: ctypes lets go of the mapping with it


@pytest.fixture
def mutex(file: Path) -> Iterator[Mutex]:
    mutex = Mutex(file)
    yield mutex
    mutex.lock.release_if_held()
    mutex.close()


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What ``function`` returned or raised in a thread of its own."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


def is_free(mutex: Mutex) -> bool:
    """Whether another thread could take it now."""

    def take() -> bool:
        if mutex.lock.try_call(mutex.lock.mutex):
            return False
        mutex.lock.release()
        return True

    return in_a_thread(take)


# ---- what children do ------------------------------------------------------------------------------------------------


def hold(path: str) -> None:
    mutex = Mutex(path)
    mutex.lock.acquire()
    say("held")
    listen()
    mutex.lock.release()
    say("released")
    listen()


def wait_for_it(path: str) -> None:
    mutex = Mutex(path)
    say("waiting")
    mutex.lock.acquire()
    say("held")
    listen()


def end_holding(path: str) -> None:
    mutex = Mutex(path)
    mutex.lock.acquire()
    os._exit(0)


def count(path: str, n: str) -> None:
    mutex = Mutex(path)
    words = memoryview(mutex.mapping).cast("Q")
    say("ready")
    listen()
    for _ in range(int(n)):
        mutex.lock.acquire()
        words[COUNTER >> 3] += 1
        mutex.lock.release()
    say(f"redone {mutex.n_redone}")


# ---- the usual -------------------------------------------------------------------------------------------------------


def test_what_is_acquired_is_held_until_it_is_released(mutex: Mutex) -> None:
    assert not mutex.lock.held_by_this_thread
    mutex.lock.acquire()
    assert mutex.lock.held_by_this_thread
    assert not is_free(mutex)
    mutex.lock.release()
    assert not mutex.lock.held_by_this_thread
    assert is_free(mutex)
    assert mutex.n_redone == 0


def test_it_is_held_by_the_thread_and_not_by_the_process(mutex: Mutex) -> None:
    mutex.lock.acquire()
    assert in_a_thread(lambda: mutex.lock.held_by_this_thread) is False


def test_four_processes_count_exactly(file: Path, mutex: Mutex) -> None:
    n = 5000
    children = [Child(count, file, str(n)) for _ in range(4)]
    try:
        for child in children:
            child.wait_for("ready")
        for child in children:
            child.answer()
        for child in children:
            child.wait_for("redone 0")
            child.succeed()
    finally:
        for child in children:
            child.__exit__(None, None, None)
    assert int.from_bytes(mutex.mapping[COUNTER : COUNTER + 8], "little") == 4 * n


# ---- the owner dies --------------------------------------------------------------------------------------------------


def test_a_killed_owners_lock_goes_to_the_next_who_redoes_once(file: Path, mutex: Mutex) -> None:
    for _ in range(3):
        before = mutex.n_redone
        with Child(hold, file) as child:
            child.wait_for("held")
            assert not is_free(mutex)
            child.kill()
        mutex.lock.acquire()
        assert mutex.lock.held_by_this_thread
        assert mutex.n_redone == before + 1
        mutex.lock.release()
        mutex.lock.acquire()  # consistent again: nothing is left to be redone
        mutex.lock.release()
        assert mutex.n_redone == before + 1


def test_one_who_waits_gets_it_when_the_owner_is_killed(file: Path) -> None:
    with Child(hold, file) as owner:
        owner.wait_for("held")
        with Child(wait_for_it, file) as waiter:
            waiter.wait_for("waiting")
            owner.kill()
            waiter.wait_for("held")


def test_a_killed_waiter_harms_nobody(file: Path, mutex: Mutex) -> None:
    mutex.lock.acquire()
    with Child(wait_for_it, file) as waiter, Child(wait_for_it, file) as other:
        waiter.wait_for("waiting")
        other.wait_for("waiting")
        waiter.kill()
        mutex.lock.release()
        other.wait_for("held")
    mutex.lock.acquire()


def test_an_owner_that_ends_by_itself_counts_as_dead(file: Path, mutex: Mutex) -> None:
    with Child(end_holding, file) as child:
        child.succeed()
    mutex.lock.acquire()
    assert mutex.n_redone == 1


@pytest.mark.parametrize("how", ["acquire", "acquire_within", "run"])
def test_what_was_unlocked_without_being_mended_is_refused(how: str, file: Path) -> None:
    with Child(end_holding, file) as child:
        child.succeed()
    with Child(unlock_unmended, file, how) as child:  # not here: what goes wrong then is a segmentation fault
        child.wait_for(f"refused with {errno.ENOTRECOVERABLE}: it cannot be acquired")
        child.succeed()


def unlock_unmended(path: str, how: str) -> None:
    mutex = Mutex(path)
    assert mutex.lock.try_call(mutex.lock.mutex) == errno.EOWNERDEAD
    mutex.lock.release()
    calls: dict[str, Callable[[], object]] = {
        "acquire": mutex.lock.acquire,
        "acquire_within": lambda: mutex.lock.acquire_within(0.01),
        "run": lambda: mutex.lock.run(lambda: None),
    }
    with pytest.raises(LockBrokenError) as caught:
        calls[how]()
    say(f"refused with {caught.value.error}: {caught.value.reason}")


# ---- the owner is interrupted ----------------------------------------------------------------------------------------


def test_a_section_that_an_exception_left_is_redone_by_the_next_acquire(mutex: Mutex) -> None:
    with pytest.raises(KeyboardInterrupt):
        _leave_a_section(mutex)
    assert mutex.lock.held_by_this_thread
    mutex.lock.acquire()
    assert mutex.n_redone == 1
    mutex.lock.release()
    assert is_free(mutex)


def _leave_a_section(mutex: Mutex) -> None:
    mutex.lock.acquire()
    raise KeyboardInterrupt


def test_release_if_held_redoes_and_releases(mutex: Mutex) -> None:
    mutex.lock.acquire()
    mutex.lock.release_if_held()
    assert mutex.n_redone == 1
    assert is_free(mutex)


def test_release_if_held_leaves_alone_what_is_free_or_anothers(mutex: Mutex) -> None:
    mutex.lock.release_if_held()
    assert mutex.n_redone == 0
    mutex.lock.acquire()
    in_a_thread(mutex.lock.release_if_held)
    assert mutex.lock.held_by_this_thread
    assert mutex.n_redone == 0


def test_an_heir_that_is_interrupted_at_any_bytecode_leaves_a_lock_that_works(file: Path, mutex: Mutex) -> None:
    """The kernel hands the lock over, and Ctrl-C arrives before it is mended: nobody may lose it for that."""
    at, interrupted = 0, True
    with Child(die_holding_again_and_again, file) as child:
        while interrupted:
            at += 1
            child.answer()
            child.wait_for("died")
            interrupted = False
            try:
                with Bytecodes(interrupt_before(at)):
                    mutex.lock.acquire()
            except KeyboardInterrupt:
                interrupted = True
            mutex.lock.acquire()
            assert mutex.lock.held_by_this_thread
            mutex.lock.release()
            assert is_free(mutex), f"interrupted before bytecode {at}"
            assert mutex.n_redone >= at
    assert at > 20


def test_a_section_that_is_interrupted_at_any_bytecode_lets_go_of_the_lock(mutex: Mutex) -> None:
    at, interrupted = 0, True
    while interrupted:
        at += 1
        interrupted = False
        try:
            with Bytecodes(interrupt_before(at)):
                assert mutex.lock.run(lambda: 7) == 7
        except KeyboardInterrupt:
            interrupted = True
        assert is_free(mutex), f"interrupted before bytecode {at}"
    assert at > 20


def test_a_section_gives_what_it_returns_and_lets_go_when_it_raises(mutex: Mutex) -> None:
    assert mutex.lock.run(lambda: mutex.lock.held_by_this_thread) is True
    assert is_free(mutex)
    with pytest.raises(ZeroDivisionError):
        mutex.lock.run(lambda: 1 / 0)
    assert is_free(mutex)
    assert mutex.n_redone == 1  # what it may have committed before it raised


def die_holding_again_and_again(path: str) -> None:
    """At each word of the test: a thread's process takes the lock and ends."""
    mutex = Mutex(path)
    while True:
        listen()
        pid = os.fork()
        if pid == 0:
            mutex.lock.acquire()
            os._exit(0)
        os.waitpid(pid, 0)
        say("died")


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_acquire_within_gives_up_on_a_lock_that_a_living_process_holds(file: Path, mutex: Mutex) -> None:
    with Child(hold, file) as child:
        child.wait_for("held")
        with pytest.raises(LockBrokenError, match=f"thread {child.pid} does not let it go") as caught:
            mutex.lock.acquire_within(0.01)
        assert caught.value.error == errno.EBUSY
        child.answer()
        child.wait_for("released")
        mutex.lock.acquire_within(0.01)
        assert mutex.lock.held_by_this_thread
        assert mutex.n_redone == 0


def test_acquire_within_takes_over_from_the_dead(file: Path, mutex: Mutex) -> None:
    with Child(hold, file) as child:
        child.wait_for("held")
        child.kill()
    mutex.lock.acquire_within(0.0)
    assert mutex.n_redone == 1


def test_an_old_c_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.os, "confstr", lambda _name: "glibc 2.24")
    with mmap.mmap(-1, mmap.PAGESIZE) as mapping, pytest.raises(LockBrokenError, match=r"need glibc 2\.25 or newer"):
        lock.initialise_mutex(mapping, 0)


@pytest.mark.parametrize(
    ("libc", "version"),
    [("glibc 2.36", (2, 36)), ("glibc 2.40.9", (2, 40)), ("", (0, 0)), (None, (0, 0)), ("musl 1.2", (0, 0))],
)
def test_the_c_librarys_version_is_read(
    libc: str | None, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.os, "confstr", lambda _name: libc)
    assert lock.glibc_version() == version


def test_a_c_library_that_does_not_know_the_question_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.os, "confstr", lambda _name: os.sysconf("no such name"))
    assert lock.glibc_version() == (0, 0)


def test_the_kind_tells_a_robust_shared_mutex_from_other_bytes(mutex: Mutex) -> None:
    assert lock.mutex_kind(mutex.mapping, 0) == lock.expected_kind()
    assert lock.mutex_kind(mutex.mapping, 512) != lock.expected_kind()  # zeros: what a plain mutex is made of


def test_a_mutex_stays_within_its_bytes() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as mapping:
        mapping[:] = b"\xaa" * mmap.PAGESIZE
        _initialise(mapping)
        assert mapping[lock.MUTEX_BYTES :] == b"\xaa" * (mmap.PAGESIZE - lock.MUTEX_BYTES)

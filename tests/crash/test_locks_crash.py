"""Path locks, killed and interrupted everywhere: nothing stays held, nothing stays queued, nobody holds beside another.

killed        before every system call of taking, awaiting and releasing a lock; and at random, eight at work
interrupted   at every place where Python looks for signals, by raising there; and by a timer, at random
"""

from __future__ import annotations

import mmap
import opcode
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from operator import gt
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.crash.harness import Child
from tests.workers.files.child_locks import PATIENCE_S, in_a_thread, is_free, lock_file, until, waiting

from ringpool.errors import LockTimeoutError
from ringpool.workers.files import lockfiles, locks, recovery, stripes, tickets, turns
from ringpool.workers.files.locks import LockSet, Mode, PathLock
from ringpool.workers.files.oslayer import intercepted

OURS = {module.__file__ for module in (lockfiles, locks, stripes, tickets, turns)}
CALLS_MAX = 200
PLACES_MAX = 2000


def left(directory: Path) -> list[str]:
    """What is still held or awaited in ``directory``, by anybody."""
    found: list[str] = []
    for file in (directory / ".ringpool/locks").glob("*.lock"):
        if not is_free(file):
            found.append(f"{file.name} is held")
        if waiting(file):
            found.append(f"{file.name} is awaited")
    return found


# ---- killed before a system call -------------------------------------------------------------------------------------


def kill_before(number: int) -> Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]:
    count = 0

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return around


def take_and_release(path: Path, mode: Mode, number: int) -> None:
    with intercepted(kill_before(number)), PathLock(path, mode, timeout_s=PATIENCE_S):
        pass


def take_a_set(path: Path, mode: Mode, number: int) -> None:
    paths = [path, path.with_name("b"), path.with_name("c")]
    with intercepted(kill_before(number)), LockSet(paths, mode, timeout_s=PATIENCE_S) as taken:
        if mode == "exclusive":
            taken.mark(b"mark")
            taken.clear_marks()


@pytest.mark.parametrize("mode", ["exclusive", "shared"])
@pytest.mark.parametrize("action", [take_and_release, take_a_set])
def test_killed_before_any_call_nothing_is_left_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[Path, Mode, int], None], mode: Mode
) -> None:
    monkeypatch.setattr(recovery, "recover_marked", lambda root, text, deadline_s: None)
    for number in range(1, CALLS_MAX):
        child = Child(partial(action, tmp_path / "a", mode, number))
        survived = child.wait() == 0
        assert left(tmp_path) == []
        with LockSet([tmp_path / "a", tmp_path / "b"], timeout_s=PATIENCE_S):
            pass
        if survived:
            assert number > 10, "it makes hardly any calls: what was to be killed?"
            return
    raise AssertionError("it never came to the end")


@pytest.mark.parametrize("mode", ["exclusive", "shared"])
def test_a_waiter_killed_before_any_call_leaves_its_place_to_who_is_behind(tmp_path: Path, mode: Mode) -> None:
    lock = PathLock(tmp_path / "a", timeout_s=PATIENCE_S)
    with lock:
        pass
    file = lock_file(tmp_path, lock)
    for number in range(1, CALLS_MAX):
        with ExitStack() as stack:
            with lock:
                child = Child(partial(take_and_release, tmp_path / "a", mode, number))
                until(lambda: waiting(file) == 1 or child.ends_within(0))  # noqa: B023
                behind = Child(partial(take_and_release, tmp_path / "a", "exclusive", 0))
                until(lambda: waiting(file) == 2 or child.ends_within(0))  # noqa: B023
                stack.callback(behind.wait)
            survived = child.wait() == 0
            assert behind.wait() == 0
        assert left(tmp_path) == []
        if survived:
            assert number > 15, "it makes hardly any calls: did it wait?"
            return
    raise AssertionError("it never came to the end")


# ---- killed at random ------------------------------------------------------------------------------------------------


class Arena:
    """Memory that all share: who is inside, each in cells of its own.

    Those of a process that is to be killed are void from before the kill until they have been emptied: so who looks,
    looks whether they are void first.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        cells = memoryview(self._memory).cast("Q")
        self.void, self.reads, self.writes, self.grants, self.wrong = (
            cells[at : at + workers] for at in range(0, 5 * workers, workers)
        )

    def _another(self, index: int, mode: Mode) -> bool:
        """Whether somebody else is inside who must not be there beside ``index``."""
        for i in range(self.workers):
            is_valid = not self.void[i]
            if i != index and is_valid and (self.writes[i] or (mode == "exclusive" and self.reads[i])):
                return True
        return False

    def work(self, path: Path, index: int) -> None:
        """Take the lock in turns, and see whether somebody else is inside."""
        lots = random.Random(os.getpid())
        while True:
            mode: Mode = "shared" if lots.random() < 0.5 else "exclusive"
            with PathLock(path, mode, timeout_s=PATIENCE_S):
                mine = self.writes if mode == "exclusive" else self.reads
                mine[index] = 1
                self.wrong[index] |= self._another(index, mode)
                time.sleep(lots.random() * 1e-3)  # inside, so that others come, and kills
                self.wrong[index] |= self._another(index, mode)
                mine[index] = 0
                self.grants[index] += 1


@pytest.mark.parametrize(
    "kills", [pytest.param(40, id="sample"), pytest.param(600, id="full", marks=(pytest.mark.crash,))]
)
def test_killed_at_random_none_ever_holds_it_beside_another_and_the_others_go_on(tmp_path: Path, kills: int) -> None:
    arena = Arena(workers=6)
    path = tmp_path / "a"
    with PathLock(path):
        pass
    children = [Child(partial(arena.work, path, index), life_s=300) for index in range(arena.workers)]
    try:
        for _ in range(kills):
            index = random.randrange(arena.workers)
            time.sleep(random.random() * 0.01)
            arena.void[index] = 1
            children[index].kill()
            children[index].wait()
            before = sum(arena.grants)
            until(lambda: sum(arena.grants) > before + 2)  # noqa: B023
            arena.reads[index] = arena.writes[index] = 0
            arena.void[index] = 0
            children[index] = Child(partial(arena.work, path, index), life_s=300)
            assert not any(arena.wrong), "two were inside"
        granted = list(arena.grants)
        until(lambda: all(map(gt, arena.grants, granted)))
    finally:
        for child in children:
            if child.exitcode is None:
                child.kill()
                child.wait()
    assert left(tmp_path) == []


# ---- interrupted -----------------------------------------------------------------------------------------------------

NOT_YET_BEGUN = ("release", "_release", "_let_go_surely")  # at their start


class Interrupt:
    """``KeyboardInterrupt`` at the ``number``-th place of this thread's lock code where Python looks for signals.

    That is after a call of a C function, at the start of a function in Python, and at the end of a loop's body. At the
    start of ``release`` nothing has been done yet, and nothing can be done about it: it is left out.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        sys.setprofile(self._profile)
        return self

    def _profile(self, frame: FrameType, event: str, _argument: object) -> None:
        if frame.f_code.co_filename not in OURS:
            return
        if event == "c_return" or (event == "call" and frame.f_code.co_name not in NOT_YET_BEGUN):
            self._place()

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in OURS:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and opcode.opname[frame.f_code.co_code[frame.f_lasti]] == "JUMP_BACKWARD":
            self._place()
        return self._trace

    def _place(self) -> None:
        self.count += 1
        if self.count == self.number:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)


def alone(path: Path) -> None:
    use(PathLock(path))


def twice(path: Path) -> None:
    lock, again = PathLock(path), PathLock(path)
    try:
        lock.acquire()
        use(again)
        lock.release()
    finally:
        let_go(lock)


def shared(path: Path) -> None:
    with in_a_thread(partial(hold_until_awaited, path, "shared", for_s=0.002)):
        use(PathLock(path, "shared"))


def waits(path: Path) -> None:
    held = threading.Event()
    with in_a_thread(partial(hold_until_awaited, path, "exclusive", for_s=0.05, held=held)):
        held.wait()
        use(PathLock(path, timeout_s=PATIENCE_S))


def gives_up(path: Path) -> None:
    held = threading.Event()
    with in_a_thread(partial(hold_until_awaited, path, "exclusive", for_s=0.03, held=held, leave=False)):
        held.wait()
        with suppress(LockTimeoutError):
            use(PathLock(path, timeout_s=0.005))


def a_set(path: Path) -> None:
    taken = LockSet([path, path.with_name("b")])
    try:
        taken.acquire()
        taken.release()
    finally:
        assert taken.held == []


def recovers(path: Path) -> None:
    for mode in ("exclusive", "shared"):
        lock_file(path.parent, PathLock(path)).write_bytes(b"mark")
        use(PathLock(path, mode))


def hold_until_awaited(
    path: Path, mode: Mode, *, for_s: float, held: threading.Event | None = None, leave: bool = True
) -> None:
    """Hold it until somebody waits, ``for_s`` at most; or for so long."""
    with PathLock(path, mode) as lock:
        if held is not None:
            held.set()
        file = lock_file(path.parent, lock)
        deadline = time.monotonic() + for_s
        while time.monotonic() < deadline and not (leave and waiting(file)):
            time.sleep(0.002)


def use(lock: PathLock) -> None:
    """Take and release it. Interrupted, it is not had, or not any more."""
    try:
        lock.acquire()
        lock.release()
    finally:
        assert lock.turns == []


def let_go(lock: PathLock) -> None:
    while lock.turns:
        lock.release()


@pytest.mark.skipif(
    sys.version_info[:2] == (3, 12),
    reason="CPython 3.12.1 dies of SIGSEGV in its collector after a trace function has raised in a generator; "
    "interrupts by real signals are tested below",
)
@pytest.mark.parametrize("stride", [pytest.param(4, id="sample"), pytest.param(1, id="full", marks=pytest.mark.crash)])
@pytest.mark.parametrize("action", [alone, twice, shared, waits, gives_up, a_set, recovers])
def test_interrupted_anywhere_nothing_is_held_that_nobody_knows_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[Path], None], stride: int
) -> None:
    monkeypatch.setattr(recovery, "recover_marked", lambda root, text, deadline_s: None)
    path = tmp_path / "a"
    with LockSet([path, tmp_path / "b"]):
        pass
    number = random.randint(1, stride)
    while interrupted_at(number, partial(action, path)):
        assert left(tmp_path) == [], f"interrupted at place {number}"
        for mode in ("shared", "exclusive"):
            with PathLock(path, mode, timeout_s=0), PathLock(tmp_path / "b", mode, timeout_s=0):
                pass
        number += stride
        assert number < PLACES_MAX
    assert number > 20, "there were hardly any places: what was to be interrupted?"


def interrupted_at(number: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a thread, interrupted at that place; whether there was such a place."""
    interrupt = Interrupt(number)

    def run() -> None:
        with suppress(KeyboardInterrupt), interrupt:
            action()

    with in_a_thread(run):
        pass
    return interrupt.count >= number


def interrupted_by_a_timer(path: Path, times: int) -> None:
    """In a process of its own: take and release, and be interrupted by a signal at any moment, so many times."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    lots = random.Random(os.getpid())
    with PathLock(path):
        pass
    interrupts = 0
    while interrupts < times:
        lock = PathLock(path, timeout_s=PATIENCE_S)
        with suppress(KeyboardInterrupt):
            try:
                signal.setitimer(signal.ITIMER_REAL, lots.uniform(1e-6, 5e-5))
                lock.acquire()
                lock.release()
                while True:
                    time.sleep(1e-5)
            except KeyboardInterrupt:
                interrupts += 1
        let_go(lock)
        assert is_free(lock_file(path.parent, lock))


def test_interrupted_by_signals_at_random_nothing_is_held_that_nobody_knows_of(tmp_path: Path) -> None:
    child = Child(partial(interrupted_by_a_timer, tmp_path / "a", 2000))
    assert child.wait() == 0
    assert left(tmp_path) == []

"""Several path locks at once, all or none; and what a dead transaction has left in the lock files."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_locks import (
    count_up_in_sets,
    hold,
    in_a_thread,
    is_free,
    left_marked,
    lock_file,
    share_until,
    try_it,
)

from ringpool.errors import FileOperationError, LockTimeoutError
from ringpool.workers.files import holds, journal, recovery, turns
from ringpool.workers.files.asynclocks import AsyncPathLock
from ringpool.workers.files.locks import LockSet, Mode, PathLock
from ringpool.workers.files.oslayer import intercepted

# ---- several at once -------------------------------------------------------------------------------------------------


def test_sets_that_name_the_same_paths_in_any_order_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text("0")
    with ExitStack() as stack:
        children = [
            stack.enter_context(Child(count_up_in_sets, tmp_path, "50", backwards)) for backwards in ("", "yes", "")
        ]
        for child in children:
            child.succeed()
    assert [(tmp_path / name).read_text() for name in "abc"] == ["150"] * 3


def test_a_set_holds_each_stripe_once_and_all_of_them_until_it_is_released(tmp_path: Path) -> None:
    names = [tmp_path / f"f{n}" for n in range(600)]  # more than there are stripes
    several = LockSet([*names, names[0]], base=tmp_path)
    files = {lock_file(tmp_path, PathLock(name, base=tmp_path)) for name in names}
    assert len(files) < len(names)
    with several:
        assert not any(is_free(file) for file in files)
    assert all(is_free(file) for file in files)
    with pytest.raises(RuntimeError, match="not locked"):
        several.release()


def test_a_set_of_no_paths_is_had_at_once() -> None:
    with LockSet([]) as locks:
        assert locks.held == []


def test_a_single_path_is_no_set_of_paths(tmp_path: Path) -> None:
    for path in ("ab", b"ab", tmp_path):
        with pytest.raises(TypeError, match="one path"):
            LockSet(path)  # pyright: ignore[reportArgumentType]


def test_a_set_that_cannot_be_had_in_time_holds_nothing(tmp_path: Path) -> None:
    locks = [PathLock(tmp_path / f"f{n}") for n in range(8)]
    for taken in (locks[0], locks[3], locks[7]):
        with Child(hold, os.fsdecode(taken.path)) as child:
            child.wait_for("held")
            for timeout_s in (0, 0.02):
                with pytest.raises(LockTimeoutError) as caught:
                    LockSet([lock.path for lock in locks], timeout_s=timeout_s).acquire()
                assert PathLock(caught.value.path).stripe == taken.stripe
            files = {lock_file(tmp_path, lock) for lock in locks} - {lock_file(tmp_path, taken)}
            assert all(is_free(file) for file in files if file.exists())


def test_a_shared_set_is_shared_and_has_no_marks(tmp_path: Path) -> None:
    with (
        LockSet([tmp_path / "a", tmp_path / "b"], "shared") as several,
        Child(try_it, tmp_path / "a", "shared") as child,
    ):
        child.wait_for("had")
        with pytest.raises(RuntimeError, match="exclusive"):
            several.mark(b"x")


def test_a_set_over_several_bases_is_taken_in_the_same_order_by_all(tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / name).mkdir()
    paths: list[Path] = []
    for name in "xy":
        first = PathLock(tmp_path / name / "a").stripe  # two paths in 256 have one lock
        other = next(path for path in "bcde" if PathLock(tmp_path / name / path).stripe != first)
        paths += [tmp_path / name / "a", tmp_path / name / other]
    orders: list[list[bytes]] = []
    for chosen in (paths, paths[::-1]):
        with LockSet(chosen) as several:
            orders.append([lock.path for lock in several.held])
    assert orders[0] == orders[1]
    assert len(orders[0]) == 4


def test_a_path_of_a_set_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileOperationError, match="missing"):
        LockSet([tmp_path / "a", tmp_path / "missing/b"]).acquire()
    assert not (tmp_path / ".ringpool").exists()


# ---- marks -----------------------------------------------------------------------------------------------------------


class Recoveries:
    """What was to be recovered; and who could have had the lock meanwhile."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seen: list[tuple[bytes, bytes]] = []
        self.error: Exception | None = None

    def recover(self, root: bytes, text: bytes, _deadline_s: float | None) -> None:
        assert not is_free(self.file, shared=True)
        self.seen.append((root, text))
        if self.error is not None:
            raise self.error


@pytest.fixture
def recoveries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recoveries:
    found = Recoveries(lock_file(tmp_path, PathLock(tmp_path / "a")))
    monkeypatch.setattr(recovery, "recover_marked", found.recover)
    return found


@pytest.mark.parametrize("kind", ["exclusive", "shared", "set", "task", "sharing task"])
def test_a_lock_that_a_dead_one_marked_is_recovered_before_it_is_had(
    tmp_path: Path, recoveries: Recoveries, kind: str
) -> None:
    left_marked(tmp_path / "a", "0123456789abcdef")
    assert recoveries.file.read_text() == "0123456789abcdef"

    def check() -> None:
        assert recoveries.seen == [(os.fsencode(tmp_path), b"0123456789abcdef")]
        assert recoveries.file.stat().st_size == 0
        assert is_free(recoveries.file, shared=True) is kind.startswith("shar")
        assert not is_free(recoveries.file)

    async def as_task(mode: Mode) -> None:
        async with AsyncPathLock(tmp_path / "a", mode):
            check()

    if "task" in kind:
        asyncio.run(as_task("shared" if "sharing" in kind else "exclusive"))
    else:
        mode: Mode = "shared" if kind == "shared" else "exclusive"
        with LockSet([tmp_path / "a"]) if kind == "set" else PathLock(tmp_path / "a", mode):
            check()
    with PathLock(tmp_path / "a", "shared"):
        assert len(recoveries.seen) == 1


def test_readers_that_find_a_mark_recover_it_once_and_share_then(tmp_path: Path, recoveries: Recoveries) -> None:
    left_marked(tmp_path / "a", "mark")
    (tmp_path / "marks").mkdir()
    with ExitStack() as stack:
        for number in range(4):
            stack.enter_context(in_a_thread(partial(share_until, tmp_path / "a", tmp_path / "marks", str(number), "4")))
    assert len(recoveries.seen) == 1


def test_a_recovery_that_fails_is_raised_and_leaves_the_mark_and_no_lock(
    tmp_path: Path, recoveries: Recoveries
) -> None:
    left_marked(tmp_path / "a", "mark")
    recoveries.error = FileOperationError("x", "recover", errno.EIO, "broken")
    for mode in ("exclusive", "shared"):
        with pytest.raises(FileOperationError, match="broken"):
            PathLock(tmp_path / "a", mode).acquire()
    assert is_free(recoveries.file)
    recoveries.error = None
    with PathLock(tmp_path / "a"):
        assert len(recoveries.seen) == 3


@pytest.mark.parametrize("timeout_s", [0, 0.02])
@pytest.mark.parametrize("is_marked", [False, True])
def test_a_timeout_holds_for_the_wait_for_anothers_recovery_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float, is_marked: bool
) -> None:
    """The patience with a recovery is longer than the test may take, and ends with an error of another kind."""
    monkeypatch.setattr(recovery, "RECOVERER_PATIENCE_S", 1e9)
    with PathLock(tmp_path / "a") as lock:
        file = lock_file(tmp_path, lock)
    made, turn = journal.Journal.begin(os.fsencode(tmp_path), durable=False), holds.Hold()
    if is_marked:
        file.write_bytes(made.id)
    else:
        turns._looked_at.clear()  # pyright: ignore[reportPrivateUsage]  (as in a process that has just started)
        turns._recovered.clear()  # pyright: ignore[reportPrivateUsage]  (as above)
        turn.take(made.txn_fd, b".", os.O_DIRECTORY)
    try:
        for kind in (PathLock, AsyncPathLock):
            with pytest.raises(LockTimeoutError, match="recovery of a dead transaction") as caught:
                acquire(kind(tmp_path / "a", timeout_s=timeout_s))
            assert caught.value.waited_s >= timeout_s
            assert is_free(file)
    finally:
        turn.let_go()
        made.close()
    acquire(PathLock(tmp_path / "a", timeout_s=0))


def acquire(lock: PathLock | AsyncPathLock) -> None:
    """Take it, and let go of it again."""

    async def acquire_async(lock: AsyncPathLock) -> None:
        async with lock:
            pass

    if isinstance(lock, AsyncPathLock):
        asyncio.run(acquire_async(lock))
    else:
        with lock:
            pass


def test_the_marks_of_a_set_are_no_concern_of_those_who_hold_it(tmp_path: Path, recoveries: Recoveries) -> None:
    several = LockSet([tmp_path / "a", tmp_path / "b"])
    with several, PathLock(tmp_path / "a"):
        several.mark(b"longer text")
        several.mark(b"text")
        assert {lock_file(tmp_path, PathLock(tmp_path / name)).read_bytes() for name in "ab"} == {b"text"}
        with PathLock(tmp_path / "a", "shared"), LockSet([tmp_path / "b"]):
            pass
        several.clear_marks()
        assert recoveries.file.stat().st_size == 0
    for text in (b"", bytes(4097)):
        with several, pytest.raises(ValueError, match="4096"):
            several.mark(text)
    with pytest.raises(RuntimeError, match="held"):
        several.clear_marks()
    assert recoveries.seen == []


def test_who_may_only_read_the_lock_files_recovers_all_the_same(tmp_path: Path, recoveries: Recoveries) -> None:
    left_marked(tmp_path / "a", "mark")

    def deny(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[1] & os.O_RDWR:
            raise PermissionError(errno.EACCES, "")
        return call(*args, **kwargs)

    with intercepted(deny), PathLock(tmp_path / "a"):
        assert recoveries.seen == [(os.fsencode(tmp_path), b"mark")]


def test_a_base_is_looked_through_for_dead_transactions_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots: list[bytes] = []
    monkeypatch.setattr(recovery, "recover_root", lambda root, deadline_s, spares: roots.append(root))
    for name in "xy":
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / ".ringpool").mkdir()
        for _ in range(2):
            with PathLock(tmp_path / name / "deep/a"), PathLock(tmp_path / name / "b"):
                pass
    assert roots == [os.fsencode(tmp_path / "x"), os.fsencode(tmp_path / "y")]


def test_a_release_that_fails_does_not_keep_the_others(tmp_path: Path) -> None:
    failures: list[int] = []

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "unlock_descriptor" and (not failures or args[0] == failures[0]):
            failures.append(args[0])
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args, **kwargs)

    paths = [tmp_path / f"{n}" for n in range(5)]
    locks = LockSet(paths)
    locks.acquire()
    with intercepted(around), pytest.raises(FileOperationError):
        locks.release()
    assert failures
    assert not locks.held
    assert all(is_free(lock_file(tmp_path, PathLock(path))) for path in paths)

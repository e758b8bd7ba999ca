"""Path locks: one holder, in any process and thread; shared and exclusive; re-entry, release and Ctrl-C."""

from __future__ import annotations

import asyncio
import copy
import errno
import math
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from filelock import FileLock, Timeout
from tests.workers.files.child import Child
from tests.workers.files.child_locks import (
    enter_in_turn,
    hold,
    in_a_thread,
    is_free,
    lock_file,
    try_it,
    until,
    waiting,
)

from ringpool.errors import FileOperationError, LockTimeoutError, LockUpgradeError, PathNameError
from ringpool.workers.files import commit, holds, journal, lockfiles, locks, stripes, tickets, turns
from ringpool.workers.files.asynclocks import AsyncPathLock
from ringpool.workers.files.errorlog import ErrorLog
from ringpool.workers.files.locks import LockSet, PathLock, call_locked
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.store import FileStore
from ringpool.workers.files.tickets import Bell
from ringpool.workers.files.transaction import FileTransaction, snapshot

# ---- one holder ------------------------------------------------------------------------------------------------------


def test_two_processes_and_their_threads_never_hold_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    with Child(count_up, tmp_path, "150") as one, Child(count_up, tmp_path, "150") as two:
        one.succeed()
        two.succeed()
    assert (tmp_path / "count").read_text() == "600"


def count_up(directory: str, rounds: str) -> None:
    """In two threads; a read and a write that lose a count where two do them at once."""
    counter, mark = Path(directory, "count"), Path(directory, "mark")

    def count() -> None:
        for _ in range(int(rounds)):
            with PathLock(counter):
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails where somebody else is here
                counter.write_text(str(int(counter.read_text()) + 1))
                mark.unlink()

    with in_a_thread(count):
        count()


def test_a_killed_holder_frees_it(tmp_path: Path) -> None:
    with Child(hold, tmp_path / "a") as child:
        child.wait_for("held")
        with pytest.raises(LockTimeoutError), PathLock(tmp_path / "a", timeout_s=0):
            pass
        child.kill()
        with PathLock(tmp_path / "a", timeout_s=30):
            pass


def test_a_waiter_gets_it_when_the_holder_leaves(tmp_path: Path) -> None:
    with Child(hold, tmp_path / "a") as child:
        child.wait_for("held")
        got: list[bool] = []

        def wait() -> None:
            with PathLock(tmp_path / "a", timeout_s=60):
                got.append(is_free(lock_file(tmp_path, PathLock(tmp_path / "a"))))

        with in_a_thread(wait):
            child.answer()
            child.wait_for("released")
        assert got == [False]


@pytest.mark.parametrize("kind", [PathLock, AsyncPathLock, LockSet])
def test_who_waits_gets_the_file_that_it_came_for_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    ours, other = PathLock(tmp_path / "one/a"), PathLock(tmp_path / "two/a")
    monkeypatch.chdir(tmp_path / "one")
    got, end = threading.Event(), threading.Event()

    async def wait_async() -> None:
        async with AsyncPathLock("a", timeout_s=60):
            got.set()
            end.wait(60)

    def wait() -> None:
        if kind is AsyncPathLock:
            asyncio.run(wait_async())
            return
        with LockSet(["a"], timeout_s=60) if kind is LockSet else PathLock("a", timeout_s=60):
            got.set()
            end.wait(60)

    with Child(hold, tmp_path / "one/a") as child:
        child.wait_for("held")
        with in_a_thread(wait):
            try:
                until(lambda: waiting(lock_file(tmp_path / "one", ours)))
                monkeypatch.chdir(tmp_path / "two")
                child.answer()
                child.wait_for("released")
                assert got.wait(60)
                assert not is_free(lock_file(tmp_path / "one", ours))
                with other:
                    pass
            finally:
                end.set()


def test_a_timeout_is_an_error_that_says_which_path_who_has_it_and_how_long_we_waited(tmp_path: Path) -> None:
    with Child(hold, tmp_path / "a") as child:
        child.wait_for("held")
        for timeout_s in (0, 0.02):
            with pytest.raises(TimeoutError) as caught, PathLock(tmp_path / "a", timeout_s=timeout_s):
                pass
            error = caught.value
            assert isinstance(error, LockTimeoutError)
            assert error.path == str(tmp_path / "a")
            assert error.waited_s >= timeout_s
            assert f"process {child.pid} (" in error.holder
            assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_thread_of_this_process_is_named_as_holder(tmp_path: Path) -> None:
    with PathLock(tmp_path / "a"):

        def try_it() -> None:
            with pytest.raises(LockTimeoutError, match="another thread of this process"):
                PathLock(tmp_path / "a", timeout_s=0.01).acquire()

        with in_a_thread(try_it):
            pass
    with PathLock(tmp_path / "a", timeout_s=0):
        pass


def test_users_of_filelock_on_the_same_lock_file_are_excluded(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    with lock, pytest.raises(Timeout):
        FileLock(lock_file(tmp_path, lock), timeout=0).acquire()
    with FileLock(lock_file(tmp_path, lock)), pytest.raises(LockTimeoutError):
        PathLock(tmp_path / "a", timeout_s=0).acquire()


# ---- shared ----------------------------------------------------------------------------------------------------------


def test_a_shared_lock_is_shared_by_processes_and_threads_and_excludes_writers(tmp_path: Path) -> None:
    with Child(hold, tmp_path / "a", "shared") as child, PathLock(tmp_path / "a", "shared", timeout_s=30) as lock:
        child.wait_for("held")
        file = lock_file(tmp_path, lock)

        def share() -> None:
            with PathLock(tmp_path / "a", "shared", timeout_s=0):
                pass
            with pytest.raises(LockTimeoutError, match="another thread"):
                PathLock(tmp_path / "a", timeout_s=0).acquire()

        with in_a_thread(share):
            pass
        assert (is_free(file), is_free(file, shared=True)) == (False, True)
        with pytest.raises(Timeout):
            FileLock(file, timeout=0).acquire()
    assert is_free(file)


def test_a_writer_excludes_readers(tmp_path: Path) -> None:
    with PathLock(tmp_path / "a"), Child(try_it, tmp_path / "a", "shared") as child:
        child.wait_for("taken by somebody else")


def test_from_shared_to_exclusive_is_an_error_and_the_shared_one_stays(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", "shared")
    with lock:
        with pytest.raises(LockUpgradeError, match="exclusive from the start") as caught:
            PathLock(tmp_path / "a").acquire()
        assert caught.value.path == str(tmp_path / "a")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert is_free(lock_file(tmp_path, lock), shared=True)
        assert not is_free(lock_file(tmp_path, lock))
    assert is_free(lock_file(tmp_path, lock))


def test_an_upgrade_that_is_one_of_the_lock_file_only_names_both_paths(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", "shared")
    twin = next(name for name in map(str, range(100_000)) if PathLock(tmp_path / name).stripe == lock.stripe)
    with lock:
        with pytest.raises(LockUpgradeError) as caught:
            FileStore(tmp_path).write(twin, "new")
        assert (caught.value.path, caught.value.shared) == (str(tmp_path / twin), str(tmp_path / "a"))
        for path in (caught.value.path, caught.value.shared):
            assert path in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with LockSet([tmp_path / "a", tmp_path / twin]):
        FileStore(tmp_path).write(twin, "new")


def test_shared_inside_exclusive_is_exclusive_until_both_are_released(tmp_path: Path) -> None:
    outer, inner = PathLock(tmp_path / "a"), PathLock(tmp_path / "a", "shared")
    outer.acquire()
    inner.acquire()
    outer.release()
    assert not is_free(lock_file(tmp_path, outer), shared=True)
    inner.release()
    assert is_free(lock_file(tmp_path, outer))


def test_who_shares_it_may_share_it_again_though_a_writer_waits(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", "shared", timeout_s=30)
    log = tmp_path / "log"
    with ExitStack() as stack:
        with lock:
            stack.enter_context(Child(enter_in_turn, tmp_path / "a", "exclusive", log, "writer"))
            until(lambda: waiting(lock_file(tmp_path, lock)) == 1)
            with lock, PathLock(tmp_path / "a", "shared", timeout_s=0):
                assert not log.exists()
        until(lambda: log.exists())


def test_a_mode_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exclusive or shared"):
        PathLock(tmp_path / "a", "upgradable")  # pyright: ignore[reportArgumentType]


# ---- re-entry and release --------------------------------------------------------------------------------------------


def test_a_thread_may_lock_again_and_it_is_free_after_the_last_release(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", timeout_s=0)
    with lock, PathLock(tmp_path / "a", timeout_s=0):
        with lock:
            pass
        assert not is_free(lock_file(tmp_path, lock))
    assert is_free(lock_file(tmp_path, lock))


def test_two_files_of_one_stripe_may_be_held_by_one_thread(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", timeout_s=0)
    twins = (PathLock(tmp_path / f"b{n}", timeout_s=0) for n in range(100_000))
    twin = next(other for other in twins if other.stripe == lock.stripe)
    with lock, twin:
        assert not is_free(lock_file(tmp_path, lock))
    assert is_free(lock_file(tmp_path, lock))


def test_an_exception_in_the_block_releases_it(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), lock:
        _ = 1 / 0
    assert is_free(lock_file(tmp_path, lock))


def test_a_release_without_the_lock_or_by_another_thread_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    with pytest.raises(RuntimeError, match="not locked"):
        lock.release()
    with lock:

        def release() -> None:
            with pytest.raises(RuntimeError, match="does not hold it"):
                lock.release()

        with in_a_thread(release):
            pass
        assert not is_free(lock_file(tmp_path, lock))
    assert is_free(lock_file(tmp_path, lock))


def test_one_lock_object_serves_several_threads(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", timeout_s=60)
    inside: list[int] = []

    def enter() -> None:
        for _ in range(20):
            with lock, lock:
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    lock.acquire()
    with in_a_thread(enter), in_a_thread(enter), in_a_thread(enter):
        until(lambda: waiting(lock_file(tmp_path, lock)) == 3)
        lock.release()
    assert not lock.turns
    assert is_free(lock_file(tmp_path, lock))


def test_ctrl_c_while_waiting_leaves_nothing_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(hold, tmp_path / "a") as child:
        child.wait_for("held")
        lock = PathLock(tmp_path / "a")

        def interrupt(*_: object) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Bell, "sleep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                lock.acquire()
        child.answer()
        child.wait_for("released")
        assert is_free(lock_file(tmp_path, lock))

        def take() -> None:
            with PathLock(tmp_path / "a", timeout_s=0):
                pass

        with in_a_thread(take):
            pass


def test_ctrl_c_just_after_it_was_had_leaves_nothing_held(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    file = os.fsencode(lock_file(tmp_path, lock))

    def interrupt(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "stat" and args[0] == file:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    with intercepted(interrupt), pytest.raises(KeyboardInterrupt):
        lock.acquire()
    assert is_free(Path(os.fsdecode(file)))


def write_two(base: Path) -> None:
    with FileTransaction(base, durability="atomic") as transaction:
        transaction.write("a", "1")
        transaction.write("b", "2")


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "write": lambda base: FileStore(base, durability="atomic").write("a", b"new"),
    "append": lambda base: FileStore(base, durability="atomic").append("a", b"+"),
    "update": lambda base: FileStore(base, durability="atomic").update("a", lambda old: old, missing=b""),
    "delete": lambda base: FileStore(base, durability="atomic").delete("c"),
    "rename": lambda base: FileStore(base, durability="atomic").rename("c", "d", replace=True),
    "record": lambda base: ErrorLog(base, durability="none").record(ValueError("x")),
    "snapshot": lambda base: snapshot([base / "a", base / "b"]),
    "transaction": write_two,
    "output, free": lambda base: call_locked(os.fsencode(base / "a"), None, lambda: None),
    "output, not free": lambda base: call_locked(os.fsencode(base / "link"), None, lambda: None),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_a_signal_handler_raises_at_any_call_leaves_nothing_locked(tmp_path: Path, operation: str) -> None:
    for name in ("a", "c"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    OPERATIONS["write"](tmp_path)
    OPERATIONS[operation](tmp_path)  # its lock files are open then, and each time it makes the same calls
    for at in range(1000):
        (tmp_path / "c").write_bytes(b"old")
        try:
            with raised_at_call(at):
                OPERATIONS[operation](tmp_path)
            break
        except KeyboardInterrupt:
            assert [file for file in tmp_path.rglob("*.lock") if not is_free(file)] == []
            assert not stripes.retired
    assert 5 < at < 900


def test_what_a_signal_handler_raises_leaves_no_id_of_a_transaction_held(tmp_path: Path) -> None:
    write_two(tmp_path)
    for at in range(1000):
        with suppress(KeyboardInterrupt), raised_at_call(at, holds, journal, commit):
            write_two(tmp_path)
            break
        assert [file for file in tmp_path.rglob("*.lock") if not is_free(file)] == []
        assert not [path for path in open_files() if "/.ringpool/txn/" in path]
    assert 20 < at < 900
    with PathLock(tmp_path / "a"), PathLock(tmp_path / "b"):
        assert not list((tmp_path / ".ringpool/txn").glob("*.journal"))


def open_files() -> list[str]:
    """The paths of what this process has open."""
    found: list[str] = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


@contextmanager
def raised_at_call(at: int, *of: ModuleType) -> Iterator[None]:
    """``KeyboardInterrupt`` as the ``at``-th function of these modules (default: of the locks) begins: there Python
    calls signal handlers.
    """
    modules = {module.__file__ for module in of or (locks, turns, stripes, tickets, lockfiles)}
    calls_left = at

    def trace(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls_left
        if event == "call" and frame.f_code.co_filename in modules:
            calls_left -= 1
            if calls_left == -1:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


# ---- misuse, and a kernel that refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [lambda lock: pickle.loads(pickle.dumps(lock)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ["lock", "set"])
def test_a_copy_of_a_held_lock_holds_nothing(tmp_path: Path, kind: str, twin: Callable[[Any], Any]) -> None:
    lock = PathLock(tmp_path / "a", timeout_s=5) if kind == "lock" else LockSet([tmp_path / "a"], timeout_s=5)
    with lock:
        copied = twin(lock)
        with pytest.raises(RuntimeError, match="not locked"):
            copied.release()
        assert not is_free(lock_file(tmp_path, PathLock(tmp_path / "a")))
        with copied:
            assert copied.timeout_s == 5
    assert is_free(lock_file(tmp_path, PathLock(tmp_path / "a")))


def test_a_path_with_a_nul_byte_and_a_timeout_that_is_no_number_are_refused(tmp_path: Path) -> None:
    for make in (PathLock, AsyncPathLock, lambda path: LockSet([path]), lambda path: PathLock("a", base=path)):
        with pytest.raises(PathNameError):
            make(b"a\0b")
    for make in (PathLock, lambda path, timeout_s: LockSet([path], timeout_s=timeout_s)):
        with pytest.raises(ValueError, match="no number"):
            make(tmp_path / "a", timeout_s=math.nan)


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileOperationError) as caught:
        PathLock(tmp_path / "file/a").acquire()
    assert caught.value.errno == errno.ENOTDIR


@pytest.mark.parametrize("error", [errno.EIO, errno.EBADF])
def test_an_unlock_that_fails_is_named_and_the_lock_is_free(tmp_path: Path, error: int) -> None:
    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "unlock_descriptor":
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    lock = PathLock(tmp_path / "a")
    lock.acquire()
    with intercepted(around), pytest.raises(FileOperationError) as caught:
        lock.release()
    assert (caught.value.errno, caught.value.operation) == (error, "unlock")
    assert not lock.turns
    assert is_free(lock_file(tmp_path, PathLock(tmp_path / "a")))
    with Child(try_it, tmp_path / "a") as child:
        child.wait_for("had")


def test_what_was_done_under_a_lock_stands_when_its_unlock_fails(tmp_path: Path) -> None:
    """Who is told of an error would do it again."""

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "unlock_descriptor":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args, **kwargs)

    store = FileStore(tmp_path)
    with intercepted(around):
        store.append("a", b"once")
    assert store.read("a") == b"once"
    assert is_free(lock_file(tmp_path, PathLock(tmp_path / "a")))

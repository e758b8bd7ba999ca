"""The known mistakes of file code: for each the naive way, which must fail here, and ours, which must not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import filelock
import pytest
from tests.workers.files import child_store, naive
from tests.workers.files.child import Child
from tests.workers.files.child_atomic import untouched
from tests.workers.files.model import Recording

from ringpool.errors import (
    AtomicWriteError,
    DurabilityError,
    FileOperationError,
    LockTimeoutError,
    PathOutsideError,
    TransactionConflictError,
)
from ringpool.shm.status import FileState, FileStatusTable
from ringpool.workers.files import recovery, turns
from ringpool.workers.files.atomic import atomic_write
from ringpool.workers.files.locks import LockSet, PathLock
from ringpool.workers.files.naming import unique_name
from ringpool.workers.files.oslayer import calls, intercepted
from ringpool.workers.files.resources import resource_stats
from ringpool.workers.files.store import FileStore
from ringpool.workers.files.transaction import FileTransaction

Call = Callable[..., Any]
WATCHDOG_S = 30.0


def in_thread(action: Callable[[], object]) -> BaseException | None:
    """Run it in another thread; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WATCHDOG_S)
    assert not thread.is_alive()
    return raised[0] if raised else None


def outcomes(kind: str, base: Path) -> set[str]:
    """What was found after each death of ``kind``: see ``child_store.outcomes_of_deaths``."""
    with Child(child_store.outcomes_of_deaths, kind, base) as child:
        assert child.process.stdout is not None
        found = json.loads(child.process.stdout.readline())
        child.succeed()
    return set(found)


@contextmanager
def each_call(around: Callable[[str, tuple[Any, ...]], object]) -> Iterator[None]:
    """``around(name, args)`` before each system call; what it raises is the call's error."""

    def before(name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        around(name, args)
        return call(*args, **kwargs)

    with intercepted(before):
        yield


def failing(wanted: str, error: int) -> Callable[[str, tuple[Any, ...]], None]:
    def fail(name: str, args: tuple[Any, ...]) -> None:
        if name == wanted:
            raise OSError(error, os.strerror(error))

    return fail


def lock_files_held(base: Path) -> list[Path]:
    return [path for path in (base / ".ringpool/locks").glob("??.lock") if not naive.is_free(path)]


def waits(path: Path) -> bool:
    """Whether somebody is blocked in flock on the file."""
    inode = path.stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f":{inode} " in line for line in lines)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


# ---- writing a file --------------------------------------------------------------------------------------------------


def test_01_writers_of_one_stem_share_a_temporary_file(tmp_path: Path) -> None:
    """1: ``with_suffix(".tmp")``."""
    (tmp_path / "a.tmp").write_text("the user's own")
    first = naive.write_in_steps(tmp_path / "a.txt", "text")
    second = naive.write_in_steps(tmp_path / "a.csv", "table")
    next(first)
    next(second)
    next(first, None)
    assert (tmp_path / "a.txt").read_text() == "table"
    with pytest.raises(FileNotFoundError):
        next(second)
    assert not (tmp_path / "a.tmp").exists()

    (tmp_path / "a.tmp").write_text("the user's own")

    def interleave(name: str, _: tuple[Any, ...]) -> None:
        if name == "rename" and not (tmp_path / "a.csv").exists():
            (tmp_path / "a.csv").touch()
            atomic_write(tmp_path / "a.csv", "table", durability="atomic")

    with each_call(interleave):
        atomic_write(tmp_path / "a.txt", "text", durability="atomic")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.tmp": "the user's own",
        "a.txt": "text",
        "a.csv": "table",
    }


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "replaced"])
def test_02_a_rename_before_the_content_is_on_disk(tmp_path: Path, old: bytes | None) -> None:
    """2: no fsync before the rename, none of the directory."""

    def after_power_cut(write: Callable[[Path, bytes], None], directory: Path) -> list[bytes | None]:
        directory.mkdir()
        if old is not None:
            (directory / "a").write_bytes(old)
        recording = Recording(directory, Random(0))
        with recording:
            write(directory / "a", b"new content")
            recording.mark("returned")
        disks = recording.disks(Random(0))
        return [disk.contents.get(b"a") for disk in disks if not torn_is_fine or disk.marks]

    torn_is_fine = False
    assert any(
        content not in (old, b"new content") for content in after_power_cut(naive.write_unsynced, tmp_path / "1")
    )
    assert all(content in (old, b"new content") for content in after_power_cut(atomic_write, tmp_path / "2"))
    torn_is_fine = True  # only what may be found once the call has returned
    assert set(after_power_cut(naive.write_unsynced, tmp_path / "3")) != {b"new content"}
    assert set(after_power_cut(atomic_write, tmp_path / "4")) == {b"new content"}


def test_03_backups_of_one_second_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3: names from ``int(time.time())``."""
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.25)
    assert naive.backup_name(tmp_path / "a") == naive.backup_name(tmp_path / "a")
    names = {unique_name(tmp_path, "a.", ".bak") for _ in range(100)}
    assert len(names) == 100
    assert {os.path.basename(name) for name in names} == {path.name for path in tmp_path.iterdir()}


def test_16_a_symlink_is_replaced_and_a_hard_link_split(tmp_path: Path) -> None:
    """16: the rename hits the link."""
    for write in (naive.write_unsynced, atomic_write):
        (tmp_path / "target").write_bytes(b"old")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("target")
        write(tmp_path / "link", b"new")
        is_ours = write is atomic_write
        assert (tmp_path / "link").is_symlink() == is_ours
        assert (tmp_path / "target").read_bytes() == (b"new" if is_ours else b"old")

    (tmp_path / "a").write_bytes(b"old")
    os.link(tmp_path / "a", tmp_path / "b")
    naive.write_unsynced(tmp_path / "a", b"new")
    assert (tmp_path / "b").read_bytes() == b"old"
    os.link(tmp_path / "a", tmp_path / "c")
    with pytest.raises(AtomicWriteError, match="hard links"):
        atomic_write(tmp_path / "a", b"newer", hard_links="refuse")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes() == b"new"


def test_17_a_rename_does_not_cross_file_systems(tmp_path: Path) -> None:
    """17: the temporary file in the directory for temporary files."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    with pytest.raises(OSError, match="cross-device"):
        naive.replace_from_temporary_directory(tmp_path / "a", b"new", elsewhere)
    with tempfile.TemporaryDirectory(dir=elsewhere) as other:
        for directory in (tmp_path, Path(other)):
            atomic_write(directory / "a", b"new", durability="atomic")
            assert (directory / "a").read_bytes() == b"new"


def test_18_a_short_write_passes_silently(tmp_path: Path) -> None:
    """18: one ``os.write``, whose result nobody looks at."""

    def short(name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(args[0], bytes(args[1])[:3]) if name == "write" else call(*args, **kwargs)

    with intercepted(short):
        naive.write_once(tmp_path / "naive", b"0123456789")
        atomic_write(tmp_path / "ours", b"0123456789")
    assert (tmp_path / "naive").read_bytes() == b"012"
    assert (tmp_path / "ours").read_bytes() == b"0123456789"


def test_19_an_fsync_that_failed_is_tried_again_and_succeeds(tmp_path: Path) -> None:
    """19: the pages may be gone, and the second fsync does not know."""
    syncs: list[str] = []

    def fail_once(name: str, _: tuple[Any, ...]) -> None:
        if name == "fsync":
            syncs.append(name)
            if len(syncs) == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    with each_call(fail_once):
        naive.write_and_retry_fsync(tmp_path / "naive", b"lost")
    assert len(syncs) == 2
    syncs.clear()
    with each_call(fail_once), pytest.raises(DurabilityError):
        atomic_write(tmp_path / "ours", b"lost")
    assert len(syncs) == 1
    assert not (tmp_path / "ours").exists()
    for name, error in (("close", errno.EDQUOT), ("write", errno.ENOSPC)):
        with each_call(failing(name, error)), pytest.raises(FileOperationError) as raised:
            atomic_write(tmp_path / "ours", b"lost")
        assert raised.value.errno == error


def test_27_an_error_after_the_commit_looks_like_one_before_it(tmp_path: Path) -> None:
    """27: the new state stands, and the caller believes that it does not."""

    def fail_second(name: str, _: tuple[Any, ...]) -> None:
        if name == "fsync":
            syncs.append(name)
            if len(syncs) == 2:
                raise OSError(errno.EIO, "no")

    syncs: list[str] = []
    with each_call(fail_second), pytest.raises(OSError, match="no") as raised:
        naive.write_synced(tmp_path / "naive", b"new")
    assert (tmp_path / "naive").read_bytes() == b"new"
    assert not hasattr(raised.value, "operation")
    syncs.clear()
    with each_call(fail_second), pytest.raises(DurabilityError) as ours:
        atomic_write(tmp_path / "ours", b"new")
    assert (tmp_path / "ours").read_bytes() == b"new"
    assert "after the rename" in ours.value.operation


def test_29_a_nameless_file_is_linked_by_the_name_that_it_has_in_proc(tmp_path: Path) -> None:
    """29: ``link("/proc/self/fd/N", name)`` without following; and linkat replaces nothing."""
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        with pytest.raises(OSError, match="cross-device"):
            os.link(f"/proc/self/fd/{fd}", tmp_path / "naive", follow_symlinks=False)
    finally:
        os.close(fd)
    linked: list[str] = []
    store = FileStore(tmp_path / "base", durability="atomic")
    with each_call(lambda name, args: linked.append(os.fsdecode(args[0])) if name == "link" else None):
        addresses = {store.add(b"content") for _ in range(3)}
    assert [name.startswith("/proc/self/fd/") for name in linked] == [True, True, True]
    assert len(addresses) == 1
    assert store.verify().objects == 1


# ---- several files together ------------------------------------------------------------------------------------------


def test_04_a_rollback_by_text_changes_what_it_restores(tmp_path: Path) -> None:
    """4: bytes that are no text, CRLF, mode."""
    path = tmp_path / "a"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UnicodeDecodeError):
        naive.TextTransaction().write(path, "new")
    path.write_bytes(b"line\r\n")
    path.chmod(0o640)
    transaction = naive.TextTransaction()
    transaction.write(path, "new")
    transaction.rollback()
    assert path.read_bytes() == b"line\n"
    assert stat.S_IMODE(path.stat().st_mode) != 0o640

    path.write_bytes(b"\xff\xfeline\r\n")
    path.chmod(0o640)
    before = untouched(path)
    with suppress(ZeroDivisionError), FileTransaction(tmp_path, durability="atomic") as ours:
        ours.write("a", b"new")
        ours.write("b", b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"\xff\xfeline\r\n"
    assert untouched(path) == before
    assert not (tmp_path / "b").exists()


def test_05_a_rename_noted_by_its_new_path_cannot_be_undone(tmp_path: Path) -> None:
    """5: the journal lacks the old path."""
    (tmp_path / "a").write_text("1")
    transaction = naive.TextTransaction()
    transaction.rename(tmp_path / "a", tmp_path / "b")
    with pytest.raises(KeyError):
        transaction.rollback()
    assert not (tmp_path / "a").exists()

    (tmp_path / "b").rename(tmp_path / "a")
    with suppress(ZeroDivisionError), FileTransaction(tmp_path, durability="atomic") as ours:
        ours.rename("a", "b")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "1"
    assert not (tmp_path / "b").exists()


def test_06_and_26_a_transaction_in_memory_is_half_done_after_a_kill(tmp_path: Path) -> None:
    """6: nobody is left who could roll it back. 26: the kernel frees the lock, and the next holder reads the half."""
    assert outcomes("transaction naive", tmp_path) == {"old old", "new old", "new new"}
    found = [outcome.split(", ") for outcome in outcomes("transaction ours", tmp_path)]
    assert "new old" in {seen for seen, _ in found}, "no kill has left a half: the test has no teeth"
    assert {locked for _, locked in found} == {"old old", "new new"}


def test_25_an_old_journal_deletes_what_was_written_after_it(tmp_path: Path) -> None:
    """25: replayed once more."""
    (tmp_path / "a").write_text("old")
    (tmp_path / "journal").write_text(json.dumps([{"operation": "delete", "path": os.fspath(tmp_path / "a")}]))
    naive.replay(tmp_path / "journal")
    (tmp_path / "a").write_text("written later")
    naive.replay(tmp_path / "journal")
    assert not (tmp_path / "a").exists()

    (tmp_path / "a").write_text("old")
    with FileTransaction(tmp_path) as ours:
        ours.delete("a")
    (tmp_path / "a").write_text("written later")
    recovery.recover_root(os.fsencode(tmp_path))
    with PathLock(tmp_path / "a"):
        assert (tmp_path / "a").read_text() == "written later"


def test_12_a_queue_rewritten_in_place_is_lost_by_a_kill(tmp_path: Path) -> None:
    """12: and so are items of two that rewrite it at once."""
    assert "broken" in outcomes("queue naive", tmp_path)
    assert outcomes("queue ours", tmp_path) == {"1 items", "2 items"}


def test_28_a_time_is_too_coarse_to_tell_that_a_file_has_changed(tmp_path: Path) -> None:
    """28: same size, same time, another content."""
    path = tmp_path / "a"
    path.write_bytes(b"1")
    before = path.stat()
    transaction = FileTransaction(tmp_path, durability="atomic")
    assert transaction.read("a") == b"1"
    transaction.write("a", b"2")
    path.write_bytes(b"9")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    with pytest.raises(TransactionConflictError):
        transaction.commit()
    assert path.read_bytes() == b"9"


# ---- locks -----------------------------------------------------------------------------------------------------------


def test_07_a_timeout_reported_as_false_is_overlooked(tmp_path: Path) -> None:
    """7: nobody looks at the result."""
    lock, other = (naive.PollingLock(tmp_path / "a") for _ in range(2))
    lock.acquire(0)
    other.acquire(0.1)  # goes on, without the lock
    other.release()  # and then frees that of another
    assert not lock.lock_path.exists()
    with PathLock(tmp_path / "a"):
        assert isinstance(in_thread(PathLock(tmp_path / "a", timeout_s=0.01).acquire), LockTimeoutError)


def test_09_lock_files_beside_the_files(tmp_path: Path) -> None:
    """9: they are left there, and their names are too long for long names."""
    lock = naive.PollingLock(tmp_path / "a")
    lock.acquire(0)
    assert (tmp_path / "a.lock").exists()
    lock.release()
    with pytest.raises(OSError, match="too long"):
        naive.PollingLock(tmp_path / ("n" * 254)).acquire(0)
    for name in ("a", "n" * 254, "n" * 255):
        with PathLock(tmp_path / name):
            assert [path.name for path in tmp_path.iterdir()] == [".ringpool"]


def test_10_two_lock_objects_of_one_file_in_one_thread(tmp_path: Path) -> None:
    """10: it waits for itself."""
    with filelock.FileLock(tmp_path / "naive"), pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / "naive").acquire(timeout=0.05)
    with PathLock(tmp_path / "a"), PathLock(tmp_path / "a", timeout_s=0):
        assert len(lock_files_held(tmp_path)) == 1
    assert lock_files_held(tmp_path) == []


def test_13_waiting_by_looking_every_tenth_of_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """13: the naive wait sleeps on; ours is woken."""
    sleeps: list[float] = []
    lock = naive.PollingLock(tmp_path / "a")
    lock.acquire(0)
    assert not naive.PollingLock(tmp_path / "a").acquire(1.0, sleep=sleeps.append)
    assert sleeps == [0.1] * 10
    sleeps.clear()
    with Child(child_store.hold, tmp_path / "a") as child, FileStatusTable(f"test-{secrets.token_hex(8)}", 8) as table:
        child.wait_for("held")
        monkeypatch.setattr(time, "sleep", sleeps.append)
        try:
            table.claim("a")
            threading.Timer(0.05, lambda: table.release("a")).start()
            table.wait_available("a", WATCHDOG_S)
            threading.Timer(0.05, child.answer).start()
            with PathLock(tmp_path / "a", timeout_s=WATCHDOG_S):
                pass
        finally:
            monkeypatch.undo()
            table.unlink()
        child.succeed()
    assert [pause_s for pause_s in sleeps if pause_s > 0.001] == []  # shorter: two threads at the table's mutex


def test_14_a_table_of_locks_that_only_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """14: a descriptor for each path that was ever locked."""
    monkeypatch.setattr(turns, "DESCRIPTORS_MAX", 64)
    table = naive.FlockTable()
    for number in range(150):
        table.acquire(os.fspath(tmp_path / f"{number}.lock"))
        table.release(os.fspath(tmp_path / f"{number}.lock"))
    assert len(table.locks) == 150
    table.clean_up()
    for number in range(300):
        with PathLock(tmp_path / f"{number}"):
            pass
    stats = resource_stats()
    assert 0 < stats.lock_files_open <= stats.lock_files_max < 150


def test_15_a_clean_up_that_frees_what_is_held(tmp_path: Path) -> None:
    """15: the table is emptied under its holder."""
    table = naive.FlockTable()
    table.acquire(os.fspath(tmp_path / "a.lock"))
    table.clean_up()
    assert naive.is_free(tmp_path / "a.lock")
    with PathLock(tmp_path / "a"):
        held = lock_files_held(tmp_path)
        for number in range(300):  # the bounded table closes what is not in use
            with PathLock(tmp_path / f"{number}"):
                pass
        assert lock_files_held(tmp_path) == held != []
        assert isinstance(in_thread(PathLock(tmp_path / "a", timeout_s=0).acquire), LockTimeoutError)


def test_20_a_lock_file_unlinked_while_held(tmp_path: Path) -> None:
    """20: the second one locks another file of that name."""
    with naive.flocked(tmp_path / "a.lock"):
        assert not naive.is_free(tmp_path / "a.lock")
        (tmp_path / "a.lock").unlink()
        assert naive.is_free(tmp_path / "a.lock")
    for _ in range(2):
        with PathLock(tmp_path / "a"):
            [held] = lock_files_held(tmp_path)
            inode = held.stat().st_ino
            assert isinstance(in_thread(PathLock(tmp_path / "a", timeout_s=0).acquire), LockTimeoutError)
        assert held.stat().st_ino == inode
    held.unlink()  # by somebody else, while the descriptor stays open: who comes then locks the new file
    with PathLock(tmp_path / "a"):
        assert lock_files_held(tmp_path) == [held]


def test_21_a_release_by_another_thread_does_nothing_and_says_nothing(tmp_path: Path) -> None:
    """21: locks that are thread-local."""
    theirs = filelock.FileLock(tmp_path / "naive")
    theirs.acquire()
    assert in_thread(theirs.release) is None
    assert theirs.is_locked
    theirs.release()
    ours = PathLock(tmp_path / "a")
    with ours:
        assert isinstance(in_thread(ours.release), RuntimeError)
        assert lock_files_held(tmp_path)


def test_22_a_lock_shared_by_threads_in_opposite_modes(tmp_path: Path) -> None:
    """22: an error, where a wait is wanted."""
    theirs = filelock.ReadWriteLock(tmp_path / "naive")
    with theirs.read_lock():
        assert isinstance(in_thread(lambda: theirs.acquire_write(timeout=0.01)), RuntimeError)
    had = threading.Event()

    def write() -> None:
        with PathLock(tmp_path / "a", timeout_s=WATCHDOG_S):
            had.set()

    with PathLock(tmp_path / "a", "shared"):
        writer = threading.Thread(target=write)
        writer.start()
        assert not had.wait(0.02)
    writer.join(WATCHDOG_S)
    assert had.is_set()


def test_23_readers_that_come_later_pass_a_waiting_writer(tmp_path: Path) -> None:
    """23: with flock a writer waits as long as readers overlap."""

    def write(lock: Any) -> None:
        with lock:
            pass

    path = tmp_path / "naive"
    with naive.flocked(path, fcntl.LOCK_SH):
        writer = threading.Thread(target=write, args=(naive.flocked(path),))
        writer.start()
        wait_until(lambda: waits(path))
        for _ in range(10):
            with naive.flocked(path, fcntl.LOCK_SH | fcntl.LOCK_NB):
                assert waits(path)
    writer.join(WATCHDOG_S)

    def is_refused() -> bool:
        shared = PathLock(tmp_path / "a", "shared", timeout_s=0)
        return isinstance(in_thread(lambda: write(shared)), LockTimeoutError)

    with PathLock(tmp_path / "a", "shared"):
        assert not is_refused()
        writer = threading.Thread(target=write, args=(PathLock(tmp_path / "a", timeout_s=WATCHDOG_S),))
        writer.start()
        wait_until(is_refused)
    writer.join(WATCHDOG_S)
    assert not is_refused()


def test_24_a_forked_child_drops_its_parents_lock(tmp_path: Path) -> None:
    """24: by an unlock; a POSIX record lock goes with any close of the file."""
    with Child(child_store.fork_and_unlock, tmp_path) as child:
        assert child.process.stdout is not None
        found = json.loads(child.process.stdout.readline())
        child.succeed()
    assert found == {"flock": "free", "record lock": "free", "ours": "held"}


def test_28_locks_taken_in_opposite_order_wait_for_each_other(tmp_path: Path) -> None:
    """28: deadlock by lock order."""
    with naive.flocked(tmp_path / "a"), naive.flocked(tmp_path / "b"):  # of two processes, each of which has one
        assert not naive.is_free(tmp_path / "b")
        assert not naive.is_free(tmp_path / "a")
    paths = [tmp_path / name for name in ("c", "d", "e")]

    def lock_often(paths: list[Path]) -> None:
        for _ in range(100):
            with LockSet(paths, timeout_s=WATCHDOG_S):
                pass

    threads = [threading.Thread(target=lock_often, args=(order,)) for order in (paths, paths[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
        assert not thread.is_alive()


def test_28_two_spellings_of_a_file_make_two_locks(tmp_path: Path) -> None:
    """28: by symlinks, dots and relative paths."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").touch()
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "other").symlink_to("d/a")
    spellings = ["d/a", "link/a", "other", "d/../d/a", "d//a", os.path.relpath(tmp_path / "d/a")]
    paths = [os.path.join(tmp_path, spelling) for spelling in spellings[:-1]] + spellings[-1:]
    table = naive.FlockTable()
    for number, path in enumerate(paths):
        table.locks[path] = number
    assert len(table.locks) == len(paths)
    table.locks.clear()
    with PathLock(tmp_path / "d/a", base=tmp_path):
        for path in paths:
            lock = PathLock(path, base=tmp_path, timeout_s=0)
            assert isinstance(in_thread(lock.acquire), LockTimeoutError), path


# ---- names and places ------------------------------------------------------------------------------------------------


def test_08_a_path_leaves_the_base(tmp_path: Path) -> None:
    """8: by dots, and by a slash in front."""
    base = tmp_path / "base"
    base.mkdir()
    absolute = os.fspath(tmp_path / "absolute")
    for path in ("../up", absolute):
        naive.write_below(base, path, b"outside")
    assert (tmp_path / "up").exists()
    assert (tmp_path / "absolute").exists()
    store = FileStore(base, durability="atomic")
    for path in ("../up", absolute):
        with pytest.raises(PathOutsideError):
            store.write(path, b"ours")
    assert {(tmp_path / name).read_bytes() for name in ("up", "absolute")} == {b"outside"}


def test_28_a_symlink_swapped_in_between_check_and_open(tmp_path: Path) -> None:
    """28: the directory that was looked at is another one when it is opened."""
    base = tmp_path / "base"
    (tmp_path / "outside").mkdir()

    def reset() -> None:
        if (base / "d").is_symlink():
            (base / "d").unlink()
            (base / "moved").rename(base / "d")
        (base / "d").mkdir(parents=True, exist_ok=True)

    def swap() -> None:
        (base / "d").rename(base / "moved")
        (base / "d").symlink_to(tmp_path / "outside")

    reset()
    naive.write_checked(base, "d/a", b"naive", between=swap)
    assert (tmp_path / "outside/a").read_bytes() == b"naive"
    (tmp_path / "outside/a").unlink()
    store = FileStore(base, durability="atomic")
    swapped = 0
    for nth in range(1, 100):
        reset()
        seen: list[str] = []

        def swap_in(name: str, _: tuple[Any, ...], nth: int = nth, seen: list[str] = seen) -> None:
            seen.append(name)
            if len(seen) == nth:
                swap()

        with suppress(FileOperationError), each_call(swap_in):
            store.write("d/a", b"ours")
        assert list((tmp_path / "outside").rglob("a")) == [], (nth, seen)
        if len(seen) < nth:
            break
        swapped += 1
    assert swapped > 5


def test_28_names_that_are_no_utf8(tmp_path: Path) -> None:
    """28: ``decode`` fails on them."""
    name = b"caf\xe9.txt"
    with pytest.raises(UnicodeDecodeError):
        name.decode()
    store = FileStore(tmp_path, durability="atomic")
    store.write(name, b"1")
    [found] = store.find("caf?.txt")
    assert os.fsencode(found) == name
    assert store.read(found) == store.read(name) == b"1"
    with PathLock(os.path.join(os.fsencode(tmp_path), name)), FileTransaction(tmp_path, durability="atomic") as ours:
        ours.write(name, b"2")
    assert store.read(name) == b"2"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_28_temporary_files_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    """28: on ENOSPC and on KeyboardInterrupt."""

    def fail(name: str, _: tuple[Any, ...]) -> None:
        if name == "write":
            raise error

    for write in (naive.write_leaving_temp, atomic_write):
        directory = tmp_path / write.__name__
        directory.mkdir()
        with each_call(fail), pytest.raises((OSError, KeyboardInterrupt)):
            write(directory / "a", b"new")
    assert [path.name for path in (tmp_path / "write_leaving_temp").iterdir()] == ["a.tmp"]
    assert list((tmp_path / "atomic_write").iterdir()) == []


def test_28_a_temporary_file_that_the_users_own_pattern_finds(tmp_path: Path) -> None:
    """28: it has the suffix, for the sake of tools, and so it matches."""
    with tempfile.NamedTemporaryFile(suffix=".txt", dir=tmp_path):
        assert len(list(tmp_path.glob("*.txt"))) == 1
    store = FileStore(tmp_path, durability="atomic")
    store.write("a.txt", b"old")
    found: list[list[str]] = []

    def look(name: str, _: tuple[Any, ...]) -> None:
        if name == "rename":
            assert len(list(tmp_path.glob(".rp-*.txt"))) == 1
            found.append(list(store.find("**/*.txt")))

    with each_call(look):
        store.write("a.txt", b"new")
    assert found == [["a.txt"]]


def test_28_a_new_directory_is_lost_with_what_is_in_it(tmp_path: Path) -> None:
    """28: the directories above were not synced."""

    def without_openat2(name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model does not know it; there is another way."""
        if name == "openat2":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return call(*args, **kwargs)

    def make_naively(path: Path, content: bytes) -> None:
        calls.mkdir(os.fsencode(path.parent), 0o777)
        atomic_write(path, content)

    def write_in_store(path: Path, content: bytes) -> None:
        FileStore(path.parent.parent).write(f"new/{path.name}", content)

    for write in (make_naively, write_in_store):
        base = tmp_path / write.__name__
        base.mkdir()
        with PathLock(base / "x"):
            pass
        recording = Recording(base, Random(0))
        recording.around = without_openat2
        with recording:
            write(base / "new/a", b"content")
            recording.mark("returned")
        lost = [disk for disk in recording.disks(Random(0)) if disk.marks and b"new/a" not in disk.contents]
        assert bool(lost) == (write is make_naively)


# ---- status ----------------------------------------------------------------------------------------------------------


def test_11_a_status_table_of_text_in_one_kibibyte() -> None:
    """11: cut where it is full, confused by colons, blind to the death of owners."""
    table = naive.TextTable()
    table.set("a:b", "done")
    assert table.all() == {"a": "b"}
    for number in range(200):
        table.set(f"file {number}", "done")
    assert len(table.all()) < 200
    with FileStatusTable(f"test-{secrets.token_hex(8)}", 300) as ours:
        try:
            ours.set("a:b", FileState.AVAILABLE)
            ours.set("long" * 1000, FileState.AVAILABLE)
            for number in range(200):
                ours.set(f"file {number}", FileState.AVAILABLE)
            assert len(ours) == 202
            status = ours.get("a:b")
            assert status is not None
            assert (status.path, status.state) == ("a:b", FileState.AVAILABLE)
            with Child(child_store.claim, ours.name, "mine") as child:
                child.wait_for("claimed")
                assert not ours.claim("mine")
                child.kill()
            status = ours.get("mine")
            assert status is not None
            assert status.stale
            assert ours.claim("mine")
        finally:
            ours.unlink()

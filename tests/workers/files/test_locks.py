"""Path locks: one holder, in any process and thread, by any spelling; freed by death; never lost by a fork."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from tests.workers.files.child import Child, listen, say

from ringpool.errors import FileOperationError, LockTimeoutError
from ringpool.workers.files.locks import DESCRIPTORS_MAX, PathLock
from ringpool.workers.files.oslayer import intercepted


def lock_file(base: Path, lock: PathLock) -> Path:
    return base / f".ringpool/locks/{lock.stripe:02x}.lock"


def is_free(path: Path) -> bool:
    """Whether a stranger could take the lock file at ``path``."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


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


@contextmanager
def in_a_thread(action: Callable[[], None]) -> Iterator[threading.Thread]:
    """``action`` runs beside the block, and has ended when the block is left; its error is raised there."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join()
    if errors:
        raise errors[0]


def until(condition: Callable[[], object]) -> None:
    """Wait for ``condition``, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def hold(path: str) -> None:
    """For a child: hold the lock until the test answers."""
    with PathLock(path):
        say("held")
        listen()
    say("released")
    listen()


# ---- one holder ------------------------------------------------------------------------------------------------------


def test_two_processes_and_their_threads_never_hold_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    with Child(count_up, tmp_path, "300") as one, Child(count_up, tmp_path, "300") as two:
        one.succeed()
        two.succeed()
    assert (tmp_path / "count").read_text() == "1200"


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


def test_ctrl_c_while_waiting_leaves_nothing_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(hold, tmp_path / "a") as child:
        child.wait_for("held")
        lock = PathLock(tmp_path / "a")

        def interrupt(_: float) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", interrupt)
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

    def interrupt(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "fstat":
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    with intercepted(interrupt), pytest.raises(KeyboardInterrupt):
        lock.acquire()
    assert is_free(lock_file(tmp_path, lock))


# ---- one file, one lock file -----------------------------------------------------------------------------------------


def test_the_spellings_of_a_file_are_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "alias").symlink_to("real/deep/a")
    monkeypatch.chdir(tmp_path / "real")
    with Child(hold, tmp_path / "real/deep/a") as child:
        child.wait_for("held")
        spellings = [
            tmp_path / "link/deep/a",
            tmp_path / "real/../real/deep/a",
            tmp_path / "alias",
            "deep/a",
            os.fsencode(tmp_path / "link/deep/./a"),
        ]
        for path in spellings:
            with pytest.raises(LockTimeoutError):
                PathLock(path, timeout_s=0).acquire()
    assert (tmp_path / "real/deep/.ringpool").is_dir()
    assert sorted(os.listdir(tmp_path)) == ["alias", "link", "real"]


def test_a_directory_that_is_renamed_is_not_looked_for_at_its_old_place(tmp_path: Path) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "link").symlink_to("x/y")
    with PathLock(tmp_path / "link/a"):
        pass
    (tmp_path / "x").rename(tmp_path / "z")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("z/y")
    with PathLock(tmp_path / "link/a"), Child(try_it, tmp_path / "z/y/a") as child:
        child.wait_for("taken by somebody else")
    assert not (tmp_path / "x").exists()


def try_it(path: str) -> None:
    try:
        with PathLock(path, timeout_s=0):
            say("had")
    except LockTimeoutError:
        say("taken by somebody else")


def test_the_outermost_ringpool_directory_holds_the_lock_files(tmp_path: Path) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    lock = PathLock(tmp_path / "x/y/a")
    for base in ("x/y", "x", ""):
        (tmp_path / base / ".ringpool").mkdir(exist_ok=True)
        with lock:
            assert not is_free(lock_file(tmp_path / base, lock))


def test_the_caller_may_name_the_base(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "locks").mkdir()
    lock = PathLock(tmp_path / "x/a", base=tmp_path / "locks")
    with lock:
        assert not is_free(lock_file(tmp_path / "locks", lock))
    assert os.listdir(tmp_path / "x") == []


def test_a_neighbour_that_made_a_ringpool_directory_further_out_is_followed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    lock = PathLock(tmp_path / "x/a")

    def meanwhile(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "mkdir":
            (tmp_path / ".ringpool").mkdir(exist_ok=True)
        return call(*args, **kwargs)

    with intercepted(meanwhile):
        lock.acquire()
    try:
        assert not is_free(lock_file(tmp_path, lock))
    finally:
        lock.release()


def test_nothing_is_made_beside_the_files_but_the_ringpool_directory(tmp_path: Path) -> None:
    for name in (b"a", b"n" * 254, b"caf\xe9\xff", b"a\nb"):
        with PathLock(os.path.join(os.fsencode(tmp_path), name)):
            pass
    assert os.listdir(tmp_path) == [".ringpool"]
    assert os.listdir(tmp_path / ".ringpool") == ["locks"]
    assert len(os.listdir(tmp_path / ".ringpool/locks")) <= 4


def test_the_lock_directory_is_open_to_whom_the_base_is_open_to(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2770)
    with PathLock(tmp_path / "shared/a"):
        pass
    for made in (".ringpool", ".ringpool/locks"):
        assert stat.S_IMODE((tmp_path / "shared" / made).stat().st_mode) == 0o2770


def test_a_lock_file_that_we_may_not_write_is_locked_all_the_same(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    with lock:
        pass
    shutil.move(tmp_path / ".ringpool", tmp_path / "x")  # so that it is opened anew
    shutil.copytree(tmp_path / "x", tmp_path / ".ringpool")

    def deny(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[1] & os.O_RDWR:
            raise PermissionError(errno.EACCES, "")
        return call(*args, **kwargs)

    with intercepted(deny), lock:
        assert not is_free(lock_file(tmp_path, lock))


@pytest.mark.parametrize(
    ("path", "error"),
    [("missing/a", errno.ENOENT), ("file/a", errno.ENOTDIR), ("", errno.EISDIR), ("circle/a", errno.ELOOP)],
)
def test_a_path_that_cannot_be_locked_is_named(tmp_path: Path, path: str, error: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(FileOperationError) as caught:
        PathLock(f"{tmp_path}/{path}").acquire()
    assert (caught.value.path, caught.value.errno) == (f"{tmp_path}/{path}", error)


def test_a_base_where_no_lock_file_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / ".ringpool").touch()
    with pytest.raises(FileOperationError, match=r"\.ringpool"):
        PathLock(tmp_path / "a").acquire()


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


def test_descriptors_are_bounded_and_one_that_is_held_stays_open(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", base=tmp_path)
    with lock:
        for other in names_on_other_stripes(tmp_path, lock, 150):
            with other:
                pass
        assert len(open_lock_files()) <= DESCRIPTORS_MAX
        assert not is_free(lock_file(tmp_path, lock))
    assert is_free(lock_file(tmp_path, lock))


def test_more_locks_than_descriptors_may_be_held(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a", base=tmp_path)
    others = names_on_other_stripes(tmp_path, lock, DESCRIPTORS_MAX + 10)
    for other in others:
        other.acquire()
    try:
        assert not any(is_free(lock_file(tmp_path, other)) for other in others)
    finally:
        for other in others:
            other.release()
    with lock:
        pass
    assert len(open_lock_files()) <= DESCRIPTORS_MAX


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

"""Atomic writes and task outputs: whole or not at all, whatever fails, whoever is killed."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.workers.files.child import Child, say

from ringpool.errors import AtomicWriteError, DurabilityError, FileOperationError, OutputMissingError
from ringpool.workers.files import atomic
from ringpool.workers.files.atomic import (
    CommitSide,
    Durability,
    atomic_write,
    discard_staged,
    finish_staged,
    prepare_target,
    publish_staged,
    resolve_target,
    which_side,
)
from ringpool.workers.files.naming import is_staging_name, random_token, staging_name
from ringpool.workers.files.oslayer import calls, intercepted

ACL = "system.posix_acl_access"
# user::rw- user:1000:r-- group::r-- mask::r-- other::---, as acl(5) and linux/posix_acl_xattr.h lay it out
ACL_USER_1000 = bytes.fromhex(
    "02000000 01000600ffffffff 02000400e8030000 04000400ffffffff 10000400ffffffff 20000000ffffffff"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")

Call = tuple[str, tuple[Any, ...], Any]


@contextmanager
def traced() -> Iterator[list[Call]]:
    """The calls of the block: name, positional arguments, result."""
    trace: list[Call] = []

    def record(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call(*args, **kwargs)
        trace.append((name, args, result))
        return result

    with intercepted(record):
        yield trace


@contextmanager
def failing(wanted: Callable[[int, str], bool], error: int) -> Iterator[list[str]]:
    """The calls for which ``wanted(n, name)`` fail with ``error``; yields the names of all calls."""
    seen: list[str] = []

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(name)
        if wanted(len(seen), name):
            if name == "close":
                call(*args, **kwargs)  # the kernel closes, whatever it says
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    with intercepted(fail):
        yield seen


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def run_task(target: bytes, content: bytes, level: Durability) -> None:
    """What a worker does with a task that has an output."""
    target = prepare_target(target, level)
    staged = staging_name(target, random_token())
    with open(staged, "wb") as output:
        output.write(content)
    finish_staged(staged, target, level)
    publish_staged(staged, target, level)


Writer = Callable[[Path, bytes, Durability], None]
WRITERS: dict[str, Writer] = {
    "write": lambda path, content, level: atomic_write(path, content, durability=level),
    "task": lambda path, content, level: run_task(os.fsencode(path), content, level),
}
LEVELS = [Durability.ATOMIC, Durability.DATA, Durability.FULL]


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", list(Durability))
@pytest.mark.parametrize(
    ("content", "octets"),
    [
        (b"", b""),
        (b"bytes\r\n\0\xff", b"bytes\r\n\0\xff"),
        ("text\r\n\u20ac", "text\r\n\u20ac".encode()),
        (bytearray(b"array"), b"array"),
        (memoryview(b"0123456789")[::2], b"02468"),
        (memoryview(b"\1\0\2\0").cast("H"), b"\1\0\2\0"),
    ],
)
def test_the_content_is_what_was_given(tmp_path: Path, level: Durability, content: Any, octets: bytes) -> None:
    for _ in range(2):  # made, then replaced
        atomic_write(tmp_path / "a.bin", content, durability=level)
        assert (tmp_path / "a.bin").read_bytes() == octets
    assert names(tmp_path) == {"a.bin"}


def test_a_level_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fully"):
        atomic_write(tmp_path / "a", b"", durability="fully")
    assert names(tmp_path) == set()


def test_names_need_not_be_text_and_may_be_as_long_as_the_directory_takes(tmp_path: Path) -> None:
    for name in (b"caf\xe9\xff.txt", b"n" * 255, b"n" * 251 + b".txt"):
        path = os.path.join(os.fsencode(tmp_path), name)
        atomic_write(path, name, durability="atomic")
        run_task(path, name, Durability.ATOMIC)
        with open(path, "rb") as file:
            assert file.read() == name


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atomic_write("a", b"1")
    run_task(b"b", b"2", Durability.FULL)
    run_task(b"new/c", b"3", Durability.FULL)
    assert names(tmp_path) == {"a", "b", "new"}


def test_writers_of_one_stem_meet_neither_each_other_nor_the_users_own_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_text("mine")
    errors: list[BaseException] = []

    def write(suffix: str) -> None:
        path = tmp_path / f"a.{suffix}"
        try:
            for _ in range(300):
                atomic_write(path, suffix * 1000, durability="atomic")
                if path.read_text() != suffix * 1000:
                    raise AssertionError(f"{path} holds something else")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(suffix,)) for suffix in ("txt", "csv", "tar.gz")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == {"a.tmp", "a.txt", "a.csv", "a.tar.gz"}
    assert (tmp_path / "a.tmp").read_text() == "mine"


def test_the_temporary_file_is_private_hidden_and_on_the_targets_file_system(tmp_path: Path) -> None:
    target = tmp_path / "a.tar.gz"
    target.write_text("old")
    target.chmod(0o600)
    found: list[tuple[str, os.stat_result]] = []

    def look(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "write":
            [temp] = names(tmp_path) - {"a.tar.gz"}
            found.append((temp, (tmp_path / temp).stat()))
        return call(*args, **kwargs)

    with intercepted(look):
        atomic_write(target, b"new")
    [(temp, status)] = found
    assert temp.endswith(".tar.gz")
    assert is_staging_name(temp.encode())
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_dev == tmp_path.stat().st_dev


# ---- the order that durability needs ---------------------------------------------------------------------------------


def synced(trace: list[Call]) -> list[str]:
    """The trace as a story: which kind of file was synced, and the rename."""
    kinds: dict[int, str] = {}
    story: list[str] = []
    for name, args, result in trace:
        if name == "open":
            kinds[result] = "directory" if args[1] & os.O_DIRECTORY else "file"
        elif name == "fsync":
            story.append(kinds[args[0]])
        elif name in ("rename", "write", "fchmod"):
            story.append(name)
    return story


@pytest.mark.parametrize(
    ("level", "after_write", "after_rename"),
    [
        (Durability.ATOMIC, [], []),
        (Durability.DATA, ["file"], []),
        (Durability.FULL, ["file"], ["directory"]),
    ],
)
def test_the_file_is_synced_before_its_rename_and_the_directory_after_it(
    tmp_path: Path, level: Durability, after_write: list[str], after_rename: list[str]
) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    with traced() as trace:
        atomic_write(tmp_path / "a", b"new", durability=level)
    assert synced(trace) == ["write", "fchmod", *after_write, "rename", *after_rename]
    prepare_target(os.fsencode(tmp_path / "a"), level)  # what it syncs once is another test's matter
    with traced() as trace:
        run_task(os.fsencode(tmp_path / "a"), b"new", level)
    assert synced(trace) == ["fchmod", *after_write, "rename", *after_rename]


def test_a_new_directory_is_on_disk_before_anything_is_made_in_it(tmp_path: Path) -> None:
    target = os.fsencode(tmp_path / "x/y/z/a")
    with traced() as trace:
        prepare_target(target, Durability.FULL)
    opened: dict[int, tuple[int, int]] = {}
    story: list[tuple[str, Any]] = []
    for name, args, result in trace:
        if name == "open":
            opened[result] = identity(args[0])
        elif name == "fsync":
            story.append((name, opened[args[0]]))
        elif name == "mkdir":
            story.append((name, identity(args[0])))
    where = [identity(os.fsencode(tmp_path / part)) for part in ("", "x", "x/y", "x/y/z")]
    assert story == [pair for n in range(3) for pair in (("mkdir", where[n + 1]), ("fsync", where[n]))]
    with traced() as trace:
        prepare_target(target, Durability.FULL)
    assert synced(trace) == []  # remembered


def test_a_directory_that_a_neighbour_may_have_left_unsynced_is_synced_once(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    stories: list[list[str]] = []
    for level in (Durability.DATA, Durability.FULL, Durability.FULL):
        with traced() as trace:
            prepare_target(os.fsencode(tmp_path / "theirs/a"), level)
        stories.append(synced(trace))
    assert stories == [[], ["directory"], []]


def identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EDQUOT])
def test_any_call_may_fail_and_nothing_is_torn_or_left(
    tmp_path: Path, writer: str, level: Durability, old: bytes | None, error: int
) -> None:
    path = tmp_path / "a.bin"
    n_failed = 0
    for nth in count(1):
        if old is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(old)
            path.chmod(0o640)
        files = open_files()
        with failing(lambda n, _, nth=nth: n == nth, error) as seen:
            try:
                WRITERS[writer](path, b"new", level)
                failure = None
            except FileOperationError as raised:
                failure = raised
        content = path.read_bytes() if path.exists() else None
        assert names(tmp_path) <= {"a.bin"}, seen
        assert open_files() == files, seen
        if failure is None:
            assert content == b"new", seen
        else:
            n_failed += 1
            assert failure.errno == error
            after = isinstance(failure, DurabilityError) and "after the rename" in failure.operation
            assert content == (b"new" if after else old), seen
        if len(seen) < nth:
            break
    assert n_failed >= 4


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_short_write_is_carried_on(tmp_path: Path, step: int) -> None:
    content = os.urandom(2500)

    def shorten(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(args[0], args[1][:step]) if name == "write" else call(*args, **kwargs)

    for level in Durability:
        with intercepted(shorten):
            atomic_write(tmp_path / "a", content, durability=level)
        assert (tmp_path / "a").read_bytes() == content


def test_a_write_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    zero = lambda name, call, args, kwargs: 0 if name == "write" else call(*args, **kwargs)  # noqa: E731
    with intercepted(zero), pytest.raises(AtomicWriteError):
        atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_fsync_is_never_retried(tmp_path: Path, writer: str) -> None:
    (tmp_path / "a").write_text("old")
    prepare_target(os.fsencode(tmp_path / "a"))
    with failing(lambda _, name: name == "fsync", errno.EIO) as seen, pytest.raises(DurabilityError):
        WRITERS[writer](tmp_path / "a", b"new", Durability.FULL)
    assert seen.count("fsync") == 1
    assert "rename" not in seen
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_an_error_of_close_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with failing(lambda _, name: name == "close", errno.EDQUOT), pytest.raises(AtomicWriteError) as caught:
        atomic_write(tmp_path / "a", b"new", durability="atomic")
    assert (caught.value.operation, caught.value.errno) == ("close", errno.EDQUOT)
    assert (tmp_path / "a").read_text() == "old"


def test_an_error_says_which_file_and_which_step(tmp_path: Path) -> None:
    path = tmp_path / "missing/a"
    with pytest.raises(AtomicWriteError) as caught:
        atomic_write(path, b"")
    assert isinstance(caught.value, OSError)
    assert (caught.value.path, caught.value.errno) == (str(path), errno.ENOENT)
    assert str(caught.value) == f"{path}: open its directory: No such file or directory"


def test_the_disk_is_really_full(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    (tmp_path / "a").write_text("old")
    full = lambda name, call, args, kwargs: call(fd, *args[1:]) if name == "write" else call(*args, **kwargs)  # noqa: E731
    try:
        with intercepted(full), pytest.raises(AtomicWriteError) as caught:
            atomic_write(tmp_path / "a", b"new")
    finally:
        os.close(fd)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "old"


def test_an_error_of_the_clean_up_does_not_leave_the_temporary_file(tmp_path: Path) -> None:
    failures = {"write": 1, "unlink": 1}

    def wanted(_: int, name: str) -> bool:
        failures[name] = failures.get(name, 0) - 1
        return failures[name] == 0

    with failing(wanted, errno.EIO), pytest.raises(AtomicWriteError, match="write"):
        atomic_write(tmp_path / "a", b"new")
    assert names(tmp_path) == set()


def test_a_file_that_has_our_temporary_name_already_is_not_removed(tmp_path: Path) -> None:
    def precede(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[1] & os.O_EXCL:
            (tmp_path / os.fsdecode(args[0])).write_text("theirs")
        return call(*args, **kwargs)

    with intercepted(precede), pytest.raises(AtomicWriteError) as caught:
        atomic_write(tmp_path / "a", b"new")
    assert caught.value.errno == errno.EEXIST
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("disk_is_full", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_ctrl_c_at_any_bytecode_leaves_no_temporary_file(tmp_path: Path, exclusive: bool, disk_is_full: bool) -> None:
    path = tmp_path / "a.bin"

    def write() -> None:
        with failing(lambda _, name: name == "write" and disk_is_full, errno.ENOSPC), suppress(AtomicWriteError):
            atomic_write(path, b"new", durability="atomic", exclusive=exclusive)

    n_interrupted = 0
    for nth in count(1):
        if exclusive:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(b"old")
        interrupted = interrupt_at(nth, write)
        assert names(tmp_path) <= {"a.bin"}, nth
        if path.exists():
            assert path.read_bytes() in (b"old", b"new")
        if not interrupted:
            break
        n_interrupted += 1
    assert n_interrupted > 100


def interrupt_at(nth: int, action: Callable[[], None]) -> bool:
    """Run ``action``, and raise KeyboardInterrupt before the nth bytecode of atomic.py; whether it came to that."""
    left = nth
    source = atomic.__file__

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != source:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one such frame when tracing begins
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_content_and_nothing_that_is_not_ours(
    tmp_path: Path, writer: str
) -> None:
    with Child(die_at_every_call, tmp_path, writer) as child:
        child.succeed()


def die_at_every_call(directory: str, writer: str) -> None:
    path = Path(directory, "a.bin")
    committed = False
    for nth in count(1):
        path.write_bytes(b"old")
        pid = os.fork()
        if pid == 0:
            die_at(nth, lambda: WRITERS[writer](path, b"new", Durability.FULL))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        content = path.read_bytes()
        assert content in (b"old", b"new"), content
        assert content == b"new" or not committed, "killed later, and less done"
        committed = content == b"new"
        left = names(Path(directory)) - {"a.bin"}
        assert len(left) <= 1
        assert all(is_staging_name(name.encode()) for name in left)
        for name in left:
            Path(directory, name).unlink()
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert committed


def die_at(nth: int, action: Callable[[], None]) -> None:
    left = nth

    def die(_: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    with intercepted(die):
        action()


def test_a_reader_never_sees_a_torn_file_while_writers_are_killed_at_random(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"\0" * 50_000)
    chance = random.Random(16)
    for _ in range(8):
        with Child(write_for_ever, path) as child:
            child.wait_for("writing")
            for _ in range(chance.randrange(5, 400)):
                content = path.read_bytes()
                assert len(content) == 50_000
                assert content == content[:1] * 50_000
            child.kill()
    left = names(tmp_path) - {"a.bin"}
    assert all(is_staging_name(name.encode()) for name in left)


def write_for_ever(path: str) -> None:
    for n in count(1):
        atomic_write(path, bytes([n % 256]) * 50_000, durability="atomic")
        if n == 1:
            say("writing")


# ---- what stands at the target already -------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_a_symlink_is_followed(tmp_path: Path, writer: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a").write_text("old")
    (tmp_path / "link").symlink_to("real/a")
    (tmp_path / "dangling").symlink_to("real/b")
    for name, real in (("link", "real/a"), ("dangling", "real/b")):
        before = resolve_target(os.fsencode(tmp_path / name))
        WRITERS[writer](tmp_path / name, b"new", Durability.FULL)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / real).read_text() == "new"
        assert resolve_target(os.fsencode(tmp_path / name)) == before == os.fsencode(tmp_path / real)
    assert names(tmp_path / "real") == {"a", "b"}


@pytest.mark.parametrize("level", list(Durability))
def test_a_symlink_is_replaced_or_refused_where_that_is_asked_for(tmp_path: Path, level: Durability) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(FileOperationError) as caught:
        atomic_write(tmp_path / "link", b"new", symlinks="refuse", durability=level)
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "link").is_symlink()
    atomic_write(tmp_path / "link", b"new", symlinks="replace", durability=level)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "old"


def test_a_hard_link_is_split_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    with pytest.raises(AtomicWriteError) as caught:
        atomic_write(tmp_path / "a", b"new", hard_links="refuse")
    assert caught.value.errno == errno.EMLINK
    atomic_write(tmp_path / "a", b"new")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("new", "old")


def make_circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: os.mkfifo(path), errno.EINVAL),
        (lambda path: path.symlink_to("/dev/null"), errno.EINVAL),
        (lambda path: path.mkdir(), errno.EISDIR),
        (make_circle, errno.EINVAL),
    ],
)
def test_what_is_no_regular_file_is_not_replaced(
    tmp_path: Path, writer: str, make: Callable[[Path], None], error: int
) -> None:
    make(tmp_path / "a")
    before = (tmp_path / "a").lstat()
    with pytest.raises(AtomicWriteError) as caught:
        WRITERS[writer](tmp_path / "a", b"new", Durability.FULL)
    assert caught.value.errno == error
    assert (tmp_path / "a").lstat() == before
    assert names(tmp_path) == {"a"}
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("without_renameat2", [False, True])
@pytest.mark.parametrize("level", list(Durability))
def test_an_exclusive_write_makes_a_file_once(tmp_path: Path, level: Durability, without_renameat2: bool) -> None:
    path = tmp_path / "a"
    with failing(lambda _, name: name == "rename_exclusive", errno.EINVAL) if without_renameat2 else nullcontext():
        atomic_write(path, b"first", exclusive=True, durability=level)
        with pytest.raises(FileOperationError) as caught:
            atomic_write(path, b"second", exclusive=True, durability=level)
        assert caught.value.errno == errno.EEXIST
        (tmp_path / "dangling").symlink_to("nowhere")
        with pytest.raises(FileOperationError):
            atomic_write(tmp_path / "dangling", b"", exclusive=True, durability=level)
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == {"a", "dangling"}
    assert path.stat().st_nlink == 1


@pytest.mark.parametrize("without_renameat2", [False, True])
def test_an_exclusive_write_loses_to_one_that_came_after_its_look(tmp_path: Path, without_renameat2: bool) -> None:
    path = tmp_path / "a"

    def meanwhile(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "write":
            path.write_text("theirs")
        if name == "rename_exclusive" and without_renameat2:
            raise OSError(errno.ENOSYS, "")
        return call(*args, **kwargs)

    with intercepted(meanwhile), pytest.raises(AtomicWriteError) as caught:
        atomic_write(path, b"ours", exclusive=True)
    assert caught.value.errno == errno.EEXIST
    assert path.read_text() == "theirs"
    assert names(tmp_path) == {"a"}


# ---- owner, mode, attributes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_new_file_has_the_mode_that_the_umask_leaves_or_the_one_that_is_asked_for(
    tmp_path: Path, level: Durability
) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", b"", durability=level)
        atomic_write(tmp_path / "b", b"", durability=level, mode=0o646)
        atomic_write(tmp_path / "a", b"", durability=level)
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "a"), mode_of(tmp_path / "b")) == (0o640, 0o646)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("old", "new"), [(0o640, 0o640), (0o755, 0o755), (0o4755, 0o755), (0o600, 0o600)])
def test_the_mode_of_the_replaced_file_is_kept_but_for_set_id_bits(
    tmp_path: Path, writer: str, old: int, new: int
) -> None:
    (tmp_path / "a").write_bytes(b"\xff\r\n")
    (tmp_path / "a").chmod(old)
    WRITERS[writer](tmp_path / "a", b"\r\n\xfe", Durability.ATOMIC)
    assert mode_of(tmp_path / "a") == new
    assert (tmp_path / "a").read_bytes() == b"\r\n\xfe"


def test_an_output_without_predecessor_keeps_the_mode_that_its_function_gave_it(tmp_path: Path) -> None:
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    (tmp_path / "s").touch(0o600)
    (tmp_path / "s").chmod(0o711)
    finish_staged(staged, target, Durability.ATOMIC)
    publish_staged(staged, target, Durability.ATOMIC)
    assert mode_of(tmp_path / "a") == 0o711


@pytest.mark.parametrize("writer", WRITERS)
def test_extended_attributes_and_acls_are_kept(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "a"
    path.touch()
    try:
        os.setxattr(path, "user.origin", b"theirs")
        os.setxattr(path, ACL, ACL_USER_1000)
    except OSError:
        pytest.skip("this file system has no such attributes")
    WRITERS[writer](path, b"new", Durability.ATOMIC)
    assert os.getxattr(path, "user.origin") == b"theirs"
    assert os.getxattr(path, ACL) == ACL_USER_1000


def test_an_attribute_that_the_function_set_is_not_overwritten(tmp_path: Path) -> None:
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    for path, value in ((staged, b"new"), (target, b"old")):
        Path(os.fsdecode(path)).touch()
        try:
            os.setxattr(path, "user.origin", value)
        except OSError:
            pytest.skip("this file system has no such attributes")
    finish_staged(staged, target, Durability.ATOMIC)
    assert os.getxattr(staged, "user.origin") == b"new"


def test_an_acl_inherited_from_the_directory_does_not_open_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    path.chmod(0o600)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", ACL_USER_1000)
    except OSError:
        pytest.skip("this file system has no ACLs")
    atomic_write(path, b"new")
    assert ACL not in os.listxattr(path)
    assert mode_of(path) == 0o600


@as_root
@pytest.mark.parametrize("writer", WRITERS)
def test_the_owner_is_kept_where_we_may_give_the_file_away(tmp_path: Path, writer: str) -> None:
    (tmp_path / "a").touch()
    os.chown(tmp_path / "a", 1234, 5678)
    WRITERS[writer](tmp_path / "a", b"new", Durability.ATOMIC)
    status = (tmp_path / "a").stat()
    assert (status.st_uid, status.st_gid) == (1234, 5678)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_group_that_cannot_be_kept_takes_its_rights_along(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.touch()
    path.chmod(0o664)
    real = path.stat()
    foreign = os.stat_result((*real[:4], real.st_uid + 1, real.st_gid + 1, *real[6:]))

    def not_root(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "fchown":
            raise PermissionError(errno.EPERM, "")
        if name == "stat" and args[0] == os.fsencode(path):
            return foreign
        return call(*args, **kwargs)

    with intercepted(not_root):
        WRITERS[writer](path, b"new", Durability.ATOMIC)
    assert mode_of(path) == 0o644
    assert path.read_bytes() == b"new"


# ---- a task's output -------------------------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.fspath(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda _: None,
        lambda path: path.mkdir(),
        lambda path: (path / "deep").mkdir(parents=True),
        lambda path: path.symlink_to("/etc/hostname"),
        lambda path: os.mkfifo(path),
        make_socket,
    ],
    ids=["nothing", "directory", "tree", "symlink", "pipe", "socket"],
)
def test_a_function_that_wrote_no_regular_file_is_told_so(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path("s"))
    with pytest.raises(OutputMissingError) as caught:
        finish_staged(b"s", b"a", Durability.FULL)
    assert (caught.value.output, caught.value.staged) == ("a", "s")
    assert names(tmp_path) == set()


def test_finishing_tells_the_identity_that_the_file_keeps(tmp_path: Path) -> None:
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    (tmp_path / "s").write_text("four")
    file = finish_staged(staged, target, Durability.FULL)
    assert file.size == 4
    assert which_side(staged, target, file.ino, file.dev) is CommitSide.STAGED
    publish_staged(staged, target, Durability.FULL)
    assert which_side(staged, target, file.ino, file.dev) is CommitSide.TARGET
    assert identity(target) == (file.dev, file.ino)


@pytest.mark.parametrize(
    ("staged", "target", "side"),
    [
        ("it", None, CommitSide.STAGED),
        ("it", "other", CommitSide.STAGED),
        ("it", "it", CommitSide.STAGED),
        (None, "it", CommitSide.TARGET),
        (None, "other", CommitSide.UNKNOWN),
        (None, None, CommitSide.UNKNOWN),
        ("other", None, CommitSide.UNKNOWN),
        ("other", "it", CommitSide.UNKNOWN),
    ],
)
def test_the_disk_tells_on_which_side_of_the_commit_a_writer_died(
    tmp_path: Path, staged: str | None, target: str | None, side: CommitSide
) -> None:
    for file in ("it", "other"):
        (tmp_path / file).touch()
    for place, file in (("s", staged), ("a", target)):
        if file is not None:
            (tmp_path / place).hardlink_to(tmp_path / file)
    device, inode = identity(os.fsencode(tmp_path / "it"))
    assert which_side(os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a"), inode, device) is side


def test_a_disk_that_cannot_be_read_leaves_the_commit_in_doubt(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    device, inode = identity(os.fsencode(tmp_path / "s"))
    with failing(lambda *_: True, errno.EIO):
        side = which_side(os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a"), inode, device)
    assert side is CommitSide.UNKNOWN


def test_an_output_that_is_a_link_of_its_target_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    (tmp_path / "s").hardlink_to(tmp_path / "a")
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    finish_staged(staged, target, Durability.FULL)
    publish_staged(staged, target, Durability.FULL)
    assert names(tmp_path) == {"a"}


def test_an_output_that_is_a_link_of_its_input_does_not_change_the_input(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("same")
    (tmp_path / "source").chmod(0o444)
    (tmp_path / "a").touch(0o600)
    (tmp_path / "s").hardlink_to(tmp_path / "source")
    finish_staged(os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a"), Durability.ATOMIC)
    assert mode_of(tmp_path / "source") == 0o444


def test_neighbours_may_make_one_directory_at_once(tmp_path: Path) -> None:
    target = os.fsencode(tmp_path / "x/y/z/a")

    def faster(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "mkdir":
            with suppress(FileExistsError):
                os.mkdir(args[0])
        return call(*args, **kwargs)

    with intercepted(faster):
        assert prepare_target(target) == target
    assert (tmp_path / "x/y/z").is_dir()


@pytest.mark.parametrize("path", ["file/x/a", "file/a"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AtomicWriteError) as caught:
        prepare_target(os.fsencode(tmp_path / path))
    assert str(tmp_path / "file") in str(caught.value)
    assert caught.value.errno == errno.ENOTDIR


def test_a_directory_that_is_named_by_way_of_a_missing_one_is_made(tmp_path: Path) -> None:
    assert prepare_target(os.fsencode(tmp_path / "new/../a")) == os.fsencode(tmp_path / "new/../a")
    assert names(tmp_path) == {"new"}


def test_discarding_what_is_not_there_is_fine(tmp_path: Path) -> None:
    discard_staged(os.fsencode(tmp_path / "s"))
    assert calls.access(tmp_path, os.F_OK)

"""Atomic writes: whole or not at all, whatever fails, whoever is killed."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_atomic import (
    LEVELS,
    WRITERS,
    die_at_every_call,
    failing,
    interrupt_at,
    names,
    open_files,
    run_task,
    synced,
    traced,
    write_for_ever,
)

from ringpool.errors import AtomicWriteError, DurabilityError, FileOperationError
from ringpool.workers.files.atomic import atomic_write
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.naming import is_staging_name
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.output import (
    prepare_target,
)

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
        assert open_files() <= files, seen  # fewer: garbage of other tests
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


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_content_and_nothing_that_is_not_ours(
    tmp_path: Path, writer: str
) -> None:
    with Child(die_at_every_call, tmp_path, writer) as child:
        child.succeed()


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


@pytest.mark.parametrize("without_renameat2", [False, True])
@pytest.mark.parametrize("level", list(Durability))
def test_an_exclusive_write_makes_a_file_once(tmp_path: Path, level: Durability, without_renameat2: bool) -> None:
    path = tmp_path / "a"
    with failing(lambda _, name: name == "rename_exclusive", errno.EINVAL) if without_renameat2 else nullcontext():
        atomic_write(path, b"first", exclusive=True, durability=level)
        with pytest.raises(FileOperationError) as caught:
            atomic_write(path, b"second", exclusive=True, durability=level)
        assert isinstance(caught.value, FileExistsError)
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
    assert isinstance(caught.value, FileExistsError)
    assert caught.value.errno == errno.EEXIST
    assert path.read_text() == "theirs"
    assert names(tmp_path) == {"a"}


# ---- in place --------------------------------------------------------------------------------------------------------


def test_in_place_as_well_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
            with pytest.raises(FileOperationError):
                atomic_write(path, "x", durability="none")
    finally:
        os.close(reader)
    with pytest.raises(FileOperationError):  # a pipe that nobody reads: it does not wait for a reader
        atomic_write(tmp_path / "pipe", "x", durability="none")


def test_in_place_as_well_hard_links_may_be_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AtomicWriteError) as caught:
        atomic_write(tmp_path / "a", "new", durability="none", hard_links="refuse")
    assert caught.value.errno == errno.EMLINK
    assert (tmp_path / "b").read_text() == "old"
    atomic_write(tmp_path / "a", "n", durability="none")
    assert (tmp_path / "b").read_text() == "n"


@pytest.mark.parametrize("durability", ["none", "atomic"])
@pytest.mark.parametrize("choice", [{"symlinks": "refused"}, {"hard_links": "keep"}])
def test_a_word_that_stands_for_nothing_is_refused(tmp_path: Path, durability: str, choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is one of"):
        atomic_write(tmp_path / "a", b"new", durability=durability, **choice)
    assert list(tmp_path.iterdir()) == []

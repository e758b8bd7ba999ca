"""Tables by name: opened without a race, refused where they cannot be used, and unlinked for everybody."""

from __future__ import annotations

import errno
import os
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.shm import child_status
from tests.shm.child_status import files_of, is_asleep, path_of, until
from tests.shm.test_segment import in_a_small_shared_memory
from tests.workers.files.child import Child

from ringpool.errors import (
    RingpoolError,
    SegmentError,
    SegmentFormatError,
    SegmentIncompleteError,
    SegmentMissingError,
    SegmentPermissionError,
    SegmentTruncatedError,
    SharedMemoryFullError,
    StatusHeldError,
    StatusReentryError,
    StatusStepError,
    StatusTableError,
    StatusTableFullError,
    StatusTimeoutError,
)
from ringpool.shm import entries as layout, lock
from ringpool.shm.status import FileState, FileStatusTable, unlink_status_table
from ringpool.shm.tables import segment_of

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def test_processes_that_open_at_once_get_one_table(name: str) -> None:
    children = [Child(child_status.open_at_once, name, "50") for _ in range(6)]
    try:
        for child in children:
            child.wait_for("ready")
        for child in children:
            child.answer()
        uuids = set()
        for child in children:
            assert child.process.stdout is not None
            uuids.add(child.process.stdout.readline())
        assert len(uuids) == 1
        with FileStatusTable(name) as table:
            assert {status.path for status in table} == {f"/of/{child.pid}" for child in children}
            assert table.capacity == 50
    finally:
        for child in children:
            child.__exit__(None, None, None)


def test_a_table_outlives_those_who_use_it(name: str) -> None:
    with FileStatusTable(name, 5) as table:
        table.set("a", FileState.DONE)
    with FileStatusTable(name) as table:
        assert table.capacity == 5
        assert "a" in table
    with pytest.raises(ValueError, match="is closed"):
        table.get("a")
    table.close()


def test_another_capacity_than_it_was_made_with_is_refused(table: FileStatusTable) -> None:
    with pytest.raises(ValueError, match=r"was made with capacity=100, not 50"):
        FileStatusTable(table.name, 50)


@pytest.mark.parametrize("bad", ["", "a/b", "../x", "a\0", ".hidden", "a@b", "x" * 65, "ä"])
def test_names_that_are_none_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="a status table's name has 1 to 64"):
        FileStatusTable(bad)


@pytest.mark.parametrize("capacity", [0, -1, layout.CAPACITY_MAX + 1])
def test_capacities_out_of_range_are_refused(capacity: int, name: str) -> None:
    with pytest.raises(ValueError, match="capacity must be from 1 to"):
        FileStatusTable(name, capacity)
    assert files_of(name) == []


def test_pickled_it_is_the_same_table(table: FileStatusTable) -> None:
    with pickle.loads(pickle.dumps(table)) as again:
        again.set("a", FileState.DONE)
    assert "a" in table
    pickled = pickle.dumps(table)
    table.unlink()
    with pytest.raises(SegmentMissingError, match="there is none of that name"):
        pickle.loads(pickled)


def test_an_unlinked_table_is_refused_by_all_who_have_it(table: FileStatusTable, other: FileStatusTable) -> None:
    other.claim("a")
    with Child(child_status.wait, table.name, "a") as waiter:
        waiter.wait_for("waiting")
        until(lambda: is_asleep(waiter.pid))
        table.unlink()
        table.unlink()
        assert waiter.process.wait() == 1  # SegmentMissingError
    assert files_of(table.name) == []
    for use in (lambda: other.get("a"), lambda: other.claim("b"), lambda: len(other), other.counts, other.snapshot):
        with pytest.raises(SegmentMissingError, match="it was unlinked; open the table anew"):
            use()
    with FileStatusTable(table.name, 3) as new:
        new.claim("b")
        table.unlink()  # of the old one: the new one stays
        other.unlink()
        assert len(FileStatusTable.attach(table.name)) == 1


def test_a_half_unlinked_table_is_made_anew(table: FileStatusTable, name: str) -> None:
    table.set("a", FileState.DONE)
    os.mkdir(table._bells)
    os.mkfifo(f"{table._bells}/{7:016x}")
    table._entries.mark_unlinked()
    with FileStatusTable(name, 7) as new:
        assert (new.capacity, len(new)) == (7, 0)
    assert files_of(name) == [segment_of(name)]
    assert unlink_status_table(name)
    assert not unlink_status_table(name)


def test_a_full_shared_memory_is_an_error_that_leaves_nothing() -> None:
    said = in_a_small_shared_memory(
        512,
        """
import os
from ringpool.errors import SharedMemoryFullError
from ringpool.shm.status import FileStatusTable
for capacity in (10_000, 2_600, 100):
    try:
        with FileStatusTable("t", capacity) as table:
            for i in range(capacity):
                table.set(f"{i}", 4)
            table.unlink()
        print("made")
    except SharedMemoryFullError as error:
        print(str(error)[:60])
    print(os.listdir("/dev/shm"), os.statvfs("/dev/shm").f_bfree)
""",
    )
    full = "shared memory segment rp.status.0.t: /dev/shm has no room fo"
    assert said.splitlines() == [full, "[] 128", full, "[] 128", "made", "[] 128"]


def rewrite_header(name: str, **fields: object) -> None:
    """Other ``fields`` in the header, under a checksum that is right again."""
    with open(path_of(name), "r+b") as file:
        head = bytearray(file.read(layout.HEADER_BYTES))
        header = layout.TableHeader._make(layout.HEADER.unpack_from(head))
        layout.HEADER.pack_into(head, 0, *header._replace(**fields))
        struct.pack_into("<Q", head, layout.CRC_AT, zlib.crc32(head[8 : layout.CRC_AT]))
        file.seek(0)
        file.write(head)


def overwrite(name: str, at: int, content: bytes) -> None:
    with open(path_of(name), "r+b") as file:
        file.seek(at)
        file.write(content)


def replace(name: str, make: Callable[[Path], object]) -> None:
    path_of(name).unlink()
    make(path_of(name))


DAMAGES: list[tuple[str, Callable[[str], object], type[SegmentError], str]] = [
    ("empty", lambda name: os.truncate(path_of(name), 0), SegmentIncompleteError, "it is not ready"),
    ("zeros", lambda name: path_of(name).write_bytes(bytes(9000)), SegmentIncompleteError, "it is not ready"),
    ("a ring", lambda name: overwrite(name, 0, b"RINGPOOL"), SegmentFormatError, "wrong magic number"),
    ("foreign", lambda name: path_of(name).write_bytes(b"text\n" * 99), SegmentFormatError, "wrong magic number"),
    ("cut in the header", lambda name: os.truncate(path_of(name), 99), SegmentTruncatedError, "it has 99 bytes"),
    ("cut", lambda name: os.truncate(path_of(name), 8192), SegmentTruncatedError, "it has 8192 of "),
    ("next version", lambda name: rewrite_header(name, version=2), SegmentFormatError, "layout version 2, and this"),
    ("checksum", lambda name: overwrite(name, layout.CRC_AT, bytes(8)), SegmentFormatError, "checksum does not match"),
    ("other structs", lambda name: rewrite_header(name, format_id=1), SegmentFormatError, "another build"),
    ("other machine", lambda name: rewrite_header(name, machine=8), SegmentFormatError, "another kind of machine"),
    ("other boot", lambda name: rewrite_header(name, boot_id=bytes(16)), SegmentFormatError, "on another boot"),
    ("other namespace", lambda name: rewrite_header(name, pid_namespace=1), SegmentFormatError, "pid namespace"),
    ("no entries", lambda name: rewrite_header(name, capacity=0), SegmentFormatError, "not where they belong"),
    ("more entries", lambda name: rewrite_header(name, capacity=999), SegmentFormatError, "not where they belong"),
    ("fewer buckets", lambda name: rewrite_header(name, buckets=1), SegmentFormatError, "not where they belong"),
    ("moved chunks", lambda name: rewrite_header(name, chunks_at=4096), SegmentFormatError, "not where they belong"),
    ("huge", lambda name: rewrite_header(name, size_bytes=1 << 60), SegmentFormatError, "not where they belong"),
    (
        "plain mutex",
        lambda name: overwrite(name, layout.MUTEX_AT + lock.KIND_AT, bytes(4)),
        SegmentFormatError,
        "not a robust, process-shared mutex",
    ),
    (
        "symbolic link",
        lambda name: replace(name, lambda path: path.symlink_to("/etc/passwd")),
        SegmentFormatError,
        "it is no regular file",
    ),
    ("fifo", lambda name: replace(name, os.mkfifo), SegmentFormatError, "it is no regular file"),
]


@pytest.mark.parametrize(
    ("damage", "error", "reason"), [row[1:] for row in DAMAGES], ids=[row[0].replace(" ", "-") for row in DAMAGES]
)
def test_a_damaged_table_is_refused_and_can_be_removed(
    damage: Callable[[str], object], error: type[SegmentError], reason: str, name: str
) -> None:
    with FileStatusTable(name, 100):
        pass
    damage(name)
    for how in (FileStatusTable, FileStatusTable.attach):
        with pytest.raises(error, match=re.escape(reason)) as caught:
            how(name)
        assert type(caught.value) is error
        assert caught.value.name == segment_of(name)
    assert unlink_status_table(name)
    assert files_of(name) == []


@as_root
def test_another_users_table_is_refused(name: str) -> None:
    with FileStatusTable(name, 100) as table:
        os.chown(path_of(name), 65534, -1)
        with pytest.raises(SegmentPermissionError, match="it belongs to user 65534"):
            FileStatusTable(name)
        with pytest.raises(SegmentPermissionError):
            unlink_status_table(name)
        os.chown(path_of(name), 0, -1)
        assert len(table) == 0


def test_nobody_else_may_open_it_or_its_bells(table: FileStatusTable, other: FileStatusTable) -> None:
    other.claim("a")
    with pytest.raises(StatusTimeoutError):
        table.wait_available("a", 0.001)
    assert path_of(table.name).stat().st_mode & 0o7777 == 0o600
    assert os.stat(table._bells).st_mode & 0o7777 == 0o700


def test_all_of_it_is_allocated_when_it_is_made(table: FileStatusTable) -> None:
    status = path_of(table.name).stat()
    assert status.st_size == table._entries.header.size_bytes
    assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize(
    "error",
    [
        StatusTableFullError("t", 3, "every entry is in use"),
        StatusHeldError("p", "LOCKED", 7),
        StatusStepError("p", "DONE", "ERROR"),
        StatusReentryError("t"),
        StatusTimeoutError("p", 7, 1.5),
    ],
)
def test_errors_survive_pickle(error: RingpoolError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert isinstance(error, StatusTableError | TimeoutError)


def test_shared_memory_without_an_inode_left_is_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return ordinary(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SharedMemoryFullError):
        FileStatusTable(name)

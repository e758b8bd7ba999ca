"""Tables by name: create or attach, without a race; and unlink.

    /dev/shm/rp.status.<user id>.<table>          the segment of a status table, see ``entries``
    /dev/shm/rp.status.<user id>.<table>@<uuid>/  its bells, see ``bells``

    open     attach -> missing: create -> the name is taken meanwhile: attach ...
    create   a file without a name (O_TMPFILE) -> fallocate -> map -> header, mutex, magic -> link: it has its name
    attach   open -> user, size -> header by pread -> all that ``segment`` checks -> map -> mutex kind -> not unlinked
    unlink   (mutex) mark -> ring and remove all bells -> remove the name, where it is still this segment's

A creator that is killed leaves nothing: a file without a name goes with its last descriptor. Whoever finds a segment
that is marked finishes its removal. A name is removed only under the mutex of the segment that it names, and given only
where there is none, so that nobody can remove a table that has come after his.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import struct

from ringpool.errors import (
    SegmentFormatError,
    SegmentIncompleteError,
    SegmentMissingError,
    SegmentPermissionError,
    SegmentTruncatedError,
    SharedMemoryFullError,
)
from ringpool.shm import bells, entries, lock, owner, segment
from ringpool.shm.entries import Entries, Places, TableHeader
from ringpool.shm.segment import SHM_DIRECTORY

TABLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
RACES_MAX = 100  # each is lost to a process that has created or unlinked the table meanwhile
_MAGIC_WORD = struct.Struct("<Q")


def segment_of(table: str) -> str:
    """The name of a table's segment. Raises ``ValueError`` where a table cannot have that name."""
    if not TABLE_NAME.fullmatch(table):
        raise ValueError(f"a status table's name has 1 to 64 letters, digits, '_', '.' and '-', unlike {table!r}")
    return f"rp.status.{os.geteuid()}.{table}"


def create_or_attach(table: str, capacity: int, chunks: int) -> Entries:
    """The table of that name; where there is none, a new one. Raises a ``SegmentError`` where it cannot be used."""
    for _ in range(RACES_MAX):
        with contextlib.suppress(SegmentMissingError):
            return attach(table)
        try:
            return create(table, capacity, chunks)
        except FileExistsError:
            continue  # somebody was faster
        except SharedMemoryFullError:
            if not os.path.exists(f"{SHM_DIRECTORY}/{segment_of(table)}"):
                raise
    raise SegmentMissingError(segment_of(table), "others unlink it as fast as it is made")


def create(table: str, capacity: int, chunks: int) -> Entries:
    """A new table. Raises ``FileExistsError`` where there is one, and ``SharedMemoryFullError``, leaving nothing."""
    for what, value, top in (
        ("capacity", capacity, entries.CAPACITY_MAX),
        ("its room in chunks", chunks, entries.CHUNKS_MAX),
    ):
        if not 1 <= value <= top:
            raise ValueError(f"{what} must be from 1 to {top:,}, not {value:,}")
    name, places = segment_of(table), entries.places_of(capacity, chunks)
    fd = -1
    try:
        fd = os.open(SHM_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)  # ENOSPC: not even an inode
        os.posix_fallocate(fd, 0, places.size_bytes)  # ENOSPC now, not a SIGBUS later
        mapping = mmap.mmap(fd, places.size_bytes)
        header = _write_header(mapping, places)
        directory = os.open(SHM_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            reason = f"{SHM_DIRECTORY} has no room for {places.size_bytes:,} bytes"
            raise SharedMemoryFullError(name, reason) from error
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    return Entries(table, name, mapping, header)


def _write_header(mapping: mmap.mmap, places: Places) -> TableHeader:
    header = TableHeader._make(
        (
            *(0, entries.VERSION, entries.HEADER_BYTES, places.size_bytes, *segment.machine()),  # no magic number yet
            *(places.capacity, places.buckets, places.chunks, entries.CHUNK_BYTES),
            *(places.buckets_at, places.entries_at, places.chunks_at),
            *(*owner.this_process(), owner.boot_id(), owner.pid_namespace(), os.urandom(16)),
            entries.FORMAT_ID,
        )
    )
    entries.HEADER.pack_into(mapping, 0, *header)
    _MAGIC_WORD.pack_into(mapping, entries.CRC_AT, segment.checksum(mapping[: entries.HEADER_BYTES]))
    lock.initialise_mutex(mapping, entries.MUTEX_AT)
    with memoryview(mapping) as view, view.cast("Q") as words:
        words[0] = entries.MAGIC  # last: the header is whole
    return header._replace(magic=entries.MAGIC)


def attach(table: str) -> Entries:
    """The table of that name, of this user, made on this boot, in this pid namespace and by this format.

    Raises a ``SegmentError`` that says which of these does not hold.
    """
    name = segment_of(table)
    fd = _open(name)
    try:
        header = _verified_header(name, fd)
        mapping = mmap.mmap(fd, header.size_bytes)
    finally:
        os.close(fd)
    if lock.mutex_kind(mapping, entries.MUTEX_AT) != lock.expected_kind():
        mapping.close()
        raise SegmentFormatError(name, "its lock is not a robust, process-shared mutex")
    found = Entries(table, name, mapping, header)
    if found.is_unlinked:  # by somebody who did not get to the end of it, or is about to
        unlink(found)
        found.close()
        raise SegmentMissingError(name, "it was unlinked just now")
    return found


def _open(name: str) -> int:
    try:
        fd = os.open(f"{SHM_DIRECTORY}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SegmentMissingError(name, "there is none of that name") from None
    except PermissionError:
        raise SegmentPermissionError(name, "it belongs to another user") from None
    except (IsADirectoryError, OSError) as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise SegmentFormatError(name, "it is no regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SegmentFormatError(name, "it is no regular file")
    return fd


def _verified_header(name: str, fd: int) -> TableHeader:
    head, size_bytes = segment.verified_head(name, fd, entries.MAGIC, entries.VERSION)
    header = TableHeader._make(entries.HEADER.unpack_from(head))
    segment.verify_origin(name, header, entries.FORMAT_ID)
    counts_hold = 1 <= header.capacity <= entries.CAPACITY_MAX and 1 <= header.chunks <= entries.CHUNKS_MAX
    places = (*(header.capacity, header.buckets, header.chunks), *header[13:16], header.size_bytes)
    if not counts_hold or entries.places_of(header.capacity, header.chunks) != places:
        raise SegmentFormatError(name, "its sections are not where they belong")
    if size_bytes < header.size_bytes:
        raise SegmentTruncatedError(name, f"it has {size_bytes} of {header.size_bytes} bytes")
    return header


def unlink(table: Entries) -> None:
    """Remove a table's name and its bells. Whoever uses it, or waits, gets ``SegmentMissingError``. Idempotent."""

    def remove() -> None:
        table.mark_unlinked()
        bells.ring_all(bells.directory_of(table.segment, table.header.uuid))
        path = f"{SHM_DIRECTORY}/{table.segment}"
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if os.pread(file.fileno(), entries.HEADER_BYTES, 0) == table.mapping[: entries.HEADER_BYTES]:
                os.unlink(path)  # the uuid in it says that it is this one

    table.run(remove)


def unlink_by_name(table: str) -> bool:
    """Remove whatever stands at a table's name, also what cannot be attached; whether there was something.

    For what another version, boot or pid namespace left. A table in use is unlinked as ``unlink`` does it.
    """
    name = segment_of(table)
    try:
        found = attach(table)
    except SegmentMissingError:
        return False
    except (SegmentFormatError, SegmentIncompleteError, SegmentTruncatedError):
        for bell_directory in os.listdir(SHM_DIRECTORY):
            if bell_directory.startswith(f"{name}@"):
                bells.ring_all(f"{SHM_DIRECTORY}/{bell_directory}")
        os.unlink(f"{SHM_DIRECTORY}/{name}")
        return True
    unlink(found)
    found.close()
    return True

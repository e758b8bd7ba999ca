"""Blobs: payloads and results that do not fit a record. One file in ``/dev/shm`` each.

    0x00  Q  magic          b"RPBLOB2\\0"
    0x08  I  encoding       layout.Encoding of the body: MSGPACK or PICKLE
    0x0c  I  n_buffers      out-of-band buffers of pickle protocol 5
    0x10  Q  body_bytes
    0x18  Q  released       this entry of the ring, plus 1: its worker has nothing of it any more; 0: nobody says so
    0x20  Q  bytes of each buffer, n_buffers times
    then the body, then the buffers, each on a multiple of 64

The publisher writes once (a buffer is copied once, into the file). A worker maps the file and makes views into the
mapping: no copy. A view keeps its mapping alive, and an unlinked file lives on while it is mapped, so that nothing is
reused while something still exports it, and all is freed with the last view. Whoever takes a result copies it: a
program may keep any number of them, and a mapping would hold a descriptor, and memory of ``/dev/shm``, for each.

What nobody has any part of may be written over, for another value: that takes a quarter of the time, most of which the
kernel needs to find and to free pages. So it is with a result's blob, once it is taken, and with a payload's, where its
worker has copied it, or has released it. It gets the name of a spare for that; its worker looks for those of results.

Names: ``<segment>.t<id>`` payloads, ``.f<id>`` functions, ``.r<sequence>.<attempt>`` results, ``.i<worker>`` what its
initializer raised, ``.s<id>`` spare ones of payloads, ``.s<worker>.<number>`` of results; all go with their segment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import islice

import posix_ipc

from ringpool.errors import (
    SegmentFormatError,
    SegmentMissingError,
    SharedMemoryFullError,
    SharedMemoryUnusableError,
)
from ringpool.shm.layout import Encoding
from ringpool.shm.segment import SHM_DIRECTORY

MAGIC = int.from_bytes(b"RPBLOB2\0", "little")
HEAD = struct.Struct("<QIIQQ")
RELEASED_AT = 0x18
ALIGN_BYTES = 64
COPIED_MAX_BYTES = 1 << 16  # a mapping costs a descriptor for as long as it lives, and more time than such a copy
SPARE_MAX_BYTES = 1 << 20
SPARES_MAX = 4  # for each worker
IOV_MAX = 1024  # parts that one call writes; limits.h
HEAP_MAX_BYTES = 1 << 23  # up to here malloc has memory to give that was used before; beyond, huge pages are quicker
Buffer = bytes | bytearray | memoryview


def _up(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def payload_name(segment: str, blob: int) -> str:
    """The blob of a task's payload."""
    return f"{segment}.t{blob}"


def function_name(segment: str, function: int) -> str:
    """The blob that describes a task function."""
    return f"{segment}.f{function}"


def result_name(segment: str, sequence: int, attempt: int) -> str:
    """The blob of a result: an attempt has its own, so that a dead worker's half-written one is in nobody's way."""
    return f"{segment}.r{sequence}.{attempt}"


def payload_spare_name(segment: str, blob: int) -> str:
    """That of a payload's blob, once nobody reads it."""
    return f"{segment}.s{blob}"


def spare_names(segment: str, worker: int) -> list[str]:
    """Those of blobs that the worker may write over."""
    return [f"{segment}.s{worker}.{number}" for number in range(SPARES_MAX)]


def initializer_name(segment: str, worker: int) -> str:
    """What a worker's initializer raised."""
    return f"{segment}.i{worker}"


def size_of(body: Buffer, buffers: Sequence[memoryview] = ()) -> int:
    """How many bytes a blob of that has."""
    size_bytes = HEAD.size + 8 * len(buffers)
    for n_bytes in (len(body), *(buffer.nbytes for buffer in buffers)):
        size_bytes = _up(size_bytes) + n_bytes
    return size_bytes


def write(
    name: str,
    encoding: Encoding,
    body: Buffer,
    buffers: Sequence[memoryview] = (),
    spares: Sequence[str] = (),
) -> int:
    """Make the blob ``name``, of one of ``spares`` if there is any; returns its size in bytes. Raises
    ``SharedMemoryFullError`` and ``SharedMemoryUnusableError``, leaving nothing.

    A limit of the size of files (``ulimit -f``), which a task may have set, is not meant for it.
    """
    try:
        try:
            return _write(name, encoding, body, buffers, spares)
        except SharedMemoryFullError:
            if not spares:
                raise
            drop_spares(spares[0].rpartition(".s")[0])
            return _write(name, encoding, body, buffers)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        import resource  # here: no worker needs it at its start

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if soft == hard:
            reason = "this process may not make a file of its size, by its RLIMIT_FSIZE (ulimit -f)"
            raise SharedMemoryUnusableError(name, reason) from error
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        return _write(name, encoding, body, buffers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _write(
    name: str, encoding: Encoding, body: Buffer, buffers: Sequence[memoryview], spares: Sequence[str] = ()
) -> int:
    lengths = [buffer.nbytes for buffer in buffers]
    parts: list[Buffer] = [struct.pack(f"<{len(lengths)}Q", *lengths)]  # all behind the head, with what is between them
    size_bytes = HEAD.size + len(parts[0])
    for part in (body, *buffers):
        gap = _up(size_bytes) - size_bytes
        parts += (bytes(gap), part)
        size_bytes += gap + memoryview(part).nbytes
    try:
        file = _create(name, spares if size_bytes < SPARE_MAX_BYTES else ())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SharedMemoryFullError(name, f"{SHM_DIRECTORY} has no room for another file: no inode is left") from error
    try:
        if os.fstat(file.fd).st_size:  # a spare
            os.pwrite(file.fd, bytes(HEAD.size), 0)
            os.ftruncate(file.fd, size_bytes)
        _write_all(file.fd, parts, HEAD.size)  # by a call, and not into a mapping: ENOSPC, and never a SIGBUS
        os.pwrite(file.fd, HEAD.pack(MAGIC, encoding, len(lengths), len(body), 0), 0)  # last: half a blob is none
    except BaseException as error:
        unlink(name)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise SharedMemoryFullError(name, f"{SHM_DIRECTORY} has no room for {size_bytes:,} bytes") from error
        raise
    finally:
        file.close_fd()
    return size_bytes


def _write_all(fd: int, parts: Sequence[Buffer], at: int) -> None:
    views = deque(view for part in parts if (view := memoryview(part).cast("B")).nbytes)
    while views:
        n_bytes = os.pwritev(fd, list(islice(views, IOV_MAX)), at)  # 2 GiB at most, and less where there is no room
        at += n_bytes
        while n_bytes:
            first = views.popleft()
            if n_bytes < first.nbytes:
                views.appendleft(first[n_bytes:])
                break
            n_bytes -= first.nbytes


def _create(name: str, spares: Sequence[str]) -> posix_ipc.SharedMemory:
    for spare in spares:
        try:
            if not _rename(spare, name):
                continue
        except PermissionError:  # a task has made this process another user's
            break
        try:
            return posix_ipc.SharedMemory(f"/{name}")
        except BaseException:
            unlink(name)
            raise
    try:
        return posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600)
    except posix_ipc.ExistentialError:
        unlink(name)  # what an earlier try of the same attempt left; a name has one writer
        return posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600)


def _rename(name: str, new_name: str) -> bool:
    """Whether there was a blob ``name``, and it has that new name now."""
    try:
        os.rename(f"{SHM_DIRECTORY}/{name}", f"{SHM_DIRECTORY}/{new_name}")
    except FileNotFoundError:
        return False
    return True


def read(name: str, *, writable: bool = False) -> tuple[Encoding, memoryview, list[memoryview]]:
    """Map the blob ``name``: encoding, body and buffers, as views into the mapping.

    ``writable``: the views are of a private copy; otherwise they are read-only. Raises ``SegmentMissingError`` and
    ``SegmentFormatError``; ``OSError`` or ``MemoryError``, where that cannot be told.
    """
    try:
        file = posix_ipc.SharedMemory(f"/{name}", read_only=True)
    except posix_ipc.ExistentialError:
        raise SegmentMissingError(name, "the blob is gone") from None
    except posix_ipc.PermissionsError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{SHM_DIRECTORY}/{name}") from None
    try:
        size_bytes = os.fstat(file.fd).st_size
        if writable:
            view = _copied(file.fd, size_bytes)
        elif size_bytes <= COPIED_MAX_BYTES:
            view = memoryview(os.pread(file.fd, size_bytes, 0))
        else:
            view = memoryview(mmap.mmap(file.fd, 0, access=mmap.ACCESS_READ))
    finally:
        file.close_fd()
    try:
        return _views(view)
    except (ValueError, struct.error) as error:
        raise SegmentFormatError(name, f"it is no blob, or a damaged one: {error}") from None


def take(name: str, spare: str = "") -> tuple[Encoding, memoryview, list[memoryview]]:
    """``read`` a copy that can be written to, and remove the blob, or give it the name ``spare``. It stays where it
    cannot be read, except for what nobody ever will: where the error is a ``SegmentFormatError``.
    """
    try:
        blob = read(name, writable=True)
    except SegmentFormatError:
        unlink(name)
        raise
    if not spare or not keep_spare(name, size_of(*blob[1:]), spare):
        unlink(name)
    return blob


def keep_spare(name: str, size_bytes: int, spare: str) -> bool:
    """Give the blob ``name``, which nobody reads any more, the name ``spare``, in whose place another may be; whether
    it was there, and is worth the room that it takes.
    """
    return size_bytes < SPARE_MAX_BYTES and not is_room_short() and _rename(name, spare)


def mapping_of(body: memoryview) -> weakref.ref[mmap.mmap] | None:
    """The mapping that the views of a blob lie in, while there are any; None where they are of a copy."""
    return weakref.ref(body.obj) if isinstance(body.obj, mmap.mmap) else None


def release(name: str, entry: int) -> None:
    """Note in the blob ``name`` that the worker that had that entry of the ring has no view of it any more."""
    with contextlib.suppress(OSError, posix_ipc.Error):  # no descriptor is left, say: then it is not noted
        file = posix_ipc.SharedMemory(f"/{name}")
        try:
            os.pwrite(file.fd, struct.pack("<Q", entry + 1), RELEASED_AT)
        finally:
            file.close_fd()


def is_released(name: str, entry: int) -> bool:
    """Whether that worker has noted so."""
    with contextlib.suppress(OSError, posix_ipc.Error):
        file = posix_ipc.SharedMemory(f"/{name}", read_only=True)
        try:
            return os.pread(file.fd, 8, RELEASED_AT) == struct.pack("<Q", entry + 1)
        finally:
            file.close_fd()
    return False


def take_or_drop(name: str) -> tuple[Encoding, memoryview, list[memoryview]]:
    """``take``; where that cannot be, the blob is removed all the same: nobody would have its name any more."""
    try:
        return take(name)
    except BaseException:
        unlink(name)
        raise


def _copied(fd: int, size_bytes: int) -> memoryview:
    """The file's content, in memory of our own. Raises ``MemoryError`` or ``OSError``."""
    view = _allocate(size_bytes)
    at = 0
    while at < size_bytes and (n := os.preadv(fd, [view[at:]], at)):  # in one go, unless it is 2 GiB or more
        at += n
    return view[:at]


def _allocate(size_bytes: int) -> memoryview:
    if size_bytes <= HEAP_MAX_BYTES:
        memory = bytearray(size_bytes + ALIGN_BYTES)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % ALIGN_BYTES
        return memoryview(memory)[start : start + size_bytes]
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)


def _views(view: memoryview) -> tuple[Encoding, memoryview, list[memoryview]]:
    """Encoding, body and buffers. Raises ``ValueError`` or ``struct.error`` where they are not all there."""
    magic, encoding, n_buffers, body_bytes, _ = HEAD.unpack_from(view, 0)
    if magic != MAGIC:
        raise ValueError("wrong magic number")
    lengths = struct.unpack_from(f"<{n_buffers}Q", view, HEAD.size)
    body_at = _up(HEAD.size + 8 * n_buffers)
    end = body_at + body_bytes
    body = view[body_at:end]
    buffers: list[memoryview] = []
    for length in lengths:
        start = _up(end)
        end = start + length
        buffers.append(view[start:end])
    if end > len(view):
        raise ValueError(f"{len(view)} of {end} bytes")
    return Encoding(encoding), body, buffers


def exists(name: str) -> bool:
    """Whether there is a blob of that name."""
    return os.path.exists(f"{SHM_DIRECTORY}/{name}")


def could_have(size_bytes: int) -> bool:
    """Whether so much would fit into ``/dev/shm``, were nothing else there."""
    found = os.statvfs(SHM_DIRECTORY)
    return size_bytes < found.f_blocks * found.f_frsize


def size_of_place() -> int:
    """How many bytes ``/dev/shm`` has, used or not; a huge number where it has no limit."""
    found = os.statvfs(SHM_DIRECTORY)
    return found.f_blocks * found.f_frsize or sys.maxsize


def is_room_short() -> bool:
    """Whether less than a quarter of ``/dev/shm`` is free: what waits there in vain is better off elsewhere."""
    found = os.statvfs(SHM_DIRECTORY)
    return found.f_bavail * 4 < found.f_blocks


def drop_spares(segment: str) -> None:
    """Remove what is spare, of payloads and of all workers' results."""
    with os.scandir(SHM_DIRECTORY) as files:
        found = [file.name for file in files if file.name.startswith(f"{segment}.s")]
    for name in found:
        with contextlib.suppress(posix_ipc.PermissionsError):  # a task has made this process another user's
            unlink(name)


def unlink(name: str) -> None:
    """Remove the blob ``name``; its mappings stay valid. One that is not there is none to remove."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(f"/{name}")

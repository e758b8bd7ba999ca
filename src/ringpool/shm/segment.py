"""A segment: create, attach, reclaim; who may attach.

    /dev/shm/rp.<pid namespace>.<pid>.<start>.<random>          the segment; the name carries its owner
    /dev/shm/rpj. ...                                           that of a job: its resume drains and removes it
    /dev/shm/sem.<segment>.<index>, sem.<segment>.c             a semaphore per worker, one for the coordinator
    /dev/shm/<segment>.<kind><id>                               blobs, see ``blobs``

    create   name, O_EXCL 0600 -> fallocate -> map -> header, mutex, semaphores -> magic (ready)
    attach   open -> owner, size -> header by pread -> magic, checksum, format, machine, boot -> map -> mutex kind

Everything is allocated at creation, so that a full ``/dev/shm`` is an error there and never a SIGBUS later. Nothing
is mapped before its size is known to be true. A creator that dies half way leaves a name, and the name says who it
was: the next start removes whatever belongs to the dead, by ``reclaim_dead``. ``multiprocessing.shared_memory`` is
not used: its resource tracker unlinks what an attacher leaves.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Protocol

import posix_ipc

from ringpool.errors import (
    SegmentFormatError,
    SegmentIncompleteError,
    SegmentMissingError,
    SegmentPermissionError,
    SegmentTruncatedError,
    SharedMemoryFullError,
    SharedMemoryUnusableError,
)
from ringpool.shm import layout, lock, owner

SHM_DIRECTORY = "/dev/shm"
NAME = re.compile(r"rp(?P<kept>j?)\.(?P<namespace>\d+)\.(?P<pid>\d+)\.(?P<start>\d+)\.(?P<random>[0-9a-f]{8})")
COORDINATOR_SEMAPHORE = "c"
_MACHINES = {"x86_64": 62, "aarch64": 183}  # ELF e_machine
_MAGIC_WORD = struct.Struct("<Q")
_VERSION = struct.Struct("<I")
_given_up: set[str] = set()  # segments of runs of this process that could not write down all that is in them


class Segment:
    """A mapped segment.

    Attributes: ``name`` (str, without a slash), ``mapping`` (mmap, shared, whole), ``header`` (``layout.Header``).
    """

    def __init__(self, name: str, mapping: mmap.mmap, header: layout.Header) -> None:
        self.name = name
        self.mapping = mapping
        self.header = header

    def semaphore(self, who: int | str) -> posix_ipc.Semaphore:
        """Open the semaphore of worker ``who``, or of the coordinator (``COORDINATOR_SEMAPHORE``)."""
        try:
            return posix_ipc.Semaphore(f"/{self.name}.{who}")
        except posix_ipc.ExistentialError:
            raise SegmentMissingError(self.name, f"its semaphore {who} is gone") from None

    def close(self) -> None:
        """Unmap, unless something still exports the mapping; then the last export does it."""
        with contextlib.suppress(BufferError):
            self.mapping.close()


def create(slots: int, workers: int, claims_max: int = layout.CLAIMS_MAX, *, kept: bool = False) -> Segment:
    """Make a segment that belongs to the calling process, and its semaphores. ``kept``: not reclaimed when it is dead.

    ``slots``: tasks that can be in it at a time, 1 to 4,194,303. ``workers``: at most 64. ``claims_max``: tasks that
    one worker may hold, 1 to 64. Raises ``SharedMemoryFullError`` and ``SharedMemoryUnusableError``, leaving nothing,
    and ``ValueError``.
    """
    slots = layout.check_number("slots", slots, layout.SLOTS_MAX)
    workers = layout.check_number("workers", workers, layout.WORKERS_MAX)
    claims_max = layout.check_number("claims_max", claims_max, layout.CLAIMS_MAX)
    me = owner.this_process()
    name = f"rp{'j' if kept else ''}.{owner.pid_namespace()}.{me.pid}.{me.start}.{os.urandom(4).hex()}"
    places = layout.sections(slots, workers, claims_max)
    try:
        return _create(name, me, places, slots, workers, claims_max)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where nothing can be made, nothing can be removed
            unlink(name)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
            reason = f"{SHM_DIRECTORY} has no room for {places.size_bytes:,} bytes"
            raise SharedMemoryFullError(name, reason) from error
        if (reason := _why_unusable(error, places.size_bytes)) is not None:
            raise SharedMemoryUnusableError(name, reason) from error
        raise


def _why_unusable(error: BaseException, size_bytes: int) -> str | None:
    """What is wrong with ``/dev/shm``, if that is what a segment's creation failed for."""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"this process may not make a file of {size_bytes:,} bytes, by its RLIMIT_FSIZE (ulimit -f)"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{SHM_DIRECTORY} is mounted read-only"
    if isinstance(error, posix_ipc.PermissionsError):
        return f"user {os.geteuid()} may not write in {SHM_DIRECTORY}"
    if isinstance(error, posix_ipc.ExistentialError) and not os.path.isdir(SHM_DIRECTORY):
        return f"there is no directory {SHM_DIRECTORY}"
    return None


def _create(name: str, me: owner.Owner, places: layout.Sections, slots: int, workers: int, claims_max: int) -> Segment:
    file = posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600)
    try:
        os.posix_fallocate(file.fd, 0, places.size_bytes)
        mapping = mmap.mmap(file.fd, places.size_bytes)
    finally:
        file.close_fd()
    *offsets, size_bytes = places
    header = layout.Header._make(
        (
            *(0, layout.VERSION, layout.HEADER_BYTES, size_bytes, *machine()),  # no magic number yet
            *(slots, workers, claims_max, layout.RECORD_BYTES, *offsets),
            *(*me, owner.boot_id(), owner.pid_namespace(), os.urandom(16), layout.FORMAT_ID),
        )
    )
    layout.HEADER.pack_into(mapping, 0, *header)
    _MAGIC_WORD.pack_into(mapping, layout.CRC_AT, checksum(mapping[: layout.HEADER_BYTES]))
    lock.initialise_mutex(mapping, layout.MUTEX_AT)
    for who in (*range(workers), COORDINATOR_SEMAPHORE):
        posix_ipc.Semaphore(f"/{name}.{who}", posix_ipc.O_CREX, 0o600, 0).close()
    with memoryview(mapping) as view, view.cast("Q") as words:
        words[0] = layout.MAGIC  # published last: whoever sees it sees all of the above (one aligned store)
    return Segment(name, mapping, header._replace(magic=layout.MAGIC))


def attach(name: str) -> Segment:
    """Map an existing segment of this user, made on this boot, in this pid namespace and by this format.

    Raises a ``SegmentError`` that says which of these does not hold. Contents beyond the header are for ``ring`` to
    judge.
    """
    try:
        file = posix_ipc.SharedMemory(f"/{name}")
    except posix_ipc.ExistentialError:
        raise SegmentMissingError(name, "there is none of that name") from None
    except posix_ipc.PermissionsError:
        raise SegmentPermissionError(name, "it belongs to another user") from None
    try:
        header = _verified_header(name, file.fd)
        mapping = mmap.mmap(file.fd, header.size_bytes)
    finally:
        file.close_fd()
    if lock.mutex_kind(mapping, layout.MUTEX_AT) != lock.expected_kind():
        mapping.close()
        raise SegmentFormatError(name, "its lock is not a robust, process-shared mutex")
    return Segment(name, mapping, header)


def _verified_header(name: str, fd: int) -> layout.Header:
    head, size_bytes = verified_head(name, fd, layout.MAGIC, layout.VERSION)
    header = layout.Header._make(layout.HEADER.unpack_from(head))
    verify_origin(name, header, layout.FORMAT_ID)
    counts_hold = (
        1 <= header.slots <= layout.SLOTS_MAX
        and 1 <= header.workers <= layout.WORKERS_MAX
        and 1 <= header.claims_max <= layout.CLAIMS_MAX
    )
    if not counts_hold or layout.sections(header.slots, header.workers, header.claims_max) != (
        *header[13:19],
        header.size_bytes,
    ):
        raise SegmentFormatError(name, "its sections are not where they belong")
    if size_bytes < header.size_bytes:
        raise SegmentTruncatedError(name, f"it has {size_bytes} of {header.size_bytes} bytes")
    return header


# ---- what the headers of all our formats have in common: magic, version, checksum, machine, boot, namespace


class Origin(Protocol):
    """A decoded header, as far as it says where its segment comes from."""

    @property
    def machine(self) -> int: ...
    @property
    def byte_order(self) -> int: ...
    @property
    def mutex_bytes(self) -> int: ...
    @property
    def libc_major(self) -> int: ...
    @property
    def libc_minor(self) -> int: ...
    @property
    def boot_id(self) -> bytes: ...
    @property
    def pid_namespace(self) -> int: ...
    @property
    def format_id(self) -> int: ...


def verified_head(name: str, fd: int, magic: int, version: int) -> tuple[bytes, int]:
    """The header's bytes and the file's size, once owner, magic number, version and checksum are right.

    Raises the ``SegmentError`` that says what is wrong.
    """
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise SegmentPermissionError(name, f"it belongs to user {status.st_uid}, and this is user {os.geteuid()}")
    head = os.pread(fd, layout.HEADER_BYTES, 0)
    if len(head) < _MAGIC_WORD.size or not _MAGIC_WORD.unpack_from(head)[0]:
        raise SegmentIncompleteError(name, "it is not ready: its creator has not finished it")
    if _MAGIC_WORD.unpack_from(head)[0] != magic:
        raise SegmentFormatError(name, "it is no ringpool segment (wrong magic number)")
    if len(head) < layout.HEADER_BYTES:
        raise SegmentTruncatedError(
            name, f"it has {status.st_size} bytes, and its header alone takes {layout.HEADER_BYTES}"
        )
    found = _VERSION.unpack_from(head, _MAGIC_WORD.size)[0]
    if found != version:
        raise SegmentFormatError(name, f"it has layout version {found}, and this build has {version}")
    if _MAGIC_WORD.unpack_from(head, layout.CRC_AT)[0] != checksum(head):
        raise SegmentFormatError(name, "its header's checksum does not match")
    return head, status.st_size


def verify_origin(name: str, header: Origin, format_id: int) -> None:
    """Refuse, with ``SegmentFormatError``, what another build, machine, boot or pid namespace made."""
    made_on = (header.machine, header.byte_order, header.mutex_bytes, header.libc_major, header.libc_minor)
    if header.format_id != format_id or made_on != machine():
        raise SegmentFormatError(name, "it was made by another build or on another kind of machine")
    if header.boot_id != owner.boot_id() or header.pid_namespace != owner.pid_namespace():
        raise SegmentFormatError(name, "it was made on another boot or in another pid namespace")


def checksum(head: bytes) -> int:
    """The checksum that belongs at ``layout.CRC_AT`` of this header."""
    return zlib.crc32(head[_MAGIC_WORD.size : layout.CRC_AT])


def machine() -> tuple[int, int, int, int, int]:
    """This machine, as headers say it: machine, byte_order, mutex_bytes, libc_major, libc_minor."""
    number = _MACHINES.get(os.uname().machine, 0)
    return (number, 1 if sys.byteorder == "little" else 2, lock.MUTEX_BYTES, *lock.glibc_version())


def unlink(name: str) -> None:
    """Remove a segment with its semaphores and blobs, in whatever state. Mappings that exist stay valid."""
    for file in _names_of(name):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's file, named like one of ours
            os.unlink(f"{SHM_DIRECTORY}/{file}")
    _given_up.discard(name)


def _names_of(name: str) -> list[str]:
    prefixes = (f"{name}.", f"sem.{name}.")
    with os.scandir(SHM_DIRECTORY) as files:
        found = [file.name for file in files if file.name.startswith(prefixes)]
    return [*found, name]  # the segment last: while it stands, a reclaim that was cut short is done again


def owner_of(name: str) -> owner.Owner | None:
    """Whom a segment's name, or that of one of its semaphores or blobs, says it belongs to.

    None where it is none of ours, or of another pid namespace, in which we cannot tell who lives.
    """
    match = _segment_name(name)
    if match is None or int(match["namespace"]) != owner.pid_namespace():
        return None
    return owner.Owner(int(match["pid"]), int(match["start"]))


def _segment_name(file: str) -> re.Match[str] | None:
    """The name of the segment that ``file`` of ``/dev/shm`` belongs to."""
    return NAME.match(file.removeprefix("sem."))


def dead_kept() -> list[str]:
    """The names of the segments of this user that are kept although their owners are dead: of jobs."""
    return _kept(lambda who: not who.alive)


def give_up(name: str) -> None:
    """The run of this process that kept that segment has ended, and could not write down all that is in it."""
    _given_up.add(name)


def own_kept() -> list[str]:
    """The names of the segments that runs of this process have given up."""
    me = owner.this_process()  # a fork has its parent's
    return [name for name in _kept(lambda who: who == me) if name in _given_up] if _given_up else []


def _kept(is_wanted: Callable[[owner.Owner], bool]) -> list[str]:
    if not os.path.isdir(SHM_DIRECTORY):
        return []
    with os.scandir(SHM_DIRECTORY) as files:
        found = [file for file in files if (match := NAME.fullmatch(file.name)) is not None and match["kept"]]
    return sorted(
        file.name
        for file in found
        if (who := owner_of(file.name)) is not None and is_wanted(who) and _is_of_this_user(file)
    )


def _is_of_this_user(file: os.DirEntry[str]) -> bool:
    try:
        return file.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:  # another run has drained it meanwhile
        return False


def reclaim_dead(may_go: Callable[[str], bool]) -> list[str]:
    """Remove what dead owners of this user left in ``/dev/shm``, but for what is kept; returns the segments' names.

    Only on proof of death: pid and start time name no living process; and where ``may_go(name)`` says so. Safe against
    others that do the same.
    """
    removed: set[str] = set()
    if not os.path.isdir(SHM_DIRECTORY):
        return []  # nothing is left there; and nothing can be made there, which ``create`` says
    with os.scandir(SHM_DIRECTORY) as files:
        for file in files:
            match, belongs_to = _segment_name(file.name), owner_of(file.name)
            if match is None or belongs_to is None or match["kept"] or belongs_to.alive:
                continue
            with contextlib.suppress(OSError):  # it vanished: somebody else reclaims too
                if file.stat(follow_symlinks=False).st_uid == os.geteuid():
                    removed.add(match[0])
    gone = sorted(filter(may_go, removed))
    for name in gone:
        unlink(name)
    return gone

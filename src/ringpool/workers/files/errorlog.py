"""A durable, bounded log of errors that many processes write to: what failed, where, when and how often.

    <base>/.ringpool/errors/<number>.log      segments; the one with the highest number is appended to
                            .ringpool/locks   the log's own lock files, so that it can be written to whatever else the
                                              caller has locked

    append, under the exclusive lock:
        cut what a killed writer left of a record at the end of the newest segment
        no room in that segment: make the next one
        over the bound: drop the oldest segments
        one write with O_APPEND, fsync of the segment, and of the directory where the segment is new

    killed           the log then holds
    before write     the records before it; perhaps an empty segment
    within write     the records before it, and a torn one that every reader skips and the next append cuts off
    after write      the new record as well

The bound holds at every moment, for nothing is written before there is room. Readers take no lock and write nothing: a
record that is being written meanwhile counts as skipped bytes. The format of a record is in ``errorrecord.py``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

import msgspec

from ringpool.errors import DurabilityError, ErrorLogError, LockTimeoutError
from ringpool.workers.files.durability import Durability, close_quietly, identity_of, make_directories, sync
from ringpool.workers.files.errorrecord import (
    HEADER_BYTES,
    RECORD_BYTES_MAX,
    ErrorRecord,
    body_of,
    last_end,
    pack,
    scan,
)
from ringpool.workers.files.journal import DIRECTORY
from ringpool.workers.files.lockfiles import make_shared, rights_of, rights_to_share, share
from ringpool.workers.files.locks import PathLock, under
from ringpool.workers.files.naming import FilePath, absolute, encoded
from ringpool.workers.files.oslayer import calls, write_all

SEGMENTS = 8  # that share the bound
BYTES_MAX = 4 << 20
BYTES_MAX_MIN = SEGMENTS << 14
TIMEOUT_S = 30.0
MOST_COMMON_MAX = 10
WRITES_MAX = 3
HOUR_NS = 3600 * 10**9
_READ_BYTES = 1 << 20

_segment_name = re.compile(r"([0-9]{16})\.log")


class CommonError(msgspec.Struct, frozen=True):
    """Errors of one kind: same type, and same message when the path in it is left out (it reads ``<path>``)."""

    type: str
    message: str
    count: int


class ErrorSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the log holds. ``by_type`` and ``most_common`` begin with the most frequent; times are wall clock."""

    count: int
    last_hour: int
    by_type: dict[str, int]
    by_type_last_hour: dict[str, int]
    most_common: tuple[CommonError, ...]
    first_ns: int | None
    last_ns: int | None
    log_bytes: int
    skipped_bytes: int


class _Segments:
    """The files of a log. Whatever else is in its directory is left alone."""

    def __init__(self, directory: bytes) -> None:
        self.directory = directory

    def path(self, number: int) -> bytes:
        return os.path.join(self.directory, b"%016d.log" % number)

    def numbers(self) -> list[int]:
        """Of the segments there are, lowest first."""
        try:
            names = calls.listdir(self.directory)
        except FileNotFoundError:
            return []
        found = (_segment_name.fullmatch(os.fsdecode(name)) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def contents(self, number: int) -> bytes:
        """All bytes of a segment; none where it has been dropped meanwhile."""
        try:
            fd = calls.open(self.path(number), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            parts: list[bytes] = []
            while part := calls.read(fd, _READ_BYTES):
                parts.append(part)
            return b"".join(parts)
        finally:
            calls.close(fd)

    def failed(self, operation: str, error: OSError) -> ErrorLogError:
        """``error`` as one that names the log."""
        reason = error.strerror or str(error)
        return ErrorLogError(os.fsdecode(self.directory), operation, error.errno or errno.EIO, reason)


class ErrorLog:
    """The error log of ``base``. Any number of threads and processes may use it at once, each with its own object.

    ``bytes_max`` (128 KiB or more) bounds all segments together; the oldest records go first. ``durability`` ``data``
    or ``full``: a record is on disk when ``record`` returns; the other levels leave that to the kernel, which keeps it
    through a kill of the process. ``timeout_s`` bounds the wait for the lock.
    """

    def __init__(
        self,
        base: FilePath,
        *,
        bytes_max: int = BYTES_MAX,
        durability: Durability | str = Durability.FULL,
        timeout_s: float | None = TIMEOUT_S,
    ) -> None:
        if bytes_max < BYTES_MAX_MIN:
            raise ValueError(f"bytes_max must be at least {BYTES_MAX_MIN}, not {bytes_max}")
        self.bytes_max = bytes_max
        self.durability = Durability(durability)
        self.timeout_s = timeout_s
        self._base = absolute(encoded(base))
        self._directory = os.path.join(self._base, DIRECTORY, b"errors")
        self._segments = _Segments(self._directory)
        self._segment_bytes = bytes_max // SEGMENTS
        self._durable_segment: tuple[int, ...] | None = None  # its number and identity, once its entry is on disk

    # ---- writing -----------------------------------------------------------------------------------------------------

    def record(
        self,
        error: BaseException,
        *,
        path: FilePath | None = None,
        operation: str | None = None,
        context: Mapping[str, object] | None = None,
    ) -> None:
        """Append a record of ``error``, with its traceback.

        ``path`` and ``operation`` default to those of the error. Values of ``context`` that are not None, bool, 64-bit
        int, float, str or bytes are kept as ``str()`` gives them.

        Raises ``ErrorLogError`` or ``LockTimeoutError`` (it was not recorded), or ``DurabilityError`` (recorded, but
        perhaps not for ever). All of them are ``OSError``: in an ``except`` block, catch that where the first error
        must go on.
        """
        body = body_of(error, path, operation, context or {}, self._record_bytes_max - HEADER_BYTES)
        try:
            under(self._lock(), lambda: self._append(body))
        except (DurabilityError, LockTimeoutError):
            raise
        except OSError as failure:
            raise self._segments.failed("record an error in this log", failure) from failure

    @property
    def _record_bytes_max(self) -> int:
        return min(RECORD_BYTES_MAX, self._segment_bytes)

    def _lock(self) -> PathLock:
        if not calls.access(self._directory, os.F_OK, effective_ids=True):
            self._make_directory()
        # Its own base: a lock file shared with the user's paths could close a circle of waits.
        lock_name = os.path.join(self._directory, b"log")
        return PathLock(lock_name, base=self._directory, timeout_s=self.timeout_s)

    def _make_directory(self) -> None:
        """Make ``<base>/.ringpool/errors``, open to whom the base is open to, as the directory of the locks is."""
        durable = self.durability is Durability.FULL
        make_directories(self._base, durable=durable)
        rights = rights_to_share(self._base)
        for directory in (os.path.dirname(self._directory), self._directory):
            make_shared(rights, directory)
            make_directories(directory, durable=durable)

    def _append(self, body: bytes) -> None:
        sizes = self._sizes()
        number = max(sizes, default=1)
        record_bytes = HEADER_BYTES + len(body)
        directory = fd = -1
        try:
            # Before the write, since it may fail.
            directory = calls.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fd = self._open_segment(number)
            self._cut_torn_end(fd, number)
            found = calls.fstat(fd)
            if found.st_size + record_bytes > self._segment_bytes:
                number += 1
                following = self._open_segment(number)
                fd, full = following, fd
                calls.close(full)
                found = calls.fstat(fd)
            sizes[number] = found.st_size
            self._make_room(sizes, record_bytes)
            self._write(fd, body, number, found.st_size)
            self._sync(fd, directory, number, found)
        finally:
            for opened in (fd, directory):
                if opened >= 0:
                    close_quietly(opened)  # with ``data`` and ``full``, fsync has told what there is to tell

    def _sizes(self) -> dict[int, int]:
        """The bytes of each segment, by number, lowest first."""
        return {number: calls.stat(self._segments.path(number)).st_size for number in self._segments.numbers()}

    def _open_segment(self, number: int) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = calls.open(self._segments.path(number), flags, 0o666)
        try:
            found = calls.fstat(fd)
            if not found.st_size and found.st_uid == os.geteuid():  # new, perhaps
                rights = rights_of(calls.stat(self._directory))
                share(fd, rights._replace(mode=rights.mode & ~(stat.S_IRGRP | stat.S_IROTH)))  # with who may write
        except BaseException:
            close_quietly(fd)
            raise
        return fd

    @staticmethod
    def _cut_torn_end(fd: int, number: int) -> None:
        """Cut off what a killed writer left at the end of the segment.

        Where no whole record is near the end, the damage is not a writer's: it stays, and readers skip it.
        """
        size = calls.fstat(fd).st_size
        begin = max(0, size - 2 * RECORD_BYTES_MAX)  # a torn record and the whole one before it
        tail = calls.pread(fd, size - begin, begin)
        whole = last_end(tail, number, begin)
        if whole is None and begin == 0:
            whole = 0
        if whole is not None and whole < len(tail) == size - begin:
            calls.ftruncate(fd, begin + whole)

    def _make_room(self, sizes: dict[int, int], record_bytes: int) -> None:
        total = sum(sizes.values()) + record_bytes
        for number, size in sorted(sizes.items()):
            if total <= self.bytes_max:  # true at the newest, which has room
                break
            with suppress(FileNotFoundError):
                calls.unlink(self._segments.path(number))
            total -= size

    @staticmethod
    def _write(fd: int, body: bytes, number: int, size: int) -> None:
        """One write; an error leaves nothing of it. A signal handler that records as well may come in between.

        Then the record stands at another place than its seal says, is none, and is written once more.
        """
        for _ in range(WRITES_MAX):
            record = pack(body, number, size)
            try:
                write_all(fd, memoryview(record))
                end = calls.lseek(fd, 0, os.SEEK_CUR)
            except OSError:
                with suppress(OSError):
                    calls.ftruncate(fd, size)
                raise
            if end == size + len(record):
                return
            size = end
        raise OSError(errno.EAGAIN, "others append to the segment without its lock")

    def _sync(self, fd: int, directory: int, number: int, found: os.stat_result) -> None:
        segment = self._segments.path(number)
        if self.durability in (Durability.DATA, Durability.FULL):
            sync(fd, segment, "fsync")
        if self.durability is Durability.FULL:
            identity = number, *identity_of(found, segment, fd)
            if self._durable_segment != identity:
                sync(directory, segment, "fsync of its directory")
                self._durable_segment = identity

    # ---- reading -----------------------------------------------------------------------------------------------------

    def records(self, *, newest_first: bool = False) -> ErrorRecords:
        """An iterator over the records that the log holds now. Raises ``ErrorLogError`` where it cannot be read."""
        return ErrorRecords(self._segments, newest_first)

    def __iter__(self) -> Iterator[ErrorRecord]:
        return self.records()

    def __reversed__(self) -> Iterator[ErrorRecord]:
        return self.records(newest_first=True)

    def summary(self, now_ns: int | None = None) -> ErrorSummary:
        """What failed, counted; the last hour is the one before ``now_ns`` (wall clock, default: now)."""
        since_ns = (time.time_ns() if now_ns is None else now_ns) - HOUR_NS
        records = self.records()
        kinds: Counter[str] = Counter()
        recent: Counter[str] = Counter()
        common: Counter[tuple[str, str]] = Counter()
        times: list[int] = []
        for record in records:
            kinds[record.type] += 1
            common[record.type, _without(record.path, record.message)] += 1
            if record.time_ns > since_ns:
                recent[record.type] += 1
            times.append(record.time_ns)
        return ErrorSummary(
            count=kinds.total(),
            last_hour=recent.total(),
            by_type=dict(kinds.most_common()),
            by_type_last_hour=dict(recent.most_common()),
            most_common=tuple(CommonError(*kind, count) for kind, count in common.most_common(MOST_COMMON_MAX)),
            first_ns=min(times, default=None),
            last_ns=max(times, default=None),
            log_bytes=records.read_bytes,
            skipped_bytes=records.skipped_bytes,
        )


class ErrorRecords(Iterator[ErrorRecord]):
    """The records of a log, one by one, a segment at a time in memory.

    ``read_bytes`` and ``skipped_bytes`` grow as it goes: what was read, and what of it was no valid record.
    """

    def __init__(self, segments: _Segments, newest_first: bool) -> None:
        self.read_bytes = 0
        self.skipped_bytes = 0
        self._segments = segments
        self._newest_first = newest_first
        self._records = self._generate()

    def __next__(self) -> ErrorRecord:
        try:
            return next(self._records)
        except OSError as failure:
            raise self._segments.failed("read this error log", failure) from failure

    def _generate(self) -> Iterator[ErrorRecord]:
        for number in sorted(self._segments.numbers(), reverse=self._newest_first):
            octets = self._segments.contents(number)
            found = list(scan(octets, number))
            self.read_bytes += len(octets)
            self.skipped_bytes += len(octets) - sum(size for _, size in found)
            yield from (record for record, _ in (reversed(found) if self._newest_first else found))


def _without(path: str | None, message: str) -> str:
    """``message`` with ``<path>`` where the path is a word of its own, as it is or as ``repr`` shows it."""
    for spelling in dict.fromkeys((path, repr(path)[1:-1])) if path else ():
        at = message.find(spelling)
        while at >= 0:
            end = at + len(spelling)
            if not (message[at - 1 : at].isalnum() or message[end : end + 1].isalnum()):
                message = f"{message[:at]}<path>{message[end:]}"
                end = at + len("<path>")
            at = message.find(spelling, end)
    return message

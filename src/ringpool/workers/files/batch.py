"""A batch of writes: many files made durable together, each of them whole or not at all.

    items --> groups, in their order --> for each group:

    stage     every file:         temporary file -> content -> owner, attributes, mode -> close
    sync      every file system:  one syncfs where 8 files or more are on it, else fsync of each file
    rename    in their order:     each rename is the commit point of its file
    sync      every file system:  fsync of each directory, or one syncfs where they are 8 or more

    level     first sync    second sync
    atomic    no            no
    data      yes           no
    full      yes           yes

A group ends at 256 files, at 64 MiB of content, or with 64 directories open, whichever comes first: that bounds memory,
descriptors and what one error undoes. A million files from a generator need what one group needs.

syncfs writes what others have left unwritten on the same file system as well: where much is written beside, a batch
waits for that. It tells of errors since Linux 5.8, and makes durable on the local file systems of the list below;
elsewhere every file and every directory is synced by itself.

What stands after an error, of the items in their order: all of the groups before; of the group with the error none
where it came before the renames, else those that were renamed before it; nothing after it. ``BatchWriteError`` says how
many. Of two items for one target the later one stands.
"""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, cast

from ringpool.errors import BatchWriteError, DurabilityError, FileOperationError, add_note
from ringpool.workers.files.durability import Durability, close_quietly, level_of, sync
from ringpool.workers.files.lockfiles import file_system_of
from ringpool.workers.files.naming import FilePath, encoded
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.replacement import Replacement, octets
from ringpool.workers.files.target import Symlinks, failed

GROUP_FILES_MAX = 256
GROUP_BYTES_MAX = 64 << 20
GROUP_DIRECTORIES_MAX = 64
TOGETHER_MIN = 8  # files, or directories, of one file system, from which on a syncfs is worth it

# Where syncfs does all that fsync of each file does. Source: linux/magic.h
SYNCED_WHOLE = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
}

Content = bytes | bytearray | memoryview | str


class BatchReport(NamedTuple):
    """What a batch did: files and bytes of content written, and in how many groups, syncfs and fsync calls."""

    n_files: int
    content_bytes: int
    n_groups: int
    n_syncfs: int
    n_fsyncs: int


def write_batch(
    items: Iterable[tuple[FilePath, Content]] | Mapping[FilePath, Content],
    *,
    durability: Durability | str = Durability.FULL,
    symlinks: Symlinks = "follow",
) -> BatchReport:
    """Write each ``(path, content)`` of ``items``, or of a mapping, as ``atomic_write`` does, and make them durable
    together.

    At its return all of them are as durable as ``durability`` says; ``none`` means ``atomic``. ``items`` may be a
    generator: it is drawn one item after another, and at most a group is under way.

    Raises ``BatchWriteError``, whose cause is the error of the file that it names, and which says how many stand. What
    the iterable itself raises, or a content that has no bytes, or Ctrl-C, passes with a note that says so. Nothing
    temporary is left but by a kill.
    """
    level = level_of(durability)
    source = iter(cast("Mapping[FilePath, Content]", items).items() if isinstance(items, Mapping) else items)
    report = BatchReport(0, 0, 0, 0, 0)
    while True:
        group = _Group(Durability.ATOMIC if level is Durability.NONE else level, symlinks, report.n_files)
        try:
            try:
                is_last = group.stage(source)
                group.commit()
            except BaseException:
                group.drop()
                raise
        except BaseException as error:
            group.drop()  # again: a Ctrl-C, or an error of unlink itself, may have cut the first one short
            if not isinstance(error, BatchWriteError):
                add_note(error, f"write_batch: the first {group.n_before + group.n_durable} files are written")
            raise
        finally:
            group.close()
        report = group.added_to(report)
        if is_last:
            return report


class _FileSystem:
    """What a group has on one file system: which of its files and directories a sync there concerns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd  # opened before the group wrote anything there: syncfs tells of errors since then
        self.is_synced_whole = is_synced_whole(fd)
        self.n_files = 0
        self.open_members: list[_Member] = []  # written, to be synced one by one
        self.n_syncfs = 0
        self.n_fsyncs = 0

    def add(self, one: _Member) -> None:
        """``one`` is written: have it synced in time, and closed."""
        self.n_files += 1
        one.take_over()
        if not self.is_synced_whole:
            self._sync_file(one)
        elif self.n_files < TOGETHER_MIN:
            self.open_members.append(one)
            try:
                calls.sync_file_range(one.fd)
            except OSError:
                pass  # it would only have begun sooner
        else:
            one.close_file()
            while self.open_members:
                _close(self.open_members.pop())

    def sync_files(self, first: _Member) -> None:
        """Before the renames: all of them are on disk then."""
        if self.is_synced_whole and self.n_files >= TOGETHER_MIN:
            self._sync_whole(first, "syncfs")
        while self.open_members:
            self._sync_file(self.open_members.pop())

    def sync_directories(self, renamed: dict[int, _Member]) -> None:
        """After the renames: ``renamed`` has each directory's descriptor, and a file that was renamed in it."""
        if self.is_synced_whole and len(renamed) >= TOGETHER_MIN:
            self._sync_whole(next(iter(renamed.values())), "syncfs, after the rename")
            return
        for fd, one in renamed.items():
            sync(fd, one.path, "fsync of its directory, after the rename")
            self.n_fsyncs += 1

    def _sync_file(self, one: _Member) -> None:
        sync(one.fd, one.path, "fsync")
        self.n_fsyncs += 1
        _close(one)

    def _sync_whole(self, one: _Member, operation: str) -> None:
        try:
            calls.syncfs(self.fd)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DurabilityError(os.fsdecode(one.path), operation, error.errno or errno.EIO, reason) from error
        self.n_syncfs += 1


class _Directories:
    """The directories that a group has open, and the file systems they are on, where those are to be synced."""

    def __init__(self, level: Durability) -> None:
        self.is_synced = level is not Durability.ATOMIC
        self.file_systems: dict[int, _FileSystem] = {}  # by device
        self._open: dict[bytes, tuple[int, _FileSystem | None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, path: bytes) -> tuple[int, _FileSystem | None]:
        """The descriptor of the directory at ``path``, and its file system. Raises ``OSError``."""
        if path in self._open:
            return self._open[path]
        access = os.O_RDONLY if self.is_synced else os.O_PATH  # O_PATH needs no read permission, and serves no sync
        fd = calls.open(path, access | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open[path] = fd, None
        if self.is_synced:
            device = calls.fstat(fd).st_dev
            if device not in self.file_systems:
                self.file_systems[device] = _FileSystem(fd)
            self._open[path] = fd, self.file_systems[device]
        return self._open[path]

    def close(self) -> None:
        """Close them all. Never raises an ``OSError``."""
        while self._open:
            close_quietly(self._open.popitem()[1][0])


class _Member(Replacement):
    """One file of a group, in a directory that the group has open."""

    __slots__ = ("directories", "file_system")

    def __init__(self, directories: _Directories) -> None:
        super().__init__()
        self.directories = directories
        self.file_system: _FileSystem | None = None

    def open_directory(self, directory: bytes) -> int:
        dir_fd, self.file_system = self.directories.open(directory)
        return dir_fd

    def leave_directory(self) -> None:
        self.dir_fd = -1


class _Group:
    """Files that are staged, synced, renamed and synced together."""

    def __init__(self, level: Durability, symlinks: Symlinks, n_before: int) -> None:
        self.level = level
        self.symlinks: Symlinks = symlinks
        self.n_before = n_before  # files of the batch, in earlier groups
        self.n_durable = 0  # of this one
        self.content_bytes = 0
        self.members: list[_Member] = []
        self.directories = _Directories(level)

    def stage(self, source: Iterator[tuple[FilePath, Content]]) -> bool:
        """Draw and write files until the group is full; whether there are no more."""
        for item in source:
            if isinstance(item, str):  # of two characters, it would be a path and a content
                raise TypeError(f"{item!r} is no pair of path and content")
            path, content = item
            one = _Member(self.directories)
            self.members.append(one)
            target, pieces = encoded(path), octets(content)
            try:
                one.begin(target, self.level, self.symlinks)
                one.write(pieces)
                if one.file_system is None:
                    one.finish()
                else:
                    one.file_system.add(one)
            except OSError as error:
                known = _named(one, error)
                raise self._ended(known, 0, 0) from known
            self.content_bytes += len(pieces)
            if self._is_full():
                return False
        return True

    def commit(self) -> None:
        """Make all of them durable and visible, in their order. Raises ``BatchWriteError``: how far it came."""
        for file_system in self.directories.file_systems.values():
            try:
                file_system.sync_files(self.members[0])
            except OSError as error:
                known = _named(self.members[0], error)
                raise self._ended(known, 0, 0) from known
        n_renamed = 0
        failure: FileOperationError | None = None
        for one in self.members:
            try:
                one.publish(sync_directory=False)
            except OSError as error:
                failure = _named(one, error)
                break
            n_renamed += 1
        if self.level is Durability.FULL:
            self._sync_directories(n_renamed)
        self.n_durable = n_renamed
        if failure is not None:
            raise self._ended(failure, n_renamed, n_renamed) from failure

    def drop(self) -> None:
        """Remove what was staged and not renamed. Never raises an ``OSError``."""
        for one in self.members:
            one.drop()

    def close(self) -> None:
        """Close what is open. Never raises an ``OSError``."""
        for one in self.members:
            one.close()
        self.directories.close()

    def added_to(self, report: BatchReport) -> BatchReport:
        """``report``, and this group."""
        file_systems = self.directories.file_systems.values()
        return BatchReport(
            report.n_files + len(self.members),
            report.content_bytes + self.content_bytes,
            report.n_groups + bool(self.members),
            report.n_syncfs + sum(file_system.n_syncfs for file_system in file_systems),
            report.n_fsyncs + sum(file_system.n_fsyncs for file_system in file_systems),
        )

    def _is_full(self) -> bool:
        return (
            len(self.members) >= GROUP_FILES_MAX
            or self.content_bytes >= GROUP_BYTES_MAX
            or len(self.directories) >= GROUP_DIRECTORIES_MAX
        )

    def _sync_directories(self, n_renamed: int) -> None:
        for file_system in self.directories.file_systems.values():
            renamed = {one.dir_fd: one for one in self.members[:n_renamed] if one.file_system is file_system}
            try:
                file_system.sync_directories(renamed)
            except OSError as error:
                known = _named(self.members[0], error)
                raise self._ended(known, 0, n_renamed) from known

    def _ended(self, error: FileOperationError, n_durable: int, n_visible: int) -> BatchWriteError:
        """The error of the batch, of which so many of this group stand."""
        self.n_durable = n_durable
        return BatchWriteError(
            error.path,
            error.operation,
            error.errno or errno.EIO,
            error.reason,
            self.n_before + n_durable,
            self.n_before + n_visible,
        )


def _close(one: _Member) -> None:
    """Close a file that may be another than the one at hand: the error names it."""
    try:
        one.close_file()
    except OSError as error:
        raise _named(one, error) from error


def _named(one: _Member, error: OSError) -> FileOperationError:
    """``error``, with the path and the step of ``one`` where it has none."""
    if isinstance(error, FileOperationError):
        return error
    named = failed(one.path, one.step, error)
    named.__cause__ = error
    return named


def is_synced_whole(fd: int) -> bool:
    """Whether one syncfs does, and tells, all that fsync of each file would, on the file system of ``fd``."""
    return _syncfs_tells() and file_system_of(fd) & 0xFFFFFFFF in SYNCED_WHOLE


def _syncfs_tells() -> bool:
    """Whether the kernel reports errors of writing to syncfs(2): since Linux 5.8."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return version is not None and (int(version[1]), int(version[2])) >= (5, 8)

"""How much is promised of a written file, and the steps that keep the promise: fsync, of files and of directories.

    level     in place of the old file   fsync of the file   fsync of the directory   after a power cut
    none      overwritten, torn          no                  no                       anything
    atomic    renamed over it            no                  no                       old, new, empty or lost
    data      renamed over it            yes                 no                       old or new, whole
    full      renamed over it            yes                 yes                      new, whole

- fsync comes before the rename: without it a power cut leaves an empty file on ext4 and xfs, and xfs loses the old one
  as well.
- fsync is never retried: the kernel may have dropped the pages that it could not write, and would then report success.
- A new directory is durable before anything is made in it, so that whoever sees a directory has to sync
  one level only.
"""

from __future__ import annotations

import errno
import os
import stat
from enum import StrEnum

from ringpool.errors import AtomicWriteError, DurabilityError, FileOperationError
from ringpool.workers.files.attributes import born_ns
from ringpool.workers.files.oslayer import calls

DIRECTORIES_REMEMBERED_MAX = 4096

# Directories whose own entry this process has seen made durable, see ``identity_of``. Full, it starts anew.
_durable_directories: set[tuple[int, int, int]] = set()


class Durability(StrEnum):
    """How much is promised of a written file; the table above says what each level does."""

    NONE = "none"
    ATOMIC = "atomic"
    DATA = "data"
    FULL = "full"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"durability must be one of {', '.join(cls)}, not {value!r}")


_LEVELS = {level.value: level for level in Durability}


def level_of(durability: Durability | str) -> Durability:
    """``Durability(durability)``, sooner. Raises ``ValueError`` where there is no such level."""
    return _LEVELS.get(durability) or Durability(durability)


def sync(fd: int, path: bytes, operation: str) -> None:
    """fsync, once. Raises ``DurabilityError``."""
    try:
        calls.fsync(fd)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DurabilityError(os.fsdecode(path), operation, error.errno or errno.EIO, reason) from error


def make_directories(directory: bytes, *, durable: bool) -> None:
    """Make ``directory`` and its missing ancestors; ``durable``: each is on disk before anything is made in it."""
    try:
        missing: list[bytes] = []
        here = directory
        while (found := _stat_directory(here)) is None:
            above = os.path.dirname(here.rstrip(b"/")) or b"."
            if above == here:
                break
            missing.append(here)
            here = above
        for here in reversed(missing):
            try:
                calls.mkdir(here, 0o777)
            except FileExistsError:
                pass  # a neighbour was faster, and may not have come to its fsync yet: ours counts
            found = _stat_directory(here)
            if durable:
                _sync_entry(here, found, ours=True)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if durable and identity_of(found, here) not in _durable_directories:
            _sync_entry(here, found, ours=False)
    except FileOperationError:
        raise
    except OSError as error:
        raise AtomicWriteError(
            os.fsdecode(directory), "make the directory", error.errno or errno.EIO, error.strerror or str(error)
        ) from error


def make_durable(fd: int, path: bytes) -> None:
    """Make the entry of the open directory, shown as ``path``, in the one above durable: once in a process.

    Raises ``OSError``, ``DurabilityError``.
    """
    found = calls.fstat(fd)
    if identity_of(found, path, fd) not in _durable_directories:
        _sync_entry(path, found, ours=False, dir_fd=fd)


def _sync_entry(directory: bytes, found: os.stat_result | None, *, ours: bool, dir_fd: int | None = None) -> None:
    """Make the entry of ``directory`` in its parent durable, and remember that.

    Also for one that we find: a neighbour may have made it a moment ago, and be dead before its fsync. In that case a
    parent that we may not read is somebody else's, and a mount point's entry is no matter of ours.
    """
    try:
        above = directory + b"/.." if dir_fd is None else b".."
        fd = calls.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    except PermissionError:
        if ours:
            raise
    else:
        try:
            if ours or (found is not None and calls.fstat(fd).st_dev == found.st_dev):
                sync(fd, directory, "fsync of the directory above")
        finally:
            close_quietly(fd)
    if found is not None:
        if len(_durable_directories) >= DIRECTORIES_REMEMBERED_MAX:
            _durable_directories.clear()
        _durable_directories.add(identity_of(found, directory, dir_fd))


def identity_of(found: os.stat_result, path: bytes, fd: int | None = None) -> tuple[int, int, int]:
    """Device, inode and birth of what is at ``path``, or open: the inode of what was removed is soon another one's."""
    return found.st_dev, found.st_ino, born_ns(path, fd)


def _stat_directory(path: bytes) -> os.stat_result | None:
    try:
        found = calls.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return found


def close_quietly(fd: int) -> None:
    """Close what holds no unwritten bytes, or whose fate is decided already."""
    try:
        calls.close(fd)
    except OSError:
        pass

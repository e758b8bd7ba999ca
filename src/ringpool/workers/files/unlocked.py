"""Operations on files below a base, without locks: what a store does while it holds the path's lock.

    read    one open: a file that is replaced meanwhile is read as it was, whole
    write   atomic_write
    append  the old content and the new one, to a new file that takes the old one's place
    delete  unlink             rename  renameat2(NOREPLACE), or rename where it may replace

With durability ``full`` each has its effect on disk when it returns. A kill at any point leaves the old state or the
new one, and perhaps a hidden file. Every path is relative to the base and cannot leave it, by ``..`` or
by a symlink; names that ringpool uses itself are refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import TypeVar

from ringpool.errors import AtomicWriteError, DurabilityError, FileMissingError, FileOperationError
from ringpool.workers.files.atomic import atomic_open, atomic_write
from ringpool.workers.files.contained import Contained
from ringpool.workers.files.durability import Durability, close_quietly, sync
from ringpool.workers.files.finding import is_internal
from ringpool.workers.files.naming import FilePath, encoded
from ringpool.workers.files.oslayer import calls, write_all

COPY_BYTES = 1 << 20  # at once
Content = bytes | bytearray | memoryview | str

_T = TypeVar("_T")


class Unlocked:
    """The operations below the base of ``contained``."""

    def __init__(self, contained: Contained) -> None:
        self.contained = contained

    # ---- reading -----------------------------------------------------------------------------------------------------

    def read(self, path: FilePath) -> bytes:
        """The content. Raises ``FileMissingError``."""
        return self._at(path, "read", self._read)

    def _read(self, parent: int, name: bytes) -> bytes:
        fd = calls.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        try:
            if not stat.S_ISREG(calls.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            pieces: list[bytes] = []
            while piece := calls.read(fd, COPY_BYTES):
                pieces.append(piece)
            return b"".join(pieces)
        finally:
            close_quietly(fd)

    def stat(self, path: FilePath) -> os.stat_result:
        """What stat(2) tells of it, a symlink not followed. Raises ``FileMissingError``."""

        def look(parent: int, name: bytes) -> os.stat_result:
            return calls.stat(name, dir_fd=parent, follow_symlinks=False)

        return self._at(path, "stat", look, follow=False)

    def exists(self, path: FilePath) -> bool:
        """Whether there is something of that name, of whatever kind."""
        try:
            self.stat(path)
        except FileOperationError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    def list(self, directory: FilePath = ".") -> list[str]:
        """The names in a directory, sorted, those that ringpool uses itself left out."""
        try:
            fd = self.contained.open_directory(directory)
            try:
                names = calls.listdir(fd)
            finally:
                close_quietly(fd)
        except OSError as error:
            raise self._failed(directory, "list", error) from error
        return sorted(name for name in names if not is_internal(os.fsencode(name)))

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, path: FilePath, content: Content, level: Durability) -> None:
        """Make ``content`` the content, whole or not at all; directories are made where they are missing."""
        self._at(
            path,
            "write",
            lambda parent, name: atomic_write(name, content, durability=level, dir_fd=parent),
            create=True,
        )

    def append(self, path: FilePath, content: Content, level: Durability) -> None:
        """Put ``content`` after what is there, if anything, whole or not at all."""

        def append(parent: int, name: bytes) -> None:
            with atomic_open(name, durability=level, dir_fd=parent) as new:
                try:
                    old = calls.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
                except FileNotFoundError:
                    pass
                else:
                    try:
                        copy(old, new.fileno())
                    finally:
                        close_quietly(old)
                new.write(content.encode() if isinstance(content, str) else content)

        self._at(path, "append", append, create=True)

    def delete(self, path: FilePath, level: Durability) -> None:
        """Remove the file, or the symlink itself. Raises ``FileMissingError``."""

        def delete(parent: int, name: bytes) -> None:
            calls.unlink(name, dir_fd=parent)
            if level is Durability.FULL:
                sync(parent, self.shown(path), "fsync of its directory, after the delete")

        self._at(path, "delete", delete, follow=False)

    def rename(self, old: FilePath, new: FilePath, level: Durability, *, replace: bool) -> None:
        """Give the file at ``old`` the path ``new``. Raises ``FileMissingError``; EEXIST where ``new`` is there.

        A directory is refused: it is not what the lock on its path protects.
        """

        def rename(source: int, old_name: bytes) -> None:
            found = calls.stat(old_name, dir_fd=source, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

            def move(target: int, new_name: bytes) -> None:
                if replace and found.st_nlink > 1 and _is_other_name(found, old_name, new_name, source, target):
                    calls.unlink(old_name, dir_fd=source)  # rename(2) of two names of one file does nothing
                elif replace:
                    calls.rename(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)
                else:
                    _rename_exclusive(old_name, new_name, source, target)
                if level is Durability.FULL:
                    sync(target, self.shown(new), "fsync of its directory, after the rename")
                    sync(source, self.shown(old), "fsync of its directory, after the rename")

            self._at(new, "rename", move, create=True, follow=False)

        self._at(old, "rename", rename, follow=False)

    # ---- paths -------------------------------------------------------------------------------------------------------

    def shown(self, path: FilePath) -> bytes:
        """The absolute path, for messages; nothing of it is checked."""
        return os.path.join(self.contained.base, encoded(path))

    def make_parent(self, path: FilePath, *, create: bool) -> None:
        """Make the directory of ``path``, or see that it is there: else ``FileMissingError``."""
        self._at(path, "open its directory", lambda parent, name: None, create=create, follow=False)

    def _at(
        self,
        path: FilePath,
        operation: str,
        action: Callable[[int, bytes], _T],
        *,
        create: bool = False,
        follow: bool = True,
    ) -> _T:
        """``action(directory descriptor, name)``. What the system refuses becomes an error that names the path."""
        try:
            parent, name = self.contained.open_parent(path, create=create, follow=follow)
            try:
                return action(parent, name)
            finally:
                close_quietly(parent)
        except OSError as error:
            raise self._failed(path, operation, error) from error

    def _failed(self, path: FilePath, operation: str, error: OSError) -> FileOperationError:
        shown = os.fsdecode(self.shown(path))
        if error.errno == errno.ENOENT:
            return FileMissingError(shown, operation)
        if isinstance(error, AtomicWriteError | DurabilityError):  # these know the name only
            return type(error)(shown, error.operation, error.errno or errno.EIO, error.reason)
        if isinstance(error, FileOperationError):
            return error
        return FileOperationError(shown, operation, error.errno or errno.EIO, error.strerror or str(error))


def copy(source: int, target: int) -> None:
    """All bytes of ``source``, from its position on, to ``target``; by the kernel where it can, shared where the file
    system can."""
    try:
        while calls.copy_file_range(source, target, COPY_BYTES):
            pass
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
    while piece := calls.read(source, COPY_BYTES):
        write_all(target, memoryview(piece))


def _rename_exclusive(old: bytes, new: bytes, source: int, target: int) -> None:
    try:
        calls.rename_exclusive(old, new, source, target)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL):
            raise
        calls.link(old, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        calls.unlink(old, dir_fd=source)


def _is_other_name(found: os.stat_result, old: bytes, new: bytes, source: int, target: int) -> bool:
    """Whether ``new`` is another name of the file ``found``, which is at ``old``."""
    if old == new and os.path.samestat(calls.fstat(source), calls.fstat(target)):
        return False
    try:
        return os.path.samestat(found, calls.stat(new, dir_fd=target, follow_symlinks=False))
    except FileNotFoundError:
        return False

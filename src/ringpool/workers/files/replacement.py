"""A replacement: the next content of one target, from its temporary file to the target's name.

    begin  --> the directory is open, what stands there is known, the temporary file exists
      |
    write  --> it has its content              (or any other way of writing to ``fd``)
      |
    finish --> it has owner, attributes and mode, is on disk where the level asks for that, and is closed
      |
    publish -> renamed: the commit point; then fsync of the directory, with ``full``

    attempt(step, ...)      takes steps; at any error or Ctrl-C the temporary file is dropped, and the error is named

The directory stays open from the look at the target to its last fsync, so that all steps mean the same directory, even
if it is renamed or its name comes to mean another one. What may fail is done before the commit point.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Literal

from ringpool.errors import FileOperationError, TargetExistsError
from ringpool.workers.files.durability import Durability, close_quietly, sync
from ringpool.workers.files.naming import check_path, random_staging_name, unusable
from ringpool.workers.files.oslayer import calls, write_all
from ringpool.workers.files.target import Symlinks, failed, refuse_special, refused, take_over

HardLinks = Literal["split", "refuse"]

_DATA, _FULL = Durability.DATA, Durability.FULL
_TEMPORARY = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY_UNSYNCED = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_HAS_PROC = os.path.isdir("/proc/self/fd")


class Replacement:
    """One replacement under way: the names, what is open, and the step that it is at."""

    __slots__ = ("dir_fd", "exclusive", "fd", "level", "mode", "name", "path", "replaced", "step", "temp", "within")

    def __init__(self) -> None:
        self.temp: bytes | None = None  # its name, while there may be one
        self.dir_fd = -1
        self.fd = -1
        self.exclusive = False

    def give_up(self, error: BaseException) -> None:
        """After ``error``: leave nothing, and raise ``AtomicWriteError`` in place of an ``OSError``."""
        self.drop()
        self.close()
        if isinstance(error, OSError) and not isinstance(error, FileOperationError):
            if self.exclusive and error.errno == errno.EEXIST:
                raise TargetExistsError(os.fsdecode(self.path)) from error
            raise failed(self.path, self.step, error) from error

    def begin(
        self,
        path: bytes,
        level: Durability,
        symlinks: Symlinks,
        hard_links: HardLinks = "split",
        mode: int | None = None,
        exclusive: bool = False,
        within: int | None = None,
    ) -> None:
        """Open the directory, look at what stands there, create the temporary file. A link is followed once."""
        check_choices(symlinks, hard_links)
        self.level = level
        self.mode = mode  # the new file's, exactly; None: see atomic_write
        self.exclusive = exclusive
        self.within = within  # the caller's directory, for which the path is a name in it
        found = self._look(path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            found = self._past_link(found, symlinks)
        if found is not None:
            if exclusive:
                raise TargetExistsError(os.fsdecode(self.path))
            if hard_links == "refuse" and found.st_nlink > 1:
                raise linked_elsewhere(self.path)
        self.replaced = found  # what stands there
        self.step = "create the temporary file"
        # 0666: the umask and a default ACL apply. 0600: nobody else may read it before it has its owner and mode.
        bits = 0o666 if mode is None and found is None else 0o600
        self.temp = temp = random_staging_name(self.name)
        try:
            self.fd = calls.open(temp, _TEMPORARY, bits, dir_fd=self.dir_fd)
        except FileExistsError:
            self.temp = None  # somebody else's
            raise

    def write(self, content: bytes | memoryview) -> None:
        """Write all of ``content``."""
        self.step = "write"
        write_all(self.fd, content)

    def finish(self) -> None:
        """Give the temporary file all but its name."""
        if self.replaced is not None or self.mode is not None:
            self.take_over()
        level = self.level
        if level is _FULL or level is _DATA:
            sync(self.fd, self.path, "fsync")
        self.close_file()

    def take_over(self) -> None:
        """Set owner, attributes and mode."""
        self.step = "set owner, attributes and mode"
        if self.replaced is not None:
            take_over(self.fd, calls.fstat(self.fd), self.replaced, self._reached_by(), self.mode)
        elif self.mode is not None:
            calls.fchmod(self.fd, self.mode)

    def close_file(self) -> None:
        """Close it, once, whatever close says (close(2)); a network file system reports errors of writing here."""
        self.step = "close"
        fd, self.fd = self.fd, -1
        calls.close(fd)

    def publish(self, *, sync_directory: bool = True) -> None:
        """Rename, and with ``full`` make that durable, unless the caller sees to it."""
        self.step = "rename"
        temp, dir_fd = self.temp, self.dir_fd
        assert temp is not None
        if self.exclusive:
            self._rename_exclusively(temp)
        else:
            calls.rename(temp, self.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)  # the commit point
            self.temp = None
        if sync_directory and self.level is _FULL:
            sync(dir_fd, self.path, "fsync of its directory, after the rename")

    def _rename_exclusively(self, temp: bytes) -> None:
        try:
            calls.rename_exclusive(temp, self.name, self.dir_fd, self.dir_fd)
            self.temp = None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL):
                raise
            # link(2) never replaces either. The temporary name goes before the directory's fsync.
            calls.link(temp, self.name, src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd, follow_symlinks=False)
            self.drop()

    def drop(self) -> None:
        """Remove the temporary file, if there is one. Never raises an ``OSError``."""
        if self.temp is None:
            return
        try:
            calls.unlink(self.temp, dir_fd=self.dir_fd)
        except FileNotFoundError:
            pass
        except OSError:
            return  # still in self.temp: the next call tries again
        self.temp = None

    def close(self) -> None:
        """Close what is open. Never raises an ``OSError``."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close_quietly(fd)
        self.leave_directory()

    def open_directory(self, directory: bytes) -> int:
        """A descriptor of ``directory``; O_PATH needs no read permission, and serves no fsync."""
        flags = _DIRECTORY if self.level is _FULL else _DIRECTORY_UNSYNCED
        return calls.open(directory, flags, dir_fd=self.within)

    def leave_directory(self) -> None:
        """Close the directory, if it is open. Never raises an ``OSError``."""
        fd, self.dir_fd = self.dir_fd, -1
        if fd >= 0:
            try:
                calls.close(fd)
            except OSError:
                pass  # it holds no unwritten bytes

    def _look(self, path: bytes) -> os.stat_result | None:
        """What stands at ``path``; None: nothing. Its directory is open from then on."""
        self.path = path
        directory, slash, name = path.rpartition(b"/")
        if not name or b"\0" in path:
            check_path(path)
            raise refused(path, errno.EISDIR)
        if slash and self.within is not None:
            raise unusable(path, "it is to be a name in the open directory, and has a slash")
        self.name = name
        self.step = "open its directory"
        dir_fd = self.open_directory(directory or slash or b".")
        self.dir_fd = dir_fd
        self.step = "look at the target"
        # The usual case is that there is nothing, and an exception would cost twice what this costs. It says no to
        # whatever fails; a directory in which nothing can be found takes no temporary file either.
        if not calls.access(name, os.F_OK, dir_fd=dir_fd, effective_ids=True, follow_symlinks=False):
            return None
        try:
            return calls.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _past_link(self, found: os.stat_result, symlinks: Symlinks) -> os.stat_result | None:
        """What stands where the symlink at the path leads; None: nothing, or nothing of which anything is kept."""
        if self.exclusive:
            raise TargetExistsError(os.fsdecode(self.path))
        if stat.S_ISLNK(found.st_mode):
            if symlinks == "replace":
                return None
            if symlinks == "refuse" or self.within is not None:  # it may lead anywhere
                raise refused(self.path, errno.ELOOP, "it is a symbolic link")
            self.leave_directory()
            found_there = self._look(os.path.realpath(self.path))
            if found_there is None:
                return None
            found = found_there
        refuse_special(self.path, found)
        return found

    def _reached_by(self) -> bytes:
        """A path that leads to what is replaced, for the calls that take no directory."""
        if self.within is None and not _HAS_PROC:
            return self.path
        return b"/proc/self/fd/%d/%b" % (self.dir_fd, self.name)


def linked_elsewhere(path: bytes) -> FileOperationError:
    """The error of a file with several hard links, where they are refused; to be raised."""
    return refused(path, errno.EMLINK, "it has other hard links, which would keep the old content")


def check_choices(symlinks: str, hard_links: str) -> None:
    """Raise ``ValueError`` for a word that stands for nothing: a misspelt ``refuse`` must not mean ``follow``."""
    if symlinks not in ("follow", "replace", "refuse"):
        raise ValueError(f"symlinks is one of 'follow', 'replace', 'refuse', not {symlinks!r}")
    if hard_links not in ("split", "refuse"):
        raise ValueError(f"hard_links is one of 'split', 'refuse', not {hard_links!r}")


def octets(content: bytes | bytearray | memoryview | str) -> bytes | memoryview:
    """The bytes of ``content``, text as UTF-8; copied only where they do not lie one after the other."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    view = memoryview(content)
    if view.nbytes == 0:
        return b""
    return view.cast("B") if view.c_contiguous else view.tobytes()

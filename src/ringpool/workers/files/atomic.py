"""Files that are there whole or not at all: atomic writes, and a task's output from its staging to its final name.

                                        the commit point
    write to a staged file -> owner, xattrs, mode -> fsync -> close -> rename -> fsync of the directory
    `-- an error or Ctrl-C anywhere here: the staged file is dropped --'     '-- DurabilityError: the new content stands

    level     in place of the old file   fsync of the file   fsync of the directory   after a power cut
    none      overwritten, torn          no                  no                       anything
    atomic    renamed over it            no                  no                       old, new, empty or lost
    data      renamed over it            yes                 no                       old or new, whole
    full      renamed over it            yes                 yes                      new, whole

A task's output takes the same way in the worker's hands, from ``atomic`` on (for it, ``none`` means ``atomic``):

    target = prepare_target(target, level)          makes its directory; follows a symlink that stands there
    staged = staging_name(target, token)            the task function writes to this, with any tool
    identity = finish_staged(staged, target, level)
    ... record the identity, take the path's lock, check that the attempt is still ours ...
    publish_staged(staged, target, level)           the commit point is inside
    which_side(staged, target, identity.ino, identity.dev)    after a death in between: did it commit?

Rules, each the lesson of a mistake that was seen:

- fsync before rename: without it a power cut leaves an empty file on ext4 and xfs, and xfs loses the old one as well.
- fsync is never retried: the kernel may have dropped the pages that it could not write, and would then report success.
- What may fail is done before the commit point; the directory is opened before the rename, not for its fsync.
- Only a regular file is replaced. A rename would put an ordinary file in place of /dev/null.
- A new directory is durable before anything is made in it, so that whoever sees a directory has to sync
  one level only.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from enum import Enum, StrEnum
from typing import Literal, NamedTuple

from ringpool.errors import AtomicWriteError, DurabilityError, FileOperationError, OutputMissingError
from ringpool.workers.files.naming import FilePath, random_token, staging_name
from ringpool.workers.files.oslayer import calls

DIRECTORIES_REMEMBERED_MAX = 4096

Symlinks = Literal["follow", "replace", "refuse"]
HardLinks = Literal["split", "refuse"]

_ACL = "system.posix_acl_access"
_OF_THE_OLD_CONTENT = frozenset(
    {"security.capability", "security.ima", "security.evm"}
)  # the kernel drops or checks them
_UNKEPT = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENODATA, errno.EINVAL, errno.ENOENT})

# Directories whose own entry this process has seen made durable: (st_dev, st_ino). Full, it starts anew.
_durable_directories: set[tuple[int, int]] = set()


class Durability(StrEnum):
    """How much is promised of a written file; the table above says what each level does."""

    NONE = "none"
    ATOMIC = "atomic"
    DATA = "data"
    FULL = "full"


class StagedFile(NamedTuple):
    """The identity of a finished output, which its rename keeps: device, inode, and size in bytes."""

    dev: int
    ino: int
    size: int


class CommitSide(Enum):
    """What the disk tells about a commit that was cut short."""

    STAGED = "staged"  # not committed: the file still has its staging name
    TARGET = "target"  # committed: the file has its final name
    UNKNOWN = "unknown"  # somebody else has changed either, or it cannot be read


# ---- a task's output -------------------------------------------------------------------------------------------------


def resolve_target(target: bytes) -> bytes:
    """``target``, or where the symlink there points to, be there something or not. A pure look-up; never raises.

    Before and after a commit it gives the same path: the commit replaces what the link points to.
    """
    return os.path.realpath(target) if os.path.islink(target) else target


def prepare_target(target: bytes, durability: Durability = Durability.FULL) -> bytes:
    """Make the directory of ``target``, and return the path to stage beside and to publish at.

    That is what ``resolve_target`` gives. With ``full``, new directories are on disk before this returns. Raises
    ``AtomicWriteError`` where it cannot be made or something stands there that is no regular file, ``DurabilityError``
    where its fsync fails.
    """
    final, _ = _final_target(target, "follow")
    _make_directories(os.path.dirname(final) or b".", durable=durability == Durability.FULL)
    return final


def finish_staged(staged: bytes, target: bytes, durability: Durability) -> StagedFile:
    """Make the output that a task function left at ``staged`` ready for its name ``target``; return its identity.

    It takes the owner, mode and extended attributes of the file that it will replace; where there is none it keeps
    those that the function gave it. From ``data`` on its content is on disk when this returns. Whatever is raised, the
    staged file is gone then: ``OutputMissingError`` (the function wrote no regular file), ``DurabilityError`` (fsync),
    ``AtomicWriteError`` (anything else).
    """
    try:
        fd = _open_staged(staged, target)
        try:
            own = calls.fstat(fd)
            if not stat.S_ISREG(own.st_mode):
                raise OutputMissingError(os.fsdecode(target), os.fsdecode(staged), "is not a regular file")
            replaced = _lstat(target)
            if replaced is not None and own.st_nlink == 1:  # a link's metadata would be those of the other names, too
                _take_over(fd, own, replaced, target, None)
            if durability in (Durability.DATA, Durability.FULL):
                _sync(fd, target, "fsync of the output")
        finally:
            calls.close(fd)
        return StagedFile(own.st_dev, own.st_ino, own.st_size)
    except FileOperationError:
        discard_staged(staged)
        raise
    except OSError as error:
        discard_staged(staged)
        raise _failed(target, "finish the output", error) from error
    except BaseException:
        discard_staged(staged)
        raise


def publish_staged(staged: bytes, target: bytes, durability: Durability) -> None:
    """Give the finished file its final name, in one step; with ``full`` the name is on disk when this returns.

    Raises ``AtomicWriteError``: not published, the staged file is gone. ``DurabilityError``: published, but perhaps not
    for ever.
    """
    directory, name = os.path.split(target)
    dir_fd = -1
    try:
        if durability == Durability.FULL:
            dir_fd = calls.open(directory or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            calls.rename(staged, name, dst_dir_fd=dir_fd)  # the commit point
        else:
            calls.rename(staged, target)  # the commit point
    except OSError as error:
        raise _failed(target, "rename", error) from error
    else:
        if dir_fd >= 0:
            _sync(dir_fd, target, "fsync of its directory, after the rename")
    finally:
        # After a rename this finds nothing, but where both names were links of one file: rename(2) then does nothing.
        discard_staged(staged)
        if dir_fd >= 0:
            _close_quietly(dir_fd)


def discard_staged(staged: bytes) -> None:
    """Remove a staged file, or the directory that a function made in its place. That it is missing is fine."""
    try:
        calls.unlink(staged)
    except IsADirectoryError:
        shutil.rmtree(staged, ignore_errors=True)
    except OSError:
        pass  # it is missing; or it stays, and the clean-up of the dead takes it: the caller's own error matters more


def which_side(staged: bytes, target: bytes, ino: int, dev: int) -> CommitSide:
    """Whether the file (``dev``, ``ino``) was renamed from ``staged`` to ``target`` before its writer died.

        staged is     target is
        the file      anything         STAGED    (both: links of one file; to run again does no harm)
        missing       the file         TARGET
        missing       anything else    UNKNOWN
        another one   anything         UNKNOWN

    Pure look-ups. The caller has made sure that the writer is dead.
    """
    try:
        there, final = _lstat(staged), _lstat(target)
    except OSError:
        return CommitSide.UNKNOWN
    if there is not None:
        return CommitSide.STAGED if (there.st_dev, there.st_ino) == (dev, ino) else CommitSide.UNKNOWN
    if final is not None and (final.st_dev, final.st_ino) == (dev, ino):
        return CommitSide.TARGET
    return CommitSide.UNKNOWN


# ---- one atomic write ------------------------------------------------------------------------------------------------


def atomic_write(
    path: FilePath,
    content: bytes | bytearray | memoryview | str,
    *,
    durability: Durability | str = Durability.FULL,
    mode: int | None = None,
    symlinks: Symlinks = "follow",
    hard_links: HardLinks = "split",
    exclusive: bool = False,
) -> None:
    """Make ``content`` (text as UTF-8, line ends untouched) the content of the file at ``path``, whole or not at all.

    ``mode`` is the new file's, exactly; without it that of the file that is replaced, else what the umask leaves of
    0666. Owner and extended attributes are kept as far as this process may set them; set-id bits are not. ``symlinks``
    says what happens to a symlink at ``path``. A file with several hard links loses this one to the new content, unless
    ``hard_links`` is ``"refuse"``. With ``exclusive`` the file must not exist (errno EEXIST).

    Raises ``AtomicWriteError``: the old content stands. ``DurabilityError``: fsync failed; its ``operation`` says
    whether before the rename (the old content stands) or after it (the new one does). With ``none`` the file is
    overwritten where it stands, and an error, a ``FileOperationError``, may leave it torn. Nothing temporary is left
    but by a kill.
    """
    level = Durability(durability)
    target = os.fsencode(path)
    if level is Durability.NONE and symlinks != "replace":
        return _write_in_place(target, _octets(content), mode, symlinks, exclusive)
    final, replaced = _final_target(target, "replace" if exclusive else symlinks)
    if replaced is not None:
        if exclusive:
            raise _refused(target, errno.EEXIST)
        if hard_links == "refuse" and replaced.st_nlink > 1:
            raise _refused(target, errno.EMLINK, "it has other hard links, which would keep the old content")
    write = _Write(final, level)
    try:
        try:
            write.run(_octets(content), mode, replaced, exclusive)
        finally:
            write.drop()
    except BaseException as error:
        write.drop()  # again: a Ctrl-C, or an error of unlink itself, may have cut the first one short
        if isinstance(error, OSError) and not isinstance(error, FileOperationError):
            raise _failed(target, write.step, error) from error
        raise
    finally:
        write.close()


class _Write:
    """One atomic write under way: the names, what is open, and the step that it is at."""

    __slots__ = ("dir_fd", "directory", "fd", "level", "name", "path", "step", "temp")

    def __init__(self, path: bytes, level: Durability) -> None:
        self.path = path
        self.level = level
        self.directory, self.name = os.path.split(path)
        self.temp: bytes | None = None  # its name, while there may be one
        self.dir_fd = -1
        self.fd = -1
        self.step = ""

    def run(self, content: memoryview, mode: int | None, replaced: os.stat_result | None, exclusive: bool) -> None:
        """The whole way, up to the fsync of the directory."""
        self.step = "open its directory"
        access = os.O_RDONLY if self.level is Durability.FULL else os.O_PATH  # O_PATH needs no read permission
        self.dir_fd = calls.open(self.directory or b".", access | os.O_DIRECTORY | os.O_CLOEXEC)
        self._create(0o666 if mode is None and replaced is None else 0o600)  # 0666: the umask and a default ACL apply
        self.step = "write"
        _write_all(self.fd, content)
        self.step = "set owner, attributes and mode"
        if replaced is not None:
            _take_over(self.fd, calls.fstat(self.fd), replaced, self.path, mode)
        elif mode is not None:
            calls.fchmod(self.fd, mode)
        if self.level in (Durability.DATA, Durability.FULL):
            _sync(self.fd, self.path, "fsync")
        self.step = "close"
        # Closed once, whatever close says (close(2)); a network file system reports errors of writing here.
        fd, self.fd = self.fd, -1
        calls.close(fd)
        self.step = "rename"
        self._publish(exclusive)
        if self.level is Durability.FULL:
            _sync(self.dir_fd, self.path, "fsync of its directory, after the rename")

    def _create(self, mode: int) -> None:
        self.step = "create the temporary file"
        self.temp = staging_name(self.name, random_token())
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.fd = calls.open(self.temp, flags, mode, dir_fd=self.dir_fd)
        except FileExistsError:
            self.temp = None  # somebody else's
            raise

    def _publish(self, exclusive: bool) -> None:
        """The commit point."""
        temp = self.temp
        assert temp is not None
        if not exclusive:
            calls.rename(temp, self.name, src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)
            self.temp = None
            return
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
        for fd in (self.fd, self.dir_fd):
            if fd >= 0:
                _close_quietly(fd)
        self.fd = self.dir_fd = -1


def _write_in_place(path: bytes, content: memoryview, mode: int | None, symlinks: Symlinks, exclusive: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if exclusive else os.O_TRUNC)
    try:
        fd = calls.open(path, flags | (os.O_NOFOLLOW if symlinks == "refuse" else 0), 0o666 if mode is None else 0o600)
        try:
            _write_all(fd, content)
            if mode is not None:
                calls.fchmod(fd, mode)
        except BaseException:
            _close_quietly(fd)
            raise
        calls.close(fd)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileOperationError(os.fsdecode(path), "write in place", error.errno or errno.EIO, reason) from error


# ---- steps that both share -------------------------------------------------------------------------------------------


def _final_target(path: bytes, symlinks: Symlinks) -> tuple[bytes, os.stat_result | None]:
    """Where a write to ``path`` goes, and what stands there; None: nothing. Raises ``AtomicWriteError``."""
    try:
        found = _lstat(path)
        if found is not None and stat.S_ISLNK(found.st_mode):
            if symlinks == "replace":
                return path, None  # the link goes, and nothing of it is kept
            if symlinks == "refuse":
                raise _refused(path, errno.ELOOP, "it is a symbolic link")
            path = resolve_target(path)
            found = _lstat(path)
    except FileOperationError:
        raise
    except OSError as error:
        raise _failed(path, "look at the target", error) from error
    if found is not None and not stat.S_ISREG(found.st_mode):
        if stat.S_ISDIR(found.st_mode):
            raise _refused(path, errno.EISDIR)
        reason = "it leads in a circle" if stat.S_ISLNK(found.st_mode) else "it is a device, pipe or socket"
        raise _refused(path, errno.EINVAL, reason)
    if not os.path.basename(path):
        raise _refused(path, errno.EISDIR)
    return path, found


def _open_staged(staged: bytes, target: bytes) -> int:
    """Open what the function wrote, for its metadata and fsync. O_NONBLOCK: a pipe there must not stop us."""
    try:
        return calls.open(staged, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        shown = (os.fsdecode(target), os.fsdecode(staged))
        if error.errno == errno.ENOENT:
            raise OutputMissingError(*shown) from None
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OutputMissingError(*shown, "is not a regular file") from None
        raise


def _take_over(fd: int, own: os.stat_result, replaced: os.stat_result, path: bytes, mode: int | None) -> None:
    """Give the open file the owner, attributes and mode (``mode``, where given) of the file that it will replace.

    In this order: chown clears set-id bits, an ACL sets the group's bits. Where the group cannot be kept, the new group
    gets no more than everybody has.
    """
    bits = stat.S_IMODE(replaced.st_mode) & ~(stat.S_ISUID | stat.S_ISGID)  # granted to the old content, not to this
    if not _give_owner(fd, own, replaced):
        bits &= ~0o070 | (bits & 0o007) << 3
    had_acl = _copy_xattrs(fd, path)
    wanted = bits if mode is None else mode
    if had_acl or stat.S_IMODE(own.st_mode) != wanted:
        calls.fchmod(fd, wanted)


def _give_owner(fd: int, own: os.stat_result, replaced: os.stat_result) -> bool:
    """Whether the file has the replaced one's group now. Only root may give it to another user."""
    if (own.st_uid, own.st_gid) == (replaced.st_uid, replaced.st_gid):
        return True
    for uid in (replaced.st_uid, -1):
        try:
            calls.fchown(fd, uid, replaced.st_gid)
            return True
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):  # EINVAL: an id that this user namespace does not know
                raise
    return own.st_gid == replaced.st_gid


def _copy_xattrs(fd: int, path: bytes) -> bool:
    """Give the open file the extended attributes of the one at ``path``; whether its ACL was changed.

    A user attribute that the file has already is its writer's will. What this process may not set, or the file system
    cannot keep, is left out, as cp --preserve does.
    """
    theirs = _xattr_names(path)
    ours = _xattr_names(fd)
    for name in theirs:
        if name in _OF_THE_OLD_CONTENT or (name in ours and name.startswith("user.")):
            continue
        try:
            calls.setxattr(fd, name, calls.getxattr(path, name, follow_symlinks=False))
        except OSError as error:
            if error.errno not in _UNKEPT:
                raise
    if _ACL in ours and _ACL not in theirs:  # inherited from the directory: it would let in whom the old file did not
        calls.removexattr(fd, _ACL)
    return _ACL in ours or _ACL in theirs


def _xattr_names(file: bytes | int) -> list[str]:
    try:
        return calls.listxattr(file) if isinstance(file, int) else calls.listxattr(file, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _UNKEPT:
            raise
        return []


def _write_all(fd: int, content: memoryview) -> None:
    """write(2) may take less than it is given; that it takes nothing is an error, not a reason to turn for ever."""
    while content:
        count = calls.write(fd, content)
        if count <= 0:
            raise OSError(errno.EIO, "the file takes no more bytes")
        content = content[count:]


def _sync(fd: int, path: bytes, operation: str) -> None:
    """fsync, once. Raises ``DurabilityError``."""
    try:
        calls.fsync(fd)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DurabilityError(os.fsdecode(path), operation, error.errno or errno.EIO, reason) from error


def _make_directories(directory: bytes, *, durable: bool) -> None:
    """Make ``directory`` and its missing ancestors; ``durable``: each is on disk before anything is made in it."""
    try:
        missing: list[bytes] = []
        here = directory
        while (found := _stat_directory(here)) is None and (
            above := os.path.dirname(here.rstrip(b"/")) or b"."
        ) != here:
            missing.append(here)
            here = above
        for here in reversed(missing):
            with suppress(
                FileExistsError
            ):  # a neighbour was faster, and may not have come to its fsync yet: ours counts
                calls.mkdir(here, 0o777)
            found = _stat_directory(here)
            if durable:
                _sync_entry(here, found, ours=True)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if durable and (found.st_dev, found.st_ino) not in _durable_directories:
            _sync_entry(here, found, ours=False)
    except FileOperationError:
        raise
    except OSError as error:
        raise _failed(directory, "make the directory", error) from error


def _sync_entry(directory: bytes, found: os.stat_result | None, *, ours: bool) -> None:
    """Make the entry of ``directory`` in its parent durable, and remember that.

    Also for one that we find: a neighbour may have made it a moment ago, and be dead before its fsync. In that case a
    parent that we may not read is somebody else's, and a mount point's entry is no matter of ours.
    """
    try:
        fd = calls.open(directory + b"/..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        if ours:
            raise
    else:
        try:
            if ours or (found is not None and calls.fstat(fd).st_dev == found.st_dev):
                _sync(fd, directory, "fsync of the directory above")
        finally:
            _close_quietly(fd)
    if found is not None:
        if len(_durable_directories) >= DIRECTORIES_REMEMBERED_MAX:
            _durable_directories.clear()
        _durable_directories.add((found.st_dev, found.st_ino))


def _stat_directory(path: bytes) -> os.stat_result | None:
    try:
        found = calls.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return found


def _lstat(path: bytes) -> os.stat_result | None:
    try:
        return calls.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _close_quietly(fd: int) -> None:
    """Close what holds no unwritten bytes, or whose fate is decided already."""
    with suppress(OSError):
        calls.close(fd)


def _octets(content: bytes | bytearray | memoryview | str) -> memoryview:
    if isinstance(content, str):
        content = content.encode()
    view = memoryview(content)
    if view.nbytes == 0:
        return memoryview(b"")
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


def _refused(path: bytes, error: int, reason: str | None = None) -> AtomicWriteError:
    return AtomicWriteError(os.fsdecode(path), "replace", error, reason or os.strerror(error))


def _failed(path: bytes, operation: str, error: OSError) -> AtomicWriteError:
    return AtomicWriteError(os.fsdecode(path), operation, error.errno or errno.EIO, error.strerror or str(error))

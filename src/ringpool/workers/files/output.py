"""A task's output, from its staging to its final name: there whole or not at all.

    target = prepare_target(target, level)          makes its directory; follows a symlink that stands there
    staged = staging_name(target, token)            the task function writes to this, with any tool
    identity = finish_staged(staged, target)
    ... record the identity; with others, sync, rename under the path's lock: the commit point, see ``groupcommit`` ...
    which_side(staged, target, identity.ino, identity.dev)    after a death in between: did it commit?

For an output, level ``none`` means ``atomic``.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple

from ringpool.errors import FileOperationError, OutputMissingError
from ringpool.workers.files.durability import Durability, make_directories
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.target import default_acl, failed, final_target, give_rights, lstat, take_over
from ringpool.workers.umask import umask

DIGEST_BYTES = 16
DIGEST_PIECE_BYTES = 1 << 18


class StagedFile(NamedTuple):
    """The identity of a finished output, which its rename keeps: device, inode, size in bytes, and how many links it
    has; ``digest``: blake2b-128 of its content, where that was asked for; its mtime in ns.
    """

    dev: int
    ino: int
    size: int
    n_links: int = 1
    digest: bytes = b""
    mtime_ns: int = 0


class Heritage(NamedTuple):
    """What a file has that is made in a directory: its group, the directory's where that is setgid; its default ACL."""

    gid: int
    acl: bytes | None


def heritage_of(directory: bytes) -> Heritage | None:
    """Of the directory; None where one may not look."""
    try:
        found = calls.stat(directory)
        return Heritage(found.st_gid if found.st_mode & stat.S_ISGID else os.getegid(), default_acl(directory))
    except OSError:
        return None


class CommitSide(Enum):
    """What the disk tells about a commit that was cut short."""

    STAGED = "staged"  # not committed: the file still has its staging name
    TARGET = "target"  # committed: the file has its final name
    UNKNOWN = "unknown"  # somebody else has changed either, or it cannot be read


def prepare_target(target: bytes, durability: Durability = Durability.FULL) -> bytes:
    """Make the directory of ``target``, and return the path to stage beside and to publish at.

    That is what ``resolve_target`` gives. With ``full``, new directories are on disk before this returns. Raises
    ``AtomicWriteError`` where it cannot be made or something stands there that is no regular file, ``DurabilityError``
    where its fsync fails.
    """
    final, _ = final_target(target, "follow")
    make_directories(os.path.dirname(final) or b".", durable=durability == Durability.FULL)
    return final


def finish_staged(
    staged: bytes,
    target: bytes,
    *,
    digest: bool = False,
    is_new: bool = False,
    heirs: tuple[Heritage, Heritage] | None = None,
) -> StagedFile:
    """Make the output that a task function left at ``staged`` ready for its name ``target``; return its identity.

    It takes the owner, mode and extended attributes of the file that it will replace; where there is none (``is_new``:
    the caller has seen so) it keeps those that the function gave it; ``heirs``: what it has from where it is staged,
    and what it would have from its directory, where these differ. Raises ``OutputMissingError`` (the function wrote
    no regular file), ``AtomicWriteError`` (anything else); what is staged is the caller's to discard.
    """
    try:
        replaced = None if is_new else lstat(target)
        if replaced is None and not digest and heirs is None:
            own = _stat_staged(staged, target)  # nothing is to be done with it: it need not be opened
            return StagedFile(own.st_dev, own.st_ino, own.st_size, own.st_nlink, b"", own.st_mtime_ns)
        fd = _open_staged(staged, target)
        try:
            own = calls.fstat(fd)
            _require_regular(own, staged, target)
            if replaced is not None and own.st_nlink == 1:  # a link's metadata would be those of the other names, too
                take_over(fd, own, replaced, target, None)
            if replaced is None and heirs is not None and own.st_nlink == 1:
                _inherit(fd, own, *heirs)
            content = digest_of(fd, own.st_size) if digest else b""
        finally:
            calls.close(fd)
        return StagedFile(own.st_dev, own.st_ino, own.st_size, own.st_nlink, content, own.st_mtime_ns)
    except FileOperationError:
        raise
    except OSError as error:
        raise failed(target, "finish the output", error) from error


def _inherit(fd: int, own: os.stat_result, staged: Heritage, heritage: Heritage) -> None:
    """Give the open file what the kernel would have given it in its directory. What the function chose stays."""
    if heritage.gid != staged.gid == own.st_gid:
        with suppress(PermissionError):  # the kernel would have asked nobody; we are not in that group
            calls.fchown(fd, -1, heritage.gid)
            if own.st_mode & (stat.S_ISUID | stat.S_ISGID):  # which the kernel has taken away
                calls.fchmod(fd, stat.S_IMODE(own.st_mode))
    mask = umask()
    if heritage.acl is not None and mask is not None and stat.S_IMODE(own.st_mode) == 0o666 & ~mask:
        give_rights(fd, heritage.acl)


def _stat_staged(staged: bytes, target: bytes) -> os.stat_result:
    try:
        own = calls.stat(staged, follow_symlinks=False)
    except FileNotFoundError:
        raise OutputMissingError(os.fsdecode(target), os.fsdecode(staged)) from None
    _require_regular(own, staged, target)
    return own


def _require_regular(own: os.stat_result, staged: bytes, target: bytes) -> None:
    if not stat.S_ISREG(own.st_mode):
        raise OutputMissingError(os.fsdecode(target), os.fsdecode(staged), "is not a regular file")


def digest_of(fd: int, size: int) -> bytes:
    """blake2b-128 of the first ``size`` bytes of an open file, or of those that there are."""
    content = blake2b(digest_size=DIGEST_BYTES)
    while size > 0 and (piece := calls.read(fd, min(size, DIGEST_PIECE_BYTES))):
        content.update(piece)
        size -= len(piece)
    return content.digest()


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
        there, final = lstat(staged), lstat(target)
    except OSError:
        return CommitSide.UNKNOWN
    if there is not None:
        return CommitSide.STAGED if (there.st_dev, there.st_ino) == (dev, ino) else CommitSide.UNKNOWN
    if final is not None and (final.st_dev, final.st_ino) == (dev, ino):
        return CommitSide.TARGET
    return CommitSide.UNKNOWN


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

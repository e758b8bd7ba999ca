"""A target: where a write to a path goes, what stands there, and what of that its replacement keeps.

    a path -> the symlink there followed, replaced or refused -> nothing, or a regular file
                                                                              |
                         owner, mode and extended attributes -> taken over by the file that will replace it

Only a regular file is replaced. A rename would put an ordinary file in place of /dev/null.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Literal

from ringpool.errors import AtomicWriteError, FileOperationError
from ringpool.workers.files.oslayer import calls
from ringpool.workers.umask import umask

Symlinks = Literal["follow", "replace", "refuse"]

ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
_UMASK_UNKNOWN = 0o077
_OF_THE_OLD_CONTENT = frozenset(
    {"security.capability", "security.ima", "security.evm"}
)  # the kernel drops or checks them
_UNKEPT = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENODATA, errno.EINVAL, errno.ENOENT})


def resolve_target(target: bytes) -> bytes:
    """``target``, or where the symlink there points to, be there something or not. A pure look-up; never raises.

    Before and after a commit it gives the same path: the commit replaces what the link points to.
    """
    return os.path.realpath(target) if os.path.islink(target) else target


def final_target(path: bytes, symlinks: Symlinks) -> tuple[bytes, os.stat_result | None]:
    """Where a write to ``path`` goes, and what stands there; None: nothing. Raises ``AtomicWriteError``."""
    try:
        found = lstat(path)
        if found is not None and stat.S_ISLNK(found.st_mode):
            if symlinks == "replace":
                return path, None  # the link goes, and nothing of it is kept
            if symlinks == "refuse":
                raise refused(path, errno.ELOOP, "it is a symbolic link")
            path = resolve_target(path)
            found = lstat(path)
    except FileOperationError:
        raise
    except OSError as error:
        raise failed(path, "look at the target", error) from error
    if found is not None:
        refuse_special(path, found)
    if not os.path.basename(path):
        raise refused(path, errno.EISDIR)
    return path, found


def refuse_special(path: bytes, found: os.stat_result) -> None:
    """Raise ``AtomicWriteError`` where what stands at ``path`` is no regular file."""
    if stat.S_ISREG(found.st_mode):
        return
    if stat.S_ISDIR(found.st_mode):
        raise refused(path, errno.EISDIR)
    reason = "it leads in a circle" if stat.S_ISLNK(found.st_mode) else "it is a device, pipe or socket"
    raise refused(path, errno.EINVAL, reason)


def lstat(path: bytes) -> os.stat_result | None:
    """``os.lstat``, or None where nothing is there."""
    if not calls.access(path, os.F_OK, effective_ids=True, follow_symlinks=False):
        return None  # asked first: Python's exception for what is missing costs more than all else here
    try:
        return calls.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None


def take_over(fd: int, own: os.stat_result, replaced: os.stat_result, path: bytes, mode: int | None) -> None:
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
    if ACL in ours and ACL not in theirs:  # inherited from the directory: it would let in whom the old file did not
        calls.removexattr(fd, ACL)
    return ACL in ours or ACL in theirs


def default_acl(directory: int | bytes) -> bytes | None:
    """What the directory, open or not, hands on to new files in place of the umask; None: nothing."""
    return _attribute(directory, DEFAULT_ACL)


def access_acl(file: int | bytes) -> bytes | None:
    """The ACL of what is there, in the kernel's form; None: its mode says it all."""
    return _attribute(file, ACL)


def _attribute(file: int | bytes, name: str) -> bytes | None:
    try:
        return calls.getxattr(file, name)
    except OSError as error:
        if error.errno not in _UNKEPT:
            raise
        return None


def give_rights(fd: int, inherited: bytes | None) -> None:
    """Give the open file, made with 0600 elsewhere, the rights that open(2) with 0666 gives where it will go.

    ``inherited`` is the ``default_acl`` there. Source: acl(5), object creation and default ACLs. Where that cannot be
    set, nobody else gets in.
    """
    if inherited is None:
        if ACL in _xattr_names(fd):
            calls.removexattr(fd, ACL)
        mask = umask()
        calls.fchmod(fd, 0o666 & ~(_UMASK_UNKNOWN if mask is None else mask))
        return
    try:
        calls.setxattr(fd, ACL, inherited)
    except OSError as error:
        if error.errno not in _UNKEPT:
            raise
        calls.fchmod(fd, 0o600)
        return
    calls.fchmod(fd, calls.fstat(fd).st_mode & 0o666)


def _xattr_names(file: bytes | int) -> list[str]:
    try:
        return calls.listxattr(file) if isinstance(file, int) else calls.listxattr(file, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _UNKEPT:
            raise
        return []


def refused(path: bytes, error: int, reason: str | None = None) -> AtomicWriteError:
    return AtomicWriteError(os.fsdecode(path), "replace", error, reason or os.strerror(error))


def failed(path: bytes, operation: str, error: OSError) -> AtomicWriteError:
    return AtomicWriteError(os.fsdecode(path), operation, error.errno or errno.EIO, error.strerror or str(error))

"""From a path to its lock file: which base serves it, which of 256 stripes it falls on, and who holds it.

    path --> (device, inode of its directory; name) --hash--> stripe 00..ff --> <base>/.ringpool/locks/<stripe>.lock
             two spellings of a file are one identity                          256 files, never unlinked

    base: the outermost ancestor that has a ``.ringpool``, else the file's own directory; or as the caller says, and
          then every user of the file must say the same
          Whether this process may write there does not count, nor whether it is mounted read-only here: for others it
          is not, and all have to meet on one lock file. Who cannot lock there is told why.
          In a sticky directory, /tmp for one, anybody may make a ``.ringpool``: there it serves what lies deeper only
          if it is that directory's owner's, or root's.

What leads where is looked up each time: a symlink may be turned, a directory renamed, a ``.ringpool`` made further out.
Remembered are only the ancestors of a directory, for the spelling and the inode that it had.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import struct
from contextlib import suppress
from hashlib import blake2b
from typing import NamedTuple
from unicodedata import normalize

from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.target import ACL, access_acl, default_acl

DIRECTORY = b".ringpool"
DIRECTORIES_REMEMBERED_MAX = 256
REOPENS_MAX = 100
READS_MAX = 3
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)

# Their flock is emulated, or holds on one machine only. Source: statfs(2), linux/magic.h, and the file systems' own.
NETWORK_FILE_SYSTEMS = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFE534D42: "smb2",
    0xFF534D42: "cifs",
    0x5346414F: "afs",
    0x73757245: "coda",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
}

_identity = struct.Struct("=QQ")
_f_type = struct.Struct("=q")  # the first member of struct statfs, on 64-bit Linux
_STATFS_BYTES = 120
_ACL_ENTRY = struct.Struct("<HHI")  # linux/posix_acl_xattr.h
_GROUP_OBJ, _OTHER = 0x04, 0x20
_libc = ctypes.CDLL(None, use_errno=True)


class Place(NamedTuple):
    """Where a path is locked: its base, its stripe (0 to 255); and its directory, as it was spelled, and what it is."""

    root: bytes
    stripe: int
    directory: bytes
    device: int
    inode: int


def find(path: bytes, base: bytes | None) -> Place:
    """Where ``path`` is locked. Raises ``OSError``."""
    directory, device, inode, name = _place(path)
    root = base or base_of(directory, device, inode)
    return Place(root, stripe_in(device, inode, name), directory, device, inode)


def stripe_of(path: bytes) -> int:
    """The number of the stripe of ``path``, 0 to 255. Raises ``OSError``."""
    return stripe_in(*_place(path)[1:])


def root_of(directory: bytes) -> bytes:
    """The base whose ``.ringpool`` serves ``directory``: the outermost ancestor that has one, else itself.

    A real path. Raises ``OSError`` where there is no such directory.
    """
    found = calls.stat(directory)
    return base_of(directory, found.st_dev, found.st_ino)


def bases_between(root: bytes, directory: bytes) -> list[bytes]:
    """The bases further in than ``root``, down to ``directory``, that served it before there was one at ``root``.

    Raises ``OSError``.
    """
    found = calls.stat(directory)
    _, ancestors = _ancestors.__wrapped__(directory, found.st_dev, found.st_ino)
    inside = root.rstrip(b"/") + b"/"
    return [
        base
        for base, marker in ancestors
        if base.startswith(inside) and calls.access(marker, os.F_OK, effective_ids=True)
    ]


def is_network(f_type: int) -> bool:
    """Whether a file system of that type, as statfs(2) names it, needs a lock that does not rely on flock."""
    return f_type & 0xFFFFFFFF in NETWORK_FILE_SYSTEMS


def file_system_of(fd: int) -> int:
    """The type of the file system of an open file. Raises ``OSError``. Source: fstatfs(2)."""
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, found):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return _f_type.unpack_from(found)[0]


def lock_file(root: bytes, stripe: int) -> bytes:
    """The path of a stripe's lock file."""
    return b"%b/%b/locks/%02x.lock" % (root, DIRECTORY, stripe)


def open_lock_file(path: bytes) -> int:
    """Open a lock file, making it and its directories where needed. One that we may only read serves too.

    Raises ``OSError``: where it is refused, in words that say whose the ``.ringpool`` is, and what to do.
    """
    try:
        return _open_or_make(path)
    except OSError as error:
        if error.errno not in _DENIED:
            raise
        raise _refused(path, error) from error


def _open_or_make(path: bytes) -> int:
    for _ in range(REOPENS_MAX):
        try:
            return _open(path, os.O_RDWR)
        except FileNotFoundError:
            pass
        except OSError as denied:
            if denied.errno not in _DENIED:
                raise
            return _open(path, os.O_RDONLY)
        try:
            return _make_lock_file(path)
        except FileNotFoundError:
            _make_lock_directories(os.path.dirname(path))
        except FileExistsError:
            pass  # a neighbour was faster
    raise FileNotFoundError(errno.ENOENT, "removed again and again", path)


def _open(path: bytes, flags: int) -> int:
    return calls.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _make_lock_file(path: bytes) -> int:
    fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        share(fd, rights_of(calls.stat(os.path.dirname(path))))
    except BaseException:
        calls.close(fd)
        raise
    return fd


def _refused(path: bytes, error: OSError) -> OSError:
    """``error``, of opening a lock file or of making it, in words that help."""
    ours = os.path.dirname(os.path.dirname(path))
    reason = error.strerror or str(error)
    with suppress(OSError):
        found = calls.stat(ours)
        reason = (
            f"{reason}; {os.fsdecode(ours)}, made by {_user(found.st_uid)}, serves all that lies below it: let all who "
            "lock there make files in its locks (chown, chmod), or remove it while nobody holds a lock"
        )
    return OSError(error.errno, reason, error.filename)


class Rights(NamedTuple):
    """Those of a directory: its mode, without the type, and the group that the mode's second digit is about."""

    mode: int
    gid: int


def rights_of(found: os.stat_result) -> Rights:
    """What ``stat`` says of them."""
    return Rights(stat.S_IMODE(found.st_mode), found.st_gid)


def share(fd: int, directory: Rights, *, read_only: bool = False) -> None:
    """Let those write to our new file who may make files in its directory, and those read it who may list that: they
    lock shared. Whatever our umask says. ``read_only``: all of them read it.
    """
    writers = directory.mode & (stat.S_IWGRP | stat.S_IWOTH)
    wanted = (0 if read_only else writers) | writers << 1 | directory.mode & (stat.S_IRGRP | stat.S_IROTH)
    mode = stat.S_IMODE(calls.fstat(fd).st_mode)
    _set_rights(fd, Rights(mode | wanted, directory.gid))


def _set_rights(fd: int, wanted: Rights) -> None:
    """Set those of a file or directory that is ours, and new. Where we may not give it to that group, which is none of
    ours, its group may do what all others may: else another group would have the rights that are meant for that one.
    """
    found, mode = calls.fstat(fd), wanted.mode
    if found.st_gid != wanted.gid:
        try:
            calls.fchown(fd, -1, wanted.gid)
        except OSError:  # we are not in that group, or it is none here, as in a container
            acl = access_acl(fd)
            if acl is not None:  # where what the mode says of the group is the mask of all the others
                calls.setxattr(fd, ACL, _without_its_group(acl))
            else:
                mode = mode & ~(stat.S_IRWXG | stat.S_ISGID) | mode & (mode & stat.S_IRWXO) << 3
    if mode != stat.S_IMODE(found.st_mode):
        (calls.chmod if stat.S_ISDIR(found.st_mode) else calls.fchmod)(fd, mode)


def _without_its_group(acl: bytes) -> bytes:
    """That ACL, in which the owning group may do no more than all others."""
    entries = list(_ACL_ENTRY.iter_unpack(acl[4:]))
    [others] = (rights for tag, rights, _ in entries if tag == _OTHER)
    return acl[:4] + b"".join(
        _ACL_ENTRY.pack(tag, rights & others if tag == _GROUP_OBJ else rights, who) for tag, rights, who in entries
    )


def _make_lock_directories(locks: bytes) -> None:
    """Make ``<base>/.ringpool/locks``, open to whom the base is open to: who may make files there may lock them."""
    ours = os.path.dirname(locks)
    rights = rights_to_share(os.path.dirname(ours))  # raises where the base itself is gone
    with suppress(FileNotFoundError):  # removed under our hands: the caller tries again
        make_shared(rights, ours, locks)


def make_shared(rights: Rights, *directories: bytes) -> None:
    """Make those of ``directories`` that are not there, with those rights. Raises ``OSError``."""
    for directory in directories:
        with suppress(FileExistsError):
            calls.mkdir(directory, 0o777)
            set_rights(directory, rights)


def rights_to_share(base: bytes) -> Rights:
    """Those of a directory that is to be open to whom ``base`` is open to. Where an ACL stands that new directories
    do not inherit, what the mode says of its group is the mask of all the others: the group's own rights count.
    Raises ``OSError``. Source: acl(5), linux/posix_acl_xattr.h.
    """
    found = rights_of(calls.stat(base))
    acl = access_acl(base)
    if acl is None or default_acl(base) is not None:
        return found
    [rights] = (rights for tag, rights, _ in _ACL_ENTRY.iter_unpack(acl[4:]) if tag == _GROUP_OBJ)
    return found._replace(mode=found.mode & ~stat.S_IRWXG | found.mode & rights << 3)


def set_rights(directory: bytes, rights: Rights) -> None:
    """Set those of a directory that this process has just made: not of one to which a link leads, that the owner of
    the directory around it has put in its place. Raises ``OSError``.
    """
    fd = calls.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _set_rights(fd, rights)
    finally:
        calls.close(fd)


def _place(path: bytes) -> tuple[bytes, int, int, bytes]:
    """The directory, its device and inode, and the name there, of the file that ``path`` leads to."""
    if calls.access(path, os.F_OK, effective_ids=True, follow_symlinks=False) and os.path.islink(path):
        path = os.path.realpath(path)
    directory, slash, name = path.rpartition(b"/")
    if name in (b"", b".", b".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    directory = directory or slash or b"."
    found = calls.stat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
    return directory, found.st_dev, found.st_ino, name


def stripe_in(device: int, inode: int, name: bytes) -> int:
    """The number of the stripe of ``name`` in that directory, 0 to 255."""
    return blake2b(_identity.pack(device, inode) + _folded(name), digest_size=1).digest()[0]


def _folded(name: bytes) -> bytes:
    """``name`` as every spelling of it is folded by a directory that ignores case: one file, one stripe.

    Folded everywhere, since two files that differ in case only may share a stripe as any two may. Source: the kernel
    compares by NFD and case folding (Documentation/filesystems/ext4/directory.rst).
    """
    if name.isascii():
        return name.lower()
    text = name.decode("utf-8", "surrogateescape")
    return normalize("NFD", normalize("NFD", text).casefold()).encode("utf-8", "surrogateescape")


def base_of(directory: bytes, device: int, inode: int) -> bytes:
    """The outermost ancestor of ``directory`` that has a ``.ringpool``, else ``directory`` itself, as a real path."""
    real, ancestors = _ancestors(directory, device, inode)
    if real != directory and not _leads_to(real, device, inode):  # renamed since it was remembered
        real, ancestors = _ancestors.__wrapped__(directory, device, inode)
    access = calls.access
    for ancestor, marker in ancestors:
        if access(marker, os.F_OK, effective_ids=True) and _serves_others(ancestor, marker):
            return ancestor
    return real


def _serves_others(directory: bytes, marker: bytes) -> bool:
    """Whether its ``.ringpool`` serves what lies deeper: else anybody could take all locks below /tmp for himself."""
    try:
        found = calls.stat(directory)
        if not found.st_mode & stat.S_ISVTX:
            return True
        # A link is its maker's, wherever it leads.
        owners = {calls.stat(marker, follow_symlinks=follow).st_uid for follow in (True, False)}
        return owners <= {found.st_uid, 0}
    except FileNotFoundError:
        return False


def require_trusted(base: bytes, directory: bytes) -> None:
    """Raise ``PermissionError`` where another user could change what is staged in ``directory``, in the ``.ringpool``
    of ``base``: in a sticky directory anybody may make one, and has all in it.
    """
    found = calls.stat(base)
    if found.st_mode & stat.S_ISVTX:
        owner = calls.stat(directory, follow_symlinks=False).st_uid
        if owner not in (os.geteuid(), found.st_uid, 0):
            name = os.fsdecode(os.path.basename(directory))
            reason = f"{name} is another user's, who could change what is staged there; use a directory of your own"
            raise PermissionError(errno.EPERM, reason, os.fsdecode(directory))


def _leads_to(path: bytes, device: int, inode: int) -> bool:
    try:
        found = calls.stat(path)
    except FileNotFoundError:
        return False
    return (found.st_ino, found.st_dev) == (inode, device)


@functools.lru_cache(maxsize=DIRECTORIES_REMEMBERED_MAX)
def _ancestors(directory: bytes, device: int, inode: int) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """The real path of ``directory``, and it and its ancestors with the path of a ``.ringpool`` there, outermost first.

    Remembered for a spelling and what it leads to; which of them exist is looked up each time.
    """
    real = os.path.realpath(directory)
    ends = [at for at, byte in enumerate(real) if byte == ord("/") and at] + [len(real)]
    ancestors = [b"/", *(real[:end] for end in ends)] if real != b"/" else [b"/"]
    return real, tuple((ancestor, os.path.join(ancestor, DIRECTORY)) for ancestor in ancestors)


# ---- for people ------------------------------------------------------------------------------------------------------


def holder_of(inode: int) -> str:
    """Who has a flock on that inode. Source: proc(5), /proc/locks; it shows processes of this pid namespace.

    The device is not compared: btrfs shows another one there than stat does. The kernel hands the table out in pieces,
    so that an entry may be missed while others come and go: it is read again.
    """
    for _ in range(READS_MAX):
        pids = _flockers_of(b"%d" % inode)
        if pids:
            others = f" and {len(pids) - 1} more" if len(pids) > 1 else ""
            return _process(pids[0]) + others
    return "nobody; others came before"


def _flockers_of(inode: bytes) -> list[int]:
    found: dict[int, None] = {}
    with open("/proc/locks", "rb") as table:
        for line in table:
            fields = line.split()
            if len(fields) >= 8 and fields[1] == b"FLOCK" and fields[5].rpartition(b":")[2] == inode:
                found[int(fields[4])] = None
    return [*found]


def _user(uid: int) -> str:
    import pwd  # here: few need it

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _process(pid: int) -> str:
    if pid <= 0:
        return "a process of another pid namespace"
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return f"process {pid} ({name.read().strip()})"
    except OSError:
        return f"process {pid}"

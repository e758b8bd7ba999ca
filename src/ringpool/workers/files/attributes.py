"""What ``stat`` does not say: the mount, when a file was made, and attributes that keep a name as it is, whoever
asks, root too.
"""

from __future__ import annotations

import ctypes
import struct
from contextlib import suppress

from ringpool.workers.files.oslayer import calls

IMMUTABLE, APPEND_ONLY = 0x10, 0x20  # STATX_ATTR_..., linux/stat.h

_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = -100, 0x100, 0x1000
_STATX_BTIME = 0x800
_STATX_BYTES = 256
_attributes = struct.Struct("=8xQ")  # after stx_mask and stx_blksize
_birth = struct.Struct("=I76xqI")  # stx_mask, stx_btime
_statx = getattr(ctypes.CDLL(None), "statx", None)  # glibc has it since 2.28


def attributes_of(name: bytes, directory_fd: int) -> int:
    """Those of what has that name there, or, where ``name`` is empty, of the directory: IMMUTABLE, APPEND_ONLY, both,
    or 0, also where its file system knows none, or it is gone. No right to read is needed. Source: chattr(1), statx(2).
    """
    found = _found(directory_fd, name, _AT_SYMLINK_NOFOLLOW, 0)
    return 0 if found is None else _attributes.unpack_from(found)[0] & (IMMUTABLE | APPEND_ONLY)


def born_ns(path: bytes, fd: int | None = None) -> int:
    """When the file or directory at ``path``, or the open one, was made, ns since 1970: what tells it from one that had
    its inode before. 0 where its file system does not say, or it is gone. Source: statx(2).
    """
    found = _found(_AT_FDCWD, path, 0, _STATX_BTIME) if fd is None else _found(fd, b"", 0, _STATX_BTIME)
    mask, seconds, ns = (0, 0, 0) if found is None else _birth.unpack_from(found)
    return seconds * 1_000_000_000 + ns if mask & _STATX_BTIME else 0


def _found(directory_fd: int, name: bytes, flags: int, mask: int) -> ctypes.Array[ctypes.c_char] | None:
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags |= 0 if name else _AT_EMPTY_PATH
    return None if _statx is None or _statx(directory_fd, name, flags, mask, found) else found


def mount_of(fd: int) -> tuple[int, bytes]:
    """What a rename or a link cannot cross: the file system, and the mount. Source: proc(5), fdinfo."""
    mount = b""
    with suppress(OSError), open(f"/proc/self/fdinfo/{fd}", "rb") as facts:
        mount = next((line for line in facts if line.startswith(b"mnt_id:")), b"")
    return calls.fstat(fd).st_dev, mount

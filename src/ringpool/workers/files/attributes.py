"""What ``stat`` does not say: the mount, and attributes that keep a name as it is, whoever asks, root too."""

from __future__ import annotations

import ctypes
import struct
from contextlib import suppress

from ringpool.workers.files.oslayer import calls

IMMUTABLE, APPEND_ONLY = 0x10, 0x20  # STATX_ATTR_..., linux/stat.h

_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = 0x100, 0x1000
_STATX_BYTES = 256
_attributes = struct.Struct("=8xQ")  # after stx_mask and stx_blksize
_statx = getattr(ctypes.CDLL(None), "statx", None)  # glibc has it since 2.28


def attributes_of(name: bytes, directory_fd: int) -> int:
    """Those of what has that name there, or, where ``name`` is empty, of the directory: IMMUTABLE, APPEND_ONLY, both,
    or 0, also where its file system knows none, or it is gone. No right to read is needed. Source: chattr(1), statx(2).
    """
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_SYMLINK_NOFOLLOW | (0 if name else _AT_EMPTY_PATH)
    if _statx is None or _statx(directory_fd, name, flags, 0, found):
        return 0
    return _attributes.unpack_from(found)[0] & (IMMUTABLE | APPEND_ONLY)


def mount_of(fd: int) -> tuple[int, bytes]:
    """What a rename or a link cannot cross: the file system, and the mount. Source: proc(5), fdinfo."""
    mount = b""
    with suppress(OSError), open(f"/proc/self/fdinfo/{fd}", "rb") as facts:
        mount = next((line for line in facts if line.startswith(b"mnt_id:")), b"")
    return calls.fstat(fd).st_dev, mount

"""The attributes of chattr(1) that keep a name as it is, whoever asks: root too, and without the right to read."""

from __future__ import annotations

import ctypes
import struct

IMMUTABLE, APPEND_ONLY = 0x10, 0x20  # STATX_ATTR_..., linux/stat.h

_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = 0x100, 0x1000
_STATX_BYTES = 256
_attributes = struct.Struct("=8xQ")  # after stx_mask and stx_blksize
_statx = getattr(ctypes.CDLL(None), "statx", None)  # glibc has it since 2.28


def attributes_of(name: bytes, directory_fd: int) -> int:
    """Those of what has that name there, or, where ``name`` is empty, of the directory: IMMUTABLE, APPEND_ONLY, both,
    or 0, also where its file system knows none, or it is gone. Source: statx(2).
    """
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_SYMLINK_NOFOLLOW | (0 if name else _AT_EMPTY_PATH)
    if _statx is None or _statx(directory_fd, name, flags, 0, found):
        return 0
    return _attributes.unpack_from(found)[0] & (IMMUTABLE | APPEND_ONLY)

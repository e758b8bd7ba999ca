"""The system calls that file code makes, in one place, so that a test can record them or make them fail.

    atomic.py, locks.py --> calls.open, calls.write, ...   ordinarily os.open, os.write, ... themselves
                                  |
                            intercepted(around)             in tests: around(name, call, args, kwargs) in their place

An attribute of ``calls`` is the function of ``os`` itself, so that a call costs one attribute look-up more than without
this layer. Whoever writes file code in this package calls ``calls.X``, never ``os.X``: what goes past the layer can
neither be killed, nor fail, nor be left out of a power cut's model. Look-ups by os.path, which change nothing, may.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import filelock

RENAME_NOREPLACE = 1  # linux/fs.h

RESOLVE_NO_MAGICLINKS = 0x02  # linux/openat2.h
RESOLVE_BENEATH = 0x08
_SYS_OPENAT2 = 437  # on every architecture
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

_libc: Any = ctypes.CDLL(None, use_errno=True)
_renameat2: Any = getattr(_libc, "renameat2", None)  # glibc 2.28 and newer


def rename_exclusive(source: bytes, target: bytes, source_dir_fd: int, target_dir_fd: int) -> None:
    """Rename, and fail with ``FileExistsError`` where the target exists. Source: renameat2(2).

    Raises ``OSError``; with ENOSYS or EINVAL where the C library, the kernel or the file system cannot do it.
    """
    if _renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _renameat2(source_dir_fd, source, target_dir_fd, target, RENAME_NOREPLACE):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), target)


def openat2(path: bytes, flags: int, dir_fd: int, resolve: int) -> int:
    """Open ``path``, keeping to ``resolve`` on the way. Source: openat2(2).

    Raises ``OSError``: EXDEV where the path would lead out; EAGAIN where something was renamed meanwhile, to be tried
    again; ENOSYS before Linux 5.6, EPERM where a sandbox does not know the call.
    """
    how = (ctypes.c_uint64 * 3)(flags, 0, resolve)
    fd = _libc.syscall(_SYS_OPENAT2, dir_fd, path, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    if fd < 0:
        raise _last_error(path)
    return int(fd)


def syncfs(fd: int) -> None:
    """Write the whole file system of ``fd`` to disk. Raises ``OSError``. Source: syncfs(2).

    Since Linux 5.8 it reports what could not be written since ``fd`` was opened; before, it reports nothing.
    """
    if _libc.syncfs(fd):
        raise _last_error(None)


def sync_file_range(fd: int) -> None:
    """Begin to write the file's pages to disk; wait for nothing. Raises ``OSError``. Source: sync_file_range(2)."""
    if _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE):
        raise _last_error(None)


def write_all(fd: int, content: bytes | memoryview) -> None:
    """Write all of ``content``. That write(2) takes nothing is an error, not a reason to turn for ever."""
    while content:
        count = calls.write(fd, content)
        if count == len(content):
            return
        if count <= 0:
            raise OSError(errno.EIO, "the file takes no more bytes")
        content = memoryview(content)[count:]  # it may take less than it is given


def _last_error(path: bytes | None) -> OSError:
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error), path)


class FileCalls:
    """The calls. ``__slots__`` is the list of them."""

    __slots__ = (
        "access",
        "chmod",
        "close",
        "copy_file_range",
        "fchmod",
        "fchown",
        "fcntl",
        "flock",
        "fstat",
        "fsync",
        "ftruncate",
        "getxattr",
        "link",
        "listdir",
        "listxattr",
        "lock_descriptor",
        "lseek",
        "mkdir",
        "open",
        "openat2",
        "pread",
        "pwrite",
        "read",
        "readlink",
        "removexattr",
        "rename",
        "rename_exclusive",
        "scandir",
        "setxattr",
        "stat",
        "sync_file_range",
        "syncfs",
        "unlink",
        "unlock_descriptor",
        "write",
    )

    def __init__(self) -> None:
        self.access = os.access
        self.chmod = os.chmod
        self.close = os.close
        self.copy_file_range = os.copy_file_range
        self.fchmod = os.fchmod
        self.fchown = os.fchown
        self.fcntl = fcntl.fcntl
        self.flock = fcntl.flock
        self.fstat = os.fstat
        self.fsync = os.fsync
        self.ftruncate = os.ftruncate
        self.getxattr = os.getxattr
        self.link = os.link
        self.listdir = os.listdir
        self.listxattr = os.listxattr
        self.lock_descriptor = filelock.lock_descriptor
        self.lseek = os.lseek
        self.mkdir = os.mkdir
        self.open = os.open
        self.openat2 = openat2
        self.pread = os.pread
        self.pwrite = os.pwrite
        self.read = os.read
        self.readlink = os.readlink
        self.removexattr = os.removexattr
        self.rename = os.rename
        self.rename_exclusive = rename_exclusive
        self.scandir = os.scandir
        self.setxattr = os.setxattr
        self.stat = os.stat
        self.sync_file_range = sync_file_range
        self.syncfs = syncfs
        self.unlink = os.unlink
        self.unlock_descriptor = filelock.unlock_descriptor
        self.write = os.write


calls = FileCalls()

Around = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def intercepted(around: Around) -> Generator[None]:
    """For tests: every call becomes ``around(name, call, args, kwargs)``, in the whole process, inside the block."""

    def stand_in(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: around(name, call, args, kwargs)

    before = {name: getattr(calls, name) for name in FileCalls.__slots__}
    try:
        for name, call in before.items():
            setattr(calls, name, stand_in(name, call))
        yield
    finally:
        for name, call in before.items():
            setattr(calls, name, call)

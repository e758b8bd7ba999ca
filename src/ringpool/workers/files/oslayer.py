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
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

RENAME_NOREPLACE = 1  # linux/fs.h

_renameat2: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28 and newer


def rename_exclusive(source: bytes, target: bytes, source_dir_fd: int, target_dir_fd: int) -> None:
    """Rename, and fail with ``FileExistsError`` where the target exists. Source: renameat2(2).

    Raises ``OSError``; with ENOSYS or EINVAL where the C library, the kernel or the file system cannot do it.
    """
    if _renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _renameat2(source_dir_fd, source, target_dir_fd, target, RENAME_NOREPLACE):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), target)


class FileCalls:
    """The calls. ``__slots__`` is the list of them."""

    __slots__ = (
        "access",
        "chmod",
        "close",
        "fchmod",
        "fchown",
        "fstat",
        "fsync",
        "getxattr",
        "link",
        "listxattr",
        "mkdir",
        "open",
        "removexattr",
        "rename",
        "rename_exclusive",
        "setxattr",
        "stat",
        "unlink",
        "write",
    )

    def __init__(self) -> None:
        self.access = os.access
        self.chmod = os.chmod
        self.close = os.close
        self.fchmod = os.fchmod
        self.fchown = os.fchown
        self.fstat = os.fstat
        self.fsync = os.fsync
        self.getxattr = os.getxattr
        self.link = os.link
        self.listxattr = os.listxattr
        self.mkdir = os.mkdir
        self.open = os.open
        self.removexattr = os.removexattr
        self.rename = os.rename
        self.rename_exclusive = rename_exclusive
        self.setxattr = os.setxattr
        self.stat = os.stat
        self.unlink = os.unlink
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

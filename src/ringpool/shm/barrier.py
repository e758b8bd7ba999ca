"""membarrier(2): one side of a store-then-load race pays for the fence of both.

The frequent side does a plain store and a plain load, the rare side its store, ``fence_all``, its load. After the
call every running thread of a process that had registered has passed a full barrier, so that at least one side sees
the other's store. Costs the rare side about a microsecond, the frequent side nothing.
"""

from __future__ import annotations

import ctypes
import os

_NUMBERS = {"x86_64": 324, "aarch64": 283}
_GLOBAL_EXPEDITED = 2
_REGISTER_GLOBAL_EXPEDITED = 4
_syscall = ctypes.PyDLL(None).syscall
_number = _NUMBERS.get(os.uname().machine)


def register() -> bool:
    """Let ``fence_all`` of other processes reach this one. False where the kernel cannot."""
    return _number is not None and _syscall(_number, _REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0


def fence_all() -> bool:
    """A full barrier on every running thread of every registered process. False where the kernel cannot."""
    return _number is not None and _syscall(_number, _GLOBAL_EXPEDITED, 0, 0) == 0

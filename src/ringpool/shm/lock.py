"""The lock that survives its owner's death: a robust process-shared pthread mutex, reached through ctypes.

    acquire:  trylock -+- 0 ----------------------------------------> held
                       +- EOWNERDEAD -> redo() -> mark consistent --> held   the kernel freed it at its owner's death
                       +- EBUSY, and the owner is this very thread -> redo() -> held      (see "interrupted")
                       +- EBUSY -> a few dozen times again, then sleep 20 us; and again
                       +- anything else -> LockBrokenError: exit without unlocking

Three rules, each measured or seen:

- Never block in ``pthread_mutex_lock``: a *waiter* that is killed can swallow the only wake-up, and everybody sleeps
  on a free mutex. So there are no waiters in the kernel: trylock, and short sleeps.
- Calls go through ``PyDLL`` (the GIL is kept): releasing and taking it costs more than the call.
- Interrupted: an exception that a signal handler raises can leave a section between any two bytecodes, with the mutex
  held by a thread that lives. The next ``acquire`` of that thread sees its own id as the owner, redoes what the section
  had committed, and goes on. ``release_if_held`` does it at once.

glibc keeps the owner's thread id in the low 30 bits of the first word of a robust mutex (``nptl/pthreadP.h``); that,
and robust mutexes as such, are sound from glibc 2.25 on. An older one is refused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from errno import EBUSY, EOWNERDEAD
from typing import TypeVar

from ringpool.errors import LockBrokenError

GLIBC_MIN = (2, 25)
SPINS = 24  # about 5 us, ten times a critical section
SLEEP_S = 2e-5  # the holder is preempted, stopped or dead
TID_MASK = 0x3FFFFFFF
KIND_AT = 16  # __kind in pthread_mutex_t, on x86-64 and aarch64
MUTEX_BYTES = 48 if os.uname().machine == "aarch64" else 40

_PTHREAD_PROCESS_SHARED = 1
_PTHREAD_MUTEX_ROBUST = 1
_pthread = ctypes.PyDLL(None)

T = TypeVar("T")


def glibc_version() -> tuple[int, int]:
    """Major and minor version of the running glibc; (0, 0) on another libc."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):  # another libc does not know the question
        return (0, 0)
    major, _, minor = version.partition(".")
    return (int(major), int(minor.partition(".")[0] or 0)) if name == "glibc" and major.isdigit() else (0, 0)


def initialise_mutex(mapping: mmap.mmap, offset: int) -> None:
    """Make a robust, process-shared mutex at ``offset`` of a shared mapping. Raises ``LockBrokenError``."""
    if glibc_version() < GLIBC_MIN:
        raise LockBrokenError(0, f"robust mutexes need glibc {GLIBC_MIN[0]}.{GLIBC_MIN[1]} or newer")
    attributes = (ctypes.c_char * 64)()
    place = ctypes.c_char.from_buffer(mapping, offset)
    for call, *arguments in (
        (_pthread.pthread_mutexattr_init, attributes),
        (_pthread.pthread_mutexattr_setpshared, attributes, _PTHREAD_PROCESS_SHARED),
        (_pthread.pthread_mutexattr_setrobust, attributes, _PTHREAD_MUTEX_ROBUST),
        (_pthread.pthread_mutex_init, ctypes.c_void_p(ctypes.addressof(place)), attributes),
    ):
        error = call(*arguments)
        if error:
            raise LockBrokenError(error, "it cannot be made")


def mutex_kind(mapping: mmap.mmap, offset: int) -> bytes:
    """The bytes that say what kind of mutex stands there: compare before touching a mutex that others made."""
    return mapping[offset + KIND_AT : offset + KIND_AT + 4]


def expected_kind() -> bytes:
    """``mutex_kind`` of a mutex that this build made."""
    with mmap.mmap(-1, mmap.PAGESIZE) as scratch:
        initialise_mutex(scratch, 0)
        return mutex_kind(scratch, 0)


class RobustLock:
    """The mutex at ``offset`` of ``mapping``. Not re-entrant. ``redo`` is called, idempotently, by whoever inherits it.

    A coordinator's sections go through ``run``, which releases on any exception. A worker calls ``acquire`` and
    ``release``: on an exception it ends, and the kernel frees the mutex.
    """

    __slots__ = (
        "_consistent",
        "_place",
        "_redo",
        "_tid_of",
        "_word",
        "acquire",
        "mutex",
        "release",
        "try_call",
        "unlock_call",
    )

    def __init__(self, mapping: mmap.mmap, offset: int, redo: Callable[[], None]) -> None:
        self._place = ctypes.c_char.from_buffer(mapping, offset)
        self._word = ctypes.c_uint32.from_buffer(mapping, offset)
        self.mutex = ctypes.byref(self._place)  # of all ways to pass a pointer, the fastest
        self._redo = redo
        self._consistent = _pthread.pthread_mutex_consistent
        self._tid_of = threading.get_native_id
        self.try_call = _pthread.pthread_mutex_trylock
        self.unlock_call = _pthread.pthread_mutex_unlock
        self.acquire = self._acquire()
        self.release = self._release()

    def _acquire(self) -> Callable[[], None]:
        """``acquire`` as a closure: attribute look-ups would cost as much as the call."""
        try_call, mutex, slow = self.try_call, self.mutex, self.acquire_slowly

        def acquire() -> None:
            error = try_call(mutex)
            if error:
                slow(error)

        return acquire

    def _release(self) -> Callable[[], None]:
        unlock_call, mutex = self.unlock_call, self.mutex

        def release() -> None:
            unlock_call(mutex)

        return release

    def run(self, section: Callable[[], T]) -> T:
        """Run ``section`` under the mutex. On whatever exception, of its own or from outside, the mutex is released."""
        try:
            self.acquire()
            outcome = section()
            self.release()
        except LockBrokenError:
            raise  # glibc leaves this thread's id in a mutex that it refuses: unlocking that is a segmentation fault
        except BaseException:
            self.release_if_held()
            raise
        return outcome

    def acquire_within(self, timeout_s: float) -> None:
        """``acquire``, for a segment that may be damaged. Raises ``LockBrokenError`` after ``timeout_s`` seconds."""
        error = self.try_call(self.mutex)
        if error:
            self.acquire_slowly(error, time.monotonic() + timeout_s)

    def acquire_slowly(self, error: int, deadline: float | None = None) -> None:
        """What ``acquire`` does after a ``try_call`` that gave ``error``; for callers that do the first step
        themselves.
        """
        try_call, mutex = self.try_call, self.mutex
        while error == EBUSY:
            if self.held_by_this_thread:
                self._redo()  # interrupted: this thread left a section without unlocking
                self._consistent(mutex)  # it may have been interrupted while it inherited; EINVAL where it was not
                return
            for _ in range(SPINS):
                error = try_call(mutex)
                if error != EBUSY:
                    break
            else:
                if deadline is not None and time.monotonic() > deadline:
                    raise LockBrokenError(EBUSY, f"thread {self._word.value & TID_MASK} does not let it go")
                time.sleep(SLEEP_S)
        if error == EOWNERDEAD:
            self._redo()
            error = self._consistent(mutex)
        if error:
            raise LockBrokenError(error, "it cannot be acquired")

    @property
    def held_by_this_thread(self) -> bool:
        """Whether the calling thread owns the mutex: an interrupted section, where it thinks that it does not."""
        return self._word.value & TID_MASK == self._tid_of()

    def release_if_held(self) -> None:
        """Redo and release, where the calling thread owns the mutex. For the way out of an interrupted section."""
        if self.held_by_this_thread:
            self._redo()
            self._consistent(self.mutex)  # see acquire_slowly: unlocked unmended, nobody could ever have it again
            self.release()

    def detach(self) -> None:
        """The lock is of no use from here on, and nothing of it keeps the mapping. Who acquires it gets ValueError.
        Safe to call again.
        """
        self.acquire = self.release = _refuse
        self._word = ctypes.c_uint32()  # nobody's
        for name in ("_place", "mutex"):
            if hasattr(self, name):
                delattr(self, name)


def _refuse() -> None:
    raise ValueError("the lock is closed, and its mapping with it")

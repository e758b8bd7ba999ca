"""The lock that lets one run at a time write a job's directory: ``<directory>/.ringpool/job.lock``.

In it are the pid and start time of the process that has it, for people.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from types import TracebackType

from ringpool.coordinator.inputs import OWN_DIRECTORY
from ringpool.errors import JobBusyError
from ringpool.shm.owner import Owner, this_process
from ringpool.workers.files.durability import make_directories

LOCK_NAME = "job.lock"
_RECORD = struct.Struct("@hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid, as the compiler aligns it
_WHOLE = _RECORD.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
_TRIES = 100
_held: set[JobLock] = set()


class JobLock:
    """The lock that a job holds while it writes below ``directory``. A context manager.

    An OFD lock (fcntl_locking(2)): it dies with the last copy of its descriptor, so with its holder, however that ends.
    A process that is started has no copy (O_CLOEXEC), and one that is forked closes its own at once, lest a worker keep
    the lock of a coordinator that is dead. A POSIX lock would not be inherited at all, but is lost when any descriptor
    of the file is closed in the process: by ``holder`` in another thread, by whoever copies the directory. And flock
    cannot be asked whether somebody has it without taking it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / OWN_DIRECTORY / LOCK_NAME
        self._fd = -1

    def acquire(self) -> None:
        """Take it. Raises ``JobBusyError`` at once where another has it, in this process as well; ``OSError``."""
        make_directories(os.fsencode(self.path.parent), durable=False)
        for _ in range(_TRIES):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE)
                if self._is_at_its_name(fd):  # `ringpool clean` may have removed it meanwhile
                    pid, start = this_process()
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, b"%d %d\n" % (pid, start), 0)
                    self._fd = fd
                    _held.add(self)
                    return
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise JobBusyError(str(self.directory), _pid_in(fd)) from None
                raise
            finally:
                if self._fd != fd:
                    os.close(fd)
        raise JobBusyError(str(self.directory), 0)

    def release(self) -> None:
        """Let it go. May be called twice; in a fork of the holder it does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _held.discard(self)
            os.close(fd)

    def holder(self) -> int | None:
        """The pid of the process that runs a job there; 0 where that cannot be told; None: nobody. Disturbs nobody."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if _RECORD.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE))[0] == fcntl.F_UNLCK:
                return None
            return _pid_in(fd)
        finally:
            os.close(fd)

    def _is_at_its_name(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> JobLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _pid_in(fd: int) -> int:
    """The pid in a lock file that is held; 0 where that process does not live here.

    So it is while the holder has yet to write its own, and where that is in another pid namespace.
    """
    words = os.pread(fd, 64, 0).split()
    if len(words) == 2 and all(word.isdigit() for word in words):
        owner = Owner(int(words[0]), int(words[1]))
        return owner.pid if owner.alive else 0
    return 0


def _close_in_child() -> None:
    for lock in tuple(_held):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)

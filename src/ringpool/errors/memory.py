"""Errors of what lies in shared memory: segments, locks, file status tables."""

from __future__ import annotations

import os

from ringpool.errors.base import RingpoolError


class SegmentError(RingpoolError):
    """The segment ``name`` cannot be used; ``reason`` says why.

    Attributes: ``name`` (str), ``reason`` (str).
    """

    remedy = ""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"shared memory segment {self.name}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


class SegmentMissingError(SegmentError):
    """There is no segment of that name: it was removed, or the name is wrong."""


class SegmentPermissionError(SegmentError):
    """The segment belongs to another user. Nothing was read from it."""

    remedy = "attach as the user who made it"


class SegmentIncompleteError(SegmentError):
    """The segment has no magic number yet: readiness is published last, so its creator is at work or died."""

    remedy = "try again while its creator lives; the next start removes it when it is dead"


class SegmentFormatError(SegmentError):
    """The segment is not in this build's format: foreign bytes, another version, another kind of machine."""

    remedy = "use the version of ringpool that made it"


class SegmentTruncatedError(SegmentError):
    """The segment is shorter than its header says: somebody cut it. It was not mapped."""

    remedy = "remove it; what it held is lost"


class SegmentBusyError(SegmentError):
    """The segment's coordinator is alive, so that nobody else may take it over."""

    remedy = "end that process first"


class SharedMemoryFullError(SegmentError):
    """``/dev/shm`` had no room. Nothing of the segment is left there."""

    remedy = "free space in /dev/shm, enlarge it (docker run --shm-size), or ask for less"


class SharedMemoryUnusableError(SegmentError):
    """``/dev/shm`` is not there, or this process can make nothing in it. Nothing of the segment is left there."""

    remedy = "a pool makes files of some MB in a tmpfs there (mount -t tmpfs -o mode=1777 tmpfs /dev/shm)"


class LockBrokenError(RingpoolError):
    """The mutex can neither be had nor mended; the caller must leave it as it is and end.

    Attributes: ``error`` (int, errno of the pthread call), ``reason`` (str).
    """

    def __init__(self, error: int, reason: str) -> None:
        super().__init__(error, reason)
        self.error = error
        self.reason = reason

    def __str__(self) -> str:
        return f"a lock in shared memory is broken: {self.reason} ({os.strerror(self.error)})"


class StatusTableError(RingpoolError):
    """A file status table cannot do what was asked. Nothing was changed."""


class StatusTableFullError(StatusTableError):
    """A file status table has no room left for this.

    Attributes: ``table`` (str, its name), ``capacity`` (int, paths), ``reason`` (str, what it ran out of).
    """

    def __init__(self, table: str, capacity: int, reason: str) -> None:
        super().__init__(table, capacity, reason)
        self.table = table
        self.capacity = capacity
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"status table {self.table}, made for {self.capacity:,} paths, is full: {self.reason}; "
            "remove paths that are no longer needed, or unlink it and make a larger one"
        )


class StatusHeldError(StatusTableError):
    """A living process has the path: nobody else may change it.

    Attributes: ``path`` (str), ``state`` (str, the name of its state), ``pid`` (int, of its owner).
    """

    def __init__(self, path: str, state: str, pid: int) -> None:
        super().__init__(path, state, pid)
        self.path = path
        self.state = state
        self.pid = pid

    def __str__(self) -> str:
        return f"{self.path} is {self.state} by process {self.pid}, which lives; wait for it with wait_available"


class StatusStepError(StatusTableError):
    """A path's state cannot become the wanted one.

    Attributes: ``path`` (str), ``state`` (str, its state, or "missing"), ``wanted`` (str).
    """

    def __init__(self, path: str, state: str, wanted: str) -> None:
        super().__init__(path, state, wanted)
        self.path = path
        self.state = state
        self.wanted = wanted

    def __str__(self) -> str:
        return f"{self.path} is {self.state}, and cannot become {self.wanted} from there; claim it first"


class StatusReentryError(StatusTableError):
    """A signal handler or a finalizer used the table while it had interrupted another use of it in the same thread.

    Attributes: ``table`` (str).
    """

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table

    def __str__(self) -> str:
        return (
            f"status table {self.table}: used by a signal handler or finalizer in the midst of another use; "
            "set a flag there, and act on it later"
        )


class StatusTimeoutError(RingpoolError, TimeoutError):
    """A path did not become available in time.

    Attributes: ``path`` (str), ``pid`` (int, of the process that has it), ``waited_s`` (float).
    """

    def __init__(self, path: str, pid: int, waited_s: float) -> None:
        RingpoolError.__init__(self, path, pid, waited_s)
        self.path = path
        self.pid = pid
        self.waited_s = waited_s

    def __str__(self) -> str:
        return f"{self.path}: not available after {self.waited_s:.3g} s; process {self.pid} has it, and lives"

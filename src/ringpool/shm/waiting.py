"""A wait for one path of a status table: until nobody holds it, or its owner has died.

    begin:  who holds it? (mutex) -> open the owner's pidfd -> does it live? -> still its? mark, listen (mutex) -> sleep
                    |                                            |                |
                 nobody: over                                 no: over      no: from the start

What may end the wait after one of these steps is seen by a later one, or wakes the sleeper: the owner's death after its
pidfd was opened makes that readable, the path's release after it was marked rings the bell. So nothing is missed. A
bell may ring in vain; then the wait begins again.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from types import TracebackType

from ringpool.errors import FileOperationError, SegmentMissingError, StatusTimeoutError
from ringpool.shm import bells
from ringpool.shm.entries import HELD, Entries
from ringpool.shm.owner import Owner

WAITING = "wait until it is available"


class Wait:
    """A wait for the path ``key``, as a context: at its end, what it has opened is closed.

    ``descriptors``: after ``begin`` has returned True, sleep until one of these is readable.
    """

    def __init__(self, entries: Entries, key: bytes, timeout_s: float | None) -> None:
        self._entries = entries
        self._key = key
        self._digest = entries.hash_of(key)
        self._bells = bells.directory_of(entries.segment, entries.header.uuid)
        self._began_s = time.monotonic()
        self._deadline_s = math.inf if timeout_s is None else self._began_s + timeout_s
        self._has_listened = False
        self.descriptors: list[int] = []

    @property
    def left_s(self) -> float:
        """Seconds until the timeout, at least 0; infinite where there is none."""
        return max(0.0, self._deadline_s - time.monotonic())

    def begin(self) -> bool:
        """Get ready to sleep; False where there is nothing to wait for. Raises ``StatusTimeoutError``."""
        self._close()
        while (holder := self._entries.run(self._holder)) is not None:
            try:
                self.descriptors.append(os.pidfd_open(holder.pid))
            except ProcessLookupError:
                return False
            except OSError as error:
                raise failed(self._key, WAITING, error) from error
            if not holder.alive:  # asked after the pidfd was opened: that is of this very process
                return False
            if self.left_s == 0.0:
                raise StatusTimeoutError(os.fsdecode(self._key), holder.pid, time.monotonic() - self._began_s)
            bell = self._listen(holder)
            if bell >= 0:
                self.descriptors.append(bell)
                return True
            self._close()
        return False

    def _holder(self) -> Owner | None:
        """Who holds the path. Under the mutex."""
        base = self._entries.find(self._key, self._digest).base
        return self._entries.owner(base) if base and self._entries.state(base) in HELD else None

    def _listen(self, holder: Owner) -> int:
        """A descriptor that tells when ``holder`` no longer holds the path; -1 where it does not hold it now."""
        entries = self._entries

        def section() -> int:
            if self._holder() != holder:
                return -1
            entries.set_waited(entries.find(self._key, self._digest).base, True)  # first: each FIFO has its mark
            return bells.listen(self._bells, self._digest)

        self._has_listened = True
        try:
            return entries.run(section)
        except OSError as error:
            raise failed(self._key, WAITING, error) from error

    def _leave(self) -> None:
        """Remove the bell, where this was the last who waited. Under the mutex."""
        base = self._entries.find(self._key, self._digest).base
        if base and self._entries.is_waited(base) and bells.forget(self._bells, self._digest):
            self._entries.set_waited(base, False)

    def _close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def __enter__(self) -> Wait:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._has_listened:
            with contextlib.suppress(SegmentMissingError):
                self._entries.run(self._leave)


def failed(key: bytes, operation: str, error: OSError) -> FileOperationError:
    """``error``, of a bell or a pidfd, as one that names the path."""
    return FileOperationError(os.fsdecode(key), operation, error.errno or errno.EIO, error.strerror or str(error))

"""What is too large for a record: blobs with the payloads of tasks, and with results.

    payload   written by whoever submits --> read by the worker --> discarded when the task has its result
    result    written by the worker ------> take: copied, and discarded
    discarded: removed; or where it is not large, and nobody has a part of it, a spare for the next payload or result

Where results are retained, both keep their names until ``release``: a coordinator that dies before it leaves them to
whoever drains the segment. Used by the pump's thread alone, but for ``Spares``.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any

from ringpool.errors import RingpoolError
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import Task
from ringpool.shm.segment import SHM_DIRECTORY

SPARE_BYTES_MAX = 1 << 23  # of payloads


class Spares:
    """Blobs of payloads of ``segment`` that nobody reads any more. Of any thread, which never waits here: it may be in
    a signal handler that has come to itself.
    """

    def __init__(self, segment: str) -> None:
        self._segment = segment
        self._lock = threading.Lock()
        self._of_size: dict[int, list[tuple[str, int]]] = {}  # names, and bytes; by the binary digits of the latter
        self._n_bytes = 0

    def take(self, size_bytes: int) -> tuple[str, ...]:
        """The name of one of about that size, which is the caller's now; or none."""
        if not self._n_bytes or not self._lock.acquire(blocking=False):
            return ()
        try:
            found = self._of_size.get(size_bytes.bit_length())
            if not found:
                return ()
            name, spare_bytes = found.pop()
            self._n_bytes -= spare_bytes
            return (name,)
        finally:
            self._lock.release()

    def give(self, blob: int, entry: int | None) -> None:
        """Nobody will read this one, which was read for that ``entry`` of the ring alone; None: for others, it may be.
        It is spare; or removed where somebody may still have a view of it, where it is large, or room is short.
        """
        name, spare = blobs.payload_name(self._segment, blob), blobs.payload_spare_name(self._segment, blob)
        try:
            size_bytes = os.stat(f"{SHM_DIRECTORY}/{name}").st_size
        except FileNotFoundError:
            return
        is_free = size_bytes <= blobs.COPIED_MAX_BYTES or (entry is not None and blobs.is_released(name, entry))
        if not is_free or not blobs.keep_spare(name, size_bytes, spare):
            blobs.unlink(name)
        elif self._lock.acquire(blocking=False):
            try:
                if self._n_bytes + size_bytes > SPARE_BYTES_MAX:
                    self._clear()  # of other sizes, it may be
                self._of_size.setdefault(size_bytes.bit_length(), []).append((spare, size_bytes))
                self._n_bytes += size_bytes
            finally:
                self._lock.release()
        else:
            blobs.unlink(spare)

    def clear(self) -> None:
        """Remove all, and those of workers: room is short."""
        blobs.drop_spares(self._segment)
        if self._lock.acquire(blocking=False):
            try:
                self._clear()
            finally:
                self._lock.release()

    def _clear(self) -> None:
        for found in self._of_size.values():
            while found:
                name, spare_bytes = found.pop()
                self._n_bytes -= spare_bytes
                blobs.unlink(name)


class Parcels:
    """The blobs of the tasks in ``segment``; ``retains``: their names stay until ``release``."""

    def __init__(self, segment: str, *, retains: bool) -> None:
        self._segment = segment
        self._retains = retains
        self.spares = Spares(segment)
        self._n_taken = 0
        self._retained: deque[list[str]] = deque()  # names, for each result that the ring retains

    def name_of_result(self, entry: int) -> str:
        """The name of the blob in which the result of ``entry`` is, if it is in one."""
        return blobs.result_name(self._segment, layout.sequence_of(entry), layout.attempt_of(entry))

    def take(self, entry: int, worker: int) -> Any:
        """The blob of a result of that ``worker``: encoding, body and buffers; or the error of reading it, for whoever
        wants the result to raise; or its name, for him to try again.
        """
        name = self.name_of_result(entry)
        self._n_taken += 1
        try:
            if self._retains:
                return blobs.read(name, writable=True)
            return blobs.take(name, blobs.spare_names(self._segment, worker)[self._n_taken % blobs.SPARES_MAX])
        except (OSError, MemoryError):  # no descriptor left, say
            return name
        except RingpoolError as error:
            return error

    def retain(self, task: Task, entry: int, *, is_parcel: bool) -> None:
        """The ring retains a result: so are its blob, if it ``is_parcel``, and its task's."""
        names = [self.name_of_result(entry)] if is_parcel else []
        if task.blob:
            names.append(blobs.payload_name(self._segment, task.blob))
        self._retained.append(names)

    def release(self, n: int) -> None:
        """The ``n`` oldest results that are retained are safe elsewhere."""
        for _ in range(n):
            for name in self._retained.popleft():
                blobs.unlink(name)

    def discard_payload(self, task: Task, entry: int | None = None) -> None:
        """The task will not be run any more. ``entry``: the one for which it was, where no worker has died in it."""
        if task.blob:
            self.spares.give(task.blob, entry)

"""What is too large for a record: blobs with the payloads of tasks, and with results.

    payload   written by whoever submits --> read by the worker --> removed when the task has its result
    result    written by the worker ------> take: copied, and removed

Where results are retained, both keep their names until ``release``: a coordinator that dies before it leaves them to
whoever drains the segment. Used by the pump's thread alone.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from ringpool.errors import RingpoolError
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import Task


class Parcels:
    """The blobs of the tasks in ``segment``; ``retains``: their names stay until ``release``."""

    def __init__(self, segment: str, *, retains: bool) -> None:
        self._segment = segment
        self._retains = retains
        self._retained: deque[list[str]] = deque()  # names, for each result that the ring retains

    def name_of_result(self, entry: int) -> str:
        """The name of the blob in which the result of ``entry`` is, if it is in one."""
        return blobs.result_name(self._segment, layout.sequence_of(entry), layout.attempt_of(entry))

    def take(self, entry: int) -> Any:
        """A result's blob: encoding, body and buffers; or the error of reading it, for whoever wants the result to
        raise; or its name, for him to try again.
        """
        name = self.name_of_result(entry)
        try:
            return blobs.read(name, writable=True) if self._retains else blobs.take(name)
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

    def discard_payload(self, task: Task) -> None:
        """The task will not be run, or has its result."""
        if task.blob:
            blobs.unlink(blobs.payload_name(self._segment, task.blob))

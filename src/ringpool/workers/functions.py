"""Functions that a worker knows by the ids under which tasks name them, until whoever needed them has ended.

blob <segment>.f<id> --read at the first task that names it--> function --blob gone, or too many others--> forgotten
"""

from __future__ import annotations

from typing import TypeVar

from ringpool.shm import blobs
from ringpool.shm.layout import Encoding

_F = TypeVar("_F")


class CannotReadError(Exception):
    """What a task needs cannot be read, before it has begun: its ``__cause__``, an ``OSError`` or a ``MemoryError``. An
    earlier task may have left this process without descriptors, or memory. Never leaves this package.
    """


def read(name: str) -> tuple[Encoding, memoryview, list[memoryview]]:
    """``blobs.read``. Raises ``CannotReadError``, and what that raises of the blob."""
    try:
        return blobs.read(name)
    except (OSError, MemoryError) as error:
        raise CannotReadError from error


class Functions(dict[int, _F]):
    """Of the pool whose ring is in ``segment``, at most ``functions_max`` at a time, by id."""

    def __init__(self, segment: str, functions_max: int) -> None:
        super().__init__()
        self._segment = segment
        self._functions_max = functions_max

    def make_room(self) -> None:
        """For one more: without those of maps and runs that have ended, for they may hold much. They are asked for when
        another one comes, for nobody tells a worker.
        """
        for known in [each for each in self if not blobs.exists(blobs.function_name(self._segment, each))]:
            del self[known]
        while len(self) >= self._functions_max:
            del self[next(iter(self))]

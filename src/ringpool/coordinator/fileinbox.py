"""The pump's side of a run over files: what goes out together, and what comes back.

FileRun --add--> FilePart (filled until the pump seals it) --> vector --> FileInbox --> arrived: Piece
FileRun -------> ticket of a file with an output, or of a long task ----> FileInbox --> arrived: ticket and record
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import msgspec

from ringpool.coordinator import signals
from ringpool.coordinator.pieces import MapInbox, Piece
from ringpool.coordinator.tickets import Part, Ticket
from ringpool.errors import CoordinatorClosedError, OutputCollisionError, SegmentFormatError
from ringpool.shm import vectors
from ringpool.shm.layout import ItemsEncoding, Status
from ringpool.shm.results import ResultRecord
from ringpool.shm.vectors import Arena

if TYPE_CHECKING:
    from ringpool.coordinator.pump import Pump

OPEN = 1 << 31  # the end of a part that may still be added to
_FILES, _CANCELLED = int(ItemsEncoding.FILES), int(Status.CANCELLED)
_pack: Callable[[list[bytes]], bytes] = msgspec.msgpack.Encoder().encode


class FilePart(Part):
    """A part that is filled while it waits: so no path waits for the next one to be drawn.

    caller:  loose.append      | then look at sealing: once it is set, only what is below ``end`` goes along
    pump:    sealing := True   | then end := len(loose)
    """

    loose: list[bytes] = []  # noqa: RUF012  (of a Struct: each has its own)
    sealing: bool = False

    @classmethod
    def begin(cls, index: int, path: bytes) -> FilePart:
        """A part whose first item is ``path``, item ``index`` of its run."""
        return cls(b"", _FILES, index, 0, OPEN, loose=[path])

    @classmethod
    def of_many(cls, index: int, paths: list[bytes]) -> FilePart:
        """A part of these, to which nothing is added."""
        return cls(b"", _FILES, index, 0, OPEN, loose=paths)

    @property
    def n(self) -> int:
        """How many items."""
        return len(self.loose) if self.end == OPEN else self.end - self.first

    def add(self, path: bytes) -> bool:
        """Another one, by the thread that has begun the part; False: it comes too late, and begins the next part."""
        self.loose.append(path)
        if not self.sealing:
            return True
        while self.end == OPEN:
            time.sleep(0)  # a few bytecodes of the pump's, in which it waits for nothing
        return len(self.loose) <= self.end

    def seal(self) -> None:
        """Take no more."""
        self.sealing = True
        self.end = len(self.loose)
        self.items = _pack(self.loose[: self.end])


class FileInbox(MapInbox):
    """Where the pump puts the results of a run. ``sources``: the inputs under way, as they were given, by index."""

    counts_items = True

    def __init__(self, pump: Pump, on_retired: Callable[[], None], retries: int) -> None:
        super().__init__(on_retired, retries)
        self.sources: dict[int, Any] = {}
        self._pump = pump
        self._targets: dict[bytes, Any] = {}  # outputs of tasks under way, with their inputs

    def expect(self, target: bytes, source: Any) -> None:
        """A task with this output is drawn. Raises ``OutputCollisionError`` where one with the same is under way."""
        if target in self._targets:
            raise OutputCollisionError(os.fsdecode(target), str(self._targets[target]), str(source))
        self._targets[target] = source

    def taken(self, target: bytes) -> None:
        """The result of the task with this output is taken: the memory of outputs is bounded by the window."""
        self._targets.pop(target, None)

    def wait(self, timeout_s: float = -1) -> bool:
        """Wait until something has arrived, or the run was closed by another thread; whether something has."""
        while not self.arrived and not self.closed:
            if not signals.acquire(self._news, timeout_s):
                break
        return bool(self.arrived)

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """A task has a result: it is decoded where it is taken, not here."""
        if self.closed:
            self.dropped()
        else:
            self.arrived.append((ticket, record))

    def deliver_vector(self, ticket: Ticket, record: ResultRecord, arena: Arena, blob: str) -> list[Ticket]:
        """Take the outcomes; what was not run comes back. Of a run that was left, they are counted all the same."""
        part = ticket.part
        if self.closed and part is not None and part.chunk is not None and record.status != _CANCELLED:
            span = part.span(part.chunk)
            done = arena.done(span)
            with contextlib.suppress(SegmentFormatError):
                if done.n > part.taken.n:
                    self._count(self._piece(part, span, arena, done, record.duration_ns, record.worker))
        return super().deliver_vector(ticket, record, arena, blob)

    def put(self, piece: Piece) -> None:
        """Outcomes have arrived, and are decoded where they are taken."""
        self._count(piece)
        self.arrived.append(piece)

    def _count(self, piece: Piece) -> None:
        """In the statistics; what was not begun, because the pool closes, in neither number."""
        if piece.failed and isinstance(piece.values[0].error, CancelledError):
            return
        n_failed = piece.n if piece.failed else vectors.errors_in(piece.outcomes)
        self._pump.n_failed += n_failed
        self._pump.n_completed += piece.n - n_failed

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """The pool has ended, or an outcome cannot be taken: one error, not one for each file."""
        self.arrived.append(error)

    def drop(self, ticket: Ticket) -> None:
        """A task was taken out of the queue, because the pool closes; or what was cut off of one that runs, whose other
        files are still to come.
        """
        part = ticket.part
        if part is not None and part.end != OPEN:
            self._fail(part, part.first, part.end, CancelledError())
        else:
            self.arrived.append(CoordinatorClosedError())

    def _source_of(self, ticket: Ticket, index: int) -> Any:
        return self.sources.get(index)

"""What comes back of a map: pieces, each with outcomes of consecutive items, and the inbox that cuts vectors to them.

vector's result (pump's thread) --> MapInbox --outcomes--> Piece --> arrived --> MapRun (decodes it)
                                        +-----not run----> tickets, to be queued again
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import msgspec

from ringpool.coordinator.futures import death_of, is_from_signal, outcome_of
from ringpool.coordinator.inbox import Inbox
from ringpool.coordinator.sizer import OVERDUE_NS, RESULT_BYTES
from ringpool.coordinator.tickets import Part, Ticket
from ringpool.errors import RemoteError, SegmentFormatError
from ringpool.shm import blobs, vectors
from ringpool.shm.layout import OutcomeKind, Status
from ringpool.shm.results import ResultRecord
from ringpool.shm.vectors import Arena
from ringpool.workers import values

_PICKLE = int(OutcomeKind.PICKLE)
_OK, _DIED, _CANCELLED = int(Status.OK), int(Status.DIED), int(Status.CANCELLED)


class Failure:
    """Among results: the error of an item."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Piece(msgspec.Struct, eq=False):
    """Outcomes of consecutive items, as they arrive; ``values`` is whole once ``decode`` has run.

    ``spent_ns`` in the function; ``outcomes``: a stream of further ones, see ``vectors``; ``n_bytes`` that they took
    in their chunk, plain words not counted; ``blob``: what one of them left in shared memory, or its name, or the error
    of reading it; ``blob_bytes`` of it; ``is_large``: the last of them has no room in a vector, or hardly any;
    ``failed``: whether there may be a ``Failure`` among them. ``worker``: where they ran, -1 where that is not known;
    ``attempts``: how often the first was started; ``times``: of items that are timed, the last first, ns.
    """

    index: int
    n: int
    values: list[Any]
    spent_ns: int = 0
    outcomes: bytes = b""
    n_bytes: int = 0
    blob: Any = None
    blob_bytes: int = 0
    is_large: bool = False
    failed: bool = False
    worker: int = -1
    attempts: int = 1
    times: list[int] | None = None

    @property
    def size_bytes(self) -> int:
        """About how much memory it holds."""
        return 8 * self.n + self.n_bytes + self.blob_bytes

    def decode(self) -> None:
        """Make values of the stream."""
        found = self.values
        for kind, body in vectors.stream(self.outcomes) if self.outcomes else ():
            try:
                if kind == _PICKLE:
                    found.append(pickle.loads(body))
                    continue
                found.append(self._decode(kind, body))
            except BaseException as error:  # unpickling may run anything, sys.exit too
                if is_from_signal(error):
                    raise
                found.append(Failure(values.undecodable(error, "unknown")))
            self.failed = self.failed or type(found[-1]) is Failure
        self.outcomes = b""

    def _decode(self, kind: int, body: bytes) -> Any:
        match kind:
            case OutcomeKind.MSGPACK:
                return values.decode(0, body)
            case OutcomeKind.BLOB:
                return values.decode(*self._taken())
            case OutcomeKind.ERROR:
                return Failure(values.decode_error(values.decode(1, body)))
            case _:
                if body:  # there was no room for the exception itself
                    type_name, _, message = str(values.decode(0, body)).partition(": ")
                    return Failure(RemoteError(type_name, message, ""))
                if self.blob is None:  # nor for words about it
                    return Failure(RemoteError("an exception", "there was no room in shared memory for it", ""))
                return Failure(values.decode_error(values.decode(*self._taken())))

    def _taken(self) -> Any:
        blob, self.blob = self.blob, None
        if isinstance(blob, BaseException):
            raise blob
        return blobs.take_or_drop(blob) if isinstance(blob, str) else blob


class MapInbox(Inbox):
    """The pump's side of a map: takes outcomes out of vectors, and says what of them is to be run again."""

    counts_items = False  # for the statistics a vector is one task

    def __init__(self, on_retired: Callable[[], None], retries: int) -> None:
        super().__init__(on_retired)
        self.n_arrived = 0  # items; written by the pump's thread alone
        self.large: dict[int, int] = {}  # bytes of items in blobs that are under way, by index; who draws adds to it
        self.large_arrived = 0  # bytes of those that were
        self.discards = False  # nobody takes results, and yet all items are run
        self.overdue_ns = OVERDUE_NS  # written by who draws
        self.refill: Callable[[], None] | None = None  # called when something has arrived, in the pump's thread
        self._is_refilling = False
        self._n_last: int | None = None  # with so many items, all have arrived
        self._retries = retries

    def settle(self) -> None:
        """What was there for now has been delivered."""
        super().settle()
        self._end_if_all()
        refill = self.refill  # asked once: who leaves the map takes it away
        if refill is not None and not self.closed and not self._is_refilling:
            self._is_refilling = True  # in a pool that has ended, what is sent comes back at once
            try:
                refill()
            finally:
                self._is_refilling = False

    def retire_after(self, n_items: int) -> None:
        """Nobody takes results, and no more than ``n_items`` are run. In the pump's thread."""
        self._n_last, self.refill = n_items, None
        self._end_if_all()

    def _end_if_all(self) -> None:
        if self._n_last is not None and self.n_arrived >= self._n_last:
            self._end()

    def put(self, piece: Piece) -> None:
        """Outcomes have arrived."""
        self.n_arrived += piece.n
        if self.large and piece.n == 1:
            self.large_arrived += self.large.pop(piece.index, 0)
        if self.discards:
            piece.values, piece.outcomes, piece.blob = [], b"", None
        self.arrived.append(piece)

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """An item that was sent by itself has a result."""
        if self.closed:
            self.dropped()
            return
        value, error = outcome_of(ticket, record)
        piece = Piece(ticket.index, 1, [value if error is None else Failure(error)], record.duration_ns)
        piece.failed = error is not None
        piece.is_large = record.blob_bytes > RESULT_BYTES
        if piece.is_large:
            piece.blob_bytes = record.blob_bytes
        else:
            piece.n_bytes = record.blob_bytes or len(record.payload)
        self.put(piece)

    def deliver_vector(self, ticket: Ticket, record: ResultRecord, arena: Arena, blob: str) -> list[Ticket]:
        """Take the outcomes; what was not run comes back."""
        part = ticket.part
        assert part is not None
        assert part.chunk is not None
        if self.closed:
            blobs.unlink(blob)
            self.dropped()
            return []
        span = part.span(part.chunk)
        done = vectors.Done() if record.status == _CANCELLED else arena.done(span)
        first = part.first + done.n
        deaths = 0 if done.n else part.deaths  # of workers, in that item
        if done.n > part.taken.n:
            self.put(self._piece(part, span, arena, done, record.duration_ns, record.worker, blob))
            part.taken = done
        if first == part.end:
            return []
        if record.status == _OK:  # its worker was told to end, or its chunk was full
            return [self._again(ticket, part.of(first, part.end, deaths))]
        blobs.unlink(blob)
        if record.status == _DIED:
            return self._after_death(ticket, part, record, first, deaths + 1)
        _, error = outcome_of(ticket, record)
        if not record.duration_ns:  # it could not be begun at all: the function cannot be had
            self._fail(part, first, part.end, error or CancelledError(), record.worker, deaths + 1)
            return []
        self._fail(part, first, first + 1, error or CancelledError(), record.worker, deaths + 1)
        return [self._again(ticket, part.of(first + 1, part.end))] if first + 1 < part.end else []

    def deliver_early(self, ticket: Ticket, arena: Arena, spent_ns: int, worker: int) -> bool:
        """A vector has been under way for long: take what there is of its outcomes; whether there was anything new."""
        part = ticket.part
        assert part is not None
        assert part.chunk is not None
        span = part.span(part.chunk)
        done = arena.done(span)
        if self.closed or done.n <= part.taken.n:
            return False
        try:
            piece = self._piece(part, span, arena, done, spent_ns, worker)
        except SegmentFormatError:  # the vector's result will say so, to this map alone
            return False
        if piece.outcomes and [*vectors.stream(piece.outcomes)][-1][0] >= OutcomeKind.BLOB:
            return False  # with which a vector ends: the rest comes with its result
        self.put(piece)
        part.taken, part.taken_ns = done, spent_ns
        return True

    def _piece(
        self,
        part: Part,
        span: vectors.Span,
        arena: Arena,
        done: vectors.Done,
        spent_ns: int,
        worker: int,
        blob: str | None = None,
    ) -> Piece:
        """Its outcomes so far, without those taken before."""
        taken = part.taken
        plain, outcomes = arena.outcomes(span, done, taken)
        n_bytes = done.packed_bytes - taken.packed_bytes + len(outcomes)
        index, n, spent_ns = part.index + part.first + taken.n, done.n - taken.n, max(0, spent_ns - part.taken_ns)
        piece = Piece(index, n, plain, spent_ns, outcomes, n_bytes, worker=worker, attempts=part.deaths + 1)
        piece.times = arena.times(span, taken.n, done.n)
        if outcomes and blob is not None:
            piece.blob = self._blob_of(blob)
            piece.is_large = piece.blob is not None
            if not isinstance(piece.blob, str | BaseException | None):
                piece.blob_bytes = blobs.size_of(*piece.blob[1:])
        return piece

    def _after_death(self, ticket: Ticket, part: Part, record: ResultRecord, first: int, deaths: int) -> list[Ticket]:
        """Its worker died in item ``first``: that one is blamed, those behind it were never begun."""
        again: list[Ticket] = []
        if deaths <= self._retries:
            again.append(self._again(ticket, part.of(first, first + 1, deaths)))
        else:
            value = values.decode(record.encoding, record.payload)
            error = death_of(self._source_of(ticket, part.index + first), value, deaths)
            self._fail(part, first, first + 1, error, attempts=deaths)
        if first + 1 < part.end:
            again.append(self._again(ticket, part.of(first + 1, part.end)))
        return again

    def _source_of(self, ticket: Ticket, index: int) -> Any:
        """What the error of an item says that it was."""
        return ticket.source

    @staticmethod
    def _again(ticket: Ticket, part: Part) -> Ticket:
        return Ticket(ticket.task, ticket.sink, ticket.source, None, priority=ticket.priority, part=part)

    @staticmethod
    def _blob_of(name: str) -> Any:
        """The blob that the last of a vector's outcomes may have left; None for none."""
        if not blobs.exists(name):
            return None
        try:
            return blobs.take(name)
        except (OSError, MemoryError):  # whoever takes the result tries again
            return name
        except Exception as error:  # and is told
            return error

    def _fail(
        self, part: Part, first: int, end: int, error: BaseException, worker: int = -1, attempts: int = 1
    ) -> None:
        """Each of the items [first, end) has this error."""
        failures: list[Any] = [Failure(error)] * (end - first)
        piece = Piece(part.index + first, len(failures), failures, failed=True, worker=worker, attempts=attempts)
        self.put(piece)

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """The pool has ended, or the task's outcome cannot be taken."""
        part = ticket.part
        if part is not None:
            first = part.first + part.taken.n
            if first < part.end:
                self._fail(part, first, part.end, error)
        else:
            self.put(Piece(ticket.index, 1, [Failure(error)], failed=True))

    def drop(self, ticket: Ticket) -> None:
        """The pool closes, and cancels what has not begun."""
        self.fail(ticket, CancelledError())

"""A run of file tasks: lazy results of lazy inputs. Short tasks without outputs go together, as the items of a map do.

FileRun:  next() <- piece at hand <- ready <- inbox <--- pump       draws inputs only when asked for a result
                        inputs -> parts, tickets -------> pump

Bounds: inputs drawn and not given out, at most ``window``, or 8,192 and 40 ms of work for each worker; before anything
is known of the tasks, a few for each worker.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any

import msgspec

from ringpool.coordinator.fileinbox import FileInbox, FilePart
from ringpool.coordinator.futures import outcome_of
from ringpool.coordinator.pieces import Failure, Piece
from ringpool.coordinator.sizer import REFILL_AT, RESULT_BYTES, Sizer
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import SharedMemoryFullError
from ringpool.shm import layout, vectors
from ringpool.shm.dispatch import Task
from ringpool.shm.layout import Form
from ringpool.shm.results import ResultRecord

if TYPE_CHECKING:
    from ringpool.coordinator.drawing import Drawing
    from ringpool.coordinator.pool import Pool

FLUSH_ITEMS = 64
FILL_S = 0.001  # how long inputs are drawn while results wait to be taken
AHEAD_MAX = 8_192
TOGETHER_MAX = 1024  # files in a vector
TOGETHER_PATH_BYTES_MAX = 4096  # a longer one goes by itself; the kernel takes none
_PACKED_HEAD_BYTES = 5  # at most, of a path among others


class FileResult(msgspec.Struct, frozen=True):  # seen by the collector: raising its error makes a cycle
    """What became of one file.

    ``path`` and ``output`` as they were given (``output``: None where there is none); ``value``: what the function
    returned; ``error``: None, or what it raised, or why it could not run; ``attempts``: how many workers have begun it,
    each of which may have called the function again, as a ``RetryPolicy`` says; ``duration_s``: of the last attempt, in
    the function, and between its calls; ``worker``: the index of the worker that ran it, -1 for none.
    """

    path: Any
    output: Any
    value: Any
    error: BaseException | None
    attempts: int
    duration_s: float
    worker: int

    @property
    def ok(self) -> bool:
        """Whether the task ended well."""
        return self.error is None

    def unwrap(self) -> Any:
        """``value``, or raise ``error``."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # or each would keep the other: error, its traceback, this frame, the result, error
        return self.value


_Found = Piece | FileResult | tuple[Ticket, ResultRecord] | BaseException


class FileRun(Iterator[FileResult]):
    """The results of a run, as they come. Inputs are drawn while results are taken.

    ``drawn``: its inputs; ``alone``: makes the ticket of one without an output; ``together``: whether short tasks may
    go together. Leaving the loop early, ``close()``, or dropping it, cancels what has not started. An error of the
    input iterator is raised when all that was drawn before it has been given out. One thread at a time takes from it; a
    fork of the program does not (``WrongProcessError``).
    """

    _closed = True  # until it is whole: Ctrl-C may come in between

    def __init__(
        self,
        pool: Pool,
        inbox: FileInbox,
        drawn: Drawing,
        alone: Callable[[bytes, Any], Ticket],
        function_id: int,
        *,
        window: int | None,
        together: bool,
    ) -> None:
        self._pid = os.getpid()
        self._pool = pool
        self._inbox = inbox
        self._drawn = drawn
        self._alone = alone
        self._vector = Task(function_id, b"", 0, Form.VECTOR)
        self._window = window
        self._together = together
        self._sizer = Sizer(None, pool.n_workers)
        self._ready: deque[_Found] = deque()
        self._at_hand: list[FileResult] = []  # the next one last
        self._n_drawn = self._n_arrived = self._n_given = self._n_at_hand = 0
        self._refill_at = 0  # inputs ahead: so few, and more are drawn
        self._n_together = 0  # the index of the next input without an output
        self._exhausted = False
        self._input_error: Exception | None = None
        self._closed = False

    def __iter__(self) -> FileRun:
        return self

    def __next__(self) -> FileResult:
        try:
            while not self._at_hand:
                self._advance()
            return self._at_hand.pop()
        except (KeyboardInterrupt, SystemExit):  # from a signal, between any two steps: what is under way is not known
            self.close()
            raise

    def __enter__(self) -> FileRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Take no more: what has not started is cancelled, what runs is left to end, and its result is dropped."""
        if self._closed or os.getpid() != self._pid:  # in a fork of the program, the results are its parent's
            return
        self._closed = self._exhausted = self._inbox.closed = True
        self._ready.clear()
        self._at_hand.clear()
        self._inbox.arrived.clear()
        self._pool.pump.abandon(self._inbox)
        self._inbox.settle()  # who takes from a closed run gets nothing, and does not wait for it

    # ---- giving out

    def _advance(self) -> None:
        """Wait for what comes next, and have it at hand."""
        self._pool.check_process()
        self._n_given += self._n_at_hand
        self._n_at_hand = 0
        while True:
            self._sort()
            may_draw = not self._exhausted and (self._drawn.never_waits or not self._ready)
            if may_draw and self._n_drawn - self._n_given <= self._refill_at:  # many at once, not one for each result
                self._fill()
                if self._at_hand:  # the inputs have taken a result, and what came with it is not to be lost
                    return
            if self._ready:
                break
            if self._n_drawn != self._n_arrived and not self._closed:
                self._pool.pump.check_thread()
                self._inbox.wait()
            elif self._exhausted:
                self.close()
                error, self._input_error = self._input_error, None
                try:
                    raise StopIteration if error is None else error
                finally:
                    del error
        found = self._ready.popleft()
        if isinstance(found, BaseException):  # the pool has ended: one error, not one for each file
            self.close()
            self._input_error = None
            try:
                raise found
            finally:
                del found
        if isinstance(found, Piece):
            self._at_hand = self._results_of(found)
        else:
            self._at_hand = [found if isinstance(found, FileResult) else self._result_of(*found)]
        self._n_at_hand = len(self._at_hand)

    def _sort(self) -> None:
        """All that has arrived is ready to be given out."""
        arrived = self._inbox.arrived
        while arrived:
            found: _Found = arrived.popleft()
            if isinstance(found, Piece):
                self._n_arrived += found.n
                self._sizer.observe(found.spent_ns, found.n, found.n_bytes, found.is_large)
            elif isinstance(found, tuple):
                _, record = found
                self._n_arrived += 1
                n_bytes = record.blob_bytes or len(record.payload)
                is_ending = n_bytes > RESULT_BYTES
                self._sizer.observe(record.duration_ns, 1, 0 if is_ending else n_bytes, is_ending)
            self._ready.append(found)

    def _results_of(self, piece: Piece) -> list[FileResult]:
        """The results of a piece, the last one first."""
        piece.decode()
        piece.values.reverse()
        sources = map(self._inbox.sources.pop, range(piece.index + piece.n - 1, piece.index - 1, -1))
        durations_s: Iterable[float] = [ns / 1e9 for ns in piece.times] if piece.times else repeat(0.0)
        found: list[Any] = piece.values
        errors: Iterable[BaseException | None] = repeat(None)
        if piece.failed:
            errors = [value.error if type(value) is Failure else None for value in found]
            found = [None if type(value) is Failure else value for value in found]
        attempts, worker = repeat(piece.attempts), repeat(_index_of(piece.worker))
        return list(map(FileResult, sources, repeat(None), found, errors, attempts, durations_s, worker))

    def _result_of(self, ticket: Ticket, record: ResultRecord) -> FileResult:
        if ticket.target is not None:
            self._inbox.taken(ticket.target)
        value, error = outcome_of(ticket, record)
        attempts, duration_s = record.attempt + 1, record.duration_ns / 1e9
        return FileResult(ticket.source, ticket.output, value, error, attempts, duration_s, _index_of(record.worker))

    # ---- sending

    def _fill(self) -> None:
        """Draw inputs as far as they may be ahead of results; but not for long while results wait to be taken."""
        try:
            self._pool.check_open()
            most, together_max = self._most_ahead()
        except Exception as error:
            self._fail_input(error)
            return
        try:
            room = most - self._n_drawn + self._n_given
            if together_max > 1:
                room = self._fill_together(room, together_max)
            if room > 0:
                self._fill_one_by_one(room, together_max)
        except Exception:  # of a signal handler, between any two steps: what is under way is not known
            self.close()
            raise

    def _fail_input(self, error: Exception) -> None:
        """Nothing more is drawn; raise ``error`` when all that was drawn before it has been given out."""
        self._exhausted = True
        self._input_error = error

    def _fill_together(self, room: int, together_max: int) -> int:
        """Queue up to ``room`` inputs of a list; how many are left for those that must be drawn one by one."""
        inbox, pump, clock = self._inbox, self._pool.pump, time.monotonic
        began_s = clock()
        told_s = -FILL_S if self._n_drawn == self._n_arrived else began_s  # the first of all is told at once
        while room > 0 and not inbox.closed:
            try:
                found = self._drawn.together(min(room, together_max))
            except Exception as error:
                self._fail_input(error)
                break
            if found is None:
                return room
            paths, sources = found
            n, index = len(paths), self._n_together
            self._n_together += n
            inbox.sources.update(zip(range(index, index + n), sources, strict=True))
            for at, end in _pieces_of(paths, vectors.room_for_items(together_max, timed=True)):
                part = FilePart.of_many(index + at, paths[at:end])
                pump.queue(Ticket(self._vector, inbox, None, None, part=part))
            if inbox.closed:  # meanwhile, by another thread, which may not have met what was queued after that
                pump.abandon(inbox)
                break
            self._n_drawn += n
            room -= n
            if n < together_max and room > 0:
                self._exhausted = True
                break
            now_s = clock()
            if now_s - told_s > FILL_S:
                pump.wake()
                told_s = now_s
                if (inbox.arrived or self._ready) and now_s - began_s > FILL_S:
                    break
        pump.wake()
        return 0

    def _fill_one_by_one(self, room: int, together_max: int) -> None:
        """Queue up to ``room`` inputs, each before the next is drawn, which may take its time."""
        n_in_part = n_bytes = 0
        n_drawn = self._n_drawn
        inbox, queue, clock, wake = self._inbox, self._pool.pump.queue, time.monotonic, self._pool.pump.wake
        arrived, ready, sources, draw = inbox.arrived, self._ready, inbox.sources, iter(self._drawn).__next__
        part: FilePart | None = None
        began_s = woken_s = clock()
        room_bytes = vectors.room_for_items(together_max, timed=True)
        not_told = FLUSH_ITEMS if n_drawn == self._n_arrived else 0  # the first of all is told at once
        try:
            for _ in range(room):
                try:
                    drawn = draw()
                except StopIteration:
                    self._exhausted = True
                    break
                except Exception as error:
                    self._fail_input(error)
                    break
                if inbox.closed:  # meanwhile, by another thread or by the inputs themselves
                    break
                if isinstance(drawn, Ticket):
                    queue(drawn)
                elif isinstance(drawn, FileResult):
                    self._n_arrived += 1
                    ready.append(drawn)
                elif together_max == 1 or len(drawn[0]) > TOGETHER_PATH_BYTES_MAX:
                    queue(self._alone(*drawn))
                else:
                    path, index = drawn[0], self._n_together
                    self._n_together = index + 1
                    sources[index] = drawn[1]
                    n_in_part += 1
                    n_bytes += len(path) + _PACKED_HEAD_BYTES
                    if part is None or n_in_part > together_max or n_bytes > room_bytes or not part.add(path):
                        part = FilePart.begin(index, path)
                        n_in_part, n_bytes = 1, len(path) + 2 * _PACKED_HEAD_BYTES
                        queue(Ticket(self._vector, inbox, None, None, part=part))
                self._n_drawn = n_drawn = n_drawn + 1
                not_told += 1
                now_s = clock()
                if not_told > FLUSH_ITEMS or now_s - woken_s > FILL_S:
                    wake()
                    not_told, woken_s = 0, now_s
                    if (arrived or ready) and now_s - began_s > FILL_S:
                        break
        finally:
            if not_told:
                wake()

    def _most_ahead(self) -> tuple[int, int]:
        """How many inputs may be ahead of results, how many of these may go together; and when to ask again."""
        sizer, n_vectors = self._sizer, 2 * self._pool.n_workers + 2
        most = self._window or max(self._pool.slots, min(sizer.under_way_max, AHEAD_MAX))
        if not sizer.has_seen_any:
            most = self._refill_at = min(most, n_vectors)
            return most, 1
        self._inbox.overdue_ns = sizer.overdue_ns
        self._refill_at = int(most * REFILL_AT)
        n = min(sizer.n, TOGETHER_MAX, most // n_vectors) if self._together else 1
        if n > 1 and self._pool.pump.publisher.arena is None:
            try:
                self._pool.make_arena()
            except SharedMemoryFullError:  # it works without
                self._together, n = False, 1
        return most, max(1, n)


def _pieces_of(paths: list[bytes], room_bytes: int) -> Iterator[tuple[int, int]]:
    """Where to cut, so that each piece takes at most ``room_bytes``: mostly nowhere."""
    at = n_bytes = 0
    if sum(map(len, paths)) + _PACKED_HEAD_BYTES * (len(paths) + 1) > room_bytes:
        for i, path in enumerate(paths):
            n_bytes += len(path) + _PACKED_HEAD_BYTES
            if n_bytes + _PACKED_HEAD_BYTES > room_bytes and i > at:
                yield at, i
                at, n_bytes = i, len(path) + _PACKED_HEAD_BYTES
    if at < len(paths):
        yield at, len(paths)


def _index_of(worker: int) -> int:
    """The index of a worker; -1 where a record has none."""
    return worker if worker < layout.WORKERS_MAX else -1

"""What a caller holds of a task: a future, a result by name, or an iterator over a run of files.

TaskFuture   one task; a ``concurrent.futures.Future`` that can be cancelled as long as no worker has the task
TaskBoard    results by task id, for whoever asks later: all that were not read, or the newest 65,536 of them
FileRun      lazy results of lazy inputs: at most ``window`` tasks are under way, however long the input is

FileRun:  next() <- ready <- inbox <--- pump            draws inputs only when asked for a result
                      inputs -> tickets ---> pump
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

import msgspec

from ringpool.errors import CoordinatorClosedError, OutputCollisionError, RemoteError, TaskInDoubtError, WorkerDiedError
from ringpool.shm import blobs, layout
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import ResultRecord
from ringpool.workers import values

if TYPE_CHECKING:
    from ringpool.coordinator.pump import Pump, Ticket

UNREAD_MAX = 65_536
_OK, _BLOB = int(Status.OK), int(Encoding.BLOB)  # plain integers compare faster than the enums
FLUSH_TICKETS = 64
FILL_S = 0.001  # how long inputs are drawn while results wait to be taken


class FileResult(msgspec.Struct, frozen=True):  # seen by the collector: raising its error makes a cycle
    """What became of one file.

    ``path`` and ``output`` as they were given (``output``: None where there is none); ``value``: what the function
    returned; ``error``: None, or what it raised, or why it could not run; ``attempts``: how often it was started;
    ``duration_s``: of the last attempt, in the function; ``worker``: the index of the worker that ran it.
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
            raise self.error
        return self.value


def outcome_of(ticket: Ticket, record: ResultRecord) -> tuple[Any, BaseException | None]:
    """Value and error of a delivered task."""
    try:
        if record.encoding == _BLOB:
            value = _value_of_blob(ticket)
        else:
            value = values.decode(record.encoding, record.payload) if record.payload else None
    except Exception as error:
        return None, values.undecodable(error, "unknown")
    if record.status == _OK:
        return value, None
    return None, _error_of(ticket, record.status, value)


def _value_of_blob(ticket: Ticket) -> Any:
    blob, ticket.result_blob = ticket.result_blob, None  # the value alone keeps the mapping from here on
    if isinstance(blob, BaseException):
        raise blob
    if isinstance(blob, str):
        try:
            return values.read_blob(blob, writable=True)
        finally:
            blobs.unlink(blob)
    return values.decode(*blob)


def _error_of(ticket: Ticket, status: int, value: Any) -> BaseException:
    match status:
        case Status.ERROR if isinstance(value, str):  # there was no room for the exception itself
            type_name, _, message = value.partition(": ")
            return RemoteError(type_name, message, "")
        case Status.ERROR:
            return values.decode_error(value)
        case Status.DIED:
            return WorkerDiedError(value[0], value[1], value[2], str(ticket.source), value[3])
        case Status.IN_DOUBT:
            return TaskInDoubtError(str(ticket.source), str(ticket.output))
        case _:
            return CancelledError()


class TaskFuture(Future[Any]):
    """The future of one file task. ``task_id`` (int) is its name for ``Coordinator.wait_for_task_result``.

    ``result()`` and ``exception()`` raise what the task raised, with the worker's traceback as ``__cause__``;
    ``WorkerDiedError`` where workers died in it, ``CoordinatorClosedError`` where the pool ended first.
    """

    def __init__(self, task_id: int, pump: Pump, board: TaskBoard) -> None:
        super().__init__()
        self.task_id = task_id
        self.ticket: Ticket | None = None
        self._pump = pump
        self._board = board

    # ---- for the caller

    def cancel(self) -> bool:
        """Keep the task from starting; False where a worker has it already, or it is done."""
        if not self.done():
            self._pump.call(self._cancel_here)
        return self.cancelled()

    def _cancel_here(self) -> None:
        """In the pump's thread, so that nobody else settles this future meanwhile."""
        if self.ticket is not None and not self.done() and self._pump.cancel(self.ticket):
            self._cancelled()

    def running(self) -> bool:
        """Whether a worker is at it."""
        return not self.done() and self.ticket is not None and self._pump.is_running(self.ticket)

    def result(self, timeout: float | None = None) -> Any:
        """The value, waiting up to ``timeout`` seconds (None: for ever)."""
        try:
            return super().result(timeout)
        finally:
            self._read()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error or None, waiting up to ``timeout`` seconds (None: for ever)."""
        try:
            return super().exception(timeout)
        finally:
            self._read()

    def _read(self) -> None:
        if self.done():
            self._board.forget(self.task_id)

    # ---- for the pump

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """The task has a result."""
        value, error = outcome_of(ticket, record)
        if isinstance(error, CancelledError):
            self._cancelled()
        elif error is not None:
            self.fail(ticket, error)
        elif self.set_running_or_notify_cancel():
            self.set_result(value)
            self._board.arrived(self)

    def fail(self, _ticket: Ticket, error: BaseException) -> None:
        """The task ended badly, or will never run."""
        if self.done():
            return
        if self.set_running_or_notify_cancel():
            self.set_exception(error)
            self._board.arrived(self)

    def drop(self, _ticket: Ticket) -> None:
        """The task was taken out of the queue."""
        self._cancelled()

    def settle(self) -> None:
        """A future tells its waiters at once."""

    def _cancelled(self) -> None:
        if not self.done() and super().cancel():
            self.set_running_or_notify_cancel()
            self._board.arrived(self)


class TaskBoard:
    """Futures by task id, until they are read. Of those that are done, the newest ``UNREAD_MAX`` are kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[int, TaskFuture] = {}
        self._unread: OrderedDict[int, TaskFuture] = OrderedDict()

    def add(self, future: TaskFuture) -> None:
        """A task is queued."""
        with self._lock:
            self._pending[future.task_id] = future

    def arrived(self, future: TaskFuture) -> None:
        """A task is done."""
        with self._lock:
            if self._pending.pop(future.task_id, None) is None:
                return
            self._unread[future.task_id] = future
            if len(self._unread) > UNREAD_MAX:
                self._unread.popitem(last=False)

    def forget(self, task_id: int) -> None:
        """A result was read."""
        with self._lock:
            self._unread.pop(task_id, None)
            self._pending.pop(task_id, None)

    def find(self, task_id: int) -> TaskFuture | None:
        """The task's future, where it is queued, under way or unread."""
        with self._lock:
            return self._pending.get(task_id) or self._unread.get(task_id)


class RunInbox:
    """Where the pump puts the results of a run. Apart from ``FileRun``, so that one that is dropped is noticed."""

    def __init__(self, on_retired: Callable[[], None]) -> None:
        self._on_retired = on_retired
        self._left = 0  # once closed: tasks that a worker still has
        self.arrived: deque[tuple[Ticket, ResultRecord | BaseException]] = deque()
        # Locked: no news. A lock, because its methods are single steps: an Event takes its own lock in Python code, and
        # Ctrl-C can leave that held by the thread that waits, so that the pump would wait for it for ever.
        self._news = threading.Lock()
        self._news.acquire()
        self.closed = False
        self._targets: dict[bytes, Any] = {}  # outputs of tasks under way, with their inputs

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """A task has a result: it is decoded where it is taken, not here."""
        if not self.closed:
            self.arrived.append((ticket, record))
            return
        self._left -= 1
        if not self._left:
            self._on_retired()

    def expect(self, target: bytes, source: Any) -> None:
        """A task with this output is drawn. Raises ``OutputCollisionError`` where one with the same is under way."""
        if target in self._targets:
            raise OutputCollisionError(os.fsdecode(target), str(self._targets[target]), str(source))
        self._targets[target] = source

    def taken(self, target: bytes) -> None:
        """The result of the task with this output is taken: the memory of outputs is bounded by the window."""
        self._targets.pop(target, None)

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """A task will never have a result."""
        self.arrived.append((ticket, error))

    def settle(self) -> None:
        """What was there for now has been delivered."""
        if self._news.locked():  # nobody else unlocks it
            self._news.release()

    def wait(self) -> None:
        """Wait until something has arrived."""
        while not self.arrived:
            self._news.acquire()

    def drop(self, ticket: Ticket) -> None:
        """A task was taken out of the queue, because the pool closes."""
        self.arrived.append((ticket, CoordinatorClosedError()))

    def retire(self, left: int) -> None:
        """Nobody takes results any more, and ``left`` are still to come. In the pump's thread, or where none are."""
        self._left = left
        if not left:
            self._on_retired()


class FileRun(Iterator[FileResult]):
    """The results of a run, as they come. Inputs are drawn while results are taken, at most ``window`` ahead.

    Leaving the loop early, ``close()``, or dropping it, cancels what has not started. An error of the input iterator is
    raised when all that was drawn before it has been given out. One thread at a time takes from it.
    """

    def __init__(
        self, pump: Pump, inbox: RunInbox, tickets: Iterator[Ticket], window: int, check_open: Callable[[], None]
    ) -> None:
        self._closed = False
        self._pid = os.getpid()
        self._pump = pump
        self._inbox = inbox
        self._tickets = tickets
        self._window = window
        self._check_open = check_open
        self._ready: deque[tuple[Ticket, ResultRecord | BaseException]] = deque()
        self._under_way = 0
        self._exhausted = False
        self._input_error: Exception | None = None

    def __iter__(self) -> FileRun:
        return self

    def __next__(self) -> FileResult:
        try:
            return self._next()
        except (KeyboardInterrupt, SystemExit):  # from a signal, between any two steps: what is under way is not known
            self.close()
            raise

    def _next(self) -> FileResult:
        while not self._ready:
            if not self._exhausted:
                self._fill()
            if self._under_way:
                self._take()
            elif self._exhausted:
                self.close()
                error, self._input_error = self._input_error, None
                raise StopIteration if error is None else error
        ticket, record = self._ready.popleft()
        if ticket.target is not None:
            self._inbox.taken(ticket.target)
        if isinstance(record, BaseException):  # the pool has ended: one error, not one for each file
            self.close()
            raise record
        value, error = outcome_of(ticket, record)
        worker = record.worker if record.worker < layout.WORKERS_MAX else -1
        attempts, duration_s = record.attempt + 1, record.duration_ns / 1e9
        return FileResult(ticket.source, ticket.output, value, error, attempts, duration_s, worker)

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
        self._inbox.arrived.clear()
        self._under_way = 0  # who takes from a closed run gets nothing, and does not wait for it
        self._pump.abandon(self._inbox)

    def _fill(self) -> None:
        """Draw inputs up to the window; but not for long while results wait to be taken.

        Each is queued before the next is drawn, which may take its time.
        """
        queue, tickets, arrived, clock = self._pump.queue, self._tickets, self._inbox.arrived, time.monotonic
        began_s = woken_s = clock()
        not_told = FLUSH_TICKETS if not self._under_way else 0  # the first of all is told at once
        try:
            self._check_open()
            while self._under_way < self._window:
                queue(next(tickets))
                self._under_way += 1
                not_told += 1
                now_s = clock()
                if not_told > FLUSH_TICKETS or now_s - woken_s > FILL_S:
                    self._pump.wake()
                    not_told, woken_s = 0, now_s
                if arrived and now_s - began_s > FILL_S:
                    break
        except StopIteration:
            self._exhausted = True
        except Exception as error:
            self._exhausted = True
            self._input_error = error
        if not_told:
            self._pump.wake()

    def _take(self) -> None:
        """Wait for results, and take all that are there."""
        inbox = self._inbox
        inbox.wait()
        while inbox.arrived:
            self._ready.append(inbox.arrived.popleft())
            self._under_way -= 1

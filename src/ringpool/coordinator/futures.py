"""What became of a task, and the futures that tell it.

outcome_of   a ticket and its result record -> value and error
PoolFuture   one task; a ``concurrent.futures.Future`` that can be cancelled as long as no worker has the task
TaskFuture   a ``PoolFuture`` of a file task, known by its id as well
TaskBoard    results by task id, for whoever asks later: all that were not read, or the newest 65,536 of them
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING, Any

from ringpool.coordinator.limits import Condemned
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import RemoteError, TaskInDoubtError, WorkerDiedError
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import ResultRecord
from ringpool.workers import values

if TYPE_CHECKING:
    from ringpool.coordinator.pump import Pump

UNREAD_MAX = 65_536
_OK, _BLOB = int(Status.OK), int(Encoding.BLOB)  # plain integers compare faster than the enums


def outcome_of(ticket: Ticket, record: ResultRecord) -> tuple[Any, BaseException | None]:
    """Value and error of a delivered task."""
    try:
        if record.encoding == _BLOB:
            value = _value_of_blob(ticket)
        else:
            value = values.decode(record.encoding, record.payload) if record.payload else None
    except BaseException as error:  # unpickling may run anything, sys.exit too
        return None, values.undecodable(error, "unknown")
    if record.status == _OK:
        return value, None
    return None, error_of(ticket, record.status, value)


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


def error_of(ticket: Ticket, status: int, value: Any, deaths: int | None = None) -> BaseException:
    """The error of a task without a value; ``deaths``: of workers in it, where its record does not know."""
    match status:
        case Status.ERROR if isinstance(value, str):  # there was no room for the exception itself
            type_name, _, message = value.partition(": ")
            return RemoteError(type_name, message, "")
        case Status.ERROR:
            return values.decode_error(value)
        case Status.DIED:
            number, exitcode, pid, n_deaths, *limit = value
            make = Condemned(0, *limit).error if limit else WorkerDiedError
            return make(number, exitcode, pid, _name_of(ticket.source), deaths or n_deaths)
        case Status.IN_DOUBT:
            return TaskInDoubtError(str(ticket.source), str(ticket.output))
        case _:
            return CancelledError()


def _name_of(source: Any) -> str:
    """What an error calls a task: the path of its file, or the name of what was called."""
    if not callable(source):
        return str(source)
    while isinstance(source, partial):
        source = source.func
    named: Any = source if hasattr(source, "__qualname__") else type(source)  # pyright: ignore[reportUnknownVariableType]
    return f"{named.__module__}.{named.__qualname__}"  # without its arguments: they may be large, or nobody's business


class PoolFuture(Future[Any]):
    """The future of one task. ``result()`` and ``exception()`` raise what the task raised, with the worker's traceback
    as ``__cause__``, and ``WorkerDiedError`` where workers died in it.
    """

    def __init__(self, pump: Pump) -> None:
        super().__init__()
        self.ticket: Ticket | None = None
        self._pump = pump

    # ---- for the caller

    def cancel(self) -> bool:
        """Keep the task from starting; False where a worker has it already, or it is done."""
        if not self.done():
            self._pump.call(self._cancel_here)
        return self.cancelled()

    def _cancel_here(self) -> None:
        """In the pump's thread, so that nobody else settles this future meanwhile."""
        ticket = self.ticket
        if ticket is not None and not self.done() and self._pump.cancel(ticket):
            self._cancelled()

    def running(self) -> bool:
        """Whether a worker is at it."""
        ticket = self.ticket
        return not self.done() and ticket is not None and self._pump.is_running(ticket)

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
            self._arrived()

    def fail(self, _ticket: Ticket, error: BaseException) -> None:
        """The task ended badly, or will never run."""
        if self.done():
            return
        if self.set_running_or_notify_cancel():
            self.set_exception(error)
            self._arrived()

    def drop(self, _ticket: Ticket) -> None:
        """The task was taken out of the queue."""
        self._cancelled()

    def settle(self) -> None:
        """A future tells its waiters at once."""

    def _cancelled(self) -> None:
        if not self.done() and super().cancel():
            self.set_running_or_notify_cancel()
            self._arrived()

    def _arrived(self) -> None:
        """It is done, and its waiters know."""
        self.ticket = None  # with which go its payload and its arguments


class TaskFuture(PoolFuture):
    """The future of one file task. ``task_id`` (int) is its name for ``Coordinator.wait_for_task_result``.

    Also raises ``CoordinatorClosedError`` where the pool ended first.
    """

    def __init__(self, task_id: int, pump: Pump, board: TaskBoard) -> None:
        super().__init__(pump)
        self.task_id = task_id
        self._board = board

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

    def _arrived(self) -> None:
        super()._arrived()
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

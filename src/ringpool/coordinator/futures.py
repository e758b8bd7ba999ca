"""What became of a task, and the futures that tell it.

outcome_of   a ticket and its result record -> value and error
PoolFuture   one task; a ``concurrent.futures.Future`` that can be cancelled as long as no worker has the task
TaskFuture   a ``PoolFuture`` of a file task, known by its id as well
TaskBoard    results by task id, for whoever asks later: all that were not read, or the newest 65,536 of them
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures._base import (  # pyright: ignore[reportMissingModuleSource]
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
)
from functools import partial
from typing import TYPE_CHECKING, Any

from ringpool.coordinator import signals
from ringpool.coordinator.aside import FutureCondition, can_be_told
from ringpool.coordinator.limits import Condemned
from ringpool.coordinator.tickets import QUEUED, Ticket
from ringpool.errors import RemoteError, TaskInDoubtError, WorkerDiedError
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import ResultRecord
from ringpool.workers import values

if TYPE_CHECKING:
    from ringpool.coordinator.pump import Pump

UNREAD_MAX = 65_536
_DONE = frozenset((CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED))
_CANCELLED = frozenset((CANCELLED, CANCELLED_AND_NOTIFIED))
_OK, _BLOB = int(Status.OK), int(Encoding.BLOB)  # plain integers compare faster than the enums


def outcome_of(ticket: Ticket, record: ResultRecord) -> tuple[Any, BaseException | None]:
    """Value and error of a delivered task."""
    try:
        if record.encoding == _BLOB:
            value = _value_of_blob(ticket)
        else:
            value = values.decode(record.encoding, record.payload) if record.payload else None
    except BaseException as error:  # unpickling may run anything, sys.exit too
        if is_from_signal(error):
            raise
        return None, values.undecodable(error, "unknown")
    if record.status == _OK:
        return value, None
    return None, error_of(ticket, record.status, value)


def is_from_signal(error: BaseException) -> bool:
    """Whether it is no doing of the value's: Ctrl-C, or a signal that ends the program, may come anywhere."""
    if threading.current_thread() is not threading.main_thread():
        return False
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and signals.n_ended() > 0)


def _value_of_blob(ticket: Ticket) -> Any:
    blob, ticket.result_blob = ticket.result_blob, None  # the value alone keeps the memory from here on
    if isinstance(blob, BaseException):
        raise blob
    return values.decode(*blobs.take_or_drop(blob)) if isinstance(blob, str) else values.decode(*blob)


def error_of(ticket: Ticket, status: int, value: Any) -> BaseException:
    """The error of a task without a value."""
    match status:
        case Status.ERROR if isinstance(value, str):  # there was no room for the exception itself
            type_name, _, message = value.partition(": ")
            return RemoteError(type_name, message, "")
        case Status.ERROR:
            return values.decode_error(value)
        case Status.DIED:
            return death_of(ticket.source, value)
        case Status.IN_DOUBT:
            return TaskInDoubtError(str(ticket.source), str(ticket.output))
        case _:
            return CancelledError()


def death_of(source: Any, value: Any, deaths: int | None = None) -> BaseException:
    """The error of what a worker died in: ``value`` of its record; ``deaths``, where the record does not know."""
    number, exitcode, pid, n_deaths, *limit = value
    make = Condemned(0, *limit).error if limit else WorkerDiedError
    return make(number, exitcode, pid, _name_of(source), deaths or n_deaths)


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
    as ``__cause__``, and ``WorkerDiedError`` where workers died in it. In a callback of the same pool's futures, where
    they would wait for ever, they raise ``WrongThreadError``, and in a fork of the program ``WrongProcessError``.

    Most futures are read when they are done: nobody waits in one, or has put a callback into it. So what that takes is
    made when somebody first asks for it: ``_condition``, ``_waiters`` and ``_done_callbacks`` are those of
    ``concurrent.futures.Future``, which uses them under these names. Until then the pump finishes it without a lock,
    and with ``_finishing`` it makes sure that nobody who has the condition sees the state change:

        pump:      _finishing := True        | then look for _condition
        another:   make _condition, locked   | then look at _finishing, and wait while it is set; unlock

    Where another thread keeps the condition, the pump puts the outcome aside, see ``aside``.
    """

    _condition: FutureCondition  # pyright: ignore[reportIncompatibleVariableOverride]
    _cancelling = False  # some thread is amid ``cancel``, in which Ctrl-C does not leave it

    def __init__(self, pump: Pump) -> None:  # not the base's, which makes the condition
        self._state = PENDING
        self._result = None
        self._exception = None
        self._finishing = False
        self.ticket: Ticket | None = None
        self._pump = pump

    def __getattr__(self, name: str) -> Any:
        if name == "_condition":
            return self._make_condition()
        if name in ("_waiters", "_done_callbacks"):
            return self.__dict__.setdefault(name, [])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _make_condition(self) -> FutureCondition:
        condition = FutureCondition()
        with condition:
            found: FutureCondition = self.__dict__.setdefault("_condition", condition)
            if found is condition:
                while self._finishing and self._state == PENDING:
                    time.sleep(0)  # a few bytecodes of the pump's; it takes no lock among them
            return found

    # ---- for the caller

    def done(self) -> bool:
        """Whether it was cancelled, or has a result."""
        return self._state in _DONE

    def result(self, timeout: float | None = None) -> Any:
        """The value, waiting up to ``timeout`` seconds (None: for ever)."""
        if self._state == FINISHED and self._exception is None:
            return self._result
        self._check_wait(timeout)
        try:
            return super().result(timeout)
        finally:
            del self  # or the error would lead to this frame, this to the future, and that to the error: garbage

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error or None, waiting up to ``timeout`` seconds (None: for ever)."""
        self._check_wait(timeout)
        return super().exception(timeout)

    def __repr__(self) -> str:
        text = super().__repr__()  # which asks for the state alone
        return text.replace("state=pending", "state=running") if self.running() else text

    def _check_wait(self, timeout: float | None) -> None:
        if (timeout is None or timeout > 0) and self._state not in _DONE:
            self._pump.check_process()
            self._pump.check_thread()

    def cancel(self) -> bool:
        """Keep the task from starting; False where a worker has it already, or it is done. Waits for nobody."""
        with self._condition:
            if self._state in _DONE:
                return self._state in _CANCELLED
            self._cancelling = True
            try:
                ticket = self.ticket  # read after the store above: see ``_bar_cancels``
                if ticket is None or not self._pump.keep_from_starting(ticket):
                    return False
                self._set(CANCELLED_AND_NOTIFIED)
            finally:
                self._cancelling = False
                if self._state in _DONE:  # again: Ctrl-C may have come before all were told
                    self._condition.notify_all()
        self._told()
        return True

    def _set(self, state: str, value: Any = None, error: BaseException | None = None) -> None:
        """With the condition held. What waits for it is told."""
        self._result, self._exception = value, error
        self._state = state
        for waiter in self._waiters:
            with contextlib.suppress(RuntimeError):  # a thread that Ctrl-C took out of ``wait`` has released its lock
                if not can_be_told(waiter):
                    continue
                if state == CANCELLED_AND_NOTIFIED:
                    waiter.add_cancelled(self)
                elif error is not None:
                    waiter.add_exception(self)
                else:
                    waiter.add_result(self)
        self._condition.notify_all()

    def _told(self) -> None:
        """Without the condition: callbacks may do what they like."""
        self._arrived()
        self._invoke_callbacks()

    def running(self) -> bool:
        """Whether a worker is at it."""
        ticket = self.ticket
        return not self.done() and ticket is not None and self._pump.is_running(ticket)

    # ---- for the pump

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """The task has a result."""
        value, error = outcome_of(ticket, record)
        if error is not None:
            if isinstance(error, CancelledError) and record.status == Status.CANCELLED:
                self.drop(ticket)
            else:
                self.fail(ticket, error)
            return
        self._finishing = True
        if "_condition" not in self.__dict__:
            self._result = value
            self._state = FINISHED
            self._arrived()
        else:
            self._finishing = False
            self._end(FINISHED, value)

    def fail(self, _ticket: Ticket, error: BaseException) -> None:
        """The task ended badly, or will never run."""
        self._end(FINISHED, None, error)

    def drop(self, _ticket: Ticket) -> None:
        """The task was cancelled: taken out of the queue, or not started by a worker."""
        self._end(CANCELLED_AND_NOTIFIED)

    def _end(self, state: str, value: Any = None, error: BaseException | None = None) -> None:
        """It is done, unless it was cancelled meanwhile; who waits for it may be told later."""
        if not self._pump.aside.tell(self._condition, partial(self._tell, state, value, error)):
            self._bar_cancels()

    def _tell(self, state: str, value: Any, error: BaseException | None) -> None:
        """With the condition held, which is released."""
        try:
            is_done = self._state in _DONE
            if not is_done:
                self._set(state, value, error)
        finally:
            self._condition.release()
        if not is_done:
            self._told()

    def _bar_cancels(self) -> None:
        """From here on none succeeds: the task's place in the ring will be another's. Without the condition.

        cancel:  _cancelling := True   | then look for the ticket
        pump:    no ticket             | then look at _cancelling, and wait while it is set
        """
        self.ticket = None
        while self._cancelling:
            time.sleep(0)  # it waits for nobody

    def unspoiled(self, ticket: Ticket) -> bool:
        """A worker did not start the task, because of a cancel that had come too late to be sure of: whether it is to
        be queued again, because ``cancel`` said that it runs. It is as if it had never been in the ring, then.
        """
        self._bar_cancels()
        if self._state in _DONE:
            return False
        ticket.sequence, ticket.cancelled, ticket.spared = QUEUED, False, False
        self.ticket = ticket
        return True

    def settle(self) -> None:
        """A future tells its waiters at once."""

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
        self.on_end: Callable[[], object] | None = None  # called when it is done; in whatever thread, amid anything
        self._board = board

    def result(self, timeout: float | None = None) -> Any:
        """The value, waiting up to ``timeout`` seconds (None: for ever)."""
        try:
            return super().result(timeout)
        finally:
            self._read()
            del self  # see above

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
        on_end, self.on_end = self.on_end, None  # once, and it leads to the pool
        if on_end is not None:
            on_end()


class TaskBoard:
    """Futures by task id, until they are read. Of those that are done, the newest ``UNREAD_MAX`` are kept."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may cancel a future amid any step, each of which stands alone
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

"""A run of file tasks: lazy results of lazy inputs; at most ``window`` tasks are under way, however long the input is.

FileRun:  next() <- ready <- inbox <--- pump            draws inputs only when asked for a result
                      inputs -> tickets ---> pump
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from ringpool.coordinator.futures import outcome_of
from ringpool.coordinator.inbox import Inbox
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import CoordinatorClosedError, OutputCollisionError
from ringpool.shm import layout
from ringpool.shm.results import ResultRecord

if TYPE_CHECKING:
    from ringpool.coordinator.pump import Pump

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


class RunInbox(Inbox):
    """Where the pump puts the results of a run."""

    def __init__(self, on_retired: Callable[[], None]) -> None:
        super().__init__(on_retired)
        self._targets: dict[bytes, Any] = {}  # outputs of tasks under way, with their inputs

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """A task has a result: it is decoded where it is taken, not here."""
        if self.closed:
            self.dropped()
        else:
            self.arrived.append((ticket, record))

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

    def drop(self, ticket: Ticket) -> None:
        """A task was taken out of the queue, because the pool closes."""
        self.arrived.append((ticket, CoordinatorClosedError()))


class FileRun(Iterator[FileResult]):
    """The results of a run, as they come. Inputs are drawn while results are taken, at most ``window`` ahead.

    Leaving the loop early, ``close()``, or dropping it, cancels what has not started. An error of the input iterator is
    raised when all that was drawn before it has been given out. One thread at a time takes from it.
    """

    _closed = True  # until it is whole: Ctrl-C may come in between

    def __init__(
        self, pump: Pump, inbox: RunInbox, tickets: Iterator[Ticket], window: int, check_open: Callable[[], None]
    ) -> None:
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
        self._closed = False

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

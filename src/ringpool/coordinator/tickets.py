"""A ticket: a task on its way through the coordinator, and whom its outcome is for.

made (any thread) --> backlog --> ring --> sink.deliver        all behind the backlog in the pump's thread
                         |          +----> sink.fail           it will never have a result
                         +---------------> sink.drop           taken out of the queue
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from ringpool.shm import vectors
from ringpool.shm.dispatch import Task
from ringpool.shm.results import ResultRecord
from ringpool.shm.vectors import Arena

QUEUED, LEAVING = -1, -2  # instead of a sequence


class Sink(Protocol):
    """Where a task's outcome goes. Called in the pump's thread: must be quick, and not raise."""

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """The task has a result."""
        ...

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """The task will never have one, or ``deliver`` raised; not for what has been delivered of it."""
        ...

    def drop(self, ticket: Ticket) -> None:
        """The task was taken out of the queue before it got into the ring."""
        ...

    def settle(self) -> None:
        """All that was there for now has been delivered."""
        ...


class VectorSink(Sink, Protocol):
    """A sink that takes vectors too. ``counts_items``: it counts what has ended, item by item. ``overdue_ns``: what
    there is of a vector that is under way for so long is to be delivered early.
    """

    counts_items: bool
    overdue_ns: int

    def deliver_vector(self, ticket: Ticket, record: ResultRecord, arena: Arena, blob: str) -> list[Ticket]:
        """A vector has come back, its outcomes in ``arena``, or one of them in ``blob``. What is to be run again of it,
        or for the first time.
        """
        ...

    def deliver_early(self, ticket: Ticket, arena: Arena, spent_ns: int, worker: int) -> bool:
        """A vector has been under way for long: take what there is of its outcomes; whether there was anything new."""
        ...


class Part(msgspec.Struct, eq=False):
    """What a vector's ticket is about: items [first, end) of those that ``items`` holds.

    ``index``: of item 0 in its map. ``splits``: whether a part may be taken away. ``deaths``: of workers, in its first
    item. ``chunk``: of the arena, while it is in the ring. ``taken``: outcomes that were, before its end, and
    ``taken_ns``: what they took.
    """

    items: bytes
    encoding: int
    index: int
    first: int
    end: int
    splits: bool = True
    deaths: int = 0
    chunk: int | None = None
    taken: vectors.Done = vectors.Done()
    taken_ns: int = 0

    @property
    def n(self) -> int:
        """How many items."""
        return self.end - self.first

    def span(self, chunk: int) -> vectors.Span:
        """What the task's payload says."""
        return vectors.Span(chunk, self.first, self.end, len(self.items), self.encoding)

    def of(self, first: int, end: int, deaths: int = 0) -> Part:
        """A part of it, not in the ring."""
        return Part(self.items, self.encoding, self.index, first, end, self.splits, deaths)

    def seal(self) -> None:
        """It goes into the ring: nothing is added any more."""


class Ticket(msgspec.Struct, eq=False):
    """A task on its way through the coordinator. ``sequence``: in the ring, from when it is published; -1 before.

    Before that it is ``LEAVING`` for as long as the pump puts it there. ``slot``: in the ring, set before ``sequence``.
    ``first_sequence``: when it was taken out of the ring, that which it had there at first; else -1.
    ``cancelled``: it is not to be published. ``spared``: its cancel came too late to be sure of; if a worker heeded it
    all the same, the task is queued again. ``source`` and ``output`` as the caller gave them; ``target``: the output's
    absolute path; ``result_blob``: encoding, body and buffers of a result that is too large for its record, or its
    name, or the error of reading it.
    ``attempts_max``: how often it may be started whose workers die in it; ``timeout_s``: how long it may run;
    ``starved``: its worker was killed for its memory. ``priority``: higher first; ``part``: of a vector; ``index``: of
    an item in its map.
    """

    task: Task
    sink: Any  # a Sink; msgspec takes no protocol
    source: Any
    output: Any
    target: bytes | None = None
    result_blob: Any = None
    sequence: int = QUEUED
    slot: int = -1
    first_sequence: int = -1
    cancelled: bool = False
    spared: bool = False
    attempts_max: int = 1
    timeout_s: float | None = None
    starved: bool = False
    priority: int = 0
    part: Part | None = None
    index: int = 0

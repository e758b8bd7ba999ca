"""From the backlog into the ring, and what is in there.

    queue (any thread) --> backlog --publish--> ring, each with its ticket --the pump--> delivered
                              ^------------- requeue, put_back ---------------+

The items of a vector go into a chunk of the arena first. Where none is free, it waits, and so do all behind it. Where
priorities differ, ``Precedence`` says how many may enter.
"""

from __future__ import annotations

from collections.abc import Callable

from ringpool.coordinator.backlog import Backlog
from ringpool.coordinator.parcels import Parcels
from ringpool.coordinator.precedence import Precedence
from ringpool.coordinator.tickets import LEAVING, QUEUED, Ticket
from ringpool.shm import layout
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.vectors import Arena, pack_span

PUBLISH_MAX = 256


class Publisher:
    """Publishes at ``end``; ``expect(timeout_s)`` is told of each task with a timeout. For the pump's thread alone, but
    for the attributes, and for ``give_up`` once that thread has ended.

    Attributes: ``backlog``; ``tickets``, by slot, of what is in the ring; ``arena`` (set by who queues vectors, before
    the first); ``in_ring`` and ``n_vectors`` (int), how many of each are there.
    """

    def __init__(self, end: CoordinatorEnd, parcels: Parcels, expect: Callable[[float], None]) -> None:
        self.backlog: Backlog[Ticket] = Backlog()
        self.tickets: list[Ticket | None] = [None] * end.ring.slots
        self.arena: Arena | None = None
        self.in_ring = self.n_vectors = 0
        self._end = end
        self._parcels = parcels
        self._expect = expect
        self._precedence = Precedence(end, self.tickets)
        self._out_of_chunks = False  # the first in the backlog is a vector, and waits for a chunk
        self._is_deep = False  # somebody was overtaken, and enough is in the ring
        self._leaving: list[Ticket] = []  # out of the backlog, and not yet in the ring

    @property
    def is_held_up(self) -> bool:
        """Whether somebody waits for room in the ring until others whom he outranks are out of it."""
        return self._is_deep

    @property
    def may_publish(self) -> bool:
        """Whether ``publish`` would find something that can enter."""
        return bool(self.backlog) and self._end.n_free > 0 and not (self._out_of_chunks or self._is_deep)

    def ticket_of(self, entry: int) -> Ticket | None:
        """The ticket of a task in the ring."""
        slot = layout.slot_of(entry)
        ticket = self.tickets[slot] if 0 <= slot < len(self.tickets) else None
        return ticket if ticket is not None and ticket.sequence == layout.sequence_of(entry) else None

    def publish(self) -> bool:
        """Move tasks from the backlog into the ring, as far as it has room; whether there were any."""
        backlog, end = self.backlog, self._end
        self._out_of_chunks = self._is_deep = False
        if not backlog:
            return False
        while backlog:
            n = min(end.n_free, PUBLISH_MAX, len(backlog))
            first = backlog.peek() if backlog.has_priorities else None
            if first is not None:  # also where the ring is full: who is overtaken there makes room
                room = self._precedence.room(first, self.in_ring)
                self._is_deep = room <= 0
                n = min(n, room)
            if n <= 0:
                break
            self.in_ring += n  # before they leave the backlog: whoever waits for both to be empty must not see a gap
            batch, tasks = self._take(n, 0 if first is None else first.priority)
            self.in_ring -= n - len(batch)
            sequence = end.published
            slots = end.publish(tasks)
            for ticket, slot in zip(batch, slots, strict=True):
                self.tickets[slot] = ticket
                ticket.slot = slot
                ticket.sequence = sequence
                sequence += 1
            self._leaving = []
            if batch and backlog.has_priorities:
                self._precedence.entered(batch)
            if self._out_of_chunks:
                break
        return True

    def _take(self, n: int, highest: int) -> tuple[list[Ticket], list[Task]]:
        """Up to ``n`` tickets of the backlog, with what is to be published for them. None above priority ``highest``:
        whoever has come since that was looked at overtakes others first.
        """
        batch = self._leaving = list[Ticket]()  # should anything here raise, these are not lost
        tasks: list[Task] = []
        backlog = self.backlog
        for _ in range(n):
            if backlog.has_priorities and (first := backlog.peek()) is not None and first.priority > highest:
                break
            ticket = backlog.popleft()
            batch.append(ticket)
            ticket.sequence = LEAVING
            if ticket.cancelled:
                ticket.sequence = QUEUED
                batch.pop()
                self._parcels.discard_payload(ticket.task)
                continue
            task = ticket.task
            if ticket.part is not None:
                placed = self._place(ticket)
                if placed is None:
                    self._out_of_chunks = True
                    ticket.sequence = QUEUED
                    backlog.append_front([batch.pop()])
                    break
                task = placed
            if ticket.timeout_s is not None:
                self._expect(ticket.timeout_s)
            tasks.append(task)
        return batch, tasks

    def _place(self, ticket: Ticket) -> Task | None:
        """Put a vector's items into a chunk; None where none is free."""
        part, arena = ticket.part, self.arena
        assert part is not None
        assert arena is not None, "a vector without an arena"
        chunk = arena.take()
        if chunk is None:
            return None
        part.chunk = chunk
        part.seal()
        span = part.span(chunk)
        arena.write(span, part.items)
        self.n_vectors += 1
        return Task(ticket.task.function, pack_span(span), 0, ticket.task.form)

    # ---- out of the ring again

    def left(self, slot: int, sequence: int) -> None:
        """A task has come back, in whatever way. Until it is known what becomes of it, it counts as in the ring."""
        self.tickets[slot] = None
        if self.backlog.has_priorities:
            self._precedence.left(sequence)

    def put_back(self, ticket: Ticket, sequence: int) -> None:
        """A task was taken out of the ring, where it had ``sequence``, and is to go there again, in its turn."""
        if ticket.first_sequence < 0:
            ticket.first_sequence = sequence
        self.backlog.put_back(ticket, ticket.first_sequence)
        self.in_ring -= 1  # after that, here and for vectors: see ``publish``

    def vector_left(self, chunk: int, again: list[Ticket]) -> None:
        """A vector is at its end: its chunk is free, and what of it is to be run ``again`` is queued."""
        assert self.arena is not None
        self.arena.give(chunk)
        self._out_of_chunks = False
        self.n_vectors -= 1
        self.requeue(again)
        self.in_ring -= 1

    def requeue(self, tickets: list[Ticket]) -> None:
        """At the front: what comes back was there before all that waits."""
        self.backlog.append_front(tickets)

    def give_up(self) -> list[Ticket]:
        """All that are in the ring, or wait for it; from then on none is."""
        leaving, self._leaving = self._leaving, []
        for ticket in leaving:  # so that a callback that cancels one of them does not wait for it
            ticket.sequence = QUEUED
        waiting = [ticket for ticket in self.tickets if ticket is not None] + leaving
        self.tickets[:] = [None] * len(self.tickets)
        waiting += self.backlog.drain()
        self.in_ring = 0
        return waiting

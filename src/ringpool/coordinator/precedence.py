"""Higher priorities overtake what is in the ring already: calls that nobody has started are taken out of it again.

    the next of the backlog outranks some in the ring --> those are refused, come back CANCELLED, and are queued again,
                                                          before all of their priority that were not in the ring
    until they are back, or turn out to run               only who outranks them enters the ring
    for a second                                          few tasks are in the ring: so many come back at a time

Workers run what is in the ring in its order. It holds a thousand tasks where nobody is overtaken, so that workers have
them at hand. Vectors, and what is no call, are not taken out: of these few are in the ring at a time.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ringpool.coordinator.futures import PoolFuture
from ringpool.shm import layout

if TYPE_CHECKING:
    from ringpool.coordinator.tickets import Ticket
    from ringpool.shm.dispatch import CoordinatorEnd

CALM_S = 1.0
DEEP = 16  # tasks in the ring for each worker, until nobody was overtaken for so long
STARTED_NS = 5_000_000  # who has been at a task for so long has not heeded that it was refused


class Precedence:
    """Of the tasks in the ring of ``end``, whose ``tickets`` stand in their slots. Used by the pump's thread alone."""

    def __init__(self, end: CoordinatorEnd, tickets: Sequence[Ticket | None]) -> None:
        self._end = end
        self._tickets = tickets
        self._lowest = 0  # no lower priority is in the ring
        self._refused: set[int] = set()  # sequences of those that are to come back
        self._highest_refused = 0
        self._calm_from_s = -math.inf

    def room(self, first: Ticket, in_ring: int) -> int:
        """How many tasks may enter the ring, ``first`` before the others, while ``in_ring`` are in it."""
        if first.priority > self._lowest:
            self._lowest = first.priority
            if self._refuse_below(first.priority):
                self._calm_from_s = time.monotonic() + CALM_S
        if self._refused:
            self._refused -= self._started()
        if self._refused:
            return int(first.priority > self._highest_refused)
        if time.monotonic() > self._calm_from_s:
            return self._end.ring.slots
        return DEEP * self._end.ring.workers - in_ring

    def entered(self, tickets: Iterable[Ticket]) -> None:
        """They have entered the ring."""
        self._lowest = min(self._lowest, *(ticket.priority for ticket in tickets))

    def left(self, sequence: int) -> None:
        """A task has left the ring, in whatever way."""
        self._refused.discard(sequence)

    def _refuse_below(self, priority: int) -> bool:
        """Keep those of lower priority from starting; whether there were any. What runs already, does.

        The last one first: workers go on meanwhile, and who skips what is refused is not to come to what is not yet.
        """
        refused = self._refused
        lower = [
            ticket
            for ticket in self._tickets
            if ticket is not None
            and ticket.priority < priority
            and ticket.part is None
            and not ticket.spared
            and isinstance(ticket.sink, PoolFuture)
        ]
        if not refused:
            self._highest_refused = -sys.maxsize
        for ticket in sorted(lower, key=lambda ticket: -ticket.sequence):
            ticket.spared = True  # so it is queued again when it comes back, unless it is cancelled until then
            self._end.refuse(ticket.slot, ticket.sequence)
            refused.add(ticket.sequence)
            self._highest_refused = max(self._highest_refused, ticket.priority)
        return bool(refused)

    def _started(self) -> set[int]:
        """The sequences of what runs, and may do so for long: nobody waits for it."""
        ring, now_ns = self._end.ring, time.monotonic_ns()
        started: set[int] = set()
        for worker in range(ring.workers):
            base = ring.worker_word(worker, 0)
            since_ns = ring.words[base + layout.W_TASK_START]  # to come, while it imports what it is to call
            if not 0 <= now_ns - since_ns < STARTED_NS:
                started.add(layout.sequence_of(ring.words[base + layout.W_RUNNING] - 1))
        return started

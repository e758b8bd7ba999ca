"""The queue of what waits to get into the ring: by priority, and in order within each.

    append (any thread) ---priority 0--> plain (deque) ------------------------+
                        +--any other---> arrived (deque) --the pump--> ranked --+--> popleft (the pump)
    append_front, put_back, remove_if (the pump) --------------------> ranked

    ranked   a heap of (-priority, order, ticket). The order counts up for what was appended, and down from 0 for what
             came back to the front: no two are the same, so that tickets are never compared
    next     the first of ranked, if its priority is 0 or more; else the first of plain; else the first of ranked.
             What is in ranked with priority 0 was there before all that is in plain

There is no lock, which Ctrl-C could leave held. Whoever appends does single steps: a store, a ``deque.append``. The
pump adds a ticket at its new place before it takes it from the old one, and the length is read in that direction: it
may be too large for a moment, and is never too small.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar


class Prioritized(Protocol):
    """What a ticket must have."""

    @property
    def priority(self) -> int:
        """Higher first."""
        ...


T = TypeVar("T", bound=Prioritized)
_BEFORE = 1 << 60  # more than the orders that there can be


class Backlog(Generic[T]):
    """Tickets in the order in which they are to go. ``append``, ``tickets``, ``len`` and ``bool`` are for any thread,
    and ``drain`` is once the pump's has ended; all else is for the pump's. ``has_priorities`` (bool): whether a ticket
    with a priority other than 0 was ever in it.
    """

    __slots__ = ("_arrived", "_first", "_last", "_plain", "_ranked", "has_priorities")

    def __init__(self) -> None:
        self.has_priorities = False
        self._plain: deque[T] = deque()
        self._arrived: deque[T] = deque()
        self._ranked: list[tuple[int, int, T]] = []
        self._first = self._last = 0  # orders given

    def __len__(self) -> int:
        return len(self._plain) + len(self._arrived) + len(self._ranked)

    def __bool__(self) -> bool:
        if self._plain or self._arrived:  # each looked at once: what was full may be empty at a second look
            return True
        return bool(self._ranked)

    def tickets(self) -> list[T]:
        """All, as they are now; for any thread. One that is at two places for a moment is there twice."""
        return [*self._plain, *self._arrived, *(ticket for _, _, ticket in self._ranked.copy())]

    def append(self, ticket: T) -> None:
        """At the end of its priority."""
        if ticket.priority:
            self.has_priorities = True
            self._arrived.append(ticket)
        else:
            self._plain.append(ticket)

    def append_front(self, tickets: Sequence[T]) -> None:
        """At the front of their priorities, in their order."""
        for ticket in reversed(tickets):
            if ticket.priority:
                self.has_priorities = True
            self._first -= 1
            heapq.heappush(self._ranked, (-ticket.priority, self._first, ticket))

    def put_back(self, ticket: T, sequence: int) -> None:
        """Before all of its priority that were not in the ring; among those, by the first ``sequence`` there."""
        heapq.heappush(self._ranked, (-ticket.priority, sequence - _BEFORE, ticket))

    def popleft(self) -> T:
        """The next one. Raises ``IndexError`` where there is none."""
        if (self._ranked or self._arrived) and self._next_is_ranked():
            return heapq.heappop(self._ranked)[2]
        return self._plain.popleft()

    def peek(self) -> T | None:
        """What ``popleft`` would give, or None."""
        if self._next_is_ranked():
            return self._ranked[0][2]
        return self._plain[0] if self._plain else None

    def drain(self) -> list[T]:
        """All, in order; it is empty then. Where several threads do this at once, each ticket goes to one of them."""
        ranked = _emptied(self._ranked.pop)
        ranked.sort()
        tickets = [ticket for _, _, ticket in ranked]
        tickets += _emptied(self._arrived.popleft)
        tickets += _emptied(self._plain.popleft)
        tickets.sort(key=lambda ticket: -ticket.priority)
        return tickets

    def remove_if(self, predicate: Callable[[T], bool]) -> list[T]:
        """Take out those for which it is true, and return them in order. Where it raises, nothing is taken out."""
        self._rank_arrived()
        plain = list(self._plain)
        first = self._last + 1
        entries = self._ranked + [(0, order, ticket) for order, ticket in enumerate(plain, first)]
        kept: list[tuple[int, int, T]] = []
        removed: list[T] = []
        for entry in sorted(entries):
            if predicate(entry[2]):
                removed.append(entry[2])
            else:
                kept.append(entry)
        if removed:
            self._last += len(plain)
            self._ranked = kept  # sorted, and so a heap
            for _ in plain:
                self._plain.popleft()
        return removed

    def _next_is_ranked(self) -> bool:
        self._rank_arrived()
        return bool(self._ranked) and (self._ranked[0][0] <= 0 or not self._plain)

    def _rank_arrived(self) -> None:
        arrived = self._arrived
        while arrived:
            ticket = arrived[0]
            self._last += 1
            heapq.heappush(self._ranked, (-ticket.priority, self._last, ticket))
            arrived.popleft()


V = TypeVar("V")


def _emptied(take: Callable[[], V]) -> list[V]:
    """All that ``take`` gives until there is no more; other threads may be at the same."""
    taken: list[V] = []
    try:
        while True:
            taken.append(take())
    except IndexError:
        return taken

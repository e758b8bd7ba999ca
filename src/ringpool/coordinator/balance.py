"""No task waits behind a slow neighbour: what a worker has claimed and not begun goes to others.

    a claim of several tasks that has not moved for 20 ms      its unstarted tasks go back to the ring
    a vector of files that has been at one of them for 20 ms   those behind that one go to the front of the queue
    a vector of many items, while some worker is idle          the items that it has not come to are shared out
    a vector of a map that takes far longer than it was to     so do those behind the item that it is at
    a vector that is overdue: 20 ms, or as long as they take   the outcomes that it has so far are handed over

Used by the pump's thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from ringpool.coordinator.tickets import Part, Sink, Ticket
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.vectors import Arena

TAKE_BACK_AFTER_S = 0.02  # a claim of several tasks that has not moved for so long is broken up
WATCH_BEFORE_S = 0.75 * TAKE_BACK_AFTER_S  # who is awake then looks at once, and need not wake up for that
TOO_LONG_NS = 40_000_000  # longer than it was to take: such a vector ends with the item that it is at
SPLIT_WORTH_NS = 300_000  # what is left of a vector must be expected to take so long, or it is left alone
SPLIT_LOOK_S = 0.005  # how often the pump looks, while vectors are in the ring and somebody has nothing to do


class Balance:
    """Watches the claims of the workers of ``end``; ``ticket_of`` gives the ticket of an entry, or None."""

    def __init__(self, end: CoordinatorEnd, ticket_of: Callable[[int], Ticket | None]) -> None:
        self.n_taken_back = 0
        self._end = end
        self._ticket_of = ticket_of
        self._claims: list[int] = [0] * end.ring.workers
        self._items: dict[int, tuple[int, int]] = {}  # by worker: a vector's sequence, and the file that it was at
        self._watched_at = time.monotonic()

    @property
    def watch_in_s(self) -> float:
        """In how many seconds it is time to look again."""
        return max(0.0, self._watched_at + TAKE_BACK_AFTER_S - time.monotonic())

    def watch_claims(self) -> bool:
        """Break up claims of several tasks that do not move: a long one has got in among short ones. Whether it was
        time to look.

        Where results are retained, for a job, nobody waits for one task: its claims are long, because outputs are
        committed together, and are broken up only when somebody has nothing to do; or when ``/dev/shm`` is nearly full,
        for somebody may wait for room there, and the results that a claim holds are nobody's until it ends.
        """
        now = time.monotonic()
        if now - self._watched_at < WATCH_BEFORE_S:
            return False
        self._watched_at = now
        ring = self._end.ring
        if self._end.retains and not self.is_anybody_idle() and not blobs.is_room_short():
            return True
        for worker in range(ring.workers):
            claim = ring.words[ring.worker_word(worker, layout.W_CLAIM)]
            if claim == self._claims[worker] and claim & layout.CLAIM_COUNT_MASK > 1:
                self.n_taken_back += self._end.take_back(worker)
            self._claims[worker] = claim
        return True

    def is_anybody_idle(self) -> bool:
        """Whether a worker has nothing to do, and nothing is in the ring for it."""
        cursors = self._end.ring.peek()
        is_dry = cursors.ready_tail == cursors.ready_head and cursors.retry_tail == cursors.retry_head
        return is_dry and cursors.parked | cursors.spinning != 0

    def deliver_overdue(self, arena: Arena) -> list[Sink]:
        """What there is of vectors that have been under way for long goes to their sinks; to which."""
        sinks: list[Sink] = []
        now_ns = time.monotonic_ns()
        for worker, ticket, began_ns in self._running_vectors():
            spent_ns = now_ns - began_ns
            if spent_ns > ticket.sink.overdue_ns and ticket.sink.deliver_early(ticket, arena, spent_ns, worker):
                sinks.append(ticket.sink)
        return sinks

    def relieve_vectors(self, arena: Arena) -> list[Ticket]:
        """What waits in a vector behind a file that takes long, as new tickets; to be called when claims were watched.

        Not only when somebody is idle: that may be never, while more files come. Of a map they stay, where whoever
        takes its results in order waits for the long one anyway; but not in a vector that turns out to be far longer
        than it was to be, because its items have become so: what else is in the ring would wait for all of them.
        """
        items: dict[int, tuple[int, int]] = {}
        taken: list[Ticket] = []
        now_ns = time.monotonic_ns()
        for worker, ticket, began_ns in self._running_vectors():
            part = ticket.part
            assert part is not None
            assert part.chunk is not None
            if (
                not ticket.sink.counts_items
                and now_ns - began_ns > ticket.sink.overdue_ns + TOO_LONG_NS
                and part.splits
            ):
                rest = _cut(arena, part, lambda _n: 0)
                if rest is not None:
                    self.n_taken_back += rest.n
                    taken.append(_ticket_of(ticket, rest))
            if not ticket.sink.counts_items or self._end.ring.workers == 1:
                continue
            at = ticket.sequence, arena.progress(part.span(part.chunk))
            if self._items.get(worker) == at and at[1] + 1 < part.end:
                rest = _cut(arena, part, lambda _n: 0)
                if rest is not None:
                    self.n_taken_back += 1
                    taken.append(_ticket_of(ticket, rest))
            items[worker] = at
        self._items = items
        return taken

    def _running_vectors(self) -> Iterator[tuple[int, Ticket, int]]:
        """Workers, the vectors that they are at, and since when (CLOCK_MONOTONIC, ns)."""
        ring = self._end.ring
        for worker in range(ring.workers):
            ticket = self._ticket_of(ring.words[ring.worker_word(worker, layout.W_RUNNING)] - 1)
            if ticket is not None and ticket.part is not None and ticket.part.chunk is not None:
                yield worker, ticket, ring.words[ring.worker_word(worker, layout.W_TASK_START)]

    def cut_short(self, arena: Arena, tickets: Iterable[Ticket | None]) -> list[Ticket]:
        """What no worker has come to of the vectors that are in the ring, as new tickets: each ends with the item that
        it is at.
        """
        taken: list[Ticket] = []
        for ticket in tickets:
            if ticket is not None and ticket.part is not None and ticket.part.chunk is not None:
                rest = _cut(arena, ticket.part, lambda _n: 0)
                if rest is not None:
                    taken.append(_ticket_of(ticket, rest))
        return taken

    def refuse_claimed(self) -> None:
        """Have cancelled what workers have claimed and not begun, but for the first of a claim that is just made."""
        ring = self._end.ring
        for worker in range(ring.workers):
            entries = ring.claimed(worker)
            running = ring.words[ring.worker_word(worker, layout.W_RUNNING)] - 1
            at = entries.index(running) if running in entries else 0
            for entry in entries[at + 1 :]:
                if self._ticket_of(entry) is not None:
                    self._end.refuse(layout.slot_of(entry), layout.sequence_of(entry))

    def split_vectors(self, arena: Arena) -> list[Ticket]:
        """While workers are idle and nothing waits: parts of vectors that others are at, as new tickets."""
        ring = self._end.ring
        cursors = ring.peek()
        n_idle = (cursors.parked | cursors.spinning).bit_count()
        if not n_idle or cursors.ready_tail != cursors.ready_head or cursors.retry_tail != cursors.retry_head:
            return []
        taken: list[Ticket] = []
        now_ns = time.monotonic_ns()
        for _, ticket, began_ns in self._running_vectors():
            assert ticket.part is not None
            part = self._split(arena, ticket.part, now_ns - began_ns, n_idle) if ticket.part.splits else None
            if part is not None:
                self.n_taken_back += part.n
                taken.append(_ticket_of(ticket, part))
        return taken

    @staticmethod
    def _split(arena: Arena, part: Part, elapsed_ns: int, n_idle: int) -> Part | None:
        assert part.chunk is not None
        span = part.span(part.chunk)
        n_done = arena.progress(span) - part.first
        n_left = part.n - n_done - 1
        if n_left < 1 or elapsed_ns / (n_done + 1) * n_left < SPLIT_WORTH_NS:
            return None
        return _cut(arena, part, lambda n: n // (n_idle + 1))


def _cut(arena: Arena, part: Part, share: Callable[[int], int]) -> Part | None:
    """What is taken from the worker that runs ``part``: it keeps ``share(n)`` of the ``n`` that it has not come to."""
    assert part.chunk is not None
    end = arena.split(part.span(part.chunk), share)
    if end >= part.end:
        return None
    taken = part.of(end, part.end)
    part.end = end
    return taken


def _ticket_of(ticket: Ticket, part: Part) -> Ticket:
    """A ticket for what was taken of another's part."""
    return Ticket(ticket.task, ticket.sink, ticket.source, None, priority=ticket.priority, part=part)

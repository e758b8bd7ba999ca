"""The workers of a pool, as the pump sees them: hired when tasks wait, watched for limits, replaced when they end.

tasks wait, nobody is free --hire--> Supervisor.start      where workers are started on demand
a task overruns its limits --watch-> Limits kills its worker
a death ---------------------settle-> Estates: what becomes of its tasks --> Supervisor.start, in its place
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from ringpool.coordinator.estate import Estates
from ringpool.coordinator.limits import Limits
from ringpool.coordinator.supervisor import Death, Supervisor
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import RingpoolError
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.layout import CLAIM_COUNT_MASK, W_CLAIM, W_PID

SLOW_TO_CLAIM_S = 0.2  # who has been free for so long, and takes nothing of what waits, is not


class Staff:
    """Used by the pump's thread alone, except ``supervisor``, which is set before that begins, and the counts.

    ``n_started``: so many are started by whoever makes the supervisor, the others when tasks wait for them, which is
    ``on_demand``.
    ``on_exit(death, reason)`` is told of each that ended. ``leaving``: they end because they were told to.
    """

    def __init__(
        self,
        end: CoordinatorEnd,
        ticket_of: Callable[[int], Ticket | None],
        n_started: int,
        on_demand: bool,
        memory_limit_bytes: int | None,
        on_exit: Callable[[Death, str], None] | None,
    ) -> None:
        self.supervisor: Supervisor | None = None
        self.n_deaths = self.n_retried = self.n_recycled = 0
        self.leaving = False
        self.on_demand = on_demand
        self.limits = Limits(end, memory_limit_bytes, lambda entry: _timeout_of(ticket_of(entry)))
        self._end = end
        self._n_started = n_started
        self._on_exit = on_exit
        self._n_claims = -1  # when a task was first seen to wait since the last claim; and when that was
        self._waits_since_s = 0.0
        self._estates = Estates(end, ticket_of, self.limits.why)

    def on_their_way(self) -> int:
        """How many workers were started and have not come to the ring yet."""
        ring = self._end.ring
        return sum(not ring.words[ring.worker_word(w, W_PID)] for w in range(self._n_started))

    def hire(self) -> None:
        """Start as many of the workers not yet started as there are tasks that no worker is free for. Free is whoever
        has claimed nothing: it sleeps, looks, has just been woken, or is on its way. But where tasks wait and nobody
        takes any, those at the ring are stopped, or linger at their end.
        """
        ring, supervisor = self._end.ring, self.supervisor
        if self._n_started == ring.workers or supervisor is None or self.leaving:
            return
        n_free = sum(not ring.words[ring.worker_word(w, W_CLAIM)] & CLAIM_COUNT_MASK for w in range(self._n_started))
        cursors = ring.peek()  # after that: what one of them has claimed meanwhile waits no more
        waiting = cursors.ready_tail - cursors.ready_head + cursors.retry_tail - cursors.retry_head
        if not waiting:
            self._n_claims = -1
            return
        n_claims = cursors.ready_head + cursors.retry_head
        if n_claims != self._n_claims:
            self._n_claims, self._waits_since_s = n_claims, time.monotonic()
        elif n_free and time.monotonic() - self._waits_since_s > SLOW_TO_CLAIM_S:
            n_free = self.on_their_way()
        for _ in range(min(waiting - n_free, ring.workers - self._n_started)):
            supervisor.start(self._n_started)
            self._n_started += 1

    def settle(self, death: Death) -> RingpoolError | None:
        """Settle what the worker held, and have it replaced; or what that says of the pool: it is broken."""
        estate = self._estates.settle(death)
        if self.leaving:
            return None
        if estate.reason == "recycled":
            self.n_recycled += 1
        else:
            self.n_deaths += 1
        self.n_retried += estate.n_retried
        if self._on_exit is not None and death.pid:  # else there was no process
            try:
                self._on_exit(death, estate.reason)
            except BaseException:  # it may raise what it likes; it must not stop the pool
                traceback.print_exc()
        if estate.broken is None and self.supervisor is not None:
            self.supervisor.start(death.index)
        return estate.broken


def _timeout_of(ticket: Ticket | None) -> float | None:
    return None if ticket is None else ticket.timeout_s

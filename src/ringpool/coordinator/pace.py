"""How long the pump sleeps, and how many results wake it.

results come in crowds   the clock wakes it, which costs the workers nothing; a post to an idle core can cost them
                         100 us, and each look some 0.4 ms of the cores that they have
else                     the first result does; or it looks sooner, where a worker has nothing to do, somebody
                         waits behind a long task, or items were drawn and are not sent
"""

from __future__ import annotations

import time

from ringpool.coordinator.balance import SPLIT_LOOK_S, TAKE_BACK_AFTER_S, Balance
from ringpool.shm.dispatch import CoordinatorEnd

IDLE_WAIT_S = 0.1
COLLECT_EVERY_S = 0.016  # how long results may wait for company, while the workers have more to do ...
CROWD = 3  # ... and so many arrive in that time ...
CROWD_OF_VECTORS = 1.5  # ... of short items
RATED_OVER_S = 0.01


class Pace:
    """Has ``end`` sleep, the coordinator's. ``n_results``: that have arrived, ever; the pump counts them."""

    def __init__(self, end: CoordinatorEnd, balance: Balance) -> None:
        self.n_results = 0
        self._end = end
        self._balance = balance
        self._rate_per_s = 0.0
        self._n_rated = 0
        self._rated_at_s = time.monotonic()

    def sleep(self, n_in_ring: int, look_s: float | None, *, has_vectors: bool, is_held_up: bool, holds: bool) -> None:
        """Until there is something to do, or ``look_s`` seconds are over (None: without that limit).

        ``n_in_ring``: tasks there; ``has_vectors``: some of them are; ``is_held_up``: somebody of a higher priority
        waits for room; ``holds``: items were drawn that may have to be sent without those that follow.
        """
        watch_in_s = self._balance.watch_in_s if has_vectors else IDLE_WAIT_S
        look_s = watch_in_s if look_s is None else min(look_s, watch_in_s)
        if self._results_per_s() * COLLECT_EVERY_S >= (CROWD_OF_VECTORS if has_vectors else CROWD):
            wait_s = look_s if has_vectors else min(COLLECT_EVERY_S, look_s)  # of vectors by the looks, as often
            self._end.wait(wait_s, max(1, n_in_ring // 2), wait_s)
            return
        is_look_due = holds or (has_vectors and self._balance.is_anybody_idle())  # who is idle later posts a result
        wait_s = SPLIT_LOOK_S if is_look_due else TAKE_BACK_AFTER_S if n_in_ring > 1 or is_held_up else IDLE_WAIT_S
        self._end.wait(min(wait_s, look_s), 1, 0)

    def _results_per_s(self) -> float:
        """How many results arrive, by the last tens of milliseconds."""
        now_s = time.monotonic()
        elapsed_s = now_s - self._rated_at_s
        if elapsed_s > RATED_OVER_S:
            self._rate_per_s += ((self.n_results - self._n_rated) / elapsed_s - self._rate_per_s) / 2
            self._n_rated, self._rated_at_s = self.n_results, now_s
        return self._rate_per_s

"""How many items go together in a vector, and how many are under way, by how long the last ones took."""

from __future__ import annotations

import time
from collections.abc import Callable

from ringpool.shm import vectors

VECTOR_NS = 16_000_000  # work in a vector: so that what it costs is a hundredth of it ...
LONG_NS = 500_000  # ... of items that take less than this. Of others half as much at first, which costs them no more;
VECTOR_NS_MAX = 32_000_000  # and up to this in a run that goes on: each look of its parent's takes from the workers,
ELAPSED_SHARE = 8  # and results come at the latest after this part of the time that it has taken so far
OVERDUE_NS = 20_000_000  # what there is of a vector is handed over after this, or the time that vectors are to take
UNDER_WAY_NS = 40_000_000  # work under way for each worker: longer than another thread may keep the pump from running
UNDER_WAY_ITEMS_MAX = 32_768
VECTOR_ITEMS_MAX = 4096
GROWTH_MAX = 16  # from one size of vectors to the next: a first, short task may not be like the others
RESULT_BYTES = vectors.CHUNK_BYTES // 3  # in a vector
SHARE_ITEMS = 32  # over about so many the share is taken ...
SHARE_MAX = 1 / 8  # ... of those with which vectors end: above that, what is left of vectors costs more than they save
REFILL_AT = 0.75  # of what may be under way: below that, more is sent


class Sizer:
    """How many items make a vector, by how long the last ones took and how large their results were.

    ``fixed``: so many, whatever they take; None: by itself. ``clock_ns``: of the run, which begins now.
    """

    def __init__(self, fixed: int | None, n_workers: int, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._began_ns = clock_ns()
        self._fixed = fixed
        self._n_workers = n_workers
        self._ns = self._items = self._bytes = 0.0
        self._n = 1
        self._share_ending = 0.0

    def observe(self, spent_ns: int, n: int, n_bytes: int, n_ending: int = 0) -> None:
        """``n`` items have arrived that took so long, with so many bytes of results. ``n_ending``: how many of the
        results do not fit into a vector, which ends with such a one; what is left of it is sent again.
        """
        if spent_ns:
            weight = min(1.0, n / SHARE_ITEMS) if self._items else 1.0
            self._share_ending += (n_ending / n - self._share_ending) * weight
            self._ns = self._ns * 0.75 + spent_ns
            self._items = self._items * 0.75 + n
            self._bytes = self._bytes * 0.75 + n_bytes

    @property
    def has_seen_any(self) -> bool:
        """Whether it is known how long they take."""
        return self._items > 0

    @property
    def mean_ns(self) -> float:
        """What one takes, 0 where nothing is known."""
        return self._ns / self._items if self._items else 0.0

    @property
    def _vector_ns(self) -> float:
        """How much work a vector is to be."""
        if self.mean_ns < LONG_NS:
            return VECTOR_NS
        return min(max(VECTOR_NS / 2, (self._clock_ns() - self._began_ns) / ELAPSED_SHARE), VECTOR_NS_MAX)

    @property
    def overdue_ns(self) -> int:
        """After how long what there is of a vector is handed over."""
        return max(OVERDUE_NS, int(self._vector_ns))

    @property
    def n(self) -> int:
        """Items for the next vector."""
        if self._fixed is not None:
            return self._fixed
        if self._items:
            wanted = self._vector_ns / (self.mean_ns + 1)
            wanted = min(wanted, RESULT_BYTES / max(1.0, self._bytes / self._items))
            if self._share_ending:
                wanted = min(wanted, 1 / self._share_ending) if self._share_ending < SHARE_MAX else 1
            self._n = max(1, min(int(wanted), self._n * GROWTH_MAX, VECTOR_ITEMS_MAX))
        return self._n

    @property
    def under_way_max(self) -> int:
        """Items that may be under way."""
        n = self.n
        least = (2 * self._n_workers + 2) * n
        if not self._items:
            return least
        wanted = int(self._n_workers * UNDER_WAY_NS / (self.mean_ns + 1))
        return max(least, min(wanted, UNDER_WAY_ITEMS_MAX))

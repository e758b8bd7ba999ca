"""A worker's end of the ring: claim, start, complete.

    exchange (one section):  what I held -> done | next entries -> my list, other half | commit, claim word
    then for each entry:     start -> run -> commit its result

``start`` is where a worker and a coordinator that takes unstarted claims back may meet:

    worker:       running := entry        | then read  revoke
    coordinator:  revoke := claim (mutex) | membarrier | then read  running     (``dispatch.take_back``)

The barrier falls before or after the worker's read of ``revoke``. After: the worker sees it, and asks the lists under
the mutex. Before: its earlier store to ``running`` is visible, and the coordinator leaves it that entry. Both may
happen; then the lists decide as well. So an entry is run by the one whose list it is in, and never by two.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import posix_ipc

from ringpool.shm import barrier, layout, owner
from ringpool.shm.ring import RUN_STATE, VERSION_WORD, Ring
from ringpool.shm.segment import COORDINATOR_SEMAPHORE, Segment

PARK_S = 0.1  # the backstop for a token lost with a dead coordinator or worker
_read_cursors = layout.CURSORS.unpack_from
_write_cursors = layout.CURSORS.pack_into


class WorkerEnd:
    """Worker ``index``'s end of the ring in ``segment``, for the process that calls. One thread uses it.

    ``start(entry, now_ns)`` marks an entry as being run since then; False where it was taken back: leave it and all
    that follows it. ``spins``: how often it looks for work before it sleeps. Any exception out of a method means that
    the process must end (``os._exit``) at once, without unlocking: the kernel frees the mutex, and whoever gets it
    finishes the section.
    """

    def __init__(self, segment: Segment, index: int, spins: int = 0) -> None:
        self.ring = ring = Ring(segment)
        self.index = index
        self.spins = spins
        self._semaphore = segment.semaphore(index)
        self._coordinator = segment.semaphore(COORDINATOR_SEMAPHORE)
        self._words = ring.words
        base = ring.worker_word(index, 0)
        self._running = base + layout.W_RUNNING
        self._revoke = base + layout.W_REVOKE
        self._claim = base + layout.W_CLAIM
        self._task_start = base + layout.W_TASK_START
        self._base = base
        self.claim_sequence = 0
        self.start = self._start()
        self.exchange: Callable[[int, bool], list[int] | None] = self._exchange()
        me = owner.this_process()
        for word in (layout.W_RUNNING, layout.W_N_TASKS, layout.W_N_ERRORS, layout.W_BUSY, layout.W_INPUT):
            ring.words[base + word] = 0
        ring.words[base + layout.W_START] = me.start
        ring.words[base + layout.W_PID] = me.pid  # last: with it the entry is this process's
        self.can_be_revoked = barrier.register()

    def _exchange(self) -> Callable[[int, bool], list[int] | None]:
        """``exchange`` as a closure over what never changes: it runs once per claim, under the lock that all share."""
        ring, index, words, mapping = self.ring, self.index, self.ring.words, self.ring.mapping
        slots, workers, claims_max = ring.slots, ring.workers, ring.claims_max
        ready, retry, done = ring.ready, ring.retry, ring.done
        halves = ring.lists + 2 * index * claims_max
        claim_word, bit, others = self._claim, 1 << index, (1 << 64) - 1 ^ 1 << index
        try_lock, inherit, unlock, mutex = (
            ring.lock.try_call,
            ring.lock.acquire_slowly,
            ring.lock.unlock_call,
            ring.lock.mutex,
        )
        wake_coordinator = self._coordinator.release
        block_at, stride = layout.BLOCK_A_AT, layout.BLOCK_STRIDE

        def exchange(batch: int, park: bool) -> list[int] | None:
            error = try_lock(mutex)
            if error:
                inherit(error)
            version = words[VERSION_WORD]
            head, tail, retry_head, retry_tail, done_tail, parked, _, _, wake_at, spinning = _read_cursors(
                mapping, block_at + (version & 1) * stride
            )
            claim = words[claim_word]
            n = claim & 0xFFFF
            if n == 1:  # the usual case where tasks are long enough to matter one by one
                words[done + done_tail % slots] = words[halves + (claim >> 16 & 1) * claims_max]
                done_tail += 1
            elif n:
                at = halves + (claim >> 16 & 1) * claims_max
                i = done_tail % slots
                first = slots - i
                if n <= first:
                    words[done + i : done + i + n] = words[at : at + n]
                else:
                    words[done + i : done + slots] = words[at : at + first]
                    words[done : done + n - first] = words[at + first : at + n]
                done_tail += n
            sequence = (claim >> 16) + 1
            at = halves + (sequence & 1) * claims_max
            parked &= others
            spinning &= others
            m = tail - head
            stop = words[RUN_STATE]
            if stop or not batch:
                m = 0
            elif retry_head != retry_tail:
                words[at] = words[retry + retry_head % slots]
                retry_head += 1
                m = 1
            elif m:
                i = head % slots
                if batch == 1 or m <= workers:
                    words[at] = words[ready + i]
                    m = 1
                else:
                    m = min(batch, m // workers, slots - i)
                    words[at : at + m] = words[ready + i : ready + i + m]
                head += m
            elif park:
                parked |= bit
            else:
                spinning |= bit
            wake = wake_at and n and (done_tail >= wake_at or not m)
            if wake:
                wake_at = 0
            claim = sequence << 16 | m
            _write_cursors(
                mapping,
                block_at + (version + 1 & 1) * stride,
                head,
                tail,
                retry_head,
                retry_tail,
                done_tail,
                parked,
                index,
                claim,
                wake_at,
                spinning,
            )
            words[VERSION_WORD] = version + 1  # the commit
            words[claim_word] = claim
            unlock(mutex)
            self.claim_sequence = sequence
            if wake:
                wake_coordinator()
            if m == 1:
                return [words[at]]
            if m:
                return words[at : at + m].tolist()
            return None if stop else []

        return exchange

    def claim(self, batch: int) -> list[int] | None:
        """Hand in what this worker held, and wait for the next entries: at most ``batch``; None when it is to stop."""
        exchange = self.exchange
        entries = exchange(batch, False)
        while entries is not None and not entries:
            if self._spin():
                entries = exchange(batch, False)
                continue
            entries = exchange(batch, True)
            if entries is not None and not entries:
                self._sleep()
                entries = exchange(batch, False)
        return entries

    def leave(self) -> None:
        """Hand in what this worker held, and take nothing: it is about to end."""
        self.exchange(0, False)

    def _spin(self) -> bool:
        """Look for work, a bounded number of times; whether there seems to be some. Whoever needs the core gets it."""
        words, let_others_run = self.ring.words, os.sched_yield
        for _ in range(self.spins):
            let_others_run()
            at = layout.BLOCK_A_AT + (words[VERSION_WORD] & 1) * layout.BLOCK_STRIDE >> 3
            if words[at] != words[at + 1] or words[at + 2] != words[at + 3]:
                return True
        return False

    def _sleep(self) -> None:
        try:
            self._semaphore.acquire(PARK_S)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            pass  # the backstop, or a handled signal; the lists are looked at again in any case

    def _start(self) -> Callable[[int, int], bool]:
        """``start``, as a closure, see ``results.Results``."""
        words, running, revoke, task_start = self._words, self._running, self._revoke, self._task_start
        contested = self._start_contested

        def start(entry: int, now_ns: int) -> bool:
            words[task_start] = now_ns  # before ``running``: an entry never stands there with another's start
            words[running] = entry + 1
            if words[revoke] == self.claim_sequence:  # read after the store above: see the race at the top
                return contested(entry)
            return True

        return start

    def disown(self) -> None:
        """The entry that ``start`` was asked for last is not run: this process ends, and is not to be blamed on it."""
        self._words[self._running] = 0

    def grant(self, until_ns: int) -> None:
        """The time of the task being run counts from then on, CLOCK_MONOTONIC, which may be to come."""
        self._words[self._task_start] = until_ns

    def _start_contested(self, entry: int) -> bool:
        lock = self.ring.lock
        lock.acquire()
        mine = entry in self.ring.claimed(self.index)
        if not mine:
            self.ring.words[self._running] = 0  # or this worker's death would be blamed on it
        lock.release()
        return mine

    def count(self, n_tasks: int, n_errors: int, busy_ns: int) -> None:
        """Publish this process's totals, for whoever looks in."""
        words, base = self.ring.words, self._base
        words[base + layout.W_N_TASKS] = n_tasks
        words[base + layout.W_N_ERRORS] = n_errors
        words[base + layout.W_BUSY] = busy_ns

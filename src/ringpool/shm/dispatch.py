"""The coordinator's end of the ring: publish, collect, take back, settle the dead.

One thread uses it. An exception that arrives in the middle of a method (Ctrl-C in a program without a thread of its
own for this) costs nothing: the mutex is released, and the private state, marked stale, is rebuilt from the segment
at the next call.

    publish     records and ready entries beyond T -> (section: T, parked workers to wake) -> their semaphores
    collect     done [DHEAD, DT) -> deliver each -> DHEAD: a coordinator that dies between delivers again, never loses
    release     where results are retained, DHEAD moves here: when whoever got them has them on disk
    take_back   of a claim whose first tasks take long: finished -> done, unstarted -> retry, the running one stays
    settle      a dead worker's entries -> done or retry, its claim empty, in one commit
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import posix_ipc

from ringpool.errors import LockBrokenError, SegmentBusyError, SegmentFormatError
from ringpool.shm import barrier, layout, owner
from ringpool.shm.layout import INLINE_BYTES, PAYLOAD_AT, RECORD_BYTES, RunState, Status
from ringpool.shm.results import Results
from ringpool.shm.ring import DONE_HEAD, RUN_STATE, VERSION_WORD, Ring
from ringpool.shm.segment import COORDINATOR_SEMAPHORE, Segment

ATTACH_LOCK_TIMEOUT_S = 5.0
YIELD_EVERY = 16
_STAGED_BITS = Status.STAGED << layout.STATUS_SHIFT
_write_task = layout.TASK.pack_into


class Task(msgspec.Struct, frozen=True, gc=False):
    """What is published: a function's id, a payload (at most INLINE_BYTES) or its blob's id, and the payload's form."""

    function: int
    payload: bytes
    blob: int = 0
    form: int = layout.Form.FILE


class ClaimedTask(NamedTuple):
    """An entry that a dead worker held: how far its result is, whether it was started, earlier deaths in it; and how
    long it had run, as far as is known.
    """

    entry: int
    status: Status
    started: bool
    deaths: int
    ran_ns: int = 0


class CoordinatorEnd:
    """The only publisher and collector of ``segment``, in one process and one thread.

    ``retains``: results stay in the segment, and their slots taken, until they are released.

    Takes the segment over: raises ``SegmentBusyError`` where another living process has it, ``SegmentFormatError``
    where its contents contradict each other or its lock cannot be had within 5 seconds.
    """

    def __init__(self, segment: Segment, *, retains: bool = False) -> None:
        self.ring = Ring(segment)
        self.retains = retains
        self._retained: deque[int] = deque()  # slots of [DHEAD, collected)
        self._collected = self.ring.words[DONE_HEAD]
        self.results = Results(self.ring, layout.WORKERS_MAX)
        self.semaphores: list[posix_ipc.Semaphore] = []
        self.semaphore = segment.semaphore(COORDINATOR_SEMAPHORE)
        self._free: list[int] = []
        self._published = 0
        self._stale = True
        self._closed = False
        try:
            for worker in range(self.ring.workers):
                self.semaphores.append(segment.semaphore(worker))
            self._take_over()
        except BaseException:
            self.close()
            raise

    # ---- private state

    def _take_over(self) -> None:
        words, me = self.ring.words, owner.this_process()
        pid_at, start_at = layout.COORDINATOR_PID_AT >> 3, layout.COORDINATOR_START_AT >> 3
        former = owner.Owner(words[pid_at], words[start_at])
        if former not in (me, (0, 0)) and former.alive:
            raise SegmentBusyError(self.ring.segment.name, f"its coordinator, process {former.pid}, is alive")
        try:
            self.ring.lock.acquire_within(ATTACH_LOCK_TIMEOUT_S)
            self.ring.lock.release()
        except LockBrokenError as error:
            raise SegmentFormatError(self.ring.segment.name, str(error)) from error
        except BaseException:  # interrupted: held on, the mutex would go down with its mapping, and glibc with it
            self.ring.lock.release_if_held()
            raise
        self._rebuild()
        words[start_at] = me.start
        words[pid_at] = me.pid
        self.wake_all()  # tokens lost with the former coordinator

    def _rebuild(self) -> None:
        """Free slots and the publish cursor, from what the lists hold. Also the way out of an interrupted method."""
        ring = self.ring

        def section() -> tuple[int, list[int]]:
            cursors = ring.cursors()
            self._check(cursors)
            live = self._live(cursors)
            ring.commit(cursors._replace(parked=0, spinning=0, op_worker=ring.workers, op_claim=0, wake_at=0))
            return cursors.ready_tail, live

        published, live = ring.lock.run(section)
        used = {layout.slot_of(entry) for entry in live}
        if len(used) != len(live) or any(slot >= ring.slots for slot in used):
            raise SegmentFormatError(ring.segment.name, "a slot stands in two lists, or is none")
        self._free = [slot for slot in range(ring.slots) if slot not in used]
        if not self.retains:
            self._collected = ring.words[DONE_HEAD]
        self._published = published
        self._stale = False

    def _check(self, cursors: layout.Cursors) -> None:
        ring, delivered = self.ring, self.ring.words[DONE_HEAD]
        spans = (
            cursors.ready_tail - cursors.ready_head,
            cursors.retry_tail - cursors.retry_head,
            cursors.done_tail - delivered,
        )
        claims = [ring.words[ring.worker_word(w, layout.W_CLAIM)] for w in range(ring.workers)]
        counts = (ring.words[VERSION_WORD], delivered, *cursors[:5], cursors.wake_at, *claims)
        if any(count >> 62 for count in counts):  # the next addition might not fit a word
            raise SegmentFormatError(ring.segment.name, "its counts are beyond what anybody can have counted")
        if any(not 0 <= span <= ring.slots for span in spans) or any(
            claim & layout.CLAIM_COUNT_MASK > ring.claims_max for claim in claims
        ):
            raise SegmentFormatError(ring.segment.name, "its cursors contradict each other")
        if cursors.ready_tail >> layout.SEQUENCE_BITS:
            raise SegmentFormatError(ring.segment.name, "its sequence is beyond 36 bits")

    def _live(self, cursors: layout.Cursors) -> list[int]:
        ring, delivered = self.ring, self.ring.words[DONE_HEAD]
        live = ring.entries(ring.ready, cursors.ready_head, cursors.ready_tail - cursors.ready_head)
        live += ring.entries(ring.retry, cursors.retry_head, cursors.retry_tail - cursors.retry_head)
        live += ring.entries(ring.done, delivered, cursors.done_tail - delivered)
        for worker in range(ring.workers):
            live += ring.claimed(worker)
        return live

    @property
    def published(self) -> int:
        """How many tasks were ever accepted: the sequence of the next one."""
        if self._stale:
            self._rebuild()
        return self._published

    @property
    def n_free(self) -> int:
        """How many more tasks can be published now."""
        if self._stale:
            self._rebuild()
        return len(self._free)

    # ---- publish

    def publish(self, tasks: Sequence[Task]) -> list[int]:
        """Publish ``tasks``, at most ``n_free`` of them; returns their slots, in order."""
        if self._stale:
            self._rebuild()
        ring, free, first = self.ring, self._free, self._published
        if not tasks:
            return []
        assert len(tasks) <= len(free), "publish beyond n_free"
        if first + len(tasks) >> layout.SEQUENCE_BITS:
            raise SegmentFormatError(
                ring.segment.name, "it has had all the tasks that 36 bits can count; make a new one"
            )
        self._stale = True
        slots = free[-len(tasks) :]
        entries = self._write_records(tasks, slots, first)
        ring.put(ring.ready, first, entries)
        tail = first + len(entries)

        def section() -> list[int]:
            head, _, retry_head, retry_tail, done_tail, parked, _, _, wake_at, spinning = ring.block()
            wake, parked = _pick(parked, tail - head - spinning.bit_count())
            ring.commit((head, tail, retry_head, retry_tail, done_tail, parked, ring.workers, 0, wake_at, spinning))
            return wake

        wake = ring.lock.run(section)
        del free[-len(tasks) :]
        self._published = tail
        self._stale = False
        self._wake(wake)
        return slots

    def _write_records(self, tasks: Sequence[Task], slots: list[int], sequence: int) -> list[int]:
        mapping, tasks_at = self.ring.mapping, self.ring.tasks
        entries: list[int] = []
        for task, slot in zip(tasks, slots, strict=True):
            payload = task.payload
            entry = sequence << layout.SEQUENCE_SHIFT | slot
            at, length = tasks_at + slot * RECORD_BYTES, len(payload)
            assert length <= INLINE_BYTES, "a payload beyond INLINE_BYTES belongs into a blob"
            _write_task(mapping, at, entry, task.function, length, task.blob, task.form, 0, 0)
            mapping[at + PAYLOAD_AT : at + PAYLOAD_AT + length] = payload
            entries.append(entry)
            sequence += 1
        return entries

    def _wake(self, workers: list[int]) -> None:
        for worker in workers:
            self.semaphores[worker].release()

    def wake_all(self) -> None:
        """Post every semaphore: each worker looks again, whatever it slept for."""
        self._wake(list(range(self.ring.workers)))

    # ---- collect

    @property
    def has_results(self) -> bool:
        """Whether there seem to be results; without the mutex, so a hint."""
        words = self.ring.words
        at = layout.BLOCK_A_AT + 0x20 + (words[VERSION_WORD] & 1) * layout.BLOCK_STRIDE >> 3
        return words[at] != self._collected

    def collect(self, deliver: Callable[[int, int], None]) -> int:
        """Call ``deliver(slot, entry)`` for each finished task, oldest first, and free its slot; returns how many.

        ``deliver`` reads the result through ``results``. Where it raises, that task was not delivered and comes again.
        Where results are retained, their slots are free only when ``release`` is called.
        """
        if self._stale:
            self._rebuild()
        ring, words = self.ring, self.ring.words
        delivered = self._collected
        n = ring.lock.run(ring.block)[4] - delivered
        if not n:
            return 0
        entries = ring.entries(ring.done, delivered, n)
        freed: list[int] = []
        results_at = ring.results >> 3
        self._stale = True
        try:
            for entry in entries:
                slot = entry & layout.SLOT_MASK
                if (words[results_at + slot * (RECORD_BYTES >> 3)] ^ entry) & layout.IDENTITY_MASK:
                    raise SegmentFormatError(ring.segment.name, f"task {entry:#x} is done and has no result")
                deliver(slot, entry)
                freed.append(slot)
        finally:
            if self.retains:
                self._retained += freed
            else:
                words[DONE_HEAD] = delivered + len(freed)  # after delivery: dying before this line delivers again
            self._collected = delivered + len(freed)
        if not self.retains:
            self._free += freed
        self._stale = False
        return n

    def release(self, n: int) -> None:
        """Free the slots of the ``n`` oldest results that are retained: a coordinator that dies will not deliver them
        again.
        """
        if self._stale:
            self._rebuild()
        freed = [self._retained.popleft() for _ in range(n)]
        self.ring.words[DONE_HEAD] += n
        self._free += freed

    def wait(self, timeout_s: float, results_wanted: int, coalesce_s: float) -> None:
        """Sleep until ``results_wanted`` results are there, the ring runs dry, somebody posts, or ``timeout_s`` ends.

        Returns at once where there are results and nothing more is ready to be claimed; where there is more, fewer than
        ``results_wanted`` results wait at most ``coalesce_s`` seconds for company.
        """
        ring = self.ring
        delivered = self._collected

        def section() -> float:
            block = ring.block()
            n = block[4] - delivered
            if n >= results_wanted or (n and block[0] == block[1]):
                return 0
            ring.commit((*block[:6], ring.workers, 0, delivered + results_wanted, block[9]))
            return coalesce_s if n else timeout_s

        sleep_s = ring.lock.run(section)
        if sleep_s:
            self.sleep(sleep_s)

    def spin(self, n: int) -> bool:
        """Look for results, or for a post, ``n`` times; whether there is either. Lets other threads run in between."""
        for i in range(n):
            if self.has_results:
                return True
            if i % YIELD_EVERY == 0:
                os.sched_yield()  # at once: the kernel may have put a worker that was just woken on this core
            try:
                self.semaphore.acquire(0)  # releases the GIL, as a loop in Python would not
                return True
            except (posix_ipc.BusyError, posix_ipc.SignalError):
                continue
        return False

    def post(self) -> None:
        """Wake the thread that sleeps in ``wait`` or ``sleep``. From any thread; without effect after ``close``."""
        if not self._closed:  # a closed semaphore is a null pointer
            self.semaphore.release()

    def sleep(self, timeout_s: float) -> None:
        """Sleep until somebody posts the coordinator's semaphore, or ``timeout_s`` ends."""
        try:
            self.semaphore.acquire(timeout_s)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            pass

    # ---- tasks not yet running

    def refuse(self, slot: int, sequence: int) -> None:
        """Have a task cancelled when a worker comes to start it, claimed or not. One that runs, or is just being
        started, does. Only while the slot is that task's.
        """
        self.ring.words[self.ring.tasks + slot * RECORD_BYTES + layout.TASK_CANCEL_AT >> 3] = sequence + 1

    def is_refused(self, slot: int, sequence: int) -> bool:
        """Whether it is to be cancelled. Only while the slot is that task's."""
        return self.ring.words[self.ring.tasks + slot * RECORD_BYTES + layout.TASK_CANCEL_AT >> 3] == sequence + 1

    def refuse_unstarted(self, slot: int, sequence: int) -> bool:
        """``refuse``; and whether it is certain that no worker has started the task, or will. From any thread, without
        the mutex.

        A worker stores ``running``, then reads ``cancel``; here it is the other way about. The barrier falls before or
        after the worker's read. After: it sees ``cancel``. Before: its earlier store to ``running`` is visible here.
        """
        ring, words = self.ring, self.ring.words
        self.refuse(slot, sequence)
        if not barrier.fence_all():
            return False
        running = (words[ring.worker_word(w, layout.W_RUNNING)] - 1 for w in range(ring.workers))
        if any(layout.sequence_of(entry) == sequence for entry in running):
            return False
        barrier.fence_all()  # what no worker is at any more has its result, or was given back without one
        return layout.sequence_of(words[ring.results + slot * RECORD_BYTES >> 3]) != sequence

    def cancel_unclaimed(self, keep: int = 0) -> int:
        """Cancel all tasks that nobody has claimed, except the ``keep`` that come first; returns how many. They will be
        collected as CANCELLED.
        """
        ring = self.ring

        def section() -> int:  # a claim is made under the mutex too: nobody is looking at what stands in these lists
            cursors = ring.cursors()
            waiting = ring.entries(ring.retry, cursors.retry_head, cursors.retry_tail - cursors.retry_head)
            waiting += ring.entries(ring.ready, cursors.ready_head, cursors.ready_tail - cursors.ready_head)
            for entry in waiting[keep:]:
                self.refuse(layout.slot_of(entry), layout.sequence_of(entry))
            return len(waiting[keep:])

        return ring.lock.run(section)

    def take_back(self, worker: int) -> int:
        """Take from a living ``worker`` what it claimed and has not started; returns how many tasks.

        What it has finished of that claim goes to done at once; the one that it runs stays, and so does what it has
        staged, to be put in place together. See ``claims`` for the race.
        """
        if self._stale:
            self._rebuild()
        ring, words = self.ring, self.ring.words
        revoke, running_at = (ring.worker_word(worker, word) for word in (layout.W_REVOKE, layout.W_RUNNING))

        def section() -> tuple[int, list[int]]:
            entries = ring.claimed(worker)
            former, sequence = words[revoke], words[ring.worker_word(worker, layout.W_CLAIM)] >> layout.CLAIM_SHIFT
            if len(entries) < 2 or (former and former + 1 == sequence):
                return 0, []  # the latter was taken back already: its worker must still see that, in ``revoke``
            words[revoke] = sequence
            is_fenced = barrier.fence_all()
            running = words[running_at] - 1  # read after the store above: see the race in ``claims``
            moves = moves_of(entries, running) if is_fenced else None
            if moves is None:
                words[revoke] = former
                return 0, []
            finished, back, kept = moves
            return len(back), self._commit_moves(worker, finished, back, kept)

        def moves_of(entries: list[int], running: int) -> tuple[list[int], list[int], list[int]] | None:
            """What goes to done, what to retry, and what stays; None: nothing goes."""
            n_ended = entries.index(running) if running in entries else 0
            first_unstarted = n_ended + (running in entries)
            ended, back = entries[:n_ended], entries[first_unstarted:]
            words_of_ended = [ring.result_word(entry) & layout.STATUS_MASK for entry in ended]
            if not all(words_of_ended):
                return None  # its stores arrive out of order (not on x86-64): another time
            staged = [entry for entry, word in zip(ended, words_of_ended, strict=True) if word == _STAGED_BITS]
            finished = [entry for entry in ended if entry not in staged] if staged else ended
            return (finished, back, staged + entries[n_ended:first_unstarted]) if finished or back else None

        n_back, wake = ring.lock.run(section)
        self._wake(wake)
        return n_back

    # ---- the dead

    def claims_of_dead(self, worker: int) -> list[ClaimedTask]:
        """What a worker held when it died. Its process must be gone: nobody else touches these tasks any more."""
        ring = self.ring
        ring.lock.run(ring.block)  # whoever gets the mutex finishes what the dead had committed: the claim is final now
        running = ring.words[ring.worker_word(worker, layout.W_RUNNING)] - 1
        ran_ns = max(0, time.monotonic_ns() - ring.words[ring.worker_word(worker, layout.W_TASK_START)])
        deaths = self.results.deaths
        return [
            ClaimedTask(entry, ring.status(entry), entry == running, deaths(entry), ran_ns * (entry == running))
            for entry in ring.claimed(worker)
        ]

    def input_of(self, entry: int) -> int:
        """The inode of the input of ``entry``, as ``Results.note_input`` was given it by the worker that ran it when it
        died; 0: it was not being run, or has no input.
        """
        ring = self.ring
        for worker in range(ring.workers):
            if ring.words[ring.worker_word(worker, layout.W_RUNNING)] == entry + 1:
                return ring.words[ring.worker_word(worker, layout.W_INPUT)]
        return 0

    def failed_to_start(self, worker: int) -> bool:
        """Whether the process that was this worker died before it took a task, though it never got as far as looking
        for one, or there was one. Before ``settle``, which forgets it.
        """
        ring = self.ring
        pid, running, n_tasks = (
            ring.words[ring.worker_word(worker, word)] for word in (layout.W_PID, layout.W_RUNNING, layout.W_N_TASKS)
        )
        cursors = ring.peek()
        waiting = cursors.ready_tail - cursors.ready_head + cursors.retry_tail - cursors.retry_head
        return not (running or n_tasks or ring.claimed(worker)) and (not pid or waiting > 0)

    def has_come(self, worker: int) -> bool:
        """Whether the process that is, or was, this worker came to the ring. Before ``settle``, which forgets it."""
        return bool(self.ring.words[self.ring.worker_word(worker, layout.W_PID)])

    @property
    def n_claims(self) -> int:
        """A count that grows whenever a task is claimed."""
        cursors = self.ring.peek()
        return cursors.ready_head + cursors.retry_head

    def post_for_dead(self, entry: int, status: Status, payload: bytes = b"", ran_ns: int = 0) -> None:
        """Give a dead worker's task the result that its worker did not: OK finishes a commit, else ``payload`` tells
        why.
        """
        assert status in layout.STATUS_STEPS[self.ring.status(entry)], "no such step"
        if status is Status.OK:
            self.results.finish(entry)
        else:
            self.results.post(entry, status, layout.Encoding.MSGPACK, payload, ran_ns)

    def settle(self, worker: int, done: Sequence[int], again: Sequence[int], blamed: Sequence[int]) -> None:
        """Empty a dead worker's claim in one commit: ``done`` entries have results, ``again`` keep their attempt,
        ``blamed`` ones get the next, and a death on their account."""
        if self._stale:
            self._rebuild()
        ring = self.ring
        for entry in blamed:
            self.results.blame(entry)
        retried = [*again, *(entry + layout.ATTEMPT_ONE for entry in blamed)]
        wake = ring.lock.run(lambda: self._commit_moves(worker, done, retried, ()))
        for word in (layout.W_RUNNING, layout.W_N_TASKS, layout.W_PID):  # the pid last: 0 says that the entry is free
            ring.words[ring.worker_word(worker, word)] = 0
        self._wake(wake)

    def _commit_moves(self, worker: int, done: Sequence[int], retry: Sequence[int], kept: Sequence[int]) -> list[int]:
        """Under the mutex: entries of ``worker`` to done and to retry, ``kept`` into its claim list's other half."""
        ring = self.ring
        claim = ring.words[ring.worker_word(worker, layout.W_CLAIM)]
        claim = (claim >> layout.CLAIM_SHIFT) + 1 << layout.CLAIM_SHIFT | len(kept)
        at = ring.claim_list(worker, claim)
        for i, entry in enumerate(kept):
            ring.words[at + i] = entry
        cursors = ring.cursors()
        ring.put(ring.done, cursors.done_tail, done)
        ring.put(ring.retry, cursors.retry_tail, retry)
        me = 1 << worker  # it will not be woken by its semaphore: it is dead, or it runs a task
        waiting = cursors.ready_tail - cursors.ready_head + cursors.retry_tail - cursors.retry_head + len(retry)
        wake, parked = _pick(cursors.parked & ~me, waiting)
        ring.commit(
            cursors._replace(
                retry_tail=cursors.retry_tail + len(retry),
                done_tail=cursors.done_tail + len(done),
                parked=parked,
                spinning=cursors.spinning & ~me,
                op_worker=worker,
                op_claim=claim,
            )
        )
        return wake

    # ---- the end

    def stop_workers(self) -> None:
        """Tell every worker to end when it has finished what it holds."""
        self.ring.words[RUN_STATE] = RunState.STOP
        self.wake_all()

    def close(self) -> None:
        """Close semaphores and mapping; garbage collection does not close the former. Safe to call again, also after an
        exception that came in between.
        """
        self._closed = True
        for semaphore in (*self.semaphores, self.semaphore):
            with contextlib.suppress(posix_ipc.ExistentialError):  # it is closed
                semaphore.close()
        self.ring.close()


def _pick(parked: int, n: int) -> tuple[list[int], int]:
    """Up to ``n`` workers of the bitmap ``parked``, to be woken after the mutex is released, and the bitmap without
    them.
    """
    picked: list[int] = []
    while parked and len(picked) < n:
        lowest = parked & -parked
        parked ^= lowest
        picked.append(lowest.bit_length() - 1)
    return picked, parked

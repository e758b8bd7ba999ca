"""The ring against a model of it in plain lists; and whoever is cut off in the middle, nothing is lost or done twice.

Coordinator and workers are objects on one segment in one thread: what is tried here is the order of their steps, not
their speed. ``RingMachine`` takes steps at random and compares each with the model; below it, single cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import posix_ipc
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.crash.opcodes import Bytecodes, interrupt_before
from tests.workers.files.child import Child, listen, say

from ringpool.coordinator import recovery
from ringpool.coordinator.recovery import Action, Disk, Where
from ringpool.errors import SegmentBusyError, SegmentFormatError
from ringpool.shm import barrier, layout, segment
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import ClaimedTask, CoordinatorEnd, Task
from ringpool.shm.layout import INLINE_BYTES, Encoding, Status
from ringpool.shm.results import ResultRecord, Results
from ringpool.shm.ring import DONE_HEAD, Ring
from ringpool.shm.segment import Segment

ATTEMPTS_MAX = 3
SEQUENCES_MAX = 1 << layout.SEQUENCE_BITS


def start_counting_at(made: Segment, sequence: int, retry: int = 0, done: int = 0) -> None:
    """Make a fresh segment one in which so many tasks have come and gone."""
    ring = Ring(made)
    ring.words[DONE_HEAD] = done
    ring.commit(layout.Cursors(sequence, sequence, retry, retry, done, 0, ring.workers, 0, 0, 0))
    ring.lock.detach()
    ring.words.release()


def close_worker(worker: WorkerEnd) -> None:
    worker._semaphore.close()
    worker._coordinator.close()
    worker.ring.close()


def drain_tokens(coordinator: CoordinatorEnd) -> None:
    """Forget what was posted so far, at the take-over for one."""
    for semaphore in coordinator.semaphores:
        with contextlib.suppress(posix_ipc.BusyError):
            while True:
                semaphore.acquire(0)


@dataclasses.dataclass
class ModelWorker:
    """A worker as the model sees it: what the ring says it holds, and what it believes it still has to do."""

    end: WorkerEnd
    results: Results
    claimed: list[int] = dataclasses.field(default_factory=list)
    to_do: list[int] = dataclasses.field(default_factory=list)
    running: int | None = None
    last_started: int = 0
    asleep: bool = False
    dead: bool = False


class RingMachine(RuleBasedStateMachine):
    """Steps at random. The model: four kinds of lists, and what is known of each task."""

    @initialize(
        slots=st.integers(1, 6),
        workers=st.integers(1, 3),
        claims_max=st.integers(1, 4),
        first=st.sampled_from([1, 2, 5, SEQUENCES_MAX - 150]),
        passed=st.integers(0, 6),
    )
    def begin(self, slots: int, workers: int, claims_max: int, first: int, passed: int) -> None:
        self.segment = segment.create(slots, workers, claims_max)
        start_counting_at(self.segment, first, retry=passed, done=2 * passed)
        self.slots, self.claims_max = slots, claims_max
        self.coordinator = CoordinatorEnd(segment.attach(self.segment.name))
        drain_tokens(self.coordinator)
        self.published = first
        self.free = set(range(slots))
        self.ready: list[int] = []
        self.retry: list[int] = []
        self.done: list[int] = []
        self.workers = [self.new_worker(index) for index in range(workers)]
        self.tasks: dict[int, Task] = {}
        self.cancelled: set[int] = set()
        self.deaths: dict[int, int] = {}
        self.results: dict[int, ResultRecord] = {}
        self.n_delivered = 0

    def new_worker(self, index: int) -> ModelWorker:
        end = WorkerEnd(segment.attach(self.segment.name), index)
        return ModelWorker(end, Results(end.ring, index))

    def teardown(self) -> None:
        if hasattr(self, "segment"):
            segment.unlink(self.segment.name)
            for worker in self.workers:
                close_worker(worker.end)
            self.coordinator.close()
            self.segment.close()

    def some_worker(self, number: int, wanted: Callable[[ModelWorker], object]) -> ModelWorker | None:
        found = [worker for worker in self.workers if not worker.dead and wanted(worker)]
        return found[number % len(found)] if found else None

    # ---- steps of the coordinator

    @rule(n=st.integers(1, 6), length=st.sampled_from([0, 1, 7, 200, INLINE_BYTES]), form=st.integers(0, 2**64 - 1))
    def publish(self, n: int, length: int, form: int) -> None:
        n = min(n, len(self.free), SEQUENCES_MAX - self.published)
        tasks = [Task(i + 1, bytes([i + 1]) * length, blob=i, form=form ^ i) for i in range(n)]
        slots = self.coordinator.publish(tasks)
        assert len(set(slots)) == len(slots) == n
        assert set(slots) <= self.free
        self.free -= set(slots)
        for task, slot in zip(tasks, slots, strict=True):
            self.ready.append(layout.entry_of(self.published, 0, slot))
            self.tasks[self.published] = task
            self.deaths[self.published] = 0
            self.published += 1

    @rule(fails_at=st.one_of(st.none(), st.integers(0, 3)))
    def collect(self, fails_at: int | None) -> None:
        delivered: list[int] = []

        def deliver(slot: int, entry: int) -> None:
            if len(delivered) == fails_at:
                raise RuntimeError
            assert slot == layout.slot_of(entry)
            assert self.coordinator.results.read(entry) == self.results[entry]
            delivered.append(entry)

        fails = fails_at is not None and fails_at < len(self.done)
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            assert self.coordinator.collect(deliver) == len(self.done)
        expected = self.done[:fails_at] if fails else self.done
        assert delivered == expected
        del self.done[: len(expected)]
        self.free |= {layout.slot_of(entry) for entry in delivered}
        self.n_delivered += len(delivered)

    @rule(keep=st.integers(0, 8))
    def cancel_unclaimed(self, keep: int) -> None:
        waiting = [layout.sequence_of(entry) for entry in self.retry + self.ready][keep:]
        assert self.coordinator.cancel_unclaimed(keep) == len(waiting)
        self.cancelled.update(waiting)

    @rule(chosen=st.integers(0, 8))
    def refuse(self, chosen: int) -> None:
        entries = self.retry + self.ready + self.done + [entry for worker in self.workers for entry in worker.claimed]
        if not entries:
            return
        entry = sorted(entries)[chosen % len(entries)]
        sequence = layout.sequence_of(entry)
        started = {layout.sequence_of(it) for it in self.results}
        started |= {layout.sequence_of(worker.last_started) for worker in self.workers if worker.last_started}
        ring = self.coordinator.ring  # what an earlier attempt had staged stands until the next one posts
        started.add(layout.sequence_of(ring.words[ring.results + layout.slot_of(entry) * layout.RECORD_BYTES >> 3]))
        certain = self.coordinator.refuse_unstarted(layout.slot_of(entry), sequence)
        assert certain == (sequence not in started)
        self.cancelled.add(sequence)

    @rule(number=st.integers(0, 2))
    def take_back(self, number: int) -> None:
        worker = self.some_worker(number, lambda _: True)
        if worker is None:
            return
        finished, kept, back = [], worker.claimed, []
        if len(worker.claimed) > 1 and barrier.fence_all():
            at = worker.claimed.index(worker.last_started) if worker.last_started in worker.claimed else -1
            finished, kept = worker.claimed[: max(at, 0)], worker.claimed[max(at, 0) : at + 1]
            back = worker.claimed[at + 1 :]
        assert self.coordinator.take_back(worker.end.index) == len(back)
        self.done += finished
        self.retry += back
        worker.claimed = kept

    @rule()
    def take_over(self) -> None:
        self.coordinator.close()
        self.coordinator = CoordinatorEnd(segment.attach(self.segment.name))

    # ---- steps of a worker

    @rule(number=st.integers(0, 2), batch=st.integers(1, 4), park=st.booleans())
    def exchange(self, number: int, batch: int, park: bool) -> None:
        worker = self.some_worker(number, lambda it: not it.to_do and it.running is None)
        if worker is None:
            return
        head = self.published - len(self.ready)
        self.done += worker.claimed
        if self.retry:
            expected = [self.retry.pop(0)]
        else:
            n, batch = len(self.ready), min(batch, self.claims_max)
            if batch == 1 or n <= len(self.workers):
                n = min(n, 1)
            else:
                n = min(batch, n // len(self.workers), self.slots - head % self.slots)
            expected, self.ready = self.ready[:n], self.ready[n:]
        with contextlib.suppress(posix_ipc.BusyError):
            if worker.asleep:
                worker.end._semaphore.acquire(0)  # its token, where it was woken; else the backstop has woken it
        assert worker.end.exchange(batch, park) == expected
        worker.asleep = park and not expected
        worker.claimed, worker.to_do = expected, list(expected)

    @rule(number=st.integers(0, 2), now_ns=st.integers(1, 2**63))
    def start(self, number: int, now_ns: int) -> None:
        worker = self.some_worker(number, lambda it: it.to_do and it.running is None)
        if worker is None:
            return
        entry = worker.to_do.pop(0)
        assert worker.end.start(entry, now_ns) == (entry in worker.claimed)
        if entry not in worker.claimed:
            worker.last_started = 0
            worker.to_do.clear()
            return
        worker.last_started = entry
        sequence = layout.sequence_of(entry)
        task, is_cancelled = self.tasks[sequence], sequence in self.cancelled
        assert worker.results.read_task(entry) == (task.function, task.payload, task.blob, task.form, is_cancelled)
        if is_cancelled:
            worker.results.post(entry, Status.CANCELLED, 0, b"", 0)
            self.results[entry] = self.record(worker, entry, Status.CANCELLED, b"", 0, 0, 0)
        else:
            worker.running = entry

    def record(
        self,
        worker: ModelWorker,
        entry: int,
        status: Status,
        payload: bytes,
        duration_ns: int,
        blob_bytes: int,
        calls: int,
    ) -> ResultRecord:
        index = worker.end.index
        return ResultRecord(status, layout.attempt_of(entry), 0, payload, duration_ns, blob_bytes, index, calls)

    @rule(
        number=st.integers(0, 2),
        status=st.sampled_from([Status.OK, Status.ERROR, Status.STAGED]),
        length=st.sampled_from([0, 1, 100, INLINE_BYTES]),
        duration_ns=st.integers(0, 2**64 - 1),
        blob_bytes=st.sampled_from([0, 1 << 40]),
        calls=st.sampled_from([0, 2, layout.CALLS_MAX]),
    )
    def post(self, number: int, status: Status, length: int, duration_ns: int, blob_bytes: int, calls: int) -> None:
        worker = self.some_worker(number, lambda it: it.running is not None and it.running not in self.results)
        if worker is None:
            return
        entry = worker.running
        assert entry is not None
        payload = bytes([layout.sequence_of(entry) & 0xFF]) * length
        if status is Status.STAGED:
            worker.results.stage(entry, Encoding.MSGPACK, payload, duration_ns, blob_bytes, 2**63 + 7, 2**64 - 1)
            assert self.coordinator.results.staged_file(entry) == (2**63 + 7, 2**64 - 1)
            calls = 0
        else:
            worker.results.post(entry, status, Encoding.MSGPACK, payload, duration_ns, blob_bytes, calls)
            worker.running = None
        self.results[entry] = self.record(worker, entry, status, payload, duration_ns, blob_bytes, calls)

    @rule(number=st.integers(0, 2), fails=st.booleans())
    def end_commit(self, number: int, fails: bool) -> None:
        worker = self.some_worker(number, lambda it: it.running in self.results)
        if worker is None:
            return
        entry = worker.running
        assert entry is not None
        if fails:
            worker.results.post(entry, Status.ERROR, Encoding.MSGPACK, b"why", 5)
            self.results[entry] = self.record(worker, entry, Status.ERROR, b"why", 5, 0, 0)
        else:
            worker.results.finish(entry)
            self.results[entry] = _with_status(self.results[entry], Status.OK)
        worker.running = None

    # ---- death

    @rule(number=st.integers(0, 2))
    def kill(self, number: int) -> None:
        worker = self.some_worker(number, lambda _: True)
        if worker is not None:
            worker.dead = True

    @precondition(lambda self: any(worker.dead for worker in self.workers))
    @rule(disk=st.sampled_from(Disk), dies_while_blaming=st.booleans())
    def settle(self, disk: Disk, dies_while_blaming: bool) -> None:
        worker = next(worker for worker in self.workers if worker.dead)
        claims = self.coordinator.claims_of_dead(worker.end.index)
        assert all(claim.started or not claim.ran_ns for claim in claims)
        assert [claim._replace(ran_ns=0) for claim in claims] == [
            ClaimedTask(
                entry,
                Status(self.results[entry].status) if entry in self.results else Status.EMPTY,
                entry == worker.last_started,
                self.deaths[layout.sequence_of(entry)],
            )
            for entry in worker.claimed
        ]
        done: list[int] = []
        again: list[int] = []
        blamed: list[int] = []
        for claim in claims:
            self.decide(worker, claim, disk, done, again, blamed)
        if dies_while_blaming:
            for entry in blamed:
                self.coordinator.results.blame(entry)
            self.take_over()
            known = {claim.entry: claim.deaths for claim in claims}
            assert {it.entry: it.deaths for it in self.coordinator.claims_of_dead(worker.end.index)} == known
        took_none = not (worker.last_started or worker.claimed)
        assert self.coordinator.failed_to_start(worker.end.index) == (took_none and bool(self.ready or self.retry))
        self.coordinator.settle(worker.end.index, done, again, blamed)
        self.done += done
        self.retry += again + [entry + layout.ATTEMPT_ONE for entry in blamed]
        for entry in blamed:
            self.deaths[layout.sequence_of(entry)] += 1
        close_worker(worker.end)
        self.workers[worker.end.index] = self.new_worker(worker.end.index)

    def decide(
        self,
        worker: ModelWorker,
        claim: ClaimedTask,
        disk: Disk,
        done: list[int],
        again: list[int],
        blamed: list[int],
    ) -> None:
        entry, status, started, deaths, _ = claim
        may_retry = deaths + 1 < ATTEMPTS_MAX
        action = recovery.decide(
            Where.CLAIMED, alive=False, result=status, started=started, disk=disk, may_retry=may_retry
        )
        if action is Action.REQUEUE:
            again.append(entry)
        elif action is Action.RETRY:
            blamed.append(entry)
            self.results.pop(entry, None)
        else:
            done.append(entry)
        if action is Action.COMMIT:
            self.coordinator.post_for_dead(entry, Status.OK)
            self.results[entry] = _with_status(self.results[entry], Status.OK)
        elif action in (Action.FAIL, Action.DOUBT):
            code = Status.DIED if action is Action.FAIL else Status.IN_DOUBT
            self.coordinator.post_for_dead(entry, code, b"facts")
            attempt = layout.attempt_of(entry)
            self.results[entry] = ResultRecord(code, attempt, 0, b"facts", 0, 0, layout.WORKERS_MAX)

    # ---- what always holds

    @invariant()
    def lists_are_those_of_the_model(self) -> None:
        if not hasattr(self, "n_delivered"):
            return
        ring = self.coordinator.ring
        cursors = ring.cursors()
        spans = (
            ring.entries(ring.ready, cursors.ready_head, cursors.ready_tail - cursors.ready_head),
            ring.entries(ring.retry, cursors.retry_head, cursors.retry_tail - cursors.retry_head),
            ring.entries(ring.done, ring.words[DONE_HEAD], cursors.done_tail - ring.words[DONE_HEAD]),
        )
        assert spans == (self.ready, self.retry, self.done)
        for worker in self.workers:
            assert ring.claimed(worker.end.index) == worker.claimed
        assert cursors.ready_tail == self.coordinator.published == self.published
        assert self.coordinator.n_free == len(self.free)

    @invariant()
    def a_slot_is_in_one_place(self) -> None:
        if not hasattr(self, "n_delivered"):
            return
        held = self.ready + self.retry + self.done + [entry for worker in self.workers for entry in worker.claimed]
        assert sorted([*map(layout.slot_of, held), *self.free]) == list(range(self.slots))
        for entry in held:
            status = self.results[entry].status if entry in self.results else Status.EMPTY
            assert self.coordinator.ring.status(entry) == status
            assert self.coordinator.results.deaths(entry) == self.deaths[layout.sequence_of(entry)]
        assert all(self.results[entry].status != Status.STAGED for entry in self.done)

    @invariant()
    def nobody_sleeps_over_work(self) -> None:
        """While more tasks wait than awake workers have nothing to do, no worker sleeps without having been posted."""
        if not hasattr(self, "n_delivered") or any(worker.dead for worker in self.workers):
            return
        tokens = [semaphore.value for semaphore in self.coordinator.semaphores]
        asleep = [worker for worker in self.workers if worker.asleep and not tokens[worker.end.index]]
        idle = [worker for worker in self.workers if worker not in asleep and not worker.to_do and not worker.running]
        assert not asleep or len(self.ready) + len(self.retry) <= len(idle)


def _with_status(record: ResultRecord, status: Status) -> ResultRecord:
    fields = {name: getattr(record, name) for name in ResultRecord.__struct_fields__}
    return ResultRecord(**(fields | {"status": int(status)}))


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# ---- single cases ----------------------------------------------------------------------------------------------------


class Bench:
    """A segment, its coordinator's end and its workers; ``ran`` and ``delivered`` tell what became of tasks."""

    def __init__(self, slots: int, workers: int, claims_max: int = 4, first: int = 1) -> None:
        self.segment = segment.create(slots, workers, claims_max)
        start_counting_at(self.segment, first)
        self.coordinator = CoordinatorEnd(segment.attach(self.segment.name))
        self.workers = [WorkerEnd(segment.attach(self.segment.name), index) for index in range(workers)]
        self.ran: list[int] = []
        self.delivered: list[int] = []

    def close(self) -> None:
        segment.unlink(self.segment.name)
        for worker in self.workers:
            close_worker(worker)
        self.coordinator.close()
        self.segment.close()

    def publish(self, n: int) -> list[int]:
        return self.coordinator.publish([Task(1, b"payload")] * n)

    def run(self, worker: WorkerEnd, entry: int) -> None:
        """Post a result for ``entry``, as one that started it does."""
        Results(worker.ring, worker.index).post(entry, Status.OK, Encoding.MSGPACK, str(entry).encode(), 1)
        self.ran.append(entry)

    def work(self, worker: WorkerEnd, batch: int) -> int:
        """One claim, run to its end; how many tasks."""
        entries = worker.exchange(batch, False) or []
        for entry in entries:
            if not worker.start(entry, 1):
                break
            self.run(worker, entry)
        return len(entries)

    def deliver(self, slot: int, entry: int) -> None:
        assert self.coordinator.results.read(entry).payload == str(entry).encode()
        self.delivered.append(layout.sequence_of(entry))

    def drain(self) -> None:
        """Until nothing is left."""
        while sum(self.work(worker, 3) for worker in self.workers) or self.coordinator.collect(self.deliver):
            pass

    def settle(self, index: int) -> None:
        """Give back or finish what a dead worker held, without looking at a disk."""
        done: list[int] = []
        again: list[int] = []
        blamed: list[int] = []
        for claim in self.coordinator.claims_of_dead(index):
            where = done if claim.status is Status.OK else blamed if claim.started else again
            where.append(claim.entry)
        self.coordinator.settle(index, done, again, blamed)

    def replace(self, index: int) -> None:
        """What the coordinator does about a dead worker: settle what it held, and have a new one."""
        self.settle(index)
        close_worker(self.workers[index])
        self.workers[index] = WorkerEnd(segment.attach(self.segment.name), index)


@contextlib.contextmanager
def bench(slots: int, workers: int, claims_max: int = 4, first: int = 1) -> Iterator[Bench]:
    made = Bench(slots, workers, claims_max, first)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_lists_wrap_around_in_order(slots: int, batch: int) -> None:
    with bench(slots, 1) as it:
        n = 0
        while n < 7 * slots:
            n += len(it.publish(min(it.coordinator.n_free, n % slots + 1)))
            it.work(it.workers[0], batch)
            it.coordinator.collect(it.deliver)
        it.drain()
        assert it.delivered == list(range(1, n + 1))
        assert it.coordinator.n_free == slots


def test_a_full_ring_takes_no_more_until_results_are_collected() -> None:
    with bench(4, 1) as it:
        assert sorted(it.publish(4)) == [0, 1, 2, 3]
        assert it.coordinator.n_free == 0
        assert it.publish(0) == []
        with pytest.raises(AssertionError, match="beyond n_free"):
            it.publish(1)
        it.work(it.workers[0], 2)
        it.workers[0].exchange(1, False)
        assert it.coordinator.n_free == 0  # finished is not collected
        it.coordinator.collect(it.deliver)
        assert it.coordinator.n_free == 2
        assert len(it.publish(2)) == 2


def test_sequences_go_up_to_36_bits() -> None:
    with bench(4, 2, first=SEQUENCES_MAX - 6) as it:
        it.publish(3)
        it.drain()
        it.publish(2)
        it.drain()
        assert it.delivered == list(range(SEQUENCES_MAX - 6, SEQUENCES_MAX - 1))
        with pytest.raises(SegmentFormatError, match="all the tasks that 36 bits can count"):
            it.publish(1)
        assert it.coordinator.published == SEQUENCES_MAX - 1
        CoordinatorEnd(it.segment)  # what it holds can still be taken over


def test_a_claim_is_a_fair_share_and_no_more_than_was_asked_for() -> None:
    with bench(32, 4, claims_max=16) as it:
        it.publish(24)
        claims = [worker.exchange(batch, False) or [] for worker, batch in zip(it.workers, (16, 2, 1, 16), strict=True)]
        assert [len(claim) for claim in claims] == [6, 2, 1, 3]  # 24, and in the end 15, are shared by four


def test_retried_tasks_are_claimed_first_and_one_at_a_time() -> None:
    with bench(8, 1, claims_max=8) as it:
        it.publish(6)
        first = it.workers[0].exchange(4, False)
        assert first is not None
        it.replace(0)  # it had started none
        claims = [it.workers[0].exchange(4, False) for _ in range(4)]
        assert claims == [[entry] for entry in first]


@pytest.mark.parametrize("n_started", [0, 1, 2])
def test_what_was_taken_back_twice_is_still_not_started(n_started: int) -> None:
    with bench(8, 1, claims_max=4) as it:
        it.publish(5)
        worker = it.workers[0]
        entries = worker.exchange(4, False) or []
        for entry in entries[:n_started]:
            assert worker.start(entry, 1)
            it.run(worker, entry)
        assert it.coordinator.take_back(0) == 4 - n_started
        assert it.coordinator.take_back(0) == 0
        assert not worker.start(entries[n_started], 1)
        it.drain()
        assert sorted(it.delivered) == [1, 2, 3, 4, 5]


def test_a_task_that_was_taken_back_at_its_start_is_not_blamed_on_its_next_claim() -> None:
    with bench(8, 1) as it:
        it.publish(3)
        worker = it.workers[0]
        first = (worker.exchange(3, False) or [])[0]
        assert it.coordinator.take_back(0) == 3
        assert not worker.start(first, 1)
        assert worker.exchange(3, False) == [first]  # it gets it again, and dies before it starts
        [claim] = it.coordinator.claims_of_dead(0)
        assert claim == (first, Status.EMPTY, False, 0, 0)


def test_a_result_belongs_to_its_attempt_only() -> None:
    with bench(2, 1) as it:
        it.publish(1)
        [entry] = it.workers[0].exchange(1, False) or []
        it.workers[0].start(entry, 1)
        it.run(it.workers[0], entry)
        ring = it.coordinator.ring
        assert ring.status(entry) is Status.OK
        for other in (entry + layout.ATTEMPT_ONE, entry + (1 << layout.SEQUENCE_SHIFT), entry - layout.ATTEMPT_ONE):
            assert ring.result_word(other) == 0
            assert ring.status(other) is Status.EMPTY


def test_a_status_that_there_is_not_is_refused() -> None:
    with bench(2, 1) as it:
        it.publish(1)
        [entry] = it.workers[0].exchange(1, False) or []
        Results(it.workers[0].ring, 0).post(entry, 15, 0, b"", 0)
        with pytest.raises(SegmentFormatError, match="unknown status 15"):
            it.coordinator.ring.status(entry)


def test_a_done_task_without_a_result_is_refused() -> None:
    with bench(2, 1) as it:
        it.publish(1)
        it.workers[0].exchange(1, False)
        it.workers[0].exchange(1, False)  # handed in, and nothing was posted for it
        with pytest.raises(SegmentFormatError, match="is done and has no result"):
            it.coordinator.collect(it.deliver)


def test_deaths_are_counted_once_per_attempt_and_stop_at_a_byte() -> None:
    with bench(2, 1) as it:
        it.publish(1)
        [entry] = it.workers[0].exchange(1, False) or []
        results = it.coordinator.results
        for attempt in range(layout.ATTEMPT_MAX):
            now = entry + attempt * layout.ATTEMPT_ONE
            assert results.deaths(now) == attempt
            assert results.blame(now) == results.blame(now) == attempt + 1


def test_workers_are_told_to_stop_and_hand_in_what_they_hold() -> None:
    with bench(4, 2) as it:
        it.publish(3)
        it.work(it.workers[0], 1)
        it.coordinator.stop_workers()
        assert [worker.exchange(1, True) for worker in it.workers] == [None, None]
        assert [worker.claim(1) for worker in it.workers] == [None, None]
        assert it.coordinator.collect(it.deliver) == 1
        assert all(semaphore.value == 2 for semaphore in it.coordinator.semaphores)  # taken over, stopped


def tokens(it: Bench) -> list[int]:
    return [semaphore.value for semaphore in it.coordinator.semaphores]


def test_a_task_wakes_a_sleeper_each_and_nobody_who_is_looking() -> None:
    with bench(8, 4) as it:
        drain_tokens(it.coordinator)
        it.workers[0].exchange(1, False)  # it looks again
        for worker in it.workers[1:]:
            assert worker.exchange(1, True) == []
        it.publish(1)
        assert tokens(it) == [0, 0, 0, 0]
        it.publish(1)
        assert tokens(it) == [0, 1, 0, 0]
        it.publish(3)
        assert tokens(it) == [0, 1, 1, 1]


@pytest.mark.parametrize("how", ["death", "taking back"])
def test_what_goes_back_wakes_a_sleeper(how: str) -> None:
    with bench(8, 2) as it:
        it.publish(3)
        assert len(it.workers[0].exchange(1, False) or []) == 1
        it.work(it.workers[1], 1)
        it.publish(3)
        assert len(it.workers[0].exchange(2, False) or []) == 2
        while it.work(it.workers[1], 1):
            pass
        assert it.workers[1].exchange(1, True) == []
        drain_tokens(it.coordinator)
        if how == "death":
            it.settle(0)
        else:
            it.coordinator.take_back(0)
        assert tokens(it) == [0, 1]


def test_results_wake_a_coordinator_that_waits_for_so_many() -> None:
    with bench(8, 1) as it:
        it.publish(4)
        it.coordinator.wait(0, 2, 0)
        posted: list[int] = []
        while it.work(it.workers[0], 1):
            posted.append(it.coordinator.semaphore.value)
        posted.append(it.coordinator.semaphore.value)
        assert posted == [0, 0, 1, 1, 1]  # a result is handed in with the next claim
        assert it.coordinator.has_results
        it.coordinator.collect(it.deliver)
        assert not it.coordinator.has_results


def test_results_wake_a_waiting_coordinator_when_the_ring_runs_dry() -> None:
    with bench(8, 1) as it:
        it.publish(2)
        it.coordinator.wait(0, 60, 0)
        while it.work(it.workers[0], 1):
            assert it.coordinator.semaphore.value == 0
        assert it.coordinator.semaphore.value == 1


def test_a_worker_that_waits_is_woken_by_a_task() -> None:
    with bench(4, 1) as it, Child(claim_one, it.segment.name) as child:
        child.wait_for("waiting")
        it.publish(1)
        child.wait_for("claimed 1")


def claim_one(name: str) -> None:
    worker = WorkerEnd(segment.attach(name), 0)
    say("waiting")
    entries = worker.claim(4)
    assert entries is not None
    say(f"claimed {len(entries)}")
    listen()


def test_a_looker_on_sees_a_consistent_block_while_others_work() -> None:
    with bench(64, 1) as it, Child(work_on, it.segment.name) as child:
        child.wait_for("at work")
        ring = it.coordinator.ring
        while len(it.delivered) < 3000:
            it.publish(it.coordinator.n_free)
            seen = ring.peek()
            assert seen.ready_head <= seen.ready_tail == it.coordinator.published
            assert ring.words[DONE_HEAD] <= seen.done_tail <= seen.ready_head
            it.coordinator.collect(lambda _, entry: it.delivered.append(entry))
        it.coordinator.stop_workers()
        child.succeed()
        assert sorted(map(layout.sequence_of, it.delivered)) == list(range(1, len(it.delivered) + 1))


def work_on(name: str) -> None:
    worker = WorkerEnd(segment.attach(name), 0)
    results = Results(worker.ring, 0)
    say("at work")
    while (entries := worker.claim(3)) is not None:
        for entry in entries:
            if not worker.start(entry, 1):
                break
            results.post(entry, Status.OK, Encoding.MSGPACK, b"", 1)


def test_the_very_first_task_is_not_blamed_before_it_was_started() -> None:
    with bench(2, 1, first=0) as it:
        it.publish(2)
        it.workers[0].exchange(1, False)
        [claim] = it.coordinator.claims_of_dead(0)
        assert not claim.started


def test_a_worker_that_never_got_as_far_as_looking_has_failed_to_start() -> None:
    with bench(2, 1) as it:
        assert not it.coordinator.failed_to_start(0)  # it looked, and there was nothing
        it.settle(0)
        assert it.coordinator.failed_to_start(0)  # its successor has not even said who it is


# ---- who has the segment ---------------------------------------------------------------------------------------------


def test_a_living_coordinators_segment_is_not_taken_over_and_a_dead_ones_is() -> None:
    with Child(coordinate) as child:
        assert child.process.stdout is not None
        name = child.process.stdout.readline().decode().strip()
        try:
            with pytest.raises(SegmentBusyError, match=f"its coordinator, process {child.pid}, is alive; end that"):
                CoordinatorEnd(segment.attach(name))
            child.kill()
            end = CoordinatorEnd(segment.attach(name))
            assert (end.published, end.n_free) == (3, 1)
            end.close()
        finally:
            segment.unlink(name)


def coordinate() -> None:
    end = CoordinatorEnd(segment.create(4, 1))
    end.publish([Task(1, b"")] * 3)
    say(end.ring.segment.name)
    listen()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda ring: ring.put(ring.ready, 2, [7]), "a slot stands in two lists, or is none"),
        (lambda ring: ring.put(ring.ready, 2, ring.entries(ring.ready, 1, 1)), "a slot stands in two lists"),
        (lambda ring: ring.commit(ring.cursors()._replace(ready_head=9)), "its cursors contradict each other"),
        (lambda ring: ring.commit(ring.cursors()._replace(retry_tail=5)), "its cursors contradict each other"),
        (lambda ring: ring.words.__setitem__(DONE_HEAD, 1), "its cursors contradict each other"),
        (
            lambda ring: ring.words.__setitem__(ring.worker_word(0, layout.W_CLAIM), 5),
            "its cursors contradict each other",
        ),
        (lambda ring: ring.commit(ring.cursors()._replace(done_tail=1 << 62)), "beyond what anybody can have counted"),
        (lambda ring: ring.words.__setitem__(layout.VERSION_WORD_AT >> 3, (1 << 64) - 1), "contradict|beyond"),
    ],
)
def test_contents_that_contradict_each_other_are_refused(damage: Callable[[Ring], Any], reason: str) -> None:
    with bench(4, 1) as it:
        it.publish(3)
        damage(it.coordinator.ring)
        with pytest.raises(SegmentFormatError, match=reason):
            CoordinatorEnd(segment.attach(it.segment.name))


# ---- cut off at any bytecode -----------------------------------------------------------------------------------------


def is_cut_off(step: Callable[[], object], at: int) -> bool:
    """Run ``step``, with a KeyboardInterrupt before its bytecode number ``at``; whether it had so many."""
    try:
        with Bytecodes(interrupt_before(at)):
            step()
    except KeyboardInterrupt:
        return True
    return False


def half_done() -> Bench:
    """Seven tasks: two done, one run and not handed in, two claimed with it, the others ready."""
    it = Bench(8, 2, claims_max=4)
    it.publish(7)
    it.work(it.workers[0], 2)
    entries = it.workers[0].exchange(3, False) or []
    assert len(entries) == 2
    it.workers[0].start(entries[0], 1)
    it.run(it.workers[0], entries[0])
    it.workers[1].exchange(1, False)
    return it


COORDINATOR_STEPS: dict[str, Callable[[Bench], object]] = {
    "publish": lambda it: it.publish(1),
    "collect": lambda it: it.coordinator.collect(it.deliver),
    "cancel": lambda it: it.coordinator.cancel_unclaimed(99),
    "refuse": lambda it: it.coordinator.refuse_unstarted(0, 0),
    "take back": lambda it: it.coordinator.take_back(0),
    "settle": lambda it: it.settle(1),
    "rebuild": lambda it: it.coordinator._rebuild(),
}


@pytest.mark.parametrize("step", COORDINATOR_STEPS)
def test_a_coordinator_that_is_cut_off_at_any_bytecode_goes_on(step: str) -> None:
    at, n = 1, 0
    while True:
        it = half_done()
        try:
            cut_off = is_cut_off(lambda it=it: COORDINATOR_STEPS[step](it), at)
            _check_that_all_go_through(it, at)
        finally:
            it.close()
        if not cut_off:
            break
        at, n = at + 3, n + 1
    assert n > 5


def _check_that_all_go_through(it: Bench, at: int) -> None:
    """Both workers are replaced; then each task has run once, and has been delivered: again, perhaps, but not lost."""
    assert it.coordinator.n_free + _n_held(it.coordinator) == it.coordinator.ring.slots
    for index in (0, 1):
        it.replace(index)
    it.drain()
    assert len(it.ran) == len(set(it.ran)) == it.coordinator.published - 1, at
    assert set(it.delivered) == set(range(1, it.coordinator.published))
    assert it.coordinator.n_free == it.coordinator.ring.slots


def _n_held(coordinator: CoordinatorEnd) -> int:
    return len(coordinator._live(coordinator.ring.cursors()))


WORKER_STEPS: dict[str, Callable[[Bench, WorkerEnd], object]] = {
    "claim several": lambda it, worker: worker.exchange(3, False),
    "claim one": lambda it, worker: worker.exchange(1, True),
    "find nothing": lambda it, worker: worker.exchange(1, True),
    "start and run": lambda it, worker: it.work(worker, 2),
}


@pytest.mark.parametrize("step", WORKER_STEPS)
def test_a_worker_that_is_cut_off_at_any_bytecode_loses_nothing(step: str) -> None:
    """It leaves the mutex held, as one does that is killed; whoever comes next finishes what it had committed."""
    at, n = 1, 0
    while True:
        with bench(8, 1, claims_max=4) as it:
            if step != "find nothing":
                it.publish(6)
                it.work(it.workers[0], 3)
                it.publish(1)  # so that it is not the worker whose section was the last
            cut_off = is_cut_off(lambda it=it: WORKER_STEPS[step](it, it.workers[0]), at)
            posted = {entry for entry in it.ran if it.coordinator.ring.result_word(entry)}
            it.replace(0)
            it.drain()
            sequences = sorted(it.delivered)
            assert sequences == list(range(1, it.coordinator.published)), at
            assert it.coordinator.n_free == 8
            assert posted <= set(it.ran)
            assert all(layout.attempt_of(entry) <= 1 for entry in it.ran)
        if not cut_off:
            break
        at, n = at + 1, n + 1
    assert n > 50

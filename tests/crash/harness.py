"""A small ring whose every task is accounted for, and processes on it that may be killed anywhere.

    with World() as world:
        end = world.coordinator()            a CoordinatorEnd of this process
        world.publish(end, n)                the next n tasks
        world.start(body)                    a child process, such as a worker: world.work(index, batch)
        world.recover(end, index)            what the coordinator does for a dead worker: the product's decision table
        world.finish(end, total, dead)       the dead are recovered, all is drained up to ``total`` tasks, and checked:

    nothing lost          every task of 0..total-1 was delivered, and has run
    nothing done twice    an effect stands once in the log; an attempt has run once; each attempt but a task's first is
                          some worker's death, and so is a task that failed
    delivered once        and once more at most for each coordinator that died, or was interrupted
    nothing left held     the mutex is free, every list is empty, every slot is free
    still usable          the last tasks are published after whatever has happened

A task's effect is its sequence, appended to a log outside of the segment: doing it twice shows. Every third task has
none, and posts its result at once. The others stage, write, finish; where a worker died in between, recovery asks the
log. What the tests do in one process and what in several does not matter to the ring: whoever takes a role, in turns,
is a different party.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import os
import random
import select
import signal
import struct
import threading
import traceback
import warnings
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar

import msgspec
import pytest
from tests.crash.opcodes import Bytecodes, kill_before

from ringpool.coordinator import recovery
from ringpool.coordinator.recovery import Action, Disk, Where
from ringpool.shm import layout, segment
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.layout import Encoding, RunState, Status
from ringpool.shm.results import Results
from ringpool.shm.ring import DONE_HEAD, RUN_STATE

T = TypeVar("T")
PATIENCE_S = 60  # the watchdog of every wait, and of a child's life
SHARDS = 4  # into how many tests a full sweep is cut, for as many processors
SAMPLE_STRIDE = 37
FULL = (pytest.mark.crash, pytest.mark.timeout(900))
PLAIN, EFFECT = 1, 2  # functions: every third task is PLAIN
TURNS_MAX = 1000
_SEQUENCE = struct.Struct("<Q")
_encode = msgspec.msgpack.Encoder().encode


# ---- sweeps ----------------------------------------------------------------------------------------------------------


class Sweep:
    """Which bytecodes: every ``stride``-th from ``first`` on; ``first`` is drawn by lot where it is 0."""

    def __init__(self, stride: int, first: int = 0) -> None:
        self.stride = stride
        self.first = first

    def run(self, kill: Callable[[int], bool], n_min: int) -> None:
        """Call ``kill(at)`` for each, until it says that there was no bytecode ``at``. There must be ``n_min``."""
        at = self.first or random.randint(1, self.stride)
        while self._kill(kill, at):
            at += self.stride
        assert at > n_min, f"only {at} bytecodes were met: what was to be traced?"

    def _kill(self, kill: Callable[[int], bool], at: int) -> bool:
        try:
            return kill(at)
        except Exception as error:
            raise AssertionError(f"stopped before bytecode {at}: {error}") from error


def sweeps(shards: int = SHARDS, stride: int = SAMPLE_STRIDE) -> pytest.MarkDecorator:
    """Run a test over every ``stride``-th bytecode; and, marked ``crash``, over all of them, in ``shards`` tests."""
    full = [pytest.param(Sweep(shards, shard), id=f"full{shard}", marks=FULL) for shard in range(1, shards + 1)]
    return pytest.mark.parametrize("sweep", [pytest.param(Sweep(stride), id="sample"), *full])


def in_a_thread(function: Callable[[], T]) -> T:
    """What ``function`` returned or raised in a thread of its own.

    For what raises between any two bytecodes, also in the midst of a handler, where Python itself never looks for
    signals: there it does not get to the end of its own tidying, and the thread would be handling that exception for
    ever. This one takes it along.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome.result()


# ---- processes -------------------------------------------------------------------------------------------------------


class Child:
    """A fork that runs ``body`` and ends. It is signalled through its pidfd, never by a bare pid."""

    def __init__(self, body: Callable[[], None], life_s: int = PATIENCE_S) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the runner's threads hold nothing that a child needs
            self.pid = os.fork()
        if self.pid == 0:
            _live(body, life_s)
        self.pidfd = os.pidfd_open(self.pid)
        self.exitcode: int | None = None

    def ends_within(self, patience_s: float) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        return self.exitcode is not None or bool(select.select([self.pidfd], [], [], patience_s)[0])

    def kill(self) -> None:
        """SIGKILL, where it lives."""
        assert self.exitcode is None, "it was waited for, and its pidfd is another's"
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its exit status, or minus the signal that ended it. One that does not end in time is killed, and an error."""
        if self.exitcode is None:
            stuck = not self.ends_within(patience_s)
            if stuck:
                self.kill()
            _, status = os.waitpid(self.pid, 0)
            os.close(self.pidfd)
            self.exitcode = os.waitstatus_to_exitcode(status)
            assert not stuck, f"process {self.pid} did not end"
        return self.exitcode

    def was_killed(self) -> bool:
        """Wait for it; whether SIGKILL ended it. Any end but that and a good one is an error."""
        code = self.wait()
        assert code in (0, -signal.SIGKILL), f"process {self.pid} failed with status {code}"
        return code != 0


def _live(body: Callable[[], None], life_s: int) -> None:
    """In the child: with a watchdog of its own, and no way back into its parent's frames."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(life_s)
        body()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


# ---- the world -------------------------------------------------------------------------------------------------------


class World:
    """See the module. ``n_worker_deaths`` and ``n_coordinator_deaths`` are counted by the tests, which know.

    ``cancellable``: the sequences that a test has wanted to be cancelled.
    """

    n_made = 0

    def __init__(
        self,
        slots: int = 16,
        workers: int = 2,
        claims_max: int = 4,
        *,
        attempts_max: int = layout.ATTEMPT_MAX,
        tasks_max: int = 64,
    ) -> None:
        self.attempts_max = attempts_max
        self.n_worker_deaths = self.n_coordinator_deaths = 0
        self.cancellable: set[int] = set()
        self._log = os.memfd_create("effects")
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)
        self._log_read_bytes = 0
        self.effects = array("H", bytes(2 * tasks_max))
        n_counts = 3 + workers
        shared = memoryview(mmap.mmap(-1, n_counts * 2 * tasks_max)).cast("H")  # children count too
        self.runs, self.deliveries, self._outcomes, *self.starts = (shared[i::n_counts] for i in range(n_counts))
        self.segment = segment.create(slots, workers, claims_max)
        self._open_ends: list[CoordinatorEnd | WorkerEnd] = []
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            if child.exitcode is None:
                child.kill()
                child.wait()
        segment.unlink(self.segment.name)
        for end in self._open_ends:
            end.ring.lock.release_if_held()  # by a test that failed: glibc must not meet it in memory that is unmapped
            _close(end)
        self.segment.close()
        os.close(self._log)
        World.n_made += 1
        if World.n_made % 100 == 0:
            gc.collect()  # the ends are closures in cycles, and hold mappings, of which a process may have 65,530

    # ---- roles

    def coordinator(self) -> CoordinatorEnd:
        """A new coordinator's end, in this process: it attaches to whatever the last one left."""
        end = CoordinatorEnd(self.segment)
        self._open_ends.append(end)
        return end

    def worker(self, index: int) -> WorkerEnd:
        """Worker ``index``, in this process."""
        end = WorkerEnd(self.segment, index)
        self._open_ends.append(end)
        return end

    def start(self, body: Callable[[], None], life_s: int = PATIENCE_S) -> Child:
        """A child that runs ``body``; it does not outlive this world."""
        child = Child(body, life_s)
        self._children.append(child)
        return child

    def start_killed(self, body: Callable[[Bytecodes], object], at: int) -> Child:
        """A child that runs ``body``, and is killed before bytecode number ``at`` of it."""

        def traced() -> None:
            with Bytecodes(kill_before(at)) as bytecodes:
                body(bytecodes)

        return self.start(traced)

    # ---- a worker

    def work(
        self, index: int, batch: int, *, last: int = -1, before_start: Callable[[WorkerEnd, int], object] | None = None
    ) -> None:
        """A worker's life: until it is told to stop, or has run the task of sequence ``last``.

        ``before_start`` is called with each entry before it is started.
        """
        worker = WorkerEnd(self.segment, index)
        results = Results(worker.ring, index)
        n = 0
        while (entries := worker.claim(batch)) is not None:
            for entry in entries:
                if before_start is not None:
                    before_start(worker, entry)
                if not self.begin(worker, entry):
                    break
                self.run(results, entry)
                n += 1
                if layout.sequence_of(entry) == last:
                    worker.ring.words[RUN_STATE] = RunState.STOP
            self.end_claim(results)
            worker.count(n, 0, n)

    def begin(self, worker: WorkerEnd, entry: int) -> bool:
        """``start`` an entry; those that are not refused count, each worker's apart: two may be about the same task."""
        sequence, starts = layout.sequence_of(entry), self.starts[worker.index]
        starts[sequence] += 1
        started = worker.start(entry, 1)
        starts[sequence] -= not started
        return started

    def run(self, results: Results, entry: int) -> None:
        """A task, from its record to its result."""
        sequence = layout.sequence_of(entry)
        function, payload, _, _, cancelled = results.read_task(entry)
        if cancelled:
            results.post(entry, Status.CANCELLED, Encoding.MSGPACK, b"", 0)
            return
        assert payload == _SEQUENCE.pack(sequence), f"task {sequence} has the payload {payload!r}"
        self.runs[sequence] += 1
        if function == PLAIN:
            results.post(entry, Status.OK, Encoding.MSGPACK, value_of(entry), 1)
        else:
            self.stage(results, entry)
            self.commit(results, entry)

    def run_claim(self, worker: WorkerEnd, results: Results, entries: Sequence[int]) -> None:
        """Start and run ``entries`` until one was taken back."""
        for entry in entries:
            if not self.begin(worker, entry):
                break
            self.run(results, entry)
        self.end_claim(results)

    def end_claim(self, results: Results) -> None:
        """What a worker does when it has run a claim, or come to what was taken back: nothing."""

    def stage(self, results: Results, entry: int) -> None:
        """Announce the effect of ``entry``."""
        results.stage(entry, Encoding.MSGPACK, value_of(entry), 1, 0, 0, 0)

    def commit(self, results: Results, entry: int) -> None:
        """Have the effect that is staged, and say so."""
        self.effect(entry)
        results.finish(entry)

    def effect(self, entry: int) -> None:
        """What a task does to the world."""
        os.write(self._log, _SEQUENCE.pack(layout.sequence_of(entry)))

    def has_effect(self, sequence: int) -> bool:
        """Whether the log holds the effect of that task."""
        fresh = os.pread(self._log, os.fstat(self._log).st_size - self._log_read_bytes, self._log_read_bytes)
        self._log_read_bytes += len(fresh)
        for done in array("Q", fresh):
            self.effects[done] += 1
        return self.effects[sequence] > 0

    # ---- a coordinator

    def publish(self, end: CoordinatorEnd, n: int) -> None:
        """The next ``n`` tasks; fewer, where there is no room."""
        first = end.published
        end.publish([self.task(first + i) for i in range(min(n, end.n_free))])

    def task(self, sequence: int) -> Task:
        """The task of that sequence."""
        return Task(PLAIN if sequence % 3 == 2 else EFFECT, _SEQUENCE.pack(sequence))

    def collect(self, end: CoordinatorEnd) -> int:
        """Take what is done; how many."""
        return end.collect(lambda slot, entry: self.deliver(end, slot, entry))

    def deliver(self, end: CoordinatorEnd, slot: int, entry: int) -> None:
        """Take one result, which must be that of its task, and the same whenever it comes again."""
        sequence, attempt = layout.sequence_of(entry), layout.attempt_of(entry)
        record = end.results.read(entry)
        assert slot == layout.slot_of(entry)
        assert record.attempt == attempt
        _, payload, _, _, _ = end.results.read_task(entry)
        assert payload == _SEQUENCE.pack(sequence), f"the slot of task {sequence} holds another one, {payload!r}"
        if record.status == Status.OK:
            assert record.payload == value_of(entry), f"task {sequence} has the result {record.payload!r}"
        came = record.status << layout.ATTEMPT_BITS | attempt
        assert self._outcomes[sequence] in (0, came), f"task {sequence} has ended in two ways"
        self._outcomes[sequence] = came
        self.deliveries[sequence] += 1

    def recover(self, end: CoordinatorEnd, index: int) -> None:
        """Settle what the dead worker ``index`` held, row by row of the decision table."""
        done: list[int] = []
        again: list[int] = []
        blamed: list[int] = []
        for claim in end.claims_of_dead(index):
            attempt = layout.attempt_of(claim.entry)
            assert claim.deaths == attempt, f"{claim.deaths} deaths are counted in attempt {attempt}"
            disk = Disk.TARGET if self.has_effect(layout.sequence_of(claim.entry)) else Disk.STAGED
            action = recovery.decide(
                Where.CLAIMED,
                alive=False,
                result=claim.status,
                started=claim.started,
                disk=disk,
                may_retry=claim.deaths + 1 < self.attempts_max,
            )
            if action is Action.COMMIT and disk is Disk.STAGED:
                self.effect(claim.entry)
            if action is Action.COMMIT:
                end.post_for_dead(claim.entry, Status.OK)
            elif action is Action.FAIL:
                end.post_for_dead(claim.entry, Status.DIED)
            {Action.REQUEUE: again, Action.RETRY: blamed}.get(action, done).append(claim.entry)
        end.settle(index, done, again, blamed)

    # ---- the end

    def finish(self, end: CoordinatorEnd, total: int, dead: Sequence[int] = (), index: int = 0) -> None:
        """Recover the ``dead``, publish up to ``total``, drain with a worker ``index`` of this process, and check."""
        for each in dead:
            self.recover(end, each)
        end.ring.words[RUN_STATE] = RunState.RUN
        self.drain(end, total, index)
        self.check(end, total)

    def drain(self, end: CoordinatorEnd, total: int, index: int = 0) -> None:
        """Publish, run and collect in turns until ``total`` tasks were delivered, by a worker of this process."""
        worker = self.worker(index)
        results = Results(worker.ring, index)
        entries: list[int] | None = [0]
        for _ in range(TURNS_MAX):
            self.publish(end, total - end.published)
            entries = worker.exchange(3, False)
            assert entries is not None
            for entry in entries:
                assert self.begin(worker, entry), "an entry was taken back, and nobody takes any back"
                self.run(results, entry)
            self.end_claim(results)
            self.collect(end)
            if not entries and end.published == total == end.ring.words[DONE_HEAD]:
                worker.ring.words[worker.ring.worker_word(index, layout.W_PID)] = 0
                return
        raise AssertionError(f"lost: {total} tasks, but {end.ring.cursors()}, {end.ring.words[DONE_HEAD]} delivered")

    def check(self, end: CoordinatorEnd, total: int) -> None:
        """The invariants of the module, once all has been drained."""
        ring = end.ring
        assert ring.lock.try_call(ring.lock.mutex) == 0, "the mutex is held, or its owner has died unnoticed"
        ring.lock.release()
        cursors = ring.peek()
        assert cursors.ready_head == cursors.ready_tail == total
        assert cursors.retry_head == cursors.retry_tail
        assert cursors.done_tail == ring.words[DONE_HEAD] == total, "done holds more or less than one entry for each"
        assert not any(ring.claimed(worker) for worker in range(ring.workers))
        assert end.n_free == ring.slots
        self.has_effect(0)
        assert not any(self.effects[total:]), "something was done that nobody has published"
        n_deaths = sum(self.check_task(sequence) for sequence in range(total))
        assert n_deaths <= self.n_worker_deaths, f"{n_deaths} deaths are blamed, and {self.n_worker_deaths} were"

    def check_task(self, sequence: int) -> int:
        """The invariants of one task; how many deaths are blamed on it."""
        status, attempt = divmod(self._outcomes[sequence], 1 << layout.ATTEMPT_BITS)
        n_runs, n_effects = self.runs[sequence], self.effects[sequence]
        assert self.deliveries[sequence] >= 1, f"task {sequence} is lost"
        assert self.deliveries[sequence] <= 1 + self.n_coordinator_deaths, f"task {sequence} was delivered too often"
        n_starts = sum(starts[sequence] for starts in self.starts)
        assert attempt < n_starts or status == Status.CANCELLED, f"task {sequence} is blamed for nothing"
        has_effect = self.task(sequence).function == EFFECT
        if status == Status.OK:
            assert 1 <= n_runs <= attempt + 1, f"task {sequence} ran {n_runs} times, its last attempt is {attempt}"
            assert n_effects == has_effect, f"task {sequence} was done {n_effects} times"
            return attempt
        assert n_effects == 0, f"task {sequence} was done, and came as {Status(status).name}"
        if status == Status.CANCELLED:
            assert sequence in self.cancellable, f"task {sequence} was cancelled, and nobody wanted that"
            assert n_runs <= attempt
            return attempt
        assert status == Status.DIED, f"task {sequence} came as {Status(status).name}"
        assert n_runs <= attempt + 1 == self.attempts_max, f"task {sequence} failed after {attempt + 1} attempts"
        return attempt + 1


def value_of(entry: int) -> bytes:
    """The result of a task: nobody else's, and that of no other attempt."""
    return _encode([layout.sequence_of(entry) * 3 + 1, layout.attempt_of(entry)])


def _close(end: CoordinatorEnd | WorkerEnd) -> None:
    if isinstance(end, CoordinatorEnd):
        end.close()
        return
    for semaphore in (end._semaphore, end._coordinator):
        semaphore.close()
    end.ring.close()


def relinquish(end: CoordinatorEnd) -> None:
    """Let the segment have no coordinator, as if the process of ``end`` had died, so that another may attach."""
    end.ring.words[layout.COORDINATOR_PID_AT >> 3] = end.ring.words[layout.COORDINATOR_START_AT >> 3] = 0

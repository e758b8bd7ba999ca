"""The one thread that touches the ring: it publishes, collects, takes back, recovers.

    submit (any thread) --> backlog --publish--> ring --collect--> ticket.sink.deliver
    Supervisor --deaths--> Estates.settle --> Supervisor.start
    call (any thread) --> commands, run here

Because no other thread of the coordinator takes the ring's lock, a signal handler that raises (in the main thread)
never leaves it held. It sleeps on the coordinator's semaphore only; whoever has something for it posts that.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ringpool.coordinator.ending import Ending
from ringpool.coordinator.estate import Estates
from ringpool.coordinator.supervisor import Death, Supervisor
from ringpool.errors import CoordinatorClosedError, CrashLoopError, RingpoolError
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import ResultRecord

if TYPE_CHECKING:
    from ringpool.coordinator.futures import RunInbox

IDLE_WAIT_S = 0.1
STOP_TIMEOUT_S = 1.0
COLLECT_EVERY_S = 0.016  # how long results may wait for company, while the workers have more to do ...
CROWD = 8  # ... and so many arrive in that time
TAKE_BACK_AFTER_S = 0.02  # a claim of several tasks that has not moved for so long is broken up
SPINS = 60  # looks for results before the pump sleeps, about 100 us, where few tasks are under way
PUBLISH_MAX = 256
_OK, _CANCELLED, _BLOB = (
    int(Status.OK),
    int(Status.CANCELLED),
    int(Encoding.BLOB),
)  # plain integers compare faster than the enums


class Sink(Protocol):
    """Where a task's outcome goes. Called in the pump's thread: must be quick, and not raise."""

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """The task has a result."""
        ...

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """The task will never have one."""
        ...

    def drop(self, ticket: Ticket) -> None:
        """The task was taken out of the queue before it got into the ring."""
        ...

    def settle(self) -> None:
        """All that was there for now has been delivered."""
        ...


class Ticket(msgspec.Struct, eq=False):
    """A task on its way through the coordinator. ``sequence``: in the ring, from when it is published; -1 before.

    ``source`` and ``output`` as the caller gave them; ``target``: the output's absolute path; ``result_blob``:
    encoding, body and buffers of a result that is too large for its record, or its name, or the error of reading it.
    """

    task: Task
    sink: Any  # a Sink; msgspec takes no protocol
    source: Any
    output: Any
    target: bytes | None = None
    result_blob: Any = None
    sequence: int = -1
    cancelled: bool = False


class Pump:
    """Owns ``end``, the coordinator's end of the ring, and feeds it from a backlog. See the module."""

    def __init__(self, end: CoordinatorEnd, attempts_max: int) -> None:
        self.end = end
        self.supervisor: Supervisor | None = None
        self.broken: RingpoolError | None = None
        self.n_completed = self.n_failed = self.n_deaths = self.n_retried = self.n_taken_back = 0
        self.segment = end.ring.segment.name
        self._estates = Estates(end, attempts_max)
        self._backlog: deque[Ticket] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._deaths: deque[Death] = deque()
        self._tickets: list[Ticket | None] = [None] * end.ring.slots
        self._in_ring = 0
        self._touched: set[Sink] = set()
        self._sleeping = False
        self._moved = False  # in this turn: a task into the ring, or out of it
        self._stopping = False
        self._ending = False
        self._idle = threading.Lock()  # locked: not idle, as far as anybody has been told
        self._idle.acquire()
        self._begun = False
        self._ending_of_thread = Ending()
        self._idle_wanted = False  # somebody waits, or has waited, for it
        self._rate_per_s = 0.0
        self._rated_total = 0
        self._rated_at = time.monotonic()
        self._claims_watched: list[int] = [0] * end.ring.workers
        self._watched_at = self._rated_at
        self._thread = threading.Thread(target=self._run, name="ringpool-pump", daemon=True)

    # ---- for other threads

    def begin(self, supervisor: Supervisor) -> None:
        """Start the thread."""
        self.supervisor = supervisor
        self._begun = True
        self._thread.start()

    def queue(self, ticket: Ticket) -> None:
        """Queue a ticket. The pump sees it when it wakes, within 0.1 s; ``wake`` it after one or some of them."""
        self._backlog.append(ticket)

    def wake(self) -> None:
        """There is something for the pump."""
        self._wake()
        if self._ending_of_thread.has_come:  # it ended between the caller's look and this: nobody would answer
            self._fail_all(self.broken or CoordinatorClosedError())

    def on_death(self, death: Death) -> None:
        """A worker has died."""
        self._deaths.append(death)
        self._wake()

    def on_failure(self, error: BaseException) -> None:
        """The supervisor has failed: nobody will report deaths any more."""
        self._commands.append(lambda: self._break(RingpoolError(f"the supervisor of the workers failed: {error!r}")))
        self._wake()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` in the pump's thread, and return what it returned."""
        if threading.current_thread() is self._thread:
            return function()
        outcome: list[tuple[Any, Exception | None]] = []
        done = threading.Lock()  # a bare lock, here and below: see RunInbox
        done.acquire()

        def run() -> None:
            try:
                outcome.append((function(), None))
            except Exception as error:
                outcome.append((None, error))
            done.release()

        self._commands.append(run)
        self._wake()
        while not outcome:
            if not done.acquire(timeout=1.0) and not outcome and self._ending_of_thread.has_come:
                raise CoordinatorClosedError
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def wait_idle(self) -> None:
        """Wait until nothing is queued and nothing is in the ring, or the thread has ended."""
        self._idle_wanted = True
        while not self._is_idle() and not self._ending_of_thread.has_come:
            self._idle.acquire(timeout=0.5)

    def expect_exits(self) -> None:
        """From now on workers end because they were told to."""
        self._ending = True

    def stop(self) -> bool:
        """End the thread; what is queued or in the ring fails with ``CoordinatorClosedError``. Whether it has ended.

        It may not, where it waits for a lock of a future that Ctrl-C has left held, or for a future's callback.
        """
        self._stopping = True
        self._wake()
        return not self._begun or self._ending_of_thread.wait(STOP_TIMEOUT_S)

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs in the pump's thread: in a future's callback."""
        return threading.current_thread() is self._thread

    @property
    def in_flight(self) -> tuple[int, int]:
        """How many tasks wait outside the ring, and how many are in it."""
        return len(self._backlog), self._in_ring

    def is_running(self, ticket: Ticket) -> bool:
        """Whether some worker is at this task; a hint."""
        ring = self.end.ring
        return ticket.sequence >= 0 and any(
            layout.sequence_of(ring.words[ring.worker_word(w, layout.W_RUNNING)] - 1) == ticket.sequence
            for w in range(ring.workers)
        )

    def cancel(self, ticket: Ticket) -> bool:
        """Keep a task from starting. False where a worker has it already. Call it through ``call``."""
        if ticket.sequence < 0:
            ticket.cancelled = True
            return True
        if self.end.cancel((ticket.sequence,)):
            ticket.cancelled = True
            return True
        return False

    def cancel_all(self) -> list[Ticket]:
        """Keep all tasks from starting that no worker has; those that were not published. Through ``call``."""
        dropped = list(self._backlog)
        self._backlog.clear()
        self.end.cancel_unclaimed()
        return dropped

    def abandon(self, inbox: RunInbox) -> None:
        """Nobody takes the results of a run any more: keep its tasks from starting. Returns at once."""

        def drop() -> None:
            for _ in range(len(self._backlog)):
                ticket = self._backlog.popleft()
                if ticket.sink is inbox:
                    self._free_payload(ticket)
                else:
                    self._backlog.append(ticket)
            left = {ticket.sequence for ticket in self._tickets if ticket is not None and ticket.sink is inbox}
            self.end.cancel(left)
            inbox.retire(len(left))

        self._commands.append(drop)
        self._wake()

    def _wake(self) -> None:
        if self._sleeping:
            self._sleeping = False
            self.end.post()

    def _is_idle(self) -> bool:
        return not self._backlog and not self._in_ring

    # ---- the thread

    def _run(self) -> None:
        error: BaseException = CoordinatorClosedError()
        try:
            while not self._stopping:
                self._turn()
        except BaseException as unexpected:  # the ring is corrupt, or we are wrong: nobody may wait for ever
            error = unexpected
            self.broken = unexpected if isinstance(unexpected, RingpoolError) else RingpoolError(repr(unexpected))
            traceback.print_exc()
        try:
            while self._deaths:  # of workers that were killed at the end: what they had staged goes
                self._recover(self._deaths.popleft())
        except Exception:
            traceback.print_exc()
        finally:
            self._fail_all(error)
            self._ending_of_thread.reached()

    def _turn(self) -> None:
        self._moved = self._publish()
        if self.end.has_results and self.end.collect(self._deliver):
            self._after_delivery()
            self._moved = True
        while self._commands:
            self._commands.popleft()()
            self._tell_idle()
        while self._deaths:
            self._recover(self._deaths.popleft())
        if self.broken is not None and self._backlog:
            self._fail_all(self.broken)
        self._watch_claims()
        self._sleep()

    def _publish(self) -> bool:
        """Move tasks from the backlog into the ring, as far as it has room; whether there were any."""
        backlog, end = self._backlog, self.end
        if not backlog:
            return False
        while backlog and end.n_free and not self.broken:
            n = min(end.n_free, PUBLISH_MAX, len(backlog))
            self._in_ring += n  # before they leave the backlog: whoever waits for both to be empty must not see a gap
            batch = [backlog.popleft() for _ in range(n)]
            if any(ticket.cancelled for ticket in batch):
                batch = self._without_cancelled(batch)
            sequence = end.published
            slots = end.publish([ticket.task for ticket in batch])
            for ticket, slot in zip(batch, slots, strict=True):
                ticket.sequence = sequence
                sequence += 1
                self._tickets[slot] = ticket
        return True

    def _without_cancelled(self, batch: list[Ticket]) -> list[Ticket]:
        kept: list[Ticket] = []
        for ticket in batch:
            if ticket.cancelled:
                self._in_ring -= 1
                self._free_payload(ticket)
            else:
                kept.append(ticket)
        return kept

    def _deliver(self, slot: int, entry: int) -> None:
        ticket = self._tickets[slot]
        record = self.end.results.read(entry)
        blob: Any = self._take_blob(entry) if record.encoding == _BLOB else None
        if ticket is None:  # the pool broke, and its futures were told so, while a worker was still at this
            assert self.broken is not None, "a result that nobody waits for"
            return
        ticket.result_blob = blob
        self._tickets[slot] = None
        self._in_ring -= 1
        if ticket.task.blob:
            self._free_payload(ticket)
        if record.status == _OK:
            self.n_completed += 1
        elif record.status != _CANCELLED:
            self.n_failed += 1
        try:
            ticket.sink.deliver(ticket, record)
        except BaseException:  # a future's callback may raise what it likes; it must not stop the pool
            traceback.print_exc()
        self._touched.add(ticket.sink)

    def _take_blob(self, entry: int) -> Any:
        """Map a result's blob and take its name away: from here on it lives as long as somebody looks at it."""
        name = blobs.result_name(self.segment, layout.sequence_of(entry), layout.attempt_of(entry))
        try:
            blob = blobs.read(name, writable=True)
        except OSError:  # no descriptor left, say: whoever takes the result tries again
            return name
        except RingpoolError as error:
            blob = error  # which its reader raises
        blobs.unlink(name)
        return blob

    def _free_payload(self, ticket: Ticket) -> None:
        if ticket.task.blob:
            blobs.unlink(blobs.payload_name(self.segment, ticket.task.blob))

    def _after_delivery(self) -> None:
        for sink in self._touched:
            sink.settle()
        self._touched.clear()
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self._idle_wanted and self._is_idle() and self._idle.locked():
            self._idle.release()

    def _sleep(self) -> None:
        self._sleeping = True
        if (self._backlog and self.end.n_free and not self.broken) or self._deaths or self._commands or self._stopping:
            self._sleeping = False
            return
        if self._moved and 0 < self._in_ring <= self.end.ring.workers and self.end.spin(SPINS):
            self._sleeping = False
            return
        if self._results_per_s() * COLLECT_EVERY_S >= CROWD:
            # The clock wakes us, which costs the workers nothing; a post to an idle core can cost them 100 us.
            self.end.wait(COLLECT_EVERY_S, max(1, self._in_ring // 2), COLLECT_EVERY_S)
        else:
            self.end.wait(TAKE_BACK_AFTER_S if self._in_ring > 1 else IDLE_WAIT_S, 1, 0)
        self._sleeping = False

    def _results_per_s(self) -> float:
        """How many results arrive, by the last tens of milliseconds."""
        now = time.monotonic()
        elapsed_s = now - self._rated_at
        if elapsed_s > 0.01:
            total = self.n_completed + self.n_failed
            self._rate_per_s += ((total - self._rated_total) / elapsed_s - self._rate_per_s) / 2
            self._rated_total, self._rated_at = total, now
        return self._rate_per_s

    def _watch_claims(self) -> None:
        """Break up claims of several tasks that do not move: a long one has got in among short ones."""
        now = time.monotonic()
        if now - self._watched_at < TAKE_BACK_AFTER_S or not self._in_ring:
            return
        self._watched_at = now
        ring = self.end.ring
        for worker in range(ring.workers):
            claim = ring.words[ring.worker_word(worker, layout.W_CLAIM)]
            if claim == self._claims_watched[worker] and claim & layout.CLAIM_COUNT_MASK > 1:
                self.n_taken_back += self.end.take_back(worker)
            self._claims_watched[worker] = claim

    def _recover(self, death: Death) -> None:
        """Settle what the worker held; then have it replaced, unless workers die like flies."""
        n_retried, crash_loop = self._estates.settle(death)
        if self._ending:
            return
        self.n_deaths += 1
        self.n_retried += n_retried
        if crash_loop:
            self._break(CrashLoopError(self._estates.n_barren, death.signal, death.exitcode))
        elif self.supervisor is not None:
            self.supervisor.start(death.index)

    def _break(self, error: RingpoolError) -> None:
        self.broken = error
        if self.supervisor is not None:
            self.supervisor.kill_all()
        self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Nobody waits for ever: every task that has no result gets ``error``."""
        waiting = [ticket for ticket in self._tickets if ticket is not None]
        self._tickets = [None] * len(self._tickets)
        while self._backlog:
            waiting.append(self._backlog.popleft())
        self._in_ring = 0
        for ticket in waiting:
            try:
                ticket.sink.fail(ticket, error)
            except BaseException:  # as in _deliver
                traceback.print_exc()
            self._touched.add(ticket.sink)
        self._after_delivery()

"""The one thread that touches the ring: it publishes, collects, takes back, recovers.

    submit (any thread) --> backlog --publish--> ring --collect--> ticket.sink.deliver
    Supervisor --deaths--> Estates.settle --> Supervisor.start
    tasks that wait, and no worker idle --> Supervisor.start, where workers are started on demand
    call (any thread) --> commands, run here

Because no other thread of the coordinator takes the ring's lock, a signal handler that raises (in the main thread)
never leaves it held. It sleeps on the coordinator's semaphore only; whoever has something for it posts that.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ringpool.coordinator.aside import LOOK_S, Aside
from ringpool.coordinator.balance import Balance
from ringpool.coordinator.ending import Ending
from ringpool.coordinator.futures import PoolFuture
from ringpool.coordinator.pace import Pace
from ringpool.coordinator.parcels import Parcels
from ringpool.coordinator.publisher import Publisher
from ringpool.coordinator.staff import Staff
from ringpool.coordinator.supervisor import Death
from ringpool.coordinator.tickets import LEAVING, QUEUED, Part, Sink, Ticket
from ringpool.errors import CoordinatorClosedError, RingpoolError, WrongProcessError, WrongThreadError
from ringpool.shm import layout
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import ResultRecord
from ringpool.shm.vectors import Arena

if TYPE_CHECKING:
    from ringpool.coordinator.inbox import Inbox
    from ringpool.coordinator.maprun import MapRun

STOP_TIMEOUT_S = 1.0
SPINS = 100  # looks for results before the pump sleeps, some 50 us, where few tasks are under way
_OK, _DIED, _CANCELLED = int(Status.OK), int(Status.DIED), int(Status.CANCELLED)  # which compare faster
_BLOB = int(Encoding.BLOB)


class Pump:
    """Owns ``end``, the coordinator's end of the ring, and feeds it from a backlog. The rest is for its ``Staff``.

    ``ended_error``: makes the error of what is not done when the pool is ended.
    """

    def __init__(
        self,
        end: CoordinatorEnd,
        n_started: int,
        on_demand: bool = False,
        memory_limit_bytes: int | None = None,
        on_exit: Callable[[Death, str], None] | None = None,
        ended_error: Callable[[], RingpoolError] = CoordinatorClosedError,
    ) -> None:
        self.end = end
        self._pid = os.getpid()
        self.ended_error = ended_error
        self.broken: RingpoolError | None = None
        self.aside = Aside()
        self.n_completed = self.n_failed = 0
        self.parcels = Parcels(end.ring.segment.name, retains=end.retains)
        self.publisher = Publisher(end, self.parcels, lambda timeout_s: self.staff.limits.expect(timeout_s))
        self.balance = Balance(end, self.publisher.ticket_of)
        self._pace = Pace(end, self.balance)
        self.staff = Staff(end, self.publisher.ticket_of, n_started, on_demand, memory_limit_bytes, on_exit)
        self.feeders: set[MapRun] = set()  # maps whose items may have to be waited for
        self._dropped: list[Ticket] = []  # of futures, out of the backlog, and perhaps not told so by who cancels all
        self._commands: deque[Callable[[], object]] = deque()
        self._deaths: deque[Death] = deque()
        self._touched: set[Sink] = set()
        self._sleeping = False
        self._moved = False  # in this turn: a task into the ring, or out of it
        self._stopping = self._cancels_all = False
        self._idle = threading.Lock()  # locked: not idle, as far as anybody has been told
        self._idle.acquire()
        self._begun = self._may_run = False
        self._ending_of_thread = Ending()
        self._idle_wanted = False  # somebody waits, or has waited, for it
        self._thread = threading.Thread(target=self._run, name="ringpool-pump", daemon=True)

    # ---- for other threads

    def begin(self) -> None:
        """Start the thread. Raises ``RuntimeError`` where that cannot be: the interpreter ends, or has no room."""
        self._may_run = True  # before: an exception of a signal handler may come while its first step is waited for
        try:
            self._thread.start()
        except RuntimeError:
            self._may_run = False
            raise
        self._begun = True

    @property
    def has_begun(self) -> bool:
        """Whether the thread was started."""
        return self._begun

    def queue(self, ticket: Ticket) -> None:
        """Queue a ticket. The pump sees it when it wakes, within 0.1 s; ``wake`` it after one or some of them."""
        self.publisher.backlog.append(ticket)

    def wake(self) -> None:
        """There is something for the pump."""
        self._wake()
        if self._ending_of_thread.has_come:  # it ended between the caller's look and this: nobody would answer
            self._fail_all(self.broken or self.ended_error())
            self.aside.finish()

    def nudge(self) -> None:
        """It may oversleep: a semaphore's timeout follows the wall clock, and that may be set back meanwhile."""
        self._wake()

    def on_death(self, death: Death) -> None:
        """A worker has died."""
        self._deaths.append(death)
        self._wake()

    def on_failure(self, error: BaseException) -> None:
        """The supervisor has failed: nobody will report deaths any more."""
        self.call_soon(lambda: self._break(RingpoolError(f"the supervisor of the workers failed: {error!r}")))

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run ``function`` in the pump's thread, unless that ends before. From any thread; returns at once."""
        self._commands.append(function)
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

        self.call_soon(run)
        while not outcome:
            if not done.acquire(timeout=1.0) and not outcome and self._ending_of_thread.has_come:
                raise CoordinatorClosedError
        value, error = outcome[0]
        if error is not None:
            try:
                raise error
            finally:
                del error, outcome
        return value

    def wait_idle(self) -> None:
        """Wait until nothing is queued and nothing is in the ring, or the thread has ended."""
        self._idle_wanted = True
        while self._begun and not self._is_idle() and not self._ending_of_thread.has_come:
            self._idle.acquire(timeout=0.5)

    def expect_exits(self) -> None:
        """From now on workers end because they were told to."""
        self.staff.leaving = True

    def stop(self) -> bool:
        """End the thread; what is queued or in the ring fails with the error of ``ended_error``. Whether it has ended.

        It may not, where it waits for a future's callback.
        """
        self._stopping = True
        self._wake()
        return not self._may_run or self._ending_of_thread.wait(STOP_TIMEOUT_S)

    def check_thread(self, action: str = "wait for results of its pool") -> None:
        """Raise ``WrongThreadError`` where the caller runs in the pump's thread, in a future's callback."""
        if threading.current_thread() is self._thread:
            raise WrongThreadError(action)

    def check_process(self) -> None:
        """Raise ``WrongProcessError`` in a fork of the program, where nothing arrives."""
        if os.getpid() != self._pid:
            raise WrongProcessError(self._pid, os.getpid())

    @property
    def in_flight(self) -> tuple[int, int]:
        """How many tasks wait outside the ring, and how many are in it."""
        return len(self.publisher.backlog), self.publisher.in_ring

    @property
    def items_in_flight(self) -> tuple[int, int]:
        """The same, each item of a vector for itself, without those whose outcomes were delivered early."""
        in_ring = [ticket for ticket in self.publisher.tickets if ticket is not None]
        queued, published = (
            sum(1 if ticket.part is None else ticket.part.n - ticket.part.taken.n for ticket in tickets)
            for tickets in (self.publisher.backlog.tickets(), in_ring)
        )
        return queued, published

    def is_running(self, ticket: Ticket) -> bool:
        """Whether some worker is at this task; a hint."""
        ring = self.end.ring
        return ticket.sequence >= 0 and any(
            layout.sequence_of(ring.words[ring.worker_word(w, layout.W_RUNNING)] - 1) == ticket.sequence
            for w in range(ring.workers)
        )

    def keep_from_starting(self, ticket: Ticket) -> bool:
        """Whether it is certain that no worker has started the task, or will. From any thread; waits for nobody. The
        caller holds the lock without which its sink takes no outcome: until then, the slot is not given to another.
        In a fork of the program it is not: the task is its parent's.
        """
        if os.getpid() != self._pid:
            return False
        ticket.cancelled = True  # and then read ``sequence``; the pump has it the other way about
        while (sequence := ticket.sequence) == LEAVING and not self._ending_of_thread.has_come:
            time.sleep(0)  # while the pump publishes, in which it waits for no lock of a future
        if sequence < 0:
            return sequence == QUEUED
        ticket.spared = True
        try:
            return self.end.refuse_unstarted(ticket.slot, sequence)
        except ValueError:  # the ring is closed
            return False

    def cancel_all(self) -> list[Ticket]:
        """Keep all from starting that has not begun; those of futures, those that were not published, and what vectors
        that run are cut short by. Through ``call``. What comes back from then on, or comes too late, is dropped.

        A worker that is on its way has the task that it is started for, one that has just claimed some the first.
        """
        self._cancels_all = True
        on_demand = self.staff.on_demand
        if on_demand:
            self._publish()
            self.staff.hire()
        dropped = self.publisher.backlog.drain()
        self._dropped += [ticket for ticket in dropped if isinstance(ticket.sink, PoolFuture)]
        if self.publisher.n_vectors and self.publisher.arena is not None:
            dropped += self.balance.cut_short(self.publisher.arena, self.publisher.tickets)
        for ticket in self.publisher.tickets:
            if ticket is not None:
                ticket.attempts_max = 0  # what runs is not begun again
        self.balance.refuse_claimed()
        self.end.cancel_unclaimed(self.staff.on_their_way() if on_demand else 0)
        return dropped + [ticket for ticket in self.publisher.tickets if ticket is not None and self._is_barred(ticket)]

    def _is_barred(self, ticket: Ticket) -> bool:
        """Whether it is a future's task, refused before a worker has started it: it may be long until one comes by."""
        slot, sequence = ticket.slot, ticket.sequence
        is_refused = isinstance(ticket.sink, PoolFuture) and self.end.is_refused(slot, sequence)
        return is_refused and self.end.refuse_unstarted(slot, sequence)

    def refuse_all(self) -> list[Ticket]:
        """``cancel_all``, and the first that a worker has claimed and not started. Through ``call``."""
        dropped = self.cancel_all()
        for ticket in self.publisher.tickets:
            if ticket is not None:
                self.end.refuse(ticket.slot, ticket.sequence)
        return dropped

    def abandon(self, inbox: Inbox) -> None:
        """Nobody takes the results of a run any more: keep its tasks from starting. Returns at once."""

        def drop() -> None:
            for ticket in self.publisher.backlog.remove_if(lambda ticket: ticket.sink is inbox):
                self.parcels.discard_payload(ticket.task)
            tickets = [ticket for ticket in self.publisher.tickets if ticket is not None and ticket.sink is inbox]
            for ticket in tickets:
                self.end.refuse(ticket.slot, ticket.sequence)
                if ticket.part is not None:
                    self._cut_short(ticket.part)
            inbox.retire(len(tickets))

        self.call_soon(drop)

    def _cut_short(self, part: Part) -> None:
        """The worker that runs a vector ends the item that it is at, and no more."""
        if part.chunk is not None and self.publisher.arena is not None:
            part.end = self.publisher.arena.split(part.span(part.chunk), lambda _n: 0)

    def _wake(self) -> None:
        if self._sleeping:
            self._sleeping = False
            self.end.post()

    def release(self, n: int) -> None:
        """The ``n`` oldest results that the ring retains are safe elsewhere. From any thread; returns at once."""

        def release() -> None:
            self.end.release(n)
            self.parcels.release(n)

        self.call_soon(release)

    def _is_idle(self) -> bool:
        return not (self.publisher.backlog or self.publisher.in_ring or self.aside)

    # ---- the thread

    def _run(self) -> None:
        error: BaseException = self.ended_error()
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
            self._fail_all(error)  # what came in between: later ones are told by ``wake``
            self.aside.finish()

    def _turn(self) -> None:
        for feeder in self.feeders.copy():
            feeder.send_drawn()
        if self._cancels_all and self.publisher.backlog:
            self._drop_backlog()
        self._moved = self._publish()
        if self.end.has_results and self.end.collect(self._deliver):
            self._after_delivery()
            self._moved = True
        if self.aside:
            self.aside.look()
            self._tell_idle()
        while self._commands:
            self._commands.popleft()()
            self._tell_idle()
        while self._deaths:
            self._recover(self._deaths.popleft())
        if self.broken is not None and self.publisher.backlog:
            self._fail_all(self.broken)
        look_s = None
        if self.publisher.in_ring:
            is_time = self.balance.watch_claims()
            if self.publisher.n_vectors and self.publisher.arena is not None:
                if is_time:
                    self._touched.update(self.balance.deliver_overdue(self.publisher.arena))
                    self._after_delivery()
                    self.publisher.requeue(self.balance.relieve_vectors(self.publisher.arena))
                if not self.publisher.backlog:
                    self._split_vectors(self.publisher.arena)
            self.staff.hire()
            look_s = self.staff.limits.watch(time.monotonic_ns())
        if self.aside:
            look_s = LOOK_S if look_s is None else min(look_s, LOOK_S)
        self._sleep(look_s)

    def _split_vectors(self, arena: Arena) -> None:
        taken = self.balance.split_vectors(arena)
        if taken:
            self.publisher.requeue(taken)
            self._publish()

    def _publish(self) -> bool:
        return self.broken is None and self.publisher.publish()

    def _drop_backlog(self) -> None:
        """All was cancelled: what has come back of it since, or has come too late, is so too."""
        for ticket in self.publisher.backlog.drain():
            try:
                ticket.sink.drop(ticket)
            except BaseException:  # a future's callback may raise what it likes
                traceback.print_exc()
            self._touched.add(ticket.sink)
        self._after_delivery()

    def _deliver(self, slot: int, entry: int) -> None:
        ticket = self.publisher.tickets[slot]
        record = self.end.results.read(entry)
        blob: Any = self.parcels.take(entry, record.worker) if record.encoding == _BLOB else None
        if ticket is None:  # the pool broke, and its futures were told so, while a worker was still at this
            assert self.broken is not None, "a result that nobody waits for"
            return
        ticket.result_blob = blob
        if self.end.retains:
            self.parcels.retain(ticket.task, entry, is_parcel=record.encoding == _BLOB)
        self.publisher.left(slot, layout.sequence_of(entry))
        if ticket.timeout_s is not None:
            self.staff.limits.release()
        if ticket.spared and record.status == _CANCELLED and not self._cancels_all and ticket.sink.unspoiled(ticket):
            ticket.attempts_max -= record.attempt  # workers that died in it: a new task of the ring begins at none
            self.publisher.put_back(ticket, layout.sequence_of(entry))
            return
        if ticket.part is None:
            self.publisher.in_ring -= 1
        if ticket.task.blob and not self.end.retains:
            was_run_once = record.attempt == 0 and ticket.first_sequence < 0
            self.parcels.discard_payload(ticket.task, entry if was_run_once else None)
        self._pace.n_results += 1
        if ticket.part is None or not ticket.sink.counts_items:
            if record.status == _OK:
                self.n_completed += 1
            elif record.status != _CANCELLED:
                self.n_failed += 1
        try:
            if ticket.part is not None:
                self._deliver_vector(ticket, entry, record)
            else:
                ticket.sink.deliver(ticket, record)
        except BaseException as error:  # of a decoder, or of a callback: nobody waits for ever, and the pool goes on
            traceback.print_exc()
            self._fail(ticket, error)
        self._touched.add(ticket.sink)

    def _deliver_vector(self, ticket: Ticket, entry: int, record: ResultRecord) -> None:
        """Outcomes are taken out of the chunk, which is free then; what was not run is queued again."""
        part, arena = ticket.part, self.publisher.arena
        assert part is not None
        assert part.chunk is not None
        assert arena is not None
        again: list[Ticket] = []
        try:
            again = ticket.sink.deliver_vector(ticket, record, arena, self.parcels.name_of_result(entry))
        finally:
            chunk, part.chunk = part.chunk, None
            self.publisher.vector_left(chunk, again)
        if record.status == _DIED:
            self.staff.n_retried += sum(each.part is not None and each.part.deaths > 0 for each in again)

    def _after_delivery(self) -> None:
        touched, self._touched = self._touched, set()  # a sink may queue more, and where the pool has ended, that fails
        for sink in touched:
            sink.settle()
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self._idle_wanted and self._is_idle() and self._idle.locked():
            self._idle.release()

    def _sleep(self, look_s: float | None) -> None:
        """Until there is something to do, or ``look_s`` seconds are over."""
        self._sleeping = True
        may_publish = self.broken is None and self.publisher.may_publish
        if may_publish or self._deaths or self._commands or self._stopping:
            self._sleeping = False
            return
        if self._moved and 0 < self.publisher.in_ring <= self.end.ring.workers and self.end.spin(SPINS):
            self._sleeping = False
            return
        self._pace.sleep(
            self.publisher.in_ring,
            look_s,
            has_vectors=self.publisher.n_vectors > 0,
            is_held_up=self.publisher.is_held_up,
            holds=any(feeder.holds_items for feeder in self.feeders.copy()),
        )
        self._sleeping = False

    def _recover(self, death: Death) -> None:
        """Settle what the worker held; it is replaced, unless that says that no worker can live."""
        broken = self.staff.settle(death)
        if broken is not None:
            self._break(broken)

    def _break(self, error: RingpoolError) -> None:
        self.broken = error
        if self.staff.supervisor is not None:
            self.staff.supervisor.kill_all()
        self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Nobody waits for ever: every task that has no result gets ``error``."""
        waiting = self.publisher.give_up()
        dropped, self._dropped = self._dropped, []  # Ctrl-C, or a callback, may have kept some from being told
        waiting += [ticket for ticket in dropped if not ticket.sink.done()]
        for ticket in waiting:
            self._fail(ticket, copy.copy(error))
            self._touched.add(ticket.sink)
        self._after_delivery()

    @staticmethod
    def _fail(ticket: Ticket, error: BaseException) -> None:
        try:
            ticket.sink.fail(ticket, error)
        except BaseException:  # a future's callback may raise what it likes
            traceback.print_exc()

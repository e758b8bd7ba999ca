"""One run of a job: draw inputs, skip what is done, have the rest done, and write down what came of it.

    inputs --verify--> skipped
              |
              +--> ticket --> pump --> workers --> inbox --> rows --batch--> ledger --> pump.release
                                                                               |
                    results stay in the segment until here: who is killed before loses none of them

    running --stop--> no new input, what has not started is dropped --grace over, or stop again--> workers are killed
       |                                |                                                             |
       +--all done--------------------- +---------------------------------- rows, drain, segment gone +

A batch is written when it has 1,024 rows, when its results hold 8 MiB of /dev/shm, or when it is a quarter of a second
old. Used by one thread, except ``stop``.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ringpool.coordinator import lists, verify
from ringpool.coordinator.futures import outcome_of
from ringpool.coordinator.inbox import Inbox
from ringpool.coordinator.jobrows import KIND, MADE, SIZE, STATE, row_of, row_of_error
from ringpool.coordinator.jobwork import Failure, Planned, Progress, Stops, Work
from ringpool.coordinator.ledger import Ledger, State
from ringpool.coordinator.ledgerqueries import decode_made
from ringpool.coordinator.pool import Pool
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import FunctionChangedError, MemoryLimitError, UnknownFunctionError
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import Task
from ringpool.shm.layout import Encoding, Form, Status
from ringpool.shm.results import ResultRecord
from ringpool.workers import jobtasks, values
from ringpool.workers.jobtasks import JobPayload

WINDOW = 1024  # tasks under way
RATED_S = 0.1  # ... where their rate is limited, what may begin in this time: what waits would begin all at once
SLOTS = 4 * WINDOW  # ... and results that the ledger does not have yet
BATCH_ROWS = 1024
BATCH_S = 0.25
BATCH_BYTES = 8 << 20  # of results that are blobs: a container's /dev/shm may have 64 MiB in all
BATCHES_KEPT = 4  # the segment forgets a batch as soon as the pump has a turn
FILL_S = 0.002  # how long inputs are drawn while results wait to be taken
FLUSH_TICKETS = 64
TELL_S = 0.1
FAILURES_KEPT = 20
_OK, _DIED, _CANCELLED, _BLOB = int(Status.OK), int(Status.DIED), int(Status.CANCELLED), int(Encoding.BLOB)


class JobTicket(Ticket, eq=False):
    """A ticket with what its row will say."""

    work: Any = None


class JobInbox(Inbox):
    """Where the pump puts results: records, the error of a broken pool, or None for what was dropped."""

    def deliver(self, ticket: Ticket, record: ResultRecord) -> None:
        """A task has a result."""
        self.arrived.append((ticket, record))

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """A task will never have one: the pool has ended."""
        self.arrived.append((ticket, error))

    def drop(self, ticket: Ticket) -> None:
        """A task was taken out of the queue: the run stops."""
        self.arrived.append((ticket, None))

    def unspoiled(self, _ticket: Ticket) -> bool:
        """Whether a task whose cancel came too late is to run after all."""
        return False


_NOT_ASKED_FOR: Any = object()  # instead of a work


class StopNow(BaseException):
    """The run is to end at once."""


class RunSettings(NamedTuple):
    """What a run needs to know; see ``JobOptions``."""

    verify: verify.Level
    fingerprints: bool
    checksums: bool
    attempts_max: int
    timeout_s: float | None
    max_failures: int | None
    max_failure_share: float | None
    rate_per_s: float | None
    grace_s: float


class JobRun:
    """Does ``works``, and keeps ``ledger`` (None: there is none yet, for ``plan``) of ``job``.

    ``stops``: what it is asked by others, perhaps before it is made. ``only``: what is none of its works says no to it;
    the run hears, tells and writes meanwhile.
    ``on_progress(progress)`` is called ten times a second at most; ``on_row(work, row)`` for each file that ended.
    """

    def __init__(
        self,
        works: Iterator[Work],
        ledger: Ledger | None,
        job: int,
        settings: RunSettings,
        progress: Progress,
        *,
        stops: Stops | None = None,
        only: Callable[[Work], bool] | None = None,
        redo: Callable[[Work], bool] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_row: Callable[[Work, tuple[Any, ...], Any], None] | None = None,
    ) -> None:
        self.progress = progress
        self.failures: list[Failure] = []
        self.kinds: Counter[str] = Counter()
        self._works = works
        self._ledger = ledger
        self._job = job
        self._settings = settings
        self._only = only
        self._redo = redo
        self._on_progress = on_progress
        self._on_row = on_row
        self._knows_nothing = ledger is None or ledger.is_empty(job)
        self._inbox = JobInbox(lambda: None)
        self._pool: Pool | None = None
        self._function = 0
        self._rows: list[tuple[Any, ...]] = []
        self._counted: deque[set[tuple[Any, ...]]] = deque(maxlen=BATCHES_KEPT)  # files of the last batches
        self._n_results = 0  # of records in ``_rows``, and of tasks without a row
        self._held_bytes = 0  # of their blobs
        self._batch_at = self._told_at = time.monotonic()
        self._under_way = 0
        self._window = WINDOW
        self._exhausted = False
        self._input_error: Exception | None = None
        self._error: BaseException | None = None
        self._n_dead = 0  # set aside by this run
        self._stops = stops if stops is not None else Stops()
        self._stopped_at: float | None = None
        self._is_drawing = False
        self._next_start_s = 0.0  # when the next file may begin; time that was lost is made up for, up to RATED_S

    # ---- for other threads, and signal handlers

    def stop(self, reason: str = "asked to stop") -> None:
        """Take no new input, and let what runs end; called again: stop at once."""
        self._stops.ask(reason)

    def interrupt(self, reason: str) -> None:
        """``stop``, from a signal handler in the thread that runs: inputs that do not come are not waited for."""
        self.stop(reason)
        if self._is_drawing:
            raise _DrawingStopped

    # ---- looking only

    def plan(self) -> Iterator[Planned]:
        """What would be done, and why; nothing is changed."""
        for work in self._works:
            reason, action = self._reason(work), "run"
            if reason is None:
                reason, action = verify.SKIPPED, "skip"
            elif reason is verify.SET_ASIDE:
                action = "set aside"
            yield Planned(work.path, tuple(map(os.fsdecode, work.targets)), action, reason)

    def _reason(self, work: Work) -> str | None:
        if self._redo is not None and self._redo(work):
            return "asked for"
        if self._knows_nothing or self._ledger is None:
            return verify.NEW
        found = self._ledger.find(self._job, work.source, work.targets[0] if work.targets else b"")
        if found is not None and found.state == State.DEAD:
            return verify.SET_ASIDE
        settings = self._settings
        return verify.reason_to_redo(
            found,
            work.source,
            work.targets,
            work.parameters,
            verify=settings.verify,
            fingerprints=settings.fingerprints,
            checksums=settings.checksums,
        )

    # ---- running

    def run(self, pool: Pool, function_id: int) -> None:
        """To its end. Raises what the inputs raised, when all before it is done; what broke the pool; ``StopNow``."""
        self._pool, self._function = pool, function_id
        rate_per_s = self._settings.rate_per_s
        if rate_per_s is not None:
            self._next_start_s = time.monotonic()
            self._window = min(WINDOW, max(pool.n_workers, int(rate_per_s * RATED_S)))
        waiting = lists.while_waiting.set(self._meanwhile)
        try:
            self._run()
        finally:
            lists.while_waiting.reset(waiting)
        error = self._error or self._input_error
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            self._consider_stopping()
            if not self._exhausted:
                self._fill()
            if self._exhausted and not self._under_way:
                break
            self._take()
            self._commit_in_time()
            self._tell()
        self.commit()
        self._tell(force=True)

    def _commit_in_time(self) -> None:
        if len(self._rows) >= BATCH_ROWS or time.monotonic() - self._batch_at >= BATCH_S:
            self.commit()

    def commit(self) -> None:
        """Write what has arrived into the ledger, then let the segment forget it. Raises ``JobMissingError`` where the
        ledger is not in its place any more: nor is what is staged.
        """
        self._batch_at = time.monotonic()
        if self._ledger is not None:
            self._ledger.require_in_place()
        self.commit_rows()
        n, self._n_results, self._held_bytes = self._n_results, 0, 0
        if n and self._pool is not None:
            self._pool.pump.release(n)

    def commit_rows(self) -> None:
        """Write what has arrived into the ledger."""
        if self._rows and self._ledger is not None:
            self._ledger.write(self._job, self._rows)
            self._counted.append({row[:2] for row in self._rows})
            self._rows = []

    def count_drained(self, row: tuple[Any, ...]) -> None:
        """A file was found done in the segment, at the end; it may have been counted, and not been released yet."""
        if not any(row[:2] in keys for keys in self._counted):
            self._count_done(row[SIZE], (one.size for one in decode_made(row[MADE])))

    def _count_done(self, input_bytes: int, output_bytes: Iterable[int]) -> None:
        progress = self.progress
        progress.done += 1
        if input_bytes > 0:
            progress.input_bytes += input_bytes
        for n_bytes in output_bytes:
            progress.output_bytes += n_bytes

    def _consider_stopping(self) -> None:
        if not self._stops.n:
            return
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._exhausted = True
            self.progress.stopping = self._stops.reason
            assert self._pool is not None
            self._pool.drop_unstarted(claimed=True)
        if self._stops.n > 1 or time.monotonic() - self._stopped_at > self._settings.grace_s:
            raise StopNow

    def _fill(self) -> None:
        """Draw inputs up to the window; but not for long while results wait to be taken."""
        pump, arrived, clock = self._pool.pump, self._inbox.arrived, time.monotonic  # pyright: ignore[reportOptionalMemberAccess]
        began_s, not_told = clock(), 0 if self._under_way else FLUSH_TICKETS
        rate_per_s, now_s = self._settings.rate_per_s, began_s
        window = min(self._window, self._n_may_fail())
        while self._under_way < window and not self._stops.n:
            if rate_per_s is not None and clock() < self._next_start_s:
                break
            work = self._draw()
            if work is None:
                break
            ticket = None if work is _NOT_ASKED_FOR else self._ticket_unless_done(work)
            if ticket is not None:
                if rate_per_s is not None:
                    self._next_start_s = max(self._next_start_s, clock() - RATED_S) + 1 / rate_per_s
                pump.queue(ticket)
                self._under_way += 1
                not_told += 1
            now_s = clock()
            if not_told > FLUSH_TICKETS:
                pump.wake()
                not_told = 0
            if now_s - began_s > FILL_S and (arrived or now_s - self._told_at > TELL_S):
                break
        if not_told:
            pump.wake()

    def _draw(self) -> Work | None:
        """The next input; None: there is none, for now or at all. What is not asked for is not told by its name."""
        try:
            self._is_drawing = True
            try:
                work = next(self._works)
                return work if self._only is None or self._only(work) else _NOT_ASKED_FOR
            finally:
                self._is_drawing = False
        except StopIteration:
            self._exhausted = True
        except _DrawingStopped:
            self._is_drawing = False
        except Exception as error:  # those drawn before it are done all the same
            self._exhausted = True
            self._input_error = error
        return None

    def _ticket_unless_done(self, work: Work) -> JobTicket | None:
        reason = self._reason(work)
        if reason is None:
            self.progress.skipped += 1
            return None
        if reason is verify.SET_ASIDE:
            self.progress.dead += 1
            return None
        if reason is not verify.NEW and self._ledger is not None:
            found = self._ledger.find(self._job, work.source, work.targets[0] if work.targets else b"")
            verify.keep_only_copies(found, work.source)
        pool = self._pool
        assert pool is not None
        encoded = jobtasks.encode_payload(JobPayload(work.source, work.targets, work.own, work.own_digest, work.apart))
        if len(encoded) <= layout.INLINE_BYTES:
            task = Task(self._function, encoded, 0, _JOB)
        else:
            task = pool.task(self._function, values.Encoded(Encoding.MSGPACK, encoded), _JOB)
        settings = self._settings
        return JobTicket(
            task,
            self._inbox,
            work.path,
            None,
            attempts_max=settings.attempts_max,
            timeout_s=settings.timeout_s,
            work=work,
        )

    def _take(self) -> None:
        """Wait for results, and make rows of all that are there."""
        inbox = self._inbox
        if self._under_way:
            inbox.wait(self._patience_s())
        elif self._settings.rate_per_s is not None:
            time.sleep(max(0.0, min(TELL_S, self._next_start_s - time.monotonic())))
        self._collect()

    def _meanwhile(self) -> None:
        """What is to be done while the next line of a list is waited for, called in the midst of drawing it."""
        pool = self._pool
        assert pool is not None
        self._is_drawing = False
        pool.pump.wake()
        self._collect()
        self._commit_in_time()
        self._consider_stopping()
        self._tell()
        self._is_drawing = True
        if self._stops.n:
            raise _DrawingStopped

    def _collect(self) -> None:
        """Make rows of all results that are there."""
        inbox = self._inbox
        while inbox.arrived:
            ticket, record = inbox.arrived.popleft()
            self._under_way -= 1
            if isinstance(record, ResultRecord):
                self._n_results += 1
                self._held_bytes += record.blob_bytes
                if record.status != _CANCELLED and not self._is_cut_short(ticket, record):
                    self._count(ticket, record)
                if self._held_bytes >= BATCH_BYTES:
                    self.commit()
            elif record is not None and self._error is None:  # the pool is broken: one error, not one for each file
                self._error = record
                self._exhausted = True
        self._limit_failures()

    def _is_cut_short(self, ticket: JobTicket, record: ResultRecord) -> bool:
        """Whether its worker died while the run stops, in which nothing is begun again: the next run does that. Not
        where this was its last attempt in any case.
        """
        if not self._stops.n or record.status != _DIED or record.attempt + 1 >= self._settings.attempts_max:
            return False
        return not (ticket.starved and isinstance(outcome_of(ticket, record)[1], MemoryLimitError))

    def _patience_s(self) -> float:
        wait_s = TELL_S
        if self._settings.rate_per_s is not None and not self._exhausted:
            wait_s = min(wait_s, max(0.001, self._next_start_s - time.monotonic()))
        return wait_s

    def _n_may_fail(self) -> float:
        """How many files may be under way, so that should all of them fail, no other is begun after the one that stops
        the run. At least one for each worker.
        """
        settings, n = self._settings, self._n_failed
        most = math.inf
        if settings.max_failures is not None:
            most = settings.max_failures - n + 1
        share = settings.max_failure_share
        if share is not None and share < 1:
            n_run = self.progress.done + n
            most = min(most, max(SHARE_OF_MIN - n_run, (share * n_run - n) // (1 - share) + 1))
        assert self._pool is not None
        return max(self._pool.n_workers, most)

    @property
    def _n_failed(self) -> int:
        return self.progress.failed + self._n_dead  # not those that were set aside before

    def _limit_failures(self) -> None:
        settings, progress, n = self._settings, self.progress, self._n_failed
        n_run = progress.done + n
        if self._stops.n or not n:
            return
        if settings.max_failures is not None and n > settings.max_failures:
            self.stop(f"more than {settings.max_failures} failure{'' if settings.max_failures == 1 else 's'}")
        share = settings.max_failure_share
        if share is not None and n_run >= SHARE_OF_MIN and n > share * n_run:
            self.stop(f"more than {100 * share:g} % of the files failed")

    # ---- rows

    def _count(self, ticket: JobTicket, record: ResultRecord) -> None:
        work, progress = ticket.work, self.progress
        value: Any = None
        if record.status == _OK:
            outcome = jobtasks.decode_outcome(_body_of(ticket, record))
            row = row_of(work.source, work.targets, work.parameters, record, outcome)
            progress.retried += record.attempt > 0 or outcome.calls > 1
            self._count_done(outcome.input.size, [one.size for one in outcome.outputs])
            value = outcome
        else:
            _, value = outcome_of(ticket, record)
            assert value is not None
            row = row_of_error(work, record, value)
            progress.retried += record.attempt > 0 or record.calls > 1
            if isinstance(value, FunctionChangedError | UnknownFunctionError) and not self._stops.n:
                is_changed = isinstance(value, FunctionChangedError)
                self.stop("its function was changed while it ran" if is_changed else "workers cannot have its function")
            self.kinds[row[KIND]] += 1
            if row[STATE] == State.DEAD:
                progress.dead += 1
                self._n_dead += 1
            else:
                progress.failed += 1
            if len(self.failures) < FAILURES_KEPT:
                self.failures.append(Failure(work.path, row[KIND], row[KIND + 1]))
        self._rows.append(row)
        if self._on_row is not None:
            self._on_row(work, row, value)

    def _tell(self, *, force: bool = False) -> None:
        now_s = time.monotonic()
        if not force and now_s - self._told_at < TELL_S:
            return
        self._told_at = now_s
        self.progress.under_way = self._under_way
        if self._pool is not None:
            self.progress.workers = len(self._pool.supervisor.pids)
            self.progress.worker_deaths = self._pool.pump.staff.n_deaths
        if self._on_progress is not None:
            self._on_progress(self.progress)


class _DrawingStopped(BaseException):
    """A signal came while an input was waited for."""


SHARE_OF_MIN = 100  # files that must have ended before a share of failures means anything
_JOB = int(Form.JOB)


def _body_of(ticket: Ticket, record: ResultRecord) -> bytes | memoryview:
    if record.encoding != _BLOB:
        return record.payload
    blob: Any = ticket.result_blob
    if isinstance(blob, BaseException):
        raise blob
    if isinstance(blob, str):  # there was no descriptor left when it came
        blob = blobs.read(blob)
    return blob[1]

"""What a dead worker leaves: its claims, settled by the table of ``recovery``.

    death --> claims --> decide each --+-- DELIVER, FAIL, DOUBT ---------> done     (posted for the dead where needed)
                                       +-- COMMIT -- put in place --------> done
                                       +-- REQUEUE ----------------------> retry, as it was
                                       +-- RETRY ------------------------> retry, next attempt, one more death
    all of it in one commit of the ring; before that, what the dead attempt left on disk and in /dev/shm is removed

Used by the pump's thread alone, and only after the worker's proven death.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ringpool.coordinator import recovery
from ringpool.coordinator.limits import Condemned
from ringpool.coordinator.recovery import Action, Disk, Where
from ringpool.coordinator.supervisor import Death
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import CrashLoopError, InitializerError, MainModuleError, RingpoolError, SegmentMissingError
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import ClaimedTask, CoordinatorEnd
from ringpool.shm.layout import Form, Status
from ringpool.workers.process import EXIT_INITIALIZER, EXIT_UNGUARDED, EXIT_WORN_OUT

if TYPE_CHECKING:
    from ringpool.coordinator.staged import StagedOutputs
    from ringpool.coordinator.stagedjobs import StagedJobs

KILLS_BORNE_S = 10.0
ERROR_WORDS_BYTES = layout.INLINE_BYTES - 8


class Estate(NamedTuple):
    """What a death means: so many tasks are tried again; what it was for (``WorkerExit``); why the pool is broken."""

    n_retried: int
    reason: str
    broken: RingpoolError | None


class Estates:
    """Settles the dead workers of one ring; ``ticket_of`` gives the ticket of an entry, or None; ``why`` tells what a
    worker was killed for, where we did.
    """

    def __init__(
        self,
        end: CoordinatorEnd,
        ticket_of: Callable[[int], Ticket | None],
        why: Callable[[int], Condemned | None],
    ) -> None:
        self.n_barren = 0  # deaths before a first claim, with no claim of anybody in between
        self._barren_since_s = 0.0
        self._end = end
        self._ticket_of = ticket_of
        self._why = why
        self._segment = end.ring.segment.name
        self._claims_seen = -1

    def settle(self, death: Death) -> Estate:
        """Settle what the worker held; what that means for the pool."""
        condemned = self._why(death.index)
        done: list[int] = []
        again: list[int] = []
        blamed: list[int] = []
        staged: list[int] = []
        claims = self._end.claims_of_dead(death.index)
        for claim in claims:
            for_memory = condemned is not None and condemned.reason == "memory" and claim.entry == condemned.entry
            action = self._decide(claim, for_memory=for_memory)
            if action is Action.REQUEUE:
                again.append(claim.entry)
                continue
            if action is Action.COMMIT:
                staged.append(claim.entry)
                continue
            if action is not Action.DELIVER:
                self._tidy(claim, action)
            if action is Action.RETRY:
                blamed.append(claim.entry)
                continue
            if action is Action.FAIL:
                facts: tuple[Any, ...] = (death.signal, death.exitcode, death.pid, claim.deaths + 1)
                if condemned is not None and claim.entry == condemned.entry:
                    facts += (condemned.reason, condemned.limit, condemned.peak_rss_bytes)
                self._end.post_for_dead(claim.entry, Status.DIED, msgspec.msgpack.encode(facts), claim.ran_ns)
            elif action is Action.DOUBT:
                self._end.post_for_dead(claim.entry, Status.IN_DOUBT)
            done.append(claim.entry)
        self._commit(staged)
        done += staged
        had_come = self._end.has_come(death.index)
        failed_to_start = self._end.failed_to_start(death.index) and not self._is_missed_by_others(death)
        self._end.settle(death.index, done, again, blamed)
        recycled = death.exitcode == EXIT_WORN_OUT or (death.exitcode == 0 and not claims)
        reason = "recycled" if recycled else "died"
        if condemned is not None:
            reason = condemned.reason
        return Estate(len(blamed), reason, self._broken(death, failed_to_start, had_come))

    def _broken(self, death: Death, failed_to_start: bool, had_come: bool) -> RingpoolError | None:
        """What is said by an exit status of ours. A worker that had come to the ring has it from a task."""
        if death.exitcode == EXIT_INITIALIZER and not had_come:
            with contextlib.suppress(SegmentMissingError):  # its initializer has ended it so
                _, body, _ = blobs.read(blobs.initializer_name(self._segment, death.index))
                return InitializerError(*msgspec.msgpack.decode(body))
        if death.exitcode == EXIT_UNGUARDED and not had_come:
            return MainModuleError()
        if self._is_crash_loop(failed_to_start, death):
            return CrashLoopError(self.n_barren, death.signal, death.exitcode, death.not_started)
        return None

    def _decide(self, claim: ClaimedTask, *, for_memory: bool) -> Action:
        staged = self._staged_of(claim.entry) if claim.status is Status.STAGED else None
        disk = Disk.UNKNOWN if staged is None else staged.side(claim.entry)
        return recovery.decide(
            Where.CLAIMED,
            alive=False,
            result=claim.status,
            started=claim.started,
            disk=disk,
            may_retry=self._may_retry(claim, for_memory=for_memory),
        )

    def _may_retry(self, claim: ClaimedTask, *, for_memory: bool) -> bool:
        """A vector never: what was not run of it is queued anew. Nor what nobody waits for: the pool is broken.

        What its worker was killed for, ``for_memory``, is tried once more, in a new process; not again after that.
        """
        ticket = self._ticket_of(claim.entry)
        if ticket is None or ticket.part is not None or (for_memory and ticket.starved):
            return False
        if claim.deaths + 1 >= ticket.attempts_max:
            return False
        ticket.starved = ticket.starved or for_memory
        return True

    def _tidy(self, claim: ClaimedTask, action: Action) -> None:
        """Remove what the dead attempt left: its staged output, and its half-written result."""
        staged = self._staged_of(claim.entry)
        if staged is not None and action is not Action.DOUBT:
            staged.discard(claim.entry)
        ticket = self._ticket_of(claim.entry)
        if ticket is None or ticket.part is None:  # a vector's is one of its outcomes
            sequence, attempt = layout.sequence_of(claim.entry), layout.attempt_of(claim.entry)
            blobs.unlink(blobs.result_name(self._segment, sequence, attempt))

    def _commit(self, entries: list[int]) -> None:
        """Put in place what a dead worker had staged, and give each task its result."""
        staged = self._staged_of(entries[0]) if entries else None  # one ring has job tasks, or others
        for task in staged.commit(entries) if staged is not None else ():
            self._end.results.retract(task.entry)
            sequence, attempt = layout.sequence_of(task.entry), layout.attempt_of(task.entry)
            blobs.unlink(blobs.result_name(self._segment, sequence, attempt))
            words = f"{type(task.error).__name__}: {task.error}".encode(errors="replace")[:ERROR_WORDS_BYTES]
            self._end.post_for_dead(task.entry, Status.ERROR, msgspec.msgpack.encode(words.decode(errors="ignore")))

    def _staged_of(self, entry: int) -> StagedOutputs | StagedJobs | None:
        """Who knows what is staged of ``entry``; None where a task of its form stages nothing."""
        form = self._end.results.read_task(entry)[3]
        if form == Form.FILE:
            from ringpool.coordinator.staged import StagedOutputs  # here, as below: see there

            return StagedOutputs(self._end)
        if form == Form.JOB:
            from ringpool.coordinator.stagedjobs import StagedJobs

            return StagedJobs(self._end)
        return None

    def _is_missed_by_others(self, death: Death) -> bool:
        """Whether there was no process even, and others are at work: the limit that kept it from being made may pass,
        and their tasks may be long.
        """
        return not death.pid and any(self._end.has_come(w) for w in range(self._end.ring.workers))

    def _is_crash_loop(self, failed_to_start: bool, death: Death) -> bool:
        """Count deaths of workers that took nothing, with nobody taking anything in between. Where somebody kills them,
        that may be over soon.
        """
        claims = self._end.n_claims
        if claims != self._claims_seen or not self.n_barren:
            self.n_barren, self._barren_since_s = 0, time.monotonic()
        self._claims_seen = claims
        self.n_barren += failed_to_start
        if not failed_to_start:
            return False
        if death.signal == signal.SIGKILL and time.monotonic() - self._barren_since_s < KILLS_BORNE_S:
            return False
        return self.n_barren >= 2 * self._end.ring.workers + 3

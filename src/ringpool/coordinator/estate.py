"""What a dead worker leaves: its claims, settled by the table of ``recovery``.

    death --> claims --> decide each --+-- DELIVER, FINISH, FAIL, DOUBT --> done     (posted for the dead where needed)
                                       +-- REQUEUE ----------------------> retry, as it was
                                       +-- RETRY ------------------------> retry, next attempt, one more death
    all of it in one commit of the ring; before that, what the dead attempt left on disk and in /dev/shm is removed

Used by the pump's thread alone, and only after the worker's proven death.
"""

from __future__ import annotations

import msgspec

from ringpool.coordinator import recovery
from ringpool.coordinator.recovery import Action, Disk, Where
from ringpool.coordinator.supervisor import Death
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import ClaimedTask, CoordinatorEnd
from ringpool.shm.layout import Status
from ringpool.workers import tasks
from ringpool.workers.files import output
from ringpool.workers.files.target import resolve_target
from ringpool.workers.process import staged_path


class Estates:
    """Settles the dead workers of one ring; ``attempts_max``: how often a task is started whose workers die in it."""

    def __init__(self, end: CoordinatorEnd, attempts_max: int) -> None:
        self.n_barren = 0  # deaths before a first claim, with no claim of anybody in between
        self._end = end
        self._attempts_max = attempts_max
        self._segment = end.ring.segment.name
        self._token = end.ring.segment.header.uuid.hex()[:16]
        self._claims_seen = -1

    def settle(self, death: Death) -> tuple[int, bool]:
        """Settle what the worker held; how many tasks are tried again, and whether workers die like flies."""
        done: list[int] = []
        again: list[int] = []
        blamed: list[int] = []
        for claim in self._end.claims_of_dead(death.index):
            action = self._decide(claim)
            if action is Action.REQUEUE:
                again.append(claim.entry)
                continue
            if action is not Action.DELIVER:
                self._tidy(claim, action)
            if action is Action.RETRY:
                blamed.append(claim.entry)
                continue
            if action is Action.FINISH:
                self._end.post_for_dead(claim.entry, Status.OK)
            elif action is Action.FAIL:
                facts = (death.signal, death.exitcode, death.pid, claim.deaths + 1)
                self._end.post_for_dead(claim.entry, Status.DIED, msgspec.msgpack.encode(facts))
            elif action is Action.DOUBT:
                self._end.post_for_dead(claim.entry, Status.IN_DOUBT)
            done.append(claim.entry)
        failed_to_start = self._end.failed_to_start(death.index)
        self._end.settle(death.index, done, again, blamed)
        return len(blamed), self._is_crash_loop(failed_to_start)

    def _decide(self, claim: ClaimedTask) -> Action:
        disk = Disk.UNKNOWN
        if claim.status is Status.COMMITTING:
            target = self._target(claim.entry)
            assert target is not None
            device, inode = self._end.results.staged_file(claim.entry)
            side = output.which_side(staged_path(self._token, claim.entry, target), target, dev=device, ino=inode)
            disk = Disk[side.name]
        return recovery.decide(
            Where.CLAIMED,
            alive=False,
            result=claim.status,
            started=claim.started,
            disk=disk,
            may_retry=claim.deaths + 1 < self._attempts_max,
        )

    def _tidy(self, claim: ClaimedTask, action: Action) -> None:
        """Remove what the dead attempt left: its staged output, and its half-written result."""
        target = self._target(claim.entry)
        if target is not None and action is not Action.DOUBT:
            output.discard_staged(staged_path(self._token, claim.entry, target))
        if action is not Action.FINISH:
            sequence, attempt = layout.sequence_of(claim.entry), layout.attempt_of(claim.entry)
            blobs.unlink(blobs.result_name(self._segment, sequence, attempt))

    def _target(self, entry: int) -> bytes | None:
        """Where the output of ``entry`` belongs, symlinks followed as its worker has followed them."""
        _, payload, blob, _, _ = self._end.results.read_task(entry)
        if blob:
            _, payload, _ = blobs.read(blobs.payload_name(self._segment, blob))
        target = tasks.decode_payload(payload).target
        return None if target is None else resolve_target(target)

    def _is_crash_loop(self, failed_to_start: bool) -> bool:
        """Count deaths of workers that took nothing, with nobody taking anything in between."""
        claims = self._end.n_claims
        if claims != self._claims_seen:
            self.n_barren = 0
        self._claims_seen = claims
        self.n_barren += failed_to_start
        return self.n_barren >= 2 * self._end.ring.workers + 3

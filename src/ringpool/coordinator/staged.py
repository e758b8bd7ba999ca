"""What a dead worker had staged of the outputs of its file tasks: put in place, because it was whole.

Apart, because calls stage nothing: an executor need not import what this takes. Whoever queues file tasks imports it
before: where a program ends by Ctrl-C, and an import then makes a ``namedtuple``, Python 3.11 forgets what it ended by.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ringpool.coordinator.recovery import Disk
from ringpool.errors import AtomicWriteError
from ringpool.shm import blobs
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.layout import Status
from ringpool.workers import tasks
from ringpool.workers.files import output
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.target import resolve_target
from ringpool.workers.filetasks import staged_path
from ringpool.workers.groupcommit import (
    Source,
    StagedOutput,
    StagedTask,
    StagingBeside,
    discard,
    discard_or_keep,
    may_be_only_copy,
)

LOCK_TIMEOUT_S = 0.5  # the pump waits that long for who holds the lock of a dead worker's output, and all else with it


class StagedOutputs:
    """The staged outputs of tasks in the ring of ``end``; an entry is that of a file task."""

    def __init__(self, end: CoordinatorEnd) -> None:
        self._end = end
        self._segment = end.ring.segment.name
        self._token = end.ring.segment.header.uuid.hex()[:16]

    def side(self, entry: int) -> Disk:
        """Where the output is that was staged."""
        one = self._output(entry)
        return Disk[output.which_side(one.staged, one.target, dev=one.device, ino=one.inode).name]

    def discard(self, entry: int) -> None:
        """Remove what is staged, if there is anything; or keep it, where it may be the only copy of the input."""
        target = self._target(entry)
        if target is not None:
            discard_or_keep(*self._staged(entry, target))

    def discard_unless_moved(self, entry: int) -> None:
        """``discard``, but leave alone what may be the only copy of the input."""
        target = self._target(entry)
        if target is not None:
            staged, source = self._staged(entry, target)
            if not may_be_only_copy(staged, source):
                output.discard_staged(staged)

    def commit(self, entries: Sequence[int]) -> list[StagedTask]:
        """Put the outputs of ``entries`` in their places, and post them; those that could not be, with their errors.

        Durably, whatever was wanted: the run that wanted less may be over, and a death is rare.
        """
        staging = StagingBeside(LOCK_TIMEOUT_S)
        staged = [self._task(entry) for entry in entries]
        for task in staged:
            try:
                staging.expect(task.outputs[0].target)
                staging.find(task.outputs[0].target, task.outputs[0].device)
            except AtomicWriteError as error:
                task.error = error
                discard(task)
        staging.commit([task for task in staged if task.error is None], Durability.FULL)
        staging.close()  # also what was opened for those with an error
        for task in staged:
            if task.error is None:
                self._end.post_for_dead(task.entry, Status.OK)
        return [task for task in staged if task.error is not None]

    def _task(self, entry: int) -> StagedTask:
        target = self._target(entry)
        assert target is not None
        return StagedTask(entry, (self._output(entry),), source=self._staged(entry, target)[1])

    def _output(self, entry: int) -> StagedOutput:
        """It may have other links: nobody knows any more."""
        target = self._target(entry)
        assert target is not None
        device, inode = self._end.results.staged_file(entry)
        return StagedOutput(self._staged(entry, target)[0], target, True, device, inode)

    def _staged(self, entry: int, target: bytes) -> tuple[bytes, Source | None]:
        """Where its output is staged, and the input; None: that was no file."""
        of_a_name = staged_path(self._token, entry, target, of_file=False)
        if os.path.lexists(of_a_name):
            return of_a_name, None
        return staged_path(self._token, entry, target, of_file=True), Source(
            self._payload(entry).source, inode=self._end.input_of(entry)
        )

    def _target(self, entry: int) -> bytes | None:
        """Where the output of ``entry`` belongs, symlinks followed as its worker has followed them."""
        target = self._payload(entry).target
        return None if target is None else resolve_target(target)

    def _payload(self, entry: int) -> tasks.FilePayload:
        _, payload, blob, _, _ = self._end.results.read_task(entry)
        if blob:
            _, payload, _ = blobs.read(blobs.payload_name(self._segment, blob))
        return tasks.decode_payload(payload)

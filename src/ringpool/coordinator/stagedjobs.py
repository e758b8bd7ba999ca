"""What a dead worker had staged of the outputs of job tasks: put in place, because it was whole.

Apart, for the same reason as ``staged``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from ringpool.coordinator.recovery import Disk
from ringpool.coordinator.staged import LOCK_TIMEOUT_S
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.layout import Encoding, Status
from ringpool.workers import jobtasks
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.target import lstat, resolve_target
from ringpool.workers.groupcommit import StagedOutput, StagedTask, Staging, discard, staged_name
from ringpool.workers.jobtasks import JobOutcome, JobPayload, JobSpec


class StagedJobs:
    """The job tasks in the ring of ``end``; an entry is that of one. Only after its worker's proven death."""

    def __init__(self, end: CoordinatorEnd) -> None:
        self._end = end
        self._segment = end.ring.segment.name
        self._specs: dict[int, JobSpec] = {}

    def task(self, entry: int) -> tuple[JobSpec, JobPayload]:
        """What the task of ``entry`` is."""
        function, payload, blob, _, _ = self._end.results.read_task(entry)
        body: bytes | memoryview = payload
        if blob:
            _, body, _ = blobs.read(blobs.payload_name(self._segment, blob))
        spec = self._specs.get(function)
        if spec is None:
            _, spec_body, _ = blobs.read(blobs.function_name(self._segment, function))
            spec = self._specs[function] = jobtasks.decode_spec(bytes(spec_body))
        return spec, jobtasks.decode_payload(body)

    def outcome(self, entry: int) -> JobOutcome:
        """What the record of ``entry``, STAGED or OK, says."""
        record = self._end.results.read(entry)
        body: bytes | memoryview = record.payload
        if record.encoding == Encoding.BLOB:
            name = blobs.result_name(self._segment, layout.sequence_of(entry), layout.attempt_of(entry))
            _, body, _ = blobs.read(name)
        return jobtasks.decode_outcome(body)

    def side(self, entry: int) -> Disk:
        """Where the outputs are that were staged: TARGET only where all are in their places."""
        outputs = self._outputs(entry)
        sides = [
            _side(output, made.device, made.inode)
            for output, made in zip(outputs, self.outcome(entry).outputs, strict=True)
        ]
        if Disk.UNKNOWN in sides:
            return Disk.UNKNOWN
        return Disk.STAGED if Disk.STAGED in sides else Disk.TARGET

    def discard(self, entry: int) -> None:
        """Remove what is staged, if there is anything."""
        discard(self._staged(entry))

    def commit(self, entries: Sequence[int]) -> list[StagedTask]:
        """Put the outputs of ``entries`` in their places, and post them; those that could not be, with their errors."""
        by_function: dict[int, list[int]] = {}
        for entry in entries:
            by_function.setdefault(self._end.results.read_task(entry)[0], []).append(entry)
        failed: list[StagedTask] = []
        for those in by_function.values():
            failed += self._commit(those)
        return failed

    def _commit(self, entries: Sequence[int]) -> Iterable[StagedTask]:
        spec, _ = self.task(entries[0])
        tasks = [self._staged(entry) for entry in entries]
        for directory in spec.stagings:  # where all outputs are in their places, it may have been removed
            os.makedirs(directory, exist_ok=True)
        staging = Staging(spec.stagings, LOCK_TIMEOUT_S)
        try:
            directories = {os.path.dirname(output.target) for task in tasks for output in task.outputs}
            staging.commit(tasks, Durability(spec.durability), directories)
        finally:
            staging.close()
        for task in tasks:
            if task.error is None:
                self._end.post_for_dead(task.entry, Status.OK)
        return [task for task in tasks if task.error is not None]

    def _staged(self, entry: int) -> StagedTask:
        spec, task = self.task(entry)
        is_whole = self._end.ring.status(entry) is Status.STAGED
        inode = self.outcome(entry).input.inode if is_whole else self._end.input_of(entry)
        return StagedTask(entry, self._outputs(entry), source=jobtasks.movable_source(spec, task.source, inode))

    def _outputs(self, entry: int) -> list[StagedOutput]:
        """Symlinks are followed, as the worker has followed them. Each may have other links: nobody knows any more."""
        spec, task = self.task(entry)
        sequence, attempt = layout.sequence_of(entry), layout.attempt_of(entry)
        return [
            StagedOutput(staged_name(staging, sequence, attempt, number, target), _place_of(spec, task, number), True)
            for number, (staging, target) in enumerate(zip(spec.stagings, task.targets, strict=True))
        ]


def _place_of(spec: JobSpec, task: JobPayload, number: int) -> bytes:
    target = task.targets[number]
    return target if jobtasks.leads_to_another(spec, task, number) else resolve_target(target)


def _side(output: StagedOutput, device: int, inode: int) -> Disk:
    try:
        staged = lstat(output.staged)
        found = staged if staged is not None else lstat(output.target)
    except OSError:
        return Disk.UNKNOWN
    if found is None or (found.st_dev, found.st_ino) != (device, inode):
        return Disk.UNKNOWN
    return Disk.STAGED if staged is not None else Disk.TARGET

"""What a dead coordinator's segment still holds of a job: taken out, so that nothing is done twice.

    segment --workers dead?--> claims: STAGED -- put in place --> OK --+
                                       finished ----------------------+--> done --> deliver each, in order
                                       anything else: tidied away, and forgotten: a resume does it anew

Delivered are the tasks that ended well. Those that failed are done again by a resume, whoever forgets them. It may be
cut short anywhere and begun again: nothing is removed from the segment until its caller removes all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from ringpool.coordinator.estate import Estates
from ringpool.coordinator.leftovers import living_worker
from ringpool.coordinator.stagedjobs import StagedJobs
from ringpool.coordinator.supervisor import Death
from ringpool.errors import JobError, SegmentError, SegmentFormatError, SegmentIncompleteError, SegmentMissingError
from ringpool.shm import blobs, segment
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.layout import Status
from ringpool.shm.results import ResultRecord
from ringpool.workers import jobtasks
from ringpool.workers.jobtasks import JobOutcome, JobPayload, JobSpec, Output

WORKERS_DIE_S = 10.0  # the kernel kills them within milliseconds; one in a hung system call may take longer
FIRST_FUNCTION = 1


class Drained(NamedTuple):
    """A task that ended well, and whose result nobody has put into the ledger."""

    spec: JobSpec
    task: JobPayload
    record: ResultRecord
    outcome: JobOutcome


def segments_of(directory: bytes) -> list[str]:
    """The segments of runs of the job in ``directory`` that are dead, or have failed in this process. For who has the
    job's lock, and no segment yet.

    Those in which nothing was begun are removed, and those of jobs, anywhere, whose directory was deleted: with it went
    the ledger that they would be drained into. Raises ``OSError`` where one cannot be looked into: it stays.
    """
    found: list[str] = []
    own = segment.own_kept()
    for name in (*segment.dead_kept(), *own):
        try:
            _, body, _ = blobs.read(blobs.function_name(name, FIRST_FUNCTION))
            spec = jobtasks.decode_spec(bytes(body))
        except msgspec.MsgspecError:  # another version of ringpool has left it, and will drain it
            continue
        except (SegmentMissingError, SegmentFormatError):  # its coordinator died before it had a function, and a task
            if name not in own:  # another job's, just made
                segment.unlink(name)
            continue
        if spec.directory == directory:
            found.append(name)
        elif name not in own and _is_deleted(spec):
            segment.unlink(name)
    return found


def _is_deleted(spec: JobSpec) -> bool:
    """Whether the directory of the job is gone, and its file system is there: not one that will be mounted again."""
    directory = above = spec.directory
    try:
        while not _is_there(above):
            above = os.path.dirname(above)
        return above != directory and os.stat(above).st_dev == spec.device
    except OSError:  # who cannot look does not know
        return False


def _is_there(path: bytes) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def drain(name: str, deliver: Callable[[Drained], None]) -> None:
    """Call ``deliver`` for what is left in segment ``name``. Raises ``SegmentError``, ``JobError``."""
    try:
        attached = segment.attach(name)
    except SegmentIncompleteError:
        return  # its coordinator died while it made it
    end = CoordinatorEnd(attached, retains=True)
    try:
        pid = living_worker(end.ring, WORKERS_DIE_S)
        if pid:
            raise JobError(
                f"process {pid}, a worker of a job whose coordinator is dead, is still there; it hangs in the kernel, "
                "perhaps in a file system that does not answer: end it, then run the job again"
            )
        estates = Estates(end, lambda _entry: None, lambda _index: None)
        for worker in range(end.ring.workers):
            if end.ring.claimed(worker):
                estates.settle(Death(worker, 0, None, None))
        jobs = StagedJobs(end)
        for drained in _ended_well(end, jobs):
            if all(map(_is_there_still, drained.task.targets, drained.outcome.outputs)):
                deliver(drained)
    finally:
        end.close()


def _is_there_still(target: bytes, made: Output) -> bool:
    """Whether that output is where it was put: its directory may be another one by now, under the same name."""
    try:
        found = os.stat(target)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (made.device, made.inode)


def _ended_well(end: CoordinatorEnd, jobs: StagedJobs) -> Iterator[Drained]:
    entries: list[int] = []
    end.collect(lambda _slot, entry: entries.append(entry))
    for entry in entries:
        record = end.results.read(entry)
        if record.status != Status.OK:
            continue
        try:
            spec, task = jobs.task(entry)
            outcome = jobs.outcome(entry)
        except SegmentError:  # its blob was being let go: the ledger has it
            continue
        yield Drained(spec, task, record, outcome)

"""What runs that are dead have left of a job: taken into its ledger, and away."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ringpool.coordinator import drain, jobrows, staging
from ringpool.coordinator.ledger import Ledger
from ringpool.errors import JobError, SegmentError, SegmentFormatError, SegmentTruncatedError
from ringpool.shm import segment


def take_over_dead_runs(directory: Path, ledger: Ledger, forgotten: Callable[[str], None] | None = None) -> int:
    """Drain into ``ledger`` what runs of ``directory`` left whose processes are dead, and remove what they staged; how
    many files that gave. Its caller holds the lock: nobody alive stages there.

    A segment that cannot be read, because another version of ringpool made it, is a ``JobError``; with ``forgotten`` it
    is removed, and its name given to that.
    """
    base = base_of(directory)
    n = 0
    for name in drain.segments_of(base):
        try:
            n += drain_into(ledger, name)
        except (SegmentFormatError, SegmentTruncatedError, msgspec.MsgspecError) as error:
            if forgotten is None:
                reason = error.reason if isinstance(error, SegmentError) else str(error)
                way = shlex.join(["ringpool", "clean", "--ledger", os.fspath(directory)])
                raise JobError(
                    f"{directory}: a killed run left {name} in /dev/shm, and {reason}; use the version of ringpool "
                    f"that made it, or `{way}`, which removes it and forgets what is done: all is done again then"
                ) from error
            segment.unlink(name)
            forgotten(name)
    staging.remove_all(base)
    return n


def base_of(directory: Path) -> bytes:
    """Its real path, as what stages there has it: whatever way leads to it, what a dead run has left is found."""
    return os.path.realpath(os.fsencode(directory))


def drain_into(ledger: Ledger, name: str, on_row: Callable[[tuple[Any, ...]], None] = lambda _row: None) -> int:
    """Put what a dead run has done into the ledger, and remove its segment; how many files. ``on_row``: for each."""
    by_job: dict[bytes, list[tuple[Any, ...]]] = {}

    def deliver(drained: drain.Drained) -> None:
        by_job.setdefault(drained.spec.identity, []).append(jobrows.row_of_drained(drained))

    drain.drain(name, deliver)
    for identity, rows in by_job.items():
        ledger.write(ledger.job(os.fsdecode(identity)), rows)  # not its number then: the ledger may be a new one
        for row in rows:
            on_row(row)
    segment.unlink(name)
    return sum(map(len, by_job.values()))

"""What the ledger is told of a file: a row for each that has ended, done or failed, by this run or by a dead one."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from ringpool.coordinator.drain import Drained
from ringpool.coordinator.jobwork import Work
from ringpool.coordinator.ledger import Made, State
from ringpool.errors import RemoteError, WorkerDiedError, words_of
from ringpool.shm import layout
from ringpool.shm.layout import Status
from ringpool.shm.results import ResultRecord
from ringpool.workers import jobtasks
from ringpool.workers.jobtasks import JobOutcome

STATE, SIZE, MADE, KIND = 2, 3, 8, 13  # places in a row
encode_made = msgspec.msgpack.Encoder().encode
_DIED = int(Status.DIED)


def row_of(
    source: bytes, targets: tuple[bytes, ...], parameters: bytes, record: ResultRecord, outcome: JobOutcome
) -> tuple[Any, ...]:
    """The row of a file that is done."""
    found = outcome.input
    pairs = zip(targets, outcome.outputs, strict=True)
    made = encode_made([Made(path, one.size, one.digest, one.mtime_ns) for path, one in pairs])
    return (
        source,
        targets[0] if targets else b"",
        int(State.DONE),
        found.size,
        found.mtime_ns,
        found.inode,
        found.checksum,
        parameters,
        made,
        outcome.value or None,
        outcome.encoding,
        record.attempt + outcome.calls,
        record.attempt,
        "",
        "",
        "",
        record.worker,
        outcome.started_s,
        record.duration_ns / 1e9,
        outcome.peak_rss,
    )


def row_of_error(work: Work, record: ResultRecord, error: BaseException) -> tuple[Any, ...]:
    """The row of a file that failed. Dead, where its workers died in it."""
    kind = error.type_name if isinstance(error, RemoteError) else type(error).__name__
    is_dead = record.status == _DIED and isinstance(error, WorkerDiedError)
    text = error.traceback if isinstance(error, RemoteError) else ""
    if error.__cause__ is not None and not text:
        text = str(error.__cause__).strip('"\n')
    return (
        work.source,
        work.targets[0] if work.targets else b"",
        int(State.DEAD if is_dead else State.FAILED),
        *(-1, -1, -1, b""),
        work.parameters,
        b"\x90",
        None,
        0,
        record.attempt + max(1, record.calls),
        record.attempt + (record.status == _DIED),
        kind,
        words_of(error),
        text,
        record.worker if record.worker < layout.WORKERS_MAX else -1,
        time.time() - record.duration_ns / 1e9,
        record.duration_ns / 1e9,
        getattr(error, "peak_rss_bytes", 0),
    )


def row_of_drained(drained: Drained) -> tuple[Any, ...]:
    """The row of a file that a dead run had done."""
    spec, task, record, outcome = drained
    return row_of(task.source, task.targets, jobtasks.parameters_digest(spec.digest, task.own_digest), record, outcome)

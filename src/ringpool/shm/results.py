"""Task and result records: what one slot holds.

    worker:       read_task -> run -> [stage: payload, then word STAGED] -> post: payload, then word OK, ERROR, ...
                                      [post: payload, then word STAGED] -> finish: OK | retract: as before
    coordinator:  after the worker's proven death only: overwrite (DIED, IN_DOUBT), finish (STAGED -> OK)

The word is stored last, and is the task's own commit: without it nothing has happened, with it the task is done,
whoever dies next. The payload may be written in any order before it, because nobody reads it before the word stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from ringpool.shm import layout
from ringpool.shm.layout import INLINE_BYTES, PAYLOAD_AT, RECORD_BYTES, Status
from ringpool.shm.ring import Ring

_read_task = layout.TASK_READ.unpack_from
_write_staged = layout.RESULT.pack_into
_read_staged = layout.RESULT.unpack_from
_write_head = layout.RESULT_HEAD.pack_into
_read_head = layout.RESULT_HEAD.unpack_from


class ResultRecord(msgspec.Struct, frozen=True, gc=False):
    """A result as it stands in its slot: plain integers in a struct, because one is made for every task.

    ``status`` (``Status``), ``attempt`` (from 0), ``encoding`` (``Encoding``), ``payload`` (bytes), ``duration_ns``
    (of the task function), ``blob_bytes`` (0: no blob), ``worker`` (index), ``calls`` (of the function, at least; up to
    ``CALLS_MAX``).
    """

    status: int
    attempt: int
    encoding: int
    payload: bytes
    duration_ns: int
    blob_bytes: int
    worker: int
    calls: int = 0


class PostCall(Protocol):
    """``Results.post``."""

    def __call__(
        self,
        entry: int,
        status: int,
        encoding: int,
        payload: bytes,
        duration_ns: int,
        blob_bytes: int = 0,
        calls: int = 0,
    ) -> None: ...


class Results:
    """The records of ``ring``, seen by worker ``index`` (or by the coordinator, which posts for the dead).

    ``read_task(entry)``: function id, payload, blob id and form of a task, and whether it is not to be started.
    ``post(entry, status, encoding, payload, duration_ns, blob_bytes=0, calls=0)`` commits its result; ``payload``: at
    most INLINE_BYTES; ``calls``: at most CALLS_MAX.
    """

    def __init__(self, ring: Ring, index: int) -> None:
        self.ring = ring
        self.index = index
        self._tasks = ring.tasks
        self._results = ring.results
        self._mapping = ring.mapping
        self._words = ring.words
        self._input = ring.worker_word(index, layout.W_INPUT)
        # Closures over what never changes: between two tasks, whatever they touch has left the processor's caches.
        self.read_task = self._make_read_task()
        self.post = self._make_post()

    def _make_read_task(self) -> Callable[[int], tuple[int, bytes, int, int, int]]:
        mapping, tasks_at, slot_mask, record_bytes = self._mapping, self._tasks + 8, layout.SLOT_MASK, RECORD_BYTES
        read, payload_at, sequence_shift = _read_task, PAYLOAD_AT - 8, layout.SEQUENCE_SHIFT

        def read_task(entry: int) -> tuple[int, bytes, int, int, int]:
            at = tasks_at + (entry & slot_mask) * record_bytes
            function, length, blob, form, cancel = read(mapping, at)
            at += payload_at
            if cancel:  # meant for this task, or for one that had the slot before it
                cancel = cancel == (entry >> sequence_shift) + 1
            return function, mapping[at : at + length], blob, form, cancel

        return read_task

    def _make_post(self) -> PostCall:
        mapping, words, results_at, index = self._mapping, self._words, self._results, self.index
        slot_mask, record_bytes, identity_mask = layout.SLOT_MASK, RECORD_BYTES, layout.IDENTITY_MASK
        write, payload_at, status_shift = _write_head, PAYLOAD_AT, layout.STATUS_SHIFT

        def post(
            entry: int,
            status: int,
            encoding: int,
            payload: bytes,
            duration_ns: int,
            blob_bytes: int = 0,
            calls: int = 0,
        ) -> None:
            at = results_at + (entry & slot_mask) * record_bytes
            length = len(payload)
            write(mapping, at + 8, duration_ns, blob_bytes, index, calls, encoding)
            mapping[at + payload_at : at + payload_at + length] = payload
            words[at >> 3] = entry & identity_mask | status << status_shift | length  # the task's commit

        return post

    def stage(
        self, entry: int, encoding: int, payload: bytes, duration_ns: int, blob_bytes: int, device: int, inode: int
    ) -> None:
        """The output, file ``inode`` of ``device``, is whole, under a name of its own: status STAGED."""
        assert len(payload) <= INLINE_BYTES
        at = self._results + (entry & layout.SLOT_MASK) * RECORD_BYTES
        _write_staged(self._mapping, at + 8, duration_ns, blob_bytes, self.index, 0, encoding, device, inode)
        self._mapping[at + PAYLOAD_AT : at + PAYLOAD_AT + len(payload)] = payload
        word = entry & layout.IDENTITY_MASK | Status.STAGED << layout.STATUS_SHIFT | len(payload)
        self._words[at >> 3] = word

    def note_input(self, inode: int) -> None:
        """The task being run has an input, file ``inode``, which it may move to where its output is staged; 0: it has
        none, as far as is known. By a worker, before it calls the function.
        """
        self._words[self._input] = inode

    def finish(self, entry: int) -> None:
        """STAGED becomes OK: the output is in its place."""
        at = self._results + (entry & layout.SLOT_MASK) * RECORD_BYTES >> 3
        self._words[at] = self._words[at] & ~layout.STATUS_MASK | Status.OK << layout.STATUS_SHIFT

    def retract(self, entry: int) -> None:
        """STAGED becomes EMPTY: the outputs go, and the payload may be overwritten."""
        self._words[self._results + (entry & layout.SLOT_MASK) * RECORD_BYTES >> 3] = 0

    def staged_file(self, entry: int) -> tuple[int, int]:
        """Device and inode that ``stage`` was given."""
        at = self._results + (entry & layout.SLOT_MASK) * RECORD_BYTES
        *_, device, inode = _read_staged(self._mapping, at + 8)
        return device, inode

    def read(self, entry: int) -> ResultRecord:
        """The result of ``entry``, whose word stands."""
        at = self._results + (entry & layout.SLOT_MASK) * RECORD_BYTES
        word = self._words[at >> 3]
        duration_ns, blob_bytes, worker, calls, encoding = _read_head(self._mapping, at + 8)
        return ResultRecord(
            (word & layout.STATUS_MASK) >> layout.STATUS_SHIFT,
            word >> layout.SLOT_BITS & layout.ATTEMPT_MAX,
            encoding,
            self._mapping[at + PAYLOAD_AT : at + PAYLOAD_AT + (word & layout.LENGTH_MASK)],
            duration_ns,
            blob_bytes,
            worker,
            calls,
        )

    def deaths(self, entry: int) -> int:
        """How many workers died in this task before the attempt that ``entry`` names."""
        word = self._words[self._blame(entry)]
        counted = word >> 8 == layout.attempt_of(entry) + 1  # this attempt's death too, see ``blame``
        return (word & 0xFF) - counted

    def blame(self, entry: int) -> int:
        """Count one more death for the next attempt of ``entry``; the new count. Idempotent for one attempt."""
        at = self._blame(entry)
        word = self._words[at]
        following = layout.attempt_of(entry) + 1
        if word >> 8 == following:
            return word & 0xFF  # counted already, by a coordinator that died before it committed the requeue
        deaths = min((word & 0xFF) + 1, 0xFF)
        self._words[at] = following << 8 | deaths
        return deaths

    def _blame(self, entry: int) -> int:
        return self._tasks + (entry & layout.SLOT_MASK) * RECORD_BYTES + layout.TASK_BLAME_AT >> 3

"""How a worker posts results: inline where they fit the record, else as a blob; errors with their tracebacks.

A result of whatever kind is posted for every task. The child of a task that forked ends here: the original posts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ringpool.errors import RingpoolError, SharedMemoryFullError, words_of
from ringpool.shm import blobs, layout
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import Results
from ringpool.shm.segment import Segment
from ringpool.workers import values
from ringpool.workers.confinement import Confinement

_OK, _ERROR, _CANCELLED = int(Status.OK), int(Status.ERROR), int(Status.CANCELLED)
ROOM_PAUSE_S, ROOM_PAUSES_MAX = 0.03, 2_000  # a minute: whoever reads what the coordinator prints may pause
Encode = Callable[[object], values.Encoded]
_MSGPACK, _BLOB = int(Encoding.MSGPACK), int(Encoding.BLOB)


class Post:
    """Posts the results of one worker. ``n_errors``: how many of them were exceptions."""

    def __init__(self, segment: Segment, results: Results, confinement: Confinement) -> None:
        self.results = results
        self.segment = segment.name
        self.spares = blobs.spare_names(segment.name, results.index)
        self.n_errors = 0
        self._confinement = confinement

    def cancelled(self, entry: int) -> None:
        """The task was cancelled before it was started."""
        self.results.post(entry, _CANCELLED, 0, b"", 0)

    def value(self, entry: int, value: object, spent_ns: int, encode: Encode = values.encode_result) -> None:
        """The task returned ``value``. Raises what ``encode`` raises, and ``SharedMemoryFullError``: post that."""
        body = values.encode_inline(value)
        if body is None:
            self._post(entry, _OK, encode(value), spent_ns)
            return
        if self._confinement.forked:
            self._confinement.end_if_forked()
        self.results.post(entry, _OK, _MSGPACK, body, spent_ns)

    def error(self, entry: int, error: BaseException, spent_ns: int, calls: int = 0) -> None:
        """The task raised; ``calls``: so many times, where its function was called more than once."""
        self._confinement.disarm_for_good()
        self._confinement.note(error)
        self.n_errors += 1
        try:
            self._post(entry, _ERROR, values.encode_error(error), spent_ns, calls)
        except (RingpoolError, OSError):  # no room for it in shared memory: its first words fit the record
            words = f"{type(error).__qualname__}: {words_of(error)}".encode(errors="replace")[: layout.INLINE_BYTES - 8]
            self._post(entry, _ERROR, values.encode(words.decode(errors="ignore")), spent_ns, calls)

    def _post(self, entry: int, status: int, encoded: values.Encoded, spent_ns: int, calls: int = 0) -> None:
        self._confinement.end_if_forked()
        body, encoding, blob_bytes = self.place(entry, encoded)
        self.results.post(entry, status, encoding, body, spent_ns, blob_bytes, min(calls, layout.CALLS_MAX))

    def place(self, entry: int, encoded: values.Encoded) -> tuple[bytes, int, int]:
        """Where an encoded value goes: inline bytes, encoding and blob size. Writes the blob if it takes one."""
        if encoded.fits_record:
            return encoded.body, encoded.encoding, 0
        return b"", _BLOB, values.write_blob(self.blob(entry), encoded, self.spares)

    def place_in_time(self, entry: int, encoded: values.Encoded, let_go: Callable[[], None]) -> tuple[bytes, int, int]:
        """``place``, for results that a ledger takes over soon: where there is no room, that makes some. ``let_go``:
        of what this worker holds itself. Raises ``SharedMemoryFullError`` after a minute; at once
        for what can never fit.
        """
        for _ in range(ROOM_PAUSES_MAX if blobs.could_have(len(encoded.body)) else 0):
            try:
                return self.place(entry, encoded)
            except SharedMemoryFullError:
                let_go()
                time.sleep(ROOM_PAUSE_S)
        return self.place(entry, encoded)

    def blob(self, entry: int) -> str:
        """The name of the result's blob."""
        return blobs.result_name(self.segment, layout.sequence_of(entry), layout.attempt_of(entry))

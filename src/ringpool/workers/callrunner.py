"""Calls, in a worker: one call, or the items of a vector, each with an outcome of its own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

from ringpool.errors import RingpoolError
from ringpool.shm import blobs, layout, vectors
from ringpool.shm.layout import Encoding, Form, OutcomeKind, Status
from ringpool.shm.segment import Segment
from ringpool.workers import calls, values
from ringpool.workers.confinement import Confinement
from ringpool.workers.functions import CannotReadError, Functions, read
from ringpool.workers.posting import Encode, Post

FUNCTIONS_MAX = 256  # unpickled at a time
LOAD_NS = 60_000_000_000  # what importing a function or its arguments may take before that counts as the task's time
_OK, _PICKLE = int(Status.OK), int(Encoding.PICKLE)
_PACKED, _PICKLED = int(OutcomeKind.MSGPACK), int(OutcomeKind.PICKLE)
_VALUE_KINDS = {int(Encoding.MSGPACK): _PACKED, _PICKLE: _PICKLED}
_encode_short = values.encode_short


class CallRunner:
    """Runs the calls of one worker. ``grant``: from when on the time of the task being run counts, ns.
    ``file_function``: what is to be called with the path of each file of a vector, by the id of its function.
    ``may_go_on``: asked between any two items of a vector; None: its worker has no limit of memory, and is put right.
    """

    def __init__(
        self,
        segment: Segment,
        post: Post,
        confinement: Confinement,
        grant: Callable[[int], None],
        file_function: Callable[[int], Callable[[bytes], Any]],
        may_go_on: Callable[[], bool] | None,
    ) -> None:
        self._n_extra = 0
        self._file_function = file_function
        self._grant = grant
        self._segment = segment.name
        self._post = post
        self._confinement = confinement
        self._may_go_on = may_go_on
        self._functions = Functions[Callable[..., Any]](segment.name, FUNCTIONS_MAX)
        self._chunks: vectors.Chunks | None = None
        os.register_at_fork(after_in_child=self._let_go)

    @property
    def n_extra(self) -> int:
        """How many more items than tasks were run, since ``take_extra``."""
        return self._n_extra

    def skip(self) -> None:
        """A task was not run: its worker is no more worn by it."""
        self._n_extra -= 1

    def take_extra(self) -> int:
        """``n_extra``, which begins anew."""
        n, self._n_extra = self._n_extra, 0
        return n

    def _let_go(self) -> None:
        """A fork of this worker that returns from a call must not write outcomes."""
        if self._chunks is not None:
            self._chunks.close()

    def _function(self, function_id: int) -> Callable[..., Any] | None:
        """The callable with that id; None for id 0: the payload brings its own."""
        found = self._functions.get(function_id)
        if found is not None or not function_id:
            return found
        self._grant(time.monotonic_ns() + LOAD_NS)
        _, body, _ = read(blobs.function_name(self._segment, function_id))
        self._functions.make_room()
        found = self._functions[function_id] = calls.rebuild(body)
        self._grant(time.monotonic_ns())
        return found

    # ---- one call

    def run(self, entry: int, function_id: int, form: int, payload: bytes, blob: int, start_ns: int) -> int:
        """Run the call of ``entry`` and post its result: of whatever kind, one is posted. When that was done, ns.

        Raises ``CannotReadError``.
        """
        mapping, n_forks = None, self._confinement.n_forks
        try:
            function = self._function(function_id)
            body, buffers = payload, None
            if blob:
                _, body, buffers = read(blobs.payload_name(self._segment, blob))
                mapping = blobs.mapping_of(body)
            if form == Form.PICKLED:
                self._grant(time.monotonic_ns() + LOAD_NS)
            function, arguments, keywords = calls.decode_call(function, form, body, buffers)
            if form == Form.PICKLED:
                self._grant(time.monotonic_ns())
            value = function(*arguments, **keywords)
            del function, arguments, keywords, buffers, body
            end_ns = time.monotonic_ns()
            if mapping is not None and mapping() is None and n_forks == self._confinement.n_forks:  # nor a fork has it
                blobs.release(blobs.payload_name(self._segment, blob), entry)
            self._post.value(entry, value, end_ns - start_ns, calls.encode_result)
        except CannotReadError:
            raise
        except BaseException as error:  # a task may raise what it likes, SystemExit and KeyboardInterrupt too
            end_ns = time.monotonic_ns()
            self._post.error(entry, error, end_ns - start_ns)
        return end_ns

    # ---- a vector

    def run_vector(self, entry: int, function_id: int, payload: bytes, start_ns: int, quota: int) -> int:
        """Run items of the vector of ``entry``, at most ``quota``, and post that they are done. When that was, ns.

        What keeps the vector as a whole from being run is posted as the task's error, and that it took no time: it is
        the error of each item. What comes between two items, by a signal, is that of the item which is next. Raises
        ``CannotReadError``.
        """
        is_begun = False
        try:
            span = vectors.unpack_span(payload)
            is_timed = vectors.is_timed(span)
            function = self._file_function(function_id) if is_timed else self._function(function_id)
            assert function is not None
            if is_timed:
                start_ns = time.monotonic_ns()  # what importing it took is no file's time
            chunks = self._chunks
            if chunks is None:
                try:
                    chunks = self._chunks = vectors.Chunks.attach(self._segment)
                except (OSError, MemoryError) as error:
                    raise CannotReadError from error
            items, call = calls.decode_items(function, span.encoding, chunks.items(span))
            encode = calls.encode_result
            if is_timed:
                call, encode = chunks.timed(span, call), values.encode_result
            encoder = _Outcomes(self._post, entry, encode, self._confinement)
            is_begun = True
            restore, is_limited = self._may_go_on or self._confinement.renew, self._may_go_on is not None
            n = chunks.run(span, items, call, encoder.value, encoder.error, quota, restore, restores_each=is_limited)
            end_ns = time.monotonic_ns()
            self._confinement.end_if_forked()
            self._n_extra += n - 1
            self._post.results.post(entry, _OK, 0, b"", end_ns - start_ns)
        except CannotReadError:
            raise
        except BaseException as error:
            end_ns = time.monotonic_ns()
            is_one_items = is_begun or isinstance(error, KeyboardInterrupt)
            self._post.error(entry, error, max(1, end_ns - start_ns) if is_one_items else 0)
        return end_ns


class _Outcomes:
    """Encodes the outcomes of one vector that are no plain words. Its methods do not raise."""

    def __init__(self, post: Post, entry: int, encode: Encode, confinement: Confinement) -> None:
        self._post = post
        self._confinement = confinement
        self._entry = entry
        self._encode = encode
        self._are_short = True

    def value(self, value: object, room: int) -> tuple[int, bytes]:
        """Kind and bytes of a value."""
        if self._are_short:
            body = _encode_short(value)
            if body is not None and len(body) <= room:
                return _PICKLED, body
        body = values.encode_inline(value)
        if body is not None and len(body) <= room:
            return _PACKED, body
        if body is None:
            self._are_short = False  # large ones would be pickled twice, each
        try:
            encoded = self._encode(value)
            if encoded.buffers and len(encoded.body) + sum(each.nbytes for each in encoded.buffers) <= room:
                encoded = values.encode(value, math.inf)
            if not encoded.buffers and len(encoded.body) <= room:
                return _VALUE_KINDS[encoded.encoding], encoded.body
            values.write_blob(self._blob(), encoded, self._post.spares)
        except BaseException as error:  # pickling may run anything, sys.exit too
            return self.error(error, room)
        return OutcomeKind.BLOB, b""

    def error(self, error: BaseException, room: int) -> tuple[int, bytes]:
        """Kind and bytes of an exception."""
        self._post.n_errors += 1
        self._confinement.note(error)
        encoded = values.encode_error(error)
        if len(encoded.body) <= room:
            return OutcomeKind.ERROR, encoded.body
        try:
            values.write_blob(self._blob(), encoded, self._post.spares)
        except (RingpoolError, OSError):  # no room for it in shared memory
            words = values.encode(f"{type(error).__qualname__}: no room in shared memory for the exception").body
            return OutcomeKind.ERROR_BLOB, words if len(words) <= room else b""
        return OutcomeKind.ERROR_BLOB, b""

    def _blob(self) -> str:
        return blobs.result_name(self._post.segment, layout.sequence_of(self._entry), layout.attempt_of(self._entry))

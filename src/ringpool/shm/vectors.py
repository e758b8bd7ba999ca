"""Vectors: one task record for many items of a map, so that what a task costs is shared between them.

    /dev/shm/<segment>.v     the arena: chunks of 256 KiB. Each belongs to the task that is published with it

    publisher   Arena.take -> write: items, head -> publish the SPAN -> ... -> collect -> outcomes -> Arena.give
    worker      for each item: progress := i -> read limit -> call -> outcome -> ... -> post the task's result

That several items share a record shows nowhere:

1. An outcome stands in the chunk before ``progress`` passes its item. So when a worker dies, the items before
   ``progress`` are done, the one at it was being run, and those behind it never were.
2. ``split`` takes items from a living worker that has not come to them, by the same store and load as a claim is taken
   back (``claims``):

       worker:     progress := i             | then read limit: below or at i, the item is not its own
       publisher:  limit := 0    | membarrier | then read progress, and  limit := what it leaves, beyond progress

   Either the worker sees limit 0, and waits for the decision, or the publisher sees that it is at item i, and leaves it
   that. So an item is run by the one whose it is, and never by two.

Outcomes are plain words as long as all have the type of the first (None, int, float), or are packed one behind the
other as long as msgpack takes them (bool, str, bytes first); then comes a stream of records.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple

import msgspec
import posix_ipc

from ringpool.errors import SegmentFormatError, SegmentMissingError, SharedMemoryFullError
from ringpool.shm import barrier, layout
from ringpool.shm.layout import CHUNK_BYTES, VECTOR_ITEMS_AT, OutcomeKind, Prefix
from ringpool.shm.segment import SHM_DIRECTORY

ALL = (1 << 64) - 1
_ITEM_MASK = (1 << 32) - 1
_CHUNK_WORDS = CHUNK_BYTES >> 3
_OUTCOME_BYTES = layout.OUTCOME.size
_PACKABLE = frozenset((bool, str, bytes, int, float, NoneType))
_ENDS = int(OutcomeKind.BLOB)  # and above: with such an outcome a vector ends
_ERRORS = (OutcomeKind.ERROR, OutcomeKind.ERROR_BLOB)
_YIELDS_BEFORE_SLEEP = 100
RESTORES = 16  # in a vector: about 10 us, and a vector is milliseconds of work
_write_head = layout.VECTOR.pack_into
_write_outcome = layout.OUTCOME.pack_into


class _Packed:
    """No value has this type: what ``prefix`` is while outcomes are packed."""


class _Stream:
    """Nor this one: what ``prefix`` is once the stream has begun."""


_PREFIXES: tuple[tuple[type, type, int], ...] = (
    (NoneType, NoneType, Prefix.NONE),
    (int, int, Prefix.INT),
    (float, float, Prefix.FLOAT),
    *((kind, _Packed, Prefix.PACKED) for kind in (str, bytes, bool)),
)
_pack: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode
_unpack_list: Callable[[bytes], list[Any]] = msgspec.msgpack.Decoder(list[Any]).decode
_PACKED_LIST = struct.Struct(">BI")  # the head of a msgpack array: 0xdd, and how many follow


class Done(NamedTuple):
    """How far a vector is: its first ``n`` items have outcomes, ``packed_bytes`` of them packed."""

    n: int = 0
    packed_bytes: int = 0


_NOTHING = Done()


class Span(NamedTuple):
    """What a vector's task says: its chunk, the items [first, end) that are its own, and how they are written."""

    chunk: int
    first: int
    end: int
    items_bytes: int
    encoding: int


unpack_span: Callable[[bytes], Span] = lambda payload: Span._make(layout.SPAN.unpack(payload))  # noqa: E731


def pack_span(span: Span) -> bytes:
    """The payload of a vector's task."""
    return layout.SPAN.pack(*span)


def room_for_items(n: int, *, timed: bool = False) -> int:
    """How many bytes the items may take of a chunk in which ``n`` of them run: half, or less where outcomes need it."""
    words = 2 * n if timed else n
    return min(CHUNK_BYTES // 2, CHUNK_BYTES - VECTOR_ITEMS_AT - 8 - 8 * words - 2 * _OUTCOME_BYTES)


def is_timed(span: Span) -> bool:
    """Whether it is written what each item takes."""
    return span.encoding == layout.ItemsEncoding.FILES


def _times_bytes(span: Span) -> int:
    return 8 * (span.end - span.first) if is_timed(span) else 0


def _name(segment: str) -> str:
    return f"/{segment}.v"


class Chunks:
    """The mapped arena of ``segment``, as words of 8 bytes of three kinds."""

    def __init__(self, segment: str, mapping: mmap.mmap) -> None:
        self.segment = segment
        self.mapping = mapping
        self.words: memoryview[int] = memoryview(mapping).cast("Q")
        self._signed: memoryview[int] = memoryview(mapping).cast("q")
        self._floats: memoryview[float] = memoryview(mapping).cast("d")

    @classmethod
    def attach(cls, segment: str) -> Chunks:
        """Map the arena of a segment. Raises ``SegmentMissingError`` where it has none."""
        try:
            file = posix_ipc.SharedMemory(_name(segment))
        except posix_ipc.ExistentialError:
            raise SegmentMissingError(segment, "it has no arena for vectors") from None
        try:
            return cls(segment, mmap.mmap(file.fd, os.fstat(file.fd).st_size))
        finally:
            file.close_fd()

    def close(self) -> None:
        """Let go of the mapping. A worker's fork does: what runs on there must not write outcomes (see ``run``)."""
        for view in (self.words, self._signed, self._floats):
            with contextlib.suppress(BufferError):
                view.release()
        with contextlib.suppress(BufferError):
            self.mapping.close()

    # ---- the worker's side

    def items(self, span: Span) -> bytes:
        """The encoded items of a vector. Raises ``SegmentFormatError`` where their chunk does not hold them and any
        outcomes of them.
        """
        n, at = span.end - span.first, span.chunk * CHUNK_BYTES + VECTOR_ITEMS_AT
        room = CHUNK_BYTES - outcomes_at(span) - 2 * _OUTCOME_BYTES - _times_bytes(span)
        if n < 0 or room < 8 * n or at >= len(self.mapping):
            raise SegmentFormatError(self.segment, "a vector is not within its chunk")
        return self.mapping[at : at + span.items_bytes]

    def run(
        self,
        span: Span,
        items: Sequence[Any],
        call: Callable[[Any], Any],
        encode: Callable[[Any, int], tuple[int, bytes]],
        encode_error: Callable[[BaseException, int], tuple[int, bytes]],
        quota: int,
        restore: Callable[[], bool] = lambda: True,
        *,
        restores_each: bool = False,
    ) -> int:
        """Call ``call`` with the items of ``span``, and write each outcome; at most ``quota`` of them. How many it did.

        ``encode(value, room)`` and ``encode_error`` give kind and bytes of an outcome for the stream, at most ``room``
        bytes; they must not raise. ``restore``: called ``RESTORES`` times on the way, and between any two items where
        there are no more than that, or they are files, or with ``restores_each``; and after an item that failed. Fewer
        are done where it returns False, a part was taken away, or the chunk is full. In a fork of the worker that
        returns from ``call`` the views are released: it raises ``ValueError``. Raises ``SegmentFormatError`` where
        there are fewer items than the span says.
        """
        if span.end > len(items):
            raise SegmentFormatError(self.segment, f"a vector has {len(items)} items, and says {span.end}")
        words, signed, floats = self.words, self._signed, self._floats
        first, end = span.first, span.end
        head = span.chunk * _CHUNK_WORDS
        progress, limit, prefix_items = head + layout.V_PROGRESS, head + layout.V_LIMIT, head + layout.V_PREFIX_ITEMS
        mapping, packed_at = self.mapping, (head << 3) + outcomes_at(span)
        plain_at = (packed_at >> 3) - first
        chunk_end = (span.chunk + 1) * CHUNK_BYTES - _times_bytes(span)
        prefix: type | None = None  # of the outcomes so far; no value has type None
        packed_end, packed = packed_at, 0  # the latter: what ``progress`` says of it
        tail = 0  # of the stream, once there is one
        stop = min(end, first + max(quota, 0))
        restore_at, restore_every = first + 1, max(1, (end - first) // RESTORES)
        if restores_each or is_timed(span):
            restore_every = 1
        for i in range(first, stop):
            words[progress] = packed | i
            if i == restore_at:
                restore_at += restore_every
                if not restore():
                    return i - first
            if words[limit] <= i and not self._may_run(limit, i):  # read after the store above: see the module
                return i - first
            failed = None
            try:
                value = call(items[i])
            except BaseException as error:  # a task may raise what it likes, SystemExit and KeyboardInterrupt too
                value, failed = None, error
            else:
                kind: type = type(value)  # pyright: ignore[reportUnknownVariableType]
                if prefix is None:
                    prefix, words[head + layout.V_PREFIX] = _prefix_of(kind)
                if prefix is _Packed:
                    body = _packed(value, chunk_end - packed_end)
                    if body is not None:
                        end_of_it = packed_end + len(body)
                        mapping[packed_end:end_of_it] = body
                        packed_end = end_of_it
                        packed = packed_end - packed_at << 32
                        continue
                elif kind is prefix:
                    try:
                        if kind is int:
                            signed[plain_at + i] = value
                        elif kind is float:
                            floats[plain_at + i] = value
                        continue
                    except ValueError:  # beyond 64 bits; or this is a fork, and the next store raises again
                        pass
            words[progress] = packed | i  # in a fork of this worker: raises, before it encodes, and writes a blob
            if not tail:
                words[prefix_items] = i - first
                if prefix is _Packed:
                    tail = packed_end
                else:
                    tail = plain_at + (first if prefix is None or prefix is NoneType else i) << 3
                prefix = _Stream
            if failed is not None:
                restore_at = i + 1
            room = chunk_end - tail - 2 * _OUTCOME_BYTES  # the head of the next one has its place in any case
            code, body = encode(value, room) if failed is None else encode_error(failed, room)
            _write_outcome(mapping, tail, len(body), code)
            tail += _OUTCOME_BYTES
            mapping[tail : tail + len(body)] = body
            tail += len(body)
            if code >= _ENDS:  # outcomes are larger than the publisher thought: it will make vectors shorter
                stop = i + 1
                break
        words[progress] = packed | stop
        return stop - first

    def timed(self, span: Span, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``call``, for the items of ``span`` in their order: what each takes is written, see ``times``."""
        words, clock = self.words, time.monotonic_ns
        at = (span.chunk + 1) * _CHUNK_WORDS

        def timed_call(item: Any) -> Any:
            nonlocal at
            at -= 1
            began_ns = clock()
            try:
                return call(item)
            finally:
                words[at] = clock() - began_ns

        return timed_call

    def _may_run(self, limit: int, i: int) -> bool:
        """Whether item ``i`` is still this worker's, once the publisher has decided it."""
        words, n = self.words, 0
        while not (bound := words[limit]):  # once: by a second look it may be undecided again
            n += 1
            if n < _YIELDS_BEFORE_SLEEP:
                os.sched_yield()
            else:
                time.sleep(0.001)  # its publisher was stopped in between; where it has died, this process ends as well
        return i < bound

    # ---- the publisher's side

    def write(self, span: Span, items: bytes) -> None:
        """Make the vector of ``span``, not yet visible to anybody."""
        at = span.chunk * CHUNK_BYTES
        _write_head(self.mapping, at, span.first, span.end, Prefix.NONE, ALL)
        self.mapping[at + VECTOR_ITEMS_AT : at + VECTOR_ITEMS_AT + len(items)] = items

    def progress(self, span: Span) -> int:
        """The item that is run, or comes next. Of a living worker a hint."""
        return self.words[span.chunk * _CHUNK_WORDS + layout.V_PROGRESS] & _ITEM_MASK

    def split(self, span: Span, share: Callable[[int], int]) -> int:
        """Take items from the worker that runs ``span``: it keeps ``share(n)`` of the ``n`` that it has not come to.

        The new end of its span; the items from there on are the caller's.
        """
        words, head = self.words, span.chunk * _CHUNK_WORDS
        words[head + layout.V_LIMIT] = 0
        if not barrier.fence_all():
            words[head + layout.V_LIMIT] = span.end
            return span.end
        following = (words[head + layout.V_PROGRESS] & _ITEM_MASK) + 1  # read after the store above: see the module
        end = span.end if following >= span.end else following + share(span.end - following)
        words[head + layout.V_LIMIT] = max(end, 1)
        return end

    def done(self, span: Span) -> Done:
        """Which items of ``span`` have outcomes that stand, whether its worker lives and goes on or not."""
        word = self.words[span.chunk * _CHUNK_WORDS + layout.V_PROGRESS]
        barrier.fence_all()  # the outcomes were stored before: now this process sees them too
        return Done(min(word & _ITEM_MASK, span.end) - span.first, word >> 32)

    def outcomes(self, span: Span, done: Done, taken: Done = _NOTHING) -> tuple[list[Any], bytes]:
        """The outcomes that are ``done``, without those ``taken`` before: values, and then the others as a stream, see
        ``stream``. Raises ``SegmentFormatError`` where something has written into the chunk that had no business there.
        """
        head, at = span.chunk * _CHUNK_WORDS, span.chunk * CHUNK_BYTES + outcomes_at(span)
        n, end = done.n, (span.chunk + 1) * CHUNK_BYTES
        plain = min(n, self.words[head + layout.V_PREFIX_ITEMS])
        prefix, word = self.words[head + layout.V_PREFIX], at >> 3
        if not 0 <= taken.n <= n <= span.end - span.first or prefix > Prefix.PACKED:
            raise SegmentFormatError(self.segment, "the head of a vector was written over")
        first = min(taken.n, plain)
        if prefix == Prefix.NONE:
            values: list[Any] = [None] * (plain - first)
        elif prefix == Prefix.PACKED:
            values = self._unpacked(plain - first, at + taken.packed_bytes, min(at + done.packed_bytes, end))
            at += done.packed_bytes
        else:
            values = (self._signed if prefix == Prefix.INT else self._floats)[word + first : word + plain].tolist()
            at += plain << 3
        if plain == n:
            return values, b""
        at = self._end_of_stream(at, taken.n - first, end)
        return values, self.mapping[at : self._end_of_stream(at, n - max(taken.n, plain), end)]

    def times(self, span: Span, first: int, end: int) -> list[int]:
        """What the items [first, end) of those that are done took, ns, the last of them first; where they are timed."""
        at = (span.chunk + 1) * _CHUNK_WORDS
        return self.words[at - end : at - first].tolist() if is_timed(span) else []

    def _unpacked(self, n: int, first: int, end: int) -> list[Any]:
        if not n:
            return []
        try:
            return _unpack_list(_PACKED_LIST.pack(0xDD, n) + self.mapping[first:end])
        except msgspec.DecodeError as error:
            raise SegmentFormatError(self.segment, f"the outcomes of a vector were written over: {error}") from None

    def _end_of_stream(self, at: int, n: int, end: int) -> int:
        try:
            for _ in range(n):
                at += _OUTCOME_BYTES + layout.OUTCOME.unpack_from(self.mapping, at)[0]
        except struct.error:
            at = end + 1
        if at > end:
            raise SegmentFormatError(self.segment, "the outcomes of a vector run over its chunk")
        return at


def _prefix_of(kind: type) -> tuple[type, int]:
    """What the prefix is where the first outcome is of this type: marker, and ``Prefix``."""
    for known, prefix, code in _PREFIXES:  # no dict: a type may have no hash
        if kind is known:
            return prefix, code
    return _Packed, Prefix.PACKED  # with none of them packed, as yet


def _packed(value: object, room: int) -> bytes | None:
    """``value`` as msgpack, where it is of a type that comes back the same, and leaves room for another outcome."""
    try:
        body = _pack(value) if type(value) in _PACKABLE else None
    except (OverflowError, UnicodeEncodeError, TypeError):  # beyond 64 bits; a lone surrogate; a type without a hash
        return None
    return body if body is not None and len(body) + 2 * _OUTCOME_BYTES <= room else None


def outcomes_at(span: Span) -> int:
    """Where the outcomes of a vector begin, in its chunk: a byte offset, a multiple of 8."""
    return VECTOR_ITEMS_AT + span.items_bytes + 7 & ~7


def errors_in(outcomes: bytes) -> int:
    """How many of a stream's outcomes are exceptions."""
    return sum(kind in _ERRORS for kind, _ in stream(outcomes)) if outcomes else 0


def stream(outcomes: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind (``OutcomeKind``) and body of each outcome of a stream.

    Two lists, and bytes: of thousands of tuples and views, the garbage collector would look at each, and at all else
    more often.
    """
    kinds, bodies, at, end = list[int](), list[bytes](), 0, len(outcomes)
    head = layout.OUTCOME.unpack_from
    while at < end:
        length, kind = head(outcomes, at)
        at += _OUTCOME_BYTES
        kinds.append(kind)
        bodies.append(outcomes[at : at + length])
        at += length
    return zip(kinds, bodies, strict=True)


class Arena(Chunks):
    """The arena of ``segment``, made by its publisher, who alone gives out its ``n`` chunks. One thread uses it.

    ``n_at_first`` of them (None: all) have their memory from the start; each of the others when all those are in use.
    Raises ``SharedMemoryFullError`` where there is no room for the first.
    """

    def __init__(self, segment: str, n: int, n_at_first: int | None = None) -> None:
        with contextlib.suppress(posix_ipc.ExistentialError):  # left by an attempt that Ctrl-C has cut short
            posix_ipc.unlink_shared_memory(_name(segment))
        self._n = n
        self._n_reserved = n if n_at_first is None else min(n_at_first, n)
        n_bytes = self._n_reserved * CHUNK_BYTES
        file = posix_ipc.SharedMemory(_name(segment), posix_ipc.O_CREX, mode=0o600)
        try:
            os.posix_fallocate(file.fd, 0, n_bytes)  # ENOSPC now, not a SIGBUS later
            os.ftruncate(file.fd, n * CHUNK_BYTES)
            super().__init__(segment, mmap.mmap(file.fd, n * CHUNK_BYTES))
        except OSError as error:
            posix_ipc.unlink_shared_memory(_name(segment))
            raise SharedMemoryFullError(segment, f"{SHM_DIRECTORY} has no room for {n_bytes:,} bytes") from error
        finally:
            file.close_fd()
        self._free = list(range(self._n_reserved))

    def unlink(self) -> None:
        """Remove its name, if it is there; its mappings stay valid."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(_name(self.segment))

    def take(self) -> int | None:
        """A chunk that is free, the one that was used last; or None."""
        if not self._free and self._n_reserved < self._n:
            self._reserve()
        return self._free.pop() if self._free else None

    def _reserve(self) -> None:
        """One chunk more, if there is room for it."""
        try:
            file = posix_ipc.SharedMemory(_name(self.segment))
        except (OSError, posix_ipc.Error):  # EMFILE
            return
        try:
            os.posix_fallocate(file.fd, self._n_reserved * CHUNK_BYTES, CHUNK_BYTES)
        except OSError:  # ENOSPC: those that there are serve
            return
        finally:
            file.close_fd()
        self._free.append(self._n_reserved)
        self._n_reserved += 1

    def give(self, chunk: int) -> None:
        """Its task is delivered."""
        self._free.append(chunk)

"""The entries of a status table: a hash table in shared memory, and its whole binary layout.

Little-endian; every word is 8 bytes and aligned. C entries (the capacity), B buckets (a power of two, at least C),
M chunks. Offsets stand here: the format of tables has an id of its own, so that a change here leaves rings alone.

    HEADER          written once by the creator, before the segment has a name; ``magic`` last
    0x000  Q    magic            b"RPSTATUS"
    0x008  I    version          of this table
    0x00c  I    header_bytes     0x100
    0x010  Q    size_bytes       of the whole segment
    0x018  H    machine          these five as in a ring's header
    0x01a  B    byte_order
    0x01b  B    mutex_bytes
    0x01c  H    libc_major
    0x01e  H    libc_minor
    0x020  I    capacity         C
    0x024  I    buckets          B
    0x028  I    chunks           M
    0x02c  I    chunk_bytes      0x80
    0x030  Q    buckets_at       B words: the bucket's first entry
    0x038  Q    entries_at       C entries
    0x040  Q    chunks_at        M chunks
    0x048  Q    creator_pid      who made the segment
    0x050  Q    creator_start    its start time, ticks since boot
    0x058  16s  boot_id          of the running kernel
    0x068  Q    pid_namespace    inode of it: in another one, pids mean nothing
    0x070  16s  uuid             of this segment; keys the hash, and names the directory of its bells
    0x080  Q    format_id        digest of all of this
    0x0f8  Q    crc32            of the bytes 0x008..0x0f7

    CONTROL         written under the mutex only
    0x100  64s  mutex            pthread_mutex_t: robust, process-shared
    0x140  Q    unlinked         1: its name is gone, or about to go, and nobody may use it
    0x148  Q    log_pairs        how many pairs of the log are to be done; 0: none. Storing it is the commit
    0x150  Q    n_entries        in use
    0x158  Q    entries_touched  entries from here on were never used
    0x160  Q    free_entry       the first of those given back
    0x168  Q    chunks_touched   chunks from here on were never used
    0x170  Q    free_chunk       the first of those given back
    0x180  512s log              up to 32 pairs: index of a word, its new value

    ENTRY
    0x00   Q    hash             of the path: blake2b, 8 bytes, keyed with the uuid
    0x08   Q    next             in its bucket, or among the free
    0x10   Q    chunks           first chunk of the path | first chunk of the detail << 32
    0x18   Q    lengths          of the path | of the detail << 32, bytes
    0x20   Q    state            FileState in 8 bits, 0: free | WAITED: somebody may sleep until it is available
    0x28   Q    pid              of the owner: who holds it, or gave it this state
    0x30   Q    start            the owner's start time
    0x38   Q    since_ns         when it got this state from this owner, time.time_ns

    CHUNK           of a path or a detail, whatever their length; the length says how many chunks there are
    0x00   Q    next             of the same content, or among the free
    0x08   120s content

A link to an entry or a chunk is 1 + its index; 0 is none.

Nothing that can be reached changes but through the log: a section collects its stores, writes them into the log,
commits them by the one store of ``log_pairs``, does them, and clears it. Whoever inherits the mutex does them again
(``redo``). Killed before the commit nothing has happened, but for content in chunks that are still free. Buckets are
chains: an entry that goes leaves no tombstone, and no use makes a table slower. Entries and chunks have one size each,
so that nothing is ever fragmented, or moved.
"""

from __future__ import annotations

import hashlib
import inspect
import mmap
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from typing import NamedTuple, TypeVar

from ringpool.errors import SegmentFormatError, SegmentMissingError, StatusReentryError, StatusTableFullError
from ringpool.shm import layout
from ringpool.shm.lock import RobustLock
from ringpool.shm.owner import Owner

MAGIC = int.from_bytes(b"RPSTATUS", "little")
VERSION = 1
HEADER_BYTES = layout.HEADER_BYTES
HEADER = struct.Struct("<QIIQHBBHH4I3QQQ16sQ16sQ")
CRC_AT = layout.CRC_AT
MUTEX_AT = 0x100
UNLINKED_AT = 0x140
LOG_PAIRS_AT = 0x148
N_ENTRIES_AT = 0x150
ENTRIES_TOUCHED_AT = 0x158
FREE_ENTRY_AT = 0x160
CHUNKS_TOUCHED_AT = 0x168
FREE_CHUNK_AT = 0x170
LOG_AT = 0x180
LOG_PAIRS_MAX = 32
SECTIONS_AT = 0x1000
ENTRY = struct.Struct("<8Q")
CHUNK_BYTES = 0x80
CONTENT_AT = 8
CONTENT_BYTES = CHUNK_BYTES - CONTENT_AT

# Word indices inside an entry.
E_HASH, E_NEXT, E_CHUNKS, E_LENGTHS, E_STATE, E_PID, E_START, E_SINCE = range(8)
STATE_MASK = 0xFF
WAITED = 0x100
HALF = 32
HALF_MASK = (1 << HALF) - 1
CAPACITY_MAX = 1 << 28
CHUNKS_MAX = HALF_MASK - 1

_UNLINKED, _LOG_PAIRS, _N_ENTRIES = UNLINKED_AT >> 3, LOG_PAIRS_AT >> 3, N_ENTRIES_AT >> 3
_ENTRIES_TOUCHED, _FREE_ENTRY = ENTRIES_TOUCHED_AT >> 3, FREE_ENTRY_AT >> 3
_CHUNKS_TOUCHED, _FREE_CHUNK = CHUNKS_TOUCHED_AT >> 3, FREE_CHUNK_AT >> 3
_LOG = LOG_AT >> 3

T = TypeVar("T")


class FileState(IntEnum):
    """What is the matter with a path. ``STEPS`` has the legal steps, ``HELD`` the states that have an owner."""

    AVAILABLE = 1
    LOCKED = 2  # somebody's, who has not begun
    PROCESSING = 3  # somebody's, who works on it
    DONE = 4
    ERROR = 5


HELD = frozenset({FileState.LOCKED, FileState.PROCESSING})
STEPS: dict[FileState, frozenset[FileState]] = {
    FileState.AVAILABLE: frozenset(FileState),
    FileState.LOCKED: frozenset(FileState),
    FileState.PROCESSING: frozenset(FileState),
    FileState.DONE: frozenset(FileState)
    - {FileState.ERROR},  # what has ended ends in another way only if it is taken again
    FileState.ERROR: frozenset(FileState) - {FileState.DONE},
}


class TableHeader(NamedTuple):
    """The header, decoded, in the order of the table."""

    magic: int
    version: int
    header_bytes: int
    size_bytes: int
    machine: int
    byte_order: int
    mutex_bytes: int
    libc_major: int
    libc_minor: int
    capacity: int
    buckets: int
    chunks: int
    chunk_bytes: int
    buckets_at: int
    entries_at: int
    chunks_at: int
    creator_pid: int
    creator_start: int
    boot_id: bytes
    pid_namespace: int
    uuid: bytes
    format_id: int


class Places(NamedTuple):
    """Counts and byte offsets of the sections of a table, and its size."""

    capacity: int
    buckets: int
    chunks: int
    buckets_at: int
    entries_at: int
    chunks_at: int
    size_bytes: int


def places_of(capacity: int, chunks: int) -> Places:
    """Where the sections of a table of that many entries and chunks lie."""
    buckets = 1 << max(capacity - 1, 0).bit_length()
    entries_at = SECTIONS_AT + -(-buckets * 8 // layout.PAGE_BYTES) * layout.PAGE_BYTES
    chunks_at = entries_at + -(-capacity * ENTRY.size // layout.PAGE_BYTES) * layout.PAGE_BYTES
    size_bytes = chunks_at + -(-chunks * CHUNK_BYTES // layout.PAGE_BYTES) * layout.PAGE_BYTES
    return Places(capacity, buckets, chunks, SECTIONS_AT, entries_at, chunks_at, size_bytes)


def _format_id() -> int:
    words = [HEADER.format, ENTRY.format, CRC_AT, MUTEX_AT, UNLINKED_AT, LOG_PAIRS_AT, N_ENTRIES_AT]
    words += [ENTRIES_TOUCHED_AT, FREE_ENTRY_AT, CHUNKS_TOUCHED_AT, FREE_CHUNK_AT, LOG_AT, LOG_PAIRS_MAX, SECTIONS_AT]
    words += [E_HASH, E_NEXT, E_CHUNKS, E_LENGTHS, E_STATE, E_PID, E_START, E_SINCE]
    words += [
        CHUNK_BYTES,
        CONTENT_AT,
        STATE_MASK,
        WAITED,
        HALF,
        *(f"{state.name}={state.value}" for state in FileState),
    ]
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little")


FORMAT_ID = _format_id()


class Found(NamedTuple):
    """Where a path's entry is: its first word (0: there is none), and the word that links to it, or would."""

    base: int
    link: int


class Row(NamedTuple):
    """What an entry says. ``state`` is that of the table's word, without WAITED."""

    path: bytes
    state: FileState
    owner: Owner
    since_ns: int
    detail: bytes


class Entries:
    """The mapped entries of one table, and their lock.

    ``table``: the name that users gave it; ``segment``: the file's in ``/dev/shm``. All but ``run``, ``hash_of``,
    ``mark_unlinked`` and ``close`` are for sections, which ``run`` runs under the mutex.
    """

    def __init__(self, table: str, segment: str, mapping: mmap.mmap, header: TableHeader) -> None:
        self.table = table
        self.segment = segment
        self.header = header
        self.mapping = mapping
        self.words: memoryview[int] = memoryview(mapping).cast("Q")
        self.lock = RobustLock(mapping, MUTEX_AT, partial(redo, self.words))
        self._buckets, self._entries = header.buckets_at >> 3, header.entries_at >> 3
        self._mask = header.buckets - 1
        self._is_open = True

    # ---- sections

    def run(self, section: Callable[[], T]) -> T:
        """Run ``section`` under the mutex, which is released on whatever exception.

        Raises ``StatusReentryError`` where this thread is inside of a section already: a signal handler's or a
        finalizer's call, which would change what the interrupted section has read.
        """
        if not self._is_open:
            _refuse(self.table)
        if self.lock.held_by_this_thread and self._is_nested():
            raise StatusReentryError(self.table)
        return self.lock.run(section)

    def _is_nested(self) -> bool:
        """Whether ``run`` for this table is on the stack twice; once, and an exception left the mutex held.

        Perhaps by way of two objects: the mutex is the table's.
        """
        code, n, frame = Entries.run.__code__, 0, inspect.currentframe()
        while frame is not None and n < 2:
            n += frame.f_code is code and frame.f_locals["self"].header.uuid == self.header.uuid
            frame = frame.f_back
        return n > 1

    def commit(self, change: dict[int, int]) -> None:
        """Store each word of ``change``, all or none of them, whoever is killed."""
        words, at = self.words, _LOG
        for index, value in change.items():
            words[at] = index
            words[at + 1] = value
            at += 2
        words[_LOG_PAIRS] = len(change)  # the commit
        redo(words)

    # ---- entries

    def hash_of(self, path: bytes) -> int:
        """The hash of a path in this table; a key of its own makes collisions nobody's choice."""
        return int.from_bytes(hashlib.blake2b(path, digest_size=8, key=self.header.uuid).digest(), "little")

    def find(self, path: bytes, digest: int) -> Found:
        """Where the entry of ``path`` is. Raises ``SegmentMissingError`` once the table was unlinked."""
        words = self.words
        self.refuse_unlinked()
        link = self._buckets + (digest & self._mask)
        for _ in range(self.header.capacity + 1):
            number = words[link]
            if not number:
                return Found(0, link)
            base = self._entries + (number - 1) * 8
            if words[base] == digest and self._path(base) == path:
                return Found(base, link)
            link = base + E_NEXT
        raise SegmentFormatError(self.segment, "a bucket has no end")

    def refuse_unlinked(self) -> None:
        """Raise ``SegmentMissingError`` once the table was unlinked: others may have made a new one by that name."""
        if self.words[_UNLINKED]:
            raise SegmentMissingError(self.segment, "it was unlinked; open the table anew")

    def state(self, base: int) -> FileState:
        """The state of an entry."""
        return FileState(self.words[base + E_STATE] & STATE_MASK)

    def owner(self, base: int) -> Owner:
        """The owner of an entry."""
        return Owner(self.words[base + E_PID], self.words[base + E_START])

    def since_ns(self, base: int) -> int:
        """Since when an entry has its state, time.time_ns."""
        return self.words[base + E_SINCE]

    def row(self, base: int) -> Row:
        """An entry, decoded."""
        words = self.words
        first, n_bytes = words[base + E_CHUNKS] >> HALF, words[base + E_LENGTHS] >> HALF
        detail = _content(self.mapping, self.header.chunks_at, first, n_bytes)
        return Row(self._path(base), self.state(base), self.owner(base), words[base + E_SINCE], detail)

    def is_waited(self, base: int) -> bool:
        """Whether somebody may sleep until this entry is available."""
        return bool(self.words[base + E_STATE] & WAITED)

    def set_waited(self, base: int, waited: bool) -> None:
        """Note that somebody may sleep, or that nobody does. One store."""
        word = self.words[base + E_STATE]
        self.words[base + E_STATE] = word | WAITED if waited else word & ~WAITED

    def insert(self, found: Found, digest: int, row: Row) -> None:
        """A new entry, where ``find`` found none. Raises ``StatusTableFullError``, having changed nothing."""
        words, change = self.words, dict[int, int]()
        number, touched = words[_FREE_ENTRY], words[_ENTRIES_TOUCHED]
        base = self._entries + ((number or touched + 1) - 1) * 8
        if number:
            change[_FREE_ENTRY] = words[base + E_NEXT]
        elif touched < self.header.capacity:
            number = change[_ENTRIES_TOUCHED] = touched + 1
        else:
            raise StatusTableFullError(self.table, self.header.capacity, "every entry is in use")
        path_chunk = self._take(change, row.path)
        detail_chunk = self._take(change, row.detail)
        change[base + E_HASH] = digest
        change[base + E_NEXT] = 0
        change[base + E_CHUNKS] = path_chunk | detail_chunk << HALF
        change[base + E_LENGTHS] = len(row.path) | len(row.detail) << HALF
        _describe(change, base, row, 0)
        change[found.link] = number
        change[_N_ENTRIES] = words[_N_ENTRIES] + 1
        self.commit(change)

    def update(self, base: int, row: Row) -> None:
        """Another state, owner, time and detail for an entry. ``StatusTableFullError``: nothing was changed.

        WAITED stays where the state is a held one.
        """
        words, change = self.words, dict[int, int]()
        chunks, lengths = words[base + E_CHUNKS], words[base + E_LENGTHS]
        if _content(self.mapping, self.header.chunks_at, chunks >> HALF, lengths >> HALF) != row.detail:
            change[base + E_CHUNKS] = chunks & HALF_MASK | self._take(change, row.detail) << HALF
            change[base + E_LENGTHS] = lengths & HALF_MASK | len(row.detail) << HALF
            self._give_back(change, chunks >> HALF, lengths >> HALF)
        _describe(change, base, row, words[base + E_STATE] & WAITED if row.state in HELD else 0)
        self.commit(change)

    def remove(self, found: Found) -> None:
        """Give an entry back, with its chunks."""
        words, (base, link) = self.words, found
        chunks, lengths = words[base + E_CHUNKS], words[base + E_LENGTHS]
        change = {
            link: words[base + E_NEXT],
            base + E_STATE: 0,
            base + E_NEXT: words[_FREE_ENTRY],
            _FREE_ENTRY: words[link],
            _N_ENTRIES: words[_N_ENTRIES] - 1,
        }
        self._give_back(change, chunks & HALF_MASK, lengths & HALF_MASK)
        self._give_back(change, chunks >> HALF, lengths >> HALF)
        self.commit(change)

    # ---- chunks

    def _path(self, base: int) -> bytes:
        first, n_bytes = self.words[base + E_CHUNKS] & HALF_MASK, self.words[base + E_LENGTHS] & HALF_MASK
        return _content(self.mapping, self.header.chunks_at, first, n_bytes)

    def _chunk_word(self, number: int) -> int:
        return (self.header.chunks_at + (number - 1) * CHUNK_BYTES) >> 3

    def _take(self, change: dict[int, int], content: bytes) -> int:
        """Write ``content`` into free chunks, and take them with ``change``; the first one, 0 for no content.

        What is written before the commit is the content of free chunks, and links of chunks that nothing links to.
        """
        words, n_bytes = self.words, len(content)
        if not n_bytes:
            return 0
        n = -(-n_bytes // CONTENT_BYTES)
        free, touched = change.get(_FREE_CHUNK, words[_FREE_CHUNK]), change.get(_CHUNKS_TOUCHED, words[_CHUNKS_TOUCHED])
        taken: list[int] = []
        while free and len(taken) < n:
            taken.append(free)
            free = words[self._chunk_word(free)]
        fresh = range(touched + 1, touched + 1 + n - len(taken))
        if touched + len(fresh) > self.header.chunks:
            reason = f"{n_bytes:,} bytes more do not fit into its {self.header.chunks * CONTENT_BYTES:,}"
            raise StatusTableFullError(self.table, self.header.capacity, reason)
        if fresh:
            for number in fresh:
                words[self._chunk_word(number)] = number + 1
            if taken:
                change[self._chunk_word(taken[-1])] = fresh[0]
            change[_CHUNKS_TOUCHED] = touched + len(fresh)
            taken += fresh
        change[_FREE_CHUNK] = free
        for start, number in zip(range(0, n_bytes, CONTENT_BYTES), taken, strict=True):
            part = content[start : start + CONTENT_BYTES]
            at = self.header.chunks_at + (number - 1) * CHUNK_BYTES + CONTENT_AT
            self.mapping[at : at + len(part)] = part
        return taken[0]

    def _give_back(self, change: dict[int, int], first: int, n_bytes: int) -> None:
        """Put the chunks of a content among the free, with ``change``."""
        if n_bytes:
            last = first
            for _ in range(-(-n_bytes // CONTENT_BYTES) - 1):
                last = self.words[self._chunk_word(last)]
            change[self._chunk_word(last)] = change.get(_FREE_CHUNK, self.words[_FREE_CHUNK])
            change[_FREE_CHUNK] = first

    # ---- all of them

    def n_entries(self) -> int:
        """Entries in use."""
        self.refuse_unlinked()
        return self.words[_N_ENTRIES]

    def states(self) -> list[int]:
        """The state words of all entries that were ever used."""
        self.refuse_unlinked()
        end = self._entries + self.words[_ENTRIES_TOUCHED] * 8
        return self.words[self._entries + E_STATE : end : 8].tolist()

    def copy(self) -> tuple[bytes, bytes]:
        """The bytes of all entries and chunks that were ever used, for ``rows_of``."""
        self.refuse_unlinked()
        entries_at, chunks_at = self.header.entries_at, self.header.chunks_at
        return (
            self.mapping[entries_at : entries_at + self.words[_ENTRIES_TOUCHED] * ENTRY.size],
            self.mapping[chunks_at : chunks_at + self.words[_CHUNKS_TOUCHED] * CHUNK_BYTES],
        )

    # ---- the end

    @property
    def is_unlinked(self) -> bool:
        """Whether somebody has begun to unlink it. Without the mutex: a hint."""
        return self.words[_UNLINKED] != 0

    def mark_unlinked(self) -> None:
        """From here on, nobody may use it."""
        self.words[_UNLINKED] = 1

    def close(self) -> None:
        """Let nobody begin another section. The mapping goes with the last reference to this object: sections that
        other threads are in come to their end.
        """
        self._is_open = False
        self.lock.acquire = partial(_refuse, self.table)  # its own refers to the lock, and so would keep the mapping


def _refuse(table: str) -> None:
    raise ValueError(f"status table {table} is closed")


def redo(words: memoryview[int]) -> None:
    """Do what the log says, also for an owner that did not get to it. Idempotent until the log is cleared."""
    for at in range(_LOG, _LOG + 2 * min(words[_LOG_PAIRS], LOG_PAIRS_MAX), 2):
        words[words[at]] = words[at + 1]
    words[_LOG_PAIRS] = 0


def rows_of(entries: bytes, chunks: bytes) -> Iterator[Row]:
    """The entries in use of a ``copy``."""
    for _, _, firsts, lengths, word, pid, start, since_ns in ENTRY.iter_unpack(entries):
        if word & STATE_MASK:
            path = _content(chunks, 0, firsts & HALF_MASK, lengths & HALF_MASK)
            detail = _content(chunks, 0, firsts >> HALF, lengths >> HALF)
            yield Row(path, FileState(word & STATE_MASK), Owner(pid, start), since_ns, detail)


def _content(source: bytes | mmap.mmap, chunks_at: int, number: int, n_bytes: int) -> bytes:
    """The ``n_bytes`` that begin in chunk ``number``, where chunks lie at ``chunks_at`` of ``source``."""
    parts: list[bytes] = []
    while n_bytes > 0:
        at = chunks_at + (number - 1) * CHUNK_BYTES
        parts.append(source[at + CONTENT_AT : at + CONTENT_AT + min(n_bytes, CONTENT_BYTES)])
        n_bytes -= CONTENT_BYTES
        if n_bytes > 0:
            number = int.from_bytes(source[at : at + CONTENT_AT], "little")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _describe(change: dict[int, int], base: int, row: Row, waited: int) -> None:
    change[base + E_STATE] = row.state | waited
    change[base + E_PID] = row.owner.pid
    change[base + E_START] = row.owner.start
    change[base + E_SINCE] = row.since_ns

"""The whole binary layout of a segment. Offsets stand here and nowhere else; a test holds this table against the code.

Little-endian; every word is 8 bytes and aligned. N slots, W workers (at most 64), K claims a worker may hold.

    HEADER          written once by the creator; ``magic`` last: it says that all the rest is ready
    0x000  Q    magic            b"RINGPOOL"
    0x008  I    version          of this table
    0x00c  I    header_bytes     0x100
    0x010  Q    size_bytes       of the whole segment
    0x018  H    machine          ELF number of the architecture
    0x01a  B    byte_order       1 little, 2 big
    0x01b  B    mutex_bytes      sizeof(pthread_mutex_t)
    0x01c  H    libc_major       of glibc
    0x01e  H    libc_minor
    0x020  I    slots            N
    0x024  I    workers          W
    0x028  I    claims_max       K
    0x02c  I    record_bytes     0x440
    0x030  Q    lists_at         claim lists: W x 2 x K x 8, one of each pair in use, by the parity of the claim word
    0x038  Q    ready_at         ring of N entries
    0x040  Q    retry_at         ring of N entries
    0x048  Q    done_at          ring of N entries
    0x050  Q    tasks_at         N task records
    0x058  Q    results_at       N result records
    0x060  Q    creator_pid      who made the segment
    0x068  Q    creator_start    its start time, ticks since boot
    0x070  16s  boot_id          of the running kernel
    0x080  Q    pid_namespace    inode of it: in another one, pids mean nothing
    0x088  16s  uuid             of this segment
    0x098  Q    format_id        digest of all structs below, see FORMAT_ID
    0x0f8  Q    crc32            of the bytes 0x008..0x0f7

    CURSORS         written under the mutex only, by whoever holds it
    0x100  64s  mutex            pthread_mutex_t: robust, process-shared
    0x140  Q    version_word     its last bit names the block in use. Storing it is the commit
    0x180  80s  block_a          CURSORS, see below
    0x200  80s  block_b

    COORDINATOR     written by the living coordinator only, except n_redone (under the mutex)
    0x280  Q    done_head        DHEAD: results before it were delivered
    0x288  Q    coordinator_pid
    0x290  Q    coordinator_start
    0x298  Q    run_state        RunState
    0x2a0  Q    n_redone         sections finished for an owner that died, or was interrupted

    0x400  128s worker_0         WORKER, see below, one per worker; the sections follow, each on its own page

    CURSORS
    0x00   Q    ready_head       H   ready holds the tasks [H, T): a task's place in it is its sequence
    0x08   Q    ready_tail       T   also the number of tasks ever accepted
    0x10   Q    retry_head       RH  retry holds [RH, RT)
    0x18   Q    retry_tail       RT
    0x20   Q    done_tail        DT  done holds [DHEAD, DT)
    0x28   Q    parked           bit w: worker w sleeps, or is about to
    0x30   Q    op_worker        the one store that follows this commit: claim of this worker (W: none) ...
    0x38   Q    op_claim         ... becomes this. A successor of a dead owner does it again
    0x40   Q    wake_at          done_tail at which the coordinator wants to be woken (0: it is awake)
    0x48   Q    spinning         bit w: worker w found nothing and looks again; it need not be woken

    WORKER          written by the worker itself, except claim (under the mutex) and revoke (the coordinator, under it)
    0x00   Q    pid              0: nobody
    0x08   Q    start            start time, ticks since boot
    0x10   Q    claim            sequence << 16 | number of entries in the claim list of that parity
    0x18   Q    running          1 + the entry of the task being run, or that was run last; 0: none yet
    0x20   Q    revoke           a claim sequence: what of it was not started, the coordinator takes back
    0x28   Q    task_start_ns    when ``running`` began, CLOCK_MONOTONIC; stored before it
    0x30   Q    n_tasks          ended by this process
    0x38   Q    n_errors         of them with an exception
    0x40   Q    busy_ns          spent in task functions
    0x48   Q    input            inode of the input of the task being run, as it was before the call; 0: not known.
                                 Of a job's tasks, and of file tasks with an output

    TASK            written by the publisher before the task is visible, then only: cancel, blame (the coordinator)
    0x00   Q    entry            as first published (attempt 0)
    0x08   I    function         id of the function's blob
    0x0c   I    length           of the payload that follows, bytes; 0 where blob is set
    0x10   Q    blob             id of the payload's blob, 0: none
    0x18   Q    form             Form of the payload
    0x20   Q    cancel           1 + the sequence of the task that is not to be started; 0: none
    0x28   Q    blame            attempt << 8 | deaths: how many workers died in it before that attempt
    0x30   1040s payload

    RESULT          written by the worker that runs the task; after its proven death by the coordinator
    0x00   Q    word             seq:36 attempt:6 status:4 length:18. Stored last: it is the task's own commit
    0x08   Q    duration_ns      of the task function
    0x10   Q    blob_bytes       size of the result's blob, 0: none
    0x18   H    worker           index
    0x1a   H    calls            how often the function was called, where that is known; 0: it is not, or once
    0x1c   I    encoding         Encoding of the payload
    0x20   Q    device           of a file task's staged output, while status is STAGED
    0x28   Q    inode            of the same
    0x30   1040s payload

    VECTOR          the head of a chunk of the arena: a task of many items, see ``vectors``. Written by the publisher
                    before the task is visible, then by the worker that runs it, except limit (the coordinator)
    0x00   Q    progress         the item being run, or next to be: all before it have outcomes in the chunk; and
                                 << 32, how many bytes of them are packed
    0x08   Q    limit            items from here on are not this task's any more; 0: that is being decided
    0x10   Q    prefix           Prefix: how the first outcomes stand
    0x18   Q    prefix_items     how many of them do, before the stream; all ones: all, so far
    0x40        items, then outcomes, each on a multiple of 8; at the end of the chunk, last item first, what each file
                took, 8 bytes of ns

    entry = seq:36 | attempt:6 | slot:22

Truth is which list holds a slot: ready [H, T), retry [RH, RT), a worker's claim list, done [DHEAD, DT), or none: free.
"""

from __future__ import annotations

import operator
import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

MAGIC = int.from_bytes(b"RINGPOOL", "little")
VERSION = 1
HEADER_BYTES = 0x100
PAGE_BYTES = 4096
RECORD_BYTES = 1088  # an odd number of cache lines: at a power of two, the heads of all records would share a few sets
INLINE_BYTES = 1040
PAYLOAD_AT = 48  # in the line of the head: a short result is in one line
WORKERS_MAX = 64
CLAIMS_MAX = 64
CALLS_MAX = (1 << 16) - 1  # that a result tells of
SLOTS_MAX = (1 << 22) - 1

HEADER = struct.Struct("<QIIQHBBHH4I8Q16sQ16sQ")
CRC_AT = 0x0F8
MUTEX_AT = 0x100
MUTEX_BYTES_MAX = 64
VERSION_WORD_AT = 0x140
BLOCK_A_AT = 0x180
BLOCK_STRIDE = 0x80
CURSORS = struct.Struct("<10Q")
DONE_HEAD_AT = 0x280
COORDINATOR_PID_AT = 0x288
COORDINATOR_START_AT = 0x290
RUN_STATE_AT = 0x298
N_REDONE_AT = 0x2A0
WORKERS_AT = 0x400
WORKER_BYTES = 128

# Word indices inside a worker's entry.
W_PID, W_START, W_CLAIM, W_RUNNING, W_REVOKE, W_TASK_START, W_N_TASKS, W_N_ERRORS, W_BUSY, W_INPUT = range(10)
WORKER = struct.Struct("<10Q")

# Task record: its head, and the offsets of the words that change later.
TASK = struct.Struct("<QIIQQQQ")  # the whole head
TASK_READ = struct.Struct("<IIQQQ")  # function, length, blob, form, cancel, from offset 8
TASK_CANCEL_AT = 0x20
TASK_BLAME_AT = 0x28

# Head of a vector's chunk, as word indices; its span, in the payload of its task; the head of an outcome in its stream.
V_PROGRESS, V_LIMIT, V_PREFIX, V_PREFIX_ITEMS = range(4)
VECTOR = struct.Struct("<4Q")
VECTOR_ITEMS_AT = 0x40
CHUNK_BYTES = 1 << 18
SPAN = struct.Struct("<IIIII")  # chunk, first item, end, bytes of the items, ItemsEncoding
OUTCOME = struct.Struct("<II")  # bytes that follow, OutcomeKind

# Result record: what follows the word.
RESULT = struct.Struct("<QQHHIQQ")
RESULT_HEAD = struct.Struct("<QQHHI")  # without the staged file

SLOT_BITS, ATTEMPT_BITS, SEQUENCE_BITS, STATUS_BITS, LENGTH_BITS = 22, 6, 36, 4, 18
SLOT_MASK = (1 << SLOT_BITS) - 1
ATTEMPT_ONE = 1 << SLOT_BITS
ATTEMPT_MAX = (1 << ATTEMPT_BITS) - 1
SEQUENCE_SHIFT = SLOT_BITS + ATTEMPT_BITS
IDENTITY_MASK = ~SLOT_MASK & (1 << 64) - 1  # sequence and attempt: what an entry and its result word share
STATUS_SHIFT = LENGTH_BITS
STATUS_MASK = ((1 << STATUS_BITS) - 1) << STATUS_SHIFT
LENGTH_MASK = (1 << LENGTH_BITS) - 1
CLAIM_SHIFT = 16
CLAIM_COUNT_MASK = (1 << CLAIM_SHIFT) - 1


class RunState(IntEnum):
    """What the coordinator tells its workers to do when they find nothing to claim."""

    RUN = 0
    STOP = 1


class Status(IntEnum):
    """How far a task's result is; the legal steps are in ``STATUS_STEPS``."""

    EMPTY = 0  # none, or that of another attempt
    OK = 2
    ERROR = 3  # the payload is an exception
    CANCELLED = 4  # never started
    DIED = 5  # written by the coordinator: its worker died, once too often
    IN_DOUBT = 6  # written by the coordinator: its worker died with it staged, and nobody knows what became of that
    STAGED = (
        7  # the payload is there, and the outputs, whole, under names of their own: whoever comes puts them in place
    )


STATUS_STEPS: dict[Status, frozenset[Status]] = {
    Status.EMPTY: frozenset({Status.STAGED, Status.OK, Status.ERROR, Status.CANCELLED, Status.DIED}),
    Status.OK: frozenset({Status.EMPTY}),
    Status.ERROR: frozenset({Status.EMPTY}),
    Status.CANCELLED: frozenset({Status.EMPTY}),
    Status.DIED: frozenset({Status.EMPTY}),
    Status.IN_DOUBT: frozenset({Status.EMPTY}),
    Status.STAGED: frozenset({Status.OK, Status.ERROR, Status.IN_DOUBT, Status.EMPTY}),
}


class Encoding(IntEnum):
    """How a payload is to be read."""

    MSGPACK = 0
    PICKLE = 1
    BLOB = 2  # the payload is elsewhere, see ``blobs``; the blob says how to read it


class Form(IntEnum):
    """What a task's payload is."""

    FILE = 0  # a file task, see ``workers.tasks``
    PLAIN = 1  # msgpack: the positional arguments of a call
    PICKLED = 2  # pickle: arguments and keyword arguments; before them the callable, where ``function`` is 0
    VECTOR = 3  # a SPAN: the items are in a chunk of the arena
    JOB = 4  # a file of a batch job, see ``workers.jobtasks``


class ItemsEncoding(IntEnum):
    """How the items of a vector are to be read, and called with."""

    PLAIN = 0  # a msgpack array of them
    PICKLED = 1  # a msgpack array of a pickle for each
    PLAIN_STARRED = 2  # the same two, each item a sequence of positional arguments
    PICKLED_STARRED = 3
    FILES = 4  # a msgpack array of paths, as bytes, for a file task's function; each is timed


class Prefix(IntEnum):
    """How outcomes stand before the stream: as plain 8-byte words, or packed."""

    NONE = 0  # None: no words at all
    INT = 1
    FLOAT = 2
    PACKED = 3  # msgpack, one behind the other


class OutcomeKind(IntEnum):
    """How an outcome in the stream is to be read."""

    MSGPACK = 0
    PICKLE = 1
    ERROR = 2  # a pickled exception and its traceback
    BLOB = 3  # a value, in a blob of its own
    ERROR_BLOB = 4


class Cursors(NamedTuple):
    """One block, decoded. Counts of entries, ever growing; ``parked`` and ``spinning`` are
    bitmaps of worker indices."""

    ready_head: int
    ready_tail: int
    retry_head: int
    retry_tail: int
    done_tail: int
    parked: int
    op_worker: int
    op_claim: int
    wake_at: int
    spinning: int


class Header(NamedTuple):
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
    slots: int
    workers: int
    claims_max: int
    record_bytes: int
    lists_at: int
    ready_at: int
    retry_at: int
    done_at: int
    tasks_at: int
    results_at: int
    creator_pid: int
    creator_start: int
    boot_id: bytes
    pid_namespace: int
    uuid: bytes
    format_id: int


class Sections(NamedTuple):
    """Byte offsets of the sections of a segment, and its size."""

    lists_at: int
    ready_at: int
    retry_at: int
    done_at: int
    tasks_at: int
    results_at: int
    size_bytes: int


def sections(slots: int, workers: int, claims_max: int) -> Sections:
    """Where the sections of a segment of that many slots, workers and claims lie."""
    sizes = (workers * 2 * claims_max * 8, slots * 8, slots * 8, slots * 8, slots * RECORD_BYTES, slots * RECORD_BYTES)
    offsets: list[int] = []
    end = _page_up(WORKERS_AT + workers * WORKER_BYTES)
    for size in sizes:
        offsets.append(end)
        end = _page_up(end + size)
    return Sections._make((*offsets, end))


def _page_up(offset: int) -> int:
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


def _format_id() -> int:
    formats = (HEADER, CURSORS, WORKER, TASK, RESULT, VECTOR, SPAN, OUTCOME)
    words = [s.format for s in formats]
    words += [COORDINATOR_PID_AT, COORDINATOR_START_AT, RUN_STATE_AT, N_REDONE_AT, TASK_CANCEL_AT, TASK_BLAME_AT]
    words += [W_PID, W_START, W_CLAIM, W_RUNNING, W_REVOKE, W_TASK_START, W_N_TASKS, W_N_ERRORS, W_BUSY, W_INPUT]
    words += [MUTEX_AT, VERSION_WORD_AT, BLOCK_A_AT, BLOCK_STRIDE, DONE_HEAD_AT, WORKERS_AT, WORKER_BYTES, RECORD_BYTES]
    words += [PAYLOAD_AT, SLOT_BITS, ATTEMPT_BITS, SEQUENCE_BITS, STATUS_BITS, LENGTH_BITS, CLAIM_SHIFT]
    words += [V_PROGRESS, V_LIMIT, V_PREFIX, V_PREFIX_ITEMS, VECTOR_ITEMS_AT, CHUNK_BYTES]
    enums = (RunState, Status, Encoding, Form, ItemsEncoding, Prefix, OutcomeKind)
    words += [f"{e.name}={e.value}" for enum in enums for e in enum]
    return zlib.crc32(repr(words).encode())


FORMAT_ID = _format_id()


def entry_of(sequence: int, attempt: int, slot: int) -> int:
    """The entry that stands in a list for this task."""
    return sequence << SEQUENCE_SHIFT | attempt << SLOT_BITS | slot


def sequence_of(entry: int) -> int:
    """The sequence in an entry or a result word."""
    return entry >> SEQUENCE_SHIFT


def attempt_of(entry: int) -> int:
    """The attempt, from 0, in an entry or a result word."""
    return entry >> SLOT_BITS & ATTEMPT_MAX


def slot_of(entry: int) -> int:
    """The slot index in an entry."""
    return entry & SLOT_MASK


def check_number(what: str, value: object, top: int) -> int:
    """``value`` as an ``int``. Raises ``TypeError`` where it is no whole number, ``ValueError`` where it is not in
    [1, ``top``].
    """
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]  (that is what is asked)
    except TypeError:
        raise TypeError(f"{what} must be a whole number, not {value!r}") from None
    if not 1 <= number <= top:
        raise ValueError(f"{what} must be from 1 to {top}, not {value}")
    return number

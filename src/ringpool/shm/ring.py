"""The ring: what the coordinator's end (``dispatch``) and a worker's end (``claims``) share.

    free --publish--> ready [H, T) --claim--> a worker's claim list --complete--> done [DHEAD, DT) --deliver--> free
                                                |            ^
                                 owner died, or taken back   | claimed alone
                                                v            |
                                              retry [RH, RT)-+

Invariants, at every instant, whoever is killed:

1. A slot stands in one list or in none; the lists are what the *active* cursor block, the claim words and DHEAD say.
2. Lists, cursors and claim words change only under the mutex. A section reads the active block, writes entries beyond
   the tails and the other block, then stores ``version_word``: that one aligned store is the commit. One store follows
   it, the claim word named by ``op_worker``. Whoever inherits the mutex does that one again (``redo``), so that killed
   before the commit nothing has happened, and killed after it everything has.
3. A claim list is written into the half that is not in use; the claim word's parity says which half is.
4. A result belongs to an entry only where sequence and attempt in its word are the entry's.
5. What stands in the done list has its result.

A word that others read without the mutex is stored through ``memoryview.cast("Q")``, one aligned 8-byte store; never
by ``struct.pack_into``, which writes zeros first. Reads without the mutex are hints: they are checked under it before
they count.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ringpool.errors import SegmentFormatError
from ringpool.shm import layout
from ringpool.shm.lock import RobustLock
from ringpool.shm.segment import Segment

VERSION_WORD = layout.VERSION_WORD_AT >> 3
DONE_HEAD = layout.DONE_HEAD_AT >> 3
RUN_STATE = layout.RUN_STATE_AT >> 3
_N_REDONE = layout.N_REDONE_AT >> 3
_WORD_MASK = (1 << 64) - 1
_read_cursors = layout.CURSORS.unpack_from
_write_cursors = layout.CURSORS.pack_into


class Ring:
    """The mapped lists and cursors of one segment, and their lock.

    Attributes: ``segment``; ``words`` (the mapping as 8-byte words); ``slots``, ``workers``, ``claims_max`` (counts);
    ``lists``, ``ready``, ``retry``, ``done`` (word indices of the sections); ``tasks``, ``results`` (byte offsets);
    ``lock``.
    """

    def __init__(self, segment: Segment) -> None:
        header = segment.header
        self.segment = segment
        self.mapping = segment.mapping
        self.words: memoryview[int] = memoryview(segment.mapping).cast("Q")
        self.slots, self.workers, self.claims_max = header.slots, header.workers, header.claims_max
        self.lists, self.ready = header.lists_at >> 3, header.ready_at >> 3
        self.retry, self.done = header.retry_at >> 3, header.done_at >> 3
        self.tasks, self.results = header.tasks_at, header.results_at
        self.lock = RobustLock(segment.mapping, layout.MUTEX_AT, self.redo)

    # ---- the cursor block; all of it under the mutex, but for ``peek``

    def block(self) -> tuple[int, ...]:
        """The active block, in the order of ``layout.Cursors``, for those who cannot wait for its names."""
        return _read_cursors(self.mapping, layout.BLOCK_A_AT + (self.words[VERSION_WORD] & 1) * layout.BLOCK_STRIDE)

    def cursors(self) -> layout.Cursors:
        """The active block."""
        return layout.Cursors._make(self.block())

    def commit(self, cursors: Sequence[int]) -> None:
        """Make ``cursors`` the active block, in one store; then do the one store that follows."""
        version = self.words[VERSION_WORD] + 1
        _write_cursors(self.mapping, layout.BLOCK_A_AT + (version & 1) * layout.BLOCK_STRIDE, *cursors)
        self.words[VERSION_WORD] = version  # the commit
        op_worker = cursors[6]
        if op_worker < self.workers:
            self.words[self.worker_word(op_worker, layout.W_CLAIM)] = cursors[7]

    def redo(self) -> None:
        """Do again, idempotently, the one store that follows a commit, for an owner that did not get to it."""
        cursors = self.cursors()
        if cursors.op_worker < self.workers:
            self.words[self.worker_word(cursors.op_worker, layout.W_CLAIM)] = cursors.op_claim
        self.words[_N_REDONE] = self.words[_N_REDONE] + 1 & _WORD_MASK  # called before anything has been checked

    def peek(self) -> layout.Cursors:
        """A consistent block without the mutex: read again where it was committed meanwhile."""
        while True:
            version = self.words[VERSION_WORD]
            cursors = self.cursors()
            if self.words[VERSION_WORD] == version:
                return cursors

    @property
    def n_redone(self) -> int:
        """How often a section was finished for an owner that died or was interrupted."""
        return self.words[_N_REDONE]

    # ---- lists

    def entries(self, base: int, position: int, n: int) -> list[int]:
        """``n`` entries of the list at word ``base``, from ``position`` on."""
        start = position % self.slots
        first = min(n, self.slots - start)
        found = self.words[base + start : base + start + first].tolist()
        return found + self.words[base : base + n - first].tolist() if first < n else found

    def put(self, base: int, position: int, entries: Sequence[int]) -> None:
        """Write ``entries`` into the list at word ``base``, from ``position`` on: beyond its tail, invisible until a
        commit.
        """
        if not entries:
            return
        block = array("Q", entries)
        n, start = len(block), position % self.slots
        first = min(n, self.slots - start)
        self.words[base + start : base + start + first] = memoryview(block)[:first]
        if first < n:
            self.words[base : base + n - first] = memoryview(block)[first:]

    def worker_word(self, worker: int, word: int) -> int:
        """The index, in ``words``, of a word of a worker's entry."""
        return (layout.WORKERS_AT + worker * layout.WORKER_BYTES >> 3) + word

    def claim_list(self, worker: int, claim: int) -> int:
        """The word index of the half of a worker's claim list that ``claim`` says is in use."""
        return self.lists + (2 * worker + (claim >> layout.CLAIM_SHIFT & 1)) * self.claims_max

    def claimed(self, worker: int) -> list[int]:
        """The entries that ``worker`` holds. Under the mutex, or after its proven death and a ``redo``."""
        claim = self.words[self.worker_word(worker, layout.W_CLAIM)]
        at = self.claim_list(worker, claim)
        return self.words[at : at + min(claim & layout.CLAIM_COUNT_MASK, self.claims_max)].tolist()

    # ---- result words

    def result_word(self, entry: int) -> int:
        """The result word of ``entry``, or 0 where the slot holds none, or that of another task or attempt."""
        word = self.words[self.results + layout.slot_of(entry) * layout.RECORD_BYTES >> 3]
        return word if (word ^ entry) & layout.IDENTITY_MASK == 0 else 0

    def status(self, entry: int) -> layout.Status:
        """How far the result of ``entry`` is. Raises ``SegmentFormatError`` on a status that there is not."""
        code = (self.result_word(entry) & layout.STATUS_MASK) >> layout.STATUS_SHIFT
        try:
            return layout.Status(code)
        except ValueError:
            raise SegmentFormatError(self.segment.name, f"a result has the unknown status {code}") from None

    def close(self) -> None:
        """Drop the references into the mapping and unmap it."""
        self.lock.detach()
        self.words.release()
        self.segment.close()

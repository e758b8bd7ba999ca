"""Mistakes that somebody might make in what runs vectors, planted one at a time, and the hunt that has to find each.

See ``mutants``, whose hunters these are as well. One kind of mistake no hunt can be sure to find: see ``UNCERTAIN``.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator

from tests.coordinator import test_fileparts
from tests.crash import mutants, test_vectors_crash
from tests.crash.mutants import Change, Mutant
from tests.crash.vector_duel import N_RUN, N_SPLIT, Duel
from tests.shm import test_vectors
from tests.shm.test_vectors import Stand

from ringpool.shm import owner, segment
from ringpool.shm.layout import CHUNK_BYTES

VECTORS, PIECES, BALANCE, PUMP, FILES = (
    "vectors.py",
    *(f"../coordinator/{file}" for file in ("pieces.py", "balance.py", "pump.py", "fileinbox.py")),
)
STORE = "            words[progress] = packed | i\n"
CALL = "                value = call(items[i])\n"
PREFIX_ITEMS = "                words[prefix_items] = i - first\n"
SPLIT = "        words[head + layout.V_LIMIT] = 0\n"
FENCE = (
    "        if not barrier.fence_all():\n"
    "            words[head + layout.V_LIMIT] = span.end\n"
    "            return span.end\n"
)
FOLLOWING = (
    "        following = (words[head + layout.V_PROGRESS] & _ITEM_MASK) + 1"
    "  # read after the store above: see the module\n"
)
PACKED = "                        mapping[packed_end:end_of_it] = body\n"

MUTANTS = [
    Mutant(
        "progress is stored after the call",
        "worker",
        (
            Change(VECTORS, STORE, ""),
            Change(VECTORS, CALL, f"{CALL}                words[progress] = packed | i\n"),
        ),
    ),
    Mutant(
        "progress passes an item before its outcome stands",
        "worker",
        (Change(VECTORS, CALL, f"{CALL}                words[progress] = packed | i + 1\n"),),
    ),
    Mutant(
        "progress does not pass the last item",
        "worker",
        (Change(VECTORS, "        words[progress] = packed | stop\n", ""),),
    ),
    Mutant(
        "the end of the plain words is stored after what follows them",
        "worker",
        (
            Change(VECTORS, PREFIX_ITEMS, "                begins = i - first\n"),
            Change(
                VECTORS,
                "            tail += len(body)\n",
                "            tail += len(body)\n"
                "            words[progress] = i + 1\n"
                "            words[prefix_items] = begins\n",
            ),
        ),
    ),
    Mutant(
        "the type of the plain words is stored with the last of them",
        "worker",
        (
            Change(
                VECTORS, "prefix, words[head + layout.V_PREFIX] = _prefix_of(kind)", "prefix, code = _prefix_of(kind)"
            ),
            Change(VECTORS, "        tail = 0  # of the stream", "        code = 0\n        tail = 0  # of the stream"),
            Change(
                VECTORS,
                PREFIX_ITEMS,
                f"                words[head + layout.V_PREFIX] = code\n{PREFIX_ITEMS}",
            ),
        ),
    ),
    Mutant(
        "what is left after a death begins at the blamed item",
        "worker",
        (
            Change(
                PIECES,
                "            again.append(self._again(ticket, part.of(first + 1, part.end)))\n",
                "            again.append(self._again(ticket, part.of(first, part.end)))\n",
            ),
        ),
    ),
    Mutant(
        "what is left after a death is forgotten where its item is tried again",
        "again",
        (
            Change(
                PIECES,
                "            again.append(self._again(ticket, part.of(first, first + 1, deaths)))\n",
                "            return [self._again(ticket, part.of(first, first + 1, deaths))]\n",
            ),
        ),
    ),
    Mutant(
        "a death in an item that is tried again is not counted",
        "again",
        (Change(PIECES, "part.of(first, first + 1, deaths)", "part.of(first, first + 1, 0)"),),
    ),
    Mutant(
        "the blob of an item that was blamed is left",
        "worker",
        (
            Change(
                PIECES,
                "        blobs.unlink(blob)\n        if record.status == _DIED:\n",
                "        if record.status == _DIED:\n",
            ),
        ),
    ),
    Mutant(
        "outcomes are looked at after their chunk was given back",
        "undisturbed",
        (
            Change(
                VECTORS,
                "return values, self.mapping[at : self._end_of_stream(at, n - max(taken.n, plain), end)]",
                "return values, memoryview(self.mapping)[at : self._end_of_stream(at, n - max(taken.n, plain), end)]",
            ),
        ),
    ),
    Mutant(
        "a chunk is given back when a part of its vector was taken",
        "in part",
        (Change(BALANCE, "    part.end = end\n", "    part.end = end\n    arena.give(part.chunk)\n"),),
    ),
    Mutant(
        "a chunk keeps the head of its last vector",
        "undisturbed",
        (
            Change(
                VECTORS,
                "        _write_head(self.mapping, at, span.first, span.end, Prefix.NONE, ALL)\n",
                "        self.words[at >> 3] = span.first\n        self.words[(at >> 3) + 1] = span.end\n",
            ),
        ),
    ),
    Mutant(
        "the limit is read before progress is stored",
        "meeting",
        (
            Change(VECTORS, STORE, f"            seen = words[limit]\n{STORE}"),
            Change(VECTORS, "            if words[limit] <= i and", "            if seen <= i and"),
        ),
    ),
    Mutant(
        "a worker does not wait for the decision",
        "meeting",
        (Change(VECTORS, "        return i < bound\n", "        return True\n"),),
    ),
    Mutant(
        "a worker that meets an undecided limit takes it for none",
        "meeting",
        (Change(VECTORS, "            if words[limit] <= i and", "            if 0 < words[limit] <= i and"),),
    ),
    Mutant(
        "the publisher looks where the worker is before it says that it decides",
        "meeting",
        (Change(VECTORS, FOLLOWING, ""), Change(VECTORS, SPLIT, FOLLOWING + SPLIT)),
    ),
    Mutant(
        "the item that is being run is taken too",
        "meeting",
        (Change(VECTORS, "& _ITEM_MASK) + 1  # read", "& _ITEM_MASK)  # read"),),
    ),
    Mutant(
        "the publisher forgets what it has taken",
        "in part",
        (Change(BALANCE, "    part.end = end\n", ""),),
    ),
    Mutant(
        "the head of one more outcome has no room",
        "room",
        (
            Change(
                VECTORS,
                "            room = chunk_end - tail - 2 * _OUTCOME_BYTES",
                "            room = chunk_end - tail - _OUTCOME_BYTES",
            ),
        ),
    ),
    Mutant(
        "progress tells of a packed outcome before that stands",
        "worker",
        (
            Change(
                VECTORS,
                PACKED,
                f"                        words[progress] = end_of_it - packed_at << 32 | i + 1\n{PACKED}",
            ),
        ),
    ),
    Mutant(
        "progress tells of packed bytes when their item is long done",
        "worker",
        (
            Change(VECTORS, "                        packed_end = end_of_it\n", ""),
            Change(
                VECTORS,
                "                        packed = packed_end - packed_at << 32\n",
                "                        packed = packed_end - packed_at << 32\n"
                "                        packed_end = end_of_it\n",
            ),
        ),
    ),
    Mutant(
        "outcomes that were taken early are taken again",
        "undisturbed",
        (Change(PIECES, "part.taken, part.taken_ns = done, spent_ns", "part.taken_ns = spent_ns"),),
    ),
    Mutant(
        "outcomes are taken early with the one whose blob nobody has fetched",
        "undisturbed",
        (Change(PIECES, "[-1][0] >= OutcomeKind.BLOB", "[-1][0] > OutcomeKind.ERROR_BLOB"),),
    ),
    Mutant(
        "outcomes are written over the times of files",
        "times",
        (
            Change(
                VECTORS,
                "        chunk_end = (span.chunk + 1) * CHUNK_BYTES - _times_bytes(span)\n",
                "        chunk_end = (span.chunk + 1) * CHUNK_BYTES\n",
            ),
        ),
    ),
    Mutant(
        "a part is sealed, and nobody is told",
        "filled",
        (Change(FILES, "        self.sealing = True\n", ""),),
    ),
    Mutant(
        "it is counted what is in a part before it is said that it is sealed",
        "filled",
        (
            Change(
                FILES,
                "        self.sealing = True\n        self.end = len(self.loose)\n",
                "        n = len(self.loose)\n        self.sealing = True\n        self.end = n\n",
            ),
        ),
    ),
    Mutant(
        "who comes while a part is sealed does not wait for its end",
        "filled",
        (Change(FILES, "        while self.end == OPEN:\n", "        while False:\n"),),
    ),
    Mutant(
        "a fork that comes back encodes its result",
        "forks",
        (Change(VECTORS, "            words[progress] = packed | i  # in a fork", "            # in a fork"),),
    ),
]

# The two processors have to reorder a store and a load, in the few nanoseconds that matter: no test can force that.
UNCERTAIN = [
    Mutant("a split has no barrier", "", (Change(VECTORS, FENCE, ""),)),
]


# ---- in the process that hunts ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stand() -> Iterator[Stand]:
    me = owner.this_process()
    stem = f"rp.{owner.pid_namespace()}.{me.pid}.{me.start}.{secrets.token_hex(4)}"
    stand = Stand(stem)
    try:
        yield stand
    finally:
        stand.close()
        segment.unlink(stem)


def _worker() -> None:
    at = 1
    while test_vectors_crash.kill(at, 0, lengths=(8, 2, 2)):
        at += 3


def _in_part() -> None:
    for at in range(1, 1200, 40):
        test_vectors_crash.kill(at, 0, 3, (8, 2))


def _meeting() -> None:
    with Duel() as duel:
        for at in range(0, N_SPLIT * N_RUN, 37):
            for worker_first in (False, True):
                duel.meet(at % N_RUN + 1, at // N_RUN + 1, worker_first=worker_first)


def _room() -> None:
    with _stand() as stand:
        test_vectors.test_results_are_written_up_to_the_last_byte_of_a_chunk_and_one_more_is_sent_elsewhere(stand)


def _times() -> None:
    with _stand() as stand:
        test_vectors.test_outcomes_that_fill_a_chunk_leave_the_times_of_files(stand, CHUNK_BYTES // 64, 1 << 64)


def _filled() -> None:
    for meet in (test_fileparts.meet_in_add, test_fileparts.meet_in_seal):
        for at in range(1, meet(1 << 30) + 1):
            meet(at)


def _forks() -> None:
    with _stand() as stand:
        test_vectors.test_a_fork_that_comes_back_from_a_call_writes_nothing(stand, [1, "text"], "more")


# By name. A stride is less than the bytecodes between which each mistake that it is after shows.
HUNTS: dict[str, Callable[[], object]] = {
    "worker": _worker,
    "again": lambda: [test_vectors_crash.die_in(deadly, 2) for deadly in (0, 6)],
    "undisturbed": lambda: [
        test_vectors_crash.test_outcomes_of_all_kinds_arrive_as_they_are(files) for files in (False, True)
    ],
    "in part": _in_part,
    "meeting": _meeting,
    "room": _room,
    "times": _times,
    "filled": _filled,
    "forks": _forks,
}


if __name__ == "__main__":
    sys.exit(mutants.main(sys.argv[1], HUNTS[sys.argv[2]]))

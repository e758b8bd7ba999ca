"""What a ledger holds, and what is asked of it: its records, and the questions that change nothing.

    table     key                  holds
    jobs      id                   identity, spec, when it was made
    runs      id                   job, segment, pid, start; at its end when, outcome, counts; ``drained``: by a resume
    files     job, input, output   state, kind of error (NULL: done), and in ``facts`` all of a row, see below
    totals    job, state, kind     how many files, retried ones, bytes and nanoseconds, kept with each batch

    facts     msgpack of what follows input and output in a ``Row``; ``Found`` is how it begins
    failures  index of files by job, kind, state, key, where kind is not NULL: what is done takes no room in it

Each question sees the ledger as it is between two batches. What is streamed (``rows``, ``failed``) comes from a
connection of its own, as the ledger was when the first row was drawn, however long that takes; meanwhile a writer goes
on, though its log grows until the stream is closed.

Why facts are packed: 21 columns take twice the processor time of these 6, for Python has to bind each. Why there are
totals: to read a million rows takes seconds, and an index that covers the question, like triggers that would keep the
totals, nearly doubles the time that a row takes to be written.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from ringpool.coordinator.ledgerfile import ALONE, DAMAGES, connect, explained, has_log
from ringpool.errors import LedgerError

ROWS_AT_ONCE = 64


class State(IntEnum):
    """What became of a file. A ``DEAD`` one is set aside (dead letter): its workers died of it again and again."""

    DONE = 1
    FAILED = 2
    DEAD = 3


class Made(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One output: its path, its size in bytes, the digest of its content (empty: not asked for), and its mtime in ns
    (0: not recorded).
    """

    path: bytes
    size: int
    digest: bytes = b""
    mtime_ns: int = 0


class Row(msgspec.Struct, gc=False):
    """One file of a job, as it is read. A batch writes tuples of the same, ``RowTuple``.

    (job, ``input``, ``output``) is the key; paths are as from ``os.fsencode``. ``output``: the first, empty for none.
    ``size``, ``mtime_ns``, ``inode``: the input's fingerprint as the task read it; -1, -1, -1 for none; as inode -2,
    where the task has moved it away. ``checksum``: digest of its content, empty if not asked for. ``parameters``:
    digest of the function and its parameters. ``made``: msgpack of list[``Made``], may be empty. ``value``: what the
    function returned, None for nothing, encoded as ``encoding`` says. ``kind``, ``message``, ``traceback``: of the
    error, empty where there is none; what UTF-8 cannot hold is escaped by a backslash.
    """

    input: bytes
    output: bytes
    state: int
    size: int
    mtime_ns: int
    inode: int
    checksum: bytes
    parameters: bytes
    made: bytes
    value: bytes | None
    encoding: int
    attempts: int
    deaths: int
    kind: str
    message: str
    traceback: str
    worker: int
    started_s: float
    duration_s: float
    peak_rss: int


Facts: TypeAlias = tuple[
    int, int, int, int, bytes, bytes, bytes, bytes | None, int, int, int, str, str, str, int, float, float, int
]
RowTuple: TypeAlias = tuple[
    bytes,  # input
    bytes,  # output
    int,  # state
    int,  # size
    int,  # mtime_ns
    int,  # inode
    bytes,  # checksum
    bytes,  # parameters
    bytes,  # made
    bytes | None,  # value
    int,  # encoding
    int,  # attempts
    int,  # deaths
    str,  # kind
    str,  # message
    str,  # traceback
    int,  # worker
    float,  # started_s
    float,  # duration_s
    int,  # peak_rss
]


class Found(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a resume has to know of a file. Its fields are the first of ``facts``."""

    state: int
    size: int
    mtime_ns: int
    inode: int
    checksum: bytes
    parameters: bytes
    made: bytes
    value: bytes | None
    encoding: int
    attempts: int
    deaths: int


class JobInfo(msgspec.Struct, frozen=True):
    """A job. ``started_s``: when its last run started, None where it never did."""

    id: int
    identity: str
    spec: bytes
    created_s: float
    started_s: float | None


class RunInfo(msgspec.Struct, frozen=True):
    """A run of a job. ``ended_s`` is None, and ``outcome`` and ``counts`` are empty, where it has not ended; then
    ``is_drained`` says whether what it left was collected.
    """

    id: int
    segment: str
    pid: int
    started_s: float
    ended_s: float | None
    outcome: str
    counts: bytes
    is_drained: bool = False


class Counts(msgspec.Struct, frozen=True):
    """How many files of a job are in which state; of all together, how many were tried more than once, and the sums.

    ``input_bytes``: of inputs that have a fingerprint. ``duration_s``: the time that workers spent on them.
    """

    done: int = 0
    failed: int = 0
    dead: int = 0
    n_retried: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    duration_s: float = 0.0

    @property
    def n_files(self) -> int:
        """How many there are in all."""
        return self.done + self.failed + self.dead


class Cause(msgspec.Struct, frozen=True):
    """Why ``n_files`` files failed, or were set aside; ``input`` and ``message``: of the first, by key."""

    kind: str
    state: int
    n_files: int
    input: bytes
    message: str


class Tally:
    """Sums over rows, as one row of ``totals`` has them. Whole numbers: what is taken out leaves no remainder."""

    __slots__ = ("duration_ns", "input_bytes", "n_files", "n_retried", "output_bytes")

    def __init__(self) -> None:
        self.n_files = 0
        self.n_retried = 0
        self.input_bytes = 0
        self.output_bytes = 0
        self.duration_ns = 0

    @property
    def sums(self) -> tuple[int, int, int, int, int]:
        """In the order of the columns."""
        return self.n_files, self.n_retried, self.input_bytes, self.output_bytes, self.duration_ns


Totals: TypeAlias = dict[tuple[int, str], Tally]  # by state and kind

encode_facts = msgspec.msgpack.Encoder().encode
decode_facts = msgspec.msgpack.Decoder(Facts).decode
decode_made = msgspec.msgpack.Decoder(list[Made]).decode
_decode_found = msgspec.msgpack.Decoder(Found).decode

_FIND = "SELECT facts FROM files WHERE job = ? AND input = ? AND output = ?"
_ROWS = "SELECT input, output, facts FROM files WHERE job = ? ORDER BY input, output"
_FAILED = "SELECT input, output, facts FROM files INDEXED BY failures WHERE job = ? AND kind IS NOT NULL"
_SUMS = "n_files, n_retried, input_bytes, output_bytes, duration_ns"
_JOBS = """
    SELECT jobs.id, identity, spec, created_s, started_s FROM jobs
    LEFT JOIN runs ON runs.id = (SELECT max(id) FROM runs WHERE job = jobs.id)
    ORDER BY coalesce(runs.id, 0) DESC, jobs.id DESC
"""
_LAST_RUN = """
    SELECT id, segment, pid, started_s, ended_s, outcome, counts, drained
    FROM runs WHERE job = ? ORDER BY id DESC LIMIT 1
"""


class LedgerQueries:
    """What a ledger can be asked. Every method raises ``LedgerError`` where it cannot be read, or is damaged."""

    def __init__(self, path: Path, connection: sqlite3.Connection, reading_uri: str) -> None:
        self.path = path
        self._db = connection
        self._reading_uri = reading_uri
        self._is_alone = reading_uri.endswith(ALONE)

    # ---- jobs and runs

    def jobs(self) -> list[JobInfo]:
        """All jobs; the one that ran last comes first."""
        return [JobInfo(id_, text_of(identity), *rest) for id_, identity, *rest in self._ask(_JOBS)]

    def last_run(self, job: int) -> RunInfo | None:
        """The run that started last; None where there was none."""
        return next((RunInfo(*found) for found in self._ask(_LAST_RUN, job)), None)

    def open_segments(self) -> list[str]:
        """Segments of runs that have not ended, oldest first: whoever holds the job's lock knows that these died."""
        asked = "SELECT segment, min(id) FROM runs WHERE ended_s IS NULL AND NOT drained GROUP BY segment ORDER BY 2"
        return [segment for segment, _ in self._ask(asked)]

    # ---- files

    def is_empty(self, job: int) -> bool:
        """Whether the job has no row at all."""
        return not self._ask("SELECT 1 FROM files WHERE job = ? LIMIT 1", job)

    def has_consumed(self, job: int, input: bytes) -> bool:  # noqa: A002
        """Whether a task of the job has moved that input away."""
        rows = self._ask("SELECT input, facts FROM files WHERE job = ? AND input = ?", job, input)
        try:
            return any(_consumed(rows))
        except DAMAGES as error:
            raise explained(self.path, error) from error

    def consumed(self, job: int) -> Generator[bytes]:
        """The inputs that tasks of the job have moved away, in the order of their names."""
        with self._snapshot() as db:
            yield from _consumed(db.execute("SELECT input, facts FROM files WHERE job = ? ORDER BY input", (job,)))

    def find(self, job: int, input: bytes, output: bytes) -> Found | None:  # noqa: A002
        """What is known of a file; None: nothing."""
        try:
            row = self._db.execute(_FIND, (job, input, output)).fetchone()
            if row is None:
                return None
            found = _decode_found(row[0])
            if found.made:
                decode_made(found.made)  # so that nobody who reads it comes upon a damage
            return found
        except DAMAGES as error:
            raise explained(self.path, error) from error

    def rows(self, job: int) -> Iterator[Row]:
        """All files of a job in the order of their keys, bytes by bytes. Close it, or draw it to its end."""
        return self._stream(_ROWS, job)

    def failed(self, job: int, kind: str | None = None, state: int | None = None) -> Iterator[Row]:
        """Files that failed or are dead, by kind, state, key; only those of ``kind`` and ``state``, where given."""
        asked = _FAILED
        parameters: list[int | str] = [job]
        for column, value in (("kind", None if kind is None else as_text(kind)), ("state", state)):
            if value is not None:
                asked += f" AND {column} = ?"
                parameters.append(value)
        return self._stream(asked + " ORDER BY kind, state, input, output", *parameters)

    # ---- reports

    def counts(self, job: int) -> Counts:
        """How many files are done, failed, dead, and the sums over them; from running totals, at once."""
        files = {int(state): 0 for state in State}
        n_retried = input_bytes = output_bytes = duration_ns = 0
        for state, n_files, *more in self._ask(f"SELECT state, {_SUMS} FROM totals WHERE job = ?", job):
            files[state] = files.get(state, 0) + n_files
            n_retried += more[0]
            input_bytes += more[1]
            output_bytes += more[2]
            duration_ns += more[3]
        by_state = files[State.DONE], files[State.FAILED], files[State.DEAD]
        return Counts(*by_state, n_retried, input_bytes, output_bytes, duration_ns / 1e9)

    def failures_by_cause(self, job: int) -> list[Cause]:
        """Failures by kind, the most frequent first; what is set aside is apart from what failed by the same kind."""
        asked = "SELECT kind, state, n_files FROM totals WHERE job = ? AND state <> ? ORDER BY 3 DESC, 1, 2"
        example = f"{_FAILED} AND kind = ? AND state = ? ORDER BY input, output LIMIT 1"
        causes: list[Cause] = []
        with self._snapshot() as db:
            for kind, state, n_files in db.execute(asked, (job, State.DONE)):
                for found in db.execute(example, (job, kind, state)):
                    first = as_row(*found)
                    causes.append(Cause(kind, state, n_files, first.input, first.message))
        return causes

    def check(self) -> list[str]:
        """What is wrong with the file, in words; nothing: it is sound, and the totals are those of its rows.

        Reads all of it: seconds for a million rows.
        """
        try:
            with self._snapshot() as db:
                problems = [str(found) for (found,) in db.execute("PRAGMA quick_check")]
                if problems != ["ok"]:
                    return problems
                return [
                    f"the totals of job {job} are not those of its files"
                    for (job,) in db.execute("SELECT id FROM jobs").fetchall()
                    if not _has_right_totals(db, job)
                ]
        except LedgerError as error:
            return [error.reason]

    # ---- reading

    def _ask(self, asked: str, *parameters: object) -> list[Any]:
        try:
            return self._db.execute(asked, parameters).fetchall()
        except sqlite3.Error as error:
            raise explained(self.path, error) from error

    def _stream(self, asked: str, *parameters: object) -> Generator[Row]:
        with self._snapshot() as db:
            before = self._standing()
            rows = db.execute(asked, parameters)
            while some := rows.fetchmany(ROWS_AT_ONCE):
                self._require_unwritten(before)
                for found in some:
                    yield as_row(*found)

    @contextmanager
    def _snapshot(self) -> Generator[sqlite3.Connection]:
        """A connection to which the ledger stays as it is at its first question. Raises ``LedgerError`` where it cannot
        stay so: where we read the file alone, and a run has begun.
        """
        before = self._standing()
        try:
            with closing(connect(self._reading_uri)) as db:
                db.execute("BEGIN")
                yield db
        except DAMAGES as error:
            self._require_unwritten(before)
            raise explained(self.path, error) from error
        self._require_unwritten(before)

    def _standing(self) -> tuple[int, ...]:
        """What tells whether anybody has written: nothing where SQLite sees to that. Of a file that it reads alone it
        trusts that nobody does; who writes makes a log first.
        """
        if not self._is_alone:
            return ()
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return (-1,)
        return found.st_ino, found.st_size, found.st_mtime_ns, has_log(self.path)

    def _require_unwritten(self, standing: tuple[int, ...]) -> None:
        if standing != self._standing():
            raise LedgerError(str(self.path), "a run has begun to write to it while it was read; ask again")


# ---- rows and totals -------------------------------------------------------------------------------------------------


def _consumed(rows: Iterable[Any]) -> Iterator[bytes]:
    """The inputs of those ``rows`` (input, facts) that say that their task has moved it away."""
    from ringpool.workers.jobtasks import CONSUMED  # here: who only looks in does without

    return (input_ for input_, facts in rows if _decode_found(facts).inode == CONSUMED)


def as_row(input: bytes, output: bytes, facts: bytes) -> Row:  # noqa: A002
    """The row of what stands in ``files``."""
    row = Row(input, output, *decode_facts(facts))
    if row.made:
        decode_made(row.made)  # as in ``find``
    return row


def as_text(text: str) -> str:
    """``text``, which may hold undecodable bytes of a path as surrogates: these escaped, since UTF-8 has none."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_key(text: str) -> str | bytes:
    """``text`` in a form that leads back to it, see ``text_of``: itself, or bytes where it is none that UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def text_of(key: str | bytes) -> str:
    """The text of ``as_key``."""
    return key if isinstance(key, str) else key.decode("utf-8", "surrogatepass")


def take_out(totals: Totals, facts: bytes) -> None:
    """Take out of ``totals`` what a row with ``facts`` had put in."""
    state, size, _, _, _, _, made, _, _, attempts, _, kind, _, _, _, _, duration_s, _ = decode_facts(facts)
    tally = totals.setdefault((state, kind), Tally())
    tally.n_files -= 1
    tally.n_retried -= attempts > 1
    tally.input_bytes -= max(size, 0)
    tally.output_bytes -= sum(one.size for one in decode_made(made)) if made else 0
    tally.duration_ns -= round(duration_s * 1e9)


def _has_right_totals(db: sqlite3.Connection, job: int) -> bool:
    """Taken out of the totals, the rows leave nothing."""
    totals: Totals = {}
    for state, kind, *sums in db.execute(f"SELECT state, kind, {_SUMS} FROM totals WHERE job = ?", (job,)):
        tally = totals[state, kind] = Tally()
        tally.n_files, tally.n_retried, tally.input_bytes, tally.output_bytes, tally.duration_ns = sums
    for (facts,) in db.execute("SELECT facts FROM files WHERE job = ?", (job,)):
        take_out(totals, facts)
    return not any(any(tally.sums) for tally in totals.values())

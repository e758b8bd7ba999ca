"""The ledger of batch jobs: which files are done, and what failed. Who writes it holds a ``joblock``.

    <directory>/.ringpool/ledger.db          an SQLite database in WAL mode; its tables are in ``ledgerqueries``
                         ledger.db-wal, -shm  what was committed last, and its index for readers; gone after ``close``

    what is at ledger.db                       open
    nothing, or a database without tables      made, where ``create``; else JobMissingError
    a directory, no SQLite database            LedgerError
    one of another program, or newer version   LedgerError, and it is left as it is
    a file that is shorter than it says        LedgerError
    a ledger; with -wal, as a kill leaves it   opened; SQLite recovers what was committed

What holds

- A batch (``write``, ``forget``) is one transaction: all of it is there or none, after a kill at any moment, and in the
  order of the calls. With ``synchronous`` it is on disk when the call returns: SQLite syncs the log at each commit.
- Readers of other processes disturb nobody and wait for nobody, except a moment while a first one recovers the log.
- Totals are changed in the transaction that changes their rows, so they are right whenever one looks.
- A Ctrl-C in a call leaves the batch written or not, as its caller cannot tell; to write it again is harmless.

A batch is first inserted, which fails where a key is there already; only then it is done row by row, with each old row
taken out of the totals. New files, nearly all of a run, are so spared the look for an old row.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from ringpool.coordinator import ledgerrows
from ringpool.coordinator.inputs import OWN_DIRECTORY
from ringpool.coordinator.ledgerfile import ALONE, DAMAGES, connect, explained, has_log
from ringpool.coordinator.ledgerqueries import (
    Cause as Cause,
    Counts as Counts,
    Found as Found,
    JobInfo as JobInfo,
    LedgerQueries,
    Made as Made,
    Row as Row,
    RowTuple as RowTuple,
    RunInfo as RunInfo,
    State as State,
    Totals,
    as_key,
    as_text,
)
from ringpool.errors import JobMissingError, LedgerError
from ringpool.workers.files.durability import make_directories

LEDGER_NAME = "ledger.db"
APPLICATION_ID = 0x52504C31  # "RPL1"
VERSION = 1

PAGE_BYTES = 8192  # rows up to 2 KB lie in one piece; 4,096 would split those with long paths
CHECKPOINT_PAGES = 2000
CACHE_KIB = 16 * 1024
WAL_KEPT_BYTES = 64 << 20  # what a log that a slow reader made long is cut to

_SCHEMA = f"""
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, spec BLOB NOT NULL, created_s REAL NOT NULL
    );
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY, job INTEGER NOT NULL, segment TEXT NOT NULL, pid INTEGER NOT NULL,
        started_s REAL NOT NULL, ended_s REAL, outcome TEXT NOT NULL DEFAULT '', counts BLOB NOT NULL DEFAULT x'',
        drained INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE files (
        job INTEGER NOT NULL, input BLOB NOT NULL, output BLOB NOT NULL, state INTEGER NOT NULL, kind TEXT,
        facts BLOB NOT NULL, PRIMARY KEY (job, input, output)
    ) WITHOUT ROWID;
    CREATE INDEX failures ON files (job, kind, state) WHERE kind IS NOT NULL;
    CREATE TABLE totals (
        job INTEGER NOT NULL, state INTEGER NOT NULL, kind TEXT NOT NULL, n_files INTEGER NOT NULL,
        n_retried INTEGER NOT NULL, input_bytes INTEGER NOT NULL, output_bytes INTEGER NOT NULL,
        duration_ns INTEGER NOT NULL, PRIMARY KEY (job, state, kind)
    ) WITHOUT ROWID;
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {VERSION};
"""


class Ledger(LedgerQueries):
    """The ledger of the jobs whose outputs are below a directory. Attribute: ``path`` (``Path``), its file.

    Used by one thread at a time, and by the process that opened it: a fork must open its own. What ``LedgerQueries``
    asks, it answers as well. Who writes holds the ``JobLock``.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, reading_uri: str, *, read_only: bool) -> None:
        super().__init__(path, connection, reading_uri)
        self._read_only = read_only
        self._pid = os.getpid()
        self._is_indexed: bool | None = None
        self._place = path.absolute()
        self._file = _file_at(self._place)

    @classmethod
    def open(cls, directory: Path, *, create: bool = True, read_only: bool = False, synchronous: bool = True) -> Ledger:
        """Open the ledger in ``directory``, or make one; with ``read_only`` none is made.

        ``synchronous``: whether a batch is on disk when ``write`` returns; otherwise a power cut, and nothing else, may
        take the last ones.

        Raises ``JobMissingError`` where there is none and none is to be made; ``LedgerError`` where what is there
        cannot be used; ``OSError`` where its directory cannot be made or read.
        """
        path = directory / OWN_DIRECTORY / LEDGER_NAME
        may_create = create and not read_only
        if may_create:
            make_directories(os.fsencode(path.parent), durable=True)
        _refuse_what_is_no_file(path, directory, may_be_missing=may_create, read_only=read_only)
        if read_only:
            return _open_for_reading(path, directory)
        _remove_what_a_reader_left(path)
        connection = _connected(path, _uri(path, "rwc" if create else "rw"))
        try:
            if not _is_ledger(connection, path):
                if not create:
                    raise JobMissingError(str(directory), "its ledger was never finished; run the job again")
                _make(connection)
            _settle(connection, path, synchronous=synchronous)
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.Error):
                raise explained(path, error) from error
            raise
        return cls(path, connection, _uri(path, "ro"), read_only=False)

    def close(self) -> None:
        """Let go of it. The last one to write leaves one file, all in it. May be called twice."""
        if os.getpid() != self._pid:  # a fork's: the locks are not its own
            return
        if not self._read_only:
            with suppress(sqlite3.Error):  # a reader holds it up, or the disk is full: what is in the log is safe there
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._db.execute("PRAGMA busy_timeout = 0")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._db.close()

    def require_in_place(self) -> None:
        """Raise ``JobMissingError`` where another file is at its path, or none: what is written goes there no more."""
        if _file_at(self._place) != self._file:
            reason = "it was removed or renamed while the job ran"
            way = "put it back and resume the job, or run its command again"
            raise JobMissingError(str(self.path.parent.parent), f"{reason}; {way}")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- jobs and runs

    def job(self, identity: str, spec: bytes | None = None) -> int:
        """The id of the job of that ``identity``, made if it is new. ``spec``, if given, replaces the one there."""
        key = as_key(identity)
        with self._transaction() as db:
            found = db.execute("SELECT id, spec FROM jobs WHERE identity = ?", (key,)).fetchone()
            if found is None:
                made = "INSERT INTO jobs (identity, spec, created_s) VALUES (?, ?, ?) RETURNING id"
                return int(db.execute(made, (key, spec or b"", time.time())).fetchall()[0][0])
            if spec is not None and found[1] != spec:
                db.execute("UPDATE jobs SET spec = ? WHERE id = ?", (spec, found[0]))
            return int(found[0])

    def begin_run(self, job: int, segment: str, pid: int) -> int:
        """Note that a run of ``job`` starts, with its ring in ``segment``; its id."""
        asked = "INSERT INTO runs (job, segment, pid, started_s) VALUES (?, ?, ?, ?) RETURNING id"
        with self._transaction() as db:
            return int(db.execute(asked, (job, segment, pid, time.time())).fetchall()[0][0])

    def end_run(self, run: int, outcome: str, counts: bytes) -> None:
        """Note that ``run`` has ended, and that its segment holds nothing any more."""
        with self._transaction() as db:
            asked = "UPDATE runs SET ended_s = ?, outcome = ?, counts = ? WHERE id = ?"
            db.execute(asked, (time.time(), as_text(outcome), counts, run))

    def forget_segment(self, name: str) -> None:
        """Note that what a dead run had left in segment ``name`` is drained: ``open_segments`` names it no more."""
        with self._transaction() as db:
            db.execute("UPDATE runs SET drained = 1 WHERE segment = ? AND ended_s IS NULL", (name,))

    # ---- files

    def find(self, job: int, input: bytes, output: bytes) -> Found | None:  # noqa: A002
        """What is known of a file; None: nothing.

        Between two batches one transaction serves all calls, which saves the locks of each: nobody else writes.
        """
        if not self._read_only and not self._db.in_transaction:
            self._db.execute("BEGIN")
        return super().find(job, input, output)

    def write(self, job: int, rows: Iterable[RowTuple]) -> None:
        """Write ``rows`` (tuples in the order of ``Row``), all of them or none; the last one of a key counts.

        It is quickest where keys come in ascending order, in batches of about a thousand. Where there is an index by
        output, see ``expect_inputs``, an output that was another input's is that one's no more: its row goes.
        """
        totals: Totals = {}
        values = ledgerrows.values_of(job, rows, totals)
        if not values:
            return
        is_indexed = self._may_overwrite()
        try:
            with self._transaction() as db:
                if is_indexed:
                    ledgerrows.forget_overwritten(db, job, values)
                ledgerrows.insert(db, values)
                ledgerrows.add_to_totals(db, job, totals)
        except sqlite3.IntegrityError:  # a key is there already, or twice in the batch
            with self._transaction() as db:
                if is_indexed:
                    ledgerrows.forget_overwritten(db, job, values)
                ledgerrows.replace(db, values, totals)
                ledgerrows.add_to_totals(db, job, totals)

    def expect_inputs(self, job: int, origin: bytes) -> None:
        """A run of ``job``, which has outputs, begins, over inputs of one ``origin``: of all that may ever come from
        there, no two have one output; empty: they may.
        """
        with self._transaction() as db:
            if ledgerrows.expect_inputs(db, job, origin):
                self._is_indexed = True

    def _may_overwrite(self) -> bool:
        """Whether an output that is written may be another input's by what is known, see ``ledgerrows``."""
        if self._is_indexed is None:
            self._is_indexed = ledgerrows.is_indexed(self._db)
        return self._is_indexed

    def forget(self, job: int, keys: Iterable[tuple[bytes, bytes]]) -> None:
        """Delete the rows of ``keys`` (input, output), all of them or none; those that are not there are no matter."""
        with self._transaction() as db:
            ledgerrows.delete(db, ((job, input_, output) for input_, output in keys))

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        assert os.getpid() == self._pid, "a fork writes to the ledger that its parent opened"
        db = self._db
        try:
            if db.in_transaction:  # of ``find``; or a Ctrl-C came before one could be rolled back
                db.execute("ROLLBACK")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):  # SQLite has rolled back where the disk failed
                if db.in_transaction:
                    db.execute("ROLLBACK")
            if isinstance(error, sqlite3.IntegrityError):
                raise
            if isinstance(error, DAMAGES):
                raise explained(self.path, error) from error
            raise


# ---- opening ---------------------------------------------------------------------------------------------------------


def _uri(path: Path, mode: str, more: str = "") -> str:
    return f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}{more}"


def _connected(path: Path, uri: str) -> sqlite3.Connection:
    try:
        return connect(uri)
    except sqlite3.Error as error:
        raise explained(path, error) from error


def _refuse_what_is_no_file(path: Path, directory: Path, *, may_be_missing: bool, read_only: bool) -> None:
    """By ``stat`` alone: to close a descriptor of the file would take away SQLite's locks on it in this process."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if may_be_missing:
            place = os.path.dirname(os.path.realpath(path))
            if path.is_symlink() and not os.path.isdir(place):
                reason = f"it is a symbolic link into {place}, which is no directory; make that, or remove the link"
                raise LedgerError(str(path), reason) from None
            if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent)) from None
            return
        reason = f"there is no {OWN_DIRECTORY}/{LEDGER_NAME}; `ringpool run` begins one"
        raise JobMissingError(str(directory), reason) from None
    if not path.is_file():
        kind = "a directory" if path.is_dir() else f"no file (mode {found.st_mode:o})"
        raise LedgerError(str(path), f"it is {kind}; move it away, and the job begins anew")
    if not os.access(path, os.R_OK if read_only else os.R_OK | os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _file_at(path: Path) -> tuple[int, int]:
    """Device and inode of the file at ``path``; 0, 0: there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    return found.st_dev, found.st_ino


def _remove_what_a_reader_left(path: Path) -> None:
    """A log without content, which another user has made by looking: this one may not write to it."""
    with suppress(OSError):
        log = f"{path}-wal"
        if os.stat(log).st_size == 0 and not os.access(log, os.W_OK, effective_ids=True):
            os.unlink(log)
            os.unlink(f"{path}-shm")


def _is_ledger(db: sqlite3.Connection, path: Path) -> bool:
    """Whether it is one that we know; False where nothing is in it yet. Raises ``LedgerError`` for anything else."""
    db.execute("BEGIN")  # who makes one commits it between two questions: the answers are to be of one moment
    [(application,)] = db.execute("PRAGMA application_id")
    [(version,)] = db.execute("PRAGMA user_version")
    [(n_tables,)] = db.execute("SELECT count(*) FROM sqlite_schema")
    db.execute("COMMIT")
    if not n_tables and not application:
        return False
    if application != APPLICATION_ID:
        raise LedgerError(str(path), "it is a database of another program; move it away, and the job begins anew")
    if version != VERSION:
        reason = f"it has version {version}, and this ringpool knows {VERSION}; use the ringpool that made it"
        raise LedgerError(str(path), reason)
    [(n_pages,)], [(page_bytes,)] = db.execute("PRAGMA page_count"), db.execute("PRAGMA page_size")
    size = path.stat().st_size
    if size < n_pages * page_bytes and not has_log(path):  # the log is looked at last: a writer may be coming
        raise LedgerError(
            str(path),
            f"it was cut off at {size} of {n_pages * page_bytes} bytes; put a copy in its place, or move "
            f"{OWN_DIRECTORY} away, and the job begins anew",
        )
    return True


def _make(db: sqlite3.Connection) -> None:
    """A ledger is there once the transaction is: a kill before it leaves what ``_is_ledger`` takes for nothing."""
    db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    db.execute("PRAGMA journal_mode = WAL").fetchall()
    db.execute("BEGIN IMMEDIATE")
    if not db.execute("SELECT count(*) FROM sqlite_schema").fetchall()[0][0]:  # a neighbour may have been faster
        for statement in filter(str.strip, _SCHEMA.split(";")):
            db.execute(statement)
    db.execute("COMMIT")


def _settle(db: sqlite3.Connection, path: Path, *, synchronous: bool) -> None:
    [(mode,)] = db.execute("PRAGMA journal_mode = WAL")
    if mode != "wal":
        reason = f"its file system does not allow SQLite's WAL (got {mode}); put the outputs on another one"
        raise LedgerError(str(path), reason)
    db.execute(f"PRAGMA synchronous = {'FULL' if synchronous else 'NORMAL'}")
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    db.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")
    db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")


_NO_INDEX = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
)  # what says that a log's index can be neither used nor made


def _open_for_reading(path: Path, directory: Path) -> Ledger:
    """By the log's index, which a reader may use or, after a kill, make; where it may not, by the file alone. What
    another user's reader makes, its owner could not write to.
    """
    uri = _uri(path, "ro")
    if os.geteuid() not in (0, path.stat().st_uid) and not os.path.exists(f"{path}-wal"):
        uri = _uri(path, "ro", ALONE)
    for is_last in (False, True):
        connection = _connected(path, uri)
        try:
            if not _is_ledger(connection, path):
                raise JobMissingError(str(directory), "its ledger was never finished; run the job again")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            return Ledger(path, connection, uri, read_only=True)
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.Error):
                # Nobody who writes is there without a log: the file alone is whole, until one comes.
                if is_last or error.sqlite_errorcode & 0xFF not in _NO_INDEX or has_log(path):
                    raise explained(path, error) from error
                uri = _uri(path, "ro", ALONE)
            else:
                raise
    raise AssertionError("not reached")

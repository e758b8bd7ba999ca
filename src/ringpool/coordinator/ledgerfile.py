"""The file of a ledger: connections to it, and what their errors mean.

sqlite3.Error --explained--> LedgerError, which says what is wrong with the file, its disk or this user, and what to do
"""

from __future__ import annotations

import os
import resource
import sqlite3
from pathlib import Path

import msgspec

from ringpool.errors import LedgerError

BUSY_S = 10.0
ALONE = "&immutable=1"  # of the address of a ledger that is read without its log
DAMAGES = (sqlite3.Error, msgspec.MsgspecError, TypeError)  # the last where a column holds another type
_REASONS = {
    sqlite3.SQLITE_NOTADB: "it is no SQLite database; move it away, and the job begins anew",
    sqlite3.SQLITE_CORRUPT: "it is damaged; put a copy in its place, or move .ringpool away, and the job begins anew",
    sqlite3.SQLITE_FULL: "its file system is full, or has no inode left; make room, then run the job again",
    sqlite3.SQLITE_BUSY: f"another process has held it for {BUSY_S:g} s; try again when that one is done",
    sqlite3.SQLITE_READONLY: "this user may not write to it; run as the user who made it",
    sqlite3.SQLITE_CANTOPEN: "it, or its -wal and -shm beside it, cannot be opened; run as the user who made it",
    sqlite3.SQLITE_IOERR: "its disk failed; see the system's log, then run the job again",
}
_PRIMARY = 0xFF  # of a result code; above are details
_OF_NO_ROOM = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)  # of -wal and -shm, too
_ROOM_BYTES_MIN = 1 << 16  # so much both need at first
_PATH_BYTES_MAX = 504  # SQLite's 512, less what it appends


def connect(uri: str) -> sqlite3.Connection:
    """A connection that begins no transaction by itself. One thread at a time may use it."""
    return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


def has_log(path: Path) -> bool:
    """Whether there is a log with something in it, which the file alone does not have."""
    try:
        return os.stat(f"{path}-wal").st_size > 0
    except FileNotFoundError:
        return False


def _is_full(directory: Path) -> bool:
    """Whether there is no room in that file system, or no inode is left."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < _ROOM_BYTES_MIN or (found.f_files > 0 and found.f_favail == 0)


def _reason_of_system(path: Path, code: int) -> str:
    """What else than the file may be the cause of ``code``; empty: nothing is known."""
    n_bytes = max(len(os.fsencode(path.absolute())), len(os.path.realpath(os.fsencode(path))))
    if code == sqlite3.SQLITE_CANTOPEN and n_bytes > _PATH_BYTES_MAX:
        limit = f"its path has {n_bytes} bytes, and SQLite takes {_PATH_BYTES_MAX}"
        return f"{limit}; keep it in a directory with a shorter one, by --job, or directory= of a Job"
    limit_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if code == sqlite3.SQLITE_IOERR and limit_bytes != resource.RLIM_INFINITY:
        sizes = [os.stat(name).st_size for name in (path, f"{path}-wal", f"{path}-shm") if os.path.exists(name)]
        if max(sizes, default=0) + _ROOM_BYTES_MIN > limit_bytes:
            return f"this process may make no file of more than {limit_bytes} bytes (RLIMIT_FSIZE); raise `ulimit -f`"
    return ""


def explained(path: Path, error: sqlite3.Error | msgspec.MsgspecError | TypeError) -> Exception:
    """``error`` as a ``LedgerError``; itself, where it is a mistake of ours, such as a question after ``close``."""
    if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return error
    code = error.sqlite_errorcode if isinstance(error, sqlite3.Error) else sqlite3.SQLITE_CORRUPT
    code &= _PRIMARY
    if code in _OF_NO_ROOM and _is_full(path.parent):
        code = sqlite3.SQLITE_FULL
    reason = _reason_of_system(path, code) or _REASONS.get(code, "it cannot be used")
    return LedgerError(str(path), f"{reason} ({error})")

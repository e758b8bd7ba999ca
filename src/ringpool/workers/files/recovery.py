"""Recovery of transactions that died: each is finished where its journal is whole, and dropped otherwise.

    recover_marked   the one whose mark stands in a lock file that the caller has just locked
    recover_root     all of a root, before its first lock: after a power cut, marks may be missing

    its id is held:  it lives, or another process recovers it
    it is not:       hold it -> trusted? -> Journal.recover, by the table in ``journal`` -> its files go, the id last

Whoever may be harmed by what a journal says is asked first: see ``_is_trusted``.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress

from ringpool.errors import FileOperationError
from ringpool.workers.files import holds
from ringpool.workers.files.durability import close_quietly
from ringpool.workers.files.journal import DIRECTORY_FLAGS, Journal, id_of, lstat_at, read, txn_directory
from ringpool.workers.files.oslayer import calls

RECOVERER_PATIENCE_S = 30


def recover_marked(root: bytes, text: bytes, deadline_s: float | None = None) -> None:
    """The transaction that the mark ``text`` names is finished or dropped when this returns.

    For whoever finds a mark in a lock file that it has just locked: so the transaction is dead. Another process may be
    recovering it; that is waited for. Raises ``OSError``; ``FileOperationError`` (EBUSY) where the id stays held;
    ``OutOfTimeError`` where that lasts until ``deadline_s`` (monotonic).
    """
    if not id_of(text + b".lock"):
        return  # not ours, or torn by a power cut, after which the journals are looked through anyway
    for is_last in holds.tries(_end_s(deadline_s)):
        if _recover(root, text, create=False)[0]:
            return
        if is_last:
            raise _busy(txn_directory(root) + b"/" + text + b".lock", "though its locks are free", deadline_s)


def recover_root(
    root: bytes, deadline_s: float | None = None, spares: Callable[[bytes], bool] = lambda _path: False
) -> int:
    """Finish or drop every dead transaction of ``root``; how many were rolled forward. Raises ``OSError`` of one that
    can be neither, an append-only file or another user's directory being among its paths; but not where the caller
    ``spares`` each of them, who has nothing to do with it: that one is left.

    A living one is left alone, and so are those of a directory that is closed to us, and those that we do not trust:
    they are their owner's. After a power cut there may be no marks that keep others away from what one recovers here:
    one does that at a time, and who comes after it waits. Raises ``FileOperationError`` (EBUSY) where that is long, and
    ``OutOfTimeError`` where it lasts until ``deadline_s`` (monotonic).
    """
    try:
        txn_fd = calls.open(txn_directory(root), DIRECTORY_FLAGS)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return 0
    try:
        if not _ids_of_trusted(root, txn_fd):
            return 0  # and what we have nothing to do with may be locked by whom it likes
        turn = holds.Hold()
        try:
            if not _has_turn_to_recover(turn, root, txn_fd, deadline_s):
                return 0
            mine = _ids_of_trusted(root, txn_fd)
            return sum(_recover_or_leave(root, txn_fd, identity, spares) for identity in mine)
        finally:
            turn.let_go_surely()
    finally:
        close_quietly(txn_fd)


def _recover_or_leave(root: bytes, txn_fd: int, identity: bytes, spares: Callable[[bytes], bool]) -> bool:
    try:
        return _recover(root, identity, create=True)[1]
    except OSError:
        if lstat_at(identity + b".journal", txn_fd) is None:
            return False  # nothing of it is to be done, and what cannot be removed is in nobody's way
        effects = read(txn_fd, identity)
        if not effects or not all(spares(os.path.join(root, effect.path)) for effect in effects):
            raise
        return False


def _ids_of_trusted(root: bytes, txn_fd: int) -> list[bytes]:
    names = map(os.fsencode, calls.listdir(txn_fd))
    found = sorted({identity for name in names if (identity := id_of(name))})
    return [identity for identity in found if _is_trusted(root, txn_fd, identity)]


def _has_turn_to_recover(turn: holds.Hold, root: bytes, txn_fd: int, deadline_s: float | None) -> bool:
    """Have ``turn`` hold the directory; False where that was removed meanwhile."""
    for is_last in holds.tries(_end_s(deadline_s)):
        with suppress(BlockingIOError):
            return turn.take(txn_fd, b".", os.O_DIRECTORY)
        if is_last:
            break
    raise _busy(txn_directory(root), "by a recovery", deadline_s)


def _end_s(deadline_s: float | None) -> float:
    patience_end_s = time.monotonic() + RECOVERER_PATIENCE_S
    return patience_end_s if deadline_s is None else min(deadline_s, patience_end_s)


def _busy(path: bytes, how: str, deadline_s: float | None) -> Exception:
    if deadline_s is not None and time.monotonic() >= deadline_s:
        return holds.OutOfTimeError(f"the recovery of a dead transaction ({os.fsdecode(path)})")
    reason = f"still held after {RECOVERER_PATIENCE_S} s, {how}: end the process that has it"
    return FileOperationError(os.fsdecode(path), "recover a transaction", errno.EBUSY, reason)


def _is_trusted(root: bytes, txn_fd: int, identity: bytes) -> bool:
    """Whether we do what that transaction says.

    In a sticky directory (/tmp) anybody may leave a journal, and we may write to files that its author may not. There
    it has to be ours, the directory's owner's, or root's.
    """
    found = calls.stat(root)
    if not found.st_mode & stat.S_ISVTX:
        return True  # who may make a journal there may also rename what is in it
    owners = {os.geteuid(), found.st_uid, 0}
    files = (lstat_at(identity + suffix, txn_fd) for suffix in (b".journal", b".lock"))
    return all(file is None or file.st_uid in owners for file in files)


def _recover(root: bytes, identity: bytes, *, create: bool) -> tuple[bool, bool]:
    """Whether it is over, and whether this call rolled it forward. ``create``: it may have lost its lock file."""
    try:
        txn_fd = calls.open(txn_directory(root), DIRECTORY_FLAGS)
    except FileNotFoundError:
        return True, False
    try:
        create = create or lstat_at(identity + b".journal", txn_fd) is not None
        hold = holds.Hold()
        try:
            try:
                if not hold.take(txn_fd, identity + b".lock", os.O_CREAT if create else 0):
                    return True, False
            except FileNotFoundError:
                return True, False
            except BlockingIOError:
                return False, False
            if not _is_trusted(root, txn_fd, identity):
                reason = "another user's, in a sticky directory: that user has to lock the file first"
                raise FileOperationError(os.fsdecode(root), "recover a transaction", errno.EPERM, reason)
            return True, Journal(root, txn_fd, identity, hold).recover()
        finally:
            hold.let_go_surely()
    finally:
        close_quietly(txn_fd)

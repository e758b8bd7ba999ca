"""One commit of a transaction, under its locks: staging, marks, journal, and what is done when a step fails.

    stage every path  ->  mark the locks  ->  journal  ->  apply  ->  journal away  ->  marks away
    '----------- dropped at an error -----------'   '-------- rolled forward at an error --------'
                                            in doubt at an error of its fsync: left as it is, for the next one to lock

What is rolled forward is so by the code of a recovery, once; what cannot be is left to the next one, with its marks. So
is all after an fsync that failed: to try that again would prove nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from ringpool.errors import (
    CommittedWithErrors,
    CrossDeviceError,
    DurabilityError,
    TransactionError,
    TransactionInDoubtError,
    add_note,
)
from ringpool.workers.files.attributes import APPEND_ONLY, IMMUTABLE, attributes_of, mount_of
from ringpool.workers.files.durability import close_quietly, sync
from ringpool.workers.files.holds import Hold
from ringpool.workers.files.journal import Effect, Journal, Stage, lstat_at, open_directory
from ringpool.workers.files.locks import LockSet
from ringpool.workers.files.operations import File, New, Original
from ringpool.workers.files.oslayer import calls, write_all
from ringpool.workers.files.recovery import recover_marked
from ringpool.workers.files.target import default_acl, give_rights, lstat, take_over

# Those of this process that were left to whoever comes next: (root, id). A thread that goes on holding the locks from
# outside comes next itself, and would not see the marks.
_unfinished: set[tuple[bytes, bytes]] = set()


class Commit:
    """One commit under way. ``is_committed`` says, also when ``run`` has raised, whether it stands."""

    def __init__(self, base: bytes, root: bytes, locks: LockSet, files: Mapping[bytes, File], *, durable: bool) -> None:
        self.base = base
        self.root = root
        self.locks = locks
        self.files = sorted(files.items())
        self.durable = durable
        self.is_committed = False
        self.path, self.step = base, "begin"  # where it is, for messages

    def run(self) -> None:
        """All of it. Raises what the table in transaction.py says."""
        hold = Hold()
        try:
            self._run_with(hold)
        finally:
            hold.let_go_surely()

    def _run_with(self, hold: Hold) -> None:
        try:
            for root, identity in list(_unfinished):
                if root == self.root:
                    recover_marked(root, identity)
                    _unfinished.discard((root, identity))
            journal = Journal.begin(self.root, hold, durable=self.durable)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._run(journal)
        except BaseException as error:
            self._give_up(journal, error)
        finally:
            journal.close()

    def _run(self, journal: Journal) -> None:
        effects = self._stage(journal)
        self.step = "mark its locks"
        self.locks.mark(journal.id)
        self.path, self.step = self.base, "write the journal"
        journal.commit(effects)
        self.is_committed = True
        self.step = "apply the journal"
        journal.apply(effects)
        journal.retire()
        self._clear_marks()

    def _stage(self, journal: Journal) -> list[Effect]:
        """Every new file is in the journal's directory, and every old one is kept alive there."""
        mount = mount_of(journal.txn_fd)
        effects: list[Effect] = []
        for n, (key, file) in enumerate(self.files):
            self.path, self.step = os.path.join(self.base, key), "open its directory"
            parent, name = self._place(key)
            parent_fd = open_directory(self.root, parent)
            try:
                if mount_of(parent_fd) != mount:
                    reason = f"it is on another file system than {os.fsdecode(self.root)}"
                    raise CrossDeviceError(os.fsdecode(self.path), "stage", errno.EXDEV, reason)
                self.step = "stage"
                found = lstat_at(name, parent_fd)
                self._check_rights(parent_fd, found)
                if found is not None and not journal.pin(n, parent_fd, name) and not _may_go(name, found, parent_fd):
                    raise PermissionError(
                        errno.EPERM, "it is immutable or append-only, so it can be neither replaced nor removed"
                    )
                if isinstance(file, New):
                    self._create(journal, n, file, parent_fd)
                elif isinstance(file, Original):
                    self._adopt(journal, n, file)
                effects.append(Effect(os.path.join(parent, name), file is not None, found.st_ino if found else 0))
            finally:
                close_quietly(parent_fd)
        return effects

    def _check_rights(self, parent_fd: int, found: os.stat_result | None) -> None:
        """Raise ``PermissionError`` where it could be staged and never put in place: to be told before the commit."""
        if not calls.access(b".", os.W_OK | os.X_OK, dir_fd=parent_fd, effective_ids=True):
            raise PermissionError(errno.EACCES, "no right to make or remove files in its directory")
        if attributes_of(b"", parent_fd) & (IMMUTABLE if found is None else IMMUTABLE | APPEND_ONLY):
            raise PermissionError(errno.EPERM, "its directory is immutable or append-only")
        parent, us = calls.fstat(parent_fd), os.geteuid()
        if found is not None and parent.st_mode & stat.S_ISVTX and us not in (0, found.st_uid, parent.st_uid):
            raise PermissionError(errno.EPERM, "another user's file in a sticky directory")

    def _create(self, journal: Journal, n: int, file: New, parent_fd: int) -> None:
        """A file with the new content, durable, and with the metadata that it shall have."""
        like = None if file.like is None else os.path.join(self.base, file.like)
        replaced = None if like is None else lstat(like)
        # Where both directories hand on the same, the kernel gives a new file the rights that it shall have.
        inherited = default_acl(parent_fd) if replaced is None else None
        is_right = replaced is None and inherited == default_acl(journal.txn_fd)
        fd = journal.create(n, 0o666 if is_right else 0o600)
        try:
            write_all(fd, file.content)
            if replaced is not None and like is not None:
                take_over(fd, calls.fstat(fd), replaced, like, None)
            else:
                parent, txn = calls.fstat(parent_fd), calls.fstat(journal.txn_fd)
                with suppress(PermissionError):  # the kernel would have asked nobody; we are not in that group
                    if parent.st_mode & stat.S_ISGID:
                        calls.fchown(fd, -1, parent.st_gid)
                    elif txn.st_mode & stat.S_ISGID:  # whose group it has
                        calls.fchown(fd, -1, os.getegid())
                if not is_right:
                    give_rights(fd, inherited)
            if self.durable:
                sync(fd, self.path, "fsync of its new content")
        except BaseException:
            close_quietly(fd)
            raise
        calls.close(fd)  # a network file system reports errors of writing here

    def _adopt(self, journal: Journal, n: int, file: Original) -> None:
        self.path, self.step = os.path.join(self.base, file.path), "link it for its new path"
        parent, name = self._place(file.path)
        source_fd = open_directory(self.root, parent)
        try:
            journal.adopt(n, source_fd, name)
        finally:
            close_quietly(source_fd)

    def _place(self, key: bytes) -> tuple[bytes, bytes]:
        """The directory, relative to the root, and the name there."""
        parent, name = os.path.split(os.path.join(self.base, key))
        return (os.path.relpath(parent, self.root) if parent != self.root else b""), name

    def _give_up(self, journal: Journal, error: BaseException) -> NoReturn:
        """Drop it, leave it in doubt or roll it forward, and raise what says which: see the table in transaction.py."""
        _unfinished.add((self.root, journal.id))
        if journal.stage is Stage.IN_DOUBT and isinstance(error, OSError):
            raise TransactionInDoubtError(*self._facts(error)) from error
        is_finished = False
        if journal.stage is Stage.STAGING or not isinstance(error, DurabilityError):  # an fsync is not tried again
            with suppress(OSError):
                if journal.stage is Stage.STAGING:
                    journal.discard()
                else:
                    self.is_committed = journal.recover() or self.is_committed
                is_finished = True
                _unfinished.discard((self.root, journal.id))
        if is_finished or journal.stage is Stage.STAGING:
            self._clear_marks()
        if not isinstance(error, OSError):
            if journal.stage is Stage.IN_DOUBT and not is_finished:
                add_note(error, "the transaction is in doubt: lock one of its files, then look at it")
            raise error
        if journal.stage is Stage.STAGING:
            raise self._failed(error) from error
        raise CommittedWithErrors(*self._facts(error), is_finished) from error

    def _clear_marks(self) -> None:
        with suppress(OSError):  # one that stays names a transaction that is over, as whoever finds it will see
            self.locks.clear_marks()

    def _failed(self, error: OSError) -> OSError:
        """What to raise where nothing was done."""
        if isinstance(error, TransactionError | DurabilityError):
            return error
        return TransactionError(*self._facts(error))

    def _facts(self, error: OSError) -> tuple[str, str, int, str]:
        return os.fsdecode(self.path), self.step, error.errno or errno.EIO, error.strerror or str(error)


def _may_go(name: bytes, found: os.stat_result, parent_fd: int) -> bool:
    """Whether a file that cannot be linked can be replaced: not if even its owner, or root, may not write to it, or may
    append to it alone.
    """
    if attributes_of(name, parent_fd) & (IMMUTABLE | APPEND_ONLY):
        return False
    return os.geteuid() not in (0, found.st_uid) or calls.access(name, os.W_OK, dir_fd=parent_fd, effective_ids=True)

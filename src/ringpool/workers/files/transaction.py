"""Transactions on files: several writes, deletions and renames that happen all or not at all.

    with FileTransaction("accounts") as transaction:
        balance = int(transaction.read("alice"))
        transaction.write("alice", str(balance - 10))
        transaction.rename("inbox/1", "archive/1")
        transaction.delete("inbox/2")

    at a clean exit           at an exception
    commit                    rollback: nothing was done yet

    operations, in order -> what becomes of each path (operations.py)
    commit:  locks on all its paths -> what it read is unchanged, what it needs is there -> staged (journal.py)
             -> marks -> the journal: committed -> applied -> marks cleared -> locks freed

    an error comes          what is raised                  what stands
    before the journal      TransactionError, or            the old state; nothing is left
                            LockTimeoutError, DurabilityError
    at its fsync            TransactionInDoubtError         the next one to lock a file of it rolls it forward
    after it                CommittedWithErrors             the new state; finished here or by the next one to lock

The journal's commit is what survives SIGKILL and power loss. A mark is the transaction's id in the lock file of each of
its paths: whoever locks such a path after the death of its writer sees it, and recovers before it has the lock.
So who locks sees all or nothing, at every path; ``snapshot`` locks several and reads them at one moment. Who reads
without a lock sees each file whole, and may see one file before the transaction and the next one after it.

The locks are those of ``PathLock`` for the same paths. What a transaction has read is compared under the locks, by
content: two transactions that read and write the same files do not lose an update; one of them raises
``TransactionConflictError``. To wait instead, hold a ``LockSet`` on the paths around the whole of it.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from hashlib import blake2b
from types import TracebackType
from typing import TypeVar

from ringpool.errors import (
    CommittedWithErrors,
    FileOperationError,
    PathNameError,
    RingpoolError,
    TransactionConflictError,
    TransactionError,
    add_note,
)
from ringpool.workers.files import lockfiles
from ringpool.workers.files.commit import Commit
from ringpool.workers.files.contained import Contained
from ringpool.workers.files.durability import Durability, close_quietly
from ringpool.workers.files.journal import (
    DIRECTORY,
    read_all,
)
from ringpool.workers.files.locks import LockSet, root_of, under
from ringpool.workers.files.naming import FilePath, check_path, check_several, encoded
from ringpool.workers.files.operations import (
    Delete,
    File,
    New,
    Operation,
    Original,
    Rename,
    Write,
    advance,
    outcome,
    paths_of,
)
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.target import lstat

ROOTS_TRIED_MAX = 100
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)  # ENXIO: a socket

AnyPath = TypeVar("AnyPath", bound=FilePath)


# ---- the transaction -------------------------------------------------------------------------------------------------


class _State(Enum):
    OPEN = "open"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    FAILED = "failed"


class FileTransaction:
    """Operations on files under ``base`` that take effect together, when the block ends or ``commit`` is called.

    ``timeout_s`` bounds the wait for its locks (None: no bound). ``durability``: ``full`` survives a power cut,
    ``atomic`` SIGKILL only, at the price of no fsync at all. Paths are relative to ``base`` and stay in it. Contents
    are in memory until the commit. A file that is replaced hands on its owner, mode and attributes; a new one gets the
    umask's. For one thread; raises ``TransactionError`` where ``base`` is no directory.
    """

    def __init__(
        self, base: FilePath, *, timeout_s: float | None = None, durability: Durability | str = Durability.FULL
    ) -> None:
        level = Durability(durability)
        if level not in (Durability.FULL, Durability.ATOMIC):
            raise ValueError(f"a transaction is of durability 'full' or 'atomic', not {level.value!r}")
        self.base = os.path.realpath(encoded(base))
        self.timeout_s = timeout_s
        self.durability = level
        self._state = _State.OPEN
        self._operations: list[Operation] = []
        self._files: dict[bytes, File] = {}  # as the operations have left them; what is not here was not looked at
        self._touched: set[bytes] = set()  # what the operations name
        self._seen: dict[bytes, bytes | None] = {}  # the digests of what was read; None: there was no file
        if not os.path.isdir(self.base):
            error = errno.ENOTDIR if os.path.exists(self.base) else errno.ENOENT
            raise TransactionError(os.fsdecode(self.base), "begin", error, os.strerror(error))

    def write(self, path: FilePath, content: bytes | bytearray | memoryview | str) -> None:
        """Make ``content`` (text as UTF-8) that of the file at ``path``. Its directory must exist.

        Here as below: raises ``PathNameError`` or ``PathOutsideError`` for the path, ``FileOperationError`` where its
        directory cannot be opened, ``TransactionError`` where something stands there that is no regular file. Symbolic
        links are followed in the directory, if they are relative and stay in the base; at the end they are refused.
        """
        octets = content.encode() if isinstance(content, str) else bytes(content)
        self._do(Write(self._look(path), octets))

    def delete(self, path: FilePath) -> None:
        """Remove the file at ``path``. Raises ``TransactionError`` (ENOENT) where there is none."""
        self._do(Delete(self._look(path)))

    def rename(self, source: FilePath, target: FilePath) -> None:
        """Give the file at ``source`` the path ``target``; a file there is replaced.

        Raises ``TransactionError`` (ENOENT) where there is none at ``source``.
        """
        self._do(Rename(self._look(source), self._look(target)))

    def read(self, path: FilePath) -> bytes:
        """The file's content as the transaction would leave it.

        Raises ``TransactionError`` (ENOENT) where there is no file. If the file has changed when the transaction
        commits, or has come or gone, that raises ``TransactionConflictError``.
        """
        key = self._look(path)
        file = self._files.get(key)
        if isinstance(file, New):
            return file.content
        content = None
        if file is not None or key not in self._touched:
            at = key if file is None else file.path
            content = self._content(at)
            if self._seen.setdefault(at, _digest(content)) != _digest(content):
                raise self._conflict(at)
        if content is None:
            raise TransactionError(self._shown(key), "read", errno.ENOENT, os.strerror(errno.ENOENT))
        return content

    def rollback(self) -> None:
        """End it without effect."""
        self._end(_State.ROLLED_BACK)

    def commit(self) -> None:
        """Do all of it. Ends the transaction, whatever is raised: the table above says what stands then."""
        self._end(_State.FAILED)
        if self._operations or self._seen:
            self._lock_and_commit()
        self._state = _State.COMMITTED

    def __enter__(self) -> FileTransaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state is not _State.OPEN:
            return
        if kind is None:
            self.commit()
        else:
            self.rollback()

    def _end(self, state: _State) -> None:
        if self._state is not _State.OPEN:
            raise RuntimeError(f"the transaction on {os.fsdecode(self.base)} has ended: {self._state.value}")
        self._state = state

    def _do(self, operation: Operation) -> None:
        advance(self._files, operation)
        self._operations.append(operation)
        self._touched.update(paths_of(operation))

    # -- looking, before the locks

    def _look(self, path: FilePath) -> bytes:
        """The path within the base, links in its directory followed; ``_files`` is up to date there."""
        if self._state is not _State.OPEN:
            self._end(self._state)
        key = _contained(self.base, path)
        if key not in self._touched:
            if self._is_file(key):
                self._files[key] = Original(key)
            else:
                self._files.pop(key, None)
        return key

    def _is_file(self, key: bytes) -> bool:
        """Whether there is one. Raises ``TransactionError`` where something else is there."""
        try:
            found = lstat(os.path.join(self.base, key))
        except OSError as error:
            raise self._failed(key, "look at it", error) from error
        if found is None:
            if not os.path.isdir(os.path.dirname(os.path.join(self.base, key))):
                raise TransactionError(
                    self._shown(key), "use", errno.ENOENT, "its directory is not there; make it first"
                )
            return False
        if stat.S_ISREG(found.st_mode):
            return True
        if stat.S_ISDIR(found.st_mode):
            raise TransactionError(self._shown(key), "use", errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISLNK(found.st_mode):
            reason = "it is a symbolic link; name the file that it leads to"
            raise TransactionError(self._shown(key), "use", errno.ELOOP, reason)
        raise TransactionError(self._shown(key), "use", errno.EINVAL, "it is a device, pipe or socket")

    def _content(self, key: bytes) -> bytes | None:
        try:
            return _read(os.path.join(self.base, key))
        except OSError as error:
            raise self._failed(key, "read", error) from error

    # -- under the locks

    def _lock_and_commit(self) -> None:
        paths = [os.path.join(self.base, key) for key in sorted({*self._touched, *self._seen})]
        for _ in range(ROOTS_TRIED_MAX):
            root = self._root()
            locks, commit = LockSet(paths, base=root, timeout_s=self.timeout_s), None
            try:
                locks.acquire()
                is_right = self._root() == root  # else somebody made a .ringpool further out meanwhile
                if is_right:
                    self._require_lockable(paths, root)
                if is_right and (files := self._outcome()):
                    commit = Commit(self.base, root, locks, files, durable=self.durability is Durability.FULL)
                    commit.run()
                locks.release()
            except BaseException as error:
                with suppress(OSError, RuntimeError):  # they are not held any more
                    locks.release()
                told = self._told(error, commit is not None and commit.is_committed)
                if told is error:
                    raise
                raise told from error
            if is_right:
                return
        raise TransactionError(self._shown(b""), "lock", errno.ESTALE, "its .ringpool directories come and go")

    def _outcome(self) -> dict[bytes, File]:
        """Raises ``TransactionConflictError`` where something that was read has changed; and as ``outcome`` does."""
        for key, digest in self._seen.items():
            if _digest(self._content(key)) != digest:
                raise self._conflict(key)
        return outcome(self._operations, [key for key in sorted(self._touched) if self._is_file(key)])

    def _told(self, error: BaseException, is_committed: bool) -> BaseException:
        """The error, or in its place one that says what stands."""
        if not isinstance(error, OSError):
            if is_committed:
                add_note(error, "the transaction is committed")
        elif type(error) is FileOperationError or not isinstance(error, RingpoolError):  # of the locks
            path, operation = (
                (error.path, error.operation) if isinstance(error, FileOperationError) else (self._shown(b""), "lock")
            )
            number, reason = error.errno or errno.EIO, error.strerror or str(error)
            if is_committed:
                return CommittedWithErrors(path, operation, number, reason, True)
            return TransactionError(path, operation, number, reason)
        return error

    def _root(self) -> bytes:
        try:
            return root_of(self.base)
        except OSError as error:
            raise self._failed(b"", "look for its .ringpool", error) from error

    def _require_lockable(self, paths: list[bytes], root: bytes) -> None:
        """Raise where others would not meet the transaction's locks: the ``.ringpool`` of a sticky directory, as /tmp
        is, may serve only the files right in it, and what lies deeper is locked elsewhere.
        """
        for directory in dict.fromkeys(map(os.path.dirname, paths)):
            try:
                is_served = root_of(directory) == root
            except OSError:  # it is not there: its file is looked for next
                continue
            if not is_served:
                reason = (
                    f"the .ringpool in {os.fsdecode(root)}, where anybody may make one, does not serve this directory; "
                    "take it, or one between, as the base"
                )
                raise TransactionError(os.fsdecode(directory), "lock", errno.EPERM, reason)

    # -- words

    def _shown(self, key: bytes) -> str:
        return os.fsdecode(os.path.join(self.base, key))

    def _conflict(self, key: bytes) -> TransactionConflictError:
        return TransactionConflictError(self._shown(key), "read", errno.EAGAIN, "another has changed it meanwhile")

    def _failed(self, key: bytes, operation: str, error: OSError) -> TransactionError:
        return TransactionError(self._shown(key), operation, error.errno or errno.EIO, error.strerror or str(error))


# ---- readers ---------------------------------------------------------------------------------------------------------


def snapshot(
    paths: Iterable[AnyPath], *, base: FilePath | None = None, timeout_s: float | None = None
) -> dict[AnyPath, bytes]:
    """The contents of the files at ``paths`` at one moment: of each transaction on them all or nothing.

    It holds shared locks on all of them while it reads. ``base``, where given, is that of the transactions, and the
    paths are relative to it and stay in it. What is no file is left out: what is missing, also with its directory, what
    is a directory or pipe, and with ``base`` a symbolic link. ``timeout_s`` bounds the wait for the locks (None: none).
    Raises ``LockTimeoutError``; ``PathNameError``; ``FileOperationError`` where a file cannot be read;
    ``TypeError`` where ``paths`` is a single path.
    """
    check_several(paths)
    root, places = _places(paths, base)
    flags = os.O_NOFOLLOW if base is not None else 0
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while places:
        locks = LockSet(places.values(), "shared", base=root, timeout_s=timeout_s)
        try:
            return under(locks, functools.partial(_contents, places, flags))
        except FileOperationError as error:
            left = {path: place for path, place in places.items() if _can_be_locked(place, root)}
            if error.errno not in _NO_FILE or len(left) == len(places):
                raise
        places = left
        if deadline_s is not None:
            timeout_s = max(0.0, deadline_s - time.monotonic())
    return {}


def _places(paths: Iterable[AnyPath], base: FilePath | None) -> tuple[bytes | None, dict[AnyPath, bytes]]:
    """The base of the locks, and where each of ``paths`` is, but for those whose directory is none."""
    places: dict[AnyPath, bytes] = {}
    if base is None:
        places.update((path, encoded(path)) for path in paths)
        for place in places.values():
            check_path(place)
        return None, places
    real = os.path.realpath(encoded(base))
    try:
        root = root_of(real)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileOperationError(os.fsdecode(real), "read below it", error.errno or errno.EIO, reason) from error
    for path in paths:
        try:
            places[path] = os.path.join(real, _contained(real, path))
        except FileOperationError as error:
            if error.errno not in _NO_FILE or isinstance(error, PathNameError):
                raise
    return root, places


def _can_be_locked(place: bytes, root: bytes | None) -> bool:
    """Whether it is in a directory; what is not has no lock, and is no file."""
    try:
        lockfiles.find(place, root)
    except OSError as error:
        return error.errno not in _NO_FILE
    return True


def _contents(places: Mapping[AnyPath, bytes], flags: int) -> dict[AnyPath, bytes]:
    contents: dict[AnyPath, bytes] = {}
    for path, place in places.items():
        try:
            content = _read(place, flags)
        except OSError as error:
            reason = error.strerror or str(error)
            raise FileOperationError(os.fsdecode(place), "read", error.errno or errno.EIO, reason) from error
        if content is not None:
            contents[path] = content
    return contents


# ---- small steps -----------------------------------------------------------------------------------------------------


def _digest(content: bytes | None) -> bytes | None:
    return None if content is None else blake2b(content).digest()


def _read(path: bytes, flags: int = os.O_NOFOLLOW) -> bytes | None:
    """The file's content; None where there is nothing, a directory, a pipe, or a link that is not followed."""
    try:
        fd = calls.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return None
    try:
        return read_all(fd) if stat.S_ISREG(calls.fstat(fd).st_mode) else None
    finally:
        close_quietly(fd)


def _contained(base: bytes, path: FilePath) -> bytes:
    """``path``, relative to the real path ``base``, with the links in its directory followed.

    Raises ``PathNameError``, ``PathOutsideError``, and ``FileOperationError`` where its directory cannot be opened.
    """
    fd, name = Contained(base).open_parent(path, follow=False)
    try:
        parent = os.readlink(b"/proc/self/fd/%d" % fd)
    finally:
        close_quietly(fd)
    key = os.path.relpath(os.path.join(parent, name), base)
    if not {DIRECTORY, b".."}.isdisjoint(key.split(b"/")):  # a link leads there; or the base was renamed meanwhile
        raise PathNameError(os.fsdecode(path), "use the path", errno.EINVAL, "it leads to ringpool's own directory")
    return key

"""Files below a base directory, for threads and processes that share them.

    what                        lock        what a reader sees meanwhile      after a kill
    read, stat, exists, list    none
    find, open, verify          none
    write                       exclusive   the old content or the new one    the old or the new
    append                      exclusive   the same                          the same: never a part
    update                      exclusive   the same                          the same
    delete, rename              exclusive   there or not                      done or not
    add                         none        there, whole, or not              the same

A single file is whole at every moment, since it is replaced and never written in place. So reading takes no lock, waits
for nobody and needs no permission to write. Whoever must see several files at one moment, or none of them change, holds
``store.lock(path, "shared")`` or takes a ``snapshot``; whoever must change several together, a ``FileTransaction``.

Appending copies the file (a file system that can share blocks does not copy them): its cost grows with the file. A log
that only grows is an ``ErrorLog``'s or one file per record.

Locks are those of ``PathLock``: one holder per path among all that use ``FileStore``, ``AsyncFileStore``,
``FileTransaction`` or ``PathLock`` on it, in any process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from ringpool.errors import FileMissingError, FileOperationError
from ringpool.workers.files import lockfiles
from ringpool.workers.files.contained import Contained
from ringpool.workers.files.durability import Durability, level_of, make_directories
from ringpool.workers.files.finding import find
from ringpool.workers.files.locks import LockSet, Mode, PathLock, under
from ringpool.workers.files.naming import FilePath, absolute, encoded
from ringpool.workers.files.objects import ContentAddress, Objects, Source, VerifyReport
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.replacement import octets
from ringpool.workers.files.unlocked import Content, Unlocked


class FileStore:
    """The files below ``base``, which is made when something is first written there.

    Paths are relative to ``base`` (str, bytes or ``Path``) and cannot leave it: ``PathOutsideError``; names that no
    file can have, and ringpool's own, are refused: ``PathNameError``. ``durability`` holds for every operation that
    names no other. ``timeout_s`` bounds each wait for a lock (None: no bound): ``LockTimeoutError``. What the system
    refuses is a ``FileOperationError``, with nothing changed.
    """

    def __init__(
        self, base: FilePath, *, durability: Durability | str = Durability.FULL, timeout_s: float | None = None
    ) -> None:
        self.base = absolute(encoded(base))
        self.durability = level_of(durability)
        self.timeout_s = timeout_s
        self.unlocked = Unlocked(Contained(self.base))
        self._objects = Objects(self.unlocked.contained)
        self._rooted: tuple[bytes, int, int] | None = None  # the .ringpool that serves the base; device, inode of it

    # ---- reading, without locks --------------------------------------------------------------------------------------

    def read(self, path: FilePath) -> bytes:
        """The content of the file, whole. Raises ``FileMissingError``."""
        return self.unlocked.read(path)

    def read_text(self, path: FilePath, encoding: str = "utf-8") -> str:
        """The content as text, line ends as they are. Raises ``FileMissingError``, ``UnicodeDecodeError``."""
        return self.unlocked.read(path).decode(encoding)

    def exists(self, path: FilePath) -> bool:
        """Whether there is something of that name, of whatever kind."""
        return self.unlocked.exists(path)

    def stat(self, path: FilePath) -> os.stat_result:
        """What stat(2) tells of it; of a symlink itself. Raises ``FileMissingError``."""
        return self.unlocked.stat(path)

    def list(self, directory: FilePath = ".") -> list[str]:
        """The names in ``directory``, sorted, without those that ringpool uses itself. Raises ``FileMissingError``."""
        return self.unlocked.list(directory)

    def find(self, pattern: FilePath, *, sort: bool = False) -> Iterator[str]:
        """The paths of files that match ``pattern``, such as ``docs/**/*.txt``: see ``finding.py``.

        Listed as they are drawn, in no order, in constant memory; with ``sort`` all at once, by their bytes.
        """
        found = find(self.unlocked.contained, pattern)
        return iter(sorted(found, key=os.fsencode)) if sort else found

    # ---- writing, under the path's lock ------------------------------------------------------------------------------

    def lock(self, path: FilePath, mode: Mode = "exclusive") -> PathLock:
        """The lock that the operations on ``path`` take, to hold over several of them: it is re-entrant.

        Its directory is made. Under a shared one the path can be read, and writing is a ``LockUpgradeError``.
        """
        return PathLock(self.lock_path(path), mode, timeout_s=self.timeout_s)

    def write(self, path: FilePath, content: Content, *, durability: Durability | str | None = None) -> None:
        """Make ``content`` (text as UTF-8) that of the file, whole or not at all; its directories are made."""
        under(self.lock(path), lambda: self.unlocked.write(path, content, self.level(durability)))

    def append(self, path: FilePath, content: Content, *, durability: Durability | str | None = None) -> None:
        """Put ``content`` at the end of the file, made where it is missing, whole or not at all."""
        under(self.lock(path), lambda: self.unlocked.append(path, content, self.level(durability)))

    def update(
        self,
        path: FilePath,
        change: Callable[[bytes], Content],
        *,
        missing: bytes | None = None,
        durability: Durability | str | None = None,
    ) -> bytes:
        """Make what ``change(old content)`` returns the new content, while nobody else writes it; return it.

        Where there is no file, ``change`` gets ``missing``; without that ``FileMissingError`` is raised. What
        ``change`` raises comes through, and nothing is changed. It must not write to ``path`` itself.
        """

        def update() -> bytes:
            content = bytes(octets(change(self.before_update(path, missing))))
            self.unlocked.write(path, content, self.level(durability))
            return content

        return under(self.lock(path), update)

    def delete(self, path: FilePath, *, durability: Durability | str | None = None) -> None:
        """Remove the file; of a symlink, the link. Raises ``FileMissingError``."""
        lock = PathLock(self.lock_path(path, create=False), timeout_s=self.timeout_s)
        under(lock, lambda: self.unlocked.delete(path, self.level(durability)))

    def rename(
        self, old: FilePath, new: FilePath, *, replace: bool = False, durability: Durability | str | None = None
    ) -> None:
        """Give the file at ``old`` the path ``new``. What is there is kept (EEXIST), unless ``replace`` is true."""
        locks = LockSet([self.lock_path(old, create=False), self.lock_path(new)], timeout_s=self.timeout_s)
        under(locks, lambda: self.unlocked.rename(old, new, self.level(durability), replace=replace))

    # ---- by content --------------------------------------------------------------------------------------------------

    def add(self, source: Source, *, durability: Durability | str | None = None) -> ContentAddress:
        """Store a content once, under its digest: bytes, a binary stream, or (a ``Path``) a file's; read-only.

        Memory does not grow with it. Raises ``ContentCorruptError`` where a file with that address has another size;
        what a stream's ``read`` raises comes through, and nothing is stored.
        """
        make_directories(self.base, durable=True)
        return self._objects.add(source, self.level(durability))

    def open(self, address: ContentAddress | str) -> BinaryIO:
        """The content at ``address`` (or its digest), for reading. Raises ``FileMissingError``."""
        return self._objects.open(address)

    def verify(self, *addresses: ContentAddress | str) -> VerifyReport:
        """Read the contents at ``addresses``, or all, and compare their digests with their addresses."""
        return self._objects.verify(addresses)

    # ---- shared with AsyncFileStore ----------------------------------------------------------------------------------

    def before_update(self, path: FilePath, missing: bytes | None) -> bytes:
        """What ``update`` hands to ``change``."""
        try:
            return self.unlocked.read(path)
        except FileMissingError:
            if missing is None:
                raise
            return missing

    def lock_path(self, path: FilePath, *, create: bool = True) -> bytes:
        """What to lock for ``path``; makes what its lock needs: the base with its ``.ringpool``, and the directory.

        Without ``create`` a missing directory is a ``FileMissingError``.
        """
        if not self._is_rooted() and (create or os.path.isdir(self.base)):
            self._root()
        absolute = self.unlocked.contained.path(path)
        if not os.path.isdir(os.path.dirname(absolute)):
            self.unlocked.make_parent(path, create=create)
        return absolute

    def _is_rooted(self) -> bool:
        """Whether the base is still the one that ``_root`` has seen to, and what it made or found is there.

        Both: a base that is removed and made again may get its old inode.
        """
        if self._rooted is None:
            return False
        marker, device, inode = self._rooted
        try:
            found = calls.stat(self.base)
            return (found.st_ino, found.st_dev) == (inode, device) and calls.access(marker, os.F_OK, effective_ids=True)
        except OSError:
            return False

    def _root(self) -> None:
        """Make the base and its ``.ringpool``, unless a directory further out has one.

        Else the first lock in a directory below would be one of that directory, and later ones of the base. No lock is
        taken: it might be that of a path which the caller has locked.
        """
        make_directories(self.base, durable=True)  # like those below it
        try:
            found = calls.stat(self.base)
            root = lockfiles.root_of(self.base)
            calls.close(lockfiles.open_lock_file(lockfiles.lock_file(root, 0)))
        except OSError as error:
            reason = error.strerror or str(error)
            raise FileOperationError(
                os.fsdecode(self.base), "make its locks", error.errno or errno.EIO, reason
            ) from error
        self._rooted = os.path.join(root, lockfiles.DIRECTORY), found.st_dev, found.st_ino

    def level(self, durability: Durability | str | None) -> Durability:
        """The level of an operation: the store's, where it names none. ``none`` means ``atomic``: files are whole."""
        level = self.durability if durability is None else level_of(durability)
        return Durability.ATOMIC if level is Durability.NONE else level

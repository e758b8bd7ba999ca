"""The redo journal: what a transaction is going to do, on disk before it does it, so that anybody can finish it.

    <root>/.ringpool/txn/<id>.lock       held with flock by the transaction, later by whoever recovers it; goes last
                         <id>.<n>.new    the file that effect n will put at its path
                         <id>.<n>.old    a second link to the file that effect n replaces or removes
                         <id>.tmp        the journal on its way
                         <id>.journal    the journal: that it has this name is the commit

    begin -> pin, create, adopt -> commit -> apply -> retire
    id held  .old, .new            |         |        the journal goes, durably, then everything else
                 the one rename, durable     each .new at its path, each directory durable

    journal = "RPJ1" | length u32 | crc32 u32 | msgpack of [[path, staged, replaced], ...]      little endian
        path       bytes, relative to the root, without links in it: the tree may be moved or mounted elsewhere
        staged     whether <id>.<n>.new goes there; else the file goes
        replaced   the inode that stood there at the commit, 0 for none

Recovery of a dead transaction, that is of one whose id can be locked:

    no journal, or a torn one: it never was; away with its files.
    a whole one: what is not done yet of each effect, as follows; then on as above from ``apply``.

    what stands at its path      an effect with a new file               an effect that removes
    nothing                      .new goes there, if it is still here    done
    the inode ``replaced``       .new goes there, if it is still here    it is removed
    anything else                it stays: written after the commit      it stays

An inode number is proof only while the file lives, since file systems give a freed number to the next file. So ``.old``
keeps it alive, from before the commit until no journal can come back. Device numbers change at a reboot, times and
sizes are not durable: neither is recorded. All is on the root's file system, or there is no transaction.

Durability, in the order that it is relied on: the directories of ``.ringpool``; the names that are to be replaced (or a
power cut could bring back others than the journal knows) and the contents of what is moved; staged contents; the names
in ``txn``; the journal's content; its name. A recovery cannot know whether the name was made durable, so it does that
first; nor whether a journal's removal was, so it does that before it lets go of an ``.old``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from itertools import groupby
from typing import Annotated

import msgspec

from ringpool.workers.files.attributes import mount_of
from ringpool.workers.files.durability import close_quietly, make_directories, sync
from ringpool.workers.files.holds import Hold
from ringpool.workers.files.lockfiles import (
    Rights,
    require_trusted,
    rights_of,
    rights_to_share,
    set_rights,
    share,
)
from ringpool.workers.files.naming import random_token
from ringpool.workers.files.oslayer import calls, write_all

DIRECTORY = b".ringpool"
MAGIC = b"RPJ1"
BEFORE, AFTER = "fsync of the directory, before the commit", "fsync of the directory, after it"
IDS_TRIED_MAX = 100

_header = struct.Struct("<4sII")
_file_name = re.compile(rb"([0-9a-f]{16})\.(?:lock|tmp|journal|[0-9]+\.(?:new|old))")
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_READ_BYTES = 1 << 20


class Effect(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a transaction does to one path: see the table above."""

    path: bytes
    staged: bool
    replaced: Annotated[int, msgspec.Meta(ge=0)]


def encode(effects: Sequence[Effect]) -> bytes:
    """A journal's content."""
    record = msgspec.msgpack.encode(effects)
    return _header.pack(MAGIC, len(record), zlib.crc32(record)) + record


def decode(content: bytes) -> list[Effect] | None:
    """The effects that ``content`` names; None where it is not a whole journal, or names a path outside the root."""
    if len(content) < _header.size:
        return None
    magic, length, checksum = _header.unpack_from(content)
    record = content[_header.size :]
    if magic != MAGIC or length != len(record) or checksum != zlib.crc32(record):
        return None
    try:
        effects = msgspec.msgpack.decode(record, type=list[Effect])
    except msgspec.MsgspecError:
        return None
    paths = {effect.path for effect in effects}
    return effects if len(paths) == len(effects) and all(map(_is_inside, paths)) else None


def _is_inside(path: bytes) -> bool:
    return b"\0" not in path and not any(part in (b"", b".", b"..", DIRECTORY) for part in path.split(b"/"))


# ---- one transaction's files -----------------------------------------------------------------------------------------


class Stage(IntEnum):
    """How far it has come."""

    STAGING = 0  # nothing has happened to the files
    IN_DOUBT = 1  # the journal has its name, perhaps not on disk
    COMMITTED = 2


class Journal:
    """The files of one transaction in ``<root>/.ringpool/txn``, and the hold on its id. ``close`` must be called."""

    def __init__(self, root: bytes, txn_fd: int, identity: bytes, hold: Hold, *, durable: bool = True) -> None:
        self.root = root
        self.id = identity
        self.durable = durable
        self.stage = Stage.STAGING
        self.txn_fd = txn_fd
        self._hold = hold
        self._path = txn_directory(root) + b"/" + identity + b".journal"  # for messages

    @classmethod
    def begin(cls, root: bytes, hold: Hold | None = None, *, durable: bool) -> Journal:
        """Take a new id; ``hold`` holds it then, which whoever has made that lets go of. Raises ``OSError``."""
        ours = os.path.join(root, DIRECTORY)
        make_directories(ours, durable=durable)
        require_trusted(root, ours)
        _make_txn_directory(root, durable=durable)
        hold, identity = hold or Hold(), b""
        txn_fd = calls.open(txn_directory(root), DIRECTORY_FLAGS)
        try:
            require_trusted(root, txn_directory(root))
            for _ in range(IDS_TRIED_MAX):
                identity = random_token().encode()
                with suppress(BlockingIOError):  # a recovery was faster, and takes it for dead
                    if hold.take(txn_fd, identity + b".lock", os.O_CREAT | os.O_EXCL):
                        return cls(root, txn_fd, identity, hold, durable=durable)._shared()
            raise OSError(errno.EBUSY, "recoveries take each new transaction for a dead one", txn_directory(root))
        except BaseException:
            if hold.fd is not None:  # Ctrl-C, before its name was anybody's
                with suppress(OSError):
                    calls.unlink(identity + b".lock", dir_fd=txn_fd)
            hold.let_go_surely()
            close_quietly(txn_fd)
            raise

    def _shared(self) -> Journal:
        """Itself, with an id that others may recover; or nothing is left of it."""
        try:
            assert self._hold.fd is not None
            share(self._hold.fd, rights_of(calls.fstat(self.txn_fd)))
        except BaseException:
            try:
                with suppress(OSError):
                    self.discard()
            finally:
                self._hold.let_go_surely()  # whatever comes in between: an id that stays held is never recovered
            raise
        return self

    def new(self, n: int) -> bytes:
        """The name of effect ``n``'s staged file."""
        return b"%b.%d.new" % (self.id, n)

    def old(self, n: int) -> bytes:
        """The name of the second link to what effect ``n`` replaces or removes."""
        return b"%b.%d.old" % (self.id, n)

    def pin(self, n: int, parent_fd: int, name: bytes) -> bool:
        """Keep the file at ``name`` alive until the journal is gone; whether that could be done.

        Where no second link can be made (no hard links on this file system, somebody else's file under
        fs.protected_hardlinks, too many links), it is only kept from its removal on.
        """
        try:
            calls.link(name, self.old(n), src_dir_fd=parent_fd, dst_dir_fd=self.txn_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            return False
        return True

    def create(self, n: int, mode: int) -> int:
        """An open new file for effect ``n``."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return calls.open(self.new(n), flags, mode, dir_fd=self.txn_fd)

    def adopt(self, n: int, parent_fd: int, name: bytes) -> None:
        """Make the file at ``name`` the one that effect ``n`` will put at its path, its content durable."""
        calls.link(name, self.new(n), src_dir_fd=parent_fd, dst_dir_fd=self.txn_fd, follow_symlinks=False)
        if self.durable:
            fd = calls.open(self.new(n), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.txn_fd)
            try:
                sync(fd, self._path, "fsync of a file that is moved")
            finally:
                close_quietly(fd)

    def commit(self, effects: Sequence[Effect]) -> None:
        """Publish the journal; everything else is staged. ``stage`` tells how far it came where this raises."""
        if self.durable:
            for parent, _ in _by_parent(effects):
                self._sync_directory(parent, BEFORE)
            self._sync_txn("fsync of the staged files' directory")
        temp, final = self.id + b".tmp", self.id + b".journal"
        fd = calls.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=self.txn_fd)
        try:
            share(fd, rights_of(calls.fstat(self.txn_fd)), read_only=True)
            write_all(fd, encode(effects))
            if self.durable:
                sync(fd, self._path, "fsync of the journal")
        finally:
            close_quietly(fd)
        self.stage = Stage.IN_DOUBT
        try:
            calls.rename(temp, final, src_dir_fd=self.txn_fd, dst_dir_fd=self.txn_fd)  # the commit
        except OSError:
            self.stage = Stage.STAGING
            raise
        if self.durable:
            self._sync_txn("fsync of the journal's directory")
        self.stage = Stage.COMMITTED

    def apply(self, effects: Sequence[Effect]) -> None:
        """Do what is not yet done of ``effects``, and make it durable. Raises ``OSError``."""
        for parent, members in _by_parent(effects):
            with self._directory(parent) as parent_fd:
                if parent_fd is None:
                    continue  # removed since the commit, with all that was in it
                for n, effect in members:
                    self._redo(n, effect, parent_fd, effect.path.rpartition(b"/")[2])
        if self.durable:
            for parent, _ in _by_parent(effects):  # a rename is on disk with either of its directories
                self._sync_directory(parent, AFTER)

    def _redo(self, n: int, effect: Effect, parent_fd: int, name: bytes) -> None:
        """One effect, by the table above."""
        here = _inode(name, parent_fd)
        if effect.staged:
            if here in (0, effect.replaced) and _inode(self.new(n), self.txn_fd):
                calls.rename(self.new(n), name, src_dir_fd=self.txn_fd, dst_dir_fd=parent_fd)
        elif here and here == effect.replaced:
            if _inode(self.old(n), self.txn_fd) == here:
                calls.unlink(name, dir_fd=parent_fd)
            else:
                calls.rename(name, self.old(n), src_dir_fd=parent_fd, dst_dir_fd=self.txn_fd)

    def retire(self) -> None:
        """All is applied or none will be: away with the journal, then with the other files. Raises ``OSError``."""
        with suppress(FileNotFoundError):
            calls.unlink(self.id + b".journal", dir_fd=self.txn_fd)
        if self.durable:
            self._sync_txn("fsync of the directory of a journal that is done with")
        self.discard()

    def discard(self) -> None:
        """Away with everything but a journal: there is none, nor can one come back. Raises ``OSError``."""
        last = self.id + b".lock"  # whoever waits for it sees that it is over
        found = (os.fsencode(name) for name in calls.listdir(self.txn_fd))
        for name in (*(name for name in found if id_of(name) == self.id and name != last), last):
            with suppress(FileNotFoundError):
                calls.unlink(name, dir_fd=self.txn_fd)

    def recover(self) -> bool:
        """Finish it or drop it, by the table above; whether it was committed. Raises ``OSError``."""
        effects = read(self.txn_fd, self.id)
        if effects is not None:
            self._sync_txn("fsync of a journal's directory, in its recovery")
            self._require_possible(effects)
            self.apply(effects)
        self.retire()
        return effects is not None

    def _require_possible(self, effects: Sequence[Effect]) -> None:
        """Raise ``OSError``, before anything is done, where a recovery may not do it, or could do a part only."""
        mount, found = mount_of(self.txn_fd), lstat_at(self.id + b".journal", self.txn_fd)
        if found is not None and found.st_nlink > 1:
            reason = f"{self.id.decode()}.journal is a link to another file: nobody knows whose it is; remove it"
            raise PermissionError(errno.EPERM, reason)
        author = None if found is None or found.st_uid in (0, os.geteuid()) else found.st_uid
        for parent, _ in _by_parent(effects):
            with self._directory(parent) as parent_fd:
                if parent_fd is None:
                    continue
                directory = os.path.join(self.root, parent)
                if mount_of(parent_fd) != mount:
                    reason = f"{os.fsdecode(directory)} is on another mount here: recover it where both are on one"
                    raise OSError(errno.EXDEV, reason)
                if author is not None:
                    _require_right(author, parent_fd, directory)

    def close(self) -> None:
        """Let go of the id. What is left of its files, recovery takes."""
        self._hold.let_go()
        if self.txn_fd >= 0:
            close_quietly(self.txn_fd)
            self.txn_fd = -1

    @contextmanager
    def _directory(self, relative: bytes) -> Generator[int | None]:
        """The open directory; None where there is none any more."""
        try:
            fd = open_directory(self.root, relative)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            yield None
            return
        try:
            yield fd
        finally:
            close_quietly(fd)

    def _sync_directory(self, relative: bytes, operation: str) -> None:
        with self._directory(relative) as fd:
            if fd is not None:
                sync(fd, os.path.join(self.root, relative), operation)

    def _sync_txn(self, operation: str) -> None:
        sync(self.txn_fd, self._path, operation)


def open_directory(root: bytes, relative: bytes) -> int:
    """The directory at ``relative``, which has no links in it, under ``root``. Raises ``OSError``: ELOOP for a link."""
    fd = calls.open(root, DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
    for part in relative.split(b"/") if relative else ():
        try:
            inner = calls.open(part, DIRECTORY_FLAGS, dir_fd=fd)
        finally:
            close_quietly(fd)
        fd = inner
    return fd


def txn_directory(root: bytes) -> bytes:
    """Where the transactions of ``root`` have their files."""
    return os.path.join(root, DIRECTORY, b"txn")


def read_all(fd: int) -> bytes:
    """Everything from the file's position on."""
    parts: list[bytes] = []
    while part := calls.read(fd, _READ_BYTES):
        parts.append(part)
    return b"".join(parts)


def read(txn_fd: int, identity: bytes) -> list[Effect] | None:
    """The effects of a journal there; None where there is none, or a torn one."""
    try:
        fd = calls.open(identity + b".journal", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=txn_fd)
    except FileNotFoundError:
        return None
    try:
        return decode(read_all(fd))
    finally:
        close_quietly(fd)


def id_of(name: bytes) -> bytes:
    """The id of the transaction that has a file of that name; empty where it is no such file."""
    found = _file_name.fullmatch(name)
    return found[1] if found else b""


def lstat_at(name: bytes, dir_fd: int) -> os.stat_result | None:
    """What is at that name; None for nothing."""
    try:
        return calls.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _inode(name: bytes, dir_fd: int) -> int:
    """The inode at that name, 0 for none."""
    found = lstat_at(name, dir_fd)
    return 0 if found is None else found.st_ino


def _by_parent(effects: Sequence[Effect]) -> Generator[tuple[bytes, list[tuple[int, Effect]]]]:
    """The effects with their numbers, by directory. They are independent of each other, so the order is free."""

    def parent(numbered: tuple[int, Effect]) -> bytes:
        return numbered[1].path.rpartition(b"/")[0]

    for directory, members in groupby(sorted(enumerate(effects), key=parent), key=parent):
        yield directory, list(members)


def _make_txn_directory(root: bytes, *, durable: bool) -> None:
    """Open to whom the root is open for writing, and to nobody else: what is staged may be secret where it goes."""
    txn = txn_directory(root)
    if not calls.access(txn, os.F_OK, effective_ids=True):
        mode, gid = rights_to_share(root)
        shared = sum(7 * (bit >> 1) for bit in (stat.S_IWGRP, stat.S_IWOTH) if mode & bit)
        with suppress(FileExistsError):
            # Where it has the right group at once it has the right mode, too: chmod(2) by somebody who is not in that
            # group, but let in by an ACL, takes the bit away by which what is staged has that group.
            calls.mkdir(txn, 0o700 | (shared if mode & stat.S_ISGID else 0))
            if shared:
                set_rights(txn, Rights(0o700 | shared | mode & (stat.S_ISVTX | stat.S_ISGID), gid))
    make_directories(txn, durable=durable)


def _require_right(author: int, directory_fd: int, directory: bytes) -> None:
    """Raise ``PermissionError`` where that user may make no files: then a journal of his is not of a transaction, and
    who carries it out would do for him what he may not do. Group and ACL are not looked up: whom they let in, may.
    """
    found = calls.fstat(directory_fd)
    if found.st_uid != author and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = (
            f"a journal of user {author} names files in {os.fsdecode(directory)}, where that user may make none: "
            "lock one of them as that user, or remove the journal"
        )
        raise PermissionError(errno.EPERM, reason)

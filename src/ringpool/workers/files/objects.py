"""Contents by address: each stored once, under the digest of its bytes, and never changed.

    add:   bytes, stream or file --a piece at a time--> nameless file in objects/, mode 0444, and blake2b-256
               fsync -> link to objects/<2 digits>/<64 digits> -> fsync of the directory
                                     `-- there is one already: it must have the same size, and is made durable

A killed ``add`` leaves nothing: the kernel frees a file without a name. Where the file system has no such files, it is
written under a staging name. ``link`` never replaces what is there, so that of several that add one content the first
wins, and the others find it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import IO, BinaryIO, NamedTuple, cast

from ringpool.errors import ContentCorruptError, FileMissingError, FileOperationError
from ringpool.workers.files.contained import Contained
from ringpool.workers.files.durability import Durability, close_quietly, sync
from ringpool.workers.files.finding import find
from ringpool.workers.files.naming import check_path, digest_name, encoded, random_staging_name, stream_pieces
from ringpool.workers.files.oslayer import calls, write_all

DIGEST_BYTES = 32
PIECE_BYTES = 1 << 20  # read, hashed and written at once
LINKS_MAX = 100
MODE = 0o444  # less the umask; who makes a file may write to it nevertheless

_digest = re.compile(r"[0-9a-f]{64}")

Source = bytes | bytearray | memoryview | os.PathLike[str] | os.PathLike[bytes] | IO[bytes]


class ContentAddress(NamedTuple):
    """Where a content is: ``digest``, blake2b-256 in 64 hexadecimal digits, and its ``size`` in bytes."""

    digest: str
    size: int

    @property
    def path(self) -> str:
        """The object's path, relative to the base."""
        return _path_of(self.digest)


class VerifyReport(NamedTuple):
    """What ``verify`` found: how many ``objects`` with how many ``content_bytes``, and those that are not whole."""

    objects: int
    content_bytes: int
    corrupt: tuple[ContentCorruptError, ...]


class Objects:
    """The contents below one base. Needs no lock: nothing in it is ever changed."""

    def __init__(self, contained: Contained) -> None:
        self._contained = contained

    def add(self, source: Source, level: Durability) -> ContentAddress:
        """Store the content of ``source``, unless it is there; memory does not grow with it.

        What a stream's ``read`` raises comes through.
        """
        pieces = _pieces(source)
        digest = blake2b(digest_size=DIGEST_BYTES)
        size = 0
        directory = self._contained.open_directory(b"objects", create=True)
        try:
            with self._adding():
                staged = _Staged(directory)
            try:
                for piece in pieces:
                    digest.update(piece)
                    with self._adding():
                        write_all(staged.fd, memoryview(piece))
                    size += len(piece)
                address = ContentAddress(digest.hexdigest(), size)
                with self._adding():
                    if level in (Durability.DATA, Durability.FULL):
                        sync(staged.fd, self._shown(address.path), "fsync")
                    self._publish(staged, address, level)
                return address
            finally:
                staged.close()
        finally:
            close_quietly(directory)

    @contextmanager
    def _adding(self) -> Generator[None]:
        """For each step of ``add`` but reading the source, whose errors are not ours."""
        try:
            yield
        except FileOperationError:
            raise
        except OSError as error:
            raise self._failed("objects", "add", error) from error

    def _publish(self, staged: _Staged, address: ContentAddress, level: Durability) -> None:
        parent, name = self._contained.open_parent(address.path, create=True, follow=False)
        try:
            for _ in range(LINKS_MAX):
                try:
                    staged.link(parent, name)
                    break
                except FileExistsError:
                    if self._is_duplicate(parent, name, address, level):
                        break
            else:
                raise FileNotFoundError(errno.ENOENT, "made and removed again and again")
            if level is Durability.FULL:
                sync(parent, self._shown(address.path), "fsync of its directory")
        finally:
            close_quietly(parent)

    def _is_duplicate(self, parent: int, name: bytes, address: ContentAddress, level: Durability) -> bool:
        """Whether the object is still there. Who made it may not have come to its fsync yet, or not want one."""
        try:
            fd = calls.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            return False
        try:
            self._check_size(fd, address)
            if level in (Durability.DATA, Durability.FULL):
                sync(fd, self._shown(address.path), "fsync of the one that is there")
        finally:
            close_quietly(fd)
        return True

    def open(self, address: ContentAddress | str) -> BinaryIO:
        """The content, for reading. Raises ``FileMissingError``, and ``ContentCorruptError`` for a wrong size."""
        digest = _digest_of(address)
        path = _path_of(digest)
        try:
            parent, name = self._contained.open_parent(path, follow=False)
            try:
                fd = calls.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            finally:
                close_quietly(parent)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise FileMissingError(os.fsdecode(self._shown(path)), "open") from None
            raise self._failed(path, "open", error) from error
        try:
            self._check_size(fd, address if isinstance(address, ContentAddress) else None, path)
            return os.fdopen(fd, "rb")
        except BaseException:
            close_quietly(fd)
            raise

    def _check_size(self, fd: int, address: ContentAddress | None, path: str | None = None) -> None:
        path = path or cast("ContentAddress", address).path
        found = calls.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise self._corrupt(path, "it is no regular file")
        if address is not None and found.st_size != address.size:
            raise self._corrupt(path, f"it has {found.st_size:,} bytes, and its content has {address.size:,}")

    def verify(self, addresses: Iterable[ContentAddress | str]) -> VerifyReport:
        """Read the objects at ``addresses``, or all of them where there are none, and compare their digests."""
        named = list(addresses)
        corrupt: list[ContentCorruptError] = []
        objects = content_bytes = 0
        for address in named or self._digests():
            try:
                content_bytes += self._verify(address)
            except FileMissingError:
                if named:
                    raise
                continue  # removed meanwhile
            except ContentCorruptError as error:
                corrupt.append(error)
            objects += 1
        return VerifyReport(objects, content_bytes, tuple(corrupt))

    def _verify(self, address: ContentAddress | str) -> int:
        """The bytes of one object. Raises ``ContentCorruptError``."""
        digest, size = blake2b(digest_size=DIGEST_BYTES), 0
        with self.open(address) as file:
            while piece := calls.read(file.fileno(), PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
        if digest.hexdigest() != _digest_of(address):
            raise self._corrupt(_path_of(_digest_of(address)), "its bytes have another digest")
        return size

    def _digests(self) -> Iterator[str]:
        for path in find(self._contained, "objects/[0-9a-f][0-9a-f]/*"):
            _, shard, name = path.split("/")
            if _digest.fullmatch(name) and name.startswith(shard):
                yield name

    def _shown(self, path: str) -> bytes:
        return os.path.join(self._contained.base, encoded(path))

    def _corrupt(self, path: str, reason: str) -> ContentCorruptError:
        return ContentCorruptError(os.fsdecode(self._shown(path)), "verify", errno.EBADMSG, reason)

    def _failed(self, path: str, operation: str, error: OSError) -> FileOperationError:
        reason = error.strerror or str(error)
        return FileOperationError(os.fsdecode(self._shown(path)), operation, error.errno or errno.EIO, reason)


class _Staged:
    """A file that is written and has no final name yet; none at all, where the file system can do that."""

    __slots__ = ("_directory", "_name", "fd")

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._name: bytes | None = None
        try:
            if not calls.access(b"/proc/self/fd", os.F_OK):  # link(2) finds the file there
                raise OSError(errno.EOPNOTSUPP, "no /proc")
            self.fd = calls.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE, dir_fd=directory)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
            name = random_staging_name(b"")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = calls.open(name, flags, MODE, dir_fd=directory)
            self._name = name

    def link(self, parent: int, name: bytes) -> None:
        """Give it a name in the directory ``parent``. Raises ``FileExistsError``; replaces nothing."""
        if self._name is None:
            # With dst_dir_fd Python calls linkat(2) with AT_SYMLINK_FOLLOW; without it link(2), which takes the link in
            # /proc for the file, and fails with EXDEV.
            calls.link(b"/proc/self/fd/%d" % self.fd, name, dst_dir_fd=parent, follow_symlinks=True)
        else:
            calls.link(self._name, name, src_dir_fd=self._directory, dst_dir_fd=parent, follow_symlinks=False)

    def close(self) -> None:
        """Remove its staging name, if it has one. Its last name keeps it."""
        try:
            if self._name is not None:
                calls.unlink(self._name, dir_fd=self._directory)
        except OSError:
            pass  # it stays, hidden; the caller's own error matters more
        finally:
            close_quietly(self.fd)


# ---- sources and addresses -------------------------------------------------------------------------------------------


def _pieces(source: Source) -> Iterator[bytes | memoryview]:
    """The content of ``source``, a piece at a time. Raises ``TypeError`` at once where it is none."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        view = memoryview(source)
        view = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
        return (view[begin : begin + PIECE_BYTES] for begin in range(0, len(view), PIECE_BYTES))
    if isinstance(source, os.PathLike):
        return _file_pieces(encoded(source))
    if callable(getattr(source, "read", None)):
        return stream_pieces(source, PIECE_BYTES)
    kind = type(source).__name__
    raise TypeError(f"content must be bytes, a binary stream or a Path, not {kind}; give text as text.encode()")


def _file_pieces(path: bytes) -> Iterator[bytes]:
    fd = -1
    try:
        check_path(path)
        fd = calls.open(path, os.O_RDONLY | os.O_CLOEXEC)
        while piece := calls.read(fd, PIECE_BYTES):
            yield piece
    except FileOperationError:
        raise
    except FileNotFoundError:
        raise FileMissingError(os.fsdecode(path), "read") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileOperationError(os.fsdecode(path), "read", error.errno or errno.EIO, reason) from error
    finally:
        if fd >= 0:
            close_quietly(fd)


def _digest_of(address: ContentAddress | str) -> str:
    digest = address.digest if isinstance(address, ContentAddress) else address
    if not _digest.fullmatch(digest):
        raise ValueError(f"a content's address has 64 hexadecimal digits; {digest!r} is none")
    return digest


def _path_of(digest: str) -> str:
    return f"objects/{digest_name(bytes.fromhex(digest))}"

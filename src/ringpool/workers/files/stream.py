"""A file that is written piece by piece and appears whole: what ``atomic_open`` gives.

    open --------- write, seek, truncate, ... --------- commit ------> the new content stands
      |                         |                         | an error of flush, fsync, close or rename
      |                         | an error of any write   v
      '------ discard, an exception in the block, or nobody refers to it any more ------> dropped; the old one stands

    text     AtomicTextFile, an io.TextIOWrapper --> io.BufferedWriter --> _Temporary --> oslayer.calls
    bytes                   AtomicBinaryFile, an io.BufferedWriter ------> _Temporary --> oslayer.calls

Whatever wraps the file may close it, as another ``TextIOWrapper`` does: that flushes, and ends the writing; the end of
the block commits. An error of writing is kept, even if who wrote has swallowed it, and then nothing can be committed.
In the child of a fork the file takes no more bytes, and ends nothing: it is the parent's.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.replacement import Replacement
from ringpool.workers.files.target import failed

BUFFER_BYTES = 1 << 17


class _Temporary(io.RawIOBase):
    """The temporary file, without a buffer. Closing it ends the writing; the descriptor stays for the commit."""

    def __init__(self, one: Replacement) -> None:
        super().__init__()
        self.one = one
        self.pid = os.getpid()
        self.is_torn = False  # a write failed, or was interrupted: what it wrote is not known
        self.is_settled = False  # committed or discarded

    def write(self, octets: Any, /) -> int:
        if self.is_settled or os.getpid() != self.pid:
            return memoryview(octets).nbytes  # a buffer that is emptied at its end; nobody wants it any more
        before, self.is_torn = self.is_torn, True
        try:
            count = calls.write(self.one.fd, octets)
            if count <= 0:
                raise OSError(errno.EIO, "the file takes no more bytes")
        except OSError as error:
            if error.errno == errno.EINTR:
                self.is_torn = before  # nothing was written, and the buffer tries again
            raise failed(self.one.path, "write", error) from error
        self.is_torn = before
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return calls.lseek(self._open_fd(), offset, whence)
        except OSError as error:
            raise failed(self.one.path, "seek", error) from error

    def truncate(self, size: int | None = None, /) -> int:
        size = self.tell() if size is None else size
        try:
            calls.ftruncate(self._open_fd(), size)
        except OSError as error:
            raise failed(self.one.path, "truncate", error) from error
        return size

    def fileno(self) -> int:
        return self._open_fd()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _open_fd(self) -> int:
        if self.closed or self.one.fd < 0:
            raise ValueError("I/O operation on closed file")
        return self.one.fd

    def commit(self, flush: Callable[[], None]) -> None:
        """Flush, finish, publish. Raises what the steps raise; then nothing is left."""
        if self.is_settled:
            raise ValueError(f"{os.fsdecode(self.one.path)}: it is committed or discarded already")
        one = self.one
        try:
            try:
                if os.getpid() != self.pid:
                    raise OSError(errno.EBADF, "it was opened before a fork, by another process")
                one.step = "write"
                flush()
                if self.is_torn:
                    raise OSError(errno.EIO, "an earlier write of it failed")
                one.finish()
                one.publish()
                self.is_settled = True
            except BaseException:
                self.discard()
                raise
        except BaseException as error:
            self.discard()  # again: see Replacement
            one.give_up(error)
            raise
        one.leave_directory()

    def discard(self) -> None:
        """Remove the temporary file, if it is this process's. Never raises an ``OSError``."""
        if os.getpid() != self.pid:
            self.one.temp = None
        self.one.drop()
        self.is_settled = True
        self.one.close()


class _Ends(io.IOBase):
    """How both kinds of file end."""

    _temporary: _Temporary

    def commit(self) -> None:
        """Make what was written the content of the file, whole; then this is closed.

        Raises ``AtomicWriteError`` or ``DurabilityError``, as ``atomic_write`` does; ``ValueError`` where it was
        committed or discarded before.
        """
        self._temporary.commit(self._flush)
        self.close()

    def discard(self) -> None:
        """Drop what was written; the old content stands. Nothing happens where it was discarded or committed before."""
        self._temporary.discard()
        self.close()

    def _flush(self) -> None:
        if not self.closed:
            self.flush()

    def _end(self, error: BaseException | None) -> None:
        if self._temporary.is_settled:
            return
        if error is None:
            self.commit()
        else:
            self.discard()

    def _warn(self) -> None:
        """Nobody refers to it any more."""
        temporary = getattr(self, "_temporary", None)
        if temporary is None or temporary.is_settled:
            return
        is_ours = os.getpid() == temporary.pid
        self.discard()
        if is_ours:
            shown = os.fsdecode(temporary.one.path)
            warnings.warn(f"{shown}: neither committed nor discarded; dropped", ResourceWarning, 2, source=self)


class AtomicBinaryFile(_Ends, io.BufferedWriter):
    """A binary file for writing that appears at its commit (the end of a ``with`` block), whole or not at all."""

    def __init__(self, one: Replacement) -> None:
        temporary = _Temporary(one)
        super().__init__(temporary, BUFFER_BYTES)
        self._temporary = temporary

    def __enter__(self) -> AtomicBinaryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def __del__(self) -> None:
        self._warn()


class AtomicTextFile(_Ends, io.TextIOWrapper):
    """A text file for writing that appears at its commit (the end of a ``with`` block), whole or not at all."""

    def __init__(self, one: Replacement, encoding: str, errors: str | None, newline: str | None) -> None:
        temporary = _Temporary(one)
        super().__init__(io.BufferedWriter(temporary, BUFFER_BYTES), encoding, errors, newline)
        self._temporary = temporary

    def __enter__(self) -> AtomicTextFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def __del__(self) -> None:
        self._warn()

"""Errors of operations on files, and of their locks."""

from __future__ import annotations

import errno
import os

from ringpool.errors.base import RingpoolError


class FileOperationError(RingpoolError, OSError):
    """An operation on one file failed.

    Attributes: ``path`` (str), ``operation`` (str, the step), and those of ``OSError`` (``errno``, ``filename``).
    """

    def __init__(self, path: str | os.PathLike[str], operation: str, error: int, reason: str) -> None:
        OSError.__init__(self, error, reason, os.fspath(path))
        self.path = os.fspath(path)
        self.operation = operation
        self.reason = reason

    def __reduce__(self) -> tuple[type[FileOperationError], tuple[str, str, int, str], dict[str, object]]:
        # The dictionary: notes, and what subclasses add, whose further arguments therefore have defaults.
        return type(self), (self.path, self.operation, self.errno or 0, self.reason), self.__dict__

    def __str__(self) -> str:
        return f"{self.path}: {self.operation}: {self.reason}"


class AtomicWriteError(FileOperationError):
    """The target was not replaced: what stood there still stands, and no temporary file is left."""


class TargetExistsError(AtomicWriteError, FileExistsError):
    """The target is there, and was to be made: ``exclusive``, or the mode ``"x"``. ``errno`` is EEXIST."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        operation: str = "make the file",
        error: int = errno.EEXIST,
        reason: str = os.strerror(errno.EEXIST),
    ) -> None:
        super().__init__(path, operation, error, reason)


class DurabilityError(FileOperationError):
    """fsync failed. It is not retried, since the kernel may have dropped the pages that it could not write."""


class BatchWriteError(FileOperationError):
    """A batch of writes ended early, at the file that it names; its cause is the error of that file.

    Attributes: those of ``FileOperationError``, and of the files in their order: the first ``n_durable`` (int) have
    their new content, with all that was asked for; those up to ``n_visible`` (int) have it, perhaps not for ever; all
    later ones are as they were.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        operation: str,
        error: int,
        reason: str,
        n_durable: int = 0,
        n_visible: int = 0,
    ) -> None:
        super().__init__(path, operation, error, reason)
        self.n_durable = n_durable
        self.n_visible = n_visible

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.n_durable} files of the batch are written: go on after them"


class PathNameError(FileOperationError):
    """A path that can name no file here: empty, with a NUL byte, too long, or a name that ringpool keeps for itself."""

    def __str__(self) -> str:
        shown = self.path.replace("\0", "\\0") or "''"
        return f"{shown}: {self.operation}: {self.reason}"


class PathOutsideError(FileOperationError):
    """A path leads out of the directory that it is relative to: by ``..``, a leading slash, or a symbolic link."""


class TransactionError(FileOperationError):
    """The transaction was not committed: every file of it is as it was."""

    remedy = ""

    def __str__(self) -> str:
        return f"{super().__str__()}; nothing of the transaction was done" + (f"; {self.remedy}" if self.remedy else "")


class TransactionConflictError(TransactionError):
    """A file that the transaction had read was changed before it could lock it."""

    remedy = "read again and try again, or hold a LockSet on its files from before the first read"


class CrossDeviceError(TransactionError):
    """A file of the transaction is on another file system, or under another mount, than its journal would be."""

    remedy = "use a transaction for each file system, with a base in it and no .ringpool directory above that"


class TransactionInDoubtError(FileOperationError):
    """The fsync that commits failed: the transaction stands whole or not at all, but nobody can tell yet which.

    Whoever locks one of its files next finishes it; a power cut before that may undo it.
    """

    def __str__(self) -> str:
        return f"{super().__str__()}; the transaction is in doubt: lock one of its files, then look at it"


class CommittedWithErrors(FileOperationError):  # noqa: N818  (its point is that all is well)
    """The transaction is committed and stands, whole; a step after that failed. Do not run it again.

    Attributes: those of ``FileOperationError``, and ``finished`` (bool): whether it was rolled forward to its end. Else
    whoever locks one of its files next does that.
    """

    def __init__(
        self, path: str | os.PathLike[str], operation: str, error: int, reason: str, finished: bool = False
    ) -> None:
        super().__init__(path, operation, error, reason)
        self.finished = finished

    def __str__(self) -> str:
        rest = "and finished" if self.finished else "and whoever locks one of its files next finishes it"
        return f"{super().__str__()}; the transaction is committed, {rest}: do not run it again"


class FileMissingError(FileOperationError, FileNotFoundError):
    """There is no file of that name. ``errno`` is ENOENT."""

    def __init__(
        self, path: str | os.PathLike[str], operation: str, error: int = errno.ENOENT, reason: str = "no such file"
    ) -> None:
        super().__init__(path, operation, error, reason)


class ContentCorruptError(FileOperationError):
    """Stored content is not what its address says: the disk or somebody changed it. Remove it, and add it again."""


class ErrorLogError(FileOperationError):
    """An error could not be recorded. What was recorded before stands, and no part of the new record."""


class LockTimeoutError(RingpoolError, TimeoutError):
    """A path's lock was not had in time.

    Attributes: ``path`` (str), ``holder`` (str, who had it, as far as can be told), ``waited_s`` (float).
    """

    def __init__(self, path: str, holder: str, waited_s: float) -> None:
        RingpoolError.__init__(self, path, holder, waited_s)
        self.path = path
        self.holder = holder
        self.waited_s = waited_s

    def __str__(self) -> str:
        return f"{self.path}: not locked after {self.waited_s:.3g} s; held by {self.holder}"


class LockUpgradeError(RingpoolError):
    """The owner of a shared lock wants it exclusive. Two who did so would wait for each other for ever.

    Attributes: ``path`` (str); ``shared`` (str), the path that is held shared: another one, where both have one lock
    file, as about every 256th pair of paths has.
    """

    def __init__(self, path: str, shared: str | None = None) -> None:
        super().__init__(path, shared)
        self.path = path
        self.shared = path if shared is None else shared

    def __str__(self) -> str:
        if self.shared != self.path:
            return (
                f"{self.path}: its lock file is also that of {self.shared}, which the same thread or task holds "
                "shared and cannot have exclusive as well; take a LockSet of both in exclusive mode, or release that "
                "one before"
            )
        return (
            f"{self.path}: held shared by the same thread or task, which cannot have it exclusive as well; take it "
            "exclusive from the start, or release it before"
        )

"""Every error that ringpool raises.

    RingpoolError
      SegmentError               shared memory: the segment at a name is not one that we may use
        SegmentMissingError        there is none
        SegmentPermissionError     it belongs to another user
        SegmentIncompleteError     its creator has not finished it, or died before it had
        SegmentFormatError         it is no segment of ours, or one of another version or machine
        SegmentTruncatedError      it is shorter than its header says
        SegmentBusyError           its coordinator lives
        SharedMemoryFullError      /dev/shm has no room for it
      LockBrokenError            a mutex in shared memory can neither be had nor mended
      FunctionError              the task function, before anything is queued
        UnknownFunctionError       it cannot be found by its name
        ParameterError             a parameter does not fit its annotations
      InputMissingError          an input file is not there (also a FileNotFoundError)
      OutputCollisionError       two inputs map to one output
      OutputPatternError         a pattern for outputs cannot be used
      OutputMissingError         a task function ended without writing its output
      WorkerDiedError            the worker died while it ran this task (also a BrokenProcessPool)
        MemoryLimitError           it was killed, because it held more memory than it may
      TaskTimeoutError           the task ran longer than it may, and its worker was killed (also a TimeoutError)
      TaskInDoubtError           the worker died while it committed, and the disk does not tell how far it got
      RemoteError                a worker's exception that cannot travel between processes, in words
      ArgumentTransportError     a call's arguments cannot be rebuilt in the worker (also a BrokenProcessPool)
      ResultTransportError       a result that cannot travel between processes (also a BrokenProcessPool)
      PoolError                  the pool as a whole
        CoordinatorClosedError     it is closed
        CrashLoopError             workers die before they take a first task (also a BrokenProcessPool)
        InitializerError           the pool's initializer raised in a worker (also a BrokenProcessPool)
        MainModuleError            a worker came to it while it imported the program's main module
        WrongProcessError          it was made by another process, before a fork
        WrongThreadError           it cannot be closed in a future's callback
      FileOperationError         ``workers.files``: an operation on one file (also an OSError)
        AtomicWriteError           the target was not replaced; its old content stands
        BatchWriteError            a batch ended early; so many of its files stand
        DurabilityError            the kernel could not promise that it is on disk
        PathNameError              a path that can name no file here
        PathOutsideError           it leads out of the directory that it is relative to
        TransactionError           nothing of a transaction was done
          TransactionConflictError   a file that it had read was changed meanwhile
          CrossDeviceError           a file of it is on another file system than its base
        TransactionInDoubtError    it stands whole or not at all, but which of both cannot be told yet
        CommittedWithErrors        it stands, whole; a step after its commit failed
        FileMissingError           there is no such file (also a FileNotFoundError)
        ContentCorruptError        stored content is not what its address says
        ErrorLogError              an error could not be recorded
      LockTimeoutError           a path's lock was not had in time (also a TimeoutError)
      LockUpgradeError           its owner holds a path's lock shared, and wants it exclusive
      StatusTableError           ``shm.status``: a file status table
        StatusTableFullError       it has no room for another path, or for that many bytes
        StatusHeldError            a living process has the path
        StatusStepError            a state that does not follow from the one it has
        StatusReentryError         it was called by what had interrupted one of its own operations
      StatusTimeoutError         a path did not become available in time (also a TimeoutError)

The facts of an error are its ``args`` and attributes of the same names, so that it survives pickle and can be handled
by a program; ``str()`` makes the sentence, which names the thing and the remedy.
"""

from __future__ import annotations

import errno
import os
import signal as signals
from concurrent.futures.process import BrokenProcessPool


class RingpoolError(Exception):
    """The root of ringpool's errors: catch it to catch all of them."""


# ---- shared memory -------------------------------------------------------------------------------------------------


class SegmentError(RingpoolError):
    """The segment ``name`` cannot be used; ``reason`` says why.

    Attributes: ``name`` (str), ``reason`` (str).
    """

    remedy = ""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"shared memory segment {self.name}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


class SegmentMissingError(SegmentError):
    """There is no segment of that name: it was removed, or the name is wrong."""


class SegmentPermissionError(SegmentError):
    """The segment belongs to another user. Nothing was read from it."""

    remedy = "attach as the user who made it"


class SegmentIncompleteError(SegmentError):
    """The segment has no magic number yet: readiness is published last, so its creator is at work or died."""

    remedy = "try again while its creator lives; the next start removes it when it is dead"


class SegmentFormatError(SegmentError):
    """The segment is not in this build's format: foreign bytes, another version, another kind of machine."""

    remedy = "use the version of ringpool that made it"


class SegmentTruncatedError(SegmentError):
    """The segment is shorter than its header says: somebody cut it. It was not mapped."""

    remedy = "remove it; what it held is lost"


class SegmentBusyError(SegmentError):
    """The segment's coordinator is alive, so that nobody else may take it over."""

    remedy = "end that process first"


class SharedMemoryFullError(SegmentError):
    """``/dev/shm`` had no room. Nothing of the segment is left there."""

    remedy = "free space in /dev/shm, enlarge it (docker run --shm-size), or ask for less"


class LockBrokenError(RingpoolError):
    """The mutex can neither be had nor mended; the caller must leave it as it is and end.

    Attributes: ``error`` (int, errno of the pthread call), ``reason`` (str).
    """

    def __init__(self, error: int, reason: str) -> None:
        super().__init__(error, reason)
        self.error = error
        self.reason = reason

    def __str__(self) -> str:
        return f"a lock in shared memory is broken: {self.reason} ({os.strerror(self.error)})"


# ---- task functions, inputs and outputs ----------------------------------------------------------------------------


class FunctionError(RingpoolError):
    """A task function cannot be used. Nothing was queued.

    Attributes: ``function`` (str, ``module:qualname``), ``reason`` (str).
    """

    def __init__(self, function: str, reason: str) -> None:
        super().__init__(function, reason)
        self.function = function
        self.reason = reason

    def __str__(self) -> str:
        return f"task function {self.function}: {self.reason}"


class UnknownFunctionError(FunctionError):
    """No function is found by that name, or the function has no name that another process could find it by."""


class ParameterError(FunctionError):
    """A parameter is unknown, missing or of the wrong type."""


class InputMissingError(RingpoolError, FileNotFoundError):
    """An input is not there. Attributes: those of ``FileNotFoundError``; ``filename`` is the path."""

    def __init__(self, path: str) -> None:
        FileNotFoundError.__init__(self, errno.ENOENT, "input file not found", path)

    def __reduce__(self) -> tuple[type[InputMissingError], tuple[str], dict[str, object]]:
        return type(self), (self.filename,), self.__dict__

    def __str__(self) -> str:
        return f"input file not found: {self.filename}"


class OutputCollisionError(RingpoolError):
    """Two inputs map to one output.

    Attributes: ``output``, ``first``, ``second`` (str): the paths of the output and of the two inputs.
    """

    def __init__(self, output: str, first: str, second: str) -> None:
        super().__init__(output, first, second)
        self.output = output
        self.first = first
        self.second = second

    def __str__(self) -> str:
        return (
            f"two inputs map to the output {self.output}: {self.first} and {self.second}; "
            "use a pattern that tells them apart, such as one with {relpath}"
        )


class OutputMissingError(RingpoolError):
    """A task function returned without having written its output.

    Attributes: ``output`` (str, the path that was to appear), ``staged`` (str, the ``dst`` of the function).
    """

    def __init__(self, output: str, staged: str, reason: str = "was not written") -> None:
        super().__init__(output, staged, reason)
        self.output = output
        self.staged = staged
        self.reason = reason

    def __str__(self) -> str:
        remedy = f"the task function must write a regular file at its dst ({self.staged})"
        return f"output {self.output} {self.reason}: {remedy}"


# ---- running tasks ---------------------------------------------------------------------------------------------------


def words_of(value: object) -> str:
    """``str(value)``. An exception's own ``__str__`` may fail; who reports it must not."""
    try:
        return str(value)
    except Exception as error:
        return f"({type(value).__qualname__} that cannot be shown: {type(error).__qualname__})"


def signal_name(number: int) -> str:
    """The name of signal ``number``, or ``signal N`` where the platform gives it none."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


class WorkerDiedError(RingpoolError, BrokenProcessPool):
    """The worker died while it ran this task, as often as the task may be tried. No other task was harmed.

    Attributes: ``signal`` (int, or None where the worker exited by itself), ``exitcode`` (int, or None where unknown),
    ``pid`` (int, of the last worker that died), ``task`` (str, what it was running), ``deaths`` (int, how many workers
    died in it). Raised for a task, never for its neighbours and never for the pool.
    """

    def __init__(self, signal: int | None, exitcode: int | None, pid: int, task: str, deaths: int) -> None:
        super().__init__(signal, exitcode, pid, task, deaths)
        self.signal = signal
        self.exitcode = exitcode
        self.pid = pid
        self.task = task
        self.deaths = deaths

    def __str__(self) -> str:
        if self.signal is not None:
            how = f"was killed by {signal_name(self.signal)}"
        elif self.exitcode is not None:
            how = f"exited with status {self.exitcode}"
        else:
            how = "died"
        return f"worker {self.pid} {how} while it ran {self.task} (a worker died in this task {_times(self.deaths)})"


class MemoryLimitError(WorkerDiedError):
    """The worker held more memory than the pool's ``memory_limit`` while it ran this task, and was killed.

    Attributes: those of ``WorkerDiedError``, and ``limit_bytes`` (int) of memory that is the worker's own,
    ``peak_rss_bytes`` (int): the largest resident size that the kernel saw in the worker's life, shared pages and
    mapped files included.
    """

    def __init__(
        self,
        signal: int | None,
        exitcode: int | None,
        pid: int,
        task: str,
        deaths: int,
        limit_bytes: int,
        peak_rss_bytes: int,
    ) -> None:
        super().__init__(signal, exitcode, pid, task, deaths)
        self.args = (*self.args, limit_bytes, peak_rss_bytes)
        self.limit_bytes = limit_bytes
        self.peak_rss_bytes = peak_rss_bytes

    def __str__(self) -> str:
        return (
            f"worker {self.pid} was killed while it ran {self.task}: it held more than the {self.limit_bytes:,} bytes "
            f"of memory_limit (peak RSS {self.peak_rss_bytes:,}); raise the limit, or give the task less at a time "
            f"(a worker died in this task {_times(self.deaths)})"
        )


class TaskTimeoutError(RingpoolError, TimeoutError):
    """The task ran longer than its timeout, as often as it may be tried. Its worker was killed; no other was harmed.

    Attributes: ``timeout_s`` (float), ``task`` (str, what was running), ``pid`` (int, of the last worker that was
    killed), ``deaths`` (int, how many workers died in it).
    """

    def __init__(self, timeout_s: float, task: str, pid: int, deaths: int) -> None:
        RingpoolError.__init__(self, timeout_s, task, pid, deaths)
        self.timeout_s = timeout_s
        self.task = task
        self.pid = pid
        self.deaths = deaths

    def __str__(self) -> str:
        return (
            f"{self.task}: not done after {self.timeout_s:.3g} s, so its worker {self.pid} was killed; give it a "
            f"longer timeout, or find out what it waits for (a worker died in this task {_times(self.deaths)})"
        )


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


class TaskInDoubtError(RingpoolError):
    """The worker died while it committed this task's output, and the disk does not tell whether it got there.

    The task was not run again, because its effect may stand. Attributes: ``task`` (str), ``output`` (str).
    """

    def __init__(self, task: str, output: str) -> None:
        super().__init__(task, output)
        self.task = task
        self.output = output

    def __str__(self) -> str:
        return (
            f"{self.task}: its worker died while it put the output {self.output} in place, and something else has "
            "since changed that path; look at it, then run the task again"
        )


class RemoteError(RingpoolError):
    """An exception of a worker that cannot be pickled, or not rebuilt here: its type, message and traceback.

    Attributes: ``type_name``, ``message``, ``traceback`` (str).
    """

    def __init__(self, type_name: str, message: str, traceback: str) -> None:
        super().__init__(type_name, message, traceback)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message} (the exception itself cannot travel between processes)"


class ArgumentTransportError(RingpoolError, BrokenProcessPool):
    """A call was not made: what was sent for it cannot be rebuilt in the worker.

    A ``BrokenProcessPool``, because ``ProcessPoolExecutor`` breaks at that. Attributes: ``type_name`` (str, of the
    exception), ``reason`` (str, its message).
    """

    def __init__(self, type_name: str, reason: str) -> None:
        super().__init__(type_name, reason)
        self.type_name = type_name
        self.reason = reason

    def __str__(self) -> str:
        return f"the call's arguments cannot be rebuilt in the worker: {self.type_name}: {self.reason}"


class ResultTransportError(RingpoolError, BrokenProcessPool):
    """A task ended well, and its return value cannot travel: pickle refuses it, or it cannot be rebuilt here.

    A ``BrokenProcessPool``, because ``ProcessPoolExecutor`` breaks at what it cannot rebuild.

    Attributes: ``type_name`` (str, of the value), ``reason`` (str).
    """

    def __init__(self, type_name: str, reason: str) -> None:
        super().__init__(type_name, reason)
        self.type_name = type_name
        self.reason = reason

    def __str__(self) -> str:
        return f"the task's return value, of type {self.type_name}, cannot travel between processes: {self.reason}"


# ---- the pool --------------------------------------------------------------------------------------------------------


class PoolError(RingpoolError):
    """The pool as a whole cannot do what was asked."""


class CoordinatorClosedError(PoolError):
    """The coordinator is closed, or closes. Make a new one."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return "the coordinator is closed; make a new one to run more tasks"


class CrashLoopError(PoolError, BrokenProcessPool):
    """Workers die before they take a first task, one after the other: replacing them would never end.

    Attributes: ``deaths`` (int, in a row), ``signal`` (int or None) and ``exitcode`` (int or None) of the last one.
    """

    def __init__(self, deaths: int, signal: int | None, exitcode: int | None) -> None:
        super().__init__(deaths, signal, exitcode)
        self.deaths = deaths
        self.signal = signal
        self.exitcode = exitcode

    def __str__(self) -> str:
        how = f"by {signal_name(self.signal)}" if self.signal is not None else f"with exit status {self.exitcode}"
        return (
            f"{self.deaths} workers in a row died before they took a task, the last one {how}; the pool is stopped. "
            "What they printed on standard error says why; often the main module cannot be imported by a worker "
            '(guard its top-level code with `if __name__ == "__main__":`)'
        )


class InitializerError(PoolError, BrokenProcessPool):
    """The pool's initializer raised in a worker, and so no worker can run a task.

    Attributes: ``message`` (str, the exception in a line), ``traceback`` (str, of the worker).
    """

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message, traceback)
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"the initializer raised in a worker: {self.message}\n\n{self.traceback}"


class MainModuleError(PoolError):
    """A worker that imported the program's main module came to a pool's making there: without end, were it let."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return (
            "a worker imports the program's main module, and must not make a pool there; "
            'put what the program does under `if __name__ == "__main__":`'
        )


class WrongProcessError(PoolError):
    """The coordinator belongs to the process that made it; this one is a fork of it.

    Attributes: ``owner_pid``, ``pid`` (int).
    """

    def __init__(self, owner_pid: int, pid: int) -> None:
        super().__init__(owner_pid, pid)
        self.owner_pid = owner_pid
        self.pid = pid

    def __str__(self) -> str:
        return f"this coordinator belongs to process {self.owner_pid}, and this is {self.pid}; make one after the fork"


class WrongThreadError(PoolError):
    """``close`` was called in a future's callback, which runs in the thread that ``close`` has to wait for."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return "a coordinator cannot be closed in a future's callback; close it where it was made, or in another thread"


# ---- files -----------------------------------------------------------------------------------------------------------


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

    Attributes: ``path`` (str).
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return (
            f"{self.path}: held shared by the same thread or task, which cannot have it exclusive as well; take it "
            "exclusive from the start, or release it before"
        )


class StatusTableError(RingpoolError):
    """A file status table cannot do what was asked. Nothing was changed."""


class StatusTableFullError(StatusTableError):
    """A file status table has no room left for this.

    Attributes: ``table`` (str, its name), ``capacity`` (int, paths), ``reason`` (str, what it ran out of).
    """

    def __init__(self, table: str, capacity: int, reason: str) -> None:
        super().__init__(table, capacity, reason)
        self.table = table
        self.capacity = capacity
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"status table {self.table}, made for {self.capacity:,} paths, is full: {self.reason}; "
            "remove paths that are no longer needed, or unlink it and make a larger one"
        )


class StatusHeldError(StatusTableError):
    """A living process has the path: nobody else may change it.

    Attributes: ``path`` (str), ``state`` (str, the name of its state), ``pid`` (int, of its owner).
    """

    def __init__(self, path: str, state: str, pid: int) -> None:
        super().__init__(path, state, pid)
        self.path = path
        self.state = state
        self.pid = pid

    def __str__(self) -> str:
        return f"{self.path} is {self.state} by process {self.pid}, which lives; wait for it with wait_available"


class StatusStepError(StatusTableError):
    """A path's state cannot become the wanted one.

    Attributes: ``path`` (str), ``state`` (str, its state, or "missing"), ``wanted`` (str).
    """

    def __init__(self, path: str, state: str, wanted: str) -> None:
        super().__init__(path, state, wanted)
        self.path = path
        self.state = state
        self.wanted = wanted

    def __str__(self) -> str:
        return f"{self.path} is {self.state}, and cannot become {self.wanted} from there; claim it first"


class StatusReentryError(StatusTableError):
    """A signal handler or a finalizer used the table while it had interrupted another use of it in the same thread.

    Attributes: ``table`` (str).
    """

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table

    def __str__(self) -> str:
        return (
            f"status table {self.table}: used by a signal handler or finalizer in the midst of another use; "
            "set a flag there, and act on it later"
        )


class StatusTimeoutError(RingpoolError, TimeoutError):
    """A path did not become available in time.

    Attributes: ``path`` (str), ``pid`` (int, of the process that has it), ``waited_s`` (float).
    """

    def __init__(self, path: str, pid: int, waited_s: float) -> None:
        RingpoolError.__init__(self, path, pid, waited_s)
        self.path = path
        self.pid = pid
        self.waited_s = waited_s

    def __str__(self) -> str:
        return f"{self.path}: not available after {self.waited_s:.3g} s; process {self.pid} has it, and lives"


class OutputPatternError(RingpoolError):
    """A pattern for outputs cannot be used, or not for this input.

    Attributes: ``pattern`` (str), ``reason`` (str).
    """

    def __init__(self, pattern: str, reason: str) -> None:
        super().__init__(pattern, reason)
        self.pattern = pattern
        self.reason = reason

    def __str__(self) -> str:
        return f"output pattern {self.pattern!r}: {self.reason}"

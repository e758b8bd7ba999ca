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
        SharedMemoryUnusableError  /dev/shm is not there, or not writable
      LockBrokenError            a mutex in shared memory can neither be had nor mended
      FunctionError              the task function, before anything is queued
        UnknownFunctionError       it cannot be found by its name
        ParameterError             a parameter does not fit its annotations
      InputMissingError          an input file is not there (also a FileNotFoundError)
      OutputCollisionError       two inputs map to one output
      OutputPatternError         a pattern for outputs cannot be used
      OutputMissingError         a task function ended without writing its output
      FunctionChangedError       a worker has another task function than its job
      InputChangedError          an input was changed while its task ran
      ListError                  a list or manifest of inputs cannot be read
      CommandTemplateError       a command template cannot be used
      CommandError               a command did not end well
      JobError                   a batch job as a whole
        JobMissingError            there is none in that directory
        JobBusyError               another process runs one there
        LedgerError                its ledger cannot be used
      BenchmarkError             there is nothing to measure
      WorkerDiedError            the worker died while it ran this task (also a BrokenProcessPool)
        MemoryLimitError           it was killed, because it held more memory than it may
      TaskTimeoutError           the task ran longer than it may, and its worker was killed (also a TimeoutError)
      TaskInDoubtError           the worker died while it committed, and the disk does not tell how far it got
      RemoteError                a worker's exception that cannot travel between processes, in words
      ArgumentTransportError     what was sent for a call cannot be rebuilt in the worker (also a BrokenProcessPool)
      ResultTransportError       a result that cannot travel between processes (also a BrokenProcessPool)
      PoolError                  the pool as a whole
        CoordinatorClosedError     it is closed
          ExecutorEndedError         an executor's, with what it still ran (also a BrokenProcessPool)
        CrashLoopError             workers die before they take a first task (also a BrokenProcessPool)
        InitializerError           the pool's initializer raised in a worker (also a BrokenProcessPool)
        ThreadStartError           the system gives this process no more threads (also a BrokenProcessPool)
        MainModuleError            a worker that imported the main module came to it (also a BrokenProcessPool)
        WorkingDirectoryError      the current directory was removed, or may not be entered
        MonkeyPatchedError         gevent or eventlet have replaced modules that it needs
        DaemonicProcessError       a process of multiprocessing that may have none of its own came to it
        WrongProcessError          it was made by another process, before a fork
        WrongThreadError           a future's callback would wait for it, in its own thread
      FileOperationError         ``workers.files``: an operation on one file (also an OSError)
        AtomicWriteError           the target was not replaced; its old content stands
          TargetExistsError          it was to be made, and is there (also a FileExistsError)
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

import importlib
from typing import TYPE_CHECKING

from ringpool.errors.base import (
    RingpoolError as RingpoolError,
    add_note as add_note,
    signal_name as signal_name,
    words_of as words_of,
)
from ringpool.errors.files import (
    AtomicWriteError as AtomicWriteError,
    BatchWriteError as BatchWriteError,
    CommittedWithErrors as CommittedWithErrors,
    ContentCorruptError as ContentCorruptError,
    CrossDeviceError as CrossDeviceError,
    DurabilityError as DurabilityError,
    ErrorLogError as ErrorLogError,
    FileMissingError as FileMissingError,
    FileOperationError as FileOperationError,
    LockTimeoutError as LockTimeoutError,
    LockUpgradeError as LockUpgradeError,
    PathNameError as PathNameError,
    PathOutsideError as PathOutsideError,
    TargetExistsError as TargetExistsError,
    TransactionConflictError as TransactionConflictError,
    TransactionError as TransactionError,
    TransactionInDoubtError as TransactionInDoubtError,
)
from ringpool.errors.memory import (
    LockBrokenError as LockBrokenError,
    SegmentBusyError as SegmentBusyError,
    SegmentError as SegmentError,
    SegmentFormatError as SegmentFormatError,
    SegmentIncompleteError as SegmentIncompleteError,
    SegmentMissingError as SegmentMissingError,
    SegmentPermissionError as SegmentPermissionError,
    SegmentTruncatedError as SegmentTruncatedError,
    SharedMemoryFullError as SharedMemoryFullError,
    SharedMemoryUnusableError as SharedMemoryUnusableError,
    StatusHeldError as StatusHeldError,
    StatusReentryError as StatusReentryError,
    StatusStepError as StatusStepError,
    StatusTableError as StatusTableError,
    StatusTableFullError as StatusTableFullError,
    StatusTimeoutError as StatusTimeoutError,
)
from ringpool.errors.tasks import (
    CoordinatorClosedError as CoordinatorClosedError,
    DaemonicProcessError as DaemonicProcessError,
    FunctionError as FunctionError,
    InputMissingError as InputMissingError,
    MonkeyPatchedError as MonkeyPatchedError,
    OutputCollisionError as OutputCollisionError,
    OutputMissingError as OutputMissingError,
    OutputPatternError as OutputPatternError,
    ParameterError as ParameterError,
    PoolError as PoolError,
    RemoteError as RemoteError,
    TaskInDoubtError as TaskInDoubtError,
    TaskTimeoutError as TaskTimeoutError,
    UnknownFunctionError as UnknownFunctionError,
    WorkingDirectoryError as WorkingDirectoryError,
    WrongProcessError as WrongProcessError,
    WrongThreadError as WrongThreadError,
)

if TYPE_CHECKING:
    from ringpool.errors.broken import (
        ArgumentTransportError as ArgumentTransportError,
        CrashLoopError as CrashLoopError,
        ExecutorEndedError as ExecutorEndedError,
        InitializerError as InitializerError,
        MainModuleError as MainModuleError,
        MemoryLimitError as MemoryLimitError,
        ResultTransportError as ResultTransportError,
        ThreadStartError as ThreadStartError,
        WorkerDiedError as WorkerDiedError,
    )
    from ringpool.errors.jobs import (
        BenchmarkError as BenchmarkError,
        CommandError as CommandError,
        CommandTemplateError as CommandTemplateError,
        FunctionChangedError as FunctionChangedError,
        InputChangedError as InputChangedError,
        JobBusyError as JobBusyError,
        JobError as JobError,
        JobMissingError as JobMissingError,
        LedgerError as LedgerError,
        ListError as ListError,
    )

_LAZY = {
    name: module
    for module, names in {
        "broken": (
            "ArgumentTransportError CrashLoopError ExecutorEndedError InitializerError MainModuleError "
            "MemoryLimitError ResultTransportError ThreadStartError WorkerDiedError"
        ),
        "jobs": (
            "BenchmarkError CommandError CommandTemplateError FunctionChangedError InputChangedError JobBusyError "
            "JobError JobMissingError LedgerError ListError"
        ),
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

"""ringpool: a worker pool for batch work over files that can be killed anywhere, and resumed.

The public names. Each is imported when it is first used: a program pays for what it takes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ringpool import startup as startup  # before everything else

if TYPE_CHECKING:
    from ringpool.bench.own import (
        benchmark as benchmark,
    )
    from ringpool.coordinator.coordinator import (
        Coordinator as Coordinator,
        CoordinatorStats as CoordinatorStats,
        FileTask as FileTask,
    )
    from ringpool.coordinator.engines import (
        register_joblib_backend as register_joblib_backend,
    )
    from ringpool.coordinator.executor import (
        ExecutorStats as ExecutorStats,
        ExecutorView as ExecutorView,
        RingPoolExecutor as RingPoolExecutor,
        TaskOptions as TaskOptions,
        WorkerExit as WorkerExit,
    )
    from ringpool.coordinator.filerun import (
        FileResult as FileResult,
        FileRun as FileRun,
    )
    from ringpool.coordinator.futures import (
        TaskFuture as TaskFuture,
    )
    from ringpool.coordinator.inputs import (
        InputFile as InputFile,
    )
    from ringpool.coordinator.job import (
        Job as Job,
        JobOptions as JobOptions,
        Report as Report,
    )
    from ringpool.errors import (
        AtomicWriteError as AtomicWriteError,
        BatchWriteError as BatchWriteError,
        CommittedWithErrors as CommittedWithErrors,
        DurabilityError as DurabilityError,
        FileMissingError as FileMissingError,
        FileOperationError as FileOperationError,
        LockTimeoutError as LockTimeoutError,
        RingpoolError as RingpoolError,
        StatusTimeoutError as StatusTimeoutError,
        TargetExistsError as TargetExistsError,
        TransactionConflictError as TransactionConflictError,
        TransactionError as TransactionError,
        TransactionInDoubtError as TransactionInDoubtError,
        WorkerDiedError as WorkerDiedError,
    )
    from ringpool.shm.status import (
        FileState as FileState,
        FileStatus as FileStatus,
        FileStatusTable as FileStatusTable,
        unlink_status_table as unlink_status_table,
    )
    from ringpool.workers.files.aiostore import (
        AsyncFileStore as AsyncFileStore,
    )
    from ringpool.workers.files.asynclocks import (
        AsyncPathLock as AsyncPathLock,
    )
    from ringpool.workers.files.atomic import (
        atomic_open as atomic_open,
        atomic_write as atomic_write,
    )
    from ringpool.workers.files.batch import (
        BatchReport as BatchReport,
        write_batch as write_batch,
    )
    from ringpool.workers.files.contained import (
        Contained as Contained,
    )
    from ringpool.workers.files.durability import (
        Durability as Durability,
    )
    from ringpool.workers.files.errorlog import (
        ErrorLog as ErrorLog,
    )
    from ringpool.workers.files.locks import (
        LockSet as LockSet,
        PathLock as PathLock,
    )
    from ringpool.workers.files.naming import (
        content_name as content_name,
        unique_name as unique_name,
    )
    from ringpool.workers.files.objects import (
        ContentAddress as ContentAddress,
    )
    from ringpool.workers.files.resources import (
        ResourceStats as ResourceStats,
        resource_stats as resource_stats,
    )
    from ringpool.workers.files.store import (
        FileStore as FileStore,
    )
    from ringpool.workers.files.transaction import (
        FileTransaction as FileTransaction,
        snapshot as snapshot,
    )
    from ringpool.workers.retry import (
        RetryPolicy as RetryPolicy,
        retrying as retrying,
    )

__version__ = "0.1.0"

_HOMES = {
    name: home
    for home, names in {
        "bench.own": "benchmark",
        "coordinator.coordinator": "Coordinator CoordinatorStats FileTask",
        "coordinator.engines": "register_joblib_backend",
        "coordinator.executor": "ExecutorStats ExecutorView RingPoolExecutor TaskOptions WorkerExit",
        "coordinator.filerun": "FileResult FileRun",
        "coordinator.futures": "TaskFuture",
        "coordinator.inputs": "InputFile",
        "coordinator.job": "Job JobOptions Report",
        "errors": (
            "AtomicWriteError BatchWriteError CommittedWithErrors DurabilityError FileMissingError "
            "FileOperationError LockTimeoutError RingpoolError StatusTimeoutError TargetExistsError "
            "TransactionConflictError TransactionError TransactionInDoubtError WorkerDiedError "
        ),
        "shm.status": "FileStatus FileStatusTable FileState unlink_status_table",
        "workers.files.aiostore": "AsyncFileStore",
        "workers.files.atomic": "atomic_open atomic_write",
        "workers.files.batch": "BatchReport write_batch",
        "workers.files.contained": "Contained",
        "workers.files.durability": "Durability",
        "workers.files.errorlog": "ErrorLog",
        "workers.files.asynclocks": "AsyncPathLock",
        "workers.files.locks": "LockSet PathLock",
        "workers.files.naming": "content_name unique_name",
        "workers.files.objects": "ContentAddress",
        "workers.files.resources": "ResourceStats resource_stats",
        "workers.files.store": "FileStore",
        "workers.files.transaction": "FileTransaction snapshot",
        "workers.retry": "RetryPolicy retrying",
    }.items()
    for name in names.split()
}
# Computed, so that no name stands here three times; a type checker takes the imports above, and a test compares both.
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOMES[name]}"
    value = getattr(importlib.import_module(home), name)
    startup.homes_used.add(home)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

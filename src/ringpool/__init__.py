"""ringpool: a worker pool for batch work over files that can be killed anywhere, and resumed."""

from __future__ import annotations

from ringpool.coordinator.coordinator import (
    Coordinator,
    CoordinatorStats,
    FileResult,
    FileRun,
    FileTask,
    TaskFuture,
)
from ringpool.errors import RingpoolError, WorkerDiedError
from ringpool.workers.files.atomic import Durability, atomic_write
from ringpool.workers.files.locks import PathLock

__version__ = "0.1.0"

__all__ = [
    "Coordinator",
    "CoordinatorStats",
    "Durability",
    "FileResult",
    "FileRun",
    "FileTask",
    "PathLock",
    "RingpoolError",
    "TaskFuture",
    "WorkerDiedError",
    "atomic_write",
]

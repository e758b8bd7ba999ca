"""Errors for which ``concurrent.futures`` has a ``BrokenProcessPool``. Apart, because importing that imports much."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

from ringpool.errors.base import RingpoolError, signal_name
from ringpool.errors.tasks import CoordinatorClosedError, PoolError, times


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
        return f"worker {self.pid} {how} while it ran {self.task} (a worker died in this task {times(self.deaths)})"


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
            f"(a worker died in this task {times(self.deaths)})"
        )


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
        return f"the call's function or arguments cannot be rebuilt in the worker: {self.type_name}: {self.reason}"


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


class CrashLoopError(PoolError, BrokenProcessPool):
    """Workers die before they take a first task, one after the other: replacing them would never end.

    Attributes: ``deaths`` (int, in a row), ``signal`` (int or None) and ``exitcode`` (int or None) of the last one;
    ``not_started`` (str): why that one could not even be started, or empty.
    """

    def __init__(self, deaths: int, signal: int | None, exitcode: int | None, not_started: str = "") -> None:
        super().__init__(deaths, signal, exitcode, not_started)
        self.deaths = deaths
        self.signal = signal
        self.exitcode = exitcode
        self.not_started = not_started

    def __str__(self) -> str:
        if self.not_started:
            return (
                f"{self.deaths} times in a row a worker could not be started, or died before it took a task; the pool "
                f"is stopped. The last one could not be started: {self.not_started}"
            )
        how = f"by {signal_name(self.signal)}" if self.signal is not None else f"with exit status {self.exitcode}"
        return (
            f"{self.deaths} workers in a row died before they took a task, the last one {how}; the pool is stopped. "
            "What they printed on standard error says why; often the main module cannot be imported by a worker "
            '(guard its top-level code with `if __name__ == "__main__":`), or the pool\'s initializer ends its process'
        )


class MainModuleError(PoolError, BrokenProcessPool):
    """A worker that imported the program's main module came to a pool's making there: without end, were it let."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return (
            "a worker imports the program's main module, and must not make a pool there; "
            'put what the program does under `if __name__ == "__main__":`'
        )


class ThreadStartError(PoolError, BrokenProcessPool):
    """The system gave this process no further thread, and a pool has two. Nothing of it is left.

    Attributes: ``reason`` (str).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        remedy = "look at the limits of processes (ulimit -u, pids.max of a container) and of memory (ulimit -v)"
        if "shutdown" in self.reason:
            remedy = "its program ends: give a pool its first task before the main thread has ended"
        return f"the threads of the pool cannot be started: {self.reason}; {remedy}"


class ExecutorEndedError(CoordinatorClosedError, BrokenProcessPool):
    """The executor was ended before this task was done: by ``kill_workers``, Ctrl-C, or with its program.

    A ``BrokenProcessPool``, because ``ProcessPoolExecutor`` breaks when its workers are killed.
    """

    def __str__(self) -> str:
        return "the executor was ended before this task was done; make a new one to run more tasks"


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

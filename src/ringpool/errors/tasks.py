"""Errors of tasks, their functions, inputs and outputs, and of the pool."""

from __future__ import annotations

import errno
import os

from ringpool.errors.base import RingpoolError


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
        if os.path.realpath(self.first) == os.path.realpath(self.second):
            return f"{self.first} is listed twice, or two of its outputs are the same: {self.output}"
        return (
            f"two inputs map to the output {self.output}: {self.first} and {self.second}; "
            "use a pattern that tells them apart: with {relpath}; where they are called the same below several "
            "sources, with {index}, or name the directory above these as the source"
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
            f"longer timeout, or find out what it waits for (a worker died in this task {times(self.deaths)})"
        )


def times(n: int) -> str:
    """``n`` times, in words."""
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


class PoolError(RingpoolError):
    """The pool as a whole cannot do what was asked."""


class CoordinatorClosedError(PoolError):
    """The coordinator is closed, or closes. Make a new one."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return "the coordinator is closed; make a new one to run more tasks"


class DaemonicProcessError(PoolError, AssertionError):
    """A daemonic process of ``multiprocessing``, such as a worker of its ``Pool``, may have no processes of its own.

    It is an ``AssertionError``, as ``multiprocessing`` itself raises.
    """

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return (
            "daemonic processes are not allowed to have children, and workers are that; make the pool in the program, "
            "or run this in a process that is not daemonic"
        )


class MonkeyPatchedError(PoolError):
    """A library has replaced modules by which a pool's threads and its program wait for each other: its threads are
    greenlets, of which one that waits in C holds up all.

    Attributes: ``library``, ``module`` (str): one of those modules.
    """

    def __init__(self, library: str, module: str) -> None:
        super().__init__(library, module)
        self.library = library
        self.module = module

    def __str__(self) -> str:
        return (
            f"{self.library} has replaced this process's {self.module} module, and a pool would hang; make the pool in "
            f"a process in which {self.library} patches nothing (a program of its own, that this one starts or asks)"
        )


class WorkingDirectoryError(PoolError):
    """Workers begin in the program's current directory, and it was removed, or this user may not enter it.

    Attributes: ``reason`` (str).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the current directory {self.reason}, and workers begin in it; go to another one first (cd, os.chdir)"


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
    """A future's callback would wait for its pool, and runs in the thread that it would wait for.

    Attribute: ``action`` (str), what it may not do.
    """

    def __init__(self, action: str) -> None:
        super().__init__(action)
        self.action = action

    def __str__(self) -> str:
        return (
            f"a future's callback cannot {self.action}: it runs in the pool's own thread, which would wait for itself; "
            "do that where the pool was made, or in another thread"
        )


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

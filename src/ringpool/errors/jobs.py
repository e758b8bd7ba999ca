"""Errors of batch jobs: their inputs, commands and ledgers. Imported when one of them is first used."""

from __future__ import annotations

from ringpool.errors.base import RingpoolError, signal_name


class InputChangedError(RingpoolError):
    """An input was changed while its task ran, as often as it was tried: what was made of it may be neither of both.

    Attributes: ``path`` (str), ``attempts`` (int).
    """

    def __init__(self, path: str, attempts: int) -> None:
        super().__init__(path, attempts)
        self.path = path
        self.attempts = attempts

    def __str__(self) -> str:
        return (
            f"input {self.path} was changed while its task ran, {self.attempts} times out of {self.attempts}; nothing "
            "of it was put in its place: run the job again when nobody writes to the file any more"
        )


class FunctionChangedError(RingpoolError):
    """A worker that was started while a job ran has imported another task function than the job began with: its module
    was edited meanwhile. The job stops.

    Attributes: ``function`` (str, its name).
    """

    def __init__(self, function: str) -> None:
        super().__init__(function)
        self.function = function

    def __str__(self) -> str:
        return (
            f"task function {self.function} was changed while the job ran; run the job again: what the former one has "
            "made is done anew"
        )


class ListError(RingpoolError):
    """A list or manifest of inputs cannot be read, or a line of it.

    Attributes: ``path`` (str, ``-`` for standard input), ``line`` (int, from 1; 0: the whole), ``reason`` (str).
    """

    def __init__(self, path: str, line: int, reason: str) -> None:
        super().__init__(path, line, reason)
        self.path = path
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        where = f"{self.path}, line {self.line}" if self.line else self.path
        return f"list of inputs {where}: {self.reason}"


class CommandTemplateError(RingpoolError):
    """A command template cannot be used. Attributes: ``template`` (str), ``reason`` (str)."""

    def __init__(self, template: str, reason: str) -> None:
        super().__init__(template, reason)
        self.template = template
        self.reason = reason

    def __str__(self) -> str:
        return f"command {self.template!r}: {self.reason}"


class CommandError(RingpoolError):
    """A command did not end well.

    Attributes: ``command`` (str, as the shell got it), ``exit_status`` (int; negative: killed by that signal),
    ``stderr_tail`` (str, the last of what it wrote to standard error).
    """

    def __init__(self, command: str, exit_status: int, stderr_tail: str) -> None:
        super().__init__(command, exit_status, stderr_tail)
        self.command = command
        self.exit_status = exit_status
        self.stderr_tail = stderr_tail

    @property
    def signal(self) -> int | None:
        """The signal that killed it, if one did."""
        return -self.exit_status if self.exit_status < 0 else None

    def __str__(self) -> str:
        number = self.signal
        how = f"exit status {self.exit_status}" if number is None else f"killed by {signal_name(number)}"
        said = f": {self.stderr_tail.strip()}" if self.stderr_tail.strip() else " and nothing on standard error"
        return f"{how}{said} (command: {self.command})"


class JobError(RingpoolError):
    """A batch job as a whole cannot do what was asked."""


class JobMissingError(JobError):
    """There is no job there. Attributes: ``directory`` (str), ``reason`` (str)."""

    def __init__(self, directory: str, reason: str) -> None:
        super().__init__(directory, reason)
        self.directory = directory
        self.reason = reason

    def __str__(self) -> str:
        return f"no job in {self.directory}: {self.reason}"


class JobBusyError(JobError):
    """Another process runs a job there. Attributes: ``directory`` (str), ``pid`` (int, 0: not known)."""

    def __init__(self, directory: str, pid: int) -> None:
        super().__init__(directory, pid)
        self.directory = directory
        self.pid = pid

    def __str__(self) -> str:
        who = f"process {self.pid}" if self.pid else "another process"
        return f"{self.directory}: {who} runs a job there; wait for its end, or stop it, then run this one again"


class LedgerError(JobError):
    """A ledger cannot be used. Attributes: ``path`` (str), ``reason`` (str)."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"ledger {self.path}: {self.reason}"


class BenchmarkError(RingpoolError):
    """There is nothing to measure: every call has failed, or the inputs are gone.

    Attributes: ``function``, ``reason`` (str).
    """

    def __init__(self, function: str, reason: str) -> None:
        super().__init__(function, reason)
        self.function = function
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.function} cannot be measured: {self.reason}"

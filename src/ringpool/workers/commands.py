"""Commands as task functions: a template, see ``templates``, is run for each file by a shell.

    template -- values in the environment --> shell, and all that it starts -- exit status 0 --> value, or output
                                                                            -- any other  --> CommandError

``a | b`` ends as b does. With ``shell="/bin/bash"``, ``set -o pipefail; a | b`` fails where a does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping

from ringpool.errors import CommandError, CommandTemplateError
from ringpool.workers.descriptor import out_of_the_way
from ringpool.workers.templates import parsed, variable_of

OUTPUT_BYTES_MAX = 1 << 20  # of standard output, where that is the task's value
TAIL_BYTES = 4096  # of what is kept for an error
LINGER_S = 1.0  # for what a command has left running: >(gzip > x) has yet to write its end
KILL_ROUNDS_MAX = 100  # it may fork meanwhile
VAIN_ROUNDS_MAX = 3  # that find nobody: what ended by itself may have started another while one looked
will_be: dict[bytes, bytes] = {}  # where outputs will be that are written elsewhere first, for the command of an error
peak_rss_bytes = 0
"""The largest resident size among the processes of the last command; 0 before the first. At least that of this process:
Linux counts the moment before the shell's program took the place of its own. Source: getrusage(2), ``ru_maxrss``."""


def run_command(
    src: bytes,
    dst: bytes | dict[str, bytes] | None = None,
    *,
    template: str,
    fields: dict[str, str] | None = None,
    shell: str = "/bin/sh",
    environment: dict[str, str] | None = None,
) -> str | None:
    """Run ``template`` for ``src``. Without ``dst``: its standard output, less the newlines at its end; else None.

    ``fields``: those that the path does not tell. ``environment``: variables, beside this process's own. Standard input
    is empty. Bytes that are not UTF-8 are shown as ``\\xff``. Of standard error, and with ``dst`` of output, the end is
    kept for an error. What the command leaves running has ``LINGER_S`` to end, and is killed then, unless it has closed
    all it inherited, or was given an environment of its own.

    Raises ``CommandTemplateError``; ``CommandError`` where the exit status is not 0, or standard output is more than
    1 MiB. A status of 128 + n is the shell's for a command that signal n has ended, one of several in the template.
    """
    command = parsed(template)
    values = _values(src, dst, fields or {})
    command.check(values)
    variables = {os.fsencode(name): os.fsencode(value) for name, value in (environment or {}).items()}
    variables |= {variable_of(field).encode(): values[field] for field in command.fields}
    run = _Run(None if dst is not None else OUTPUT_BYTES_MAX)
    try:
        run.start([shell, "-c", os.fsencode(command.script)], variables)
        run.attend()
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise CommandTemplateError(template, f"its shell {shell}: {error.strerror}; name one that is there") from None
    finally:
        run.end()
    if run.is_too_long or run.exit_status:
        shown = {field: will_be.get(value, value) for field, value in values.items()}
        raise CommandError(command.command_with(shown), run.exit_status, run.tail())
    return None if dst is not None else _text(run.out.kept.rstrip(b"\n"))


def _values(src: bytes, dst: bytes | dict[str, bytes] | None, fields: Mapping[str, str]) -> dict[str, bytes]:
    """The value of each field that there is."""
    outputs = {f"dst.{name}": path for name, path in dst.items()} if isinstance(dst, dict) else {"dst": dst}
    name = os.path.basename(src)
    stem, suffix = os.path.splitext(name)
    known = {field: os.fsencode(value) for field, value in fields.items()}
    known |= {field: path for field, path in outputs.items() if path is not None}
    return known | {"src": src, "name": name, "stem": stem, "suffix": suffix}


def _text(raw: bytes | bytearray) -> str:
    """As text that can be encoded again, whatever it is."""
    return raw.decode(errors="backslashreplace")


class _Pipe:
    """A pipe from the command. ``kept``: the end of what came, at least its last ``keep_bytes``, at most twice that."""

    def __init__(self, keep_bytes: int) -> None:
        self.n_bytes = 0
        self.kept = bytearray()
        self._keep_bytes = keep_bytes
        self.reader = self.writer = -1

    def open(self) -> None:
        self.reader, self.writer = os.pipe()
        self.status = os.fstat(self.reader)

    def take(self) -> bool:
        """Read what there is; False at the end."""
        chunk = os.read(self.reader, 1 << 16)
        self.n_bytes += len(chunk)
        self.kept += chunk
        if len(self.kept) > 2 * self._keep_bytes:
            del self.kept[: len(self.kept) - self._keep_bytes]
        return bool(chunk)

    def tail(self) -> str:
        """The last of it, from the beginning of a character on."""
        last = self.kept[-TAIL_BYTES:]
        return _text(last if self.n_bytes == len(last) else last.lstrip(bytes(range(0x80, 0xC0))))


class _Run:
    """A command under way: start -> attend, until it has ended or written too much -> end, in any case.

    Three pipes: ``out``, standard error, and one that nobody writes to. Whatever the command starts inherits that one:
    its end says that nothing is left running, not even what has redirected all its output. Who is left is known by a
    variable, the mark. A process that is just taking on a program shows no environment yet: it is known by that pipe.
    """

    def __init__(self, out_bytes_max: int | None) -> None:
        self.exit_status = 0
        self.is_too_long = False
        self._out_bytes_max = out_bytes_max
        self._err = _Pipe(TAIL_BYTES)
        self.out = self._err if out_bytes_max is None else _Pipe(out_bytes_max)
        self._lifeline = _Pipe(0)
        self._lifeline_at = -1  # its writer's number in the command
        self._mark = b"RINGPOOL_COMMAND_" + os.urandom(8).hex().encode()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_ended = False
        self._pidfd = -1
        self._poll = select.poll()
        self._open: dict[int, _Pipe] = {}

    def start(self, arguments: list[str | bytes], variables: dict[bytes, bytes]) -> None:
        """Start it, in this process's group, which is killed when this process is."""
        try:
            for pipe in {self._err, self.out, self._lifeline}:
                pipe.open()
                self._open[pipe.reader] = pipe
                self._poll.register(pipe.reader, select.POLLIN)
            self._lifeline_at = out_of_the_way(self._lifeline.writer)  # of a command that says exec 4>file
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=self.out.writer,
                stderr=self._err.writer,
                pass_fds=(self._lifeline_at,),
                env={**os.environb, **variables, self._mark: b"1"},
            )
        finally:
            for descriptor in (*(pipe.writer for pipe in self._open.values()), self._lifeline_at):
                if descriptor >= 0:
                    os.close(descriptor)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._poll.register(self._pidfd, select.POLLIN)

    def attend(self) -> None:
        """Read what it writes, until it has ended, or has written too much."""
        while not self._has_ended and not self.is_too_long:
            self._read(None)

    def _read(self, timeout_s: float | None) -> None:
        for fd, _ in self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            if fd == self._pidfd:
                self._has_ended = True
                self._poll.unregister(fd)
            elif not self._open[fd].take():
                self._close(fd)
        self.is_too_long = self._out_bytes_max is not None and self.out.n_bytes > self._out_bytes_max

    def _close(self, reader: int) -> None:
        self._poll.unregister(reader)
        del self._open[reader]
        os.close(reader)

    def end(self) -> None:
        """Kill it if it has not ended, then what it has left running; and let go of all."""
        try:
            is_well = self._has_ended
            try:
                if self._process is not None:  # what was interrupted in the midst of starting it may have started it
                    self._reap(self._process)
            finally:
                self._settle(LINGER_S if is_well else 0.0)
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
            for reader in list(self._open):
                self._close(reader)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        global peak_rss_bytes
        if not self._has_ended:
            os.kill(process.pid, signal.SIGKILL)  # Popen.kill may reap it, and its usage with it
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = self.exit_status = os.waitstatus_to_exitcode(status)
        peak_rss_bytes = usage.ru_maxrss << 10

    def _settle(self, patience_s: float) -> None:
        """Read on until nobody is left who could write; after ``patience_s``, or an interrupt, see to it."""
        deadline = time.monotonic() + patience_s
        try:
            self._read(0)
            while self._open and not self.is_too_long and (left_s := deadline - time.monotonic()) > 0:
                self._read(left_s)
        finally:
            self._end_all()

    def _end_all(self) -> None:
        n_vain = 0
        for _ in range(KILL_ROUNDS_MAX):
            if not self._open or n_vain == VAIN_ROUNDS_MAX:
                break
            n_vain = 0 if self._kill_all() else n_vain + 1
            self._read(0.05)

    def _kill_all(self) -> int:
        """Kill the processes that are this command's; how many there were."""
        n_killed, me = 0, os.getpid()
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            with contextlib.suppress(OSError):  # it has ended, or is somebody else's
                if pid != me and self._has(pid):
                    pidfd = os.pidfd_open(pid)
                    try:
                        if self._has(pid):  # still the same
                            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                            n_killed += 1
                    finally:
                        os.close(pidfd)
        return n_killed

    def _has(self, pid: int) -> bool:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            environment = file.read()
        if b"=" in environment:  # not amid exec, nor written over with a title for ps, as perl's $0 = "..." does
            return self._mark in environment
        return os.path.samestat(os.stat(f"/proc/{pid}/fd/{self._lifeline_at}"), self._lifeline.status)

    def tail(self) -> str:
        """What is to be said of it in an error."""
        if self.is_too_long:
            return (
                f"more than {OUTPUT_BYTES_MAX:,} bytes on standard output; give the task an --out, and write to {{dst}}"
            )
        return self._err.tail() or self.out.tail()

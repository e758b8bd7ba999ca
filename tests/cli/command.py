"""Runs the real command as its users do: in a pipe, or in a terminal whose screen can be looked at."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TASKS = "tests.cli.tasks"
WATCHDOG_S = 30
COMMAND_MAX_S = 120  # of commands that measure something, and of any on a busy machine
_PROGRESS = re.compile(r"^ringpool: so far .*\n", re.MULTILINE)
_TOKENS = re.compile(r"\x1b\[\??([\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def environment(**more: str) -> dict[str, str]:
    """Ours, with the task functions to be found from any directory."""
    search_path = [str(ROOT), *map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search_path), **more}


def start(
    *words: str | Path,
    cwd: Path | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    process_group: int | None = None,
    **more: str,
) -> subprocess.Popen[str]:
    """The command, started in ``cwd``, or else the current directory. ``process_group`` 0: in one of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ringpool", *map(str, words)],
        cwd=cwd,
        env=environment(**more),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
        errors="surrogateescape",
        process_group=process_group,
        # Where a shell runs the tests in the background, they ignore SIGINT, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(command: subprocess.Popen[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """What came of it. Lines of progress are left out: on a busy machine what takes a moment has some."""
    with command:
        try:
            out, err = command.communicate(stdin, timeout=COMMAND_MAX_S)
        finally:
            command.kill()
    assert "Traceback" not in (err or "")
    return subprocess.CompletedProcess(command.args, command.returncode, out, err and _PROGRESS.sub("", err))


def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command, from its start to its end."""
    return finish(start(*words, cwd=cwd))


def run_redirected(how: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, its streams where a shell sends them: ``>&-`` closes standard output."""
    script = f'exec "$0" -m ringpool "$@" {how}'
    arguments = ["/bin/sh", "-c", script, sys.executable, *map(str, words)]
    pipe = subprocess.PIPE
    return finish(subprocess.Popen(arguments, env=environment(), stdout=pipe, stderr=pipe, text=True))


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Its lines of JSON."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        select.select([], [], [], 0.01)


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def segments_of(pid: int) -> set[Path]:
    """The files in /dev/shm that process ``pid`` has mapped."""
    return {Path(name) for name in re.findall(r"(/dev/shm/\S+)", Path(f"/proc/{pid}/maps").read_text())}


class Screen:
    """What a terminal shows, as far as it takes for what rich writes: text, line ends, cursor up, lines erased."""

    def __init__(self) -> None:
        self.lines = [""]
        self.frames: list[str] = []
        self.written = b""
        self._row = self._column = 0

    @property
    def text(self) -> str:
        """All of it, without what is empty at its end."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip()

    def write(self, written: bytes) -> None:
        """Show ``written``; what was shown before each erased line is kept in ``frames``."""
        self.written += written
        for count, code, end, text in _TOKENS.findall(written.decode(errors="replace")):
            if code == "K":
                if not self.frames or self.frames[-1] != self.text:
                    self.frames.append(self.text)
                self.lines[self._row] = ""
            elif code == "A":
                self._row = max(0, self._row - int(count or 1))
            elif end == "\r":
                self._column = 0
            elif end == "\n":
                self._row += 1
                self._column = 0
                if self._row == len(self.lines):
                    self.lines.append("")
            elif text:
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + text + line[self._column + len(text) :]
                self._column += len(text)


def _take_terminal() -> None:
    """Have the terminal at standard input for one's own, so that Ctrl-C comes from it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The command in a terminal of its own, to type Ctrl-C into. A context manager; ``screen``: what it shows."""

    def __init__(self, *words: str | Path, cwd: Path | None = None, columns: int = 100) -> None:
        self.screen = Screen()
        variables = environment(TERM="xterm", COLUMNS=str(columns), LINES="30")
        arguments = [sys.executable, "-m", "ringpool", *map(str, words)]
        self._terminal, end = pty.openpty()
        try:
            self._process = subprocess.Popen(
                arguments, cwd=cwd, env=variables, stdin=end, stdout=end, stderr=end, preexec_fn=_take_terminal
            )
        finally:
            os.close(end)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def type(self, text: str) -> None:
        """As on a keyboard; ``\\x03`` is Ctrl-C."""
        os.write(self._terminal, text.encode())

    def shows(self, pattern: str) -> bool:
        """Whether its screen has that now."""
        self._read()
        return re.search(pattern, self.screen.text) is not None

    def wait_for(self, pattern: str) -> None:
        wait_until(lambda: self.shows(pattern), f"{pattern} on the terminal")

    def finish(self) -> int:
        """Its exit status, once it has ended."""
        wait_until(self._read, "the end of the terminal")
        status = self._process.wait(WATCHDOG_S)
        assert "Traceback" not in self.screen.text, self.screen.text
        return status

    def _read(self) -> bool:
        """Whether the last writer has gone."""
        while select.select([self._terminal], [], [], 0)[0]:
            try:
                self.screen.write(os.read(self._terminal, 65536))
            except OSError:  # EIO
                return True
        return False

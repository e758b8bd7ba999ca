"""Whole programs for the coordinator's tests: written to a file, run as users run them, and looked after.

    Program(directory, body) --say--> wait_for(word) --> signal(...) --> finish() --> assert_nothing_is_left()

Every process that a program starts inherits a mark in its environment, so that what it left behind is found wherever
it has hidden itself (another session, another parent).
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

from ringpool.shm import segment

ROOT = Path(__file__).resolve().parents[2]
WATCHDOG_S = 30
_PREAMBLE = """\
from __future__ import annotations
import atexit, itertools, os, select, signal, sys, threading
from pathlib import Path
from ringpool import Coordinator, FileTask
from ringpool.errors import *
from tests import task_functions as tasks

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # one write, even where stdout is unbuffered
    sys.stdout.flush()

def wait():
    while True:
        select.select([], [], [], 0.05)  # pause() may miss a signal that comes right before it

"""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Until ``condition()`` is true; fails, saying in vain for ``what``, after 30 s."""
    deadline = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        select.select([], [], [], 0.005)


def is_alive(pid: int) -> bool:
    """Whether process ``pid`` executes, or may; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_worker(pid: int) -> None:
    """SIGKILL for a worker that its pool says is living: it may have died a moment ago."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def state_of(pid: int) -> str:
    """The state letter of a living process (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def shared_memory_of(pid: int) -> set[str]:
    """What stands in ``/dev/shm`` under names that carry the pid."""
    names = os.listdir(segment.SHM_DIRECTORY)
    return {name for name in names if (owner := segment.owner_of(name)) is not None and owner.pid == pid}


def wait_until_gone(pid: int) -> None:
    """Another pool that starts on this machine may be at its segment: then that one removes it."""
    wait_until(lambda: not shared_memory_of(pid), "the end of a dead segment")


class Program:
    """A program whose ``main()`` is ``body``, in a process group of its own; all it started is killed at the end.

    ``top``: code before ``main``. ``guarded``: whether ``main()`` is called under the usual guard.
    """

    def __init__(
        self, directory: Path, body: str, *, top: str = "", guarded: bool = True, terminal: int | None = None
    ) -> None:
        self.file = directory / "program.py"
        call = 'if __name__ == "__main__":\n    main()\n' if guarded else "main()\n"
        main = textwrap.indent(textwrap.dedent(body), "    ")
        self.file.write_text(f"{_PREAMBLE}{textwrap.dedent(top)}\ndef main():\n{main}\n{call}")
        self._out, self._err = directory / "program.out", directory / "program.err"
        self._mark = f"RINGPOOL_TEST_MARK={secrets.token_hex(8)}"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(path or os.getcwd() for path in sys.path)]),
            "PYTHONWARNINGS": "ignore::DeprecationWarning",  # fork in a program with threads, from 3.12 on
            **dict([self._mark.split("=")]),
        }
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, self.file],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=out,
                stderr=err,
                process_group=0 if terminal is None else None,
                start_new_session=terminal is not None,
                preexec_fn=_heed_interrupts,
            )
        self.pid = self.process.pid

    # ---- what it does

    @property
    def out(self) -> str:
        return self._out.read_text(errors="surrogateescape")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="surrogateescape")

    def wait_for(self, word: str) -> str:
        """Until the program says a line that begins with ``word``; what else is in the line."""
        found: list[str] = []

        def said() -> bool:
            lines = self.out.split("\n")[:-1]  # whole ones: a print may arrive in pieces
            found.extend(line.removeprefix(word).strip() for line in lines if line.startswith(word))
            assert found or self.process.poll() is None, f"it ended without saying {word}:\n{self.out}\n{self.err}"
            return bool(found)

        wait_until(said, f"{word}, from a program that printed\n{self.out}\n{self.err}")
        return found[0]

    def signal(self, number: int, *, group: bool = True) -> None:
        """Send a signal to the program's process group, as a terminal does, or to the program alone."""
        (os.killpg if group else os.kill)(self.pid, number)

    def finish(self) -> int:
        """Until it ends; its return code."""
        try:
            return self.process.wait(WATCHDOG_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program hangs; it printed\n{self.out}\n{self.err}") from None

    # ---- what it left

    @property
    def processes(self) -> set[int]:
        """All living processes that come from it, but those amid ``exec``: these show no environment."""
        mark = self._mark.encode()
        found: set[int] = set()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    words = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                except OSError:  # it ended, or it belongs to somebody else
                    continue
                if mark in words and is_alive(int(entry)):
                    found.add(int(entry))
        return found

    def assert_no_process_is_left(self, but: Collection[int] = ()) -> None:
        """No process of it lives, ``but`` these."""
        wait_until(lambda: not self.processes.difference(but), f"the end of all its processes; it printed\n{self.err}")

    def assert_nothing_is_left(self) -> None:
        """No process, nothing in ``/dev/shm``, and no storm of tracebacks."""
        self.assert_no_process_is_left()
        assert shared_memory_of(self.pid) == set()
        assert self.err.count("Traceback") <= 1, self.err

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for pid in {self.pid, *self.processes} if self.process.poll() is None else self.processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        for name in shared_memory_of(self.pid):
            try:
                os.unlink(f"{segment.SHM_DIRECTORY}/{name}")
            except FileNotFoundError:
                pass


def _heed_interrupts() -> None:
    """Where a shell runs the tests in the background they ignore SIGINT, and so would the program."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

"""Second processes for tests: a function of a test module runs in a fresh interpreter, and talks by lines.

test                                        child
child = Child(function, *arguments)   -->   function(*arguments)      arguments are strings
child.wait_for("held")                <--   say("held")
child.answer()                        -->   listen()
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType

_MAIN = (
    "import importlib, sys; module, name, *rest = sys.argv[1:]; getattr(importlib.import_module(module), name)(*rest)"
)


class Child:
    """A process that runs ``function``; killed, if it must be, when the block ends. The test's timeout watches it."""

    def __init__(self, function: Callable[..., None], *arguments: str | os.PathLike[str]) -> None:
        command = [sys.executable, "-c", _MAIN, function.__module__, function.__qualname__, *map(os.fspath, arguments)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.pid = self.process.pid

    def wait_for(self, line: str) -> None:
        """Wait until the child says ``line``."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline().decode().strip()
        assert said == line, f"the child said {said!r} (its exit status: {self.process.poll()})"

    def answer(self) -> None:
        """Let the child's ``listen`` return."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def succeed(self) -> None:
        """Wait for its end, which must be a good one."""
        assert self.process.wait() == 0

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def say(line: str) -> None:
    """In the child: one line to the test, by one write: print of an unbuffered stdout takes two, and a kill between."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def listen() -> None:
    """In the child: wait for the test's ``answer``."""
    sys.stdin.readline()

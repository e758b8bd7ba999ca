"""What the second processes of the lock tests run, and what both sides look at; see ``child``."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.workers.files.child import Child, listen, say

from ringpool.errors import LockTimeoutError
from ringpool.workers.files import lockfiles, locks, stripes
from ringpool.workers.files.asynclocks import AsyncPathLock
from ringpool.workers.files.locks import LockSet, Mode, PathLock

PATIENCE_S = 60


def lock_file(base: Path, lock: PathLock | AsyncPathLock) -> Path:
    return base / f".ringpool/locks/{lock.stripe:02x}.lock"


def is_free(path: Path, *, shared: bool = False) -> bool:
    """Whether a stranger could take the lock file at ``path``, or share it."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def waiting(path: Path) -> int:
    """How many tickets there are on the lock file at ``path``, of all processes. Source: proc(5), /proc/locks.

    It may miss some, or see one twice: the kernel hands the table out in pieces, while others change it.
    """
    inode = path.stat().st_ino
    found: set[str] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[1] == "OFDLCK" and fields[5].rpartition(":")[2] == str(inode):
            found.add(fields[6])
    return len(found)


@contextmanager
def in_a_thread(action: Callable[[], None]) -> Iterator[threading.Thread]:
    """``action`` runs beside the block, and has ended when the block is left; its error is raised there."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
    if errors:
        raise errors[0]


def until(condition: Callable[[], object]) -> None:
    """Wait for ``condition``, a minute at most."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def enter_in_turn_here(path: Path, mode: Mode, log: Path, name: str) -> None:
    with PathLock(path, mode, timeout_s=60):
        append(str(log), name)


def share_until(path: Path, marks: Path, name: str, count: str) -> None:
    with PathLock(path, "shared", timeout_s=60):
        (marks / name).touch()
        until(lambda: len(os.listdir(marks)) == int(count))


def left_marked(path: Path, text: str) -> None:
    """Leave the lock file of ``path`` with the mark of a killed process."""
    with Child(mark_and_wait, path, text) as child:
        child.wait_for("marked")
        child.kill()


# ---- for children ----------------------------------------------------------------------------------------------------


def mode_of(word: str) -> Mode:
    return "shared" if word == "shared" else "exclusive"


def hold(path: str, mode: str = "exclusive") -> None:
    """Hold the lock until the test answers."""
    with PathLock(path, mode_of(mode)):
        say("held")
        listen()
    say("released")
    listen()


def try_it(path: str, mode: str = "exclusive") -> None:
    try:
        with PathLock(path, mode_of(mode), timeout_s=0):
            say("had")
    except LockTimeoutError:
        say("taken by somebody else")


def hold_softly(path: str, mode: str) -> None:
    """As ``hold``, on what is taken for a network file system."""
    lockfiles.is_network = lambda f_type: True
    hold(path, mode)


def enter_in_turn(path: str, mode: str, log: str, name: str) -> None:
    """Write ``name`` to the log while holding the lock."""
    with PathLock(path, mode_of(mode), timeout_s=PATIENCE_S):
        append(log, name)
    listen()


def enter_when_rung(path: str, mode: str, log: str, name: str) -> None:
    """As ``enter_in_turn``, without a look that nobody has rung for."""
    stripes.Stripe.look_s = 1000
    locks.IDLE_S = 1000
    enter_in_turn(path, mode, log, name)


def enter_in_turn_as_task(path: str, mode: str, log: str, name: str) -> None:
    async def enter() -> None:
        async with AsyncPathLock(path, mode_of(mode), timeout_s=PATIENCE_S):
            append(log, name)

    asyncio.run(enter())
    listen()


def append(log: str, name: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, name.encode())
    finally:
        os.close(fd)


def enter_together(path: str, marks: str, name: str, count: str) -> None:
    """Share the lock until so many do; called in by the one before, not by a look of one's own."""
    stripes.Stripe.look_s = 1000
    with PathLock(path, "shared", timeout_s=PATIENCE_S):
        Path(marks, name).touch()
        until(lambda: len(os.listdir(marks)) == int(count))
    listen()


def count_up_in_sets(directory: str, rounds: str, backwards: str) -> None:
    """Count in two files under the locks of both, named in this or that order."""
    paths = [Path(directory, name) for name in ("a", "b", "c")]
    if backwards:
        paths.reverse()
    for _ in range(int(rounds)):
        with LockSet(paths, timeout_s=PATIENCE_S):
            for path in paths:
                path.write_text(str(int(path.read_text()) + 1))


def mark_and_wait(path: str, text: str) -> None:
    with LockSet([path]) as several:
        several.mark(text.encode())
        say("marked")
        listen()


def wait_beside_a_fork(path: str) -> None:
    """One thread waits for the lock; then the process forks, and the child lives on."""
    file = lock_file(Path(path).parent, PathLock(path))

    def wait() -> None:
        with PathLock(path, timeout_s=PATIENCE_S):
            pass

    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: forking beside threads
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    until(lambda: waiting(file))
    if os.fork() == 0:
        say("forked")
        listen()
        os._exit(0)
    os.wait()

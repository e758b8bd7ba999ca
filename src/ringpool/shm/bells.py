"""Bells: what wakes those who wait for a path of a status table. One FIFO per path, in a directory of the table's own.

    /dev/shm/<segment>@<uuid>/          0700; the uuid is random and stands in a 0600 segment: nobody can be there first
    /dev/shm/<segment>@<uuid>/<hash>    0600; exists while somebody waits, or did until he was killed

    all under the table's mutex
    waiter  mark the entry as waited -> listen: mkfifo, open for reading      then poll on it, without the mutex
    waker   ring: open, a byte, unlink, close -> commit: the entry is available, and unmarked
    leaver  forget: nobody reads it -> unlink -> unmark

Nobody reads the byte: it stays in the FIFO, and so each of those who poll sees it. Whoever comes later makes a new one.
Those who are woken look at the entry under the mutex, thus after the commit; where the waker did not get to it, they
wait again. A FIFO that was rung and still has its name was left by a waker that was interrupted; ``listen`` replaces
it. A waiter that is killed leaves a FIFO and a mark, which the next waiter or waker of that path takes over. The waker
opens for reading as well, so that the byte never meets a FIFO without readers: SIGPIPE would kill a program that has it
at its default.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select

from ringpool.shm.segment import SHM_DIRECTORY

_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


def directory_of(segment: str, uuid: bytes) -> str:
    """The directory of the bells of a table."""
    return f"{SHM_DIRECTORY}/{segment}@{uuid.hex()}"


def _fifo(directory: str, digest: int) -> str:
    return f"{directory}/{digest:016x}"


def listen(directory: str, digest: int) -> int:
    """A descriptor that is readable once the bell of this path is rung; the caller closes it. Raises ``OSError``."""
    fifo = _fifo(directory, digest)
    bell = _open_to_listen(directory, fifo)
    sleep = select.poll()
    sleep.register(bell, select.POLLIN)
    if sleep.poll(0):
        os.close(bell)
        os.unlink(fifo)
        bell = _open_to_listen(directory, fifo)
    return bell


def _open_to_listen(directory: str, fifo: str) -> int:
    try:
        os.mkfifo(fifo, 0o600)
    except FileExistsError:
        pass  # others wait as well, or did
    except FileNotFoundError:
        os.mkdir(directory, 0o700)
        os.mkfifo(fifo, 0o600)
    return os.open(fifo, os.O_RDONLY | _FLAGS)


def ring(directory: str, digest: int) -> None:
    """Wake all who listen to the bell of this path. Raises ``OSError``, then before it has woken anybody."""
    fifo = _fifo(directory, digest)
    try:
        bell = os.open(fifo, os.O_RDWR | _FLAGS)
    except FileNotFoundError:
        return
    try:
        os.write(bell, b"!")
        os.unlink(fifo)
    finally:
        os.close(bell)


def forget(directory: str, digest: int) -> bool:
    """Remove the bell of this path where nobody listens to it any more; whether there is none now.

    Those who do listen are woken by the closing (POLLHUP), and look again.
    """
    fifo = _fifo(directory, digest)
    try:
        os.close(os.open(fifo, os.O_WRONLY | _FLAGS))
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.ENXIO:  # no descriptor left: whoever has the path next removes it
            return False
        os.unlink(fifo)  # no reader
        return True
    return False


def ring_all(directory: str) -> None:
    """Wake whoever listens to any bell of a table, and remove them and their directory."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            ring(directory, int(name, 16))
        os.rmdir(directory)

"""What a dead worker's tasks have started: a worker leads a session, and whatever has not made one of its own is in it.

SIGKILL for the worker's process group reaches most of it, in one step; not what leads a group of its own, as `timeout`
does, and jobs of a shell with job control. Who ends these:

    a worker has died             its coordinator
    the coordinator was killed    the fork server, which ends for that, and whose children the workers are
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from typing import NamedTuple

from ringpool.shm.layout import WORKERS_MAX

ROUNDS_MAX = 10  # they may fork meanwhile
LATELY_S = 2.0  # so soon, a pid is not given to another
WORKER_NAME = "ringpool-w"  # and its number


class _Stat(NamedTuple):
    name: bytes
    is_dead: bool
    parent: int
    session: int
    exit_status: int  # of a zombie, as ``wait`` gives it


def kill_session(leader: int) -> None:
    """SIGKILL for every process of the session that ``leader`` led, who is dead. Never raises."""
    for _ in range(ROUNDS_MAX):
        members = [pid for pid in _pids() if _is_of_session(pid, leader)]
        if not members:
            return
        for pid in members:
            _kill(pid, leader)


class Orphans:
    """For a fork server: the workers among its children, whose coordinator may be killed."""

    def __init__(self) -> None:
        self._reaped: deque[tuple[float, int]] = deque(maxlen=WORKERS_MAX)

    def note(self, pid: int) -> None:
        """That child is about to be reaped."""
        if self._is_left(pid):
            self._reaped.append((time.monotonic(), pid))

    def end(self) -> None:
        """The server ends, for there is no coordinator any more: ``kill_session`` for each worker that has not ended
        well, or not at all. Those that were reaped long ago their coordinator has looked after. Never raises.
        """
        oldest_s = time.monotonic() - LATELY_S
        leaders = [pid for pid in _pids() if self._is_left(pid)]
        for leader in leaders + [pid for reaped_s, pid in self._reaped if reaped_s > oldest_s]:
            kill_session(leader)

    @staticmethod
    def _is_left(pid: int) -> bool:
        found = _stat_of(pid)
        if found is None or found.parent != os.getpid() or found.session != pid:
            return False
        return found.name.startswith(WORKER_NAME.encode()) and not (found.is_dead and found.exit_status == 0)


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def _stat_of(pid: int) -> _Stat | None:
    """See proc(5); None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
            line = stat.read()
    except OSError:
        return None
    end_of_name = line.rfind(b")")
    fields = line[end_of_name + 2 :].split()  # from the third on: state, parent, group, session, ...
    if len(fields) < 4:
        return None
    name = line[line.find(b"(") + 1 : end_of_name]
    exit_status = int(fields[49]) if len(fields) > 49 else 0  # not in every sandbox
    return _Stat(name, fields[0] in (b"Z", b"X"), int(fields[1]), int(fields[3]), exit_status)


def _is_of_session(pid: int, session: int) -> bool:
    """Whether the process is of that session, and alive."""
    found = _stat_of(pid)
    return found is not None and found.session == session and not found.is_dead


def _kill(pid: int, session: int) -> None:
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if _is_of_session(pid, session):  # still that process
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)

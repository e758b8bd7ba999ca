"""What a dead worker's tasks have started: a worker leads a session, and whatever has not made one of its own is in it.

SIGKILL for the worker's process group reaches most of it, in one step; not what leads a group of its own, as `timeout`
does, and jobs of a shell with job control.
"""

from __future__ import annotations

import contextlib
import os
import signal

ROUNDS_MAX = 10  # they may fork meanwhile


def kill_session(leader: int) -> None:
    """SIGKILL for every process of the session that ``leader`` led, who is dead. Never raises."""
    for _ in range(ROUNDS_MAX):
        members = [pid for pid in _pids() if _session_of(pid) == leader]
        if not members:
            return
        for pid in members:
            _kill(pid, leader)


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def _session_of(pid: int) -> int:
    """The session of a process; 0 where there is none, or it is dead already."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
            line = stat.read()
    except OSError:
        return 0
    fields = line[line.rfind(b")") + 2 :].split()  # state, parent, group, session, ...
    return int(fields[3]) if len(fields) > 3 and fields[0] not in (b"Z", b"X") else 0


def _kill(pid: int, session: int) -> None:
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if _session_of(pid) == session:  # still that process
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)

"""A process's identity, and whether it lives.

A pid alone names nobody: pids are used again. Pid and start time (ticks since boot, field 22 of ``/proc/PID/stat``)
name one process on one boot, inside one pid namespace. In a time namespace the kernel shows start times by its clock;
here they are counted from the boot of the machine. A zombie counts as dead: it executes nothing any more, and the
kernel has released what it held. Reclaim only on this proof, never on a heartbeat.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_forks = 0


class Owner(NamedTuple):
    """A process: its pid, and its start time in ticks since boot."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """Whether this very process still runs. False for a zombie, and for another process with its pid.

        True where that cannot be told, as without a descriptor to look with: nothing is proven.
        """
        try:
            return self.start != 0 and start_time(self.pid) == self.start
        except OSError:
            return True


def start_time(pid: int) -> int:
    """When process ``pid`` started, in ticks since boot; 0 where there is none or it is a zombie. Source: proc(5).

    Raises ``OSError`` where it cannot be told: no descriptor, or no memory, is left.
    """
    state, start = state_of(pid)
    return 0 if state in (b"Z", b"X") else start


def state_of(pid: int) -> tuple[bytes, int]:
    """The state of the main thread of process ``pid``, a letter of proc(5), and its start time; empty and 0 where there
    is none. Raises ``OSError``.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
            line = stat.read()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends while we read
        return b"", 0
    fields = line[line.rfind(b")") + 2 :].split()  # the command before it may hold spaces and parentheses
    if len(fields) < 20:
        return b"", 0
    return fields[0], int(fields[19]) - _ticks_ahead()


@functools.cache
def _ticks_ahead() -> int:
    """By how many ticks the clock of this process's time namespace is ahead of the machine's. Source:
    time_namespaces(7).
    """
    try:
        with open("/proc/self/timens_offsets", "rb") as offsets:
            for clock, seconds, nanoseconds in map(bytes.split, offsets):
                if clock == b"boottime":
                    return (int(seconds) * 1_000_000_000 + int(nanoseconds)) * _TICKS_PER_S // 1_000_000_000
    except FileNotFoundError:  # a kernel without them
        pass
    return 0


def forks() -> int:
    """How many forks there are between this process and the one that imported this."""
    return _forks


def _after_fork() -> None:
    global _forks
    _forks += 1
    _ticks_ahead.cache_clear()  # unshare(2) moves the children that come after it


os.register_at_fork(after_in_child=_after_fork)


def this_process() -> Owner:
    """The identity of the calling process. Raises ``OSError`` where no descriptor is left to look it up."""
    pid = os.getpid()
    return Owner(pid, start_time(pid))


def boot_id() -> bytes:
    """16 bytes that change with every boot."""
    with open("/proc/sys/kernel/random/boot_id", "rb", buffering=0) as text:
        return bytes.fromhex(text.read().strip().replace(b"-", b"").decode())


def pid_namespace() -> int:
    """The inode of the calling process's pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino

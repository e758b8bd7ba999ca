"""A process's identity, and whether it lives.

A pid alone names nobody: pids are used again. Pid and start time (ticks since boot, field 22 of ``/proc/PID/stat``)
name one process on one boot, inside one pid namespace. A zombie counts as dead: it executes nothing any more, and the
kernel has released what it held. Reclaim only on this proof, never on a heartbeat.
"""

from __future__ import annotations

import os
from typing import NamedTuple


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
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            line = stat.read()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends while we read
        return 0
    fields = line[line.rfind(b")") + 2 :].split()  # the command before it may hold spaces and parentheses
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return 0
    return int(fields[19])


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

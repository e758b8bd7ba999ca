"""What the tests of the executor's limits have run by its workers, which import this module.

They tell where they are by files, never by time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes a worker longer than most of its tasks
    import numpy as np

WATCHDOG_S = 300
MIB = 1 << 20

_kept: list[object] = []  # what a task leaves behind in its worker


def announce(path: str) -> None:
    """``path`` appears, with this process's pid in it."""
    Path(path + ".new").write_text(str(os.getpid()))
    os.rename(path + ".new", path)


def wait_for(path: str) -> None:
    """Until ``path`` exists."""
    for _ in range(WATCHDOG_S * 200):
        if os.path.exists(path):
            return
        select.select([], [], [], 0.005)
    raise TimeoutError(f"{path} did not appear")


def double(x: int) -> int:
    return 2 * x


def process_id(_item: object = None) -> int:
    return os.getpid()


def overrun(how: str) -> None:
    """Never ends, in one way or another."""
    if how == "python":
        while True:
            pass
    elif how == "sleep":
        time.sleep(WATCHDOG_S)
    elif how == "holding the GIL":
        ctypes.PyDLL(None).sleep(WATCHDOG_S)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "child":
        subprocess.run(["sleep", str(WATCHDOG_S)], check=True)
    elif how == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            signal.pause()
    raise AssertionError(how)


def overrun_with_child(begun: str) -> None:
    """Never ends; ``begun`` appears with the pid of a child that would outlive it."""
    child = subprocess.Popen(["sleep", str(WATCHDOG_S)])
    Path(begun + ".new").write_text(str(child.pid))
    os.rename(begun + ".new", begun)
    child.wait()


def hold(gate: str, begun: str) -> int:
    """Says that it has begun, and ends when the gate appears."""
    announce(begun)
    wait_for(gate)
    return os.getpid()


def overrun_if(item: int) -> int:
    """Item 3 never ends; the others are twice themselves."""
    if item == 3:
        overrun("python")
    return 2 * item


def overrun_at_first(marks: str) -> str:
    """Never ends, each time but the third; one mark for each time."""
    n = len(os.listdir(marks))
    Path(marks, str(n)).touch()
    if n < 2:
        overrun("sleep")
    return "done"


def die_at_first(marks: str) -> str:
    """Kills its worker, each time but the third; one mark for each time."""
    n = len(os.listdir(marks))
    Path(marks, str(n)).touch()
    if n < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die(_item: object = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(marks: str) -> None:
    """Raises; one mark for each time."""
    Path(marks, str(len(os.listdir(marks)))).touch()
    raise ValueError("refused")


def touch_memory(n_bytes: int) -> mmap.mmap:
    """That much memory of this process's own."""
    block = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, n_bytes, mmap.PAGESIZE):
        block[page] = 1
    return block


def grow(n_bytes: int, gate: str) -> int:
    """Takes memory, and gives it back when the gate appears."""
    block = touch_memory(n_bytes)
    wait_for(gate)
    block.close()
    return n_bytes


def grow_without_end() -> None:
    while True:
        _kept.append(touch_memory(8 * MIB))


def grow_if(item: int) -> int:
    """Item 5 takes memory without end; the others are twice themselves."""
    if item == 5:
        grow_without_end()
    return 2 * item


def leave_behind(n_bytes: int) -> int:
    """Takes memory, and keeps it; its pid."""
    _kept.append(touch_memory(n_bytes))
    return os.getpid()


def look_at(numbers: np.ndarray, gate: str) -> float:
    """Reads all of an array, and ends when the gate appears."""
    total = float(numbers.sum())
    wait_for(gate)
    return total


def spin(seconds: float) -> float:
    """About so many seconds of work."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds

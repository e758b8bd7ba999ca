"""What a file costs in memory: its state, its lock, its task. Each is measured in a process of its own.

    python -m benchmarks.guide_memory NAME N        prints bytes a file

A figure is the growth of the process's peak (VmHWM over VmRSS before) over ``N`` files, what it has touched of shared
memory and mapped files included; 100 of the same were made before, so that no import counts. Of pools, the parent's.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench_dispatch import no_op
from benchmarks.guide_baseline import FileLocks, JsonQueue, TextStatus

from ringpool import Coordinator, FileState, FileStatusTable, PathLock


def path_of(number: int) -> str:
    """A path as it might be."""
    return f"/srv/in/batch/{number:08}.tif"


# ---- each keeps what it has made until its stack is closed


def status_table(stack: contextlib.ExitStack, n: int) -> None:
    """Ours: states."""
    table = stack.enter_context(FileStatusTable(f"bench-{os.getpid()}-{secrets.token_hex(4)}", n))
    stack.callback(table.unlink)
    for number in range(n):
        table.set(path_of(number), FileState.PROCESSING)


def text_status(stack: contextlib.ExitStack, n: int) -> None:
    """Theirs: states."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-", dir="/dev/shm"))
    table = TextStatus(f"{directory}/status.txt", n, threading.Lock())
    stack.callback(table.close)
    table.fill([path_of(number) for number in range(n)], "processing")


def dict_status(stack: contextlib.ExitStack, n: int) -> None:
    """Theirs, of one process: states."""
    states = {path_of(i): {"state": "processing", "pid": os.getpid(), "since": time.time()} for i in range(n)}
    stack.callback(states.clear)


def path_locks(stack: contextlib.ExitStack, n: int) -> None:
    """Ours: lock objects that are kept, each used once."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-"))
    os.mkdir(f"{directory}/.ringpool")
    locks = [PathLock(f"{directory}/{number:08}.tif") for number in range(n)]
    for lock in locks:
        with lock:
            pass
    stack.callback(locks.clear)


def file_locks(stack: contextlib.ExitStack, n: int) -> None:
    """Theirs, between processes."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-"))
    locks = FileLocks()
    for number in range(n):
        with locks.lock(f"{directory}/{number:08}.tif"):
            pass
    stack.callback(lambda: locks)  # which keeps them


def thread_locks(stack: contextlib.ExitStack, n: int) -> None:
    """Theirs, of one process."""
    locks = {path_of(number): threading.Lock() for number in range(n)}
    for lock in locks.values():
        with lock:
            pass
    stack.callback(locks.clear)


def run(stack: contextlib.ExitStack, n: int) -> None:
    """Ours: a lazy list of tasks; the parent."""
    with Coordinator(workers=2) as coordinator:
        for _ in coordinator.run_file_tasks(no_op, (path_of(number) for number in range(n))):
            pass


def submit(stack: contextlib.ExitStack, n: int) -> None:
    """Ours: all queued at once, with a future for each; the parent."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-"))
    file = Path(f"{directory}/00000000.tif")
    file.touch()  # what is submitted has to be there
    coordinator = stack.enter_context(Coordinator(workers=2))
    futures = [coordinator.submit_file_task(no_op, file) for _ in range(n)]
    stack.callback(futures.clear)


def json_queue(stack: contextlib.ExitStack, n: int) -> None:
    """Theirs: any process that claims a task."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringpool-bench-"))
    path = f"{directory}/queue.json"
    process = multiprocessing.get_context("fork").Process(target=fill_queue, args=(path, n))  # who fills does not count
    process.start()
    process.join()
    JsonQueue(path).claim()


def fill_queue(path: str, n: int) -> None:
    """In a process: make a queue of so many tasks."""
    JsonQueue(path).fill(path_of(number) for number in range(n))


GROUPS: dict[str, dict[str, Callable[[contextlib.ExitStack, int], None]]] = {
    "states": {
        "FileStatusTable": status_table,
        "guide: text in memory": text_status,
        "guide: dict, one process": dict_status,
    },
    "locks": {
        "PathLock": path_locks,
        "guide: FileLock": file_locks,
        "guide: threading.Lock": thread_locks,
    },
    "queued tasks": {
        "run_file_tasks": run,
        "guide: JSON file": json_queue,
        "submit_file_task, futures kept": submit,
    },
}


def measure_alone(name: str, n: int) -> float:
    """Bytes a file, from a process of its own. Raises ``CalledProcessError``."""
    command = [sys.executable, "-m", "benchmarks.guide_memory", name, str(n)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def memory_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM``. Source: proc(5)."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def main(name: str, n: int) -> None:
    """Measure it here."""
    make = {name: make for group in GROUPS.values() for name, make in group.items()}[name]
    with contextlib.ExitStack() as stack:
        make(stack, 100)
    before_bytes = memory_bytes("VmRSS")
    with contextlib.ExitStack() as stack:
        make(stack, n)
        print(json.dumps((memory_bytes("VmHWM") - before_bytes) / n))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
